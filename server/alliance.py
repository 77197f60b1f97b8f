"""The alliance service: gRPC over TLS for what Flower has no place for.

Two ports. The ``Door`` proves the coordinator alone and takes what an identity key has signed. The
service asks for a certificate of the alliance's authority, and looks in the membership at every
call: a revoked site is out at once, however long its certificate still runs. What goes wrong
leaves as a code and a line, never as a trace.
"""

import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grpc

from huizhen.protocol.documents import claimed
from huizhen.protocol.errors import (
    ForkError,
    GovernanceError,
    HuizhenError,
    ProtocolError,
    StorageError,
)
from huizhen.protocol.rpc import alliance_pb2 as wire
from huizhen.protocol.rpc import alliance_pb2_grpc as stubs
from huizhen.protocol.statements import (
    Approval,
    Withdrawal,
    moment,
    stamp,
)
from huizhen.protocol.trust import TrustError
from huizhen.server import witnessing
from huizhen.server.authority import site_of
from huizhen.server.desk import Desk
from huizhen.server.registry import WaitingForBoardError
from huizhen.server.store_studies import Kind, StoredStudy

MAX_MESSAGE_BYTES = 8 << 20
MAX_DOOR_BYTES = 64 << 10
# of a document that anybody may send
MAX_NUMBER = 1 << 53
T = TypeVar("T")

logger = logging.getLogger(__name__)


def _answered(method: Callable[..., T]) -> Callable[..., T]:
    """Turn what a call raises into a status that the site can act on."""

    @functools.wraps(method)
    def call(self: Any, request: Any, context: grpc.ServicerContext) -> T:
        try:
            return method(self, request, context)
        except WaitingForBoardError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"waiting_for_board: {error}")
        except TrustError as error:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, f"{error.code}: {error}")
        except ForkError as error:
            logger.error("a log has forked: %s", error)
            context.abort(grpc.StatusCode.PERMISSION_DENIED, f"forked: {error}")
        except StorageError:
            logger.exception("a call failed: method=%s", method.__name__)
            context.abort(grpc.StatusCode.INTERNAL, "storage: the coordinator cannot write")
        except (ProtocolError, GovernanceError) as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"refused: {error}")
        except (HuizhenError, ValueError, OverflowError):
            logger.exception("a call failed: method=%s", method.__name__)
            context.abort(grpc.StatusCode.INTERNAL, "internal: look at the coordinator's log")
        raise AssertionError("abort raises")

    return call


class DoorService(stubs.DoorServicer):
    """Enrolment and renewal."""

    def __init__(self, desk: Desk) -> None:
        """Use the coordinator's state."""
        self._desk = desk

    @_answered
    def Enrol(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802 - gRPC's
        """Use an invitation."""
        _check_size(request.document)
        certificate, memberships = self._desk.registry.enrol(request.document, request.token)
        return wire.Admission(certificate=certificate, memberships=memberships)

    @_answered
    def Renew(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Give a new certificate."""
        _check_size(request.data)
        return wire.Admission(certificate=self._desk.registry.renew(request.data))


class AllianceService(stubs.AllianceServicer):
    """Everything that members ask for."""

    def __init__(self, desk: Desk) -> None:
        """Use the coordinator's state."""
        self._desk = desk

    @_answered
    def Memberships(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Give the memberships after a version."""
        self._site(context)
        found = self._desk.store.members.memberships(_after(request))
        return wire.Documents(data=[one.document for one in found])

    @_answered
    def Studies(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Give the studies that name the site."""
        site, store = self._site(context), self._desk.store
        items = []
        for stored in self._studies_of(site):
            standing = store.studies.standing(stored.digest).get(site)
            last = store.rounds.last_record(stored.digest)
            items.append(
                wire.StudyItem(
                    document=stored.document,
                    state=stored.state,
                    standing=[] if standing is None else [standing.document],
                    round=0 if last is None else last.round,
                )
            )
        return wire.StudyList(studies=items)

    @_answered
    def Submit(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Take an approval, a withdrawal or a rotation."""
        site, data, desk = self._site(context), request.data, self._desk
        body, now = claimed(data), desk.clock()
        if body.get("site") != site:
            raise ProtocolError(f"document is of another site than {site!r}")
        if "old" in body:
            desk.registry.rotate(data)
            return wire.Nothing()
        keys = desk.registry.trust().keys(site)
        kind = Approval if "cohort" in body else Withdrawal
        said = kind.read(data, keys)
        if said.alliance != desk.alliance:
            raise ProtocolError("document is of another alliance")
        self._of_study(context, said.study)
        studies, issued = desk.store.studies, moment(said.issued)
        add = studies.add_approval if isinstance(said, Approval) else studies.add_withdrawal
        name: Kind = "approval" if isinstance(said, Approval) else "withdrawal"
        if not studies.is_new(name, said.study, site, data, issued=issued):
            return wire.Nothing()  # the same again changes nothing, not even the log
        desk.audit.append(f"{name}_received", study=said.study, site=site)
        add(said.study, site, data, issued=issued, now=now)
        return wire.Nothing()

    @_answered
    def Records(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Give the records of a study after a round."""
        self._of_study(context, request.study)
        found = self._desk.store.rounds.records(request.study, _after(request))
        return wire.Documents(data=[one.document for one in found])

    @_answered
    def Receipts(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Give the site's receipts after a number."""
        site = self._site(context)
        found = self._desk.store.updates.receipts(site, _after(request))
        return wire.Numbered(
            documents=[
                wire.NumberedDocument(number=one.number, data=one.document)
                for one in found
                if not request.study or one.study == request.study
            ]
        )

    @_answered
    def LastUpdates(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Give back the site's own last update of each study."""
        site, found = self._site(context), []
        for stored in self._studies_of(site):
            update = self._desk.store.updates.last_update(stored.digest, site)
            if update is not None:
                found.append(update.document)
        return wire.Documents(data=found)

    @_answered
    def Witness(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Countersign where the site's log has come."""
        site = self._site(context)
        signed = witnessing.witness(self._desk, site, request.checkpoint, list(request.proof))
        return wire.Document(data=signed)

    @_answered
    def Heads(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Give how a log went on after a size."""
        site = self._site(context)
        found = witnessing.heads(self._desk, site, request.log, _after(request))
        return wire.LogHeads(
            heads=[wire.LogHead(checkpoint=one, proof=proof) for one, proof in found]
        )

    @_answered
    def Countersigned(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Take another party's checkpoint with this site's signature."""
        site = self._site(context)
        witnessing.take_countersigned(self._desk, site, request.data)
        return wire.Nothing()

    @_answered
    def Report(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Take how the site is, and say what waits for it."""
        site = self._site(context)
        if request.version:  # a doctor only asks for the time
            self._desk.report(
                site,
                version=request.version,
                codes=list(request.codes),
                time=request.time,
                studies=[(one.study, one.code) for one in request.studies],
            )
        trust = self._desk.registry.trust()
        return wire.Notice(
            time=stamp(self._desk.clock()),
            membership=trust.membership.version,
            witness=witnessing.to_witness(self._desk, site),
        )

    def _site(self, context: grpc.ServicerContext) -> str:
        """Return the member at the other end.

        Raises:
            TrustError: it is no member any more.
        """
        certificates = list(context.auth_context()["x509_pem_cert"])
        site = site_of(bytes(certificates[0]))
        self._desk.registry.trust().member(site)
        return site

    def _studies_of(self, site: str) -> list[StoredStudy]:
        """Return the studies that name a site."""
        return [
            stored
            for stored in self._desk.store.studies.studies()
            if site in claimed(stored.document)["study"]["sites"]
        ]

    def _of_study(self, context: grpc.ServicerContext, study: str) -> str:
        site = self._site(context)
        stored = self._desk.store.studies.study(study)
        if stored is None or site not in claimed(stored.document)["study"]["sites"]:
            raise ProtocolError(f"study {study[:12]!r} does not name site {site!r}")
        return site


def _check_size(document: bytes) -> None:
    """Refuse a stranger's large document before it is parsed."""
    if len(document) > MAX_DOOR_BYTES:
        raise ProtocolError(
            f"document has {len(document)} bytes, at most {MAX_DOOR_BYTES} are taken at the door"
        )


def _after(request: Any) -> int:
    """Return what a caller has already, as a number that every database takes."""
    return min(int(request.after), MAX_NUMBER)


def make_servers(
    desk: Desk, *, door: str, service: str, key: bytes, certificate: Path, authority: bytes
) -> list[grpc.Server]:
    """Return the two servers, bound and not started.

    Args:
        desk: the coordinator's state.
        door: host and port for enrolment and renewal.
        service: host and port for members.
        key: of the server's certificate, PEM.
        certificate: the server's, PEM; looked at for every connection, so that it can be renewed.
        authority: the alliance's, PEM.

    Raises:
        StorageError: a port is taken.
    """

    def credentials(roots: bytes | None) -> grpc.ServerCredentials:
        def fetch() -> grpc.ServerCertificateConfiguration:
            return grpc.ssl_server_certificate_configuration(
                [(key, certificate.read_bytes())], roots
            )

        return grpc.dynamic_ssl_server_credentials(fetch(), fetch, roots is not None)

    made = []
    for address, roots, most, adder, servicer in (
        (door, None, 2 * MAX_DOOR_BYTES, stubs.add_DoorServicer_to_server, DoorService(desk)),
        (
            service, authority, MAX_MESSAGE_BYTES,
            stubs.add_AllianceServicer_to_server, AllianceService(desk),
        ),
    ):  # fmt: skip
        server = grpc.server(
            ThreadPoolExecutor(max_workers=8),
            options=[
                ("grpc.max_receive_message_length", most),
                ("grpc.so_reuseport", 0),
            ],
            maximum_concurrent_rpcs=256,
        )
        adder(servicer, server)  # type: ignore[no-untyped-call]  # generated
        try:
            server.add_secure_port(address, credentials(roots))
        except RuntimeError as error:
            raise StorageError(f"cannot listen on {address}: it is taken or not here") from error
        made.append(server)
    return made
