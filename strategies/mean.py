"""The weighted mean of updates, in int64 fixed point: any order of arrival gives the same bytes.

Each value is rounded to a multiple of 2^-36 after it is multiplied by its site's share w_i / Σw
over *all* sites of the study, which is public before the round; the sums are of integers, so
addition is associative, and it is the arithmetic that secure sums use. With |Δ| ≤ 2^20 and shares
that sum to 1 no sum leaves 2^57. The rounding of n sites adds at most n·2^-37 to a sum, and as much
over the shares of those present to a mean: a study has no share under 2^-14.

Memory is one accumulator of the adapter's size, whatever the number of sites.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from huizhen.protocol.adapter import BLOCK, MAX_VALUE, Tensors, blocks, in_order, shapes_of
from huizhen.protocol.errors import AggregationError

FRACTION_BITS = 36


@dataclass(frozen=True, slots=True)
class Accumulator:
    """The sum so far: fixed-point values by name."""

    sums: Mapping[str, NDArray[np.int64]]


def start() -> Accumulator:
    """Return the empty sum."""
    return Accumulator({})


def fits(update: Tensors) -> bool:
    """Whether all values of an update are finite and at most 2^20, as the sum needs them."""
    return all(
        bool((np.abs(block) <= MAX_VALUE).all())
        for delta in update.values()
        for block in blocks(delta)
    )


def add(accumulator: Accumulator, update: Tensors, share: float) -> Accumulator:
    """Return the sum with one more update; it takes over the arrays of the sum so far.

    Args:
        accumulator: the sum so far, of the same tensors.
        update: Δ_i of one site that ``fits``: other values would become any number.
        share: w_i / Σw over all sites of the study.

    Raises:
        AggregationError: the tensors differ, or the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise AggregationError(f"share is {share}, expected over 0 and at most 1")
    update = in_order(update)
    shapes = {name: total.shape for name, total in accumulator.sums.items()}
    if shapes and shapes != shapes_of(update):
        raise AggregationError("update has other tensors than the sum")
    sums = dict(accumulator.sums) or {
        name: np.zeros(delta.shape, np.int64) for name, delta in update.items()
    }
    fixed, whole = np.empty(BLOCK), np.empty(BLOCK, np.int64)  # in cache, whatever the adapter
    for name, delta in update.items():
        for total, block in zip(blocks(sums[name]), blocks(delta), strict=True):
            scaled, rounded = fixed[: block.size], whole[: block.size]
            np.multiply(block, share * 2.0**FRACTION_BITS, out=scaled, dtype=np.float64)
            np.copyto(rounded, np.rint(scaled, out=scaled), casting="unsafe")
            np.add(total, rounded, out=total)
    return Accumulator(sums)


def finish(accumulator: Accumulator, share: float) -> Tensors:
    """Return the weighted mean of the updates that were added.

    Args:
        accumulator: the sum.
        share: the sites' shares, summed in the study's order of sites; 1 if all took part.

    Raises:
        AggregationError: nothing was added.
    """
    if not accumulator.sums:
        raise AggregationError("no update was counted, expected at least one")
    scale, found = 2.0**-FRACTION_BITS / share, {}
    for name, total in accumulator.sums.items():
        found[name] = np.empty(total.shape, np.float32)
        for into, block in zip(blocks(found[name]), blocks(total), strict=True):
            into[:] = block * scale
    return found
