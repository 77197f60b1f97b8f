"""The secret randomness has the distributions that the privacy proof assumes.

Every bound comes from a false-alarm rate of 1e-9 (both sides together), so a right implementation
fails once in 10⁹ runs of a test.
"""

import math
import os
import random
import threading

import numpy as np
import pytest
import torch
from scipy.stats import binom, chi2, kstest, norm

from huizhen.client import randomness
from huizhen.client.randomness import _CHUNK, NoiseSource, choose, normals, poisson_sample

FALSE_ALARM = 1e-9
BOUNDS = [FALSE_ALARM / 2, 1 - FALSE_ALARM / 2]
DRAWS = 2_000_001  # odd: the last of a pair is dropped


@pytest.fixture(scope="module")
def pairs():
    """Both halves of each Box-Muller pair, shape (2, 64 · 32,768): 4.2 million normals."""
    chunks = normals(64 * _CHUNK).reshape(64, 2, _CHUNK // 2)
    return np.ascontiguousarray(chunks.transpose(1, 0, 2)).reshape(2, -1)


def evenly_filled(cells, count):
    """Return whether whole numbers below ``count`` are as frequent as uniform ones, by χ²."""
    found = np.bincount(cells.astype(np.int64), minlength=count)
    expected = len(cells) / count
    return ((found - expected) ** 2).sum() / expected < chi2.isf(FALSE_ALARM, count - 1)


def test_normals_have_the_moments_of_the_standard_normal():
    z = normals(DRAWS)
    low, high = chi2.ppf(BOUNDS, DRAWS)
    assert low < (z**2).sum() < high
    limit = norm.isf(FALSE_ALARM / 2)
    assert abs(z.sum()) < limit * np.sqrt(DRAWS)
    # E z⁴ = 3, Var z⁴ = 96: a sum of so many is close enough to a normal for this bound's width
    assert abs((z**4).sum() - 3 * DRAWS) < 1.5 * limit * np.sqrt(96 * DRAWS)


def test_normals_follow_the_normal_distribution(pairs):
    for half in pairs:
        assert kstest(half, "norm").pvalue > FALSE_ALARM
        assert evenly_filled(norm.cdf(half) * 1000, 1000)


@pytest.mark.parametrize("beyond", [3, 4, 5])
def test_the_tails_are_as_heavy_as_they_must_be(pairs, beyond):
    low, high = binom.ppf([FALSE_ALARM / 4, 1 - FALSE_ALARM / 4], pairs.size, norm.sf(beyond))
    assert low <= (pairs > beyond).sum() <= high
    assert low <= (pairs < -beyond).sum() <= high


def test_the_two_normals_of_a_pair_are_independent(pairs):
    """Of independent normals the angle is uniform, whatever the radius, and e^(-r²/2) is too."""
    angle = (np.arctan2(pairs[1], pairs[0]) / (2 * np.pi)) % 1
    radius = np.exp(-(pairs**2).sum(axis=0) / 2)
    assert evenly_filled(angle * 1000, 1000)
    assert evenly_filled(radius * 1000, 1000)
    assert evenly_filled(np.floor(radius * 40) * 40 + np.floor(angle * 40), 1600)
    cells = np.floor(norm.cdf(pairs) * 40)
    assert evenly_filled(cells[0] * 40 + cells[1], 1600)


@pytest.mark.parametrize("lag", [1, 2, 8, _CHUNK // 2, _CHUNK])
def test_normals_are_independent_of_those_before(lag):
    z = normals(DRAWS)
    limit = norm.isf(FALSE_ALARM / 8) * np.sqrt(DRAWS - lag)
    # a product of independent normals has variance 1, one of two squares less their means 4
    assert abs((z[lag:] * z[:-lag]).sum()) < limit
    assert abs(((z[lag:] ** 2 - 1) * (z[:-lag] ** 2 - 1)).sum()) < 2 * limit


def test_pb_8_no_normals_come_twice(pairs):
    """By chance two of 4.2 million doubles are equal with less than 1e-3, thrice with 1e-9."""
    assert len(np.unique(pairs)) > pairs.size - 3


def test_normals_are_those_of_box_and_muller(monkeypatch):
    words = np.random.default_rng(2).integers(0, 2**64, 6, dtype=np.uint64)
    monkeypatch.setattr(randomness, "_words", lambda count: words[:count])
    expected = []
    for turn in (math.cos, math.sin):
        for radius, angle in zip(words[:3].tolist(), words[3:].tolist(), strict=True):
            length = math.sqrt(-2 * math.log((radius + 1) / 2**64))
            expected.append(length * turn(2 * math.pi * (angle >> 11) / 2**53))
    assert normals(6).tolist() == pytest.approx(expected, rel=1e-12)


def test_all_normals_are_finite_even_for_extreme_words(monkeypatch):
    extremes = np.array([0, 2**64 - 1], dtype=np.uint64)
    monkeypatch.setattr(randomness, "_words", lambda count: np.resize(extremes, count))
    assert np.isfinite(normals(4)).all()


@pytest.mark.parametrize("count", [0, 1, 2, 7, _CHUNK, _CHUNK + 1, 3 * _CHUNK - 1])
def test_as_many_normals_come_as_are_asked_for(count):
    z = normals(count)
    assert z.shape == (count,)
    assert np.isfinite(z).all()
    assert len(np.unique(z)) >= count - 1


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


@pytest.mark.parametrize("rate", [1e-9, 0.2, 0.75])
def test_a_unit_is_sampled_where_its_53_bits_are_below_the_rate(monkeypatch, rate):
    threshold = round(rate * 2**53)
    words = np.array([threshold - 1, threshold, 0, 2**53 - 1], dtype=np.uint64) << np.uint64(11)
    monkeypatch.setattr(randomness, "_words", lambda count: words | np.uint64(2**11 - 1))
    assert poisson_sample(4, rate).tolist() == [0, 2]


@pytest.fixture
def keys(monkeypatch):
    """Every key and nonce that was asked of the operating system."""
    found: list[bytes] = []
    urandom = os.urandom

    def noted(size):
        found.append(urandom(size))
        return found[-1]

    monkeypatch.setattr(os, "urandom", noted)
    return found


def test_every_draw_has_a_key_of_its_own(keys):
    normals(5 * _CHUNK)
    poisson_sample(9, 0.5)
    poisson_sample(9, 0.5)
    choose(9, 3)
    with NoiseSource(4, 6) as noise:
        for _ in range(6):
            noise.draw()
    assert [len(key) for key in keys] == [12, 32] * (5 + 2 + 1 + 6)
    assert len(set(keys)) == len(keys)


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


def test_a_noise_source_gives_its_draws_and_then_no_more():
    with NoiseSource(5, 3) as noise:
        found = [noise.draw() for _ in range(3)]
        for _ in range(2):
            with pytest.raises(IndexError, match="all noise of this round was drawn"):
                noise.draw()
    assert all(one.shape == (5,) for one in found)
    assert len(np.unique(np.concatenate(found))) == 15


def test_what_was_drawn_is_kept_nowhere():
    with NoiseSource(5, 2) as noise:
        first = noise.draw()
        held = [value for value in vars(noise).values() if isinstance(value, np.ndarray)]
        assert held == []
        first[:] = 0
        assert noise.draw().all()


def test_noise_is_drawn_on_another_thread_one_step_ahead(monkeypatch):
    threads: list[str] = []
    drawn = threading.Semaphore(0)

    def noted(count):
        threads.append(threading.current_thread().name)
        drawn.release()
        return np.full(count, float(len(threads)))

    monkeypatch.setattr(randomness, "normals", noted)
    with NoiseSource(1, 3) as noise:
        for expected in (1, 2, 3):
            assert drawn.acquire(timeout=10)  # drawn before it is asked for
            assert len(threads) == expected
            assert noise.draw() == expected
        assert not drawn.acquire(timeout=0.05)
    assert len(threads) == 3
    assert all(name.startswith("noise") for name in threads)
    assert not any(thread.name.startswith("noise") for thread in threading.enumerate())


def test_noise_that_cannot_be_drawn_is_an_error_where_it_is_asked_for(monkeypatch):
    def fail(count):
        raise OSError("no entropy")

    monkeypatch.setattr(randomness, "normals", fail)
    with NoiseSource(1, 2) as noise, pytest.raises(OSError, match="no entropy"):
        noise.draw()


def test_no_random_number_of_the_system_stops_a_large_draw(monkeypatch):
    """ChaCha20's block counter must begin at 0: at its end the cipher refuses to go on."""
    monkeypatch.setattr(os, "urandom", lambda count: b"\xff" * count)
    assert len(normals(100_000)) == 100_000
    poisson_sample(100_000, 0.5)
