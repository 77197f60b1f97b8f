"""The ways to average, as a user sees them before choosing."""

import json
from pathlib import Path

import pytest

from huizhen.cli.main import main
from huizhen.protocol.strategy_terms import MIXED_RANKS, PARAMETERS, SEE_EACH_UPDATE
from huizhen.strategies.about import ABOUT


def found(capsys, *options):
    assert main(["strategies", "--json", *options]) == 0
    return {one["name"]: one for one in json.loads(capsys.readouterr().out)}


def test_every_strategy_is_shown_with_its_promises_and_its_bytes(capsys):
    assert main(["strategies"]) == 0
    text = capsys.readouterr().out
    for name in PARAMETERS:
        assert f"\n{name} " in text
    assert ABOUT.keys() == PARAMETERS.keys()
    rows = found(capsys)
    assert rows["ffa"]["up"] == 4 * 393_216  # RoBERTa-large, as the papers count
    assert rows["fedavg"]["up"] == rows["fedavg"]["down"] == 4 * 786_432
    assert rows["rolora"]["up"] == 4 * 393_216
    assert rows["fed_sb"]["up"] == rows["fed_sb"]["down_last"] == 4 * 3_072
    assert {name for name in rows if rows[name]["facts"]["mixed_ranks"]} == MIXED_RANKS
    assert {name for name in rows if not rows[name]["facts"]["linear"]} == SEE_EACH_UPDATE


def test_what_is_merged_grows_with_sites_and_rounds(capsys):
    few, many = found(capsys, "--sites", "3", "--rounds", "3"), found(capsys, "--sites", "9")
    for name in ("flora", "fedex"):
        assert few[name]["down"] < few[name]["down_last"] < many[name]["down_last"]
        assert few[name]["down"] < many[name]["down"]
    assert few["svd"]["down"] == many["svd"]["down_last"]
    alone = found(capsys, "--rounds", "1")
    assert alone["flora"]["down"] == alone["flora"]["down_last"] == 0


@pytest.mark.parametrize("option", ["--modules", "--width", "--rank", "--sites", "--rounds"])
def test_a_number_that_makes_no_sense_is_refused(capsys, option):
    assert main(["strategies", option, "0"]) != 0
    assert f"{option} is 0, expected 1 or more" in capsys.readouterr().err


def test_the_page_says_of_each_strategy_what_the_code_says(capsys):
    page = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    said = {row[0]: row[1:4] for row in rows if len(row) == 5 and row[0] in PARAMETERS}
    assert said == {
        name: [
            "exact" if one["facts"]["exact"] else "approximate",
            "sums" if one["facts"]["linear"] else "each update",
            "may differ" if one["facts"]["mixed_ranks"] else "one",
        ]
        for name, one in found(capsys).items()
    }
    for name, own in PARAMETERS.items():
        for key, value in own.items():
            [line] = [row for row in rows if name in row[0].split(", ") and f"`{key} = " in row[-1]]
            assert f"`{key} = {value}`" in line[-1], (name, key)
