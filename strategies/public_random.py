"""Public randomness that every party derives alike, to the last bit, from the study's seed.

Bits come from SHAKE-256 (FIPS 202) over seed, purpose and tensor name; a normal is approximated by
a sum of sixteen uniform 16-bit integers, which is exact arithmetic; inner products are rounded once
(``math.fsum``). No libm, BLAS or SIMD order enters, so two hospitals with different processors hold
the same bytes. None of this may ever be used for noise.
"""

import functools
import math

import numpy as np

from huizhen.protocol.adapter import Array
from huizhen.protocol.public_bits import public_words


def uniform(seed: int, name: str, shape: tuple[int, ...], bound: float) -> Array:
    """Return values uniform on a grid of 2^16 points in (-bound, bound)."""
    words = public_words(seed, f"uniform/{name}", math.prod(shape)).astype(np.float64)
    return ((words * 2 + 1 - 2**16) * (bound / 2**16)).astype(np.float32).reshape(shape)


@functools.lru_cache(maxsize=1024)
def orthonormal_rows(seed: int, name: str, shape: tuple[int, int]) -> Array:
    """Return A (r × k) with A·Aᵀ = I, its row space close to uniform among r-dimensional ones.

    Gram–Schmidt, done twice, on rows of near-normal integers (Giraud et al. 2005: twice is enough).

    Raises:
        ValueError: r > k, no k-dimensional space holds r orthonormal rows.
    """
    rank, width = shape
    if rank > width:
        raise ValueError(f"rank is {rank}, the layer is only {width} wide")
    words = public_words(seed, f"orthonormal/{name}", 16 * rank * width).astype(np.int64)
    rows = (words.reshape(rank, width, 16).sum(axis=2) - 8 * (2**16 - 1)).astype(np.float64)
    for i in range(rank):
        for _ in range(2):
            for j in range(i):
                rows[i] -= math.fsum(rows[i] * rows[j]) * rows[j]
            rows[i] /= math.sqrt(math.fsum(rows[i] * rows[i]))
    found: Array = rows.astype(np.float32)
    found.flags.writeable = False  # it is shared between calls
    return found
