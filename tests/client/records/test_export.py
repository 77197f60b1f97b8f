"""A whole export is read in one order, each file by its own reader."""

import gzip
import json

import polars as pl
import pytest
from sqlalchemy import create_engine

from huizhen.client.records.export import parts, read_part
from huizhen.client.records.record import Record, Unreadable
from huizhen.client.records.terms import SourceTerms
from huizhen.protocol.errors import ConfigError

ROWS = [{"patient": "1", "note": "cough"}, {"patient": "2", "note": "发热"}]
CSV = "patient,note\n1,cough\n2,发热\n"


def read(folder, **values):
    terms = SourceTerms(**{"text": ("note",), "fields": {}, **values})
    return [entry for part in parts([terms], folder) for entry in read_part(part, folder)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.csv").write_text(CSV, "utf-8")
    (tmp_path / "b.tsv").write_text(CSV.replace(",", "\t"), "gb18030")
    (tmp_path / "c.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode("utf-16"))
    )
    pl.DataFrame(ROWS).write_parquet(tmp_path / "d.parquet")
    with create_engine(f"sqlite:///{tmp_path}/his.db").begin() as connection:
        connection.exec_driver_sql("CREATE TABLE notes (patient TEXT, note TEXT)")
        for row in ROWS:
            values = tuple(row.values())
            connection.exec_driver_sql("INSERT INTO notes VALUES (?, ?)", values)
    return tmp_path


def test_every_form_of_a_table_gives_the_same_records(folder):
    found = {
        path: [(one.patient, one.text) for one in read(folder, path=path)]
        for path in ("a.csv", "b.tsv", "c.jsonl.gz", "d.parquet")
    }
    query = {"format": "sql", "query": "SELECT * FROM notes ORDER BY patient"}
    records = read(folder, url=f"sqlite:///{folder}/his.db", **query)
    found["sql"] = [(one.patient, one.text) for one in records]
    assert [one.place for one in records] == ["query 1:1", "query 1:2"]
    assert list(found.values()) == [[("1", "cough"), ("2", "发热")]] * 5


def test_files_of_a_pattern_are_read_by_name_and_told_apart(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.csv").write_text(CSV, "utf-8")
    assert [one.place for one in read(tmp_path, path="*/notes.csv")] == [
        "a/notes.csv:2", "a/notes.csv:3", "b/notes.csv:2", "b/notes.csv:3",
    ]  # fmt: skip
    whole = read(tmp_path, path=str(tmp_path / "a" / "notes.csv"))
    assert [one.place for one in whole] == ["notes.csv:2", "notes.csv:3"]


def test_a_part_says_how_much_there_is_to_read(folder):
    [part] = parts([SourceTerms(path="a.csv")], folder)
    assert (part.name, part.format, part.bytes) == ("a.csv", "csv", len(CSV.encode()))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"path": "none.csv"}, "there is no file 'none.csv'"),
        ({"path": "*.xml"}, r"there is no file '\*\.xml'"),
        ({"path": "his.db"}, "ends in none of"),
        ({"path": "a.csv", "format": "omop"}, "is a file, format 'omop' needs a folder"),
        ({"path": ".", "format": "csv"}, "is a folder, format 'csv' needs a file"),
        ({"path": "b.tsv", "encoding": "utf-8"}, "it looks like gb18030"),
        ({"path": "a.csv", "format": "parquet"}, "no Parquet file"),
        ({"path": "a.csv", "format": "excel"}, r"no \.xlsx workbook"),
        ({"path": "a.csv", "time": "day"}, "a.csv has no column 'day'"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(folder, values, problem):
    with pytest.raises(ConfigError, match=problem):
        read(folder, **values)


def test_a_damaged_gzip_is_refused(folder):
    path = folder / "c.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match="is cut short or damaged"):
        read(folder, path="c.jsonl.gz")
    path.write_bytes(b"{}")
    with pytest.raises(ConfigError, match="but is not gzip"):
        read(folder, path="c.jsonl.gz")


def test_the_tongji_table_in_chinese_and_in_english_gives_equal_records(samples):
    """Yan et al. 2020: the same 6,120 rows under two headers."""
    found = {}
    for language, names in {
        "en": ("age", "gender", "Admission time", "Discharge time", "outcome"),
        "zh": ("年龄", "性别", "入院时间", "出院时间", "出院方式"),
    }.items():
        age, sex, admitted, discharged, outcome = names
        path = samples / "covid_tongji" / f"train375_{language}.csv"
        header = path.read_text("utf-8-sig").partition("\n")[0].rstrip("\r").split(",")
        found[language] = read(
            samples, path=str(path), patient="PATIENT_ID", time="RE_DATE", sex=sex, text=(),
            fill_down=("PATIENT_ID",), labs=dict.fromkeys(header[7:], ""), encounter=admitted,
            age=age, fields={"discharged": discharged, "outcome": outcome},
        )  # fmt: skip
    assert len(found["zh"]) == 6120
    assert len({one.patient for one in found["zh"]}) == 375
    assert not any(isinstance(one, Unreadable) for one in found["zh"])
    for chinese, english in zip(found["zh"], found["en"], strict=True):
        assert isinstance(chinese, Record)
        assert isinstance(english, Record)
        assert [one.text for one in chinese.labs] == [one.text for one in english.labs]
        for name in ("patient", "encounter", "time", "sex", "age", "fields"):
            assert getattr(chinese, name) == getattr(english, name)
