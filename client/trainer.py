"""What a site asks of whoever trains for it; the site itself needs no torch.

In a simulation that is ``local_trainer.LocalTrainer``, in the same process; at a hospital it is
``worker_trainer.WorkerTrainer``, whose process has neither network nor keys.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from huizhen.protocol.adapter import Shapes, Tensors
from huizhen.protocol.errors import HuizhenError, ProtocolError
from huizhen.protocol.study import Study
from huizhen.protocol.wire import Message, decode, encode
from huizhen.strategies.base import Strategy

DEFAULT_MEMORY_MIB = 1024


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What the site itself may look at; nothing of it leaves."""

    loss: float
    # mean over the records seen; not a number when none was
    steps: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Trained:
    """What one round of training gives."""

    update: Tensors
    # Δ, which is sent
    kept: Tensors
    # what the strategy has a site remember for the next round; it never leaves
    report: TrainingReport


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerFacts:
    """What a site must know of its trainer; nothing of it leaves."""

    site: str
    study: str
    # the study's digest, SHA-256 in hex
    shapes: Shapes
    # every tensor of the adapter that this site trains in some round, at its own rank
    study_shapes: Shapes
    # the same at the study's rank, as they are announced
    num_units: int
    # units of privacy that are trained on, patients or records: the true number
    has_held_out: bool
    # whether there are held-out records to measure on, and the study lets metrics out


class Trainer(Protocol):
    """Trains one site's part of one study. It charges nothing: its caller has, before each call."""

    def ready(self) -> TrainerFacts:
        """Return the facts once training can begin; they never change.

        Raises:
            HuizhenError: it cannot; then nothing must be charged.
        """

    def train(self, announcement: bytes, round: int, kept: Tensors) -> Trained:
        """Return the update Δ of a round: trained less announced, for the tensors that are sent.

        Args:
            announcement: the adapter, in the wire format.
            round: 1 is the first.
            kept: what the last answered round gave to be kept; empty where there is none.

        Raises:
            ProtocolError: the announcement is of another study or round, or not what it must be.
            PrivacyError: the study is private and cannot be trained as it asks.
            TrainerError: the process that trains could not, or was stopped.
        """

    def metrics(self, announcement: bytes) -> bytes:
        """Return fresh noised metrics of the final adapter, in their canonical bytes.

        Args:
            announcement: of the round after the last.

        Raises:
            ProtocolError: as ``train``.
            PrivacyError: there is nothing to measure on.
            TrainerError: as ``train``.
        """


class Code(StrEnum):
    """Why a training process did not do what was asked; kept at the site, texts in its log."""

    BAD_COMMAND = "bad_command"
    WRONG_BASE = "wrong_base"
    BAD_RECORDS = "bad_records"
    NOT_PRIVATE = "not_private"
    OUT_OF_MEMORY = "out_of_memory"
    BAD_ANNOUNCEMENT = "bad_announcement"
    DIVERGED = "diverged"
    BAD_REPLY = "bad_reply"
    CRASHED = "crashed"
    STOPPED = "stopped"


_MEANING = {
    Code.BAD_COMMAND: "was told what it does not understand, expected this version's commands",
    Code.WRONG_BASE: "has not the base that the study names, or the adapter does not fit it: "
    "fetch the base that was agreed on",
    Code.BAD_RECORDS: "cannot use the records, expected what the task reads: mend the export",
    Code.NOT_PRIVATE: "cannot train this study privately: nothing was trained",
    Code.OUT_OF_MEMORY: "needs more memory than it has: raise memory_mib or lower max_tokens",
    Code.BAD_ANNOUNCEMENT: "was given an announcement of another study or round",
    Code.DIVERGED: "made values that are not finite: lower the learning rate",
    Code.BAD_REPLY: "answered with other bytes than agreed, nothing of them was used",
    Code.CRASHED: "ended by itself",
    Code.STOPPED: "was stopped",
}


class TrainerError(HuizhenError):
    """A training process could not do what was asked; ``code`` says why."""

    def __init__(self, code: Code, *, log: str | None = None) -> None:
        """Take the code and where the process's own log lies."""
        where = "" if log is None else f"; its log is {log!r}"
        super().__init__(f"the training process {_MEANING[code]} (code {code.value}{where})")
        self.code = code


def kept_bytes(kept: Tensors, *, study: str, site: str, round: int) -> bytes:
    """Return what a site keeps between rounds in the wire format; it never leaves the site.

    Args:
        kept: the tensors.
        study: the study's digest.
        site: whose they are.
        round: that they are of.

    Raises:
        WireError: a value is not finite.
    """
    return encode(Message(kind="kept", study=study, round=round, site=site, tensors=kept))


def read_announcement(
    announcement: bytes, round: int, *, study: Study, strategy: Strategy, shapes: Shapes
) -> Message:
    """Return the adapter that a coordinator announces for a round.

    Args:
        announcement: what arrived.
        round: 1 is the first; the one after the last has the final adapter.
        study: what was agreed.
        strategy: of the study.
        shapes: every tensor of the adapter, at the study's rank.

    Raises:
        ProtocolError: it is of another study or round, or not what it must be.
    """
    message = decode(announcement, shapes=strategy.announces(shapes, round))
    if (message.kind, message.study, message.round) != ("adapter", study.digest(), round):
        raise ProtocolError("announcement is of another study or round: nothing was done")
    return message
