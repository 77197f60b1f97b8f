"""The SQLite file under a site's privacy ledger: made whole, read with care, one error a trouble.

A row holds an entry's number and its RFC 8785 JSON, nothing else. The write-ahead log with
synchronous FULL is on the disk when COMMIT returns (https://www.sqlite.org/pragma.html#pragma_synchronous).
"""

import contextlib
import json
import os
import sqlite3
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rfc8785

from huizhen.protocol.errors import ConfigError, PrivacyError, StorageError
from huizhen.protocol.ledger_entries import SCHEMA, Entry
from huizhen.storage.files import make_folder, sync

BUSY_SECONDS = 30
# how long to wait for another process that writes; pricing a reservation may take seconds
_APPLICATION = 0x485A4C31  # "HZL1" in the file's header says that it is a ledger
_SCHEMA = (
    "CREATE TABLE entries (sequence INTEGER PRIMARY KEY, entry BLOB NOT NULL)",
    "CREATE TRIGGER entries_never_change BEFORE UPDATE ON entries "
    "BEGIN SELECT RAISE(ABORT, 'a ledger is append-only'); END",
    "CREATE TRIGGER entries_never_go BEFORE DELETE ON entries "
    "BEGIN SELECT RAISE(ABORT, 'a ledger is append-only'); END",
    # INSERT OR REPLACE deletes without the trigger above.
    "CREATE TRIGGER entries_only_follow BEFORE INSERT ON entries "
    "WHEN NEW.sequence IS NOT (SELECT coalesce(max(sequence), 0) + 1 FROM entries) "
    "BEGIN SELECT RAISE(ABORT, 'a ledger is append-only'); END",
)


def create(path: Path, first: Entry) -> None:
    """Make the file with its first entry; it is whole or absent, and for its owner alone.

    Raises:
        ConfigError: the file exists, or others may enter its folder.
        StorageError: it cannot be written.
    """
    with storage(path):
        make_folder(path.parent, mode=0o700)
        _check_private(path.parent, 0o700)
        number, name = tempfile.mkstemp(prefix=".ledger-", dir=path.parent)  # mode 0600
        os.close(number)
        draft = Path(name)
        try:
            with contextlib.closing(_connect(draft)) as database:
                _write_first(database, first)
            path.hardlink_to(draft)  # fails where a ledger is: none is ever replaced
        except FileExistsError as error:
            raise ConfigError(f"{str(path)!r} exists: a ledger is made once") from error
        finally:
            draft.unlink()
        sync(path.parent)


def connect(path: Path) -> sqlite3.Connection:
    """Open the file, which must exist.

    Raises:
        ConfigError: there is none, or others than its owner may read it.
        StorageError: it cannot be opened.
    """
    with storage(path):
        if not path.exists():
            raise ConfigError(f"no ledger at {str(path)!r}: name the file of one")
        _check_private(path.parent, 0o700)
        _check_private(path, 0o600)
        return _connect(path)


def check(database: sqlite3.Connection, path: Path) -> None:
    """Refuse a file that is not a ledger of this version, whole and guarded.

    Raises:
        ConfigError: it is no ledger, or of a newer version.
        PrivacyError: its table or its triggers were changed.
        StorageError: it is damaged.
    """
    with storage(path):
        [[application]] = database.execute("PRAGMA application_id")
        [[schema]] = database.execute("PRAGMA user_version")
        if application != _APPLICATION:
            raise ConfigError(f"{str(path)!r} is not a ledger: name another file")
        if schema != SCHEMA:
            raise ConfigError(
                f"{str(path)!r} has schema {schema}, this version reads {SCHEMA}: upgrade huizhen"
            )
        if database.execute("PRAGMA quick_check").fetchall() != [("ok",)]:
            raise StorageError(f"{str(path)!r} {_REASONS[sqlite3.SQLITE_CORRUPT]}")
        if {sql for [sql] in database.execute("SELECT sql FROM sqlite_master")} != set(_SCHEMA):
            raise PrivacyError(
                f"{str(path)!r} has other tables or triggers than a ledger, somebody changed them: "
                "restore a backup"
            )


def read(database: sqlite3.Connection, path: Path, sequence: int) -> Iterator[Any]:
    """Give the entries from number ``sequence`` on, as JSON values.

    Raises:
        PrivacyError: an entry is not the one encoding of what it says; names it.
        StorageError: the file cannot be read.
    """
    query = "SELECT sequence, entry FROM entries WHERE sequence >= ? ORDER BY sequence"
    with storage(path):
        rows = database.execute(query, (sequence,)).fetchall()
    for number, entry in rows:
        yield _parse(number, entry)


def identity(path: Path) -> tuple[int, int]:
    """Return what tells a file from another one of its name; zeros where there is none."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_dev, found.st_ino)


@contextlib.contextmanager
def storage(path: Path) -> Iterator[None]:
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
            raise ConfigError(f"{str(path)!r} is not a ledger: name another file") from error
        reason = _REASONS.get(code & 0xFF, f"was refused by SQLite ({error}): nothing was written")
        raise StorageError(f"{str(path)!r} {reason}") from error


_REASONS = {
    sqlite3.SQLITE_BUSY: f"is held by another process for over {BUSY_SECONDS} s: try again later",
    sqlite3.SQLITE_FULL: "cannot grow, the disk is full: make room, nothing was charged",
    sqlite3.SQLITE_READONLY: "cannot be written, it or its disk is read-only: nothing was charged",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened: look at its folder's permissions and disk",
    sqlite3.SQLITE_IOERR: "cannot be read or written, the disk fails or is full",
    sqlite3.SQLITE_CORRUPT: "is damaged: restore a backup, and open it with the witnessed head",
}


def _connect(path: Path) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode=rw"
    database = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        database.execute("PRAGMA synchronous = FULL")
    except sqlite3.Error:
        database.close()
        raise
    return database


def _write_first(database: sqlite3.Connection, first: Entry) -> None:
    database.execute(f"PRAGMA application_id = {_APPLICATION}")
    database.execute(f"PRAGMA user_version = {SCHEMA}")
    database.execute("PRAGMA journal_mode = WAL")  # the file remembers it
    database.execute("BEGIN IMMEDIATE")
    for statement in _SCHEMA:
        database.execute(statement)
    database.execute("INSERT INTO entries VALUES (?, ?)", (1, first.canonical()))
    database.execute("COMMIT")


def _parse(sequence: int, entry: Any) -> Any:
    """Return a row's JSON value; the bytes must be the one encoding of what they say."""
    try:
        value = json.loads(entry.decode("utf-8"))
        is_canonical = rfc8785.dumps(value) == entry and value["sequence"] == sequence
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        is_canonical = False
    if not is_canonical:
        raise PrivacyError(f"entry {sequence} of the ledger is not as it was written")
    return value


def _check_private(path: Path, mode: int) -> None:
    found = stat.S_IMODE(path.stat().st_mode)
    if found & ~mode:
        raise ConfigError(
            f"{str(path)!r} is open to others than its owner (mode {found:o}): "
            f"chmod {mode:o} {str(path)!r}"
        )
