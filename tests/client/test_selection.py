"""Only allowed fields survive, and a patient becomes a number."""

import pytest

from huizhen.client.governance import SitePolicy, admit
from huizhen.client.records.record import Record
from huizhen.client.selection import select
from huizhen.protocol.errors import GovernanceError


def clean(wanted=("text",), **policy):
    records = [
        Record("SECRET-b", {"text": "one", "id": "SECRET-b", "phone": "SECRET"}, "a:1"),
        Record("SECRET-a", {"text": "two", "id": "SECRET-a"}, "a:2"),
        Record("SECRET-b", {"id": "SECRET-b"}, "a:3"),
    ]
    return select(admit(records, SitePolicy(site="A", **policy)), wanted)


def test_only_allowed_fields_survive():
    found = clean()
    assert [dict(record.fields) for record in found.records] == [
        {"text": "one"},
        {"text": "two"},
        {},
    ]
    assert found.fields_dropped == ("id", "phone")


def test_patients_become_numbers_in_the_order_of_their_first_record():
    found = clean()
    assert [record.patient for record in found.records] == [0, 1, 0]
    assert [record.place for record in found.records] == ["a:1", "a:2", "a:3"]


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        ({"allowed_fields": ("text",)}, ("text", "phone")),
        ({"withheld_fields": ("id",)}, ("id",)),
        ({"allowed_fields": ("id",), "withheld_fields": ("id",)}, ("id",)),
    ],
)
def test_a_task_that_reads_more_than_the_policy_lets_it_is_refused(policy, wanted):
    with pytest.raises(GovernanceError, match=rf"reads the field '{wanted[-1]}'.*site 'A'"):
        clean(wanted, **policy)


def test_nothing_of_a_record_shows():
    found = clean(("text", "phone"))
    assert "SECRET" not in repr(found)
    assert str(found.records[0]) == "SelectedRecord(<masked>, a:1)"


def test_held_out_patients_are_numbered_in_one_go_with_those_to_train_on():
    train = [Record("b", {"text": "one"}, "a:1"), Record("a", {"text": "two"}, "a:2")]
    held_out = [Record("c", {"text": "x"}, "a:3"), Record("a", {"text": "y", "phone": 1}, "a:4")]
    found = select(admit(train, SitePolicy(site="A"), held_out=held_out), ("text",))
    assert [record.patient for record in found.records] == [0, 1]
    assert [record.patient for record in found.held_out] == [2, 1]
    assert found.fields_dropped == ("phone",)
