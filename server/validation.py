"""What an update must be before it is counted; everything else is refused with a code."""

from collections.abc import Container
from typing import Literal, TypeAlias

from huizhen.protocol.adapter import Shapes
from huizhen.protocol.errors import WireError
from huizhen.protocol.wire import Message, decode

Refusal: TypeAlias = Literal[
    "malformed", "wrong_kind", "wrong_study", "wrong_round", "unknown_site", "duplicate"
]


def check_update(
    data: bytes,
    *,
    shapes: Shapes,
    study: str,
    round: int,
    sites: Container[str],
    seen: Container[str],
) -> Message | Refusal:
    """Return the update in ``data``, or why it is not counted.

    Args:
        data: what arrived.
        shapes: the tensors that sites train in this round.
        study: the study's digest.
        round: the round that is open.
        sites: the study's sites.
        seen: the sites whose update of this round has been counted.
    """
    try:
        message = decode(data, shapes=shapes)
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
    return message
