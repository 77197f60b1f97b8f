"""What an update must be before it is counted; everything else is refused with a code."""

import math
from collections.abc import Container
from typing import Literal, TypeAlias

import numpy as np

from huizhen.protocol.adapter import Shapes, Tensors, blocks
from huizhen.protocol.errors import WireError
from huizhen.protocol.travel import PLAIN, Travel
from huizhen.protocol.wire import Message, decode

Refusal: TypeAlias = Literal[
    "malformed",
    "wrong_kind",
    "wrong_study",
    "wrong_round",
    "unknown_site",
    "duplicate",
    "norm_too_large",
]


def check_update(
    data: bytes,
    *,
    shapes: Shapes,
    study: str,
    round: int,
    sites: Container[str],
    seen: Container[str],
    max_norm: float,
    travel: Travel = PLAIN,
) -> Message | Refusal:
    """Return the update in ``data``, or why it is not counted.

    Args:
        data: what arrived.
        shapes: the tensors that sites train in this round.
        study: the study's digest.
        round: the round that is open.
        sites: the study's sites.
        seen: the sites whose update of this round has been counted.
        max_norm: the largest L2 norm that an update may have, over all its tensors.
        travel: how its numbers were agreed to.
    """
    try:
        message = decode(data, shapes=shapes, travel=travel, copy=False)
    except WireError:
        return "malformed"
    if message.kind != "update":
        return "wrong_kind"
    if message.study != study:
        return "wrong_study"
    if message.round != round:
        return "wrong_round"
    if message.site not in sites:
        return "unknown_site"
    if message.site in seen:
        return "duplicate"
    if update_norm(message.tensors) > max_norm:
        return "norm_too_large"
    return message


def update_norm(tensors: Tensors) -> float:
    """Return the L2 norm over all tensors, summed in float64."""
    parts = (block.astype(np.float64) for tensor in tensors.values() for block in blocks(tensor))
    return math.sqrt(math.fsum(float(np.vdot(part, part)) for part in parts))
