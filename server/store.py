"""The coordinator's store: what it must still know after any crash.

One database, SQLite by default and PostgreSQL when that is outgrown, used by several processes at
once: the alliance's service, the process that runs the rounds, the command line. Every method that
writes is one transaction, and what it reported is on the disk. Documents are opaque here: callers
sign and verify them, and pass times from their own clock. Large things are files in
``server/objects.py``, on the disk before the row that names them.
"""

from dataclasses import dataclass
from types import TracebackType
from typing import Self

from sqlalchemy import Column, Connection, func, select, union

from huizhen.server.store_database import Database, open_database
from huizhen.server.store_members import Members
from huizhen.server.store_rounds import Rounds
from huizhen.server.store_sites import Sites
from huizhen.server.store_studies import Studies
from huizhen.server.store_updates import Updates
from huizhen.server.tables import attempts, counted, records, refusals, updates


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What was done so far, for /metrics."""

    rounds: dict[str, int]
    # committed, by study
    updates: dict[str, int]
    # counted in committed rounds, by study
    refusals: dict[str, int]
    # kept ones, by code


class Store:
    """An open store; threads may share it. ``with`` lets go of it at the end."""

    def __init__(self, database: Database) -> None:
        """Use an open database; ``open`` is for everybody else."""
        self._database = database
        self.members = Members(database)
        self.studies = Studies(database)
        self.rounds = Rounds(database)
        self.updates = Updates(database)
        self.sites = Sites(database)

    @classmethod
    def open(cls, url: str) -> Self:
        """Open a store, made if it is not there and brought to this version's schema.

        Args:
            url: ``sqlite:////absolute/file`` or ``postgresql://user@host/name``; a password stands
                in a file that the URL names (``?passfile=``), never in the URL.

        Raises:
            ConfigError: the URL is wrong, or names something else than a store, one of a newer
                version, one that others may read, or one whose commits would not survive a power
                cut.
            StorageError: it is damaged, cannot be reached, or cannot be written.
        """
        return cls(open_database(url))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shut()

    def shut(self) -> None:
        """Let go of the database."""
        self._database.close()

    def counts(self) -> Counts:
        """Return what was done so far."""
        with self._database.reading() as connection:
            return Counts(
                rounds=_count_by(connection, records.c.study),
                updates=_count_by(connection, counted.c.study),
                refusals=_count_by(connection, refusals.c.code),
            )

    def object_digests(self) -> frozenset[str]:
        """Return the digests of all objects that rows name: what no sweep may take."""
        named = (attempts.c.adapter, updates.c.payload, records.c.adapter, records.c.strategy_state)
        with self._database.reading() as connection:
            return frozenset(connection.execute(union(*map(select, named))).scalars())


def _count_by(connection: Connection, column: Column[str]) -> dict[str, int]:
    rows = connection.execute(select(column, func.count()).group_by(column))
    return {value: number for value, number in rows}  # noqa: C416 - rows are no pairs to mypy
