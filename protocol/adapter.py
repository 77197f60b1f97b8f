"""Adapters and updates: named float32 arrays in one fixed order.

A name is ``<base module path>.lora_A``, ``<base module path>.lora_B`` or ``head.<name>``; names are
sorted by their UTF-8 bytes, so that every party walks them in the same order.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Tensors = Mapping[str, Array]
Shapes = Mapping[str, tuple[int, ...]]


MAX_VALUE = 2.0**20  # of a number in an update: what sums in fixed point take
BLOCK = 1 << 16
# numbers that are worked on at a time: what is made of them stays in a processor's cache


def in_order(tensors: Tensors) -> dict[str, Array]:
    """Return the tensors as contiguous little-endian float32, names sorted by their UTF-8."""
    names = sorted(tensors, key=lambda name: name.encode())
    return {name: np.asarray(tensors[name], dtype="<f4", order="C") for name in names}


def shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor, in order."""
    return {name: array.shape for name, array in in_order(tensors).items()}


def blocks(tensor: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Give a contiguous tensor's values in flat views: what is made of each of them stays small."""
    flat = tensor.reshape(-1)
    return (flat[i : i + BLOCK] for i in range(0, flat.size, BLOCK))


def difference(after: Tensors, before: Tensors) -> dict[str, Array]:
    """Return ``after - before`` for the names in ``after``: an update from two adapters."""
    return {name: after[name] - before[name] for name in in_order(after)}


def is_head(name: str) -> bool:
    """Whether the tensor belongs to the task's head and not to LoRA."""
    return name.startswith("head.")
