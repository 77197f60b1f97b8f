"""Dates found and moved in their own form."""

from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.client.identifiers.dates import dates, moved, year_of
from huizhen.client.identifiers.finding import merged
from huizhen.client.identifiers.surrogates import shift_days, shifted_time


@pytest.mark.parametrize(
    ("raw", "new"),
    [
        ("2023年5月6日", "2023年6月15日"),
        ("2023-05-06", "2023-06-15"),
        ("2023-5-6", "2023-6-15"),
        ("2023.5.6", "2023.6.15"),
        ("20230506", "20230615"),
        ("2023/12/06", "2024/01/15"),
        ("二〇二三年五月六日", "二〇二三年六月十五日"),
        ("5月6日", "6月15日"),
        ("5月30-31日", "7月9-10日"),
        ("2023年5月", "2023年6月"),
        ("23年5月6日", "23年6月15日"),
        ("05/06/2023", "06/15/2023"),
        ("16/05/2023", "25/06/2023"),
        ("5/6/23", "6/15/23"),
        ("January 5th, 2023", "February 14th, 2023"),
        ("5 Jan 2023", "14 Feb 2023"),
        ("06MAY2023", "15JUN2023"),
        ("农历八月十五", "农历九月二十四"),
        ("2023-02-30", "2023-04-09"),  # taken as the 28th
    ],
)
def test_a_date_moved_by_forty_days_keeps_its_form(raw, new):
    assert [(s.start, s.end) for s in merged(dates(raw))] == [(0, len(raw))]
    assert moved(raw, 40, 2023) == new


def test_what_does_not_exist_is_not_moved():
    assert moved("2023年13月5日", 1, 2023) is None
    assert moved("不是", 1, 2023) is None
    assert year_of("5月6日") is None


def test_a_fraction_is_a_date_only_with_a_word_that_says_so():
    assert list(dates("肌力5/6级，用1/2片，3/4")) == []
    assert [(s.start, s.end) for s in dates("于5/6行手术")] == [(1, 4)]
    assert [(s.start, s.end) for s in dates("seen 5/6.")] == [(5, 8)]


@given(
    st.dates(date(1910, 1, 1), date(2090, 1, 1)),
    st.dates(date(1910, 1, 1), date(2090, 1, 1)),
    st.integers(-365, 365),
)
def test_intervals_are_kept(a, b, days):
    new = [date.fromisoformat(moved(d.isoformat(), days, 2023) or "") for d in (a, b)]
    assert new[1] - new[0] == b - a
    assert new[0] - a == timedelta(days=days)


def test_structured_times_move_as_dates_in_texts_do():
    days = shift_days(b"k" * 32, "7")
    assert 1 <= abs(days) <= 365
    assert shifted_time("2023-05-06T08:30:00+08:00", 40) == "2023-06-15T08:30:00+08:00"
    assert shifted_time("2023-05", 40) == "2023-06"
    assert (shifted_time("2023", 40), shifted_time("", 40)) == ("2023", "")
    assert shifted_time("9999-12-31", 40) == "9999"


@given(st.text(alphabet="0123456789/-.年月日号 JanMay农历正初十一〇,"))
def test_any_text_gives_dates_that_can_be_asked_for(text):
    for span in merged(dates(text)):
        moved(text[span.start : span.end], 100, 2024)
