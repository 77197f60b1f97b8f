"""Steinke et al. 2023, Theorem 5.2: published values, an exact twin, and two worst-case runs."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from huizhen.protocol.errors import ConfigError
from huizhen.simulations.one_run import (
    CONFIDENCE,
    REACH,
    ceiling,
    epsilon_lower,
    p_value,
    planned_guesses,
)

counts = st.integers(1, 12).flatmap(
    lambda m: st.integers(0, m).flatmap(
        lambda r: st.tuples(st.just(m), st.just(r), st.integers(0, r))
    )
)


# Printed with three decimals by the paper's own program.
@pytest.mark.parametrize(
    ("m", "r", "v", "delta", "expected"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_the_bound_is_the_published_one(m, r, v, delta, expected):
    assert epsilon_lower(m, r, v, delta) == pytest.approx(expected, abs=1e-3)


def test_the_p_value_is_the_published_one():
    assert p_value(100, 100, 75, math.log(3), 0) == pytest.approx(0.553, abs=5e-4)


@given(counts, st.sampled_from([1, 2, 3, 9]), st.sampled_from([0, 1, 7, 40]))
def test_the_p_value_is_that_of_an_exact_sum(sizes, odds, thousandths):
    """A rational q = odds / (1 + odds) and δ: every probability is a fraction."""
    m, r, v = sizes
    q, delta = Fraction(odds, 1 + odds), Fraction(thousandths, 1000)
    share = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    worst = max((sum(share[v - i : v]) / i for i in range(1, v + 1)), default=0)
    exact = min(1, sum(share[v:]) + 2 * m * delta * worst)
    assert p_value(m, r, v, math.log(odds), float(delta)) == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize("r", [4, 20, 100])
def test_with_all_right_and_no_delta_the_bound_has_a_closed_form(r):
    """q^r = 1 - confidence, so e^ε = q / (1 - q)."""
    q = (1 - CONFIDENCE) ** (1 / r)
    expected = max(0.0, math.log(q / (1 - q)))
    assert epsilon_lower(r, r, r, 0.0) == pytest.approx(expected, abs=2e-6)


# research notes of the project: 3.04, 4.44 and 5.78 for 64, 256 and 1000 canaries
@pytest.mark.parametrize(("m", "most"), [(64, 3.04), (256, 4.44), (1000, 5.78)])
def test_the_ceiling_is_the_bound_of_a_run_in_which_every_guess_is_right(m, most):
    assert ceiling(m, m, 1e-5) == pytest.approx(most, abs=6e-3)
    assert ceiling(m, m, 1e-5) == epsilon_lower(m, m, m, 1e-5)


def test_canaries_that_no_step_draws_lower_the_ceiling():
    # unseen = 1/3 of those in: of 120, 40 look like the 120 that are out. Half of 200 guesses say
    # "in": 80 sure and 20 of which 1/4 are right; 100 say "out", of which 3/4 are right.
    assert ceiling(240, 200, 1e-5, unseen=1 / 3) == epsilon_lower(240, 200, 80 + 5 + 75, 1e-5)
    assert ceiling(240, 200, 1e-5, unseen=1.0) == 0


@given(counts, st.floats(0, 4), st.floats(0.001, 1), st.sampled_from([0, 1e-5, 1e-3]))
def test_a_weaker_claim_is_never_less_likely(sizes, epsilon, more, delta):
    m, r, v = sizes
    stronger, weaker = p_value(m, r, v, epsilon, delta), p_value(m, r, v, epsilon + more, delta)
    assert weaker >= stronger - 1e-12 or min(stronger, weaker) >= 0.5
    assert p_value(m, r, v, epsilon, delta + more / 10) >= stronger


@pytest.mark.parametrize("delta", [1e-6, 1e-4, 1e-3])
def test_the_bound_grows_with_what_is_right_and_falls_with_delta(delta):
    bounds = [epsilon_lower(300, 120, v, delta) for v in range(121)]
    assert bounds == sorted(bounds)
    assert bounds[60] == 0 < bounds[120]
    assert bounds[120] >= epsilon_lower(300, 120, 120, 2 * delta)
    assert bounds[120] > epsilon_lower(300, 120, 120, delta, confidence=1 - 1e-6)


@pytest.mark.parametrize(("m", "r", "v"), [(50, 0, 0), (50, 20, 0), (50, 20, 10)])
def test_guesses_no_better_than_coins_show_nothing(m, r, v):
    assert epsilon_lower(m, r, v, 1e-5) == 0


@pytest.mark.parametrize("epsilon", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("m", [60, 250])
def test_randomised_response_exceeds_its_own_epsilon_as_rarely_as_promised(epsilon, m):
    """It answers each coin right with probability e^ε/(1+e^ε): the worst (ε, 0)-private run."""
    q = 1 / (1 + math.exp(-epsilon))
    too_high = [v for v in range(m + 1) if epsilon_lower(m, m, v, 0.0) > epsilon]
    chance = binom.pmf(too_high, m, q).sum()
    assert chance <= 1 - CONFIDENCE
    assert chance > 0.2 * (1 - CONFIDENCE)  # and the bound gives nothing away


@pytest.mark.parametrize(("m", "r", "delta"), [(500, 40, 0.005), (500, 20, 0.02), (200, 6, 0.01)])
def test_a_run_that_betrays_each_patient_with_probability_delta_is_no_alarm(m, r, delta):
    """It is (0, δ)-private. The auditor says what was betrayed first, and the rest by coin."""

    def alarm(claimed_delta):
        enough = [v for v in range(r + 1) if epsilon_lower(m, r, v, claimed_delta) > 0]
        if not enough:
            return 0.0
        return sum(
            chance * binom.sf(enough[0] - min(k, r) - 1, r - min(k, r), 0.5)
            for k, chance in enumerate(binom.pmf(range(m + 1), m, delta))
        )

    assert alarm(delta) <= 1 - CONFIDENCE
    assert alarm(0.0) > 1 - CONFIDENCE  # as it would be if δ were left out


@pytest.mark.parametrize(
    ("m", "r", "v"), [(10, 11, 3), (10, 5, 6), (10, 5, -1), (-1, 0, 0), (10, -2, 0)]
)
def test_impossible_counts_are_refused(m, r, v):
    with pytest.raises(ConfigError, match="expected 0 <= right <= guesses"):
        p_value(m, r, v, 1.0, 1e-5)


@pytest.mark.parametrize(
    ("epsilon", "delta"),
    [(-0.1, 0), (math.nan, 0), (math.inf, 0), (1, -1e-9), (1, 1.1), (1, math.nan)],
)
def test_what_is_no_privacy_parameter_is_refused(epsilon, delta):
    with pytest.raises(ConfigError, match="epsilon is"):
        p_value(10, 5, 3, epsilon, delta)


@pytest.mark.parametrize("confidence", [0.0, 0.4, 1.0, math.nan])
def test_a_confidence_that_is_none_is_refused(confidence):
    with pytest.raises(ConfigError, match="confidence is"):
        epsilon_lower(10, 5, 3, 1e-5, confidence=confidence)


@pytest.mark.parametrize("m", [2, 3, 17, 256, 2000])
@pytest.mark.parametrize("claim", [0.5, 2.0, 8.0])
def test_the_plan_makes_an_even_number_of_guesses_that_can_refute_the_claim(m, claim):
    r = planned_guesses(m, 1e-5, claim=claim, separation=0.8)
    assert r % 2 == 0
    assert 2 <= r <= m
    if ceiling(m, m // 2 * 2, 1e-5) > REACH * claim:
        assert ceiling(m, r, 1e-5) > REACH * claim
    else:
        assert r == m // 2 * 2


def test_the_plan_abstains_where_that_shows_more():
    """Of 1000 scores that hardly differ only the extremes tell anything."""
    assert planned_guesses(1000, 1e-5, claim=1.0, separation=1.0) < 400
    assert planned_guesses(1000, 1e-5, claim=1.0, separation=9.0) == 1000


@pytest.mark.parametrize("m", [-5, 0, 1])
def test_a_plan_needs_two_canaries(m):
    with pytest.raises(ConfigError, match="at least 2"):
        planned_guesses(m, 1e-5, claim=1.0, separation=1.0)
