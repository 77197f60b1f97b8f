"""Optimisers at the coordinator: by hand, and against plain loops."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.strategies.federation import f32

from huizhen.strategies.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi

NAMES = ("fedadagrad", "fedyogi", "fedadam")


def strategy_of(name, rate=0.5, beta1=0.5, beta2=0.75, tau=1.0):
    if name == "fedavgm":
        return FedAvgM(server_learning_rate=rate, beta1=beta1)
    if name == "fedadagrad":
        return FedAdagrad(server_learning_rate=rate, beta1=beta1, tau=tau)
    kind = FedYogi if name == "fedyogi" else FedAdam
    return kind(server_learning_rate=rate, beta1=beta1, beta2=beta2, tau=tau)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # m: 4, then 2 + 2 = 4;  x: 10 + ½·4, then + ½·4
        ("fedavgm", [12.0, 14.0]),
        # m: 2, then 2;  v: 16, then 20;  steps ½·2/(4+1) and ½·2/(√20+1)
        ("fedadagrad", [10.2, 10.2 + 1 / (math.sqrt(20) + 1)]),
        # v: 0 + ¼·16 = 4, then 4 − ¼·4·sign(4 − 4) = 4
        ("fedyogi", [10 + 1 / 3, 10 + 2 / 3]),
        # v: ¼·16 = 4, then ¾·4 + ¼·4 = 4
        ("fedadam", [10 + 1 / 3, 10 + 2 / 3]),
    ],
)
def test_two_steps_by_hand(name, expected):
    strategy, found = strategy_of(name), []
    state = strategy.init({"a": f32([10]), "b": f32([1])})
    for round, delta in enumerate((4.0, 2.0), start=1):
        state = strategy.step(state, {"a": f32([delta])}, round)
        found.append(float(state.x["a"][0]))
    assert found == pytest.approx(expected, rel=1e-6)
    assert state.x["b"].tolist() == [1]  # was not trained
    assert all(moment["b"].tolist() == [0] for moment in state.moments.values())


@pytest.mark.parametrize("name", ["fedavgm", *NAMES])
@given(
    deltas=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=8),
    rate=st.floats(0.01, 2),
    beta1=st.floats(0, 0.95),
    beta2=st.floats(0, 0.99),
    tau=st.floats(1e-3, 1),
)
def test_each_number_follows_the_scalar_algorithm(name, deltas, rate, beta1, beta2, tau):
    strategy = strategy_of(name, rate, beta1, beta2, tau)
    state = strategy.init({"a": f32([0.25, -3])})
    x, m, v = 0.25, 0.0, 0.0
    for round, delta in enumerate(deltas, start=1):
        state = strategy.step(state, {"a": f32([delta, 0])}, round)
        if name == "fedavgm":
            m = beta1 * m + delta
            x += rate * m
            continue
        m = beta1 * m + (1 - beta1) * delta
        if name == "fedadagrad":
            v += delta**2
        elif name == "fedyogi":
            v -= (1 - beta2) * delta**2 * ((v > delta**2) - (v < delta**2))
        else:
            v = beta2 * v + (1 - beta2) * delta**2
        x += rate * m / (math.sqrt(max(v, 0)) + tau)
    # float32 keeps the moments; where Yogi's sign hangs on their rounding the two may part
    if name != "fedyogi" or len(deltas) < 2:
        assert float(state.x["a"][0]) == pytest.approx(x, rel=1e-4, abs=1e-4)
    assert np.isfinite(state.x["a"]).all()
    assert state.x["a"][1] == -3


def test_yogi_follows_the_scalar_algorithm_where_its_sign_is_clear():
    strategy = strategy_of("fedyogi", tau=0.125)
    state, x, m, v = strategy.init({"a": f32([0])}), 0.0, 0.0, 0.0
    for round, delta in enumerate((1.0, 0.25, 2.0, 0.125, 0.5), start=1):
        state = strategy.step(state, {"a": f32([delta])}, round)
        m = 0.5 * m + 0.5 * delta
        v -= 0.25 * delta**2 * math.copysign(1, v - delta**2)
        x += 0.5 * m / (math.sqrt(v) + 0.125)
        assert float(state.x["a"][0]) == pytest.approx(x, rel=1e-6)
