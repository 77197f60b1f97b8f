"""Rules that bear liars: by hand, against slow scalar twins, and what they promise."""

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.strategies.federation import f32

from huizhen.protocol.errors import AggregationError
from huizhen.strategies.base import Given
from huizhen.strategies.robust import (
    centred_clipping,
    geometric_median,
    median,
    multi_krum,
    rule_of,
    trimmed_mean,
)

RULES = {
    "median": median,
    "trimmed_mean": lambda given: trimmed_mean(given, 1),
    "geometric_median": geometric_median,
    "multi_krum": lambda given: multi_krum(given, 1),
    "centred_clipping": lambda given: centred_clipping(given, 1.0),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
DISTANCES = {"geometric_median", "multi_krum", "centred_clipping"}


def updates(rows, shares=None):
    """Return sites' updates of two tensors whose values together are a row."""
    shares = shares or [1 / len(rows)] * len(rows)
    return [
        Given(f"s{i}", share, {"a": f32(row[:1]), "b.lora_B": f32([row[1:]])})
        for i, (row, share) in enumerate(zip(rows, shares, strict=True))
    ]


def row_of(tensors):
    assert list(tensors) == ["a", "b.lora_B"]
    assert tensors["b.lora_B"].ndim == 2
    assert {value.dtype for value in tensors.values()} == {np.dtype(np.float32)}
    return [*tensors["a"].tolist(), *tensors["b.lora_B"][0].tolist()]


def distance(one, other):
    return math.dist(one, other)


def centre_of(rows, weights):
    return [
        math.fsum(weight * row[i] for weight, row in zip(weights, rows, strict=True))
        for i in range(len(rows[0]))
    ]


def slow_geometric_median(rows, shares):
    least = 1e-6 * max(1e-9, *(distance(one, other) for one in rows for other in rows))
    centre = centre_of(rows, shares)
    for _ in range(500):
        pulls = [
            share / max(least, distance(row, centre))
            for row, share in zip(rows, shares, strict=True)
        ]
        centre = centre_of(rows, [pull / math.fsum(pulls) for pull in pulls])
    return centre


def slow_multi_krum(rows, f):
    n, scores = len(rows), []
    for i, row in enumerate(rows):
        others = sorted(distance(row, other) ** 2 for j, other in enumerate(rows) if j != i)
        scores.append((math.fsum(others[: n - f - 2]), i))
    chosen = [rows[i] for _, i in sorted(scores)[: n - f]]
    return centre_of(chosen, [1 / len(chosen)] * len(chosen))


values = st.floats(-100, 100, width=32)
rows_of = st.integers(5, 9).flatmap(
    lambda n: st.lists(st.tuples(values, values, values), min_size=n, max_size=n)
)


def test_the_rules_by_hand():
    rows = [[0, 0], [1, 1], [2, 2], [3, 3], [1000, -1000]]
    assert row_of(median(updates(rows))) == [2, 1]
    assert row_of(median(updates(rows[:4]))) == [1.5, 1.5]
    # the first coordinate without 0 and 1000, the second without -1000 and 3
    assert row_of(trimmed_mean(updates(rows), 1)) == [2, 1]
    # two nearest: 0 has 2 + 8, 1 has 2 + 2, 2 has 2 + 2, 3 has 2 + 8: all but the liar's
    assert row_of(multi_krum(updates(rows), 1)) == [1.5, 1.5]
    # of three points on a line, the middle one
    found = row_of(geometric_median(updates([[0, 0], [1, 0], [100, 0]])))
    assert found == pytest.approx([1, 0], abs=1e-3)
    # from (1, 0): the liar pulls by 1 of 1/3 weight, the first by all of 1; they balance
    found = row_of(centred_clipping(updates([[0, 0], [1, 0], [100, 0]]), 1.0))
    assert found == pytest.approx([1, 0], abs=1e-3)


@given(rows_of)
def test_median_and_trimmed_mean_follow_the_scalar_ones(rows):
    given = updates(rows)
    expected = [statistics.median(column) for column in zip(*rows, strict=True)]
    assert row_of(median(given)) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    for f in (1, 2):
        expected = [
            statistics.fmean(sorted(column)[f : len(rows) - f])
            for column in zip(*rows, strict=True)
        ]
        assert row_of(trimmed_mean(given, f)) == pytest.approx(expected, rel=1e-6, abs=1e-4)


@settings(max_examples=50)
@given(rows_of, st.data())
def test_the_geometric_median_has_the_least_sum_of_distances(rows, data):
    n = len(rows)
    weights = data.draw(st.lists(st.integers(1, 5), min_size=n, max_size=n))
    shares = [weight / sum(weights) for weight in weights]

    def total(point):
        return math.fsum(s * distance(point, row) for s, row in zip(shares, rows, strict=True))

    found, slow = (
        row_of(geometric_median(updates(rows, shares))),
        slow_geometric_median(rows, shares),
    )
    assert total(found) <= total(slow) * (1 + 1e-4) + 1e-4
    for i, by in itertools.product(range(3), (-0.5, 0.5)):  # it is convex: no step is downhill
        moved = [value + by * (j == i) for j, value in enumerate(found)]
        assert total(found) <= total(moved) + 1e-3 * (1 + total(moved))


@given(rows_of.filter(lambda rows: len({tuple(row) for row in rows}) == len(rows)))
def test_multi_krum_follows_the_scalar_one(rows):
    n = len(rows)
    near = []
    for f in range(1, (n - 3) // 2 + 1):
        scores = sorted(
            math.fsum(sorted(distance(row, o) ** 2 for o in rows if o is not row)[: n - f - 2])
            for row in rows
        )
        near.append(scores[n - f] - scores[n - f - 1] > 1e-6 * (1 + scores[-1]))
        if near[-1]:  # no tie at the edge, which rounding would decide
            found = row_of(multi_krum(updates(rows), f))
            assert found == pytest.approx(slow_multi_krum(rows, f), rel=1e-5, abs=1e-4)


@given(rows_of, st.floats(0.1, 50))
def test_centred_clipping_is_a_fixed_point_of_its_step_far_from_liars(rows, radius):
    given = updates(rows)
    found = row_of(centred_clipping(given, radius))
    centre = row_of(geometric_median(given))
    for _ in range(10):
        away = [[r - c for r, c in zip(row, centre, strict=True)] for row in rows]
        scales = [min(1.0, radius / max(math.hypot(*one), 1e-300)) / len(rows) for one in away]
        moved = centre_of(away, scales)
        centre = [c + m for c, m in zip(centre, moved, strict=True)]
    assert found == pytest.approx(centre, rel=1e-4, abs=1e-3)


@every_rule
def test_who_came_first_changes_no_bit(rule):
    rng = np.random.default_rng(3)
    given = updates(rng.normal(size=(5, 4)))
    whole = [
        {name: value.tobytes() for name, value in rule(list(order)).items()}
        for order in itertools.permutations(given)
    ]
    assert all(one == whole[0] for one in whole)


@every_rule
@given(st.tuples(values, values, values), st.integers(5, 9))
def test_equal_updates_are_given_back_to_the_bit(rule, row, n):
    given = updates([row] * n)
    found = rule(given)
    assert row_of(centred_clipping(given, 1e6)) == row_of(found)
    for name, value in given[0].update.items():
        assert found[name].tobytes() == (value + 0).tobytes()  # -0 is 0


@every_rule
@pytest.mark.parametrize("attack", [1e3, 1e6, -1e6, 1e9, 1e12])
def test_one_liar_of_six_moves_nothing_far(rule, attack):
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(6, 30))
    honest = rows[:5].mean(axis=0)
    rows[5] = attack * rng.normal(size=30)
    away = float(np.linalg.norm(np.array(row_of(rule(updates(rows)))) - honest))
    spread = float(np.linalg.norm(rows[:5] - honest, axis=1).max())
    assert away < spread
    mean = np.mean(rows, axis=0)
    assert np.linalg.norm(mean - honest) > 100 * spread  # what it would have been


@every_rule
def test_more_numbers_than_a_block_and_scalars_are_taken(rule):
    rng = np.random.default_rng(1)
    shape = (3, 50_000)
    given = [
        Given(f"s{i}", 0.2, {"big": rng.normal(size=shape).astype(np.float32), "one": f32(i)})
        for i in range(5)
    ]
    found = rule(given)
    assert found["big"].shape == shape
    assert found["one"].shape == ()
    assert np.isfinite(found["big"]).all()
    assert np.abs(found["big"]).min() < np.abs(found["big"]).max()
    halves = [
        Given(g.site, g.share, {"big": g.update["big"][:, ::2], "one": g.update["one"]})
        for g in given
    ]  # not contiguous
    assert rule(halves)["big"].shape == (3, 25_000)


@every_rule
def test_what_cannot_be_combined_is_refused(rule):
    given = updates(np.ones((5, 3)))
    with pytest.raises(AggregationError, match=r"no update|updates, "):
        rule([])
    other = Given("t", 0.1, {"a": f32([1])})
    with pytest.raises(AggregationError, match="update of site 't' has other tensors"):
        rule([*given[:4], other])
    for value in (np.nan, np.inf):
        bad = Given("t", 0.1, {**given[0].update, "a": f32([value])})
        with pytest.raises(AggregationError, match="'a' holds a value that is not finite"):
            rule([*given[:4], bad])


def test_too_few_updates_are_refused():
    rows = np.zeros((4, 3))
    with pytest.raises(AggregationError, match=r"4 updates, multi-Krum against 1 needs 5"):
        multi_krum(updates(rows), 1)
    with pytest.raises(AggregationError, match=r"4 updates, 2 trimmed at either end needs 5"):
        trimmed_mean(updates(rows), 2)


def test_a_study_names_each_rule():
    given = updates(np.random.default_rng(2).normal(size=(5, 3)))
    for name, rule in RULES.items():
        assert row_of(rule_of(name, 1, 1.0)(given)) == row_of(rule(given))
    with pytest.raises(KeyError):
        rule_of("krum", 1, 1.0)
