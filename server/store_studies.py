"""What the alliance agreed to train: studies and their states, approvals, releases.

    proposed ─► open ⇄ paused        open | paused ─► finished | closed        proposed ─► closed

A finished or closed study never moves again. Approvals and withdrawals are kept as they came; the
last one is what stands. A withdrawal always stands at once. An approval stands only if it was
issued after the withdrawal before it, so that nobody brings an old one back. How much one site says
about one study is bounded, so that nobody fills the disk; it can always withdraw.
"""

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Literal, TypeAlias

from sqlalchemy import Connection, func, insert, select, update

from huizhen.protocol.errors import ConfigError, ProtocolError
from huizhen.protocol.statements import digest_of, stamp
from huizhen.server.store_database import Database, DuplicateError, read_all, read_one
from huizhen.server.tables import approvals, releases, studies

State: TypeAlias = Literal["proposed", "open", "paused", "finished", "closed"]
_NEXT: dict[State, tuple[State, ...]] = {
    "proposed": ("open", "closed"),
    "open": ("paused", "finished", "closed"),
    "paused": ("open", "finished", "closed"),
    "finished": (),
    "closed": (),
}
MAX_APPROVALS = 100
MAX_CONSENTS = 200
# what a site may have said about a study before an approval, and before a withdrawal, is refused
Kind: TypeAlias = Literal["approval", "withdrawal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredStudy:
    """A study and where it stands."""

    digest: str
    name: str
    document: bytes
    state: State
    reason: str
    # of the last change
    proposed: datetime
    changed: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Consent:
    """What a site said about a study."""

    number: int
    # in the order of arrival, over all sites and studies
    study: str
    site: str
    kind: Kind
    document: bytes
    digest: str
    issued: datetime
    received: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRelease:
    """A released adapter's statement."""

    number: int
    study: str
    document: bytes
    digest: str
    made: datetime


class Studies:
    """The part of the store about studies."""

    def __init__(self, database: Database) -> None:
        """Use the store's database."""
        self._database = database

    def propose(self, digest: str, name: str, document: bytes, now: datetime) -> bool:
        """Keep a study that is offered to sites; return whether it was not there.

        Args:
            digest: of the resolved study.
            name: for people.
            document: the signed offer.
            now: the present time.

        Raises:
            DuplicateError: another document offers this study.
            StorageError: the store cannot be written.
        """
        with self._database.writing() as connection:
            kept = _find(connection, digest)
            if kept is not None:
                if kept.document != document:
                    raise DuplicateError(f"study {digest[:12]} has another document, it stays")
                return False
            new = StoredStudy(
                digest=digest,
                name=name,
                document=document,
                state="proposed",
                reason="",
                proposed=now,
                changed=now,
            )
            connection.execute(insert(studies).values(asdict(new)))
        return True

    def change_state(self, study: str, state: State, now: datetime, *, reason: str = "") -> bool:
        """Move a study; return whether it was in another state.

        Raises:
            ConfigError: there is no such study, or no way from its state to this one.
            StorageError: the store cannot be written.
        """
        with self._database.writing() as connection:
            found = _find(connection, study)
            if found is None:
                raise ConfigError(f"no study has digest {study[:12]!r}: propose it first")
            if found.state == state:
                return False
            check_move(found, state)
            values = {"state": state, "reason": reason, "changed": now}
            this = studies.c.digest == study
            connection.execute(update(studies).where(this).values(values))
        return True

    def study(self, digest: str) -> StoredStudy | None:
        """Return a study, or None."""
        with self._database.reading() as connection:
            return _find(connection, digest)

    def studies(self) -> tuple[StoredStudy, ...]:
        """Return all studies as they were proposed."""
        query = select(studies).order_by(studies.c.proposed, studies.c.digest)
        with self._database.reading() as connection:
            return read_all(connection, StoredStudy, query)

    def add_approval(
        self, study: str, site: str, document: bytes, *, issued: datetime, now: datetime
    ) -> bool:
        """Keep a site's approval; return whether it was not there.

        Args:
            study: the study's digest.
            site: the approving site.
            document: its signed statement.
            issued: when the site says to have signed.
            now: the present time.

        Raises:
            ProtocolError: there is no such study, it was not issued after the withdrawal that
                stands, or the site has said too much about the study.
            StorageError: the store cannot be written.
        """
        return self._consent("approval", study, site, document, issued, now)

    def add_withdrawal(
        self, study: str, site: str, document: bytes, *, issued: datetime, now: datetime
    ) -> bool:
        """Keep the end of a site's consent; return whether it was not there.

        Raises:
            ProtocolError: there is no such study, or the site has said too much about it.
            StorageError: the store cannot be written.
        """
        return self._consent("withdrawal", study, site, document, issued, now)

    def is_new(
        self, kind: Kind, study: str, site: str, document: bytes, *, issued: datetime
    ) -> bool:
        """Return whether an approval or a withdrawal would be kept, before anything is logged.

        Raises:
            ProtocolError: it would be refused.
            StorageError: the store cannot be read.
        """
        with self._database.reading() as connection:
            return _is_new(connection, kind, study, site, digest_of(document), issued)

    def standing(self, study: str) -> dict[str, Consent]:
        """Return what each site said last, by site; who never spoke is not there."""
        last = (
            select(func.max(approvals.c.number))
            .where(approvals.c.study == study)
            .group_by(approvals.c.site)
        )
        query = select(approvals).where(approvals.c.number.in_(last))
        with self._database.reading() as connection:
            found = read_all(connection, Consent, query)
        return {one.site: one for one in found}

    def consents(self, study: str, site: str) -> tuple[Consent, ...]:
        """Return all that a site said about a study, as it came."""
        with self._database.reading() as connection:
            return _said(connection, study, site)

    def add_release(self, study: str, document: bytes, now: datetime) -> bool:
        """Keep the statement of a release; return whether it was not there.

        Raises:
            ProtocolError: there is no such study.
            StorageError: the store cannot be written.
        """
        digest = digest_of(document)
        with self._database.writing() as connection:
            need_study(connection, study)
            same = (releases.c.study == study) & (releases.c.digest == digest)
            if connection.execute(select(releases.c.number).where(same)).one_or_none() is not None:
                return False
            values = {"study": study, "document": document, "digest": digest, "made": now}
            connection.execute(insert(releases).values(values))
        return True

    def releases(self, study: str) -> tuple[StoredRelease, ...]:
        """Return a study's releases, oldest first."""
        query = select(releases).where(releases.c.study == study).order_by(releases.c.number)
        with self._database.reading() as connection:
            return read_all(connection, StoredRelease, query)

    def _consent(
        self,
        kind: Kind,
        study: str,
        site: str,
        document: bytes,
        issued: datetime,
        now: datetime,
    ) -> bool:
        digest = digest_of(document)
        with self._database.writing() as connection:
            if not _is_new(connection, kind, study, site, digest, issued):
                return False
            values = {
                "study": study,
                "site": site,
                "kind": kind,
                "document": document,
                "digest": digest,
                "issued": issued,
                "received": now,
            }
            connection.execute(insert(approvals).values(values))
        return True


def check_move(study: StoredStudy, state: State) -> None:
    """Refuse a state that a study cannot go to from its own.

    Raises:
        ConfigError: there is no way.
    """
    if state not in _NEXT[study.state]:
        ways = " or ".join(_NEXT[study.state]) or "nothing else any more"
        raise ConfigError(f"study {study.name!r} is {study.state}, it may become {ways}")


def need_study(connection: Connection, digest: str) -> StoredStudy:
    """Return a study inside a transaction.

    Raises:
        ProtocolError: there is none.
    """
    found = _find(connection, digest)
    if found is None:
        raise ProtocolError(f"study {digest[:12]!r} is not one of this coordinator's")
    return found


def _find(connection: Connection, digest: str) -> StoredStudy | None:
    return read_one(connection, StoredStudy, select(studies).where(studies.c.digest == digest))


def _said(connection: Connection, study: str, site: str) -> tuple[Consent, ...]:
    this = (approvals.c.study == study) & (approvals.c.site == site)
    return read_all(connection, Consent, select(approvals).where(this).order_by(approvals.c.number))


def _is_new(
    connection: Connection, kind: Kind, study: str, site: str, digest: str, issued: datetime
) -> bool:
    """Return whether this was not said before; refuse what may not be said."""
    need_study(connection, study)
    said = _said(connection, study, site)
    if any(one.digest == digest for one in said):
        return False
    withdrawn = [one.issued for one in said if one.kind == "withdrawal"]
    if kind == "approval" and withdrawn and issued <= max(withdrawn):
        raise ProtocolError(
            f"site {site!r} issued this approval at {stamp(issued)} and withdrew at "
            f"{stamp(max(withdrawn))}: it must approve anew"
        )
    most = MAX_APPROVALS if kind == "approval" else MAX_CONSENTS
    if len(said) >= most:
        raise ProtocolError(
            f"site {site!r} has said {len(said)} things about study {study[:12]}, {kind}s are "
            f"taken after fewer than {most}: what it said last stands"
        )
    return True
