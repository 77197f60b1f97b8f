"""What strategies share that work on each site's factors."""

from collections.abc import Sequence

import numpy as np

from huizhen.protocol.adapter import Array, Shapes, Tensors
from huizhen.protocol.errors import AggregationError
from huizhen.strategies.base import MERGED_A, MERGED_B, A, B, Given, modules, pair
from huizhen.strategies.products import Term, f32, stack


def in_turn(given: Sequence[Given]) -> list[Given]:
    """Return the updates in the order of their sites' names, whoever came first.

    Raises:
        AggregationError: there is none.
    """
    if not given:
        raise AggregationError("no update was counted, expected at least one")
    return sorted(given, key=lambda one: one.site.encode())


def factors(x: Tensors, given: Sequence[Given], module: str) -> list[Term]:
    """Return each site's share and its factors after training: what it held, plus its update.

    A site of rank r_i held the first r_i columns of B and rows of A.

    Raises:
        AggregationError: an update does not fit the adapter.
    """
    found: list[Term] = []
    for one in given:
        whole_left, whole_right = pair(x, module)
        delta_left, delta_right = one.update.get(module + B), one.update.get(module + A)
        if delta_left is None or delta_right is None:
            raise AggregationError(f"update of site {one.site!r} lacks a factor of {module!r}")
        rank = delta_left.shape[-1]
        left, right = whole_left[:, :rank], whole_right[:rank]
        if (delta_left.shape, delta_right.shape) != (left.shape, right.shape):
            raise AggregationError(
                f"update of site {one.site!r} has factors {delta_left.shape} and "
                f"{delta_right.shape} of {module!r}, the adapter has {whole_left.shape} and "
                f"{whole_right.shape}"
            )
        # float32, as the site itself added them
        own = (left + delta_left).astype(np.float64), (right + delta_right).astype(np.float64)
        found.append((one.share, *own))
    return found


def others(x: Tensors, given: Sequence[Given]) -> dict[str, Array]:
    """Return all tensors that are no factors, the trained ones plus the weighted mean update.

    Raises:
        AggregationError: an update does not fit the adapter.
    """
    found = {name: value for name, value in x.items() if not name.endswith((A, B))}
    for name in (name for name in given[0].update if not name.endswith((A, B))):
        total = np.zeros(found[name].shape if name in found else (), np.float64)
        for one in given:
            delta = one.update.get(name)
            if delta is None or delta.shape != total.shape:
                raise AggregationError(f"update of site {one.site!r} does not fit {name!r}")
            total += one.share * delta.astype(np.float64)
        found[name] = found[name] + total.astype(np.float32)
    return found


def rank_after(rounds: int, added: int, shapes: Shapes, module: str) -> int:
    """Return the rank of what is merged after so many rounds that add ``added`` ranks each."""
    height, width = shapes[module + B][0], shapes[module + A][1]
    return min(rounds * added, height, width)


def merged_shapes(rounds: int, added: int, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what is merged after so many rounds, by name."""
    found: dict[str, tuple[int, ...]] = {}
    for module in modules(shapes) if rounds and added else ():
        rank = rank_after(rounds, added, shapes, module)
        found[module + MERGED_B] = (shapes[module + B][0], rank)
        found[module + MERGED_A] = (rank, shapes[module + A][1])
    return found


def merge(x: Tensors, module: str, terms: Sequence[Term], rank: int) -> dict[str, Array]:
    """Return the merged pair of a module with a weighted sum of products added, ``rank`` wide.

    Stacked while that fits; where the layer is full, the product itself beside an identity, so that
    nothing has to be decomposed.

    Raises:
        AggregationError: there are more ranks than ``rank``, and the layer is not full.
    """
    height, width = x[module + B].shape[0], x[module + A].shape[1]
    before = x.get(module + MERGED_B), x.get(module + MERGED_A)
    first: list[Term] = []
    if before[0] is not None and before[1] is not None:
        first = [(1.0, before[0], before[1])]
    left, right = stack([*first, *terms])
    found = left.shape[1]
    if found > rank and rank < min(height, width):
        raise AggregationError(f"{found} ranks are to be merged into {module!r}, {rank} are agreed")
    if found > rank and height <= width:
        left, right = np.eye(height), left @ right
    elif found > rank:
        left, right = left @ right, np.eye(width)
    else:  # sites that were not counted: a shape follows from the round alone
        left = np.hstack([left, np.zeros((height, rank - found))])
        right = np.vstack([right, np.zeros((rank - found, width))])
    return {module + MERGED_B: f32(left), module + MERGED_A: f32(right)}
