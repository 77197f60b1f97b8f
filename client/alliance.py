"""The site's end of the alliance service: joining, documents, receipts, witnesses.

gRPC over TLS. The ``Door`` proves the coordinator alone, by the authority that the invitation pins;
everything else is mutual TLS with this site's short-lived certificate. What comes back is bytes:
documents are verified by whoever reads them.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import grpc

from huizhen.protocol.errors import ProtocolError, StorageError
from huizhen.protocol.rpc import alliance_pb2 as wire
from huizhen.protocol.rpc.alliance_pb2_grpc import AllianceStub, DoorStub

TIMEOUT_SECONDS = 30.0
_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.enable_retries", 0),
]
T = TypeVar("T")

Trouble: TypeAlias = Literal["unreachable", "refused"]


class AllianceError(ProtocolError):
    """The service did not do what was asked; ``code`` says why, as the coordinator names it."""

    def __init__(self, trouble: Trouble, code: str, text: str) -> None:
        """Name the trouble."""
        super().__init__(text)
        self.trouble: Trouble = trouble
        self.code = code


@dataclass(frozen=True, slots=True)
class Admission:
    """What a site gets when it joins or renews."""

    certificate: bytes
    # PEM
    memberships: tuple[bytes, ...]
    # documents, oldest first; none at a renewal


@dataclass(frozen=True, slots=True)
class Offered:
    """A study that names this site."""

    document: bytes
    state: str
    standing: tuple[bytes, ...]
    # this site's last approval or withdrawal, as the coordinator has it
    round: int
    # the last that is closed


@dataclass(frozen=True, slots=True)
class Notice:
    """What waits for a site."""

    time: str
    # the coordinator's
    membership: int
    # the newest version
    witness: tuple[str, ...]
    # logs that this site is asked to witness


class Door:
    """The service for sites without a valid certificate."""

    def __init__(self, channel: grpc.Channel) -> None:
        """Use an open channel."""
        self._stub = DoorStub(channel)  # type: ignore[no-untyped-call]  # generated

    def enrol(self, document: bytes, token: str) -> Admission:
        """Use an invitation.

        Args:
            document: an ``Enrolment``, signed.
            token: the invitation's.

        Raises:
            AllianceError: the coordinator cannot be reached, or refuses.
        """
        return _admission(
            _call(self._stub.Enrol, wire.EnrolRequest(document=document, token=token))
        )

    def renew(self, document: bytes) -> Admission:
        """Return a new certificate.

        Args:
            document: a ``Renewal``, signed.

        Raises:
            AllianceError: the coordinator cannot be reached, or refuses.
        """
        return _admission(_call(self._stub.Renew, wire.Document(data=document)))


class Alliance:
    """The service for members."""

    def __init__(self, channel: grpc.Channel) -> None:
        """Use an open channel of mutual TLS."""
        self._stub = AllianceStub(channel)  # type: ignore[no-untyped-call]  # generated

    def memberships(self, after: int) -> list[bytes]:
        """Return the memberships after a version, oldest first."""
        return list(_call(self._stub.Memberships, wire.Since(after=after)).data)

    def studies(self) -> list[Offered]:
        """Return the studies that name this site."""
        found = _call(self._stub.Studies, wire.Nothing()).studies
        return [
            Offered(item.document, item.state, tuple(item.standing), item.round) for item in found
        ]

    def submit(self, document: bytes) -> None:
        """Hand in an approval, a withdrawal or a rotation."""
        _call(self._stub.Submit, wire.Document(data=document))

    def records(self, study: str, after: int) -> list[bytes]:
        """Return the records of a study after a round, oldest first."""
        return list(_call(self._stub.Records, wire.StudySince(study=study, after=after)).data)

    def receipts(self, study: str, after: int) -> list[tuple[int, bytes]]:
        """Return this site's receipts after a number, oldest first, with their numbers."""
        found = _call(self._stub.Receipts, wire.StudySince(study=study, after=after)).documents
        return [(item.number, item.data) for item in found]

    def last_updates(self) -> list[bytes]:
        """Return this site's own last signed update of each study."""
        return list(_call(self._stub.LastUpdates, wire.Nothing()).data)

    def witness(self, checkpoint: bytes, proof: Sequence[bytes]) -> bytes:
        """Show where this site's log has come; return the checkpoint, countersigned."""
        head = wire.LogHead(checkpoint=checkpoint, proof=proof)
        return bytes(_call(self._stub.Witness, head).data)

    def heads(self, log: str, after: int) -> list[tuple[bytes, list[bytes]]]:
        """Return how another party's log went on: checkpoints, each with its proof."""
        found = _call(self._stub.Heads, wire.LogSince(log=log, after=after)).heads
        return [(head.checkpoint, list(head.proof)) for head in found]

    def countersigned(self, document: bytes) -> None:
        """Hand in another party's checkpoint that this site has countersigned."""
        _call(self._stub.Countersigned, wire.Document(data=document))

    def report(
        self, *, version: str, codes: Sequence[str], time: str, studies: Sequence[tuple[str, str]]
    ) -> Notice:
        """Say how the site is; nothing here is free text.

        Args:
            version: of this software.
            codes: the site's state, and what its own checks found.
            time: this clock's.
            studies: digest and code of each study.
        """
        found = _call(
            self._stub.Report,
            wire.Status(
                version=version,
                codes=codes,
                time=time,
                studies=[wire.StudyStatus(study=study, code=code) for study, code in studies],
            ),
        )
        return Notice(found.time, found.membership, tuple(found.witness))


@contextlib.contextmanager
def open_door(address: str, ca: bytes) -> Iterator[Door]:
    """Give the service for sites without a certificate.

    Args:
        address: host and port.
        ca: the alliance's authority, PEM.
    """
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(ca), _OPTIONS) as channel:
        yield Door(channel)


@contextlib.contextmanager
def open_alliance(address: str, *, ca: bytes, key: Path, certificate: Path) -> Iterator[Alliance]:
    """Give the service for members.

    Args:
        address: host and port.
        ca: the alliance's authority, PEM.
        key: of the certificate, PEM.
        certificate: this site's, PEM.

    Raises:
        StorageError: the key or the certificate cannot be read.
    """
    try:
        credentials = grpc.ssl_channel_credentials(ca, key.read_bytes(), certificate.read_bytes())
    except OSError as error:
        raise StorageError(f"cannot read {error.filename!r}: {error.strerror}") from error
    with grpc.secure_channel(address, credentials, _OPTIONS) as channel:
        yield Alliance(channel)


def _admission(found: Any) -> Admission:
    return Admission(found.certificate.encode(), tuple(found.memberships))


def _call(method: Callable[..., T], request: Any) -> T:
    try:
        return method(request, timeout=TIMEOUT_SECONDS)
    except grpc.RpcError as error:
        status, text = error.code(), error.details() or ""
        if status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise AllianceError(
                "unreachable", "unreachable", f"the coordinator cannot be reached: {text[:200]}"
            ) from error
        raise AllianceError(
            "refused", text.partition(": ")[0][:60], f"the coordinator refuses: {text[:300]}"
        ) from error
