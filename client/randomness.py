"""Secret randomness: who is sampled and what noise is added, from a ChaCha20 keystream.

Each draw has its own key from the operating system and forgets it: nothing is ever seeded, stored
or restored, so no noise can be replayed or subtracted. ChaCha20 is RFC 8439's, from
``cryptography``; normals are Box and Muller's (1958), computed in float64.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

_CHUNK = 1 << 16  # normals made at a time, so that what lies between stays in the cache


def _words(count: int) -> NDArray[np.uint64]:
    nonce = bytes(4) + os.urandom(12)  # the first four bytes are the block counter, from 0
    cipher = Cipher(algorithms.ChaCha20(os.urandom(32), nonce), mode=None)
    return np.frombuffer(cipher.encryptor().update(bytes(8 * count)), dtype="<u8")


def normals(count: int) -> NDArray[np.float64]:
    """Return independent standard normals, shape (count,).

    The radius comes from 64 bits: only what lies beyond 9.4 standard deviations, a probability of
    5e-20 per pair, is cut off. Angles have 53 bits.
    """
    found = np.empty(count, dtype=np.float64)
    for begin in range(0, count, _CHUNK):
        part = found[begin : begin + _CHUNK]
        half = (len(part) + 1) // 2
        words = _words(2 * half)
        radius = np.sqrt(-2 * np.log((words[:half].astype(np.float64) + 1) * 2.0**-64))
        angle = (words[half:] >> np.uint64(11)).astype(np.float64) * (2 * np.pi * 2.0**-53)
        np.multiply(radius, np.cos(angle), out=part[:half])
        rest = len(part) - half
        np.multiply(radius[:rest], np.sin(angle[:rest]), out=part[half:])
    return found


class NoiseSource:
    """Standard normals for a known number of steps, drawn on a thread of its own ahead of need.

    NumPy and ``cryptography`` let other threads run meanwhile, so that training does not wait.
    """

    def __init__(self, count: int, steps: int) -> None:
        """Begin to draw; each of ``steps`` draws has ``count`` normals."""
        self._count, self._left = count, steps
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="noise")
        self._next: Future[NDArray[np.float64]] | None = None
        self._begin()

    def draw(self) -> NDArray[np.float64]:
        """Return the next step's normals, shape (count,); no draw is ever returned twice.

        Raises:
            IndexError: all draws were taken.
        """
        if self._next is None:
            raise IndexError("all noise of this round was drawn")
        ready, self._next = self._next, None
        self._begin()
        return ready.result()

    def _begin(self) -> None:
        if self._left > 0:
            self._left -= 1
            self._next = self._pool.submit(normals, self._count)

    def __enter__(self) -> "NoiseSource":
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop drawing."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def poisson_sample(count: int, sampling_rate: float) -> NDArray[np.intp]:
    """Return which of ``count`` units are in a step: each with ``sampling_rate``, independently."""
    threshold = np.uint64(round(sampling_rate * 2**53))
    return np.flatnonzero((_words(count) >> np.uint64(11)) < threshold)


def choose(count: int, most: int) -> NDArray[np.intp]:
    """Return all of ``count`` things, or ``most`` of them chosen at random without replacement."""
    if count <= most:
        return np.arange(count)
    return np.argsort(_words(count), kind="stable")[:most]
