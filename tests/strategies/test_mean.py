"""The mean does not know who came first, and is off by no more than its rounding."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from huizhen.protocol.adapter import MAX_VALUE
from huizhen.protocol.errors import AggregationError
from huizhen.strategies import mean


def f32(values):
    return np.array(values, np.float32)


GRID = Fraction(1, 2**36)
SHAPES = {"head.bias": (2,), "l.lora_B": (2, 3)}


def updates_of(bound):
    values = st.floats(-bound, bound, width=32)
    tensors = {name: arrays(np.float32, shape, elements=values) for name, shape in SHAPES.items()}
    return st.fixed_dictionaries(tensors)


def sites(bound=1.0, max_size=6):
    """Return updates, each with a public weight."""
    return st.lists(
        st.tuples(updates_of(bound), st.integers(1, 5000)), min_size=1, max_size=max_size
    )


def shares_of(weighted):
    total = sum(weight for _, weight in weighted)
    return [weight / total for _, weight in weighted]


def summed(updates, shares):
    accumulator = mean.start()
    for update, share in zip(updates, shares, strict=True):
        accumulator = mean.add(accumulator, update, share)
    return accumulator


def mean_of(updates, shares, share=1.0):
    return mean.finish(summed(updates, shares), share)


def raw(tensors):
    return {name: array.tobytes() for name, array in tensors.items()}


def test_the_weighted_mean_by_hand():
    # 1/8 · 8 + 3/8 · (−4) + 1/2 · 0.5 = −0.25, and 1/8 · (−1) + 3/8 · 3 + 1/2 · 2 = 2
    updates = [{"a": f32(pair)} for pair in ([8, -1], [-4, 3], [0.5, 2])]
    found = mean_of(updates, [1 / 8, 3 / 8, 1 / 2])
    assert found["a"].tolist() == [-0.25, 2.0]
    assert found["a"].dtype == np.float32


@given(sites(bound=2.0**20), st.data())
def test_any_order_of_arrival_gives_the_same_bytes(weighted, data):
    shares = shares_of(weighted)
    arrivals = data.draw(st.permutations(range(len(weighted))))
    in_turn = mean_of([update for update, _ in weighted], shares)
    as_they_came = mean_of([weighted[i][0] for i in arrivals], [shares[i] for i in arrivals])
    assert raw(in_turn) == raw(as_they_came)


def exact_sums(accumulator):
    """Return the fixed-point values as Python's integers, which have no bound."""
    found = {}
    for name, total in accumulator.sums.items():
        values = [(int(v) - accumulator.added * mean._MAGIC_BITS) % 2**64 for v in total.ravel()]
        signed = [value - 2**64 if value >= 2**63 else value for value in values]
        found[name] = np.array(signed, object).reshape(total.shape)
    return found


@given(st.one_of(sites(), sites(bound=2.0**-7)))
def test_the_sum_is_the_exact_one_up_to_half_a_grid_step_for_each_site(weighted):
    shares = shares_of(weighted)
    sums = exact_sums(summed([update for update, _ in weighted], shares))
    # The product of a value and its share is itself rounded once, to 53 bits, under 2^36.
    bound = len(weighted) * (GRID / 2) * (1 + Fraction(1, 2**15))
    for name, shape in SHAPES.items():
        for at in np.ndindex(shape):
            exact = sum(
                Fraction(float(update[name][at])) * Fraction(share)
                for (update, _), share in zip(weighted, shares, strict=True)
            )
            assert abs(int(sums[name][at]) * GRID - exact) <= bound


@given(
    st.lists(st.floats(-(2.0**13), 2.0**13, width=32), min_size=1, max_size=8),
    st.integers(1, 40),
    st.sampled_from([1.0, 1 / 3, 2.0**-14]),
)
def test_small_values_are_rounded_alike_beside_a_large_one(values, n, share):
    """A block of small values is summed another way than one that holds a large value."""
    small, beside = f32(values), f32([*values, 2.0**20])
    found = []
    for one in (small, beside):
        total = mean.start()
        for _ in range(n):
            total = mean.add(total, {"a": one}, share)
        found.append(mean.finish(total, 1.0)["a"])
    assert found[1][:-1].tobytes() == found[0].tobytes()
    grid = [round(float(np.float64(v) * (share * 2.0**36))) * n for v in small]
    assert found[0].tolist() == [np.float32(one * 2.0**-36) for one in grid]


@given(sites(bound=2.0**-7), st.integers(0, 5))
def test_the_mean_over_those_present_is_the_fractions_mean(weighted, absent):
    shares = shares_of(weighted)
    present = [i for i in range(len(weighted)) if i != absent] or [0]
    share = sum(shares[i] for i in present)
    found = mean_of([weighted[i][0] for i in present], [shares[i] for i in present], share)
    weights = sum(weighted[i][1] for i in present)
    for name, shape in SHAPES.items():
        for at in np.ndindex(shape):
            exact = sum(Fraction(float(weighted[i][0][name][at])) * weighted[i][1] for i in present)
            exact /= weights
            rounding = Fraction(len(present), 2**37) / Fraction(share)
            error = abs(Fraction(float(found[name][at])) - exact)
            assert error <= rounding * (1 + Fraction(1, 2**10)) + abs(exact) / 2**24


# From 2^-13 on a float32 lies on the grid of 2^-36, so one site's mean is its update, bit by bit.
@given(arrays(np.float32, 5, elements=st.floats(2.0**-13, 2.0**20, width=32)))
def test_the_mean_of_one_site_is_its_update(update):
    update[::2] *= -1
    assert raw(mean_of([{"a": update}], [1.0])) == {"a": update.tobytes()}


@given(updates_of(1.0), st.lists(st.integers(1, 5000), min_size=1, max_size=50))
def test_identical_updates_have_themselves_as_mean(update, weights):
    weighted = [(update, weight) for weight in weights]
    found = mean_of([update] * len(weights), shares_of(weighted))
    for name in SHAPES:
        off = np.abs(found[name].astype(np.float64) - update[name])
        assert (off <= len(weights) * 2.0**-36 + np.abs(update[name]) * 2.0**-24).all()


def test_values_under_half_the_grid_become_zero_and_over_it_one_step():
    update = {"a": f32([0.49 * 2**-36, 0.51 * 2**-36, -0.51 * 2**-36])}
    assert mean_of([update], [1.0])["a"].tolist() == [0, 2.0**-36, -(2.0**-36)]


def test_many_sites_at_the_largest_value_do_not_overflow():
    n = 1000
    largest = {"a": f32([MAX_VALUE, -MAX_VALUE])}
    found = mean_of([largest] * n, [1 / n] * n)
    assert found["a"].tolist() == [2.0**20, -(2.0**20)]


beyond = float(np.nextafter(np.float32(2**20), np.float32(np.inf)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, beyond, -beyond, 3e38])
def test_a_value_that_is_not_finite_or_too_large_does_not_fit(value):
    assert not mean.fits({"a": f32([0, 1]), "b": f32([[0.5, value]])})
    assert mean.fits({"a": f32([0, 1]), "b": f32([[0.5, 2**20]])})


@pytest.mark.parametrize("share", [0.0, -0.25, 1.0000001, np.nan, np.inf])
def test_a_share_outside_zero_to_one_is_refused(share):
    with pytest.raises(AggregationError, match="share is"):
        mean.add(mean.start(), {"a": f32([1])}, share)


@pytest.mark.parametrize(
    "shapes",
    [
        {"a": (2, 3)},
        {"a": (2, 3), "c": (1,)},
        {"a": (2, 3), "b": (1,), "c": (1,)},
        {"a": (1, 3), "b": (1,)},
        {"a": (2, 3), "b": ()},
        {"a": (3, 2), "b": (1,)},
    ],
    ids=["missing", "renamed", "extra", "broadcast", "scalar", "transposed"],
)
def test_an_update_with_other_tensors_than_the_sum_is_refused(shapes):
    update = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    first = {"a": np.ones((2, 3), np.float32), "b": np.ones(1, np.float32)}
    with pytest.raises(AggregationError, match="other tensors than the sum"):
        mean.add(mean.add(mean.start(), first, 0.5), update, 0.5)


def test_a_round_without_updates_has_no_mean():
    with pytest.raises(AggregationError, match="no update was counted"):
        mean.finish(mean.start(), 1.0)
