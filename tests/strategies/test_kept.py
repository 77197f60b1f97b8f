"""SCAFFOLD and FedSA: what a site keeps for itself from round to round."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.strategies.federation import SHAPES, A, B, first_adapter, made, study

from huizhen.protocol.adapter import Tensors
from huizhen.protocol.errors import AggregationError, ConfigError
from huizhen.protocol.study import parse_study
from huizhen.strategies.scaffold import CONTROL, Scaffold


def one_round(strategy, state, gradients, kept, steps, rate, round, absent=()):
    """Let sites train a scalar with these gradients; return the next state and what they keep."""
    shapes = {"w": (1,)}
    told = strategy.announced(state, shapes, round)
    assert {n: v.shape for n, v in told.items()} == strategy.announces(shapes, round)
    x = strategy.whole({}, told, round)["w"]
    updates, after = [], []
    for i, (gradient, own) in enumerate(zip(gradients, kept, strict=True)):
        correction = strategy.correction(told, own)
        y, total = x.astype(np.float32), np.zeros(1, np.float32)
        for _ in range(steps):
            g = np.float32(gradient(y))
            total = total + g
            y = y - np.float32(rate) * (g + correction.get("w", np.float32(0)))
        if i in absent:
            after.append(own)
            continue
        if strategy.sends_gradients:
            update = strategy.update_of({"w": total / np.float32(steps)}, round)
        else:
            update = {"w": y - x}
        updates.append(update["w"])
        after.append(strategy.kept_after(update, {"w": y}, round))
        assert after[-1].keys() == strategy.keeps(shapes).keys()
    return strategy.step(state, {"w": np.mean(updates, axis=0)}, round), after


def papers_round(x, c, c_i, gradients, steps, rate, server_rate):
    """Algorithm 1 of Karimireddy et al. 2020 with option II, in floats, as it is printed."""
    moves, changes, new = [], [], []
    for gradient, own in zip(gradients, c_i, strict=True):
        y = x
        for _ in range(steps):
            y = y - rate * (gradient(y) - own + c)
        plus = own - c + (x - y) / (steps * rate)
        moves.append(y - x)
        changes.append(plus - own)
        new.append(plus)
    return x + server_rate * np.mean(moves), c + np.mean(changes), new


def quadratic(curve, centre):
    return lambda y: curve * (y - centre)


# Two sites, one step of 0.1: gradients at 1 are -2 and 6, so u = 0.2 and -0.6.
def test_scaffold_by_hand():
    strategy = Scaffold(server_learning_rate=1.0, travel=lambda name, round: 0.1)
    state = strategy.init({"w": np.array([1.0], np.float32)})
    gradients = [quadratic(1, 3), quadratic(2, -2)]
    state, kept = one_round(strategy, state, gradients, [{}, {}], 1, 0.1, 1)
    assert state.x["w"] == pytest.approx(0.8)
    assert state.moments["c"]["w"] == pytest.approx(2)
    assert [own["w" + CONTROL].item() for own in kept] == pytest.approx([-2, 6])
    # One step's gradient is taken before any correction: at 0.8 they are -2.2 and 5.6.
    state, kept = one_round(strategy, state, gradients, kept, 1, 0.1, 2)
    assert state.x["w"] == pytest.approx(0.8 - 0.1 * 1.7)
    assert state.moments["c"]["w"] == pytest.approx(1.7)
    assert [own["w" + CONTROL].item() for own in kept] == pytest.approx([-2.2, 5.6])


@settings(max_examples=50, deadline=None)
@given(
    sites=st.lists(st.tuples(st.floats(0.1, 2), st.floats(-3, 3)), min_size=1, max_size=5),
    steps=st.integers(1, 5),
    rate=st.floats(0.01, 0.1),
    server_rate=st.floats(0.5, 1.5),
)
def test_scaffold_is_the_papers_algorithm_though_sites_send_their_update_alone(
    sites, steps, rate, server_rate
):
    strategy = Scaffold(server_learning_rate=server_rate, travel=lambda name, round: steps * rate)
    gradients = [quadratic(*site) for site in sites]
    state = strategy.init({"w": np.array([1.0], np.float32)})
    kept: list[Tensors] = [{} for _ in sites]
    x, c, c_i = 1.0, 0.0, [0.0] * len(sites)
    for round in range(1, 5):
        state, kept = one_round(strategy, state, gradients, kept, steps, rate, round)
        x, c, c_i = papers_round(x, c, c_i, gradients, steps, rate, server_rate)
        assert state.x["w"].item() == pytest.approx(x, rel=1e-3, abs=1e-4)
        assert state.moments["c"]["w"].item() == pytest.approx(c, rel=1e-2, abs=1e-3)
        for own, expected in zip(kept, c_i, strict=True):
            assert own["w" + CONTROL].item() == pytest.approx(expected, rel=1e-2, abs=1e-3)


def test_scaffold_finds_the_optimum_that_many_local_steps_of_fedavg_miss():
    """Curves 10 and 1 around 0 and 1: the sum is least at 1/11, fedavg's fixed point is further."""
    gradients, ends = [quadratic(10, 0), quadratic(1, 1)], {}
    for name in ("fedavg", "scaffold"):
        strategy = Scaffold(server_learning_rate=1.0, travel=lambda name, round: 10 * 0.05)
        state = strategy.init({"w": np.array([0.5], np.float32)})
        kept: list[Tensors] = [{}, {}]
        for round in range(1, 200):
            kept = kept if name == "scaffold" else [{}, {}]
            state, kept = one_round(strategy, state, gradients, kept, 10, 0.05, round)
        ends[name] = state.x["w"].item()
    assert ends["scaffold"] == pytest.approx(1 / 11, abs=1e-4)
    assert ends["fedavg"] > 1 / 11 + 0.1


@pytest.mark.parametrize("trouble", ["absent", "lost", "late", "a lie"])
def test_what_goes_wrong_once_leaves_no_error_behind(trouble):
    """Curves 2, 1 and 0.5 around 1, 0 and -2: the sum is least at 1/3.5."""
    sites = [(2, 1), (1, 0), (0.5, -2)]
    gradients = [quadratic(*site) for site in sites]
    strategy = Scaffold(server_learning_rate=1.0, travel=lambda name, round: 5 * 0.05)
    state = strategy.init({"w": np.array([0.5], np.float32)})
    kept: list[Tensors] = [{}, {}, {}]
    for round in range(1, 400):
        before = kept
        away = (2,) if round == 3 and trouble != "lost" else ()
        state, kept = one_round(strategy, state, gradients, kept, 5, 0.05, round, away)
        if round == 3:
            if trouble == "lost":
                kept = [*kept[:2], {}]
            elif trouble == "late":  # the site goes on from what nobody counted
                late = {name: value + np.float32(0.3) for name, value in before[2].items()}
                kept = [*kept[:2], late]
            elif trouble == "a lie":
                lie = {"w": np.array([100.0], np.float32)}
                state = strategy.step(state, lie, round)
    assert state.x["w"].item() == pytest.approx(1 / 3.5, abs=1e-3)


def test_what_is_announced_as_c_does_not_shift_what_a_site_sends():
    """The first step's gradient is taken where the adapter is; only the way from there differs."""
    strategy = Scaffold(server_learning_rate=1.0, travel=lambda name, round: 0.1)
    told = {"w": np.ones(1, np.float32), "w" + CONTROL: np.full(1, 3e38, np.float32)}
    assert strategy.correction(told, {"w" + CONTROL: np.zeros(1, np.float32)})["w"] > 1e38
    u = strategy.update_of({"w": np.array([0.5], np.float32)}, 2)
    assert u["w"] == pytest.approx(-0.05)


def test_c_is_not_announced_with_the_final_adapter():
    strategy = Scaffold(server_learning_rate=1.0, travel=lambda name, round: 0.1, rounds=3)
    for round, is_told in ((1, False), (2, True), (3, True), (4, False)):
        assert ("w" + CONTROL in strategy.announces({"w": (1,)}, round)) == is_told


def test_a_site_that_lost_its_control_variate_trains_without_a_correction():
    strategy = made("scaffold")
    told = {"w": np.ones(1, np.float32), "w" + CONTROL: np.ones(1, np.float32)}
    assert strategy.correction(told, {}) == {}


def test_steps_and_the_rate_of_the_round_make_the_gradient():
    """Cosine over four rounds: in the third a half of the rate is left; the head has its own."""
    terms = {
        "study": {"name": "s"},
        "base": {"name": "tiny"},
        "adapter": {"target_modules": ["query"]},
        "task": {"kind": "classification", "text": "{t}", "label": "y"},
        "privacy": {"unit": "none"},
        "strategy": {"name": "scaffold"},
        "rounds": {
            "count": 4, "length": "steps", "local_steps": 5, "schedule": "cosine",
            "optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.2, "head_learning_rate": 0.4,
        },
        "sites": {"s0": {"patients_public": 100}},
    }  # fmt: skip
    from huizhen.strategies.catalogue import make_strategy

    strategy = make_strategy(parse_study(terms, "study.toml"))
    assert isinstance(strategy, Scaffold)
    assert strategy.travel(B, 1) == pytest.approx(1.0)
    assert strategy.travel(B, 3) == pytest.approx(0.5)
    assert strategy.travel("head.bias", 3) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ({"length": "epochs"}, r"\[rounds\] length is 'epochs': set 'steps'"),
        ({"momentum": 0.9}, r"\[rounds\] momentum is 0.9: set 0"),
        ({"max_norm": 1.0}, r"\[rounds\] max_norm cuts a gradient with its correction"),
        ({"optimizer": "adamw"}, r"\[rounds\] optimizer is 'adamw': set 'sgd'"),
        ({"head_optimizer": "adamw"}, r"\[rounds\] optimizer is 'adamw': set 'sgd', for the head"),
    ],
)
def test_what_scaffold_cannot_compute_a_gradient_from_is_refused(rounds, said):
    good = {"length": "steps", "momentum": 0.0, "optimizer": "sgd"}
    tables = {
        "study": {"name": "s"},
        "task": {"kind": "tabular", "label": "y", "labels": ["0", "1"], "features": {"f": [0, 1]}},
        "privacy": {"unit": "none"},
        "strategy": {"name": "scaffold"},
    }
    parse_study({**tables, "rounds": good}, "study.toml")
    with pytest.raises(ConfigError, match=said):
        parse_study({**tables, "rounds": {**good, **rounds}}, "study.toml")


def test_under_privacy_scaffold_needs_plain_sgd_and_nothing_else():
    study("scaffold", unit="patient")
    private = {"unit": "patient", "optimizer": "adamw"}
    tables = {
        "study": {"name": "s"},
        "task": {"kind": "tabular", "label": "y", "labels": ["0", "1"], "features": {"f": [0, 1]}},
        "strategy": {"name": "scaffold"},
    }
    parse_study({**tables, "privacy": {"unit": "patient"}}, "study.toml")
    with pytest.raises(ConfigError, match=r"\[privacy\] optimizer is 'adamw'"):
        parse_study({**tables, "privacy": private}, "study.toml")


@pytest.mark.parametrize("unit", ["patient", "record"])
def test_fedsa_is_refused_with_a_unit_of_privacy(unit):
    study("fedsa")
    with pytest.raises(ConfigError, match=f"'fedsa', what stays at a site .* unit '{unit}' cannot"):
        study("fedsa", unit=unit)


def test_fedsa_sends_and_announces_a_and_nothing_else():
    strategy, x = made("fedsa", sites=2), first_adapter()
    assert strategy.trains(SHAPES, 1) == SHAPES.keys()
    assert strategy.sends(SHAPES, 1) == {A} == strategy.announces(SHAPES, 3).keys()
    assert strategy.keeps(SHAPES).keys() == SHAPES.keys() - {A}
    kept = strategy.kept_after({}, x, 1)
    assert kept.keys() == SHAPES.keys() - {A}
    state = strategy.step(strategy.init(x), {A: np.ones(SHAPES[A], np.float32)}, 1)
    assert state.x[A] == pytest.approx(x[A] + 1)
    assert all(state.x[name] is x[name] for name in kept)
    with pytest.raises(AggregationError, match=f"update holds '{B}', which is frozen"):
        strategy.step(state, {B: np.ones(SHAPES[B], np.float32)}, 2)
