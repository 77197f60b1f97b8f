"""What SQLite, PostgreSQL and the disk say when they refuse, as one line each."""

import contextlib
import sqlite3
from collections.abc import Iterator

from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from huizhen.protocol.errors import ConfigError, StorageError

BUSY_SECONDS = 30
# how long to wait for another process that writes
_HELD = f"is held by another process for over {BUSY_SECONDS} s: try again later"
_FULL = "cannot grow, the disk is full: make room, nothing was written"
_READ_ONLY = "cannot be written, it or its disk is read-only: nothing was written"
_DAMAGED = "is damaged: restore a backup"
_UNREACHABLE = "cannot be reached: look at the URL, the network and PostgreSQL's own log"
_SQLITE = {
    sqlite3.SQLITE_BUSY: _HELD,
    sqlite3.SQLITE_LOCKED: _HELD,
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_READONLY: _READ_ONLY,
    sqlite3.SQLITE_CANTOPEN: "cannot be opened: look at its folder's permissions and disk",
    sqlite3.SQLITE_IOERR: "cannot be read or written, the disk fails or is full",
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
}
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_POSTGRESQL = {
    "55P03": _HELD,
    "25P03": "ended a transaction in which this process was stopped: nothing was written",
    "53100": _FULL,
    "25006": _READ_ONLY,
    "XX001": _DAMAGED,
    "XX002": _DAMAGED,
}


@contextlib.contextmanager
def failures(name: str) -> Iterator[None]:
    """Turn what a database says into one line each; ``name`` is the one for people.

    Raises:
        ConfigError: the file is not SQLite's.
        StorageError: the disk is full, read-only or damaged, another process holds the database,
            or it cannot be reached.
    """
    try:
        yield
    except PoolTimeoutError as error:
        raise StorageError(f"{name!r} {_HELD}") from error
    except StatementError as error:
        if not isinstance(error, DBAPIError) and isinstance(error.orig, ValueError):
            raise error.orig from None  # a value that the caller should not have given
        raise _named(name, error.orig) from error
    except (sqlite3.Error, OSError) as error:
        raise _named(name, error) from error


def _named(name: str, error: BaseException | None) -> ConfigError | StorageError:
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", -1) & 0xFF
        if code == sqlite3.SQLITE_NOTADB:
            return ConfigError(f"{name!r} is not a store: name another file")
        reason = _SQLITE.get(code)
    else:
        state = getattr(error, "sqlstate", None)
        reason = _POSTGRESQL.get(state or "")
        if reason is None and (state is None or state[:2] in ("08", "28", "3D", "57")):
            reason = _UNREACHABLE
    text = (str(error).splitlines() or [""])[0]  # PostgreSQL's further lines show what rows hold
    return StorageError(f"{name!r} {reason or f'was refused ({text}): nothing was written'}")
