"""Codes, rules and what becomes of a problem."""

import dataclasses
from typing import Any

import pytest

from huizhen.client.quality.problems import FIXES, Code, Problem, Rules
from huizhen.protocol import strict
from huizhen.protocol.errors import ConfigError, GovernanceError


def only(code, action: Any) -> Rules:
    return Rules(**{str(code): action})


def test_every_code_has_a_rule_and_every_rule_a_code():
    assert {field.name for field in dataclasses.fields(Rules)} == {str(code) for code in Code}


def test_what_cannot_be_mended_cannot_be_set_to_fix():
    for code in Code:
        if code in FIXES:
            assert only(code, "fix").action(code) == "fix"
        else:
            with pytest.raises(ValueError, match=f"{code} is 'fix', there is no way to mend it"):
                only(code, "fix")


def test_rules_come_from_a_table_and_a_misspelt_code_names_the_nearest():
    rules = strict.build(Rules, {"unknown_unit": "refuse"}, "data.toml [rules]")
    assert rules.action(Code.UNKNOWN_UNIT) == "refuse"
    with pytest.raises(ConfigError, match="did you mean 'unknown_unit'"):
        strict.build(Rules, {"unknown_units": "keep"}, "data.toml [rules]")
    with pytest.raises(ConfigError, match="there is no way to mend it"):
        strict.build(Rules, {"two_sexes": "fix"}, "data.toml [rules]")


def test_a_problem_carries_what_became_of_it():
    problem = Rules().settle(Code.IMPOSSIBLE_VALUE, "a.csv:7", "sodium")
    assert problem == Problem(Code.IMPOSSIBLE_VALUE, "a.csv:7", "sodium", "fix")


def test_a_refusal_names_place_code_and_subject():
    rules = Rules(unknown_unit="refuse")
    with pytest.raises(GovernanceError, match=r"a\.csv:7: record has unknown_unit in 'sodium'"):
        rules.settle(Code.UNKNOWN_UNIT, "a.csv:7", "sodium")
    with pytest.raises(GovernanceError) as caught:
        rules.settle(Code.UNKNOWN_UNIT, "a.csv:7", "x" * 500)
    assert len(str(caught.value)) < 300
