"""Bits that every party derives alike from the study's public seed; never for noise."""

import hashlib

import numpy as np
from numpy.typing import NDArray


def public_words(seed: int, purpose: str, count: int) -> NDArray[np.uint16]:
    """Return so many 16-bit integers from SHAKE-256 (FIPS 202) over seed and purpose."""
    digest = hashlib.shake_256(f"huizhen/{purpose}/{seed}".encode()).digest(2 * count)
    return np.frombuffer(digest, dtype="<u2")
