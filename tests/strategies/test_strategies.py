"""What every strategy promises, and what the facts of each say about LoRA's products."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from huizhen.protocol.adapter import difference
from huizhen.protocol.errors import AggregationError, ConfigError
from huizhen.protocol.study import parse_study
from huizhen.strategies import mean
from huizhen.strategies.base import Facts, StrategyState, add
from huizhen.strategies.catalogue import make_strategy, site_shares
from huizhen.strategies.fedavg import FedAvg
from huizhen.strategies.ffa import FfaOrtho
from huizhen.strategies.public_random import orthonormal_rows


def f32(values):
    return np.array(values, np.float32)


A, B, HEAD, BIAS = "l.0.query.lora_A", "l.0.query.lora_B", "head.weight", "head.bias"
RANK, WIDTH, HEIGHT = 2, 7, 5
SHAPES = {A: (RANK, WIDTH), B: (HEIGHT, RANK), HEAD: (3, 4), BIAS: (3,)}
STRATEGIES = {"fedavg": FedAvg(), "ffa_ortho": FfaOrtho(seed=11)}
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)


def study(name="ffa_ortho", weights="equal", seed=11, **sizes):
    return parse_study(
        {
            "study": {"name": "s", "seed": seed},
            "base": {"name": "tiny"},
            "adapter": {"target_modules": ["query"]},
            "task": {"kind": "classification", "text": "{t}", "label": "y"},
            "strategy": {"name": name, "weights": weights},
            "sites": {site: {"patients_public": size} for site, size in sizes.items()},
        },
        "study.toml",
    )


def first_adapter(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def local_adapters(strategy, state, n, seed=1, scale=0.5):
    """Return what n sites hold after training what the strategy lets them train."""
    rng = np.random.default_rng(seed)
    trained = strategy.trains(SHAPES, 1)
    return [
        {
            name: value + np.float32(scale) * rng.normal(size=value.shape).astype(np.float32)
            if name in trained
            else value
            for name, value in state.x.items()
        }
        for _ in range(n)
    ]


def after_round(strategy, state, adapters, shares):
    """Return the state after a round in which the sites ended with these adapters."""
    trained = strategy.trains(SHAPES, 1)
    accumulator = mean.start()
    for adapter, share in zip(adapters, shares, strict=True):
        update = difference({name: adapter[name] for name in trained}, state.x)
        accumulator = mean.add(accumulator, update, share)
    return strategy.step(state, mean.finish(accumulator, 1.0))


def product(adapter):
    return adapter[B].astype(np.float64) @ adapter[A].astype(np.float64)


def mean_product(adapters, shares):
    return sum(share * product(adapter) for adapter, share in zip(adapters, shares, strict=True))


def raw(state):
    return {name: value.tobytes() for name, value in state.x.items()}


def test_fedavg_by_hand():
    x = {A: f32([[1, 2]]), B: f32([[1], [-1]])}
    combined = {A: f32([[0.5, -2]]), B: f32([[-3], [0.25]])}
    server = FedAvg()
    before = server.init(x)
    after = server.step(before, combined)
    assert after.x[A].tolist() == [[1.5, 0]]
    assert after.x[B].tolist() == [[-2], [-0.75]]
    assert before.x[A].tolist() == [[1, 2]]  # step() left the first state as it was


def test_ffa_ortho_by_hand():
    x = {A: f32([[1, 2, 3]]), B: f32([[1], [-1]]), BIAS: f32([4])}
    server = FfaOrtho(seed=11)
    before = server.init(x)
    after = server.step(before, {B: f32([[-3], [0.25]]), BIAS: f32([-0.5])})
    assert after.x[B].tolist() == [[-2], [-0.75]]
    assert after.x[BIAS].tolist() == [3.5]
    assert after.x[A].tobytes() == orthonormal_rows(11, A, (1, 3)).tobytes()
    assert before.x[B].tolist() == [[1], [-1]]
    assert x[A].tolist() == [[1, 2, 3]]


def test_fedavg_trains_everything_and_ffa_ortho_exactly_b_and_the_head():
    shapes = {**SHAPES, "l.lora_A.x.lora_B": (1, 1), "l.0.value.lora_A": (2, 2)}
    for round in (1, 2, 7):
        assert FedAvg().trains(shapes, round) == frozenset(shapes)
        expected = {B, HEAD, BIAS, "l.lora_A.x.lora_B"}
        assert FfaOrtho(seed=11).trains(shapes, round) == expected


def test_ffa_ortho_starts_from_orthonormal_rows_whatever_the_adapter_was():
    states = [FfaOrtho(seed=11).init(first_adapter(seed)) for seed in (1, 2)]
    assert states[0].x[A].tobytes() == states[1].x[A].tobytes()
    assert states[0].x[B].tobytes() == first_adapter(1)[B].tobytes()
    gram = states[0].x[A].astype(np.float64) @ states[0].x[A].T
    assert np.abs(gram - np.eye(RANK)).max() < 1e-6
    other = FfaOrtho(seed=12).init(first_adapter(1))
    assert other.x[A].tobytes() != states[0].x[A].tobytes()


def test_ffa_ortho_never_changes_a():
    server = FfaOrtho(seed=11)
    state = first = server.init(first_adapter())
    for round in range(5):
        adapters = local_adapters(server, state, 3, seed=round)
        state = after_round(server, state, adapters, [0.5, 0.25, 0.25])
        assert state.x[A].tobytes() == first.x[A].tobytes()
        assert state.x[B].tobytes() != first.x[B].tobytes()


def test_ffa_ortho_refuses_an_update_of_a():
    server = FfaOrtho(seed=11)
    state = server.init(first_adapter())
    with pytest.raises(AggregationError, match="A is frozen"):
        server.step(state, {A: np.zeros(SHAPES[A], np.float32)})


def test_ffa_ortho_keeps_the_length_of_an_update_in_the_product():
    server = FfaOrtho(seed=11)
    state = server.init(first_adapter())
    update = np.random.default_rng(3).normal(size=SHAPES[B]).astype(np.float32)
    after = server.step(state, {B: update})
    moved = product(after.x) - product(state.x)
    assert np.linalg.norm(moved) == pytest.approx(np.linalg.norm(update), rel=1e-6)


def test_a_rank_over_the_width_is_the_operators_error():
    with pytest.raises(ConfigError, match=r"\[adapter\] rank is 4, .* lower rank"):
        FfaOrtho(seed=1).init({A: np.zeros((4, 3), np.float32)})


# algorithms.md §1.6, identity 1.
@pytest.mark.parametrize("n", [2, 3, 5])
def test_fedavg_is_off_by_the_cross_covariance_of_the_factors(n):
    server = FedAvg()
    state = server.init(first_adapter())
    shares = [2**-i for i in range(1, n)] + [2.0 ** -(n - 1)]
    adapters = local_adapters(server, state, n)
    after = after_round(server, state, adapters, shares).x
    gap = mean_product(adapters, shares) - product(after)
    mean_A, mean_B = after[A].astype(np.float64), after[B].astype(np.float64)
    covariance = sum(
        share * (adapter[B] - mean_B) @ (adapter[A] - mean_A)
        for share, adapter in zip(shares, adapters, strict=True)
    )
    assert np.abs(gap - covariance).max() < 1e-6
    assert np.abs(gap).max() > 0.01  # so the identity is not 0 = 0
    # n − 1 independent deviations of rank r each; the product has no more than min(d, k) anyway.
    assert np.linalg.matrix_rank(gap, tol=1e-5) == min((n - 1) * RANK, HEIGHT, WIDTH)


# Identity 5, and the facts: a strategy is exact if and only if the products agree.
@every_strategy
@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), weights=st.lists(st.integers(1, 900), min_size=2, max_size=6))
def test_a_strategy_is_exact_if_and_only_if_its_facts_say_so(strategy, seed, weights):
    state = strategy.init(first_adapter())
    shares = [weight / sum(weights) for weight in weights]
    adapters = local_adapters(strategy, state, len(weights), seed)
    after = after_round(strategy, state, adapters, shares)
    gap = np.abs(product(after.x) - mean_product(adapters, shares)).max()
    if strategy.facts.exact:
        assert gap < 1e-5
    else:  # the least share is 1/4501, so the covariance is small but not rounding
        assert gap > 1e-5


# Identity 14, second half.
def test_fedavg_is_exact_where_the_sites_agree_on_a():
    server = FedAvg()
    state = server.init(first_adapter())
    common = local_adapters(server, state, 1)[0][A]
    adapters = [{**adapter, A: common} for adapter in local_adapters(server, state, 4, seed=5)]
    shares = [0.5, 0.25, 0.125, 0.125]
    after = after_round(server, state, adapters, shares)
    assert np.abs(product(after.x) - mean_product(adapters, shares)).max() < 1e-6


# Identity 13.
@every_strategy
def test_one_site_alone_gets_its_own_model(strategy):
    state = strategy.init(first_adapter())
    adapters = local_adapters(strategy, state, 1)
    after = after_round(strategy, state, adapters, [1.0])
    for name in SHAPES:
        assert after.x[name] == pytest.approx(adapters[0][name], rel=1e-6, abs=1e-7)


@every_strategy
@pytest.mark.parametrize("n", [2, 3, 7])
def test_identical_sites_get_their_own_model(strategy, n):
    state = strategy.init(first_adapter())
    local = local_adapters(strategy, state, 1)[0]
    after = after_round(strategy, state, [local] * n, [1 / n] * n)
    for name in SHAPES:
        assert after.x[name] == pytest.approx(local[name], rel=1e-6, abs=1e-7)


# Identity 14, first half.
@every_strategy
def test_the_order_of_the_sites_does_not_change_a_bit(strategy):
    state = strategy.init(first_adapter())
    adapters = local_adapters(strategy, state, 4)
    shares = [0.1, 0.2, 0.3, 0.4]
    results = [
        raw(after_round(strategy, state, [adapters[i] for i in order], [shares[i] for i in order]))
        for order in itertools.permutations(range(4))
    ]
    assert all(result == results[0] for result in results)


@every_strategy
@pytest.mark.parametrize(
    "combined",
    [
        {"l.9.lora_B": np.zeros((5, 2), np.float32)},
        {B: np.zeros((2, 5), np.float32)},
        {B: np.zeros((1, 2), np.float32)},  # would broadcast
        {HEAD: np.zeros((3, 4, 1), np.float32)},
    ],
    ids=["unknown", "transposed", "broadcast", "deeper"],
)
def test_a_combined_update_that_does_not_fit_is_refused(strategy, combined):
    state = strategy.init(first_adapter())
    with pytest.raises(AggregationError, match="update of"):
        strategy.step(state, combined)


@every_strategy
def test_tensors_without_an_update_and_moments_stay(strategy):
    moments = {"m": {B: np.ones(SHAPES[B], np.float32)}}
    state = StrategyState(strategy.init(first_adapter()).x, moments)
    after = strategy.step(state, {B: np.ones(SHAPES[B], np.float32)})
    assert after.moments == moments
    for name in (A, HEAD, BIAS):
        assert after.x[name].tobytes() == state.x[name].tobytes()


def test_add_adds_what_was_updated_and_nothing_else():
    x = {"a": f32([1, 2]), "b": f32([3])}
    found = add(x, {"a": f32([0.5, -4])})
    assert {name: value.tolist() for name, value in found.items()} == {"a": [1.5, -2], "b": [3]}
    assert list(found) == ["a", "b"]


def test_the_facts_are_these():
    common = {"linear": True, "mixed_ranks": False, "sees_individual_updates": False}
    assert FedAvg().facts == Facts(exact=False, **common)
    assert FfaOrtho(seed=1).facts == Facts(exact=True, **common)


def test_the_catalogue_makes_what_the_study_names_with_its_seed():
    assert make_strategy(study("fedavg")) == FedAvg()
    assert make_strategy(study("ffa_ortho", seed=23)) == FfaOrtho(seed=23)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("ffa", "did you mean 'ffa_ortho'"),
        ("FedAvg", "did you mean 'fedavg'"),
        ("zz", "known are fedavg, ffa_ortho"),
    ],
)
def test_an_unknown_strategy_names_the_nearest(name, hint):
    with pytest.raises(ConfigError, match=hint):
        make_strategy(study(name))


def test_shares_are_equal_unless_the_study_weighs_by_public_size():
    sizes = {"north": 700, "south": 200, "east": 100}
    assert site_shares(study(weights="equal", **sizes)) == dict.fromkeys(sizes, 1 / 3)
    found = site_shares(study(weights="public", **sizes))
    assert found == {"north": 0.7, "south": 0.2, "east": 0.1}
    assert list(found) == list(sizes)


@given(st.lists(st.integers(1, 99_999), min_size=1, max_size=50))
def test_shares_sum_to_one(sizes):
    terms = study(weights="public", **{f"s{i}": size for i, size in enumerate(sizes)})
    shares = site_shares(terms)
    assert float(sum(Fraction(share) for share in shares.values())) == pytest.approx(1, abs=1e-14)
