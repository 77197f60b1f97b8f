"""A federation in arrays: sites that train what a strategy lets them, and what comes of it."""

from typing import Any

import numpy as np

from huizhen.protocol.adapter import difference
from huizhen.protocol.study import parse_study
from huizhen.strategies import mean
from huizhen.strategies.base import Averaging, Given
from huizhen.strategies.catalogue import make_strategy


def f32(values):
    return np.array(values, np.float32)


MODULE = "l.0.query"
A, B, HEAD, BIAS = f"{MODULE}.lora_A", f"{MODULE}.lora_B", "head.weight", "head.bias"
R, MA, MB = f"{MODULE}.lora_R", f"{MODULE}.merged_A", f"{MODULE}.merged_B"
RANK, WIDTH, HEIGHT = 2, 7, 5
SHAPES = {A: (RANK, WIDTH), B: (HEIGHT, RANK), HEAD: (3, 4), BIAS: (3,)}


def study(name="ffa_ortho", weights="equal", seed=11, sizes=None, unit="none", rank=2, **terms):
    sizes = {"s0": 100} if sizes is None else sizes
    if name == "ffa_refresh":
        terms = {"every": 2, **terms}
    rounds: dict[str, Any] = {"count": 4} if name == "ffa_refresh" else {}
    if name == "scaffold":
        rounds = {"length": "steps", "optimizer": "sgd", "momentum": 0.0}
    return parse_study(
        {
            "study": {"name": "s", "seed": seed},
            "base": {"name": "tiny"},
            "adapter": {"target_modules": ["query"], "rank": rank},
            "task": {"kind": "classification", "text": "{t}", "label": "y"},
            "privacy": {"unit": unit},
            "strategy": {"name": name, "weights": weights, **terms},
            "rounds": rounds,
            "sites": {site: {"patients_public": size} for site, size in sizes.items()},
        },
        "study.toml",
    )


def made(name, sites=1, **terms):
    """Return a strategy as a study of so many sites has it."""
    return make_strategy(study(name, sizes={f"s{i}": 100 for i in range(sites)}, **terms))


def first_adapter(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def local_adapters(strategy, state, n, seed=1, scale=0.5, round=1):
    """Return what n sites hold after training what the strategy lets them train."""
    rng = np.random.default_rng(seed)
    shapes = {name: value.shape for name, value in state.x.items() if ".merged_" not in name}
    trained = strategy.trains(shapes, round)
    return [
        {
            name: value + np.float32(scale) * rng.normal(size=value.shape).astype(np.float32)
            if name in trained
            else value
            for name, value in sorted(state.x.items())  # each its own draw, whatever the order
        }
        for _ in range(n)
    ]


def after_round(strategy, state, adapters, shares, round=1, order=None, is_absolute=True):
    """Return the state after a round in which the sites ended with these adapters."""
    shapes = {name: value.shape for name, value in state.x.items() if ".merged_" not in name}
    trained = strategy.sends(shapes, round)
    updates = [
        difference({name: adapter[name] for name in trained if name in adapter}, state.x)
        if is_absolute
        else {name: adapter[name] for name in trained if name in adapter}
        for adapter in adapters
    ]
    given = [
        Given(f"s{i}", share, update)
        for i, (update, share) in enumerate(zip(updates, shares, strict=True))
    ]
    given = [given[i] for i in order] if order is not None else given
    if not isinstance(strategy, Averaging):
        return strategy.join(state, given, round)
    total = mean.start()
    for one in given:
        total = mean.add(total, one.update, one.share)
    return strategy.step(state, mean.finish(total, 1.0), round)


def run_rounds(strategy, state, n, *, rounds, begin=1):
    """Return the states before each round and after the last; sites train by the round's number."""
    states = [state]
    for round in range(begin, rounds + 1):
        adapters = local_adapters(strategy, states[-1], n, seed=round, round=round)
        states.append(after_round(strategy, states[-1], adapters, [1 / n] * n, round))
    return states


def product(adapter):
    """Return ΔW / s of an adapter: B·R·A with what was merged."""
    left, right = adapter[B].astype(np.float64), adapter[A].astype(np.float64)
    found = left @ adapter[R].astype(np.float64) @ right if R in adapter else left @ right
    if MB in adapter:
        found = found + adapter[MB].astype(np.float64) @ adapter[MA].astype(np.float64)
    return found


def mean_product(adapters, shares):
    return sum(share * product(adapter) for adapter, share in zip(adapters, shares, strict=True))


def raw(state):
    return {name: value.tobytes() for name, value in state.x.items()}


def loadable(x):
    """Return tensors to compare: names, shapes and bytes."""
    return {name: (value.shape, value.tobytes()) for name, value in x.items()}
