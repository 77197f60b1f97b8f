"""The tables of the coordinator's store, as the newest step in ``migrations/`` leaves them.

Documents are opaque bytes here and named by their SHA-256. Times are UTC text in whole seconds,
as statements write them, so that they sort as they pass. Tables in ``APPEND_ONLY`` have triggers
that refuse to change or delete a row.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Dialect,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)
from sqlalchemy.types import TypeDecorator

from huizhen.protocol.statements import moment, stamp

STATES = ("proposed", "open", "paused", "finished", "closed")
APPEND_ONLY = (
    "memberships",
    "approvals",
    "releases",
    "attempts",
    "updates",
    "receipts",
    "records",
    "counted",
)


class UtcTime(TypeDecorator[datetime]):
    """A moment, kept as text such as 2026-01-31T09:00:00Z; parts of a second are cut off."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> str | None:
        """Return the text to keep.

        Raises:
            ValueError: the moment has no zone.
        """
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"time {value.isoformat()} has no zone, expected UTC")
        return stamp(value)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:
        """Return the moment that was kept."""
        return None if value is None else moment(value)


metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)


def _study(*, primary_key: bool = False) -> Column[str]:
    return Column(
        "study", String, ForeignKey("studies.digest"), primary_key=primary_key, nullable=False
    )


def _time(name: str, *, nullable: bool = False) -> Column[datetime]:
    return Column(name, UtcTime, nullable=nullable)


invitations = Table(
    "invitations",
    metadata,
    Column("token", String, primary_key=True),
    Column("site", String, nullable=False),
    _time("made"),
    _time("expires"),
    _time("used", nullable=True),
    Column("key", String),
)

memberships = Table(
    "memberships",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("document", LargeBinary, nullable=False),
    _time("received"),
)

certificates = Table(
    "certificates",
    metadata,
    Column("serial", String, primary_key=True),
    Column("site", String, nullable=False, index=True),
    _time("issued"),
    _time("not_after"),
    _time("revoked", nullable=True),
)

studies = Table(
    "studies",
    metadata,
    Column("digest", String, primary_key=True),
    Column("name", String, nullable=False),
    Column("document", LargeBinary, nullable=False),
    Column("state", String, nullable=False),
    Column("reason", String, nullable=False),
    _time("proposed"),
    _time("changed"),
    CheckConstraint(f"state IN {STATES}", name="state"),
)

approvals = Table(
    "approvals",
    metadata,
    Column("number", Integer, primary_key=True),
    _study(),
    Column("site", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("document", LargeBinary, nullable=False),
    Column("digest", String, nullable=False),
    _time("issued"),
    _time("received"),
    UniqueConstraint("study", "site", "digest"),
    CheckConstraint("kind IN ('approval', 'withdrawal')", name="kind"),
)

releases = Table(
    "releases",
    metadata,
    Column("number", Integer, primary_key=True),
    _study(),
    Column("document", LargeBinary, nullable=False),
    Column("digest", String, nullable=False),
    _time("made"),
    UniqueConstraint("study", "digest"),
)

attempts = Table(
    "attempts",
    metadata,
    _study(primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("announcement", LargeBinary, nullable=False),
    Column("adapter", String, nullable=False),
    _time("opened"),
    _time("deadline"),
)

updates = Table(
    "updates",
    metadata,
    Column("study", String, primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("site", String, primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("payload", String, nullable=False),
    Column("document", LargeBinary, nullable=False),
    _time("received"),
    ForeignKeyConstraint(
        ["study", "round", "attempt"], ["attempts.study", "attempts.round", "attempts.attempt"]
    ),
)

refusals = Table(
    "refusals",
    metadata,
    Column("number", Integer, primary_key=True),
    _study(),
    Column("round", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("site", String),
    Column("code", String, nullable=False),
    Column("payload", String),
    _time("received"),
    Index(None, "study", "round"),
)

receipts = Table(
    "receipts",
    metadata,
    Column("number", Integer, primary_key=True),
    _study(),
    Column("round", Integer, nullable=False),
    Column("site", String, nullable=False),
    Column("payload", String, nullable=False),
    Column("document", LargeBinary, nullable=False),
    Column("digest", String, nullable=False),
    UniqueConstraint("study", "round", "site", "digest"),
    Index(None, "site", "number"),
)

records = Table(
    "records",
    metadata,
    _study(primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("parent", String, nullable=False),
    Column("document", LargeBinary, nullable=False),
    Column("digest", String, nullable=False),
    Column("adapter", String, nullable=False),
    Column("strategy_state", String, nullable=False),
    _time("committed"),
    ForeignKeyConstraint(
        ["study", "round", "attempt"], ["attempts.study", "attempts.round", "attempts.attempt"]
    ),
)

counted = Table(
    "counted",
    metadata,
    Column("study", String, primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("site", String, primary_key=True),
    ForeignKeyConstraint(["study", "round"], ["records.study", "records.round"]),
    ForeignKeyConstraint(
        ["study", "round", "site"], ["updates.study", "updates.round", "updates.site"]
    ),
)

audit_heads = Table(
    "audit_heads",
    metadata,
    Column("log", String, primary_key=True),
    Column("size", BigInteger, primary_key=True, autoincrement=False),
    Column("root", String, nullable=False),
    Column("document", LargeBinary, nullable=False),
    _time("received"),
)

site_status = Table(
    "site_status",
    metadata,
    Column("site", String, primary_key=True),
    Column("version", String, nullable=False),
    Column("codes", String, nullable=False),
    Column("clock_skew_seconds", Float, nullable=False),
    _time("seen"),
)

progress = Table(
    "progress",
    metadata,
    _study(primary_key=True),
    Column("site", String, primary_key=True),
    Column("code", String, nullable=False),
    _time("reported"),
)

leases = Table(
    "leases",
    metadata,
    _study(primary_key=True),
    Column("owner", String, nullable=False),
    _time("until"),
)
