"""SQLite files that only grow: made whole, guarded by triggers, read with care.

A row of a log holds an entry's number and its RFC 8785 JSON, nothing else. The write-ahead log with
synchronous FULL is on the disk when COMMIT returns (https://www.sqlite.org/pragma.html#pragma_synchronous).
The triggers are against accidents; against whoever rewrites the file there are witnesses.
"""

import contextlib
import json
import os
import sqlite3
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rfc8785

from huizhen.protocol.errors import ConfigError, HuizhenError, StorageError
from huizhen.storage.files import make_folder, sync

MAX_ROW = (1 << 63) - 1


def table(name: str, columns: str, thing: str) -> tuple[str, ...]:
    """Return the statements of a table whose rows are numbered from 1, never change and never go.

    Args:
        name: of the table.
        columns: after ``sequence``, as SQL.
        thing: what is append-only, in the message of a refusal, such as ``a ledger``.
    """
    refuse = f"BEGIN SELECT RAISE(ABORT, '{thing} is append-only'); END"
    last = f"SELECT coalesce(max(sequence), 0) + 1 FROM {name}"  # noqa: S608 - our own names
    return (
        f"CREATE TABLE {name} (sequence INTEGER PRIMARY KEY, {columns})",
        f"CREATE TRIGGER {name}_never_change BEFORE UPDATE ON {name} {refuse}",
        f"CREATE TRIGGER {name}_never_go BEFORE DELETE ON {name} {refuse}",
        # INSERT OR REPLACE deletes without the trigger above.
        f"CREATE TRIGGER {name}_only_follow BEFORE INSERT ON {name} "
        f"WHEN NEW.sequence IS NOT ({last}) {refuse}",
    )


def identity(path: Path) -> tuple[int, int]:
    """Return what tells a file from another one of its name; zeros where there is none."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_dev, found.st_ino)


def check_private(path: Path, mode: int) -> None:
    """Refuse a file or folder that others than its owner may use.

    Raises:
        ConfigError: it has permissions beyond ``mode``; names the chmod.
        OSError: it cannot be looked at.
    """
    found = stat.S_IMODE(path.stat().st_mode)
    if found & ~mode:
        raise ConfigError(
            f"{str(path)!r} is open to others than its owner (mode {found:o}): "
            f"chmod {mode:o} {str(path)!r}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One kind of file: its mark, its tables and what is said of it."""

    application: int
    # in the file's header, four letters
    schema: int
    statements: tuple[str, ...]
    # the whole schema, whose text is part of the format
    name: str
    article: str
    broken: type[HuizhenError]
    # raised where somebody changed the file
    consequence: str
    # what did not happen when it cannot be written, such as ``nothing was charged``
    busy_seconds: float = 30
    # how long to wait for another process that writes

    def create(self, path: Path, first: bytes | None = None) -> None:
        """Make the file; it is whole or absent, and for its owner alone.

        Args:
            path: the file, which must not exist; its folder is made for its owner alone.
            first: entry 1 of the table ``entries``, if it has one from the beginning.

        Raises:
            ConfigError: the file exists, or others may enter its folder.
            StorageError: it cannot be written.
        """
        with self.storage(path):
            make_folder(path.parent, mode=0o700)
            check_private(path.parent, 0o700)
            prefix = f".{self.name.split()[0]}-"
            number, name = tempfile.mkstemp(prefix=prefix, dir=path.parent)  # mode 0600
            os.close(number)
            draft = Path(name)
            try:
                with contextlib.closing(_connect(draft, self.busy_seconds)) as database:
                    self._write_first(database, first)
                path.hardlink_to(draft)  # fails where a file is: none is ever replaced
            except FileExistsError as error:
                raise ConfigError(
                    f"{str(path)!r} exists: {self.article} {self.name} is made once"
                ) from error
            finally:
                draft.unlink()
            sync(path.parent)

    def connect(
        self, path: Path, *, timeout_seconds: float | None = None, threads: bool = False
    ) -> sqlite3.Connection:
        """Open the file, which must exist.

        Args:
            path: the file.
            timeout_seconds: how long to wait for others; ``busy_seconds`` if None.
            threads: whether several threads use it, one at a time.

        Raises:
            ConfigError: there is none, or others than its owner may read it.
            StorageError: it cannot be opened.
        """
        with self.storage(path):
            if not path.exists():
                raise ConfigError(f"no {self.name} at {str(path)!r}: name the file of one")
            check_private(path.parent, 0o700)
            check_private(path, 0o600)
            wait = self.busy_seconds if timeout_seconds is None else timeout_seconds
            return _connect(path, wait, threads)

    def check(self, database: sqlite3.Connection, path: Path) -> None:
        """Refuse a file that is not of this kind and version, whole and guarded.

        Raises:
            ConfigError: it is something else, or of a newer version.
            HuizhenError: its tables or its triggers were changed; of the class ``broken``.
            StorageError: it is damaged.
        """
        with self.storage(path):
            [[application]] = database.execute("PRAGMA application_id")
            [[schema]] = database.execute("PRAGMA user_version")
            if application != self.application:
                raise self._other(path)
            if schema != self.schema:
                raise ConfigError(
                    f"{str(path)!r} has schema {schema}, this version reads {self.schema}: "
                    "upgrade huizhen"
                )
            if database.execute("PRAGMA quick_check").fetchall() != [("ok",)]:
                raise StorageError(f"{str(path)!r} {_DAMAGED}")
            found = {sql for [sql] in database.execute("SELECT sql FROM sqlite_master")}
            if found != set(self.statements):
                raise self.broken(
                    f"{str(path)!r} has other tables or triggers than {self.article} {self.name}, "
                    "somebody changed them: restore a backup"
                )

    def rows(
        self, database: sqlite3.Connection, path: Path, first: int, last: int = MAX_ROW
    ) -> list[tuple[int, Any]]:
        """Return the numbers and bytes of the entries from ``first`` to ``last``, as they are.

        Raises:
            StorageError: the file cannot be read.
        """
        query = "SELECT sequence, entry FROM entries WHERE sequence BETWEEN ? AND ? ORDER BY 1"
        with self.storage(path):
            return database.execute(query, (first, last)).fetchall()

    def read(self, database: sqlite3.Connection, path: Path, sequence: int) -> Iterator[Any]:
        """Give the entries from number ``sequence`` on, as JSON values.

        Raises:
            HuizhenError: an entry is not the one encoding of what it says; of the class ``broken``,
                names it.
            StorageError: the file cannot be read.
        """
        for number, entry in self.rows(database, path, sequence):
            yield self._parse(number, entry)

    @contextlib.contextmanager
    def storage(self, path: Path) -> Iterator[None]:
        """Turn what SQLite and the disk say into one line each.

        Raises:
            ConfigError: the file is not SQLite's.
            StorageError: the disk is full, read-only or damaged, or another process holds the file.
        """
        try:
            yield
        except OSError as error:
            raise StorageError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", None)
            if code is None:
                raise
            if code & 0xFF == sqlite3.SQLITE_NOTADB:
                raise self._other(path) from error
            raise StorageError(f"{str(path)!r} {self._reason(code & 0xFF, error)}") from error

    def _parse(self, sequence: int, entry: Any) -> Any:
        """Return a row's JSON value; the bytes must be the one encoding of what they say."""
        try:
            value = json.loads(entry.decode("utf-8"))
            is_canonical = rfc8785.dumps(value) == entry and value["sequence"] == sequence
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
            is_canonical = False
        if not is_canonical:
            raise self.broken(f"entry {sequence} of the {self.name} is not as it was written")
        return value

    def _reason(self, code: int, error: sqlite3.Error) -> str:
        busy = f"is held by another process for over {self.busy_seconds} s: try again later"
        reasons = {
            sqlite3.SQLITE_BUSY: busy,
            sqlite3.SQLITE_FULL: f"cannot grow, the disk is full: make room, {self.consequence}",
            sqlite3.SQLITE_READONLY: (
                f"cannot be written, it or its disk is read-only: {self.consequence}"
            ),
            sqlite3.SQLITE_CANTOPEN: "cannot be opened: look at its folder's permissions and disk",
            sqlite3.SQLITE_IOERR: "cannot be read or written, the disk fails or is full",
            sqlite3.SQLITE_CORRUPT: _DAMAGED,
        }
        return reasons.get(code, f"was refused by SQLite ({error}): nothing was written")

    def _other(self, path: Path) -> ConfigError:
        return ConfigError(f"{str(path)!r} is not {self.article} {self.name}: name another file")

    def _write_first(self, database: sqlite3.Connection, first: bytes | None) -> None:
        database.execute(f"PRAGMA application_id = {self.application}")
        database.execute(f"PRAGMA user_version = {self.schema}")
        database.execute("PRAGMA journal_mode = WAL")  # the file remembers it
        database.execute("BEGIN IMMEDIATE")
        for statement in self.statements:
            database.execute(statement)
        if first is not None:
            database.execute("INSERT INTO entries VALUES (?, ?)", (1, first))
        database.execute("COMMIT")


_DAMAGED = "is damaged: restore a backup, and open it with the witnessed head"


def _connect(path: Path, timeout_seconds: float, threads: bool = False) -> sqlite3.Connection:
    database = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=timeout_seconds,
        isolation_level=None,
        check_same_thread=not threads,
    )
    try:
        database.execute("PRAGMA synchronous = FULL")
    except sqlite3.Error:
        database.close()
        raise
    return database
