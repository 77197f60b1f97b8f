"""What a custodian demands holds before any record is used."""

import pytest

from huizhen.client.governance import SitePolicy, admit
from huizhen.client.records.record import Record
from huizhen.protocol.errors import GovernanceError


def records(*patients):
    return [Record(patient, {"text": "SECRET"}, f"a:{i}") for i, patient in enumerate(patients)]


def test_enough_patients_are_admitted_with_the_policy():
    policy = SitePolicy(site="A", minimum_patients=2)
    admitted = admit(records("p", "q", "p"), policy)
    assert len(admitted.records) == 3
    assert admitted.policy is policy


@pytest.mark.parametrize("patients", [(), ("p",), ("p", "p", "p")])
def test_many_records_of_one_patient_are_not_two_patients(patients):
    count = len(set(patients))
    noun = "patient" if count == 1 else "patients"
    with pytest.raises(
        GovernanceError, match=rf"^site 'A' has {count} training {noun}, at least 2"
    ):
        admit(records(*patients), SitePolicy(site="A"))


def test_what_was_admitted_does_not_show_its_records():
    assert "SECRET" not in repr(admit(records("p", "q"), SitePolicy(site="A")))
