"""Secret randomness: who is sampled and what noise is added, from a ChaCha20 keystream.

Each draw has its own key from the operating system and forgets it: nothing is ever seeded, stored
or restored, so no noise can be replayed or subtracted. ChaCha20 is RFC 8439's, from
``cryptography``; normals are Box and Muller's (1958), computed in float64 from 53-bit uniforms.
"""

import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray


def _words(count: int) -> NDArray[np.uint64]:
    cipher = Cipher(algorithms.ChaCha20(os.urandom(32), os.urandom(16)), mode=None)
    return np.frombuffer(cipher.encryptor().update(bytes(8 * count)), dtype="<u8")


def normals(count: int) -> NDArray[np.float64]:
    """Return independent standard normals, shape (count,)."""
    half = (count + 1) // 2
    words = _words(2 * half) >> np.uint64(11)
    radius = np.sqrt(-2 * np.log((words[:half].astype(np.float64) + 1) * 2.0**-53))
    angle = words[half:].astype(np.float64) * (2 * np.pi * 2.0**-53)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def poisson_sample(count: int, sampling_rate: float) -> NDArray[np.intp]:
    """Return which of ``count`` units are in a step: each with ``sampling_rate``, independently."""
    threshold = np.uint64(round(sampling_rate * 2**53))
    return np.flatnonzero((_words(count) >> np.uint64(11)) < threshold)


def choose(count: int, most: int) -> NDArray[np.intp]:
    """Return all of ``count`` things, or ``most`` of them chosen at random without replacement."""
    if count <= most:
        return np.arange(count)
    return np.argsort(_words(count), kind="stable")[:most]
