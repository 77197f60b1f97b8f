"""OMOP's tables become records, from files and a database alike; a bad row costs itself."""

import contextlib
import csv
import gzip
import io
import shutil
import sqlite3
import tempfile
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from huizhen.client.records.omop import read_omop
from huizhen.client.records.omop_memory import Register
from huizhen.client.records.record import MAX_ENTRY_BYTES, Finding, Lab, Record, Unreadable
from huizhen.protocol.errors import ConfigError, GovernanceError, HuizhenError

PERSON = """person_id,gender_concept_id,year_of_birth,month_of_birth,day_of_birth,birth_datetime,\
race_concept_id,person_source_value,gender_source_value,location_id
7,8532,1970,5,6,1970-05-06 00:00:00,8527,ZY0007,F,3
8,8507,1980,,,,0,,,
"""
CONCEPT = """concept_id,concept_name,vocabulary_id,concept_code
0,No matching concept,None,No matching concept
8527,White,Race,5
9201,Inpatient Visit,Visit,IP
201826,Type 2 diabetes mellitus,SNOMED,44054006
3004410,Hemoglobin A1c,LOINC,4548-4
9191,Positive,SNOMED,10828004
8554,percent,UCUM,%
35207171,"2型糖尿病",ICD10CN,E11.9
"""
HEAD = {
    "visit_occurrence": "visit_occurrence_id,person_id,visit_concept_id,visit_start_date,"
    "visit_start_datetime,visit_end_date,visit_source_value",
    "condition_occurrence": "condition_occurrence_id,person_id,condition_concept_id,"
    "condition_start_date,condition_start_datetime,condition_source_value,"
    "condition_source_concept_id,visit_occurrence_id",
    "measurement": "measurement_id,person_id,measurement_concept_id,measurement_date,"
    "operator_concept_id,value_as_number,value_as_concept_id,unit_concept_id,range_low,range_high,"
    "visit_occurrence_id,measurement_source_value,unit_source_value,value_source_value",
    "observation": "observation_id,person_id,observation_concept_id,observation_date,"
    "value_as_number,value_as_string,value_as_concept_id,observation_source_value",
    "note": "note_id,person_id,note_date,note_title,note_text",
    "death": "person_id,death_date,cause_concept_id",
    "drug_exposure": "drug_exposure_id,person_id,drug_concept_id,drug_exposure_start_date,"
    "drug_exposure_end_date,quantity,sig,drug_source_value",
    "procedure_occurrence": "procedure_occurrence_id,person_id,procedure_concept_id,procedure_date",
    "location": "location_id,address_1,address_2,zip",
}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "cdm"
    path.mkdir()
    (path / "PERSON.csv").write_text(PERSON)
    (path / "CONCEPT.csv").write_text(CONCEPT)
    return path


def add(folder, table, *rows, name=""):
    (folder / (name or f"{table}.csv")).write_text("\n".join([HEAD[table], *rows, ""]))


def read(source, **options):
    return list(read_omop(source, name="his", **options))


def of(kind, entries):
    return [entry for entry in entries if isinstance(entry, Record) and entry.kind == kind]


def bad(entries):
    return [entry for entry in entries if isinstance(entry, Unreadable)]


def test_a_person_has_sex_birth_death_and_what_names_them(folder):
    add(folder, "death", "7,2020-01-02,201826")
    add(folder, "location", "3,建国路88号,,100022")
    entries = read(folder)
    assert entries[0] == Record(
        "7", {"race": "White"}, "his/PERSON.csv:2", kind="patient", sex="female",
        birth="1970-05-06", death="2020-01-02",
        identifiers={"mrn": ("ZY0007",), "address": ("建国路88号", "100022")},
    )  # fmt: skip
    assert entries[1] == Record(
        "8", {}, "his/PERSON.csv:3", kind="patient", sex="male", birth="1980"
    )
    cause = Finding(
        code="44054006", system="snomed", name="Type 2 diabetes mellitus", kind="condition",
        time="2020-01-02",
    )  # fmt: skip
    assert entries[2] == replace(
        entries[0], fields={}, kind="death", findings=(cause,), place="his/death.csv:2",
        time="2020-01-02",
    )  # fmt: skip
    assert len(entries) == 3


@pytest.mark.parametrize(
    ("row", "sex", "birth"),
    [
        ("9,0,1990,2,,,0,,男,", "male", "1990-02"),
        ("9,0,,,,1990-02-03 08:30:00,0,,f,", "female", "1990-02-03"),
        ("9,8551,1990,,3,,0,,F,", "", "1990"),
        ("9,8521,,,,,0,,,", "other", ""),
    ],
)  # fmt: skip
def test_sex_and_birth_are_as_precise_as_the_source(folder, row, sex, birth):
    (folder / "PERSON.csv").write_text(PERSON + row + "\n")
    assert (read(folder)[2].sex, read(folder)[2].birth) == (sex, birth)


def test_a_visit_is_an_encounter_and_its_number_names_the_patient(folder):
    add(
        folder, "visit_occurrence",
        "5,7,9201,2020-01-02,2020-01-02 08:30:00,2020-01-09,H123",
        "6,7,0,2020-02-02,2020-02-02 00:00:00,,住院",
    )  # fmt: skip
    first, second = of("encounter", read(folder))
    assert (first.encounter, first.time) == ("5", "2020-01-02T08:30:00")
    assert first.fields == {"visit": "Inpatient Visit", "visit_end": "2020-01-09"}
    assert first.identifiers == {"mrn": ("ZY0007", "H123")}
    assert (second.time, second.fields) == ("2020-02-02", {"visit_source_value": "住院"})
    assert second.identifiers == {"mrn": ("ZY0007",)}


@pytest.mark.parametrize(
    ("concept", "own", "source", "wanted"),
    [
        ("201826", "E11.9", "35207171", ("44054006", "snomed", "Type 2 diabetes mellitus")),
        ("0", "E11.9", "35207171", ("E11.9", "icd-10-cn", "2型糖尿病")),
        ("4242", "E11.9", "35207171", ("E11.9", "icd-10-cn", "2型糖尿病")),
        ("4242", "E11.9", "0", ("4242", "omop", "E11.9")),
        ("0", "", "4343", ("4343", "omop", "")),
        ("0", "糖尿病", "", ("糖尿病", "", "")),
        ("201826.0", "", "NA", ("44054006", "snomed", "Type 2 diabetes mellitus")),
    ],
)  # fmt: skip
def test_a_condition_has_the_best_code_there_is(folder, concept, own, source, wanted):
    add(folder, "condition_occurrence", f"1,7,{concept},2020-01-02,,{own},{source},99")
    (record,) = of("diagnosis", read(folder))
    (found,) = record.findings
    assert (found.code, found.system, found.name) == wanted
    assert (found.kind, found.time, record.encounter) == ("condition", "2020-01-02", "99")
    assert record.fields.get("condition_source_value", "") == own


@pytest.mark.parametrize(
    ("row", "lab"),
    [
        ("4172704,14,,8554,4,6.5,,x,pct,>14",
         Lab(code="4548-4", system="loinc", name="Hemoglobin A1c", value=14, comparator=">",
             text=">14", unit="%", low=4, high=6.5, time="2020-01-02")),
        ("0,-1.5e1,0,0,,,,x,g/L,",
         Lab(code="4548-4", system="loinc", name="Hemoglobin A1c", value=-15, unit="g/L",
             time="2020-01-02")),
        ("4172703,,9191,0,,,,x,,阳性",
         Lab(code="4548-4", system="loinc", name="Hemoglobin A1c", text="Positive",
             time="2020-01-02")),
        (",,,,,,,x,,阳性",
         Lab(code="4548-4", system="loinc", name="Hemoglobin A1c", text="阳性",
             time="2020-01-02")),
    ],
    ids=["beyond range", "unit of the source", "concept as value", "text"],
)  # fmt: skip
def test_a_measurement_is_a_lab(folder, row, lab):
    add(folder, "measurement", f"1,7,3004410,2020-01-02,{row}")
    (record,) = of("labs", read(folder))
    assert record.labs == (lab,)


def test_an_operator_is_one_of_five(folder):
    # CDM 5.4, MEASUREMENT.operator_concept_id: <, <=, =, >=, >, and one that is none
    operators = (4171756, 4171754, 4172703, 4171755, 4172704, 4172705)
    add(folder, "measurement", *(f"1,7,3004410,2020-01-02,{o},1,,,,,,,," for o in operators))
    entries = read(folder)
    (record,) = of("labs", entries)
    assert [lab.comparator for lab in record.labs] == ["<", "<=", "", ">=", ">"]
    assert [e.problem[:27] for e in bad(entries)] == ["operator_concept_id is none"]


def test_rows_of_one_moment_that_follow_each_other_are_one_record(folder):
    rows = [(7, 2, "1"), (7, 2, "x"), (7, 2, "2"), (7, 3, "3"), (8, 3, "4"), (7, 2, "5")]
    add(
        folder, "measurement",
        *(f"1,{person},3004410,2020-01-0{day},0,{value},,,,,,,," for person, day, value in rows),
    )  # fmt: skip
    entries = read(folder)
    assert [[lab.value for lab in r.labs] for r in of("labs", entries)] == [[1, 2], [3], [4], [5]]
    assert [r.place.split(":")[1] for r in of("labs", entries)] == ["2", "5", "6", "7"]
    assert [(e.place, e.problem[:28]) for e in bad(entries)] == [
        ("his/measurement.csv:3", "value_as_number is no number")
    ]


def test_a_run_of_rows_without_end_is_cut(folder):
    add(folder, "measurement", *["1,7,3004410,,0,1,,,,,,,,"] * 2500)
    assert [len(r.labs) for r in of("labs", read(folder))] == [1000, 1000, 500]


def test_an_observation_with_a_value_is_a_lab_and_without_a_finding(folder):
    add(
        folder, "observation",
        "1,7,0,2020-01-02,2.5,,,smoking", "2,7,0,2020-01-02,,daily,,smoking",
        "3,7,0,2020-01-02,,,9191,smoking", "4,7,201826,2020-01-02,NA,,0,",
    )  # fmt: skip
    (record,) = of("observation", read(folder))
    assert [(lab.value, lab.text) for lab in record.labs] == [
        (2.5, ""), (None, "daily"), (None, "Positive"),
    ]  # fmt: skip
    assert [finding.code for finding in record.findings] == ["44054006"]


def test_drugs_procedures_and_notes_are_records(folder):
    add(folder, "drug_exposure", "1,7,0,2020-01-02,2020-01-09,14.5,每日一次,阿司匹林")
    add(folder, "procedure_occurrence", "1,7,201826,2020-01-02")
    add(folder, "note", '1,7,2020-01-02,出院小结,"患者说 ""好"",\n出院"')
    entries = read(folder)
    (drug,) = of("drug", entries)
    assert drug.fields == {
        "drug_exposure_end": "2020-01-09", "quantity": 14.5, "sig": "每日一次",
        "drug_source_value": "阿司匹林",
    }  # fmt: skip
    assert drug.findings == (Finding(code="阿司匹林", kind="drug", time="2020-01-02"),)
    assert of("procedure", entries)[0].findings[0].kind == "procedure"
    (note,) = of("note", entries)
    assert (note.text, note.fields) == ('患者说 "好",\n出院', {"note_title": "出院小结"})
    assert note.identifiers == {"mrn": ("ZY0007",)}


WRONG = {
    "unknown person": ("9,201826,2020-01-02,,,,", "person_id is of no row"),
    "no person": (",201826,2020-01-02,,,,", "row has no person_id"),
    "person that is no number": ("secret,201826,2020-01-02,,,,", "person_id is no whole number"),
    "concept that is no number": ("7,secret,2020-01-02,,,,", "condition_concept_id is no whole"),
    "no day": ("7,201826,2020-02-30,,,,", "condition_start_date or condition_start_datetime is a"),
    "two readings": ("7,201826,3/4/2020,,,,", "condition_start_date or"),
    "another day": ("7,201826,2020-01-02,2020-01-03 08:00:00,,,", "is of another day"),
    "no code": ("7,0,2020-01-02,,,0,", "row has no condition_concept_id and no"),
    "visit that is no number": ("7,201826,2020-01-02,,,,secret", "visit_occurrence_id is no whole"),
    "too few columns": ("7,201826", "row has another number"),
    "too many columns": ("7,201826,2020-01-02,,,,,secret", "row has another number"),
    "quote within": ('7,201826,2020-01-02,,"a"b",",,', "has a quote that is not closed"),
    "larger than a number": (f"7,{'9' * 30},2020-01-02,,,,", "is no whole number"),
}


@pytest.mark.parametrize(("row", "problem"), WRONG.values(), ids=WRONG)
def test_a_wrong_row_is_named_and_those_around_it_are_read(folder, row, problem):
    right = "1,7,201826,2020-01-02,,,,"
    add(folder, "condition_occurrence", right, f"2,{row}", right)
    entries = read(folder)
    (wrong,) = bad(entries)
    assert wrong.place == "his/condition_occurrence.csv:3"
    assert problem in wrong.problem
    assert "secret" not in wrong.problem
    assert [r.place[-1] for r in of("diagnosis", entries)] == ["2", "4"]


def test_a_person_or_location_twice_and_a_second_death_are_told(folder):
    (folder / "PERSON.csv").write_text(PERSON + "7,8507,1999,,,,,,,\n6,8507,1999,,,,,,,\n")
    add(folder, "death", "7,2020-01-02,0", "7,2020-01-03,0")
    add(folder, "location", "3,a,,", "3,b,,")
    entries = read(folder)
    assert [(e.place, e.problem.split(",")[0]) for e in bad(entries)] == [
        ("his/location.csv:3", "location_id is that of an earlier row"),
        ("his/PERSON.csv:4", "person_id is that of an earlier row"),
        ("his/death.csv:3", "death is at another time than an earlier row has it: keep one"),
    ]  # fmt: skip
    assert [r.patient for r in of("patient", entries)] == ["7", "8", "6"]


def test_a_source_without_vocabulary_has_the_numbers_of_concepts(folder):
    (folder / "CONCEPT.csv").unlink()
    add(folder, "condition_occurrence", "1,7,201826,2020-01-02,,E11,,")
    entries = read(folder)
    assert of("diagnosis", entries)[0].findings[0].code == "201826"
    assert entries[0].fields == {"race": "omop:8527"}


@pytest.mark.parametrize(
    "name", ["Condition_Occurrence.CSV", "CONDITION_OCCURRENCE.csv.gz"],
)  # fmt: skip
def test_names_of_files_have_any_case_and_may_be_packed(folder, name):
    text = HEAD["condition_occurrence"].upper() + "\r\n1,7,201826,2020-01-02,,,,\r\n"
    data = b"\xef\xbb\xbf" + text.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert len(of("diagnosis", read(folder))) == 1


def test_tabs_are_read_and_a_vocabulary_with_tabs_has_no_quotes(folder):
    text = CONCEPT.replace(",", "\t").replace("Hemoglobin A1c", '"Hemo" A1c')
    (folder / "CONCEPT.csv").write_text(text)
    add(folder, "measurement", '1,7,3004410,2020-01-02,0,1,,,,,,,"g/\tL",')
    (folder / "measurement.csv").write_text(
        (folder / "measurement.csv").read_text().replace(",", "\t")
    )
    (record,) = of("labs", read(folder))
    assert (record.labs[0].name, record.labs[0].unit) == ('"Hemo" A1c', "g/\tL")


def test_an_encoding_is_declared_and_rows_in_another_are_told(folder):
    add(folder, "note", "1,7,2020-01-02,,出院", "2,7,2020-01-02,,ok")
    text = (folder / "note.csv").read_text().encode("gb18030")
    (folder / "note.csv").write_bytes(text)
    assert [e.place for e in bad(read(folder))] == ["his/note.csv:2"]
    assert [r.text for r in of("note", read(folder))] == ["ok"]
    (folder / "CONCEPT.csv").unlink()
    assert [r.text for r in of("note", read(folder, encoding="GB18030"))] == ["出院", "ok"]
    for encoding in ("utf-16", "rot13", "no\0"):
        with pytest.raises(ConfigError, match="encoding is"):
            read(folder, encoding=encoding)


def test_what_is_no_cdm_is_refused(folder, tmp_path):
    for source in (tmp_path / "none", folder / "PERSON.csv", "no\0"):
        with pytest.raises(ConfigError, match="is no folder"):
            read(source)
    with pytest.raises(ConfigError, match="no table PERSON"):
        read(tmp_path)
    (folder / "death.csv").write_text("death_date\n2020-01-02\n")
    with pytest.raises(ConfigError, match=r"death.csv: table has no column person_id"):
        read(folder)
    (folder / "death.csv").write_text("person_id,death_date,PERSON_ID\n")
    with pytest.raises(ConfigError, match="column twice"):
        read(folder)
    (folder / "death.csv").write_text("person_id,death_date" + ",x" * 10000)
    with pytest.raises(ConfigError, match="header has over"):
        read(folder)
    (folder / "death.csv").write_bytes(b"")
    with pytest.raises(ConfigError, match="table has no column person_id"):
        read(folder)
    (folder / "DEATH.csv.gz").write_bytes(b"")
    with pytest.raises(ConfigError, match="are one table"):
        read(folder)


@pytest.mark.parametrize(
    ("data", "error"),
    [(b"person_id\n", ConfigError), (gzip.compress(b"person_id\n" * 99)[:-9], ConfigError)],
    ids=["not gzip", "cut short"],
)
def test_a_packed_file_that_is_none_is_refused(folder, data, error):
    (folder / "death.csv.gz").write_bytes(data)
    with pytest.raises(error, match=r"death.csv.gz: file is"):
        read(folder)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"person_id,death_date\n" + b"7" * (40 << 20), "line has over"),
        (b"person_id,death_date\n" + b"\n" * (40 << 20), "unpacks to over 300 times"),
        (b'person_id,death_date\n7,"' + b"7777777\n" * (4 << 20), "quote is not closed"),
        (b'person_id,death_date\n7,"' + b'""\n,' * (4 << 20), "quote is not closed"),
    ],
    ids=["one line", "empty lines", "open quote", "doubled quotes"],
)
def test_bombs_are_refused_with_little_memory(folder, data, problem):
    (folder / "death.csv.gz").write_bytes(gzip.compress(data))
    del data
    tracemalloc.start()
    with pytest.raises(GovernanceError, match=problem):
        read(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * MAX_ENTRY_BYTES


@pytest.mark.parametrize("begin", [b"", b'""'], ids=["plain", "quoted"])
def test_a_row_of_many_cells_is_told_with_little_memory(folder, begin):
    (folder / "death.csv").write_bytes(b"person_id,death_date\n" + begin + b"ab," * (5 << 20))
    tracemalloc.start()
    entries = read(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [entry.place for entry in bad(entries)] == ["his/death.csv:2"]
    assert peak < 4 * MAX_ENTRY_BYTES


def test_more_concepts_than_there_could_be_are_refused(folder, monkeypatch):
    monkeypatch.setattr("huizhen.client.records.omop_files.MAX_CONCEPTS", 50)
    add(folder, "condition_occurrence", *(f"{i},7,{i},2020-01-02,,,," for i in range(99)))
    with pytest.raises(GovernanceError, match="refer to over 50 concepts"):
        read(folder)


def as_sqlite(folder, path):
    """Load the files into a database with the types that OMOP's columns have."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        for file in sorted(folder.glob("*.csv")):
            rows = csv.reader(io.StringIO(file.read_text("utf-8-sig")))
            header = next(rows)
            types = ", ".join(f'"{c}" {column_type(c)}' for c in header)
            database.execute(f'CREATE TABLE "{file.stem}" ({types})')
            marks = ", ".join("?" * len(header))
            database.executemany(
                f'INSERT INTO "{file.stem}" VALUES ({marks})',  # noqa: S608
                ([cell or None for cell in row] for row in rows),
            )
        database.commit()


def column_type(column):
    if column.endswith("_id") or column.endswith("_of_birth"):
        return "INTEGER"
    numbers = ("value_as_number", "range_low", "range_high", "quantity", "days_supply", "refills")
    return "REAL" if column in numbers else "TEXT"


def unplaced(entries):
    return sorted((replace(entry, place="") for entry in entries), key=key)


def key(record):
    parts = (getattr(record, name) for name in ("kind", "patient", "encounter", "time", "fields"))
    return (*map(str, parts), [f.code for f in record.findings], [lab.code for lab in record.labs])


def test_files_and_a_database_give_the_same_records(folder, tmp_path):
    add(folder, "death", "7,2020-01-02,201826")
    add(folder, "location", "3,建国路88号,,100022")
    add(folder, "visit_occurrence", "5,7,9201,2020-01-02,2020-01-02 08:30:00,2020-01-09,H123")
    add(folder, "measurement", "1,7,3004410,2020-01-02,4172704,14,,8554,4,6.5,5,x,pct,>14")
    add(folder, "note", '1,7,2020-01-02,出院小结,"a\nb"')
    as_sqlite(folder, tmp_path / "cdm.db")
    entries = read(f"sqlite:///{tmp_path}/cdm.db")
    assert unplaced(entries) == unplaced(read(folder))
    assert [r.place for r in of("patient", entries)] == ["his/person:1", "his/person:2"]


def test_a_row_of_a_database_that_is_wrong_is_named(folder, tmp_path):
    add(folder, "measurement", "1,7,3004410,2020-01-02,0,secret,,,,,,,,")
    as_sqlite(folder, tmp_path / "cdm.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "cdm.db")) as database:
        database.execute(
            "INSERT INTO measurement (person_id, value_source_value) VALUES (7, x'00')"
        )
        database.commit()
    places = {e.place: e.problem for e in bad(read(f"sqlite:///{tmp_path}/cdm.db"))}
    assert places == {
        "his/measurement:1": "column 'value_source_value' holds bytes, expected text or a number: "
        "leave it out of the query",
        "his/measurement:2": "value_as_number is no number, expected such as 4.5: mend the row",
    }


def test_a_database_without_a_cdm_is_refused(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "cdm.db")) as database:
        database.execute("CREATE TABLE patients (id)")
        database.commit()
    with pytest.raises(ConfigError, match="no table PERSON"):
        read(f"sqlite:///{tmp_path}/cdm.db")
    with pytest.raises(ConfigError, match="database refuses: no such table: cdm"):
        read(f"sqlite:///{tmp_path}/cdm.db", schema="cdm")


TABLES = [*HEAD, "person", "concept"]
CELLS = st.text() | st.sampled_from(["7", "0", "201826", "2020-01-02", '"', "NULL", "1e400", ""])


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(TABLES), st.binary() | st.text().map(str.encode), st.booleans(), st.booleans()
)
@example("concept", b'8527,"\n', True, False)
@example("death", b'7,2020-01-02,"', True, False)
@example("note", b"1,7,2020,\x00,\x00", True, False)
def test_any_bytes_give_records_or_a_clean_refusal(table, data, has_head, is_packed):
    head = HEAD.get(table, PERSON if table == "person" else CONCEPT)
    data = f"{head}\n".encode() + data if has_head else data
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "person.csv").write_text(PERSON)
        (folder / f"{table}.csv{'.gz' if is_packed else ''}").write_bytes(data)
        if is_packed and table == "person":
            (folder / "person.csv").unlink()
        with contextlib.suppress(HuizhenError):
            for entry in read(folder):
                assert isinstance(entry, Record | Unreadable)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(list(HEAD)), st.lists(st.lists(CELLS, min_size=1, max_size=14)))
def test_any_cells_give_as_many_records_and_refusals_as_there_are_rows(table, rows):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "PERSON.csv").write_text(PERSON)
        width = HEAD[table].count(",") + 1
        out = io.StringIO(newline="")
        writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerows([*row, *[""] * width][:width] for row in rows)
        text = f"{HEAD[table]}\n{out.getvalue()}"
        (folder / f"{table}.csv").write_bytes(text.encode("utf-8", "replace"))
        entries = read(folder)[2 if table != "location" else 0 :]
        records = [entry for entry in entries if isinstance(entry, Record)]
        told = sum(len(r.labs) + len(r.findings) or 1 for r in records) + len(bad(entries))
        if table in ("measurement", "observation"):
            assert told == len(rows)
        elif table != "location":
            assert len(entries) == len(rows)


@given(st.lists(st.tuples(st.integers(-(2**62), 2**62) | st.integers(0, 9), st.text("ab汉"))))
def test_a_register_finds_the_first_text_of_each_number(pairs):
    register = Register()
    wanted: dict[int, str] = {}
    for key, text in pairs:
        assert register.add(key, text) == (key not in wanted)
        wanted.setdefault(key, text)
    assert all(register.get(key) == text for key, text in wanted.items())
    assert register.get(10) == wanted.get(10)


def test_the_real_sample_is_read_whole_from_files_and_from_a_database(samples, tmp_path):
    source = samples / "omop_synthea27"
    entries = read(source)
    assert bad(entries) == []
    assert Counter(entry.kind for entry in entries) >= Counter(
        patient=28, death=3, encounter=1791, diagnosis=470, procedure=1649, drug=883
    )
    assert sum(len(entry.labs) for entry in of("labs", entries)) == 10040
    assert sum(len(entry.findings) for entry in of("observation", entries)) == 8099
    known = [f for e in entries for f in e.findings if f.system in ("snomed", "loinc", "rxnorm")]
    assert len(known) > 0.9 * sum(len(entry.findings) for entry in entries)
    named = {name for entry in entries for names in entry.identifiers.values() for name in names}
    assert not any(str(value) in named for entry in entries for value in entry.fields.values())
    folder = tmp_path / "copy"
    shutil.copytree(source, folder)
    as_sqlite(folder, tmp_path / "cdm.db")
    assert unplaced(read(f"sqlite:///{tmp_path}/cdm.db")) == unplaced(entries)
