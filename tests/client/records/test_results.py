"""Results and ranges as laboratories write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.client.records.results import number_of, range_of


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4.06", (4.06, "")),
        ("-3", (-3.0, "")),
        ("<0.01", (0.01, "<")),
        (">= 60", (60.0, ">=")),
        ("≤5", (5.0, "<=")),
        ("＜０．５", (0.5, "<")),
        ("1.2e3", (1200.0, "")),
        (".5", (0.5, "")),
    ],
)
def test_a_number_is_read_with_its_comparator(text, number):
    assert number_of(text) == number


@pytest.mark.parametrize("text", ["", "+1", "1+", "1,200", "1:128", "阳性", "1e999", "nan", "3-5"])
def test_what_is_no_plain_number_is_none(text):
    assert number_of(text) == (None, "")


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("3.5-5.0", (3.5, 5.0)),
        ("4.3 to 6.2", (4.3, 6.2)),
        ("3.9～6.1", (3.9, 6.1)),
        ("3.5--5.0", (3.5, 5.0)),
        ("-3--1", (-3.0, -1.0)),
        ("-3 - 3", (-3.0, 3.0)),
        ("70_105", (70.0, 105.0)),
        ("<0.4", (None, 0.4)),
        (">=60", (60.0, None)),
        ("5-3", (None, None)),
        ("阴性", (None, None)),
        ("5", (None, None)),
        ("1e999-1e999", (None, None)),
    ],
)
def test_a_range_has_the_ends_it_says(text, ends):
    assert range_of(text) == ends


@given(st.text(alphabet="0123456789.-~<>=eE to", max_size=100))
def test_any_text_gives_ordered_ends_or_none(text):
    low, high = range_of(text)
    assert low is None or high is None or low <= high
    number_of(text)
