"""A study's rounds as a chain: each record names the one before, each announcement the last record.

A site keeps a ``Chain`` per study and moves it forward with signed records. What is announced to
it must follow the last record that it has accepted; so a coordinator that was restored from a
backup, or that shows different sites different histories, is refused and told why. There are no
files here.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal, TypeAlias

from huizhen.protocol.documents import PublicKey
from huizhen.protocol.errors import ProtocolError
from huizhen.protocol.statements import Announcement, Record, digest_of, moment

Code: TypeAlias = Literal[
    "not_signed",  # not by the coordinator of the membership
    "wrong_study",
    "wrong_alliance",
    "rollback",  # of a round before the last closed one: the coordinator has forgotten it
    "round_closed",  # of the last closed round: it waited too long, or that round was forgotten
    "fork",  # another history than the one that was accepted
    "behind",  # records are missing here: fetch them
    "replayed",  # an attempt before the last
    "not_asked",  # the announcement is for other sites
    "wrong_adapter",  # the bytes are not the ones that are announced, or that the record gave
    "deadline_passed",
    "malformed",
]


class ChainError(ProtocolError):
    """A record or an announcement does not follow; ``code`` may be told to anyone."""

    def __init__(self, code: Code, text: str) -> None:
        """Name the reason."""
        super().__init__(text)
        self.code: Code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """How far a study has come, as one site has accepted it."""

    alliance: str
    study: str
    round: int = 0
    # the last that is closed
    record: str = ""
    # its digest; the study's before the first
    result: str | None = None
    # the digest of the adapter that it gave; unknown before the first
    attempt: int = 0
    # the last that was announced of the open round
    announcement: str | None = None
    # its digest

    @property
    def parent(self) -> str:
        """What the next announcement and record must name."""
        return self.record or self.study

    def accept_record(self, data: bytes, coordinator: Sequence[PublicKey]) -> "Chain":
        """Return the chain with one more closed round; the last record is taken again.

        Raises:
            ChainError: it does not follow.
            WireError: it is no record.
        """
        if digest_of(data) == self.record:
            return self
        try:
            record = Record.read(data, coordinator)
        except ChainError:
            raise
        except ProtocolError as error:
            raise ChainError("not_signed", str(error)) from error
        self._check_own(record.alliance, record.study)
        if record.round <= self.round:
            raise ChainError("fork", f"record of round {record.round} is another than was accepted")
        if record.round > self.round + 1:
            raise ChainError(
                "behind", f"record is of round {record.round}, {self.round + 1} is next"
            )
        if record.parent != self.parent:
            raise ChainError("fork", f"record of round {record.round} follows another history")
        if self.result is not None and record.adapter != self.result:
            raise ChainError("fork", f"round {record.round} began with another adapter")
        return replace(
            self,
            round=record.round,
            record=digest_of(data),
            result=record.result,
            attempt=0,
            announcement=None,
        )

    def check(
        self,
        data: bytes,
        payload: bytes,
        coordinator: Sequence[PublicKey],
        *,
        site: str,
        now: datetime,
    ) -> tuple["Chain", Announcement]:
        """Return an announcement that follows, and the chain that remembers it.

        Args:
            data: the document.
            payload: the adapter that came with it.
            coordinator: the coordinator's key.
            site: this site.
            now: the present time.

        Raises:
            ChainError: it does not follow.
            WireError: it is no announcement.
        """
        try:
            asked = Announcement.read(data, coordinator)
        except ProtocolError as error:
            raise ChainError("not_signed", str(error)) from error
        self._check_own(asked.alliance, asked.study)
        if asked.round <= self.round:
            raise ChainError(
                "round_closed" if asked.round == self.round else "rollback",
                f"round {asked.round} is announced, round {self.round} is closed",
            )
        if asked.round > self.round + 1:
            raise ChainError(
                "behind", f"round {asked.round} is announced, {self.round + 1} is next here"
            )
        if asked.parent != self.parent:
            raise ChainError("fork", f"round {asked.round} follows another history")
        if asked.attempt < self.attempt:
            raise ChainError(
                "replayed", f"attempt {asked.attempt} is announced, {self.attempt} was before"
            )
        if asked.attempt == self.attempt and digest_of(data) != self.announcement:
            raise ChainError("fork", f"attempt {asked.attempt} is announced in two ways")
        if site not in asked.sites:
            raise ChainError("not_asked", f"round {asked.round} is announced to other sites")
        if hashlib.sha256(payload).hexdigest() != asked.adapter:
            raise ChainError("wrong_adapter", "the adapter is not the one that is announced")
        if self.result is not None and asked.adapter != self.result:
            raise ChainError("wrong_adapter", "the adapter is not what the last record gave")
        if now > moment(asked.deadline):
            raise ChainError("deadline_passed", f"round {asked.round} was due at {asked.deadline}")
        return replace(self, attempt=asked.attempt, announcement=digest_of(data)), asked

    def _check_own(self, alliance: str, study: str) -> None:
        if alliance != self.alliance:
            raise ChainError(
                "wrong_alliance", f"alliance is {alliance!r}, expected {self.alliance!r}"
            )
        if study != self.study:
            raise ChainError("wrong_study", f"study is {study[:12]}, expected {self.study[:12]}")

    def to_json(self) -> dict[str, Any]:
        """Return the chain as JSON values, to keep."""
        return {name: getattr(self, name) for name in self.__slots__}
