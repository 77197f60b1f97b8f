"""Public randomness: the same bytes everywhere, and the distribution that it claims."""

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, chi2, kstest

from huizhen.strategies.public_random import orthonormal_rows, uniform


def f32(values):
    return np.array(values, np.float32)


# A change of these bytes changes the A of every study: it needs a new purpose string instead.
ORTHONORMAL = "57920d17ef3fd2e207e7c5c7642ba1f159ebbf2117c5171f074977506ee8e785"
UNIFORM = "32bde42b756d1ec0ccfe3fdeb58b59f8d64564ee217d37cc3517038680d45317"


def digest(array):
    return hashlib.sha256(array.tobytes()).hexdigest()


def test_the_bytes_are_the_golden_ones():
    assert digest(orthonormal_rows(7, "layer.0.query.lora_A", (8, 64))) == ORTHONORMAL
    assert digest(uniform(7, "layer.0.query.lora_A", (8, 64), 0.125)) == UNIFORM


def words(text, count):
    data = hashlib.shake_256(text.encode()).digest(2 * count)
    return [data[2 * i] + 256 * data[2 * i + 1] for i in range(count)]


def scalar_orthonormal(seed, name, rank, width):
    """Gram–Schmidt twice, in plain floats."""
    drawn = words(f"huizhen/orthonormal/{name}/{seed}", 16 * rank * width)
    rows: list[list[float]] = []
    for i in range(rank):
        starts = [16 * (i * width + k) for k in range(width)]
        row = [float(sum(drawn[at : at + 16]) - 8 * 65535) for at in starts]
        for _ in range(2):
            for other in rows:
                along = math.fsum(a * b for a, b in zip(row, other, strict=True))
                row = [a - along * b for a, b in zip(row, other, strict=True)]
            norm = math.sqrt(math.fsum(a * a for a in row))
            row = [a / norm for a in row]
        rows.append(row)
    return f32(rows)


seeds, names = st.integers(0, 2**53 - 1), st.text(max_size=10).filter(str.isprintable)


@settings(max_examples=50)
@given(seeds, names, st.integers(1, 5), st.integers(0, 6))
def test_each_value_follows_the_scalar_algorithm_to_the_last_bit(seed, name, rank, more):
    found = orthonormal_rows(seed, name, (rank, rank + more))
    assert found.tobytes() == scalar_orthonormal(seed, name, rank, rank + more).tobytes()
    drawn = words(f"huizhen/uniform/{name}/{seed}", rank * rank)
    expected = f32([(2 * word + 1 - 65536) * 0.3 / 65536 for word in drawn])
    flat = uniform(seed, name, (rank, rank), 0.3).reshape(-1)
    assert flat == pytest.approx(expected, rel=1e-6)


@settings(max_examples=30)
@given(seeds, names, st.integers(1, 12), st.integers(0, 60))
def test_the_rows_are_orthonormal(seed, name, rank, more):
    A = orthonormal_rows(seed, name, (rank, rank + more))
    assert A.shape == (rank, rank + more)
    assert A.dtype == np.float32
    product = A.astype(np.float64) @ A.T.astype(np.float64)
    assert np.abs(product - np.eye(rank)).max() < 1e-6


def test_the_rows_of_a_real_layer_are_orthonormal():
    A = orthonormal_rows(1, "encoder.layer.5.attention.self.query.lora_A", (16, 384))
    A64 = A.astype(np.float64)
    assert np.abs(A64 @ A64.T - np.eye(16)).max() < 1e-6


def test_other_names_seeds_and_purposes_give_other_values():
    arrays = [
        orthonormal_rows(1, "a", (2, 4)),
        orthonormal_rows(2, "a", (2, 4)),
        orthonormal_rows(1, "b", (2, 4)),
        orthonormal_rows(11, "a", (2, 4)),
        orthonormal_rows(1, "a/1", (2, 4)),
        orthonormal_rows(1, "uniform/a", (2, 4)),
        uniform(1, "a", (2, 4), 1.0),
        uniform(2, "a", (2, 4), 1.0),
        uniform(1, "b", (2, 4), 1.0),
        uniform(1, "orthonormal/a", (2, 4), 1.0),
    ]
    assert len({digest(array) for array in arrays}) == len(arrays)


@pytest.mark.parametrize("shape", [(2, 1), (9, 8)])
def test_a_rank_over_the_width_is_refused(shape):
    with pytest.raises(ValueError, match=f"rank is {shape[0]}, the layer is only {shape[1]} wide"):
        orthonormal_rows(1, "a", shape)


def test_a_rank_of_the_whole_width_is_a_rotation():
    A = orthonormal_rows(3, "a", (8, 8)).astype(np.float64)
    assert abs(abs(np.linalg.det(A)) - 1) < 1e-6


@pytest.mark.parametrize("bound", [1.0, 0.051, 1e-3, 7.0])
def test_uniform_values_lie_within_the_bound_on_a_grid(bound):
    values = uniform(5, "a", (300, 100), bound)
    assert values.shape == (300, 100)
    assert values.dtype == np.float32
    assert 0.999 * bound < np.abs(values).max() < bound
    assert 0.999 * bound < -values.min()
    steps = (values.astype(np.float64) * 65536 / bound - 1) / 2
    assert np.abs(steps - np.rint(steps)).max() < 0.01
    assert len(np.unique(values)) > 20_000  # 2^16 · (1 − e^(−30000/65536)) = 24,100 expected


def test_uniform_values_are_uniform():
    # 64 cells of n/64: Σ(o−e)²/e ~ χ²_63, and Σu ~ N(0, n/3). Each wrong once in 5·10⁸.
    n = 64_000
    values = uniform(9, "moments", (n,), 1.0).astype(np.float64)
    counts = np.histogram(values, bins=64, range=(-1, 1))[0]
    low, high = chi2.ppf([1e-9, 1 - 1e-9], 63)
    assert low < ((counts - n / 64) ** 2 / (n / 64)).sum() < high
    assert abs(values.sum()) < 6.0 * math.sqrt(n / 3)
    # Neighbours are independent: Σ u_i u_{i+1} ~ N(0, n/9).
    assert abs((values[1:] * values[:-1]).sum()) < 6.0 * math.sqrt(n / 9)


def test_the_row_space_is_close_to_uniform():
    # The square of a uniform unit vector of R^k along any unit vector is Beta(1/2, (k−1)/2).
    # Kolmogorov–Smirnov on n independent draws: each right one is refused once in 10⁹.
    n, k = 1500, 12
    draws = np.stack([orthonormal_rows(seed, "a", (2, k)) for seed in range(n)]).astype(np.float64)
    diagonal = np.full(k, 1 / math.sqrt(k))
    alternating = diagonal * np.resize([1, -1], k)
    for row in (0, 1):
        for along in (np.eye(k)[0], np.eye(k)[-1], diagonal, alternating):
            squares = (draws[:, row] @ along) ** 2
            assert kstest(squares, beta(0.5, (k - 1) / 2).cdf).pvalue > 1e-9
        # Signs are fair: Binomial(n·k, 1/2) within 6 standard deviations, wrong once in 5·10⁸.
        positive = int((draws[:, row] > 0).sum())
        assert abs(positive - n * k / 2) < 6 * math.sqrt(n * k / 4)
