"""A record's labs in the table's terms, and what is told of them."""

import csv
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.client.quality.lab_table import shipped_table
from huizhen.client.quality.labs import LAB_SYSTEM, Result, check_labs, read_result
from huizhen.client.quality.problems import Code, Problem, Rules
from huizhen.client.records.record import Lab, Record
from huizhen.protocol.errors import GovernanceError

TABLE = shipped_table()
PLACE = "labs.csv:7"


def only(code, action: Any) -> Rules:
    return Rules(**{str(code): action})


def lab(name="血糖", value=None, unit="", text="", **more):
    return Lab(code=more.pop("code", ""), name=name, value=value, unit=unit, text=text, **more)


def check(*labs, rules=None, declared=None, **more):
    record = Record("p1", {}, PLACE, labs=labs, **more)
    checked, problems = check_labs(record, TABLE, rules, declared or {})
    assert all(problem.place == PLACE for problem in problems)
    return checked.labs, [(problem.code, problem.action) for problem in problems]


def test_a_known_lab_gets_the_tables_name_and_unit():
    (found,), problems = check(lab(value=99.0, unit="mg/dL", low=70.0, high=110.0, time="2023"))
    assert (found.code, found.system, found.unit) == ("glucose", LAB_SYSTEM, "mmol/L")
    assert found.name == "血糖"
    assert found.time == "2023"
    assert found.value == pytest.approx(5.495, abs=1e-3)
    assert (found.low, found.high) == (
        pytest.approx(3.886, abs=1e-3),
        pytest.approx(6.106, abs=1e-3),
    )
    assert problems == [(Code.CONVERTED_UNIT, "fix")]


def test_a_lab_in_its_own_unit_is_no_problem():
    (found,), problems = check(lab(value=5.6, unit="毫摩尔/升"))
    assert (found.value, found.unit, problems) == (5.6, "mmol/L", [])


def test_checking_again_changes_nothing():
    labs, _ = check(lab(value=99.0, unit="mg/dL"), lab("BUN", 14.0, "mg/dL"), lab("INR", 1.1))
    assert check(*labs) == (labs, [])


def test_a_record_without_labs_or_changes_stays_itself():
    record = Record("p1", {}, PLACE)
    assert check_labs(record, TABLE)[0] is record
    record = Record("p1", {}, PLACE, labs=(lab("哪个项目", 1.0),))
    assert check_labs(record, TABLE)[0] is record


@pytest.mark.parametrize(
    ("given_lab", "code"),
    [
        (lab("魔法指数", 5.0, "mmol/L"), Code.UNKNOWN_LAB),
        (lab("葡萄糖", 5.0, "mmol/L", code="2342-4", system="loinc"), Code.UNKNOWN_LAB),
        (lab("谷草转氨酶", 5.0, "U/L", code="1742-6", system="loinc"), Code.AMBIGUOUS_LAB),
        (lab("谷草转氨酶", 5.0, "U/L", code="ALT"), Code.AMBIGUOUS_LAB),
        (lab(value=5.0, unit="furlong"), Code.UNKNOWN_UNIT),
        (lab(value=5.0, unit="U/L"), Code.UNKNOWN_UNIT),
        (lab(value=5.0), Code.MISSING_UNIT),
        (lab(text="标本溶血"), Code.NO_NUMBER),
        (lab(), Code.NO_NUMBER),
        (lab(text="1,234"), Code.NO_NUMBER),
        (lab(text="5,6"), Code.NO_NUMBER),
        (lab(text="5.6 mmol/L", unit="mg/dL"), Code.UNIT_SUSPECT),
    ],
)
def test_what_is_not_understood_stays_as_it_is_or_is_left_out(given_lab, code):
    assert check(given_lab, rules=only(code, "keep")) == ((given_lab,), [(code, "keep")])
    assert check(given_lab, rules=only(code, "fix")) == ((), [(code, "fix")])
    with pytest.raises(GovernanceError, match=f"{PLACE}: record has {code}"):
        check(given_lab, rules=only(code, "refuse"))


def test_a_loinc_code_stands_above_a_name():
    (found,), problems = check(lab("Glu (ser)", 5.0, "mmol/L", code="2345-7", system="loinc"))
    assert (found.code, problems) == ("glucose", [])


def test_a_missing_unit_is_what_the_hospital_vouches_for():
    (found,), problems = check(lab(value=99.0), declared={"glucose": "mg/dL"})
    assert found.value == pytest.approx(5.495, abs=1e-3)
    assert problems == [(Code.CONVERTED_UNIT, "fix")]


@pytest.mark.parametrize(
    ("text", "value", "comparator"),
    [
        ("5.6 mmol/L", 5.6, ""),
        ("5.6mmol/l ↑", 5.6, ""),
        ("<0.5mmol/L", 0.5, "<"),
        ("＞60 毫摩尔/升", 60.0, ">"),
        ("≥ 3 mmol/L", 3.0, ">="),
        ("不大于3mmol/L", 3.0, "<="),
        ("小于0.5 mmol/L", 0.5, "<"),
    ],
)
def test_a_number_is_read_from_the_text(text, value, comparator):
    (found,), problems = check(lab(text=text))
    assert (found.value, found.comparator, found.text) == (value, comparator, text)
    assert problems == [(Code.NUMBER_IN_TEXT, "fix")]
    kept, problems = check(lab(text=text), rules=Rules(number_in_text="keep"))
    assert (kept[0].value, problems) == (None, [(Code.NUMBER_IN_TEXT, "keep")])


@pytest.mark.parametrize(
    "text", ["阳性", "阴性(-)", "弱阳性 (±)", "1+", "＋＋", "Negative", "2-3/HP", "1:160", "未检出"]
)
def test_a_result_in_words_is_a_result(text):
    assert read_result(text, TABLE) == Result(None)
    (found,), problems = check(lab("HBsAg", text=text))
    assert (found.code, found.value, found.text, problems) == ("hbsag", None, text, [])


def test_a_kept_unit_is_not_converted():
    given_lab = lab(value=99.0, unit="mg/dL")
    kept, problems = check(given_lab, rules=Rules(converted_unit="quarantine"))
    assert (kept, problems) == ((given_lab,), [(Code.CONVERTED_UNIT, "quarantine")])


@pytest.mark.parametrize(
    ("given_lab", "codes"),
    [
        (lab("血小板", -1.0, "10^9/L"), {Code.IMPOSSIBLE_VALUE}),
        (lab("血糖", math.nan, "mmol/L"), {Code.IMPOSSIBLE_VALUE}),
        (lab("血糖", -math.inf, "mmol/L"), {Code.IMPOSSIBLE_VALUE}),
        (lab("血糖", 1e308, "mmol/L"), {Code.IMPOSSIBLE_VALUE}),
        (lab("K", 45.0, "mmol/L"), {Code.IMPOSSIBLE_VALUE, Code.UNIT_SUSPECT}),
        (lab("血糖", 99.0, "mmol/L"), {Code.IMPLAUSIBLE_VALUE, Code.UNIT_SUSPECT}),
        (lab("Hb", 12.0, "g/L"), {Code.IMPLAUSIBLE_VALUE, Code.UNIT_SUSPECT}),
        (lab("肌酐", 0.9, "umol/L"), {Code.IMPOSSIBLE_VALUE, Code.UNIT_SUSPECT}),
    ],
)
def test_limits_tell_what_cannot_be_and_what_looks_like_another_unit(given_lab, codes):
    left, problems = check(given_lab)
    assert {code for code, _ in problems} == codes
    assert bool(left) == (Code.IMPOSSIBLE_VALUE not in codes)


def test_a_detection_limit_says_nothing_of_the_other_side():
    assert check(lab("AFP", text="<0.00001 ng/mL"))[1] == [(Code.NUMBER_IN_TEXT, "fix")]
    assert check(lab("血糖", 250.0, "mmol/L", comparator=">"))[1] == []
    assert check(lab("血糖", 250.0, "mmol/L", comparator="<"))[0] == ()
    assert check(lab("血糖", -1.0, "mmol/L", comparator="<"))[0] == ()


def test_a_range_upside_down_is_left_out_and_the_value_stays():
    (found,), problems = check(lab(value=5.0, unit="mmol/L", low=6.1, high=3.9))
    assert (found.value, found.low, found.high) == (5.0, None, None)
    assert problems == [(Code.REFERENCE_RANGE, "fix")]
    (found,), _ = check(
        lab(value=5.0, unit="mmol/L", low=6.1, high=3.9), rules=Rules(reference_range="keep")
    )
    assert (found.low, found.high) == (6.1, 3.9)
    assert check(lab(value=5.0, unit="mmol/L", low=math.nan))[1] == [(Code.REFERENCE_RANGE, "fix")]


def test_one_lab_at_one_moment_has_one_value():
    labs, problems = check(
        lab(value=5.0, unit="mmol/L"),
        lab("GLU", 5.0, "mmol/L"),
        lab("GLU", 6.0, "mmol/L"),
        lab("GLU", 7.0, "mmol/L"),
        lab("GLU", 7.0, "mmol/L", time="2023-05-07"),
        time="2023-05-06",
    )
    assert problems == [(Code.REPEATED_LAB, "fix"), (Code.CONTRADICTORY_LABS, "keep")]
    assert [found.value for found in labs] == [5.0, 6.0, 7.0, 7.0]
    assert check(lab(value=5.0, unit="mmol/L"), lab(value=6.0, unit="mmol/L"))[1] == []


def test_problems_name_the_lab_and_never_its_value():
    record = Record("p1", {}, PLACE, labs=(lab("K", 47.11, "mmol/L"), lab("X" * 500, 47.11)))
    _, problems = check_labs(record, TABLE)
    assert Problem(Code.IMPOSSIBLE_VALUE, PLACE, "potassium", "fix") in problems
    assert all("47.11" not in str(problem) and len(str(problem)) < 250 for problem in problems)


texts = st.text(max_size=30) | st.sampled_from(["<", "5", "mmol/L", "mg/dL", "阳性", "1e99 U/L"])
numbers = st.none() | st.floats()


@given(
    st.lists(
        st.builds(
            Lab,
            code=texts | st.sampled_from(["2345-7", "ALT", "glucose"]),
            system=st.sampled_from(["", "loinc", LAB_SYSTEM, "urn:x"]),
            name=texts | st.sampled_from(["血糖", "K", "INR"]),
            value=numbers,
            comparator=st.sampled_from(["", "<", ">="]),
            text=texts,
            unit=texts,
            low=numbers,
            high=numbers,
            time=st.sampled_from(["", "2023"]),
        ),
        max_size=4,
    )
)
def test_any_lab_is_canonical_untouched_or_told_of(labs):
    checked, problems = check_labs(Record("p", {}, PLACE, labs=tuple(labs)), TABLE)
    fixed = sum(problem.action == "fix" for problem in problems)
    assert len(checked.labs) + fixed >= len(labs)
    for found in checked.labs:
        if found not in labs:
            assert TABLE.find_key(found.code) is not None
            assert found.system == LAB_SYSTEM
            assert found.value is None or math.isfinite(found.value)


def test_real_labs_of_tongji_hospital(samples):
    """Its white and red cells hold urine sediment, its platelets a -1 for none."""
    path = samples / "covid_tongji" / "train375_zh.csv"
    impossible = []
    count = 0
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            labs = tuple(
                lab(name, float(value))
                for name, value in list(row.items())[7:]
                if value and not name.startswith("2019-nCoV")
            )
            count += len(labs)
            vouched = {entry.key: entry.unit for entry in TABLE.entries if entry.unit}
            _, problems = check_labs(Record("1", {}, PLACE, labs=labs), TABLE, None, vouched)
            impossible += [p.subject for p in problems if p.code == Code.IMPOSSIBLE_VALUE]
            assert not [p for p in problems if p.code in (Code.UNKNOWN_LAB, Code.UNKNOWN_UNIT)]
    assert count > 49_000
    assert Counter(impossible) == {"rbc": 70, "platelets": 4, "wbc": 1}


def test_real_labs_of_eicu_give_few_surprises(samples):
    """Some of its oxygen fractions are no percentages, some ionised calcium no mmol/L."""
    with (samples / "eicu_demo_subset" / "lab.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    known, told = 0, []
    for row in rows:
        value = float(row["labresult"]) if row["labresult"] else None
        found = lab(row["labname"], value, row["labmeasurenamesystem"], row["labresulttext"])
        checked, problems = check_labs(Record("1", {}, PLACE, labs=(found,)), TABLE)
        known += any(one.system == LAB_SYSTEM for one in checked.labs)
        told += [(problem.code, problem.subject) for problem in problems]
    assert known > 0.93 * len(rows)
    suspects = Counter(name for code, name in told if code == Code.UNIT_SUSPECT)
    assert suspects["fio2"] == 58
    assert suspects["calcium_ionized"] == 17
    assert suspects.total() < 90
