"""A whole alliance in memory whose parties lie: keys, documents and a coordinator on a real disk.

Nothing here is a mock: stores, logs and signatures are the real ones; the network is left out. A
``LyingSite`` answers an open round honestly, or as one of ``LIES`` says.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from huizhen.protocol.adapter import Tensors, shapes_of
from huizhen.protocol.documents import public_of
from huizhen.protocol.metrics import SiteMetrics
from huizhen.protocol.statements import (
    Board,
    Member,
    Membership,
    Refusal,
    StudyOffer,
    Update,
    digest_of,
    stamp,
)
from huizhen.protocol.study import Study, parse_study
from huizhen.protocol.trust import Trust
from huizhen.protocol.wire import Message, encode
from huizhen.server.objects import Objects
from huizhen.server.open_round import OpenRound, Parts
from huizhen.server.rounds import Coordinator
from huizhen.server.store import Store
from huizhen.storage.audit import AuditLog
from huizhen.strategies.catalogue import make_strategy
from huizhen.strategies.stored import encode_state

NOW = datetime(2026, 3, 1, 9, tzinfo=UTC)
ALLIANCE = "rare"
SIZES = {"North": 400, "South": 300, "East": 100}
A, B = "l.0.lora_A", "l.0.lora_B"
FIRST: Tensors = {
    A: np.array([[9, 9, 9]], np.float32),
    B: np.array([[1], [-2]], np.float32),
}


def private(number: int) -> Ed25519PrivateKey:
    """Return a key that is the same in every run."""
    return Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)


def hexed(key: Ed25519PrivateKey) -> str:
    """Return a key's public half as statements write it."""
    return public_of(key).raw.hex()


BOARD, COORDINATOR = private(1), private(7)
KEYS = {"North": private(11), "South": private(12), "East": private(13)}


def make_membership(
    version: int = 1, previous: str | None = None, *, now: datetime = NOW, **status: str
) -> bytes:
    """Return a membership of the three sites; ``status`` names those that are revoked."""
    members = tuple(
        Member(
            site=site,
            identity=hexed(key),
            node_key=f"node of {site}",
            status="revoked" if site in status else "active",
            since=stamp(NOW),
            until=stamp(now) if site in status else None,
            former=(),
        )
        for site, key in KEYS.items()
    )
    return Membership(
        alliance=ALLIANCE,
        version=version,
        previous=previous,
        issued=stamp(now),
        board=Board(keys=(hexed(BOARD),), threshold=1),
        coordinator=hexed(COORDINATOR),
        members=members,
    ).signed(BOARD)


def begin_trust(document: bytes | None = None) -> Trust:
    """Return the trust that begins with a membership."""
    board = Board(keys=(hexed(BOARD),), threshold=1)
    return Trust.begin(document or make_membership(), alliance=ALLIANCE, board=board, now=NOW)


def make_study(**sections: Any) -> Study:
    """Return a study of the three sites without a unit of privacy, which needs no noise."""
    tables: dict[str, Any] = {
        "study": {"name": "lies", "seed": 5},
        "base": {"name": "tiny"},
        "adapter": {"target_modules": ["query"], "rank": 1},
        "task": {"kind": "classification", "text": "{t}", "label": "y", "labels": ["a", "b"]},
        "privacy": {"unit": "none"},
        "strategy": {"name": "fedavg", "weights": "public"},
        "rounds": {"count": 2, "quorum": 2, "max_update_norm": 100.0, "deadline_minutes": 5},
        "sites": {site: {"patients_public": size} for site, size in SIZES.items()},
    }
    for name, values in sections.items():
        tables[name] = {**tables.get(name, {}), **values}
    return parse_study(tables, "test")


@dataclass
class Clock:
    """A clock that a test sets."""

    now: datetime = NOW

    def __call__(self) -> datetime:
        """Return the time."""
        return self.now

    def pass_minutes(self, minutes: float) -> None:
        """Let time pass."""
        self.now += timedelta(minutes=minutes)


@dataclass
class Coordination:
    """A coordinator's store, objects, log and key, without a network."""

    parts: Parts
    clock: Clock
    trust: Trust
    offers: dict[str, StudyOffer] = field(default_factory=dict)

    def offer(self, study: Study) -> StudyOffer:
        """Offer and open a study that begins with ``FIRST``."""
        parts = self.parts
        coordinator = Coordinator(study, shapes_of(FIRST))
        made = StudyOffer(
            alliance=ALLIANCE,
            study=study.resolved(),
            digest=study.digest(),
            adapter=parts.objects.put(coordinator.announcement(coordinator.first(FIRST))),
            state=parts.objects.put(encode_state(make_strategy(study).init(FIRST))),
            issued=stamp(self.clock()),
            ends=stamp(self.clock() + timedelta(days=90)),
        )
        studies, now = parts.store.studies, self.clock()
        studies.propose(made.digest, study.study.name, made.signed(BOARD), now)
        studies.change_state(made.digest, "open", now)
        self.offers[made.digest] = made
        return made

    def open(self, offer: StudyOffer, sites: Sequence[str] = tuple(SIZES)) -> OpenRound:
        """Take up the study's round, as a process of the coordinator does when it starts."""
        return OpenRound(self.parts, offer, self.trust, sites)

    def events(self) -> list[str]:
        """Return the log's events in order."""
        return [one.event for one in self.parts.audit.entries()]

    def state(self, study: str) -> tuple[Any, ...]:
        """Return all that a replay or a refused answer may not change, refusals apart."""
        store = self.parts.store
        last = store.rounds.last_record(study)
        round = 1 if last is None else last.round + 1
        counted = [one for one in self.events() if one in ("update_counted", "round_committed")]
        return last, store.updates.updates(study, round), len(counted)


@contextmanager
def coordination(folder: Path) -> Iterator[Coordination]:
    """Give a coordinator in a folder; opened again, it is the same one after a crash."""
    clock = Clock()
    log = folder / "home" / "audit.sqlite"
    opening = AuditLog.open if log.exists() else None
    with Store.open(f"sqlite:///{folder}/home/store.sqlite") as store:
        made = (
            opening(log, clock=clock)
            if opening is not None
            else AuditLog.create(log, alliance=ALLIANCE, log="coordinator", clock=clock)
        )
        with made as audit:
            parts = Parts(
                store=store,
                objects=Objects(folder / "home" / "objects"),
                audit=audit,
                key=COORDINATOR,
                clock=clock,
            )
            yield Coordination(parts, clock, begin_trust())


@dataclass
class LyingSite:
    """A member that may say what it likes, and sign it with its own key."""

    site: str
    values: tuple[float, float] = (0.25, -0.5)

    @property
    def key(self) -> Ed25519PrivateKey:
        """Its identity key."""
        return KEYS[self.site]

    def update(self, open_round: OpenRound, **changes: Any) -> bytes:
        """Return an update in the wire format; ``changes`` are of its message."""
        tensors = {
            A: np.full((1, 3), self.values[0], np.float32),
            B: np.array([[self.values[0]], [self.values[1]]], np.float32),
        }
        values = {
            "kind": "update", "study": open_round.digest, "round": open_round.round,
            "site": self.site, "tensors": tensors, **changes,
        }  # fmt: skip
        return encode(Message(**values))

    def metrics(self, open_round: OpenRound, **changes: Any) -> bytes:
        """Return metrics of the final adapter."""
        values = {
            "study": open_round.digest, "site": self.site, "round": open_round.study.rounds.count,
            "epsilon_counts": 0.5, "epsilon_loss": 0.0, "minimum": 10,
            "counts": {"right": 31, "wrong": 9}, "loss": None, **changes,
        }  # fmt: skip
        return SiteMetrics(**values).canonical()

    def signed(
        self,
        open_round: OpenRound,
        payload: bytes,
        /,
        *,
        key: Ed25519PrivateKey | None = None,
        **changes: Any,
    ) -> tuple[bytes, bytes]:
        """Return a signed answer; ``changes`` are of its document."""
        values = {
            "alliance": ALLIANCE, "study": open_round.digest, "round": open_round.round,
            "attempt": open_round.attempt, "site": self.site, "payload": digest_of(payload),
            "announcement": digest_of(open_round.document), "ledger": None, **changes,
        }  # fmt: skip
        return Update(**values).signed(key or self.key), payload

    def honest(self, open_round: OpenRound) -> tuple[bytes, bytes]:
        """Return what an honest site answers."""
        return self.signed(open_round, self.update(open_round))

    def refusal(self, open_round: OpenRound, code: str, **changes: Any) -> tuple[bytes, bytes]:
        """Return a signed refusal."""
        values = {
            "alliance": ALLIANCE, "study": open_round.digest, "round": open_round.round,
            "attempt": open_round.attempt, "site": self.site, "code": code,
            "announcement": digest_of(open_round.document), **changes,
        }  # fmt: skip
        return Refusal(**values).signed(self.key), b""


def _flipped(data: bytes, end: bytes) -> bytes:
    """Return bytes whose last value is another."""
    return data[: -len(end)] + end


def _tensors(**values: Any) -> dict[str, Any]:
    return {"tensors": values}


_NAN, _INF = b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f"
Lie = Callable[[LyingSite, OpenRound], tuple[bytes, bytes]]


def _says(**changes: Any) -> Lie:
    return lambda site, asked: site.signed(asked, site.update(asked), **changes)


def _sends(make: Callable[[LyingSite, OpenRound], bytes]) -> Lie:
    return lambda site, asked: site.signed(asked, make(site, asked))


def _carries(**changes: Any) -> Lie:
    return _sends(lambda site, asked: site.update(asked, **changes))


_X = np.zeros((1, 3), np.float32)
_Y = np.zeros((2, 1), np.float32)

# What a member may try, and the code that it is told. Each lies in one thing alone.
LIES: dict[str, tuple[Lie, str]] = {
    "unsigned": (lambda site, asked: (b"{}", site.update(asked)), "not_signed"),
    "no document": (lambda site, asked: (b"\x80\x04 pickle", site.update(asked)), "not_signed"),
    "a document without end": (lambda site, asked: (b"[" * 70_000, b""), "not_signed"),
    "signed by a stranger": (_says(key=private(66)), "not_signed"),
    "id 8, signed by another member": (_says(key=KEYS["North"], site="North"), "not_signed"),
    "id 8, in another member's name": (_says(site="North"), "wrong_site"),
    "of another alliance": (_says(alliance="common"), "wrong_study"),
    "of another study": (_says(study="6" * 64), "wrong_study"),
    "of the round before": (_says(round=2), "wrong_round"),
    "of another announcement": (_says(announcement="a" * 64), "wrong_announcement"),
    "of an attempt to come": (_says(attempt=9), "wrong_announcement"),
    "with another payload": (_says(payload="b" * 64), "wrong_payload"),
    "up 1, a NaN": (_sends(lambda s, a: _flipped(s.update(a), _NAN)), "malformed"),
    "up 1, an infinity": (_sends(lambda s, a: _flipped(s.update(a), _INF)), "malformed"),
    "up 1, a tensor less": (_carries(**_tensors(**{A: _X})), "malformed"),
    "up 1, a tensor more": (_carries(**_tensors(**{A: _X, B: _Y, "c": _Y})), "malformed"),
    "up 1, another name": (_carries(**_tensors(**{A: _X, "l.0.lora_b": _Y})), "malformed"),
    "up 1, another shape": (_carries(**_tensors(**{A: _X, B: _Y.T})), "malformed"),
    "up 1, no values": (_carries(**_tensors(**{A: _X[:0], B: _Y})), "malformed"),
    "up 1, nothing": (_sends(lambda s, a: b""), "malformed"),
    "up 1, a pickle": (_sends(lambda s, a: b"\x80\x04K\x01."), "malformed"),
    "up 1, cut off": (_sends(lambda s, a: s.update(a)[:-1]), "malformed"),
    "up 1, more at the end": (_sends(lambda s, a: s.update(a) + b"\0"), "malformed"),
    "up 1, an adapter": (_carries(kind="adapter", site=""), "wrong_kind"),
    "up 2, a norm over the limit": (_carries(**_tensors(**{A: _X + 99, B: _Y})), "norm_too_large"),
    "up 4, a claim of 2^40 values": (
        _sends(lambda s, a: s.update(a).replace(b"[1,3]", b"[1099511627776,3]")),
        "malformed",
    ),
    "up 4, a header of 4 GB": (
        _sends(lambda s, a: s.update(a)[:4] + b"\xff\xff\xff\xff" + s.update(a)[8:]),
        "malformed",
    ),
    "id 8, another's name inside": (_carries(site="East"), "wrong_site"),
    "a stranger's name inside": (_carries(site="West"), "unknown_site"),
    "another study inside": (_carries(study="6" * 64), "wrong_study"),
    "another round inside": (_carries(round=2), "wrong_round"),
}
