"""The SQLite file under a site's privacy ledger, as ``storage/append_only.py`` keeps such files."""

import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from huizhen.protocol.errors import PrivacyError
from huizhen.protocol.ledger_entries import SCHEMA, Entry
from huizhen.storage import append_only

BUSY_SECONDS = 30
# how long to wait for another process that writes; pricing a reservation may take seconds
_SCHEMA = append_only.table("entries", "entry BLOB NOT NULL", "a ledger")
_FORMAT = append_only.Format(
    application=0x485A4C31,  # "HZL1" in the file's header says that it is a ledger
    schema=SCHEMA,
    statements=_SCHEMA,
    name="ledger",
    article="a",
    broken=PrivacyError,
    consequence="nothing was charged",
    busy_seconds=BUSY_SECONDS,
)


def create(path: Path, first: Entry) -> None:
    """Make the file with its first entry; it is whole or absent, and for its owner alone.

    Raises:
        ConfigError: the file exists, or others may enter its folder.
        StorageError: it cannot be written.
    """
    _FORMAT.create(path, first.canonical())


def connect(path: Path, *, threads: bool = False) -> sqlite3.Connection:
    """Open the file, which must exist; for several threads, one at a time, if so said.

    Raises:
        ConfigError: there is none, or others than its owner may read it.
        StorageError: it cannot be opened.
    """
    return _FORMAT.connect(path, timeout_seconds=BUSY_SECONDS, threads=threads)


def check(database: sqlite3.Connection, path: Path) -> None:
    """Refuse a file that is not a ledger of this version, whole and guarded.

    Raises:
        ConfigError: it is no ledger, or of a newer version.
        PrivacyError: its table or its triggers were changed.
        StorageError: it is damaged.
    """
    _FORMAT.check(database, path)


def read(database: sqlite3.Connection, path: Path, sequence: int) -> Iterator[Any]:
    """Give the entries from number ``sequence`` on, as JSON values.

    Raises:
        PrivacyError: an entry is not the one encoding of what it says; names it.
        StorageError: the file cannot be read.
    """
    return _FORMAT.read(database, path, sequence)


def identity(path: Path) -> tuple[int, int]:
    """Return what tells a file from another one of its name; zeros where there is none."""
    return append_only.identity(path)


def storage(path: Path) -> AbstractContextManager[None]:
    """Turn what SQLite and the disk say into one line each.

    Raises:
        ConfigError: the file is not SQLite's.
        StorageError: the disk is full, read-only or damaged, or another process holds the file.
    """
    return _FORMAT.storage(path)
