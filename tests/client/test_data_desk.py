"""A cohort's folder: its snapshot, the sides, every problem; a report without small cells."""

import hashlib
import json
import re
import tomllib
from datetime import date

import pytest

from huizhen.client import data_desk
from huizhen.client.clean import CleanRecord
from huizhen.client.data_desk import DataDesk, gate
from huizhen.client.data_key import DataKey
from huizhen.client.data_report import page, statement
from huizhen.client.data_terms import parse_data
from huizhen.client.quality.lab_table import shipped_table
from huizhen.client.snapshot import read_parquet
from huizhen.protocol.errors import DamagedError, GovernanceError

KEY = DataKey(bytes(range(32)))
TODAY = date(2026, 6, 1)
TEXT = """
[data]
name = "<b>test</b>"
[governance]
purpose = "a test"
basis = "made_up"
minimum_patients = 2
smallest_cell = 3
[identifiers]
method = "none"
[split]
label = "disease"
[[sources]]
path = "notes.jsonl"
text = ["note"]
sex = "sex"
labs = {ldh = "U/L"}
fields = {disease = "disease"}
"""


def write(folder, count):
    with (folder / "notes.jsonl").open("w", encoding="utf-8") as file:
        for i in range(count):
            fields = {
                "patient": f"p{i}", "note": f"SECRET {hashlib.sha256(b'%d' % i).hexdigest()}",
                "sex": "F" if i else "M", "ldh": 200 + i, "disease": "AB"[i % 2],
            }  # fmt: skip
            file.write(json.dumps(fields) + "\n")
        file.write("{SECRET\n")


@pytest.fixture
def desk(tmp_path):
    def make(change=("", ""), watch=lambda *_: None, count=20):
        write(tmp_path, count)
        data = parse_data(tomllib.loads(TEXT.replace(*change)), "data.toml")
        folder = tmp_path / "all"
        made = DataDesk(
            data, tmp_path, folder, cohort="all", key=KEY, table=shipped_table(), watch=watch
        )
        return made, data, folder

    return make


def test_a_check_makes_no_snapshot_and_tells_every_problem(desk):
    made, _, folder = desk()
    outcome = made.check(TODAY)
    assert outcome.manifest is None
    assert made.snapshots.current() is None
    assert sorted(one.name for one in folder.iterdir()) == ["lock", "problems.jsonl"]
    told = [json.loads(line) for line in (folder / "problems.jsonl").read_bytes().splitlines()]
    assert {
        "place": "notes.jsonl:21", "code": "unreadable", "action": "quarantine",
        "about": "line is not JSON: mend the export",
    } in told  # fmt: skip
    assert "SECRET" not in json.dumps(told)


def test_a_snapshot_keeps_the_sides_of_patients_for_the_next(desk):
    made, _, folder = desk()
    first = made.snapshot(TODAY)
    assert first.manifest is not None
    assert first.manifest.held_out == 4
    assert first.manifest.made_by.keys() == {"data.toml", "labs"}
    before = {one.patient: one.is_held_out for one in read_parquet(made.snapshots.parquet())}
    assert b"p1" not in (folder / "splits.sealed").read_bytes()
    made, _, _ = desk(count=40)
    made.snapshot(TODAY)
    after = {one.patient: one.is_held_out for one in read_parquet(made.snapshots.parquet())}
    assert {patient: after[patient] for patient in before} == before
    assert sum(after.values()) == 8
    (folder / "splits.sealed").write_bytes(b"HZS1")
    with pytest.raises(DamagedError, match=r"splits\.sealed"):
        desk()[0].check(TODAY)


def test_dq_2_the_same_export_again_is_the_same_snapshot(desk):
    digests = {desk()[0].snapshot(TODAY).manifest.digest for _ in range(2)}
    assert len(digests) == 1
    other = desk(("smallest_cell = 3", "smallest_cell = 4"))[0].snapshot(TODAY).manifest.digest
    assert other not in digests  # made by other terms


def test_dq_4_neither_statement_nor_page_has_a_small_cell_or_a_value_of_anybody(desk):
    made, data, _ = desk()
    document = statement(data, made.snapshot(TODAY), TODAY)
    assert document["records"] == 20
    assert document["tables"]["sex"] == [
        {"name": "male", "count": None}, {"name": "female", "count": None},
    ]  # fmt: skip
    assert {one["name"]: one["count"] for one in document["fates"]}["unreadable"] is None
    assert document["labs"] == [
        {"name": "ldh", "unit": "U/L", "count": 20, "low": pytest.approx(201, abs=1),
         "middle": pytest.approx(209.5, abs=1), "high": pytest.approx(218, abs=1)},
    ]  # fmt: skip
    for number in _counts(document):
        assert number == 0 or number >= 3
    html = page(document)
    assert "SECRET" not in html + json.dumps(document)
    assert "<b>test</b>" not in html
    assert "&lt;b&gt;test&lt;/b&gt;" in html
    assert not re.search(r"<script|https?://|src=|@import", html)
    assert document["snapshot"] in html


def _counts(value):
    if isinstance(value, dict):
        for name, inner in value.items():
            if name in ("count", "records", "patients", "held_out_patients") and inner is not None:
                yield inner
            else:
                yield from _counts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _counts(inner)


def test_the_gate_is_open_and_the_page_shows_what_it_measured(desk, monkeypatch):
    measured = gate()
    assert measured.shortfalls() == ()
    monkeypatch.setattr(data_desk, "gate", lambda: measured)
    made, data, _ = desk(('method = "none"', ""))
    document = statement(data, made.check(TODAY), TODAY)
    assert {one["name"] for one in document["recall"]["familiar"]} >= {"id", "name", "phone", "mrn"}
    assert "陌生写法" in page(document)


def test_a_gate_that_is_shut_lets_nothing_be_read(desk, monkeypatch):
    monkeypatch.setattr(data_desk, "GATE_NOTES", 60)  # too few to show 99.5 %
    monkeypatch.setattr(data_desk, "GATE_TRAPS", 20)
    made, _, folder = desk(('method = "none"', ""))
    with pytest.raises(GovernanceError, match="is not good enough, nothing was read: recall of"):
        made.snapshot(TODAY)
    assert [one.name for one in folder.iterdir()] == ["lock"]


def test_how_far_it_is_is_told(desk):
    steps = []
    desk(watch=lambda step, count: steps.append((step, count)), count=2500)[0].check(TODAY)
    assert steps == [("reading", 0), ("cleaning", 1000), ("cleaning", 2000)]


def test_an_error_leaves_the_list_of_problems_as_it_was(desk, tmp_path):
    made, _, folder = desk()
    made.check(TODAY)
    before = (folder / "problems.jsonl").read_bytes()
    with pytest.raises(GovernanceError, match="record has unreadable"):
        desk(("[split]", '[quality]\nunreadable = "refuse"\n[split]'))[0].check(TODAY)
    assert (folder / "problems.jsonl").read_bytes() == before
    assert sorted(one.name for one in folder.iterdir()) == ["lock", "problems.jsonl"]


def test_a_clean_record_is_masked():
    record = CleanRecord(patient="a" * 32, is_held_out=False, place="a:1", text="SECRET", fields={})
    assert repr(record) == "CleanRecord(<masked>, a:1)"
