"""The noise on counts has exactly the distribution that its proof assumes.

Statistical bounds come from a false-alarm rate of 1e-9: a right sampler fails once in 10⁹ runs.
"""

import random
import secrets
from collections import defaultdict
from fractions import Fraction
from math import exp, factorial

import numpy as np
import pytest
from scipy.stats import chi2

from huizhen.client.discrete import coin, discrete_laplace
from huizhen.protocol.metrics import noise_deviation

FALSE_ALARM = 1e-9
DRAWS = 30_000


class Script:
    """Answers ``randbelow`` from a list, and says how it went when the list ends."""

    def __init__(self, answers):
        self.answers, self.sides = list(answers), []

    def __call__(self, sides):
        if len(self.sides) == len(self.answers):
            raise EOFError(sides)
        self.sides.append(sides)
        return self.answers[len(self.sides) - 1]


def every_outcome(monkeypatch, sample, least):
    """Return the exact probability of each outcome, and of the paths less likely than ``least``."""
    found: dict[int, Fraction] = defaultdict(Fraction)
    unresolved = Fraction(0)
    open_paths: list[tuple[tuple[int, ...], Fraction]] = [((), Fraction(1))]
    while open_paths:
        answers, weight = open_paths.pop()
        script = Script(answers)
        monkeypatch.setattr(secrets, "randbelow", script)
        try:
            found[sample()] += weight
        except EOFError as error:
            sides = error.args[0]
            if weight / sides < least:
                unresolved += weight
            else:
                open_paths += [((*answers, i), weight / sides) for i in range(sides)]
    return found, unresolved


@pytest.mark.parametrize("gamma", [Fraction(0), Fraction(1, 3), Fraction(2, 3), Fraction(1)])
def test_a_coin_has_the_probability_of_its_series(monkeypatch, gamma):
    found, unresolved = every_outcome(monkeypatch, lambda: coin(gamma), 1e-5)
    assert unresolved < Fraction(1, 100)
    series = sum((-gamma) ** k / factorial(k) for k in range(20))
    assert found[True] <= series <= found[True] + unresolved
    assert found[True] + found[False] + unresolved == 1


@pytest.mark.parametrize("rate", [Fraction(1, 2), Fraction(2)])
def test_every_path_of_the_sampler_adds_up_to_the_closed_form(monkeypatch, rate):
    found, unresolved = every_outcome(monkeypatch, lambda: discrete_laplace(rate), 1e-6)
    assert unresolved < 0.051
    for z in range(-4, 5):
        exact = (exp(rate) - 1) / (exp(rate) + 1) * exp(-rate * abs(z))
        assert found[z] <= exact + 1e-12
        assert exact <= found[z] + unresolved + 1e-12
        assert found[z] == found[-z]


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0, 2.5, 0.25 / 40])
def test_draws_follow_the_closed_form(rate):
    draws = np.array([discrete_laplace(Fraction(rate)) for _ in range(DRAWS)])
    # cells of about equal weight; the ends hold the tails
    edge = max(1, int(np.log(30) / rate))
    bounds = np.unique(np.linspace(-edge, edge, 21).astype(int))
    scale = (exp(rate) - 1) / (exp(rate) + 1)
    below = [upto(z, rate) for z in bounds]
    expected = DRAWS * np.diff([0, *below, 1])
    observed = np.diff([0, *[(draws <= z).sum() for z in bounds], DRAWS])
    assert (expected > 20).all()
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert statistic < chi2.isf(FALSE_ALARM, len(expected) - 1)
    zeros = DRAWS * scale
    assert abs((draws == 0).sum() - zeros) < 7 * np.sqrt(zeros)  # 7 deviations: under 1e-9


def upto(z, rate):
    """P(Z <= z), from the two geometric tails."""
    tail = exp(-rate * (abs(z) + (z >= 0))) / (1 + exp(-rate))
    return 1 - tail if z >= 0 else tail


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 1.0, 7.5])
def test_the_stated_deviation_is_that_of_the_distribution(rate):
    z = np.arange(-4000, 4001)
    p = (exp(rate) - 1) / (exp(rate) + 1) * np.exp(-rate * np.abs(z))
    assert p.sum() == pytest.approx(1)
    assert noise_deviation(rate) == pytest.approx(np.sqrt((p * z**2).sum()), rel=1e-9)


def test_no_seed_makes_the_draws_repeat():
    found = []
    for _ in range(2):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002  # what a program outside might do
        found.append([discrete_laplace(Fraction(1, 1000)) for _ in range(20)])
    assert found[0] != found[1]


def test_the_only_entropy_is_the_operating_systems(monkeypatch):
    found = []
    for _ in range(2):
        stream = np.random.default_rng(3)
        monkeypatch.setattr(random, "_urandom", stream.bytes)  # what ``secrets`` reads
        found.append([discrete_laplace(Fraction(1, 3)) for _ in range(50)])
    assert found[0] == found[1]


@pytest.mark.parametrize("rate", [Fraction(0), Fraction(-1)])
def test_a_rate_without_noise_is_refused(rate):
    with pytest.raises(ValueError, match="expected more than 0"):
        discrete_laplace(rate)


@pytest.mark.parametrize("gamma", [Fraction(-1, 2), Fraction(3, 2)])
def test_a_coin_outside_its_range_is_refused(gamma):
    with pytest.raises(ValueError, match="expected 0 to 1"):
        coin(gamma)


def test_the_smallest_float_rate_is_drawn_without_rounding():
    assert isinstance(discrete_laplace(Fraction(1e-300)), int)
