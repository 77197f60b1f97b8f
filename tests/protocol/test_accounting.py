"""ε against published-precision oracles, closed forms, and what must hold for any accountant."""

import warnings
from itertools import pairwise
from math import exp, sqrt

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from huizhen.protocol import accounting
from huizhen.protocol.accounting import (
    Spend,
    epsilon,
    merge,
)
from huizhen.protocol.errors import PrivacyError

# Computed with dp_accounting's PLD at its own discretisation, each row also by Opacus' PRV.
TABLE = [
    (1.0, 0.01, 1000, 1e-5, 1.828),
    (2.0, 0.1, 500, 1e-5, 5.556),
    (1.0, 0.1, 300, 1e-4, 10.81),
    (4.0, 0.25, 400, 1e-5, 5.864),
    (8.0, 1.0, 50, 1e-5, 3.797),
    (20.0, 0.1, 500, 1e-5, 0.386),
    (50.0, 0.05, 100, 1e-5, 0.027),
    (1.5, 0.02, 5000, 1e-6, 5.331),
]
MIXED = [(1 + 0.1 * i, 0.02 + 0.005 * i, 20) for i in range(40)]


def spend(sigma, q, steps, cap=None, bound=None):
    return Spend(
        noise_multiplier=sigma, sampling_rate=q, steps=steps, batch_cap=cap, patients_bound=bound
    )


def cost(sigma, q, steps, delta):
    return epsilon([spend(sigma, q, steps)], delta)


@pytest.fixture
def no_cache():
    """Forget what was priced before and after a test that changes how prices are found."""
    accounting._certified.cache_clear()
    yield
    accounting._certified.cache_clear()


def prv(history, delta):
    """The upper end that Opacus reports; it lies 0.01 over its estimate."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = history
    # It sizes its grid by few Rényi orders and says so; without sampling it takes the log of 0.
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.filterwarnings("ignore", "Optimal order", UserWarning)
        return accountant.get_epsilon(delta)


@pytest.mark.parametrize(("sigma", "q", "steps", "delta", "expected"), TABLE)
def test_epsilon_is_that_of_the_table(sigma, q, steps, delta, expected):
    tolerance = 1e-3 if expected < 10 else 6e-3  # 10.81 is printed with two decimals
    assert cost(sigma, q, steps, delta) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(("sigma", "q", "steps", "delta"), [row[:4] for row in TABLE])
def test_epsilon_is_under_the_renyi_bound_and_not_far_under(sigma, q, steps, delta):
    step = PoissonSampledDpEvent(q, GaussianDpEvent(sigma))
    bound = RdpAccountant().compose(SelfComposedDpEvent(step, steps)).get_epsilon(delta)
    assert 0.7 * bound < cost(sigma, q, steps, delta) <= bound


@pytest.mark.parametrize(("sigma", "q", "steps", "delta"), [row[:4] for row in TABLE])
def test_pb_6_opacus_prv_agrees(sigma, q, steps, delta):
    upper = prv([(sigma, q, steps)], delta)
    assert cost(sigma, q, steps, delta) == pytest.approx(upper - 0.01, abs=5e-4)


@pytest.mark.slow
def test_opacus_prv_agrees_on_forty_different_mechanisms():
    upper = prv(list(MIXED), 1e-5)
    spent = epsilon([spend(*one) for one in MIXED], 1e-5)
    assert spent == pytest.approx(upper - 0.01, abs=5e-4)


# Balle and Wang 2018, Theorem 8: without sampling, T steps are one Gaussian with μ = √T/σ.
def gaussian_epsilon(mu, delta):
    def excess(eps):
        return norm.cdf(mu / 2 - eps / mu) - exp(eps) * norm.cdf(-mu / 2 - eps / mu) - delta

    return brentq(excess, 0, 50, xtol=1e-12)


@pytest.mark.parametrize(
    ("sigma", "steps", "delta"), [(8.0, 50, 1e-5), (3.0, 1, 1e-6), (0.7, 2, 1e-3)]
)
def test_without_sampling_epsilon_is_that_of_the_analytic_gaussian(sigma, steps, delta):
    exact = gaussian_epsilon(sqrt(steps) / sigma, delta)
    assert exact <= cost(sigma, 1.0, steps, delta) < exact * 1.001  # pessimistic, and close


def test_different_gaussians_compose_to_one():
    mu = sqrt(50 / 8.0**2 + 3 / 5.0**2 + 7 / 11.0**2)
    exact = gaussian_epsilon(mu, 1e-5)
    spent = epsilon([spend(8.0, 1.0, 50), spend(5.0, 1.0, 3), spend(11.0, 1.0, 7)], 1e-5)
    assert exact <= spent < exact * 1.001


def test_many_steps_of_little_noise_get_a_finer_grid():
    # At dp_accounting's own interval of 1e-4 this PLD is 0.041, over the Rényi bound of 0.0355.
    assert cost(20.0, 0.001, 50_000, 1e-5) == pytest.approx(0.03085, abs=1e-4)


def strictly_increasing(values):
    return all(a < b for a, b in pairwise(values))


def test_more_noise_costs_less():
    values = [cost(sigma, 0.2, 40, 1e-5) for sigma in (8.0, 4.0, 3.9, 2.0, 1.2)]
    assert strictly_increasing(values)


def test_a_higher_sampling_rate_costs_more_and_none_costs_most():
    values = [cost(2.0, q, 40, 1e-5) for q in (0.01, 0.1, 0.11, 0.5, 0.99, 1.0)]
    assert strictly_increasing(values)


def test_more_steps_cost_more():
    values = [cost(2.0, 0.2, steps, 1e-5) for steps in (1, 2, 20, 21, 200)]
    assert strictly_increasing(values)


def test_a_smaller_delta_costs_more():
    values = [cost(2.0, 0.2, 40, delta) for delta in (1e-2, 1e-4, 1e-5, 1e-8)]
    assert strictly_increasing(values)


@pytest.mark.slow
def test_random_mechanisms_are_under_the_renyi_bound_and_monotone():
    rng = np.random.default_rng(20)
    for _ in range(300):
        sigma, q = exp(rng.uniform(-0.7, 3.4)), exp(rng.uniform(-5.3, 0.2))
        q, steps, delta = min(q, 1.0), int(exp(rng.uniform(0, 7.6))), 10 ** rng.uniform(-8, -3)
        spent = cost(sigma, q, steps, delta)
        step = PoissonSampledDpEvent(q, GaussianDpEvent(sigma))
        bound = RdpAccountant().compose(SelfComposedDpEvent(step, steps)).get_epsilon(delta)
        assert spent <= bound, (sigma, q, steps, delta)
        cheaper = {
            "sigma": cost(1.02 * sigma, q, steps, delta),
            "rate": cost(sigma, 0.98 * q, steps, delta),
            "steps": cost(sigma, q, steps - max(steps // 50, 1), delta) if steps > 1 else 0.0,
            "delta": cost(sigma, q, steps, 1.2 * delta),
        }
        for name, less in cheaper.items():
            assert less < spent or less == spent == 0, (name, sigma, q, steps, delta)


def test_a_delta_that_covers_everything_costs_nothing():
    assert cost(1.0, 1e-4, 1, 1e-3) == 0  # one step meets the patient with q = δ/10


def test_nothing_costs_nothing():
    assert epsilon([], 1e-5) == 0


def test_several_studies_cost_more_than_the_dearest_and_less_than_their_sum():
    studies = [spend(1.3, 0.2, 40), spend(4.0, 0.25, 100), spend(8.0, 1.0, 9)]
    alone = [epsilon([study], 1e-5) for study in studies]
    assert max(alone) < epsilon(studies, 1e-5) < sum(alone)


def test_the_order_and_the_rounds_of_a_ledger_do_not_matter():
    rounds = [spend(1.3, 0.2, 4)] * 10 + [spend(4.0, 0.25, 100)]
    together = [spend(4.0, 0.25, 60), spend(1.3, 0.2, 40), spend(4.0, 0.25, 40)]
    assert merge(rounds) == merge(together) == merge([spend(4.0, 0.25, 100), spend(1.3, 0.2, 40)])
    assert epsilon(rounds, 1e-5) == epsilon(together, 1e-5)


def test_a_coarse_discretisation_is_refined(monkeypatch, no_cache):
    monkeypatch.setattr(accounting, "_REFINEMENTS", (64, 1))
    assert cost(2.0, 0.1, 500, 1e-5) == pytest.approx(5.556, abs=1e-3)


def test_a_discretisation_that_stays_over_the_renyi_bound_is_refused(monkeypatch, no_cache):
    monkeypatch.setattr(accounting, "_REFINEMENTS", (256, 64))
    with pytest.raises(PrivacyError, match=r"over the Rényi bound 6\.09"):
        cost(2.0, 0.1, 500, 1e-5)


# The convolution's error in δ, where the exact δ is below it: no multiple of the grid helps there.
@pytest.mark.parametrize(
    ("sigma", "steps"),
    [(10.0, 100), (30.0, 2000), pytest.param(30.0, 100_000, marks=pytest.mark.slow)],
)
def test_the_convolution_errs_by_less_than_is_set_aside(sigma, steps):
    loss = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, value_discretization_interval=1 / sigma / 128
    ).self_compose(steps)
    mu = sqrt(steps) / sigma
    for z in (7.5, 8.0, 8.5):
        eps = mu**2 / 2 + mu * z
        exact = norm.cdf(-z) - exp(eps + norm.logcdf(-z - mu))
        error = loss.get_delta_for_epsilon(eps) - exact
        assert 0 < abs(error) < accounting._FFT_ERROR * steps


def test_what_is_set_aside_is_paid_for(monkeypatch, no_cache):
    plain = cost(2.0, 0.1, 500, 1e-5)
    monkeypatch.setattr(accounting, "_FFT_ERROR", 1e-10)  # 500 steps: half a percent of δ
    accounting._certified.cache_clear()
    assert plain < cost(2.0, 0.1, 500, 1e-5) < plain * 1.001


@pytest.mark.parametrize("delta", [0.0, -1e-5, 1.0, float("nan")])
def test_a_delta_out_of_range_is_refused(delta):
    with pytest.raises(PrivacyError, match="expected between 0 and 1"):
        cost(2.0, 0.1, 500, delta)


def test_a_delta_below_the_arithmetic_is_refused():
    with pytest.raises(PrivacyError, match=r"1e-11, too small .* of 500 steps, .* least 5e-11"):
        cost(2.0, 0.1, 500, 1e-11)
    assert cost(2.0, 1.0, 500, 1e-11) > 0  # one Gaussian: nothing is convolved


def test_more_steps_than_fit_are_refused():
    with pytest.raises(PrivacyError, match="steps are 1000001"):
        cost(2.0, 0.1, 1_000_001, 1e-5)
