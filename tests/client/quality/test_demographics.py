"""What is said of a patient over many records, and whether it can all be true."""

from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.client.quality.demographics import Demographics, days
from huizhen.client.quality.problems import Code, Rules
from huizhen.client.records.record import Finding, Lab, Record
from huizhen.protocol.errors import GovernanceError

NOW = date(2026, 1, 31)


def record(patient="p1", **more):
    return Record(patient, {}, more.pop("place", "a.csv:1"), **more)


def codes(*records, rules=None):
    """Return the codes that each record gives."""
    checks = Demographics(NOW, rules)
    return [[problem.code for problem in checks.add(one)] for one in records]


def test_what_agrees_is_no_problem():
    found = codes(
        record(sex="male", birth="1960", time="2020-01-01T08:00:00+08:00"),
        record(sex="male", birth="1960-05", death="2021"),
        record(birth="1960-05-06", death="2021-03-04", time="2021-03-30"),
        record("p2", sex="female", birth="1960", time="1960-05"),
        record(time="2026-02-01"),
    )
    assert found[:4] == [[], [], [], []]
    assert found[4] == [Code.AFTER_DEATH]  # tomorrow is not the future yet


@pytest.mark.parametrize(
    ("one", "other", "code"),
    [
        ({"sex": "male"}, {"sex": "female"}, Code.TWO_SEXES),
        ({"birth": "1960-05"}, {"birth": "1960-06-01"}, Code.TWO_BIRTHS),
        ({"death": "2020"}, {"death": "2021-01-01"}, Code.TWO_DEATHS),
        ({"birth": "1980"}, {"time": "1979-12-31"}, Code.BEFORE_BIRTH),
        ({"birth": "1980"}, {"death": "1979"}, Code.BEFORE_BIRTH),
        ({"death": "2020-01-01"}, {"time": "2020-03"}, Code.AFTER_DEATH),
        ({"birth": "1890"}, {"time": "2011-02"}, Code.TOO_OLD),
        ({"birth": "1890"}, {"death": "2012"}, Code.TOO_OLD),
    ],
)
def test_contradictions_are_told_at_the_record_that_shows_them_in_either_order(one, other, code):
    assert codes(record(**one), record(**other)) == [[], [code]]
    assert codes(record(**other), record(**one)) == [[], [code]]
    assert codes(record("p1", **one), record("p2", **other)) == [[], []]


@pytest.mark.parametrize("where", ["time", "finding", "lab", "birth", "death"])
def test_the_future_is_told_wherever_it_is(where):
    time = "2027-01-01"
    coded: dict[str, dict[str, Any]] = {
        "finding": {"findings": (Finding(code="x", time=time),)},
        "lab": {"labs": (Lab(code="x", time=time),)},
    }
    more = coded.get(where, {where: time})
    checks = Demographics(NOW)
    assert [(p.code, p.subject) for p in checks.add(record(**more))] == [(Code.IN_FUTURE, where)]


def test_a_fact_that_is_wrong_once_is_told_once():
    found = codes(
        record(sex="male"), record(sex="female"), record(sex="male"), record(sex="female")
    )
    assert found == [[], [Code.TWO_SEXES], [], []]
    late = record(time="1970"), record(birth="1980"), record(birth="1980"), record(time="1971")
    assert codes(*late) == [[], [Code.BEFORE_BIRTH], [], [Code.BEFORE_BIRTH]]


def test_an_encounter_of_two_patients_marks_both():
    checks = Demographics(NOW)
    assert checks.add(record("p1", encounter="e1")) == []
    assert checks.add(record("p1", encounter="e1")) == []
    assert [p.code for p in checks.add(record("p2", encounter="e1"))] == [Code.ENCOUNTER_OF_TWO]
    assert checks.add(record("p3", encounter="e2")) == []
    assert [checks.is_contradictory(p) for p in ("p1", "p2", "p3", "p4")] == [
        True,
        True,
        False,
        False,
    ]


def test_a_rule_to_refuse_names_the_place():
    with pytest.raises(GovernanceError, match=r"b\.csv:9: record has two_sexes in 'sex'"):
        codes(
            record(sex="male"),
            record(sex="female", place="b.csv:9"),
            rules=Rules(two_sexes="refuse"),
        )


def test_many_patients_take_little_memory_each_and_stay_apart():
    checks = Demographics(NOW)
    for number in range(5_000):
        sex = "male" if number % 2 else "female"
        assert checks.add(record(str(number), sex=sex, birth=f"{1950 + number % 60}")) == []
    for number in range(0, 5_000, 7):
        sex = "female" if number % 2 else "male"
        assert [p.code for p in checks.add(record(str(number), sex=sex))] == [Code.TWO_SEXES]
    assert len(checks) == 5_000
    assert len(checks._patients._bytes) / len(checks) < 107
    assert sum(checks.is_contradictory(str(number)) for number in range(5_000)) == 715


@pytest.mark.parametrize(
    ("time", "first", "last"),
    [
        ("2024", date(2024, 1, 1), date(2024, 12, 31)),
        ("2024-02", date(2024, 2, 1), date(2024, 2, 29)),
        ("2024-02-29", date(2024, 2, 29), date(2024, 2, 29)),
        ("2024-02-29T23:59:59+08:00", date(2024, 2, 29), date(2024, 2, 29)),
    ],
)
def test_a_time_may_lie_on_these_days(time, first, last):
    assert days(time) == (first.toordinal(), last.toordinal())


times = st.text(max_size=12) | st.text("0123456789-T:+", max_size=26) | st.dates().map(str)


@given(st.lists(st.tuples(st.sampled_from("ab"), times, times, times), max_size=6))
def test_any_times_are_compared_or_told_of(entries):
    checks = Demographics(NOW)
    for patient, birth, death, time in entries:
        problems = checks.add(record(patient, birth=birth, death=death, time=time))
        assert len(problems) == len(set(problems))
        assert not problems or checks.is_contradictory(patient)


dates = st.dates(date(1900, 1, 1), date(2025, 12, 31))


@given(dates, st.lists(dates, min_size=1, max_size=6))
def test_whatever_the_order_a_patients_contradiction_is_seen(birth, events):
    """The slow twin: some event surely lies before the birth, or over 120 years after it."""
    before = any(event < birth for event in events)
    old = any((event - birth).days > 120 * 365.25 for event in events)
    records = [record(birth=str(birth)), *(record(time=str(event)) for event in events)]
    for order in (records, records[::-1]):
        found = {code for given_codes in codes(*order) for code in given_codes}
        assert (Code.BEFORE_BIRTH in found) == before
        assert (Code.TOO_OLD in found) == old
