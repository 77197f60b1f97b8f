"""Batches by length: records of like length stand together, so that little is padding."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_POOL = (
    16  # batches' worth of records that are sorted together: more saves little and shuffles less
)


def shuffled_batches(
    lengths: Sequence[int], batch_size: int, generator: np.random.Generator
) -> list[NDArray[np.intp]]:
    """Return one pass over the records in batches of like length, in random order.

    Args:
        lengths: tokens of each record.
        batch_size: records in a batch; the last may have fewer.
        generator: the pass's own randomness.
    """
    order = generator.permutation(len(lengths))
    sizes = np.asarray(lengths)
    batches: list[NDArray[np.intp]] = []
    for begin in range(0, len(order), batch_size * _POOL):
        pool = order[begin : begin + batch_size * _POOL]
        pool = pool[np.argsort(sizes[pool], kind="stable")]
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def sorted_batches(lengths: Sequence[int], max_tokens: int) -> list[NDArray[np.intp]]:
    """Return all records once, by length, in batches of at most ``max_tokens`` padded tokens.

    For what needs no randomness: evaluation, the frozen layers, microbatches of a private step.
    """
    sizes = np.asarray(lengths)
    batches: list[NDArray[np.intp]] = []
    current: list[int] = []
    for i in np.argsort(sizes, kind="stable"):
        if current and (len(current) + 1) * sizes[i] > max_tokens:
            batches.append(np.asarray(current, dtype=np.intp))
            current = []
        current.append(int(i))
    if current:
        batches.append(np.asarray(current, dtype=np.intp))
    return batches
