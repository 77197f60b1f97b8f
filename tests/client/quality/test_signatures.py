"""Estimated similarity against the exact one, and against datasketch's."""

import numpy as np
import pytest
from datasketch import MinHash  # type: ignore[import-untyped]  # it ships no types
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from huizhen.client.quality import signatures
from huizhen.client.quality.signatures import PLACES, edits, estimates, jaccard, shingles

ALPHABET = [chr(0x4E00 + 7 * n) for n in range(700)]


def text(draw, length):
    return "".join(draw.choice(ALPHABET, length))


def changed(draw, base, count):
    letters = list(base)
    for at in draw.choice(len(letters), count, replace=False):
        letters[at] = draw.choice(ALPHABET)
    return "".join(letters)


def exact(one, other):
    """The slow twin: shingles as strings."""
    a = {one[i : i + 5] for i in range(len(one) - 4)}
    b = {other[i : i + 5] for i in range(len(other) - 4)}
    return len(a & b) / len(a | b) if a and b else 0.0


def estimate(one, other):
    signed = signatures.signatures([one, other])
    return float(estimates(signed[0], signed[1]))


@given(st.text(max_size=60), st.text(max_size=60))
def test_the_exact_similarity_is_that_of_the_sets_of_shingles(one, other):
    assert jaccard(shingles(one), shingles(other)) == pytest.approx(exact(one, other))


def test_two_small_edits_in_forty_characters_leave_half():
    draw = np.random.default_rng(1)
    one = text(draw, 40)
    two = list(one)
    two[12] = two[27] = "！"
    assert jaccard(shingles(one), shingles("".join(two))) == pytest.approx(26 / 46)


@pytest.mark.parametrize("count", [0, 10, 40, 100, 400])
def test_estimates_agree_with_the_exact_and_with_datasketch(count):
    """256 places are 256 draws at most: each estimate lies within its binomial range.

    Two-sided at 1e-7 each. One permutation's draws are without replacement, hence no wider.
    """
    draw = np.random.default_rng(count)
    for _ in range(20):
        one = text(draw, 3000)
        other = changed(draw, one, count)
        true = exact(one, other)
        low, high = binom.ppf([1e-7, 1 - 1e-7], PLACES, true) / PLACES
        theirs = [MinHash(num_perm=PLACES, seed=3) for _ in range(2)]
        for sketch, whole in zip(theirs, (one, other), strict=True):
            sketch.update_batch([whole[i : i + 5].encode() for i in range(len(whole) - 4)])
        assert low <= estimate(one, other) <= high
        assert low <= theirs[0].jaccard(theirs[1]) <= high


@pytest.mark.parametrize("length", [60, 330, 1200])
def test_estimates_are_unbiased_also_for_texts_with_fewer_shingles_than_places(length):
    """The mean over 200 pairs; a standard deviation of 0.1 a pair is more than any has."""
    draw = np.random.default_rng(length)
    differences = []
    for _ in range(200):
        one = text(draw, length)
        other = changed(draw, one, length // 20)
        differences.append(estimate(one, other) - exact(one, other))
    assert abs(np.mean(differences)) < 5 * 0.1 / np.sqrt(200)
    assert np.std(differences) < 0.1


def test_a_signature_does_not_depend_on_the_batch():
    draw = np.random.default_rng(3)
    texts = [text(draw, length) for length in (0, 3, 5, 6, 50, 700, 4, 128)]
    together = signatures.signatures(texts)
    assert together.shape == (len(texts), PLACES)
    for row, one in zip(together, texts, strict=True):
        assert (row == signatures.signatures([one])[0]).all()
    assert not together[0].any()
    assert signatures.signatures([]).shape == (0, PLACES)


@given(st.lists(st.text(max_size=40), max_size=5))
def test_any_text_has_a_signature(texts):
    assert signatures.signatures(texts).dtype == np.uint16


@given(st.text("ab", max_size=12), st.text("ab", max_size=12), st.integers(0, 12))
def test_edits_are_those_of_the_whole_table(one, other, most):
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        above, row = row, [i]
        for j, b in enumerate(other, 1):
            row.append(min(above[j - 1] + (a != b), above[j] + 1, row[j - 1] + 1))
    assert edits(one, other, most) == min(row[-1], most + 1)
