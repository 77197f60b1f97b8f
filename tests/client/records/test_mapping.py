"""Columns in any language become the same record; a cell that is not what was said is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.client.records.mapping import map_rows
from huizhen.client.records.record import Finding, Lab, Record, Unreadable
from huizhen.client.records.rows import Row
from huizhen.client.records.terms import FindingColumn, LabColumns, SourceTerms
from huizhen.protocol.errors import ConfigError, HuizhenError

ENGLISH = SourceTerms(
    path="a.csv", kind="note", patient="mrn", encounter="visit", time="admitted", sex="sex",
    birth="born", age="age", text=("complaint",),
    identifiers={"name": "name", "phone": ("tel", "mobile")},
    labs={"ldh": "U/L"},
    findings=(FindingColumn(code="icd", system="icd-10"),),
    fields={"outcome": "outcome"},
)  # fmt: skip
CHINESE = SourceTerms(
    path="a.csv", kind="note", patient="住院号", encounter="就诊号", time="入院时间", sex="性别",
    birth="出生日期", age="年龄", text=("主诉",),
    identifiers={"name": "姓名", "phone": ("电话", "手机")},
    labs={"乳酸脱氢酶": "U/L"},
    findings=(FindingColumn(code="诊断编码", system="icd-10"),),
    fields={"outcome": "出院方式"},
)  # fmt: skip
ROW = {
    "mrn": "007", "visit": "v1", "admitted": "2020-01-31 01:09", "sex": "F", "born": "1960-5-6",
    "age": 59, "complaint": "cough", "name": "Li", "tel": "", "mobile": "13800138000", "ldh": "250",
    "icd": "J18.9", "outcome": "0", "unused": "x",
}  # fmt: skip
REIHE = {
    "住院号": "007", "就诊号": "v1", "入院时间": "2020年1月31日1时09分", "性别": "女",
    "出生日期": "1960/5/6", "年龄": "59岁",
    "主诉": "cough", "姓名": "Li", "电话": "", "手机": "13800138000",
    "乳酸脱氢酶": "250", "诊断编码": "J18.9", "出院方式": "0", "无用": "x",
}  # fmt: skip


def mapped(terms, *rows, is_uniform=True):
    placed = [(f"a.csv:{number}", dict(row)) for number, row in enumerate(rows, 2)]
    return list(map_rows(placed, terms, "a.csv", is_uniform=is_uniform))


def test_a_row_becomes_a_record():
    time = "2020-01-31T01:09:00"
    assert mapped(ENGLISH, ROW) == [
        Record(
            "007", {"outcome": "0"}, "a.csv:2", kind="note", encounter="v1", time=time,
            text="cough", sex="female", birth="1960-05-06", age=59,
            findings=(Finding(code="J18.9", system="icd-10", kind="condition", time=time),),
            labs=(Lab(code="", name="ldh", value=250.0, text="250", unit="U/L", time=time),),
            identifiers={"name": ("Li",), "phone": ("13800138000",)},
        )
    ]  # fmt: skip


def test_columns_in_chinese_and_english_give_equal_records():
    [english], [chinese] = mapped(ENGLISH, ROW), mapped(CHINESE, REIHE)
    assert isinstance(chinese, Record)
    assert isinstance(english, Record)
    assert [one.name for one in chinese.labs] == ["乳酸脱氢酶"]  # as the source writes it
    for name in ("patient", "fields", "time", "text", "findings", "sex", "birth", "identifiers"):
        assert getattr(chinese, name) == getattr(english, name)


def test_without_a_list_of_fields_every_other_column_is_one():
    terms = SourceTerms(path="a.csv", patient="id", text=("note",))
    [record] = mapped(terms, {"id": 7.0, "note": " words ", "height": 56, "label": None})
    assert record == Record(
        "7", {"height": 56, "label": None}, "a.csv:2", kind="record", text="words"
    )


def test_several_columns_make_one_text_and_say_which():
    terms = SourceTerms(path="a.csv", patient="id", text=("主诉", "现病史"))
    [one, two] = mapped(
        terms,
        {"id": "1", "主诉": "咳嗽", "现病史": "三天前"},
        {"id": "2", "主诉": "", "现病史": "三天前"},
    )
    assert (one.text, two.text) == ("主诉: 咳嗽\n现病史: 三天前", "现病史: 三天前")


def test_a_patient_on_the_first_row_only_is_filled_down():
    terms = SourceTerms(path="a.csv", patient="id", fill_down=("id",), fields={})
    found = mapped(terms, {"id": "1"}, {"id": ""}, {"id": None}, {"id": "2"}, {"id": " "})
    assert [one.patient for one in found] == ["1", "1", "1", "2", "2"]


def test_nothing_of_a_patient_is_filled_down_to_the_next():
    terms = SourceTerms(
        path="a.csv", patient="id", sex="sex", fill_down=("id", "sex", "name"), fields={},
        identifiers={"name": "name"},
    )  # fmt: skip
    rows = [
        {"id": "1", "sex": "M", "name": "王建国"},
        {"id": "2", "sex": "", "name": ""},
        {"id": ""},
    ]
    found = mapped(terms, *[{"sex": "", "name": "", **row} for row in rows])
    assert [(one.patient, one.sex) for one in found] == [("1", "male"), ("2", ""), ("2", "")]
    assert found[1].identifiers == {}


def test_after_a_row_that_was_not_read_nobody_is_guessed():
    terms = SourceTerms(path="a.csv", patient="id", fill_down=("id",), fields={})
    rows: list[Row | Unreadable] = [
        ("a:1", {"id": "1"}), Unreadable("a:2", "odd"), ("a:3", {"id": ""}), ("a:4", {"id": "3"}),
        ("a:5", {"id": ""}),
    ]  # fmt: skip
    found = list(map_rows(rows, terms, "a", is_uniform=True))
    assert [getattr(one, "patient", None) for one in found] == ["1", None, None, "3", "3"]
    assert isinstance(found[2], Unreadable)
    assert "mend that one" in found[2].problem


def test_a_column_with_the_name_of_what_every_record_has_must_say_what_it_is():
    with pytest.raises(ConfigError, match=r"column 'age' .*such as age = \"age\""):
        mapped(SourceTerms(path="a.csv", patient="id"), {"id": "1", "age": 97})


def test_a_table_with_one_result_a_row():
    terms = SourceTerms(
        path="a.csv", patient="id", time="at", fields={},
        lab=LabColumns(
            value="result", code="item", name="title", unit="unit", low="from", high="to",
            system="local",
        ),
    )  # fmt: skip
    row = {
        "id": "1", "at": "20200131", "item": "K", "title": "钾", "result": "<0.5",
        "unit": "mmol/L", "from": "3.5", "to": "?",
    }  # fmt: skip
    [record, empty] = mapped(terms, row, row | {"result": ""})
    assert record.labs == (
        Lab(
            code="K", system="local", name="钾", value=0.5, comparator="<",
            text="<0.5", unit="mmol/L", low=3.5,
            time="2020-01-31",
        ),
    )  # fmt: skip
    assert empty.labs == ()


@pytest.mark.parametrize(
    ("cell", "years"),
    [("56", 56), ("56岁", 56), ("045Y", 45), (" 6M ", 0.5), ("18个月", 1.5), (3.0, 3), ("", None)],
)
def test_an_age_is_in_years(cell, years):
    [record] = mapped(SourceTerms(path="a", patient="id", age="age"), {"id": "1", "age": cell})
    assert record.age == years


def test_a_cell_may_hold_several_findings():
    column = FindingColumn(code="icd", name="words", system="icd-10-cn", separator=";")
    terms = SourceTerms(path="a.csv", patient="id", findings=(column,), fields={})
    [record] = mapped(terms, {"id": "1", "icd": "N18.5; I10;", "words": "肾衰竭;高血压;旧称"})
    found = [(one.code, one.name) for one in record.findings]
    assert found == [("N18.5", "肾衰竭"), ("I10", "高血压"), ("", "旧称")]


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        ({"mrn": ""}, "record has no patient id in 'mrn'"),
        ({"admitted": "3/4/SECRET"}, "column 'admitted' is no time"),
        ({"born": "2023-02-29"}, "column 'born' is a day or hour that does not exist"),
        ({"age": "SECRET"}, "column 'age' is no age, expected years"),
        ({"age": "450"}, "column 'age' is over 130 years"),
        ({"sex": "SECRET"}, "column 'sex' is no sex, expected male or female"),
    ],
)
def test_a_cell_that_is_not_what_was_said_leaves_the_other_rows(cell, problem):
    bad, good = mapped(ENGLISH, ROW | cell, ROW)
    assert isinstance(bad, Unreadable)
    assert bad.place == "a.csv:2"
    assert bad.problem.startswith(problem)
    assert "SECRET" not in bad.problem
    assert isinstance(good, Record)


def test_a_column_that_is_not_there_is_refused_with_the_nearest():
    """DQ-1."""
    with pytest.raises(ConfigError, match=r"a\.csv has no column 'outcome'.*did you mean 'outcom'"):
        mapped(ENGLISH, {key: ROW[key] for key in ROW if key != "outcome"} | {"outcom": ""})
    lines = [ROW, {key: ROW[key] for key in ROW if key != "sex"}]
    assert len(mapped(ENGLISH, *lines[::-1], is_uniform=False)) == 2  # some line has it
    with pytest.raises(ConfigError, match="has no column 'sex'"):
        mapped(ENGLISH, *lines[::-1])


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"path": "a.csv", "url": "sqlite://"}, "both path and url"),
        ({}, "both path and url"),
        ({"url": "sqlite://"}, "expected 'sql' or 'omop'"),
        ({"url": "sqlite://", "format": "sql"}, "has a query without"),
        ({"path": "a", "query": "SELECT 1"}, "has a query without"),
        ({"path": " "}, "expected the path of a file"),
        ({"path": "a", "identifiers": {"nickname": "x"}}, "known are name, pinyin"),
        ({"path": "a", "fields": {"text": "x"}}, "which every record has"),
    ],
)
def test_a_source_that_means_nothing_is_refused(values, problem):
    with pytest.raises(ValueError, match=problem):
        SourceTerms(**values)


cells = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.lists(st.text(max_size=3))
)


@given(st.lists(st.fixed_dictionaries(dict.fromkeys(ROW, cells)), max_size=4))
def test_any_cells_give_records_or_say_what_is_wrong(rows):
    for number, entry in enumerate(mapped(ENGLISH, *rows), 2):
        assert entry.place == f"a.csv:{number}"


@given(st.lists(st.dictionaries(st.sampled_from(list(ROW)), cells), max_size=4), st.booleans())
def test_any_columns_give_records_or_a_clean_error(rows, is_uniform):
    try:
        mapped(ENGLISH, *rows, is_uniform=is_uniform)
    except HuizhenError:
        return
