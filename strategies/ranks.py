"""Sites of different ranks: what one of rank r_i holds of an adapter of the study's rank r.

The first r_i columns of each B and rows of each A, at the study's one scale s = alpha / rank:
random rows that follow from a seed are drawn in turn (``public_random.py``), so that a site's part
of A is the same whether it draws r_i rows or all. What was merged is everyone's, whole.
"""

from collections.abc import Mapping

import numpy as np

from huizhen.protocol.adapter import Array, Shapes, Tensors
from huizhen.protocol.study import Study
from huizhen.strategies.base import A, B


def site_rank(study: Study, site: str | None) -> int | None:
    """Return the rank that a site trains, the study's for None; None where there is no LoRA."""
    if study.adapter is None:
        return None
    own = None if site is None else study.sites[site].rank
    return study.adapter.rank if own is None else own


def at_rank(shapes: Shapes, rank: int | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the same modules with factors of another rank."""
    if rank is None:
        return dict(shapes)
    return {
        name: (rank, shape[1])
        if name.endswith(A)
        else (shape[0], rank)
        if name.endswith(B)
        else tuple(shape)
        for name, shape in shapes.items()
    }


def cut(x: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Return an adapter with its factors cut to shapes of a lower rank."""
    return {
        name: np.ascontiguousarray(value[: shapes[name][0], : shapes[name][1]])
        if name.endswith((A, B))
        else value
        for name, value in x.items()
    }


def padded(update: Tensors, shapes: Shapes) -> dict[str, Array]:
    """Return an update with its factors filled up with zeros to shapes of a higher rank."""
    found = {}
    for name, value in update.items():
        if name.endswith((A, B)) and value.shape != shapes[name]:
            whole = np.zeros(shapes[name], np.float32)
            whole[: value.shape[0], : value.shape[1]] = value
            value = whole
        found[name] = value
    return found
