"""The database under the coordinator's store: SQLite or PostgreSQL, one error a trouble.

Every writer is alone: SQLite by BEGIN IMMEDIATE, PostgreSQL by one advisory lock, so what a
transaction has read is still so when it commits. A reported commit is on the disk: SQLite has the
write-ahead log with synchronous FULL (https://www.sqlite.org/pragma.html#pragma_synchronous), and a
PostgreSQL that does not sync is refused
(https://www.postgresql.org/docs/current/runtime-config-wal.html).
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    Select,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import ArgumentError

from huizhen.protocol.errors import ConfigError, ProtocolError, StorageError
from huizhen.server.store_failures import BUSY_SECONDS, failures
from huizhen.server.store_schema import migrate
from huizhen.storage.files import make_folder, sync

T = TypeVar("T")
_APPLICATION = 0x485A5331  # "HZS1": in SQLite's header it says store, in PostgreSQL it is the lock
_CONNECT_SECONDS = 10
_IDLE_SECONDS = 10


class DuplicateError(ProtocolError):
    """Something else is kept under the same key already, and stays."""


class Database:
    """An open database; threads may share it."""

    def __init__(self, engine: Engine, name: str) -> None:
        """Use an engine; ``open_database`` is for everybody else."""
        self._readers, self._name = engine, name
        self._writers = engine.execution_options(writes=True)

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """Give one transaction that sees what was committed.

        Raises:
            StorageError: the database cannot be read or reached.
        """
        with failures(self._name), self._readers.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """Give one transaction that no other writer is beside; it is committed at the end.

        Raises:
            StorageError: the disk is full or read-only, another writer holds the database for too
                long, or it cannot be reached.
        """
        with failures(self._name), self._writers.begin() as connection:
            yield connection

    def close(self) -> None:
        """Let go of all connections."""
        self._readers.dispose()


def open_database(url: str) -> Database:
    """Open a store's database, made or brought to this version's schema.

    Args:
        url: ``sqlite:////absolute/file`` or ``postgresql://user@host/name``; a password stands in
            a file that the URL names (``?passfile=``), never in the URL.

    Raises:
        ConfigError: the URL is wrong, or names something else than a store, one of a newer
            version, or one whose commits would not survive a power cut.
        StorageError: it is damaged, cannot be reached, or cannot be written.
    """
    address = _parse(url)
    name = address.render_as_string(hide_password=True)
    is_file = address.drivername == "sqlite"
    engine = _sqlite(address) if is_file else _postgresql(address)
    database = Database(engine, name)
    try:
        with failures(name):
            (_check_sqlite if is_file else _check_postgresql)(engine, name)
        with database.writing() as connection:
            if is_file:
                connection.exec_driver_sql(f"PRAGMA application_id = {_APPLICATION}")
            migrate(connection, name)
    except BaseException:
        database.close()
        raise
    return database


def read_one(connection: Connection, cls: type[T], query: Select[Any]) -> T | None:
    """Return the first row as a dataclass that has its columns, or None."""
    row = connection.execute(query.limit(1)).one_or_none()
    return None if row is None else cls(**row._mapping)


def read_all(connection: Connection, cls: type[T], query: Select[Any]) -> tuple[T, ...]:
    """Return the rows as dataclasses that have their columns."""
    return tuple(cls(**row._mapping) for row in connection.execute(query))


def _parse(url: str) -> URL:
    """Return what a URL says, with the driver that is used."""
    expected = "expected sqlite:////absolute/file or postgresql://user@host/name"
    try:
        address = make_url(url)
    except (ArgumentError, ValueError):  # their texts may hold a password
        raise ConfigError(f"the store's URL cannot be read, {expected}") from None
    shown = address.render_as_string(hide_password=True)
    if address.drivername == "sqlite":
        others = address.host or address.username or address.password or address.query
        if others or address.database in (None, "", ":memory:"):
            raise ConfigError(f"the store's URL is {shown!r}, which names no file: {expected}")
        return address
    if address.drivername not in ("postgresql", "postgresql+psycopg") or not address.database:
        raise ConfigError(f"the store's URL is {shown!r}, {expected}")
    if address.password is not None:
        raise ConfigError(
            f"the store's URL {shown!r} holds a password: keep it in a file of mode 600 and "
            "name that with ?passfile="
        )
    return address.set(drivername="postgresql+psycopg")


def _sqlite(address: URL) -> Engine:
    path = Path(str(address.database)).absolute()
    _make_private(path)
    engine = create_engine(
        address.set(database=str(path)),
        connect_args={"timeout": BUSY_SECONDS},
        pool_timeout=BUSY_SECONDS,
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver begins no transaction of its own
        for setting in ("synchronous = FULL", "foreign_keys = ON", "trusted_schema = OFF"):
            connection.execute(f"PRAGMA {setting}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _make_private(path: Path) -> None:
    """Make an empty file for its owner alone, or check that the one there is."""
    try:
        make_folder(path.parent, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        sync(path.parent)
        found = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise StorageError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    if found & ~0o600:
        raise ConfigError(
            f"{str(path)!r} is open to others than its owner (mode {found:o}): "
            f"chmod 600 {str(path)!r}"
        )


def _check_sqlite(engine: Engine, name: str) -> None:
    """Refuse a file that is no store or is damaged; change nothing in it but the journal's mode."""
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None  # noqa: S101 - for the type checker
        # One statement, so that another process that makes the store is seen whole or not at all.
        [[application, tables]] = driver.execute(
            "SELECT application_id, (SELECT count(*) FROM sqlite_schema) FROM pragma_application_id"
        ).fetchall()
        if application != _APPLICATION and (application, tables) != (0, 0):
            raise ConfigError(f"{name!r} is not a store: name another file")
        if (found := driver.execute("PRAGMA integrity_check(1)").fetchall()) != [("ok",)]:
            where = found[0][0].splitlines()[-1]
            raise StorageError(f"{name!r} is damaged ({where}): restore a backup")
        if (mode := driver.execute("PRAGMA journal_mode = WAL").fetchall()) != [("wal",)]:
            raise ConfigError(
                f"{name!r} has journal mode {mode[0][0]!r}, expected 'wal': "
                "put the store on a local disk"
            )


def _postgresql(address: URL) -> Engine:
    wait = {} if "connect_timeout" in address.query else {"connect_timeout": _CONNECT_SECONDS}
    engine = create_engine(
        address,
        connect_args=wait,
        isolation_level="READ COMMITTED",
        pool_pre_ping=True,
        pool_timeout=BUSY_SECONDS,
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        connection.execute(f"SET lock_timeout = '{BUSY_SECONDS}s'")
        # A process that was stopped in a transaction lets the others in before they give up.
        connection.execute(f"SET idle_in_transaction_session_timeout = '{_IDLE_SECONDS}s'")
        connection.commit()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if connection.get_execution_options().get("writes", False):
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_APPLICATION})")

    return engine


def _check_postgresql(engine: Engine, name: str) -> None:
    with engine.connect() as connection:
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            if connection.exec_driver_sql(f"SHOW {setting}").scalar_one() == "off":
                raise ConfigError(
                    f"{name!r} has {setting} = off, a commit would not survive a power cut: "
                    "set it to on"
                )
