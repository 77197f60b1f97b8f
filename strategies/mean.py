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


# A double of 1.5·2^52 plus a value under 2^51 has the value, rounded to an integer as rint rounds,
# in its low bits: half the passes of rounding and converting (a trick as old as IEEE 754).
_MAGIC = 1.5 * 2.0**52
_MAGIC_BITS = int(np.float64(_MAGIC).view(np.int64))
_FAST = 2.0**50


@dataclass(frozen=True, slots=True)
class Accumulator:
    """The sum so far: fixed-point values by name, modulo 2^64."""

    sums: Mapping[str, NDArray[np.int64]]
    added: int = 0
    # how many updates; each value has ``_MAGIC_BITS`` so many times too much


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
    scale = share * 2.0**FRACTION_BITS
    own, fixed = np.empty(BLOCK, np.float32), np.empty(BLOCK)  # in cache, whatever the adapter
    for name, delta in update.items():
        for total, block in zip(blocks(sums[name]), blocks(delta), strict=True):
            values, scaled = own[: block.size], fixed[: block.size]
            np.copyto(values, block)  # which need not be aligned
            is_small = float(np.dot(values, values)) * scale**2 < _FAST**2
            np.copyto(scaled, values)
            np.multiply(scaled, scale, out=scaled)
            if is_small:
                np.add(scaled, _MAGIC, out=scaled)
                np.add(total, scaled.view(np.int64), out=total)
            else:
                whole = np.rint(scaled, out=scaled).astype(np.int64)
                whole += _MAGIC_BITS
                np.add(total, whole, out=total)
    return Accumulator(sums, accumulator.added + 1)


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
    too_much = np.array([accumulator.added * _MAGIC_BITS % 2**64], np.uint64).view(np.int64)
    whole, values = np.empty(BLOCK, np.int64), np.empty(BLOCK)
    for name, total in accumulator.sums.items():
        found[name] = np.empty(total.shape, np.float32)
        for into, block in zip(blocks(found[name]), blocks(total), strict=True):
            one, other = whole[: block.size], values[: block.size]
            np.subtract(block, too_much, out=one)
            np.copyto(other, one)
            np.multiply(other, scale, out=other)
            np.copyto(into, other, casting="same_kind")
    return found
