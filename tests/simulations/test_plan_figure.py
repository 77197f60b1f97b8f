"""The picture of a plan: written where asked, refused in one line, and with what it must show."""

import re
from dataclasses import replace

import pytest

from huizhen.protocol.errors import ConfigError, StorageError
from huizhen.protocol.planning import Terms, plan
from huizhen.simulations.plan_figure import draw_plan

TERMS = Terms(
    epsilon=6.0, delta=1e-5, rounds=3, steps_per_round=2, parameters=900, sampling_rate=0.5
)
SIGNATURES = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}


@pytest.fixture(scope="module")
def planned():
    return plan({"north": 30, "again": 30, "病院": 1200}, TERMS)


@pytest.mark.parametrize("ending", sorted(SIGNATURES))
def test_the_ending_chooses_the_format(planned, tmp_path, ending):
    draw_plan(planned, tmp_path / f"plan{ending}")
    assert (tmp_path / f"plan{ending}").read_bytes().startswith(SIGNATURES[ending])


def words(path):
    return re.findall(r"<text[^>]*>([^<]+)</text>", path.read_text("utf-8"))


def test_it_names_the_budget_the_sizes_and_the_thresholds(planned, tmp_path):
    draw_plan(planned, tmp_path / "plan.svg")
    shown = words(tmp_path / "plan.svg")
    assert {"clear", "noisy", "drowned", "agreed: ε = 6", "ε at δ = 1e-05"} <= set(shown)
    assert {"30 (×2)", "1,200", "round", "patients of a site"} <= set(shown)
    assert f"all 3 together: {planned.study_ratio:.2g}" in shown
    assert "Whole study: 6 steps, 900 parameters" in shown


def test_one_site_has_no_line_for_all(tmp_path):
    draw_plan(plan({"a": 30}, TERMS), tmp_path / "plan.svg")
    assert not [text for text in words(tmp_path / "plan.svg") if "together" in text]


def test_sizes_that_lie_close_are_not_all_named(tmp_path):
    sizes = {str(n): n for n in range(100, 130)} | {"far": 4000}
    draw_plan(plan(sizes, TERMS), tmp_path / "plan.svg")
    shown = words(tmp_path / "plan.svg")
    named = [n for n in range(100, 130) if str(n) in shown]
    assert 100 in named
    assert 2 <= len(named) <= 6
    assert "4,000" in shown


def test_a_plan_at_the_edge_is_drawn(tmp_path):
    edge = replace(TERMS, epsilon=0.5, delta=0.05, rounds=1, parameters=1)
    draw_plan(plan({"a": 1}, edge), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 0


def test_another_ending_is_refused(planned, tmp_path):
    with pytest.raises(ConfigError, match=r"plan\.gif', expected a name in \.png, \.svg, \.pdf"):
        draw_plan(planned, tmp_path / "plan.gif")


def test_a_place_that_cannot_be_written_is_refused(planned, tmp_path):
    with pytest.raises(StorageError, match="No such file or directory"):
        draw_plan(planned, tmp_path / "nowhere" / "plan.png")
