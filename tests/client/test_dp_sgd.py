"""One private step against the formula, a scalar loop and the definition of sensitivity.

A patient moves the sum by at most C, with no tolerance for rounding: the noise is calibrated to C
and to nothing above it. Statistical bounds hold with a false-alarm rate of 1e-9.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binom, chi2, norm

from huizhen.client.dp_sgd import PatientBatch, clip_factors, clipped_sum, private_gradient
from huizhen.client.randomness import NoiseSource
from huizhen.protocol.errors import PrivacyError

FALSE_ALARM = 1e-9
SHAPES = {"a": (2, 3), "b": (1,), "c": (4,)}


class Given:
    """Patients whose gradients are given, in microbatches of ``size``; it notes who was chosen."""

    def __init__(self, gradients, size=10**9):
        self.gradients = {name: torch.as_tensor(value) for name, value in gradients.items()}
        self.size = size
        self.asked: list[list[int]] = []

    @property
    def num_patients(self):
        return len(next(iter(self.gradients.values())))

    def microbatches(self, chosen):
        self.asked.append(chosen.tolist())
        for begin in range(0, len(chosen), self.size):
            own = torch.from_numpy(chosen[begin : begin + self.size])
            gradients = {name: value[own] for name, value in self.gradients.items()}
            yield PatientBatch(gradients, own.double().tolist())


class Fixed(NoiseSource):
    """Normals that a test knows."""

    def __init__(self, normals):
        self.normals, self.draws = normals, 0

    def draw(self):
        self.draws += 1
        return self.normals.copy()


def shapes_of(source):
    return {name: tuple(value.shape[1:]) for name, value in source.gradients.items()}


def numbers(source):
    return sum(math.prod(shape) for shape in shapes_of(source).values())


def step(source, *, noise=None, **terms):
    """Run one step in which every patient is sampled, unless a test says otherwise."""
    settings = {
        "sampling_rate": 1.0,
        "max_grad_norm": 1.0,
        "noise_multiplier": 1.0,
        "denominator": 1.0,
        **terms,
    }
    if noise is not None:
        return private_gradient(source, shapes_of(source), noise=noise, **settings)
    with NoiseSource(numbers(source), 1) as fresh:
        return private_gradient(source, shapes_of(source), noise=fresh, **settings)


def flat(tensors):
    return np.concatenate([tensors[name].double().numpy().ravel() for name in tensors])


def summed(source, clipping, chosen=None):
    chosen = np.arange(source.num_patients) if chosen is None else np.asarray(chosen, np.intp)
    return flat(clipped_sum(source, chosen, shapes_of(source), clipping)[0])


def randoms(patients, seed=3, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(patients, *shape, generator=generator)
        for name, shape in SHAPES.items()
    }


def nobody(numbers=10):
    return Given({"a": torch.zeros(0, numbers)})


# Sizes from far below to far above C; a square of a float32 must stay finite, or it is refused.
extreme = st.floats(-(2.0**57), 2.0**57, width=32) | st.floats(-2, 2, width=32)
patients = st.integers(0, 6).flatmap(lambda n: arrays(np.float32, (n, 11), elements=extreme))
clippings = st.sampled_from([0.37, 1.0, 25.0, "auto"])


def as_tensors(rows):
    return {"a": rows[:, :6].reshape(-1, 2, 3), "b": rows[:, 6:7], "c": rows[:, 7:]}


@given(patients, clippings, st.integers(1, 7))
def test_the_sum_is_that_of_a_scalar_loop(rows, clipping, size):
    expected = np.zeros(11)
    for row in rows.astype(np.float64):
        length = math.sqrt(sum(x * x for x in row))
        if clipping == "auto":
            expected += 0.999 * row / (length + 0.01)
        else:
            expected += row * min(1, 0.999 * clipping / max(length, 1e-300))
    found = summed(Given(as_tensors(rows), size), clipping)
    bound = 1.0 if clipping == "auto" else clipping
    assert np.abs(found - expected).max() <= 3e-6 * bound  # of float32 norms and factors


@settings(max_examples=300)
@given(patients, arrays(np.float32, 11, elements=extreme), clippings, st.data())
def test_one_patient_more_moves_the_sum_by_at_most_c(rows, new, clipping, data):
    """The others may fall into other microbatches when one joins."""
    place = data.draw(st.integers(0, len(rows)))
    sizes = [data.draw(st.integers(1, 7)) for _ in range(2)]
    joined = np.insert(rows, place, new, axis=0)
    with_new = summed(Given(as_tensors(joined), sizes[0]), clipping)
    without = summed(Given(as_tensors(rows), sizes[1]), clipping)
    bound = 1.0 if clipping == "auto" else clipping
    assert np.linalg.norm(with_new - without) <= bound


def test_rounding_of_thousands_of_patients_does_not_add_up():
    """In float32 the sum crosses 2048, where its steps double, only if the first patient is there:
    the many small ones then round to nothing instead of up, and the sum moves by 1.25 C."""
    rows = torch.zeros(1 + 2050 + 2048, 1)
    rows[:2051] = 0.999 * 0.9999
    rows[2051:] = -1.06 * 2.0**-14
    source = Given({"a": rows})
    moved = summed(source, 1.0) - summed(source, 1.0, range(1, len(rows)))
    assert 0.99 < moved[0] <= 1.0


@pytest.mark.parametrize("value", [1 / 3, 0.7, 1e-3])
@pytest.mark.parametrize("clipping", [0.5, "auto"])
def test_ten_million_numbers_are_clipped_to_c(value, clipping):
    """Summed one after the other, the squares of a float32 tensor lose up to a hundredth."""
    rows = torch.full((1, 10_000_000), value)
    factor = clip_factors({"a": rows}, clipping)
    bound = 1.0 if clipping == "auto" else clipping
    length = abs(float(factor[0])) * float(rows[0, 0]) * math.sqrt(rows.numel())
    assert 0.99 * bound < length <= bound


@pytest.mark.parametrize("clipping", [1.0, "auto"])
def test_a_zero_gradient_stays_zero(clipping):
    factors = clip_factors({"a": torch.zeros(2, 3)}, clipping)
    assert torch.isfinite(factors).all()
    assert not summed(Given({"a": torch.zeros(2, 3)}), clipping).any()


def test_a_gradient_below_c_is_left_as_it_is():
    small = {"a": torch.tensor([[0.3, -0.4]])}
    assert summed(Given(small), 0.501).tolist() == small["a"][0].double().tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("clipping", [1.0, "auto"])
def test_a_patient_whose_gradient_has_no_finite_norm_adds_nothing(value, clipping):
    """An error would tell that the patient is there; 1e30 is finite and its square is not."""
    gradients = {"a": torch.rand(2, 3), "b": torch.rand(2, 4)}
    without = summed(Given({name: grad[:1] for name, grad in gradients.items()}), clipping)
    gradients["b"][1, 2] = value
    assert summed(Given(gradients), clipping).tolist() == without.tolist()


@pytest.mark.parametrize(("clipping", "c"), [(0.7, 0.7), ("auto", 1.0)])
@pytest.mark.parametrize("patients", [0, 1, 5])
def test_a_step_is_the_formula(clipping, c, patients):
    """g̃ = (Σ clip(g) + σC z) / B̄ on a grid, in the order of the tensors, for a known z."""
    source = Given(randoms(patients))
    z = np.random.default_rng(8).standard_normal(11)
    found, _ = step(
        source, noise=Fixed(z), noise_multiplier=1.7, max_grad_norm=clipping, denominator=6.4
    )
    grid = 2.0 ** (math.floor(math.log2(1.7 * c)) - 20)
    whole = np.round((summed(source, clipping) + 1.7 * c * z) / grid)
    assert {name: tuple(value.shape) for name, value in found.items()} == SHAPES
    assert all(value.dtype == torch.float32 for value in found.values())
    assert flat(found).tolist() == (whole * grid / 6.4).astype(np.float32).tolist()


@pytest.mark.parametrize("clipping", [0.37, 3.0, "auto"])
@pytest.mark.parametrize("sigma", [0.6, 1.3, 40.0])
def test_what_is_released_lies_on_the_grid(clipping, sigma):
    found = step(nobody(4000), max_grad_norm=clipping, noise_multiplier=sigma)[0]["a"].double()
    deviation = sigma * (1.0 if clipping == "auto" else clipping)
    steps = found * 2.0 ** (20 - math.floor(math.log2(deviation)))
    assert torch.equal(steps, steps.round())
    assert 0.3 < (steps % 2 == 1).double().mean() < 0.7  # and on no coarser one
    assert steps.abs().max() > 2**21  # while the noise is far wider than the grid


@pytest.mark.parametrize(("clipping", "c"), [(0.7, 0.7), ("auto", 1.0)])
@pytest.mark.parametrize("denominator", [1.0, 25.0])
def test_the_noise_has_the_variance_that_was_calibrated(clipping, c, denominator):
    """Σz²/(σC/B̄)² ~ χ²_n in each tensor: with n = 20,000 a σ that is wrong by 6 % fails."""
    shapes = {"a": (200, 100), "b": (20_000,), "c": (4, 50, 100)}
    source = Given({name: torch.zeros(0, *shape) for name, shape in shapes.items()})
    found, loss = step(
        source, noise_multiplier=1.3, max_grad_norm=clipping, denominator=denominator
    )
    assert math.isnan(loss)
    z = np.stack([found[name].double().numpy().ravel() for name in shapes])
    z *= denominator / (1.3 * c)
    low, high = chi2.ppf([FALSE_ALARM / 6, 1 - FALSE_ALARM / 6], 20_000)
    assert (low < (z**2).sum(axis=1)).all()
    assert ((z**2).sum(axis=1) < high).all()
    limit = norm.isf(FALSE_ALARM / 6) * math.sqrt(20_000)  # of a sum of so many products
    for one, other in ((0, 1), (0, 2), (1, 2)):  # each tensor's noise is its own
        assert abs((z[one] * z[other]).sum()) < limit


@pytest.mark.parametrize("patients", [0, 5])
def test_a_step_without_any_patient_adds_its_noise_like_every_other(patients):
    source = Given(randoms(patients))
    noise = Fixed(np.ones(11))
    found, loss = step(source, noise=noise, sampling_rate=1e-12)
    assert noise.draws == 1
    assert source.asked == [[]]
    assert math.isnan(loss)
    assert {name: tuple(value.shape) for name, value in found.items()} == SHAPES
    assert flat(found).tolist() == [1.0] * 11


def test_every_trained_number_gets_noise():
    found, _ = step(Given(randoms(3)))
    again, _ = step(Given(randoms(3)))
    assert all((found[name] != again[name]).all() for name in SHAPES)


def test_too_few_normals_never_make_a_step():
    with pytest.raises(RuntimeError, match="invalid for input of size 3"):
        step(Given(randoms(3)), noise=Fixed(np.ones(10)))


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_a_step_without_noise_is_refused_before_any_gradient(sigma):
    source = Given(randoms(3))
    with pytest.raises(PrivacyError, match=f"noise multiplier is {sigma}, expected more than 0"):
        step(source, noise_multiplier=sigma)
    assert source.asked == []


@pytest.mark.parametrize("rate", [0.03, 0.4])
def test_patients_are_sampled_independently_at_the_rate(rate):
    source = Given({"a": torch.zeros(500, 1)})
    noise = Fixed(np.zeros(1))
    for _ in range(400):
        step(source, noise=noise, sampling_rate=rate)
    assert all(asked == sorted(set(asked)) for asked in source.asked)
    sizes = [len(asked) for asked in source.asked]
    low, high = binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], 500 * 400, rate)
    assert low <= sum(sizes) <= high
    assert evenly(source, 400, rate)
    least = chi2.ppf(FALSE_ALARM, 399) / 399  # a batch of a fixed size has no variance
    assert np.var(sizes, ddof=1) > least * 500 * rate * (1 - rate)


def evenly(source, steps, rate):
    """Return whether each patient was asked for as often as one of ``rate`` may be."""
    of_each = np.bincount(np.concatenate(source.asked), minlength=source.num_patients)
    tail = FALSE_ALARM / 2 / source.num_patients
    low, high = binom.ppf([tail, 1 - tail], steps, rate)
    return low <= of_each.min() and of_each.max() <= high


def test_a_cap_bounds_the_patients_of_a_step_and_favours_none():
    source = Given({"a": torch.zeros(40, 1)})
    noise = Fixed(np.zeros(1))
    for _ in range(600):
        step(source, noise=noise, batch_cap=7)
    assert {len(set(asked)) for asked in source.asked} == {7}
    assert evenly(source, 600, 7 / 40)
    step(source, noise=noise, batch_cap=41)
    assert source.asked[-1] == list(range(40))


def test_the_loss_is_the_mean_over_the_sampled_records():
    _, loss = step(Given(randoms(4), size=3), noise=Fixed(np.zeros(11)))
    assert loss == (0 + 1 + 2 + 3) / 4
