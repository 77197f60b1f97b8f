"""A real coordinator on loopback whose alliance service may lie, and hospitals that have joined it.

The desk, the authority, TLS and gRPC are the real ones; a test puts a function into ``lies`` that
changes an answer. The hospitals' folders are real too; what trains in them is a ``Trainer`` in this
process that a test may have lie as well.
"""

import contextlib
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tests.federation.lying_federation import FIRST

from huizhen.client import joining
from huizhen.client.answering import Answering
from huizhen.client.approvals import draft_approval, sign_as_site
from huizhen.client.home import Home as SiteHome
from huizhen.client.ledger import Ledger
from huizhen.client.sandbox import Walls
from huizhen.client.situation import LedgerView, Offered
from huizhen.client.standing import Standing, open_standing
from huizhen.client.trainer import Trained, TrainerFacts, TrainingReport
from huizhen.learning.catalogue import catalogue
from huizhen.protocol.adapter import Tensors, shapes_of
from huizhen.protocol.documents import public_of
from huizhen.protocol.ledger_entries import Cap
from huizhen.protocol.rpc import alliance_pb2_grpc as stubs
from huizhen.protocol.statements import Announcement, Refusal, StudyOffer
from huizhen.protocol.study import Study, parse_study
from huizhen.server.alliance import MAX_MESSAGE_BYTES, AllianceService, DoorService
from huizhen.server.authority import pem
from huizhen.server.desk import Desk, now, open_desk
from huizhen.server.founding import found
from huizhen.server.home import Home
from huizhen.server.open_round import OpenRound
from huizhen.server.studies import change, offer
from huizhen.simulations.live import edit, free_ports
from huizhen.storage.keys import load_key, load_tls_key

SITES = ("North", "South", "East")
_OPTIONS = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
WALLS = Walls("full", "walls for a test")
PRIVATE: dict[str, Any] = {
    "unit": "patient", "epsilon": 2.0, "delta": 1e-4, "sampling_rate": 0.3, "learning_rate": 0.5,
}  # fmt: skip


class Lying:
    """The alliance service, with answers that a test changes."""

    def __init__(self, honest: Any) -> None:
        self.honest = honest
        self.lies: dict[str, Callable[[Any], Any]] = {}
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[[Any, Any], Any]:
        def call(request: Any, context: Any) -> Any:
            self.calls.append(name)
            answer = getattr(self.honest, name)(request, context)
            return self.lies.get(name, lambda one: one)(answer)

        return call


@dataclass
class LyingCoordinator:
    """The desk, and the service that lies."""

    desk: Desk
    service: Lying

    def tell(self, name: str, lie: Callable[[Any], Any]) -> None:
        """Have a call answer with what ``lie`` makes of the honest answer."""
        self.service.lies[name] = lie

    def be_honest(self) -> None:
        """Take all lies back."""
        self.service.lies.clear()

    def offer(self, study: Study) -> StudyOffer:
        """Offer and open a study that begins with ``FIRST``."""
        made = offer(self.desk, study, FIRST, ends=now() + timedelta(days=90))
        stored = self.desk.store.studies.study(made.digest)
        assert stored is not None
        change(self.desk, stored, "open")
        return made

    def open(self, offered: StudyOffer) -> OpenRound:
        """Announce the study's open round, as a process of the coordinator does when it starts."""
        return OpenRound(self.desk.parts, offered, self.desk.registry.trust(), SITES)


@contextlib.contextmanager
def lying_coordinator(folder: Path) -> Iterator[LyingCoordinator]:
    """Found an alliance and serve it."""
    home = Home(folder / "coordinator")
    found(
        home, alliance="rare", names=["127.0.0.1"], first_port=free_ports(5), board=[],
        threshold=1, clock_now=now(),
    )  # fmt: skip
    with open_desk(home) as desk, contextlib.ExitStack() as stack:
        desk.registry.found()
        public = load_tls_key(home.key("server")).public_key()
        made = desk.keys.authority.for_server(["127.0.0.1"], public, now())
        home.certificate.write_bytes(pem(made))
        service = Lying(AllianceService(desk))
        pair = [(home.key("server").read_bytes(), home.certificate.read_bytes())]
        listen = desk.settings.listen
        for address, roots, add, servicer in (
            (listen.door, None, stubs.add_DoorServicer_to_server, DoorService(desk)),
            (
                listen.service, home.authority.read_bytes(),
                stubs.add_AllianceServicer_to_server, service,
            ),
        ):  # fmt: skip
            server = grpc.server(ThreadPoolExecutor(2), options=_OPTIONS)
            add(servicer, server)
            port = address.rpartition(":")[2]
            server.add_secure_port(
                f"127.0.0.1:{port}",
                grpc.ssl_server_credentials(pair, roots, require_client_auth=roots is not None),
            )
            server.start()
            stack.callback(_stop, server)
        yield LyingCoordinator(desk, service)


def make_study(**sections: Any) -> Study:
    """Return a study of the three sites on the pinned base ``tiny``."""
    tables: dict[str, Any] = {
        "study": {"name": "lies", "seed": 5},
        "base": {"name": "tiny", "digests": dict(catalogue()["tiny"].digests)},
        "adapter": {"target_modules": ["q_proj"], "rank": 1},
        "task": {"kind": "classification", "text": "{t}", "label": "y", "labels": ["a", "b"]},
        "privacy": {"unit": "none"},
        "strategy": {"name": "fedavg"},
        "rounds": {"count": 3, "deadline_minutes": 60},
        "sites": {site: {"patients_public": 60} for site in SITES},
    }
    for name, values in sections.items():
        tables[name] = {**tables.get(name, {}), **values}
    return parse_study(tables, "test")


def _stop(server: grpc.Server) -> None:
    server.stop(grace=0).wait()


@dataclass
class LyingTrainer:
    """What trains at a site; a test sets what it returns or raises."""

    study: Study
    site: str
    result: Callable[[int], Tensors] | None = None
    error: BaseException | None = None
    kept: Tensors = field(default_factory=dict)
    trained: list[int] = field(default_factory=list)
    log: str = ""

    def ready(self) -> TrainerFacts:
        """Return the facts."""
        return TrainerFacts(
            site=self.site, study=self.study.digest(), shapes=shapes_of(FIRST),
            study_shapes=shapes_of(FIRST), num_units=57, has_held_out=False,
        )  # fmt: skip

    def train(self, announcement: bytes, round: int, kept: Tensors) -> Trained:
        """Return another update each time."""
        self.trained.append(round)
        report = TrainingReport(loss=0.5, steps=2, seconds=0.1)
        if self.error is not None:
            raise self.error
        if self.result is not None:
            return Trained(self.result(round), self.kept, report)
        made = {name: np.full_like(value, len(self.trained) / 8) for name, value in FIRST.items()}
        return Trained(made, self.kept, report)

    def metrics(self, announcement: bytes) -> bytes:
        """Return nothing that would be metrics."""
        return b"{}"

    def stop(self) -> None:
        """Do nothing: there is no process."""

    def close(self) -> None:
        """Do nothing: there is no process."""


@contextlib.contextmanager
def standing_of(home: SiteHome) -> Iterator[Standing]:
    """Give a site's standing, from its files."""
    with open_standing(home, now) as standing:
        yield standing


def join(coordinator: LyingCoordinator, folder: Path, site: str) -> SiteHome:
    """Make a hospital's folder and let it join."""
    home = SiteHome(folder / f"site-{site}")
    joining.init(home, site)
    edit(
        home.folder / "policy.toml",
        {
            "# epsilon = 4.0": "epsilon = 8.0",
            'unit = "patient" ': 'unit = "none" ',
            "[privacy]\n": "[cohorts.other]\nepsilon = 8.0\nmin_patients = 20\n"
            'data = "other.jsonl"\nledger = "other.sqlite"\n\n[privacy]\n',
        },
    )
    desk = coordinator.desk
    invitation = desk.registry.invite(site, desk.settings.public, days=7)
    joining.join(home, invitation, now)
    return home


def make_ledger(home: SiteHome, cohort: str = "all") -> None:
    """Make a cohort's ledger."""
    policy = home.policy()
    Ledger.create(
        policy.ledger_file(home.folder, cohort), site=policy.site, cohort=cohort,
        cap=Cap(epsilon=50.0, delta=1e-4),
    ).shut()  # fmt: skip


def approve(home: SiteHome, offered: StudyOffer, cohort: str = "all") -> None:
    """Consent to a study as ``huizhen site approve`` does."""
    policy, key = home.policy(), load_key(home.key("identity"))
    with standing_of(home) as standing:
        standing.offers()
        folder = home.study(offered.digest)
        found_offer = Offered.of(folder.offer(standing.trust))
        cap = 8.0 if found_offer.study.is_private else None
        draft = draft_approval(
            policy, found_offer, alliance="rare", cohort=cohort, epsilon_cap=cap, now=now(),
            expires=now() + timedelta(days=30),
        )  # fmt: skip
        view = None
        if found_offer.mechanism is not None:
            with Ledger.open(policy.ledger_file(home.folder, cohort)) as ledger:
                view = LedgerView.of(ledger.totals(), offered.digest, would_exceed=False)
        signed = sign_as_site(draft, policy, found_offer, view, key, now())
        standing.approve(folder, signed, cohort=cohort, epsilon_cap=cap)


def copy(source: Path, target: Path) -> None:
    """Copy a folder as a backup does: databases whole, whoever has them open."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*-wal", "*-shm"))
    for place in source.rglob("*.sqlite"):
        to = target / place.relative_to(source)
        to.unlink()
        with (
            contextlib.closing(sqlite3.connect(place)) as one,
            contextlib.closing(sqlite3.connect(to)) as other,
        ):
            one.backup(other)
        to.chmod(0o600)


def rounds_trained(trainers):
    """Return the rounds that any of the trainers has trained."""
    return [round for one in trainers[0] for round in one.trained]


@contextlib.contextmanager
def answering_at(home, clock=now):
    """Give what answers at a site, from its files."""
    with standing_of(home) as standing:
        made = Answering(
            home, standing._audit, load_key(home.key("identity")), standing,
            walls=WALLS, clock=clock,
        )  # fmt: skip
        try:
            yield made
        finally:
            made.close()


def own_key(home):
    """Return a site's key as ``read`` takes it."""
    return [public_of(load_key(home.key("identity")))]


def code_of(answer, home):
    """Return the code of an answer that is a signed refusal and nothing else."""
    assert answer.payload == b""
    return Refusal.read(answer.document, own_key(home)).code


def announce(coordinator, open_round, *, key=None, **changes):
    """Return an announcement like the round's, signed by the coordinator unless told otherwise."""
    asked = Announcement.read(open_round.document, [public_of(coordinator.desk.keys.identity)])
    changed = asked.model_copy(update=changes)
    return changed.signed(key or coordinator.desk.keys.identity)


def head_of(home):
    """Return where a site's ledger has come."""
    with Ledger.open(home.folder / "ledger.sqlite") as ledger:
        return ledger.head()


def counted(open_round, site, answer):
    """Have the coordinator take an answer, so that it can give the signed update back."""
    assert open_round.receive(site, answer.document, answer.payload) is None
