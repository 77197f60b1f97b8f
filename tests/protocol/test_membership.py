"""The bound on an attacker, against mechanisms whose best attack is known exactly."""

from itertools import pairwise
from math import exp, log, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from huizhen.protocol.accounting import Spend, epsilon
from huizhen.protocol.errors import PrivacyError
from huizhen.protocol.membership import (
    FALSE_POSITIVE_RATES,
    AttackBound,
    attack_bounds,
    true_positive_bound,
)


@pytest.mark.parametrize(
    ("alpha", "pair", "bound"),
    [
        (0.1, (log(3), 0.0), 0.3),
        (0.5, (log(3), 0.0), 1 - 0.5 / 3),
        (0.2, (log(3), 0.05), 0.65),
        (0.7, (log(3), 0.05), 1 - 0.25 / 3),
        (0.4, (0.0, 0.0), 0.4),
        (0.4, (0.0, 0.1), 0.5),
        (0.0, (2.0, 1e-5), 1e-5),
        (0.0, (2.0, 0.0), 0.0),
        (1.0, (2.0, 0.0), 1.0),
        (0.95, (0.0, 0.1), 1.0),
        (0.01, (2000.0, 0.0), 1.0),
    ],
)
def test_the_bound_by_hand(alpha, pair, bound):
    assert true_positive_bound(alpha, [pair]) == pytest.approx(bound, abs=1e-12)


@given(st.floats(0, 20))
def test_randomised_response_reaches_the_bound(spent):
    # Warner 1965: the truth with probability e^ε / (1 + e^ε), which is all that ε allows
    lie = 1 / (1 + exp(spent))
    assert true_positive_bound(lie, [(spent, 0.0)]) == pytest.approx(1 - lie, abs=1e-9)


pairs = st.lists(st.tuples(st.floats(0, 30), st.floats(0, 1)), min_size=1, max_size=5)
rates = st.floats(0, 1)


@given(rates, rates, pairs)
def test_more_false_alarms_never_find_less_and_more_guarantees_never_allow_more(one, other, given_):
    low, high = sorted((one, other))
    bound = true_positive_bound(low, given_)
    assert low <= bound <= true_positive_bound(high, given_) <= 1
    assert bound <= true_positive_bound(low, given_[:1])


# Without sampling, T steps are one Gaussian test with μ = √T/σ: TPR = Φ(Φ⁻¹(α) + μ).
@pytest.mark.parametrize(
    ("sigma", "steps", "delta"), [(8.0, 50, 1e-5), (3.0, 1, 1e-6), (2.5, 20, 1e-4)]
)
def test_without_sampling_the_bound_is_near_the_exact_gaussian_one(sigma, steps, delta):
    spend = Spend(noise_multiplier=sigma, sampling_rate=1.0, steps=steps)
    for bound in attack_bounds([spend], delta):
        alpha = bound.false_positive_rate
        exact = norm.cdf(norm.ppf(alpha) + sqrt(steps) / sigma)
        assert exact - 1e-12 <= bound.by_mechanism < exact + 0.012


# One step with sampling: the likelihood ratio rises in x, so the best attack calls x > t "in"; and
# the best one of whoever asks the other way round calls x <= t "out".
@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 0.5), (0.6, 0.2), (2.0, 0.9)])
def test_with_sampling_no_attack_is_better_than_the_bound(sigma, rate):
    spend = Spend(noise_multiplier=sigma, sampling_rate=rate, steps=1)
    pairs = [(epsilon([spend], delta), delta) for delta in (1e-5, 1e-3, 0.01, 0.03, 0.1, 0.2, 0.4)]
    closest = 1.0
    for alpha in (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        found = (1 - rate) * alpha + rate * norm.sf(norm.isf(alpha) - 1 / sigma)
        assert found <= true_positive_bound(alpha, pairs) + 1e-12
        assert 1 - alpha <= true_positive_bound(1 - found, pairs) + 1e-12
        closest = min(closest, true_positive_bound(alpha, pairs) - found)
    assert closest < 0.005


def test_the_bound_by_epsilon_is_that_of_the_study_alone():
    spend = Spend(noise_multiplier=4.0, sampling_rate=0.25, steps=400)
    own = epsilon([spend], 1e-5)
    found = attack_bounds([spend], 1e-5)
    assert [bound.false_positive_rate for bound in found] == list(FALSE_POSITIVE_RATES)
    for bound in found:
        assert bound.by_epsilon == true_positive_bound(bound.false_positive_rate, [(own, 1e-5)])
    assert all(a.by_mechanism < b.by_mechanism for a, b in pairwise(found[:-1]))
    one_percent = next(bound for bound in found if bound.false_positive_rate == 0.01)
    # ε = 5.86 alone would let nearly all be recognised
    assert one_percent.by_epsilon > 0.99
    assert one_percent.by_mechanism < 0.2


def test_an_epsilon_that_cannot_be_certified_is_no_bound():
    with pytest.raises(PrivacyError, match="delta is"):
        attack_bounds([Spend(noise_multiplier=1.0, sampling_rate=0.1, steps=10)], 1e-15)


@pytest.mark.parametrize(
    "rates", [(-0.1, 0.2, 0.3), (0.2, 0.1, 0.3), (0.1, 0.3, 0.2), (0.5, 0.6, 1.1)]
)
def test_rates_that_cannot_be_are_refused(rates):
    alpha, noise, any_ = rates
    with pytest.raises(ValueError, match="expected 0 to 1"):
        AttackBound(false_positive_rate=alpha, by_mechanism=noise, by_epsilon=any_)
