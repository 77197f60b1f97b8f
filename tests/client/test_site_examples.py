"""From records to what a model trains on: each class once, each patient on one side."""

import json

import pytest

from huizhen.client.governance import SitePolicy, admit
from huizhen.client.records.rows import read_lines, read_rows, to_record
from huizhen.client.site_examples import site_examples
from huizhen.protocol.errors import ConfigError, GovernanceError


@pytest.fixture
def read(tiny_classifier, rows):
    """Return a site's examples from rows of patient, text and disease."""

    def read(rows=rows, held_out=(), **policy):
        records, held = (
            [
                to_record({"id": p, "text": t, "disease": d, "ward": 3}, "id", f"rows:{i}")
                for i, (p, t, d) in enumerate(part, 1)
            ]
            for part in (rows, held_out)
        )
        admitted = admit(records, SitePolicy(site="A", **policy), held_out=held)
        return site_examples(admitted, tiny_classifier.encoder(), tiny_classifier)

    return read


def test_records_of_a_class_that_the_study_does_not_list_are_read_and_not_trained_on(read, rows):
    found = read([*rows, ("p0", "sneeze", "hay fever")], [("h0", "rash", "plague")])
    assert len(found.train.ids) == len(rows)
    assert len(found.read.ids) == len(rows) + 1
    assert found.read.labels[-1] == found.held_out.labels[0] == -1
    assert found.train.num_patients == 8
    assert found.fields_dropped == ("id", "ward")


def test_too_few_patients_of_listed_classes_are_refused(read):
    few = [("p0", "rash", "measles"), ("p1", "rash", "plague"), ("p2", "rash", "plague")]
    with pytest.raises(
        GovernanceError, match=r"'A' has 1 training patients with a class of \[task"
    ):
        read(few)


def test_a_field_that_the_policy_withholds_is_refused(read):
    with pytest.raises(GovernanceError, match="the policy of site 'A' does not let it"):
        read(withheld_fields=("text",))


LINES = [
    {"id": "p1", "text": "发热", "disease": "measles"},
    {"id": "p2", "text": 'a "quoted" comma', "disease": "asthma"},
]


def test_lines_in_memory_are_read_as_those_of_a_file_are(tmp_path):
    data = "\n".join(json.dumps(line, ensure_ascii=False) for line in LINES).encode()
    path = tmp_path / "export.jsonl"
    path.write_bytes(data)
    assert list(read_lines(data, "export.jsonl")) == list(read_rows(path))
    assert [fields for _, fields in read_lines(data, "x")] == LINES
    for wrong, error in ((b"{", GovernanceError), ("发".encode("gb18030"), ConfigError)):
        with pytest.raises(error, match=r"^export:3: "):
            list(read_lines(data + b"\n" + wrong, "export"))
