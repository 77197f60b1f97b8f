"""Templates read plain fields and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.learning.template import fields_of, render
from huizhen.protocol.errors import ConfigError


def test_the_fields_of_a_template_are_named_once_in_order():
    assert fields_of("{b}, {a} {b}: {年龄} {x_1}", "text") == ("b", "a", "年龄", "x_1")
    assert fields_of("no field", "text") == ()


@pytest.mark.parametrize(
    "template",
    [
        "{a.b}",
        "{a[0]}",
        "{a[b]}",
        "{a.__class__}",
        "{}",
        "{0}",
        "{a!r}",
        "{a:>9}",
        "{a:{b}}",
        "{ a}",
    ],
)
def test_a_template_that_asks_for_more_than_plain_fields_is_refused(template):
    with pytest.raises(ConfigError, match=r"^\[task\] text holds .*expected a plain field"):
        fields_of(template, "[task] text")


@pytest.mark.parametrize("template", ["{a", "a}", "{a!}", "{{a}"])
def test_a_template_that_does_not_parse_is_refused(template):
    with pytest.raises(ConfigError, match=r"^\[task\] text is not a template"):
        fields_of(template, "[task] text")


def test_lists_are_joined_and_absent_values_are_empty():
    fields = {"a": ["fever", "rash", 3], "b": None, "c": ("x",), "d": 2.5}
    assert render("{a}; {b}{c} {d} {{e}}", fields) == "fever, rash, 3; x 2.5 {e}"


def test_a_list_joins_what_is_not_empty():
    assert render("{a}", {"a": ["fever", "", None, " ", ["", "rash"], []]}) == "fever, rash"


@pytest.mark.parametrize("value", [None, "", " ", [], ["", ""], [None, [" "]]])
def test_a_text_whose_fields_are_all_empty_is_empty(value):
    assert render("Phenotypes: {a}, {b}.", {"a": value, "b": None}) == ""
    assert render("Phenotypes: {a}, {b}.", {"a": value, "b": 0}).endswith(", 0.")


def test_outer_space_is_dropped():
    assert render(" {a} ", {"a": " x "}) == "x"


def test_a_missing_field_is_named():
    with pytest.raises(KeyError, match="b"):
        render("{a} {b}", {"a": 1})


def test_braces_in_a_value_are_left_alone():
    assert render("{a}", {"a": "{b} {0} {x.y}"}) == "{b} {0} {x.y}"


@given(st.text(alphabet="{}ab0!:.[] _٣²", max_size=12))
def test_what_is_accepted_can_be_rendered(template):
    try:
        names = fields_of(template, "text")
    except ConfigError:
        return
    rendered = render(template, dict.fromkeys(names, "value"))
    assert rendered.count("value") >= len(names)
