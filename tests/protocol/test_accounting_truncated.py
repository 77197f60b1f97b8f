"""Truncated Poisson: what a cap on the patients of a step costs, against exact small cases.

The price must cover every number of patients up to the public bound, which that of
``dp_accounting`` for the bound itself does not.
"""

from itertools import pairwise
from math import comb, exp, log

import numpy as np
import pytest
from dp_accounting import SelfComposedDpEvent, TruncatedSubsampledGaussianDpEvent
from dp_accounting.pld import PLDAccountant
from scipy.stats import norm

from huizhen.protocol.accounting import Spend, calibrate, epsilon
from huizhen.protocol.truncated_poisson import chance_of_full, displacing_renyi, step_renyi


def capped(sigma, q, steps, cap, bound):
    return Spend(
        noise_multiplier=sigma, sampling_rate=q, steps=steps, batch_cap=cap, patients_bound=bound
    )


def price(cap, bound):
    return epsilon([capped(1.0, 0.05, 300, cap, bound)], 1e-5)


POISSON = epsilon([Spend(noise_multiplier=1.0, sampling_rate=0.05, steps=300)], 1e-5)


def price_for_exactly(patients, cap):
    event = TruncatedSubsampledGaussianDpEvent(patients, 0.05, cap, 1.0)
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    return accountant.compose(SelfComposedDpEvent(event, 300)).get_epsilon(1e-5)


# σ = 1, q = 0.05, T = 300 and 2,000 patients, by dp_accounting for exactly so many.
@pytest.mark.parametrize(
    ("cap", "exact", "margin"),
    [(200, 5.795, 2e-4), (140, 5.852, 1e-3), (120, 9.71, 0.02), (105, 19.8, 0.06)],
)
def test_the_price_is_over_that_of_the_table_and_near_where_caps_are_seldom_met(cap, exact, margin):
    assert price_for_exactly(2000, cap) == pytest.approx(exact, rel=2e-3)
    assert price_for_exactly(2000, cap) * 0.9999 <= price(cap, 2000) <= exact * (1 + margin)


def test_a_cap_that_is_never_met_costs_nothing():
    assert POISSON <= price(2000, 2000) == price(9999, 2000) < POISSON * 1.0001


def test_a_smaller_cap_costs_more():
    prices = [price(cap, 2000) for cap in (2000, 140, 130, 120, 105, 100)]
    assert all(a < b for a, b in pairwise(prices))


def test_a_generous_bound_never_lowers_the_price():
    numbers = (140, 2000, 2500, 3000, 5000, 20_000)
    prices = [price(140, bound) for bound in numbers]
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(prices))
    exact = [price_for_exactly(patients, 140) for patients in numbers]
    assert exact[3] > 4 * exact[5]  # so that 20,000 as a bound would understate 3,000 patients
    for i, bound in enumerate(prices):
        assert all(bound > 0.9999 * one for one in exact[: i + 1])


def kept_sums(others, sampled, cap, q):
    """The sum's distribution in one step: the patient adds 1, each other patient takes 1 away.

    Args:
        others: their number.
        sampled: how likely the patient is sampled; 0 where there is no such patient.
        cap: of the patients that are kept, at random.
        q: how likely each of the others is sampled.
    """
    chances: dict[int, float] = {}
    for k in range(others + 1):
        chance = comb(others, k) * q**k * (1 - q) ** (others - k)
        keep = min(1.0, cap / (k + 1)) * sampled
        for total, part in ((1 - min(k, cap - 1), keep), (-min(k, cap), 1 - keep)):
            chances[total] = chances.get(total, 0.0) + chance * part
    return chances


def divergence(p, q, sigma, eps):
    """The hockey-stick divergence of two mixtures of Gaussians, on a fine grid."""
    x = np.linspace(-20 * sigma - 9, 20 * sigma + 9, 200_001)
    density = [sum(c * norm.pdf(x, m, sigma) for m, c in one.items()) for one in (p, q)]
    return float(np.maximum(density[0] - exp(eps) * density[1], 0).sum() * (x[1] - x[0]))


@pytest.mark.parametrize("sigma", [0.6, 1.0, 3.0])
@pytest.mark.parametrize(
    ("cap", "bound", "q"), [(1, 4, 0.5), (1, 5, 0.9), (2, 6, 0.3), (3, 5, 1.0)]
)
@pytest.mark.parametrize("eps", [0.1, 0.5, 1.5, 4.0])
def test_one_step_on_few_patients_never_costs_more_than_its_price(sigma, cap, bound, q, eps):
    step = capped(sigma, q, 1, cap, bound)
    for patients in range(1, bound + 1):
        present = kept_sums(patients - 1, q, cap, q)
        absent = kept_sums(patients - 1, 0.0, cap, q)
        for p, other in ((present, absent), (absent, present)):
            delta = divergence(p, other, sigma, eps)
            if delta > 1e-9:
                assert epsilon([step], delta) >= eps * (1 - 1e-6)


def test_ignoring_the_cap_would_understate_that():
    present, absent = kept_sums(4, 0.9, 1, 0.9), kept_sums(4, 0.0, 1, 0.9)
    delta = divergence(present, absent, 0.6, 4.0)
    uncapped = Spend(noise_multiplier=0.6, sampling_rate=0.9, steps=1)
    assert epsilon([uncapped], delta) < 4.0


# Mironov et al. 2019 for the Poisson part; N(1, σ²) from N(-1, σ²) in closed form for the other.
def test_the_renyi_bound_mixes_the_moments_of_both_parts():
    orders = [2, 3, 64, 512]
    always = step_renyi(2.0, 1.0, chance_of_full(1.0, 3, 4), orders)  # three others, all sampled
    assert always == pytest.approx(np.array(orders) * 4**2 / (2 * 2.0**2))
    half = step_renyi(2.0, 0.5, chance_of_full(0.5, 3, 4), [2])  # a chance of 1/8
    displacing = displacing_renyi(2.0, 0.5, [2])[0]
    poisson = log(1 + 0.25 * (exp(1 / 4) - 1))  # of order 2
    mixed = log(7 / 8 * exp(poisson) + 1 / 8 * exp(displacing))
    assert half[0] == pytest.approx(mixed)


@pytest.mark.slow
def test_random_capped_mechanisms_are_certified_and_monotone():
    rng = np.random.default_rng(21)
    for _ in range(60):
        sigma, q, bound = (
            exp(rng.uniform(-0.3, 2)),
            rng.uniform(0.02, 0.6),
            int(rng.integers(20, 3000)),
        )
        mean, steps = q * bound, int(exp(rng.uniform(0, 6)))
        cap = max(1, round(mean + rng.uniform(-1, 5) * mean**0.5))
        spent = epsilon([capped(sigma, q, steps, cap, bound)], 1e-5)  # refused if over Rényi's
        free = epsilon([Spend(noise_multiplier=sigma, sampling_rate=q, steps=steps)], 1e-5)
        assert spent >= free * 0.9998
        assert spent >= epsilon([capped(sigma, q, steps, cap + 1, bound)], 1e-5) * 0.9998
        assert spent >= epsilon([capped(1.05 * sigma, q, steps, cap, bound)], 1e-5)
        assert spent >= epsilon([capped(sigma, q, steps, cap, bound - 1)], 1e-5) * 0.9998


def test_a_capped_step_composes_with_others():
    others = [
        Spend(noise_multiplier=8.0, sampling_rate=1.0, steps=9),
        Spend(noise_multiplier=4.0, sampling_rate=0.25, steps=100),
    ]
    mine = capped(1.0, 0.05, 300, 140, 2000)
    alone = [epsilon([one], 1e-5) for one in (*others, mine)]
    assert max(alone) < epsilon([*others, mine], 1e-5) < sum(alone)


def test_a_cap_is_paid_for_in_noise():
    free = calibrate(8.0, 1e-5, 0.05, 300)
    generous, tight = (
        calibrate(8.0, 1e-5, 0.05, 300, batch_cap=cap, patients_bound=2000) for cap in (140, 125)
    )
    assert free < generous < 1.02 * free < tight
    assert epsilon([capped(tight, 0.05, 300, 125, 2000)], 1e-5) <= 8.0
    assert epsilon([capped(tight / 1.001 - 1e-4, 0.05, 300, 125, 2000)], 1e-5) > 8.0
