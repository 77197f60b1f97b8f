"""The plan of the equal-tuning study: one grid for all, nothing chosen on what is reported."""

import itertools
from typing import Any

import pytest

from huizhen.benchmarks import lora_strategies
from huizhen.benchmarks.lora_strategies import (
    BEST,
    METHODS,
    RATES,
    SEEDS,
    TUNING_SEED,
    Unit,
    best_methods,
    best_rate,
    key_of,
    plan,
    study_of,
    values_of,
)
from huizhen.benchmarks.resumable import append, read_results
from huizhen.protocol.strategy_terms import PARAMETERS


def done_with(units, figure):
    return {unit.key: {"metrics": {"macro_f1": figure(unit)}} for unit in units}


def finished(figure, *, fed6=True):
    """Return all results that a plan comes to when each run gives what ``figure`` says."""
    done: dict[str, dict[str, Any]] = {}
    for _ in range(10):
        units = list(plan(done, fed6=fed6))
        if all(unit.key in done for unit in units):
            return done, units
        done |= done_with(units, figure)
    raise AssertionError("the plan never ends")


def figure(unit):
    """Later methods are better, and the third rate of the grid is the best."""
    grid = RATES[unit.epsilon is not None]
    noise = 0.01 * unit.seed if unit.task != "tuning" else 0
    return METHODS.index(unit.method) / 10 - 0.01 * abs(grid.index(unit.rate) - 2) + noise


def test_every_method_gets_the_same_grid_on_the_tuning_cohort_alone():
    assert set(METHODS) <= PARAMETERS.keys()
    first = list(plan({}, fed6=True))
    assert {unit.task for unit in first} == {"tuning"}
    assert {unit.seed for unit in first} == {TUNING_SEED}
    assert TUNING_SEED not in SEEDS
    for method in METHODS:
        for epsilon in (None, 8.0):
            rates = [u.rate for u in first if (u.method, u.epsilon) == (method, epsilon)]
            assert tuple(rates) == RATES[epsilon is not None]


def test_the_whole_plan_is_two_hundred_and_fifty_four_runs_of_what_the_issue_asks():
    done, units = finished(figure)
    assert len(units) == len(done) == 254
    assert len({unit.key for unit in units}) == 254
    best = METHODS[-1 : -BEST - 1 : -1]
    assert best_methods(done, 8.0) == list(best)
    small = {unit.method for unit in units if unit.epsilon in (1.0, 3.0)}
    assert small == set(best)
    for method, epsilon in itertools.product(METHODS, (None, 8.0)):
        assert best_rate(done, method, epsilon) == RATES[epsilon is not None][2]
        finals = [u for u in units if u.task == "generated"]
        own = [u for u in finals if (u.method, u.epsilon) == (method, epsilon)]
        assert [u.seed for u in own] == list(SEEDS)
        assert {u.rate for u in own} == {RATES[epsilon is not None][2]}
        assert len(values_of(done, "generated", method, epsilon)) == len(SEEDS)
    fed6 = [unit for unit in units if unit.task == "fed6"]
    assert len(fed6) == len(METHODS) * len(SEEDS)
    assert {unit.epsilon for unit in fed6} == {None}


def test_a_rate_is_chosen_when_its_whole_grid_is_there_and_not_before():
    units = [u for u in plan({}, fed6=False) if (u.method, u.epsilon) == ("svd", None)]
    done = done_with(units[:-1], figure)
    assert best_rate(done, "svd", None) is None
    assert all(unit.task == "tuning" for unit in plan(done, fed6=True))
    done |= done_with(units[-1:], figure)
    assert best_rate(done, "svd", None) == RATES[False][2]
    assert best_methods(done, 8.0) == []
    finals = [unit for unit in plan(done, fed6=True) if unit.task != "tuning"]
    assert {unit.method for unit in finals} == {"svd"}


def test_without_the_published_cases_nothing_else_changes():
    _, units = finished(figure, fed6=False)
    assert len(units) == 254 - len(METHODS) * len(SEEDS)


def test_a_result_is_on_the_disk_and_a_cut_line_is_done_again(tmp_path):
    path = tmp_path / "results.jsonl"
    assert read_results(path, key_of) == {}
    one = {"task": "tuning", "method": "svd", "epsilon": None, "rate": 0.001, "seed": 100}
    append(path, {**one, "metrics": {"macro_f1": 0.5}})
    append(path, {**one, "epsilon": 8.0, "metrics": {"macro_f1": 0.25}})
    with path.open("a") as file:
        file.write('{"task": "tuning", "meth')
    found = read_results(path, key_of)
    assert len(found) == 2
    assert found[Unit("tuning", "svd", None, 0.001, 100).key]["metrics"] == {"macro_f1": 0.5}
    append(path, {**one, "seed": 1, "metrics": {}})  # a whole line, not the cut one's end
    assert len(read_results(path, key_of)) == 3


@pytest.mark.parametrize("epsilon", [None, 8.0, 1.0])
def test_every_run_makes_five_passes_with_its_own_rate(make_study, epsilon):
    for method in METHODS:
        study = study_of(make_study(), Unit("generated", method, epsilon, 0.25, 3))
        assert study.strategy.name == method
        assert study.study.seed == 3
        if epsilon is None:
            assert (study.privacy.unit, study.rounds.learning_rate) == ("none", 0.25)
            assert study.rounds.count * study.rounds.local_epochs == 5
        else:
            steps = study.rounds.count * study.rounds.local_steps
            assert steps * study.privacy.sampling_rate == 5
            terms = study.privacy
            found = (terms.unit, terms.epsilon, terms.learning_rate, terms.optimizer)
            assert found == ("patient", epsilon, 0.25, "sgd")


def test_the_command_stops_when_its_time_is_over(tmp_path, capsys):
    arguments = ["--minutes", "-1", "--out", str(tmp_path), "--data", str(tmp_path)]
    assert lora_strategies.main(arguments) == 0
    assert capsys.readouterr().out.startswith("0 of 100 runs known so far are done")
