"""Products of LoRA factors without ever forming a d × k matrix.

A weighted sum of products Σ p_i B_i A_i is one product of stacked factors, [p_1 B_1 … p_N B_N]
times [A_1; …; A_N], of rank R = Σ r_i at most. With Q_1 R_1 the QR factorisation of the first and
Q_2 R_2 of the second transposed, the singular values of the product are those of the small
R_1·R_2ᵀ: O((d + k) R²) work and O((d + k) R) memory. In float64, rounded once at the end.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from huizhen.protocol.adapter import Array

Matrix = NDArray[np.float64]
Factor = Array | Matrix
Term = tuple[float, Factor, Factor]
# weight, B_i (d × r_i) and A_i (r_i × k)


def stack(terms: Sequence[Term]) -> tuple[Matrix, Matrix]:
    """Return one pair of factors whose product is the weighted sum of the products.

    Args:
        terms: weights and factors; ranks may differ.
    """
    left = np.hstack([weight * np.asarray(B, np.float64) for weight, B, _ in terms])
    right = np.vstack([np.asarray(A, np.float64) for _, _, A in terms])
    return left, right


def svd(left: Matrix, right: Matrix, rank: int) -> tuple[Matrix, Matrix, Matrix]:
    """Return the singular value decomposition of left · right, cut to ``rank``.

    It is the nearest matrix of that rank (Eckart and Young 1936). The largest entry of each left
    vector is positive; which that is may hang on rounding where two are as large.

    Args:
        left: d × R.
        right: R × k.
        rank: at most min(d, R, k).

    Returns:
        U (d × rank), the singular values (rank) and Vᵀ (rank × k).
    """
    outer, upper = np.linalg.qr(left)
    inner, lower = np.linalg.qr(right.T)
    u, values, vt = np.linalg.svd(upper @ lower.T, full_matrices=False)
    left_vectors, right_vectors = outer @ u[:, :rank], vt[:rank] @ inner.T
    largest = np.abs(left_vectors).argmax(axis=0)
    signs = np.where(left_vectors[largest, np.arange(rank)] < 0, -1.0, 1.0)
    return left_vectors * signs, values[:rank], right_vectors * signs[:, None]


def norm(left: Factor, right: Factor) -> float:
    """Return the Frobenius norm of left · right, from its R × R Gram matrices."""
    first, second = np.asarray(left, np.float64), np.asarray(right, np.float64)
    squared = float(((first.T @ first) * (second @ second.T)).sum())
    return math.sqrt(max(squared, 0.0))


def f32(values: Factor) -> Array:
    """Return values as the protocol has them."""
    return np.ascontiguousarray(values, dtype="<f4")
