"""The secret randomness has the distributions that the privacy proof assumes.

Every bound comes from a false-alarm rate of 1e-9 (both sides together), so a right implementation
fails once in 10⁹ runs of a test.
"""

import os
import random

import numpy as np
import pytest
import torch
from scipy.stats import binom, chi2, kstest, norm

from huizhen.client import randomness
from huizhen.client.randomness import choose, normals, poisson_sample

FALSE_ALARM = 1e-9
BOUNDS = [FALSE_ALARM / 2, 1 - FALSE_ALARM / 2]
DRAWS = 2_000_001  # odd: the last of a pair is dropped


def test_normals_have_the_moments_of_the_standard_normal():
    z = normals(DRAWS)
    low, high = chi2.ppf(BOUNDS, DRAWS)
    assert low < (z**2).sum() < high
    limit = norm.isf(FALSE_ALARM / 2)
    assert abs(z.sum()) < limit * np.sqrt(DRAWS)
    # E z⁴ = 3, Var z⁴ = 96: a sum of so many is close enough to a normal for this bound's width
    assert abs((z**4).sum() - 3 * DRAWS) < 1.5 * limit * np.sqrt(96 * DRAWS)


def test_normals_follow_the_normal_distribution():
    assert kstest(normals(DRAWS), "norm").pvalue > FALSE_ALARM


def test_the_two_normals_of_a_pair_are_independent():
    z = normals(DRAWS - 1)
    half = len(z) // 2
    for x, y in ((z[:half], z[half:]), (z[:-1], z[1:])):
        # a sum of n products of independent normals has variance n
        assert abs((x * y).sum()) < norm.isf(FALSE_ALARM / 2) * np.sqrt(len(x)) * 1.1


def test_all_normals_are_finite_even_for_extreme_words(monkeypatch):
    extremes = np.array([0, 2**64 - 1], dtype=np.uint64)
    monkeypatch.setattr(randomness, "_words", lambda count: np.resize(extremes, count))
    assert np.isfinite(normals(4)).all()


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_as_many_normals_come_as_are_asked_for(count):
    assert normals(count).shape == (count,)


@pytest.mark.parametrize("rate", [0.013, 0.2, 0.5])
def test_each_unit_is_sampled_at_the_rate(rate):
    chosen = poisson_sample(DRAWS, rate)
    low, high = binom.ppf(BOUNDS, DRAWS, rate)
    assert low <= len(chosen) <= high
    assert len(set(chosen.tolist())) == len(chosen)
    assert chosen.min() >= 0
    assert chosen.max() < DRAWS


def test_units_are_sampled_independently_of_their_neighbours():
    inside = np.zeros(DRAWS, bool)
    inside[poisson_sample(DRAWS, 0.3)] = True
    pairs = (inside[:-1:2] & inside[1::2]).sum()
    low, high = binom.ppf(BOUNDS, DRAWS // 2, 0.09)
    assert low <= pairs <= high


def test_the_size_of_a_sample_varies_as_a_binomial_does():
    sizes = np.array([len(poisson_sample(50, 0.2)) for _ in range(2000)])
    expected = binom.pmf(np.arange(4, 17), 50, 0.2)
    observed = np.array([(sizes == k).sum() for k in range(4, 17)])
    rest, rest_expected = 2000 - observed.sum(), 1 - expected.sum()
    statistic = ((observed - 2000 * expected) ** 2 / (2000 * expected)).sum()
    statistic += (rest - 2000 * rest_expected) ** 2 / (2000 * rest_expected)
    assert statistic < chi2.isf(FALSE_ALARM, 13)


def test_a_rate_of_one_samples_everyone():
    assert poisson_sample(1000, 1.0).tolist() == list(range(1000))


def test_few_things_are_all_chosen():
    assert choose(3, 4).tolist() == [0, 1, 2]
    assert choose(4, 4).tolist() == [0, 1, 2, 3]


def test_choosing_is_without_replacement_and_uniform():
    draws = 20_000
    counts = np.zeros(5)
    for _ in range(draws):
        chosen = choose(5, 2)
        assert len(set(chosen.tolist())) == 2
        counts[chosen] += 1
    # each thing is in a draw with 2/5; the five counts sum to 2 · draws and are equicorrelated,
    # so Σ(count - mean)² / (n · 2/5 · 3/5 · 5/4) is chi-squared with 4 degrees of freedom
    statistic = ((counts - draws * 0.4) ** 2).sum() / (draws * 0.24 * 1.25)
    assert statistic < chi2.isf(FALSE_ALARM, 4)


def test_no_seed_makes_the_draws_repeat():
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002  # what a program outside might do
        random.seed(1)
        found.append(
            (normals(8).tobytes(), poisson_sample(500, 0.5).tobytes(), choose(99, 9).tobytes())
        )
    assert all(a != b for a, b in zip(*found, strict=True))


def test_the_only_entropy_is_the_operating_systems(monkeypatch):
    monkeypatch.setattr(os, "urandom", lambda size: bytes(size))
    assert normals(8).tobytes() == normals(8).tobytes()


def test_the_keystream_is_chacha20(monkeypatch):
    # RFC 8439, appendix A.1, test vector 1: key, nonce and counter are zero
    monkeypatch.setattr(os, "urandom", lambda size: bytes(size))
    expected = bytes.fromhex("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    assert randomness._words(4).tobytes() == expected
