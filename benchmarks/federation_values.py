"""The adapter that the federation benchmarks carry, the same here and with stock Flower.

Eight tensors of equal size, so that with ten million values each is one of Flower's chunks of 5 MiB
and stock Flower, which sends every tensor by itself, is not slowed by many small ones. Values are
drawn anew for each message: Flower stores equal objects once, and equal messages would cost
nothing.
"""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TENSORS = 8
LARGE = 10_000_000
# float32 values: 40 MB
SMALL = 1_000
MIB = float(1 << 20)
_SCALE = np.float32(2e-3)


def tensor_shapes(values: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors that hold so many values together.

    Raises:
        ValueError: the number cannot be divided by eight.
    """
    if values < TENSORS or values % TENSORS:
        raise ValueError(f"values is {values}, expected a multiple of {TENSORS}")
    return {f"layers.{i}.lora_B": (values // TENSORS, 1) for i in range(TENSORS)}


def random_tensors(values: int) -> dict[str, NDArray[np.float32]]:
    """Return tensors of these shapes with values in [-0.001, 0.001), others at each call."""
    generator = np.random.default_rng()
    found = {}
    for name, shape in tensor_shapes(values).items():
        drawn = generator.random(shape, dtype=np.float32)
        drawn -= np.float32(0.5)
        drawn *= _SCALE
        found[name] = drawn
    return found


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with its range, in seconds."""

    median: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread":
        """Return the spread of at least one time."""
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

    def __str__(self) -> str:
        """Return the median and, in brackets, the range."""
        return f"{self.median:.2f} s ({self.least:.2f} to {self.most:.2f}, n = {self.count})"


def between(moments: Sequence[float]) -> list[float]:
    """Return the times between successive moments.

    Raises:
        ValueError: there are fewer than two.
    """
    if len(moments) < 2:
        raise ValueError(f"there are {len(moments)} moments, expected at least 2: run more rounds")
    return [after - before for before, after in itertools.pairwise(moments)]


def status_bytes(process: int | str, key: str) -> int:
    """Return a field of ``/proc/PROCESS/status`` in bytes: VmRSS is now, VmHWM the peak so far."""
    lines = Path(f"/proc/{process}/status").read_text("ascii", "replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
