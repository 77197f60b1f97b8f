"""The identities of LoRA aggregation (numbers as in the design's research notes, §1.6)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.strategies.federation import (
    HEIGHT,
    MA,
    MB,
    RANK,
    WIDTH,
    A,
    B,
    after_round,
    f32,
    first_adapter,
    local_adapters,
    made,
    mean_product,
    product,
    run_rounds,
)

from huizhen.protocol.adapter import shapes_of
from huizhen.protocol.errors import AggregationError
from huizhen.strategies import mean
from huizhen.strategies.base import Given, bytes_of
from huizhen.strategies.products import norm, stack, svd
from huizhen.strategies.ranks import at_rank, cut, padded


def drawn(seed, n, height=9, width=12, ranks=None, scalings=None):
    """Return shares and n sites' factors; ranks and scalings may differ from site to site."""
    rng = np.random.default_rng(seed)
    ranks = ranks or [3] * n
    scalings = scalings or [1.0] * n
    shares = rng.dirichlet(np.ones(n))
    terms = [
        (
            float(share * scaling),
            rng.normal(size=(height, rank)).astype(np.float32),
            rng.normal(size=(rank, width)).astype(np.float32),
        )
        for share, rank, scaling in zip(shares, ranks, scalings, strict=True)
    ]
    ideal = sum(w * b.astype(np.float64) @ a.astype(np.float64) for w, b, a in terms)
    return terms, ideal


def tail(matrix, rank):
    """Return the least error of any approximation of a rank (Eckart and Young 1936)."""
    values = np.linalg.svd(matrix, compute_uv=False)
    return float(np.sqrt((values[rank:] ** 2).sum()))


many = st.integers(1, 5).flatmap(
    lambda n: st.tuples(
        st.integers(0, 2**32),
        st.lists(st.integers(1, 4), min_size=n, max_size=n),
        st.lists(st.floats(0.25, 4), min_size=n, max_size=n),
    )
)


# 1.
@pytest.mark.parametrize("n", [2, 3, 5])
def test_fedavg_is_off_by_the_cross_covariance_of_the_factors(n):
    strategy = made("fedavg")
    state = strategy.init(first_adapter())
    shares = [2**-i for i in range(1, n)] + [2.0 ** -(n - 1)]
    adapters = local_adapters(strategy, state, n)
    after = after_round(strategy, state, adapters, shares).x
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


# 2.
@given(many)
def test_stacked_factors_are_the_weighted_sum_of_products(case):
    seed, ranks, scalings = case
    terms, ideal = drawn(seed, len(ranks), ranks=ranks, scalings=scalings)
    left, right = stack(terms)
    assert left.shape[1] == sum(ranks)
    assert np.abs(left @ right - ideal).max() < 1e-12


# 2. and 3.
@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_what_is_merged_round_by_round_is_every_mean_product_together(name):
    """Also after the layer is full and the pair is made anew from its decomposition."""
    strategy, shares = made(name, sites=3), [0.5, 0.25, 0.25]
    state = strategy.init(first_adapter())
    for round in range(1, 5):
        adapters = local_adapters(strategy, state, 3, seed=round, round=round)
        state = after_round(strategy, state, adapters, shares, round)
        gap = np.abs(product(state.x) - mean_product(adapters, shares)).max()
        assert gap < 2e-5
        added = 3 * RANK if name == "flora" else 2 * RANK  # the residual has rank (N − 1)·r
        assert state.x[MB].shape == (HEIGHT, min(round * added, HEIGHT))
        assert state.x[MA].shape == (state.x[MB].shape[1], WIDTH)


def test_fedex_has_the_mean_factors_and_the_residual_apart():
    strategy = made("fedex", sites=2)
    state = strategy.init(first_adapter())
    adapters = local_adapters(strategy, state, 2)
    after = after_round(strategy, state, adapters, [0.5, 0.5]).x
    for name in (A, B):
        mean = (adapters[0][name].astype(np.float64) + adapters[1][name]) / 2
        assert after[name] == pytest.approx(mean, rel=1e-6)
    residual = mean_product(adapters, [0.5, 0.5]) - after[B].astype(np.float64) @ after[A]
    assert after[MB].astype(np.float64) @ after[MA] == pytest.approx(residual, abs=1e-6)
    assert np.abs(residual).max() > 0.01


# 4.
@given(many, st.integers(1, 9))
def test_the_svd_of_stacked_factors_is_that_of_the_dense_product(case, rank):
    seed, ranks, scalings = case
    terms, ideal = drawn(seed, len(ranks), ranks=ranks, scalings=scalings)
    left, right = stack(terms)
    rank = min(rank, left.shape[1])
    vectors, values, rows = svd(left, right, rank)
    dense = np.linalg.svd(ideal, compute_uv=False)
    assert values == pytest.approx(dense[:rank], rel=1e-10, abs=1e-10)
    assert vectors.T @ vectors == pytest.approx(np.eye(rank), abs=1e-10)
    assert rows @ rows.T == pytest.approx(np.eye(rank), abs=1e-10)
    error = float(np.linalg.norm(ideal - vectors * values @ rows))
    assert error == pytest.approx(tail(ideal, rank), abs=1e-9)


@pytest.mark.parametrize("n", [2, 5])
def test_flexlora_is_off_by_the_tail_of_the_singular_values_and_no_more(n):
    strategy, shares = made("svd", sites=n), [1 / n] * n
    state = strategy.init(first_adapter())
    adapters = local_adapters(strategy, state, n)
    ideal = mean_product(adapters, shares)
    found = product(after_round(strategy, state, adapters, shares).x)
    assert np.linalg.norm(ideal - found) == pytest.approx(tail(ideal, RANK), rel=1e-5)
    assert tail(ideal, RANK) > 0.1


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_the_norm_of_a_product_needs_no_product(seed, rank):
    [(_, left, right)], ideal = drawn(seed, 1, ranks=[rank])
    assert norm(left, right) == pytest.approx(float(np.linalg.norm(ideal)), rel=1e-9)
    assert norm(left * 0, right) == 0


# 6.
def test_fedsvd_turns_the_factors_and_leaves_the_product_and_the_row_space():
    strategy = made("fedsvd", sites=3)
    first = strategy.init(first_adapter())
    projector = first.x[A].T.astype(np.float64) @ first.x[A]
    state = first
    for round in range(1, 30):
        adapters = local_adapters(strategy, state, 3, seed=round, round=round)
        state = after_round(strategy, state, adapters, [0.5, 0.25, 0.25], round)
        gap = np.abs(product(state.x) - mean_product(adapters, [0.5, 0.25, 0.25])).max()
        assert gap < 1e-4
        rows = state.x[A].astype(np.float64)
        assert np.abs(rows @ rows.T - np.eye(RANK)).max() < 1e-6
        assert np.abs(rows.T @ rows - projector).max() < 1e-5
        columns = state.x[B].astype(np.float64)
        gram = columns.T @ columns
        assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-4
    assert np.abs(state.x[A] - first.x[A]).max() > 0.1  # it did turn


def test_fedsvd_under_noisy_sgd_walks_the_path_of_ffa_ortho():
    """Gradients of one loss of the product, clipped, with noise in B's entries turned along."""
    rng = np.random.default_rng(8)
    target = rng.normal(size=(HEIGHT, WIDTH))
    x = {**first_adapter(), B: np.zeros((HEIGHT, RANK), np.float32)}
    paths = {}
    for name in ("ffa_ortho", "fedsvd"):
        noise, strategy = np.random.default_rng(9), made(name)
        state = strategy.init(x)
        start = state.x[A].astype(np.float64)
        for round in range(1, 41):
            rows = state.x[A].astype(np.float64)
            gradient = (state.x[B].astype(np.float64) @ rows - target) @ rows.T
            gradient *= min(1.0, 1.0 / np.linalg.norm(gradient))
            turn = rows @ start.T  # of this basis against the first
            gradient += 0.3 * noise.normal(size=gradient.shape) @ turn.T
            update = {B: (-0.2 * gradient).astype(np.float32)}
            state = strategy.step(state, update, round)
        paths[name] = product(state.x)
    assert np.abs(paths["fedsvd"] - paths["ffa_ortho"]).max() < 1e-5
    assert np.linalg.norm(paths["fedsvd"]) > 0.5


# 7.
@settings(max_examples=30)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_nested_ranks_add_up_exactly_where_the_rest_is_zero(seed, ranks):
    """Σ p_i ΔB_i·A[:r_i] = (Σ p_i pad(ΔB_i))·A, which is what the mean of padded updates gives."""
    rng = np.random.default_rng(seed)
    shapes = {A: (4, 7), B: (5, 4)}
    x = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    deltas = [{B: rng.normal(size=(5, rank)).astype(np.float32)} for rank in ranks]
    total, share = mean.start(), 1 / len(ranks)
    ideal = product(x)
    for delta, rank in zip(deltas, ranks, strict=True):
        own = cut(x, at_rank(shapes, rank))
        assert (own[A].shape, own[B].shape) == ((rank, 7), (5, rank))
        before = product(own)
        ideal = ideal + share * (product({**own, B: own[B] + delta[B]}) - before)
        total = mean.add(total, padded(delta, shapes), share)
    strategy = made("ffa")
    after = strategy.step(strategy.init(x), mean.finish(total, 1.0), 1)
    assert product(after.x) == pytest.approx(ideal, abs=1e-5)


@pytest.mark.parametrize("name", ["svd", "flora"])
def test_sites_of_other_ranks_count_with_their_whole_product(name):
    """A site of rank 1 held, trained and sent the first column of B and row of A."""
    strategy = made(name, sites=2)
    state = strategy.init(first_adapter())
    rng = np.random.default_rng(4)

    def update(rank):
        return {
            A: rng.normal(size=(rank, WIDTH)).astype(np.float32),
            B: rng.normal(size=(HEIGHT, rank)).astype(np.float32),
        }

    updates = [update(1), update(2)]
    ideal = np.zeros((HEIGHT, WIDTH))
    for share, one in zip((0.25, 0.75), updates, strict=True):
        rank = one[B].shape[1]
        left = (state.x[B][:, :rank] + one[B]).astype(np.float64)
        ideal += share * left @ (state.x[A][:rank] + one[A])
        # flora begins with B = 0; under svd what a site does not hold stays as it is
        ideal += share * state.x[B][:, rank:].astype(np.float64) @ state.x[A][rank:]
    given = [Given("a", 0.25, updates[0]), Given("b", 0.75, updates[1])]
    found = product(strategy.join(state, given, 1).x)
    least = tail(ideal, RANK) if name == "svd" else 0.0
    assert np.linalg.norm(ideal - found) == pytest.approx(least, rel=1e-5, abs=2e-5)


def test_svd_fills_the_ranks_that_no_site_has_trained():
    strategy = made("svd", sites=1)
    state = strategy.init({**first_adapter(), B: np.zeros((HEIGHT, RANK), np.float32)})
    update = {A: np.ones((1, WIDTH), np.float32), B: np.ones((HEIGHT, 1), np.float32)}
    after = strategy.join(state, [Given("a", 1.0, update)], 1).x
    assert after[A].shape == (RANK, WIDTH)
    rows = after[A].astype(np.float64)
    assert rows @ rows.T == pytest.approx(np.eye(RANK), abs=1e-6)


# 8.
@given(many, st.integers(1, 14))
def test_no_sketch_beats_the_svd_and_one_as_wide_as_the_sum_of_ranks_is_as_good(case, width):
    """FedASK (Guo et al. 2025): Q from Σ p_i B_i(A_iΩ), then Qᵀ Σ p_i B_i A_i, both linear sums."""
    seed, ranks, scalings = case
    terms, ideal = drawn(seed, len(ranks), ranks=ranks, scalings=scalings)
    omega = np.random.default_rng(seed).normal(size=(12, width))
    basis, _ = np.linalg.qr(sum(w * b @ (a @ omega) for w, b, a in terms))
    sketched = basis @ sum((w * (basis.T @ b)) @ a for w, b, a in terms)
    error = float(np.linalg.norm(ideal - sketched))
    vectors, values, rows = svd(*stack(terms), min(basis.shape[1], sum(ranks)))
    best = float(np.linalg.norm(ideal - vectors * values @ rows))
    assert best <= error + 1e-6
    if width >= sum(ranks):
        assert error < 1e-5
        assert best < 1e-9


# 9.
@given(st.integers(0, 2**32), st.integers(2, 5))
def test_lora_fair_without_its_penalty_is_no_nearer_than_flexlora(seed, n):
    """LoRA-FAIR (Bian et al. 2025) keeps Ā and mends B: its rows are those of Ā (λ = 0)."""
    terms, ideal = drawn(seed, n)
    mean_A = sum(w * a.astype(np.float64) for w, _, a in terms)
    mended = ideal @ np.linalg.pinv(mean_A)
    vectors, values, rows = svd(*stack(terms), 3)
    flexlora = np.linalg.norm(ideal - vectors * values @ rows)
    assert flexlora <= np.linalg.norm(ideal - mended @ mean_A) + 1e-9


# 12. RoBERTa-large, q and v of 24 layers, r = 8; the head has 1,051,650 numbers.
LARGE = {
    f"layer.{i}.{kind}.lora_{end}": shape
    for i in range(24)
    for kind in ("query", "value")
    for end, shape in (("A", (8, 1024)), ("B", (1024, 8)))
}


@pytest.mark.parametrize(
    ("name", "up", "down"),
    [
        ("fedavg", 786_432, 786_432),
        ("ffa", 393_216, 393_216),
        ("ffa_ortho", 393_216, 393_216),
        ("fedsvd", 393_216, 786_432),  # the coordinator turns A, the paper's sites do
        ("rolora", 393_216, 786_432),
        ("svd", 786_432, 786_432),
    ],
)
def test_the_numbers_that_travel_are_those_of_the_papers(name, up, down):
    strategy = made(name)
    trained = {n: s for n, s in LARGE.items() if n in strategy.trains(LARGE, 1)}
    assert bytes_of(trained) == 4 * up
    assert bytes_of(strategy.announces(LARGE, 1)) == 4 * down


def test_fed_sb_sends_a_square_of_the_rank_for_each_layer():
    strategy = made("fed_sb")
    x = strategy.init({name: np.zeros(shape, np.float32) for name, shape in LARGE.items()}).x
    shapes = shapes_of(x)
    trained = {n: s for n, s in shapes.items() if n in strategy.trains(shapes, 1)}
    assert bytes_of(trained) == 4 * 3_072
    assert bytes_of(strategy.announces(shapes, 1)) == 4 * 3_072


@pytest.mark.parametrize(("n", "merged"), [(3, 2_359_296), (10, 7_864_320), (50, 39_321_600)])
def test_what_flora_and_fedex_merge_in_one_round_is_the_sites_factors_together(n, merged):
    assert bytes_of(made("flora", sites=n, rank=8).announces(LARGE, 2)) == 4 * merged
    # its residual has rank (N − 1)·r, and the mean factors go down beside it
    assert bytes_of(made("fedex", sites=n, rank=8).announces(LARGE, 2)) == 4 * merged
    # never more than two full matrices for each layer, however many rounds
    most = 48 * 2 * 1024 * 1024
    assert bytes_of(made("flora", sites=n, rank=8).announces(LARGE, 1000)) == 4 * most


# 14, second half.
def test_fedavg_is_exact_where_the_sites_agree_on_a():
    strategy = made("fedavg")
    state = strategy.init(first_adapter())
    common = local_adapters(strategy, state, 1)[0][A]
    adapters = [{**adapter, A: common} for adapter in local_adapters(strategy, state, 4, seed=5)]
    shares = [0.5, 0.25, 0.125, 0.125]
    after = after_round(strategy, state, adapters, shares)
    assert np.abs(product(after.x) - mean_product(adapters, shares)).max() < 1e-6


def test_ffa_ortho_keeps_the_length_of_an_update_in_the_product():
    strategy = made("ffa_ortho")
    state = strategy.init(first_adapter())
    update = np.random.default_rng(3).normal(size=(HEIGHT, RANK)).astype(np.float32)
    after = strategy.step(state, {B: update}, 1)
    moved = product(after.x) - product(state.x)
    assert np.linalg.norm(moved) == pytest.approx(np.linalg.norm(update), rel=1e-6)


def test_fed_sb_keeps_the_length_of_an_update_in_the_product():
    strategy = made("fed_sb")
    states = run_rounds(strategy, strategy.init(first_adapter()), 1, rounds=1)
    moved = product(states[1].x) - product(states[0].x)
    core = states[1].x["l.0.query.lora_R"]
    assert np.linalg.norm(moved) == pytest.approx(np.linalg.norm(core), rel=1e-6)


def test_a_direction_that_a_site_does_not_hold_is_not_worn_away_by_svd():
    strategy = made("svd", sites=2)
    state = first = strategy.init(first_adapter())
    for round in range(1, 6):
        given = [
            Given(site, 0.5, {A: f32(np.zeros((rank, WIDTH))), B: f32(np.zeros((HEIGHT, rank)))})
            for site, rank in (("a", 1), ("b", 2))
        ]
        state = strategy.join(state, given, round)
    assert product(state.x) == pytest.approx(product(first.x), abs=1e-5)


def test_more_ranks_than_were_agreed_are_refused_and_not_cut():
    strategy = made("flora", sites=1)
    x = {A: np.ones((2, 12), np.float32), B: np.zeros((9, 2), np.float32)}
    given = [
        Given(site, 0.5, {A: np.ones((2, 12), np.float32), B: np.ones((9, 2), np.float32)})
        for site in "ab"
    ]
    with pytest.raises(AggregationError, match=r"4 ranks are to be merged .* 2 are agreed"):
        strategy.join(strategy.init(x), given, 1)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_a_full_layer_is_the_product_itself_beside_an_identity(shape):
    height, width = shape
    strategy = made("flora", sites=3)
    state = strategy.init(
        {A: np.ones((2, width), np.float32), B: np.zeros((height, 2), np.float32)}
    )
    for round in (1, 2, 3):
        adapters = local_adapters(strategy, state, 3, seed=round, round=round)
        state = after_round(strategy, state, adapters, [0.5, 0.25, 0.25], round)
        gap = np.abs(product(state.x) - mean_product(adapters, [0.5, 0.25, 0.25])).max()
        assert gap < 2e-5
    factors = state.x[MB], state.x[MA]
    assert any(np.array_equal(one, np.eye(min(shape), dtype=np.float32)) for one in factors)
