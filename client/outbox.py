"""The one way out: an update becomes bytes here or not at all."""

from collections.abc import Set
from dataclasses import dataclass

from huizhen.protocol.adapter import Tensors
from huizhen.protocol.errors import PrivacyError
from huizhen.protocol.wire import Message, encode


@dataclass(frozen=True, slots=True)
class Envelope:
    """Bytes that may leave the hospital, and what they hold; only ``send`` makes one."""

    data: bytes
    tensors: tuple[str, ...]


def send(*, study: str, round: int, site: str, update: Tensors, agreed: Set[str]) -> Envelope:
    """Return an update as the bytes that leave.

    Args:
        study: the study's digest.
        round: the round that the update answers.
        site: this site's name.
        update: the tensors.
        agreed: the names of the tensors that the study lets leave in this round.

    Raises:
        PrivacyError: the update holds other tensors than agreed.
        WireError: a value is not finite.
    """
    if update.keys() != agreed:
        extra = sorted(update.keys() ^ agreed)[0]
        raise PrivacyError(f"update and agreement differ in tensor {extra!r}: nothing was sent")
    message = Message(kind="update", study=study, round=round, site=site, tensors=update)
    return Envelope(encode(message), tuple(update))
