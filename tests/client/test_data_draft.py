"""A first data.toml knows what it can know, asks for the rest, and is always TOML."""

import csv
import json
import tomllib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from huizhen.client.data_draft import draft
from huizhen.client.data_terms import parse_data
from huizhen.client.quality.lab_table import shipped_table
from huizhen.client.records.export import parts, read_part
from huizhen.client.records.record import Record
from huizhen.protocol.errors import ConfigError

COLUMNS = {
    "住院号": "Z1", "姓名": "王建国", "性别": "男", "年龄": "56", "入院时间": "2023-05-06",
    "联系电话": "13800138000",
    "现病史": "患者三天前无明显诱因出现咳嗽咳痰,痰为白色黏液状,伴低热,无胸痛咯血。",
    "乳酸脱氢酶": "250", "转归": "好转",
}  # fmt: skip


def write(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_draft_knows_columns_by_their_names_and_looks(tmp_path):
    path = write(tmp_path / "notes.csv", [COLUMNS, {**COLUMNS, "住院号": ""}])
    [source] = tomllib.loads(draft(path, shipped_table()))["sources"]
    assert source == {
        "path": "notes.csv", "patient": "住院号", "time": "入院时间", "sex": "性别", "age": "年龄",
        "fill_down": ["住院号"], "text": ["现病史"], "labs": {"乳酸脱氢酶": ""},
        "identifiers": {"name": ["姓名"], "phone": ["联系电话"], "mrn": ["住院号"]},
        "fields": {"转归": "转归"},
    }  # fmt: skip


def test_a_draft_with_the_blanks_filled_in_reads_the_table(tmp_path):
    path = write(tmp_path / "notes.csv", [COLUMNS])
    text = draft(path, shipped_table())
    for old, new in {
        'purpose = ""': 'purpose = "a test"', 'ethics = ""': 'ethics = "1"',
        'ethics_expires = ""': 'ethics_expires = "2027-01-01"',
        '"乳酸脱氢酶" = ""': '"乳酸脱氢酶" = "U/L"',
    }.items():  # fmt: skip
        assert text.count(old) == 1
        text = text.replace(old, new)
    data = parse_data(tomllib.loads(text), "data.toml")
    [record] = [one for part in parts(data.sources, tmp_path) for one in read_part(part, tmp_path)]
    assert isinstance(record, Record)
    assert (record.patient, record.sex, record.age) == ("Z1", "male", 56)
    assert record.text == COLUMNS["现病史"]
    assert record.fields == {"转归": "好转"}


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.csv", "", "holds no row"),
        ("a.csv", "id\n", "holds no row"),
        ("a.jsonl", "{\n", "holds no row"),
        ("a.hl7", "MSH|", "is hl7v2, expected a table"),
        ("a.txt", "x", "ends in none of"),
        ("none.csv", None, "there is no file"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, name, text, problem):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=problem):
        draft(tmp_path / name, shipped_table())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8")), st.text(max_size=40) | st.integers(), min_size=1
    )
)
def test_a_draft_is_toml_whatever_the_columns_are_called(tmp_path, row):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row), "utf-8")
    [source] = tomllib.loads(draft(path, shipped_table()))["sources"]
    named = (
        set(source.get("fields", {})) | set(source.get("labs", {})) | set(source.get("text", []))
    )
    roles = {
        source.get(role)
        for role in ("patient", "encounter", "time", "sex", "birth", "age", "death")
    }
    naming = {name for some in source.get("identifiers", {}).values() for name in some}
    assert named | roles | naming >= set(row)
