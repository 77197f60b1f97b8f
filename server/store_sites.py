"""How sites are doing, and how far every party's audit log has come."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, Table, delete, insert, select, update

from huizhen.protocol.errors import ForkError
from huizhen.server.store_database import Database, read_all
from huizhen.server.store_studies import need_study
from huizhen.server.tables import audit_heads, progress, site_status

MAX_HEADS = 100
# per log; older ones go


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteStatus:
    """What a site reported last."""

    site: str
    version: str
    # of its software
    codes: tuple[str, ...]
    # of the troubles that its doctor found
    clock_skew_seconds: float
    seen: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteProgress:
    """How far a site is with a study."""

    study: str
    site: str
    code: str
    reported: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredHead:
    """A checkpoint of a party's audit log."""

    log: str
    size: int
    # entries
    root: str
    document: bytes
    # with the countersignatures so far
    received: datetime


class Sites:
    """The part of the store about sites."""

    def __init__(self, database: Database) -> None:
        """Use the store's database."""
        self._database = database

    def report_status(self, status: SiteStatus) -> None:
        """Keep what a site reports, in place of what it reported before.

        Raises:
            ValueError: a code has spaces or is empty.
            StorageError: the store cannot be written.
        """
        if any(code.split() != [code] for code in status.codes):
            raise ValueError(f"codes are {status.codes}, expected words")
        values = {
            "version": status.version,
            "codes": " ".join(status.codes),
            "clock_skew_seconds": status.clock_skew_seconds,
            "seen": status.seen,
        }
        with self._database.writing() as connection:
            _put(connection, site_status, {"site": status.site}, values)

    def statuses(self) -> tuple[SiteStatus, ...]:
        """Return what the sites reported last, sorted by site."""
        with self._database.reading() as connection:
            rows = connection.execute(select(site_status)).all()
        found = [SiteStatus(**{**row._mapping, "codes": tuple(row.codes.split())}) for row in rows]
        return tuple(sorted(found, key=lambda one: one.site.encode()))

    def report_progress(self, study: str, site: str, code: str, now: datetime) -> None:
        """Keep how far a site is with a study, in place of what it reported before.

        Raises:
            ProtocolError: there is no such study.
            StorageError: the store cannot be written.
        """
        with self._database.writing() as connection:
            need_study(connection, study)
            key = {"study": study, "site": site}
            _put(connection, progress, key, {"code": code, "reported": now})

    def progress(self, study: str) -> tuple[SiteProgress, ...]:
        """Return how far the sites are with a study, sorted by site."""
        query = select(progress).where(progress.c.study == study)
        with self._database.reading() as connection:
            found = read_all(connection, SiteProgress, query)
        return tuple(sorted(found, key=lambda one: one.site.encode()))

    def add_head(self, head: StoredHead) -> bool:
        """Keep a log's head; return whether anything was written.

        A head of the latest size takes the place of the one there, which had other
        countersignatures. One that is smaller than the latest came late and is not kept.

        Raises:
            ForkError: the log has shown another head of this size, which stays.
            StorageError: the store cannot be written.
        """
        this = audit_heads.c.log == head.log
        with self._database.writing() as connection:
            query = select(audit_heads).where(this).order_by(audit_heads.c.size)
            known = {one.size: one for one in read_all(connection, StoredHead, query)}
            same = known.get(head.size)
            if same is not None and same.root != head.root:
                raise ForkError(
                    f"log {head.log!r} has shown head {same.root[:12]} of size {head.size} and now "
                    f"{head.root[:12]}: ask its owner, and keep both documents",
                    (same.document, head.document),
                )
            if (known and head.size < max(known)) or (same and same.document == head.document):
                return False
            key = {"log": head.log, "size": head.size}
            values = {"root": head.root, "document": head.document, "received": head.received}
            _put(connection, audit_heads, key, values)
            if too_old := sorted({*known, head.size})[:-MAX_HEADS]:
                connection.execute(delete(audit_heads).where(this, audit_heads.c.size.in_(too_old)))
        return True

    def heads(self, log: str) -> tuple[StoredHead, ...]:
        """Return the last ``MAX_HEADS`` heads of a log, smallest first."""
        query = select(audit_heads).where(audit_heads.c.log == log).order_by(audit_heads.c.size)
        with self._database.reading() as connection:
            return read_all(connection, StoredHead, query)


def _put(
    connection: Connection, table: Table, key: Mapping[str, object], values: Mapping[str, object]
) -> None:
    """Insert a row or change the one there; no other writer is beside."""
    this = [table.c[name] == value for name, value in key.items()]
    if connection.execute(update(table).where(*this).values(values)).rowcount == 0:
        connection.execute(insert(table).values({**key, **values}))
