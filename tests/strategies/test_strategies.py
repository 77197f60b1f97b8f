"""What every strategy promises, whichever a study names."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.strategies.federation import (
    BIAS,
    HEAD,
    MB,
    SHAPES,
    A,
    B,
    after_round,
    f32,
    first_adapter,
    loadable,
    local_adapters,
    made,
    mean_product,
    product,
    raw,
    run_rounds,
    study,
)

from huizhen.protocol.errors import AggregationError, ConfigError
from huizhen.protocol.strategy_terms import (
    MIXED_RANKS,
    PARAMETERS,
    SEE_EACH_UPDATE,
    WITHOUT_LORA,
)
from huizhen.strategies.base import Averaging, Facts, Stacking, StrategyState, add
from huizhen.strategies.catalogue import make_strategy, site_shares
from huizhen.strategies.ffa_refresh import FfaRefresh
from huizhen.strategies.public_random import orthonormal_rows
from huizhen.strategies.stored import decode_state, encode_state

EXACT = {"ffa", "ffa_ortho", "ffa_refresh", "rolora", "flora", "fedex", "fedsvd", "fed_sb"}
# The mean update is x's next step as it is: what these make of it, no site sent.
OWN_STEP = {"fedavgm", "fedadam", "fedyogi", "fedadagrad"}
every_strategy = pytest.mark.parametrize("name", PARAMETERS)
averaging = pytest.mark.parametrize("name", sorted(PARAMETERS.keys() - SEE_EACH_UPDATE))
# What a site trains is its own in part: the alliance has no one product.
PERSONAL = {"fedsa"}
plain = pytest.mark.parametrize("name", sorted(PARAMETERS.keys() - OWN_STEP - PERSONAL))


@every_strategy
def test_the_facts_are_these(name):
    assert make_strategy(study(name)).facts == Facts(
        linear=name not in SEE_EACH_UPDATE,
        exact=name in EXACT,
        mixed_ranks=name in MIXED_RANKS,
        sees_individual_updates=name in SEE_EACH_UPDATE,
    )
    kind = Stacking if name in SEE_EACH_UPDATE else Averaging
    assert isinstance(make_strategy(study(name)), kind)


def test_what_needs_no_lora_names_no_factor():
    for name in WITHOUT_LORA:
        strategy, shapes = make_strategy(study(name)), {HEAD: (3, 4), BIAS: (3,)}
        assert isinstance(strategy, Averaging)
        state = strategy.init({key: f32(np.ones(shape)) for key, shape in shapes.items()})
        assert strategy.trains(shapes, 1) == frozenset(shapes)
        told = {n: s for n, s in strategy.announces(shapes, 3).items() if "control" not in n}
        assert told == shapes
        assert strategy.step(state, {BIAS: f32([1, 2, 3])}, 1).x[HEAD].tolist() == [[1] * 4] * 3


# algorithms.md §1.6, identity 5, and the facts: exact if and only if the products agree.
@plain
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), weights=st.lists(st.integers(1, 900), min_size=2, max_size=6))
def test_a_strategy_is_exact_if_and_only_if_its_facts_say_so(name, seed, weights):
    strategy = made(name, sites=len(weights))
    shares = [weight / sum(weights) for weight in weights]
    state = strategy.init(first_adapter())
    for round in (1, 2, 3):
        adapters = local_adapters(strategy, state, len(weights), seed, round=round)
        after = after_round(strategy, state, adapters, shares, round)
        gap = np.abs(product(after.x) - mean_product(adapters, shares)).max()
        if name in EXACT:
            assert gap < 2e-5
        else:  # the least share is 1/4501, so the difference is small but not rounding
            assert gap > 1e-5
        state = after


# Identity 13.
@plain
def test_one_site_alone_gets_its_own_model(name):
    strategy = made(name, sites=1)
    state = strategy.init(first_adapter())
    for round in (1, 2, 3, 4):
        [adapter] = local_adapters(strategy, state, 1, round=round)
        state = after_round(strategy, state, [adapter], [1.0], round)
        assert product(state.x) == pytest.approx(product(adapter), rel=1e-5, abs=1e-5)
        for tensor in (HEAD, BIAS):
            assert state.x[tensor] == pytest.approx(adapter[tensor], rel=1e-6, abs=1e-7)


@plain
@pytest.mark.parametrize("n", [2, 3, 7])
def test_identical_sites_get_their_own_model(name, n):
    strategy = made(name, sites=n)
    state = strategy.init(first_adapter())
    for round in (1, 2, 3):
        local = local_adapters(strategy, state, 1, round=round)[0]
        state = after_round(strategy, state, [local] * n, [1 / n] * n, round)
        assert product(state.x) == pytest.approx(product(local), rel=1e-5, abs=1e-5)
        for tensor in (HEAD, BIAS):
            assert state.x[tensor] == pytest.approx(local[tensor], rel=1e-6, abs=1e-6)


# Identity 14, first half.
@every_strategy
@pytest.mark.parametrize("is_identical", [False, True])
def test_the_order_of_arrival_does_not_change_a_bit(name, is_identical):
    strategy = made(name, sites=4)
    state = strategy.init(first_adapter())
    adapters = local_adapters(strategy, state, 4)
    shares = [0.1, 0.2, 0.3, 0.4]
    if is_identical:
        adapters, shares = [adapters[0]] * 4, [0.25] * 4
    results = [
        raw(after_round(strategy, state, adapters, shares, 1, order=order))
        for order in itertools.permutations(range(4))
    ]
    assert all(result == results[0] for result in results)


@every_strategy
def test_a_site_makes_the_same_model_from_what_is_announced(name):
    """To the bit, in every round and after the last, from the study and that round's bytes."""
    strategy = made(name, sites=3)
    first = strategy.init(first_adapter())
    shapes = {key: value.shape for key, value in first.x.items()}
    states = run_rounds(strategy, first, 3, rounds=7)
    assert len(states) == 8
    for round, state in enumerate(states, start=1):
        announced = strategy.announced(state, shapes, round)
        agreed = strategy.announces(shapes, round)
        assert {key: value.shape for key, value in announced.items()} == agreed
        assert strategy.trains(shapes, round) <= set(shapes)
        whole = strategy.whole(first.x, announced, round)
        assert loadable(whole) == loadable(state.x)


@every_strategy
def test_a_state_that_was_kept_and_read_goes_on_to_the_same_bytes(name):
    strategy = made(name, sites=3)
    first = strategy.init(first_adapter())
    straight = run_rounds(strategy, first, 3, rounds=5)
    kept = [encode_state(state) for state in straight]
    for round in (2, 4):
        state = decode_state(kept[round - 1])
        again = run_rounds(strategy, state, 3, rounds=5, begin=round)
        assert [encode_state(one) for one in again] == kept[round - 1 :]


@averaging
@pytest.mark.parametrize(
    "combined",
    [
        {"l.9.lora_B": np.zeros((5, 2), np.float32)},
        {HEAD: np.zeros((4, 3), np.float32)},
        {HEAD: np.zeros((1, 4), np.float32)},  # would broadcast
        {HEAD: np.zeros((3, 4, 1), np.float32)},
    ],
    ids=["unknown", "transposed", "broadcast", "deeper"],
)
def test_a_combined_update_that_does_not_fit_is_refused(name, combined):
    strategy = made(name)
    with pytest.raises(AggregationError, match=r"update (of|holds)"):
        strategy.step(strategy.init(first_adapter()), combined, 1)


@pytest.mark.parametrize("name", sorted(PARAMETERS.keys() - SEE_EACH_UPDATE - PERSONAL))
def test_tensors_without_an_update_stay(name):
    strategy = made(name)
    state = strategy.init(first_adapter())
    after = strategy.step(state, {HEAD: np.ones(SHAPES[HEAD], np.float32)}, 1)
    assert after.x[BIAS].tobytes() == state.x[BIAS].tobytes()
    assert after.x[HEAD].tobytes() != state.x[HEAD].tobytes()
    # an SVD may turn the factors, never the product
    assert product(after.x) == pytest.approx(product(state.x), rel=1e-5, abs=1e-6)


def test_add_adds_what_was_updated_and_nothing_else():
    x = {"a": f32([1, 2]), "b": f32([3])}
    found = add(x, {"a": f32([0.5, -4])})
    assert {name: value.tolist() for name, value in found.items()} == {"a": [1.5, -2], "b": [3]}
    assert list(found) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("ffa_othro", "did you mean 'ffa_ortho'"),
        ("FedAvg", "did you mean 'fedavg'"),
        ("krum", "known are fedavg, fedprox"),
        ("zz", "known are fedavg, fedprox"),
    ],
)
def test_an_unknown_strategy_names_the_nearest(name, hint):
    with pytest.raises(ConfigError, match=hint):
        study(name)


def test_shares_are_equal_unless_the_study_weighs_by_public_size():
    sizes = {"north": 700, "south": 200, "east": 100}
    assert site_shares(study(weights="equal", sizes=sizes)) == dict.fromkeys(sizes, 1 / 3)
    found = site_shares(study(weights="public", sizes=sizes))
    assert found == {"north": 0.7, "south": 0.2, "east": 0.1}
    assert list(found) == list(sizes)
    squares = {"north": 49 / 54, "south": 4 / 54, "east": 1 / 54}
    found = site_shares(study(weights="inverse_variance", unit="patient", sizes=sizes))
    assert found == pytest.approx(squares)


@given(st.lists(st.integers(1000, 99_999), min_size=1, max_size=50))
def test_shares_sum_to_one(sizes):
    terms = study(weights="public", sizes={f"s{i}": size for i, size in enumerate(sizes)})
    shares = site_shares(terms)
    assert float(sum(Fraction(share) for share in shares.values())) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("name", ["ffa_ortho", "ffa_refresh", "fedsvd", "fed_sb"])
def test_a_rank_over_the_width_is_the_operators_error(name):
    x = {A: np.zeros((4, 3), np.float32), B: np.zeros((5, 4), np.float32)}
    with pytest.raises(ConfigError, match=r"\[adapter\] rank is 4, .* lower rank"):
        made(name).init(x)


@pytest.mark.parametrize("name", ["svd", "fedsvd"])
def test_a_rank_over_the_height_is_refused_too(name):
    x = {A: np.zeros((4, 9), np.float32), B: np.zeros((3, 4), np.float32)}
    with pytest.raises(ConfigError, match=r"rank is 4, layer 'l\.0\.query' is 3 x 9"):
        made(name).init(x)


@pytest.mark.parametrize("name", ["ffa", "ffa_ortho", "ffa_refresh", "fedsvd", "rolora", "fed_sb"])
def test_an_update_of_a_frozen_factor_is_refused(name):
    strategy = made(name)
    state = strategy.init(first_adapter())
    with pytest.raises(AggregationError, match="update holds"):
        strategy.step(state, {A: np.zeros(SHAPES[A], np.float32)}, 1)


@pytest.mark.parametrize("name", sorted(SEE_EACH_UPDATE))
@pytest.mark.parametrize("fault", ["no factor", "transposed", "rank", "head"])
def test_a_sites_update_that_does_not_fit_is_refused_by_its_name(name, fault):
    strategy = made(name, sites=2)
    state = strategy.init(first_adapter())
    adapters = local_adapters(strategy, state, 2)
    bad = dict(adapters[1])
    if fault == "no factor":
        del bad[A]
    elif fault == "transposed":
        bad[B] = np.ascontiguousarray(bad[B].T)
    elif fault == "rank":
        bad[A] = bad[A][:1]
    else:
        bad[HEAD] = bad[HEAD][:1]
    with pytest.raises(AggregationError, match="update of site 's1'"):
        after_round(strategy, state, [adapters[0], bad], [0.5, 0.5], 1, is_absolute=False)
    with pytest.raises(AggregationError, match="no update was counted"):
        strategy.join(state, [], 1)


def test_ffa_ortho_starts_from_orthonormal_rows_whatever_the_adapter_was():
    strategy = made("ffa_ortho")
    states = [strategy.init(first_adapter(seed)) for seed in (1, 2)]
    assert states[0].x[A].tobytes() == states[1].x[A].tobytes()
    assert states[0].x[A].tobytes() == orthonormal_rows(11, A, SHAPES[A]).tobytes()
    assert states[0].x[B].tobytes() == first_adapter(1)[B].tobytes()
    other = make_strategy(study("ffa_ortho", seed=12)).init(first_adapter(1))
    assert other.x[A].tobytes() != states[0].x[A].tobytes()
    assert made("ffa").init(first_adapter(1)).x[A].tobytes() == first_adapter(1)[A].tobytes()


@pytest.mark.parametrize("name", ["ffa", "ffa_ortho", "fed_sb"])
def test_what_is_frozen_never_changes(name):
    strategy = made(name, sites=3)
    first = strategy.init(first_adapter())
    frozen = [A, B] if name == "fed_sb" else [A]
    for state in run_rounds(strategy, first, 3, rounds=5):
        for tensor in frozen:
            assert state.x[tensor].tobytes() == first.x[tensor].tobytes()


def test_ffa_refresh_merges_on_time_and_draws_other_rows():
    strategy = made("ffa_refresh")
    states = run_rounds(strategy, strategy.init(first_adapter()), 3, rounds=7)
    merged = [state.x[MB].shape[1] if MB in state.x else 0 for state in states]
    assert merged == [0, 0, 2, 2, 4, 4, 6, 6]  # every = 2, rank 2
    rows = [state.x[A].tobytes() for state in states]
    assert rows[0] == rows[1] != rows[2] == rows[3] != rows[4]
    assert len(set(rows)) == 4
    assert not states[2].x[B].any()
    span = np.vstack([states[0].x[A], states[2].x[A], states[4].x[A]])
    assert np.linalg.matrix_rank(span) == 6


def test_rolora_takes_turns_after_its_warm_rounds():
    trained = [made("rolora").trains(SHAPES, round) for round in (1, 2, 3, 4)]
    assert trained == [{B, HEAD, BIAS}, {A, HEAD, BIAS}] * 2
    warm = make_strategy(study("rolora", warm_rounds=2))
    trained = [warm.trains(SHAPES, round) for round in (1, 2, 3, 4, 5)]
    assert trained == [{B, HEAD, BIAS}] * 3 + [{A, HEAD, BIAS}, {B, HEAD, BIAS}]


def test_moments_that_nothing_uses_stay():
    moments = {"m": {B: np.ones(SHAPES[B], np.float32)}}
    for name in ("fedavg", "ffa_ortho", "svd"):
        strategy = made(name, sites=1)
        state = StrategyState(strategy.init(first_adapter()).x, moments)
        adapters = local_adapters(strategy, state, 1)
        assert after_round(strategy, state, adapters, [1.0], 1).moments == moments


def test_a_refresh_that_would_merge_more_ranks_than_a_layer_has_is_refused():
    """2 ranks at a time into a layer of 5 x 7: two merges fit, three do not."""
    FfaRefresh(seed=1, every=1, rounds=2).init(first_adapter())
    with pytest.raises(ConfigError, match=r"3 rounds would merge 6 ranks into layer .*5 x 7"):
        FfaRefresh(seed=1, every=1, rounds=3).init(first_adapter())
