"""Rows of a database, streamed: one statement, in a transaction that is never committed.

SQLite is opened with ``mode=ro`` and ``query_only`` (https://www.sqlite.org/uri.html), PostgreSQL
with ``default_transaction_read_only`` and one snapshot for all that is read. Of other engines
SQLAlchemy's own drivers serve; nothing tells them to refuse writing, so give them an account that
may only select.

What a driver says of a failure is shown only where it cannot be what a row holds, and never
chained: its text may end in a log.
"""

import math
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import URL, Connection, Engine, Select, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from huizhen.client.records.record import MAX_ENTRY_BYTES, Unreadable
from huizhen.client.records.times import iso
from huizhen.protocol.errors import ConfigError, GovernanceError

TIMEOUT_SECONDS = 600.0
_CONNECT_SECONDS = 10
_BATCH = 200
# rows that are held at a time
_PACKAGES = {"mysql": "pymysql", "mariadb": "pymysql", "mssql": "pyodbc", "oracle": "oracledb"}
_COMMENTS = re.compile(r"(?:\s+|--[^\n]*(?:\n|\Z)|/\*.*?\*/|\()*", re.DOTALL)
_READING = {"select", "with", "values", "table"}
_SHOWN_STATES = ("08", "0A", "25", "28", "3D", "3F", "42", "53", "57")
# of PostgreSQL's classes of errors those that come of the server and the query, not of a row
# (https://www.postgresql.org/docs/current/errcodes-appendix.html)


def read_sql(
    url: str,
    query: str,
    *,
    name: str,
    password_file: Path | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place (name and number of the row, from 1) and the columns of each row.

    A number is an int, or a float where that writes the same digits, otherwise a text; a time is
    a text in the one form of ``records/times.py``. A query that orders its rows numbers them alike
    each time.

    Args:
        url: SQLAlchemy's, such as ``sqlite:///his.db`` or ``postgresql://reader@host/his``.
        query: one SELECT; a semicolon only at its end.
        name: what to call the source in places and errors.
        password_file: holds the password, in place of the URL.
        timeout_seconds: for one answer of PostgreSQL, such as the next rows.

    Raises:
        ConfigError: the database cannot be reached, or does not take the query.
        GovernanceError: a row holds what is no record: bytes, a time or number that is none.
    """
    check_query(query, name)
    with connect(
        url, name=name, password_file=password_file, timeout_seconds=timeout_seconds
    ) as connection:
        for row in select_rows(connection, query, name):
            if isinstance(row, Unreadable):
                raise GovernanceError(f"{row.place}: {row.problem}")
            yield row


def check_query(query: str, name: str) -> None:
    """Refuse what is not one statement that reads.

    A driver may take several in one text, the second of which could end the read-only transaction.

    Raises:
        ConfigError: it is not one.
    """
    text = query.strip().rstrip(";")
    begin = _COMMENTS.match(text)
    word = re.match(r"[a-z]*", text[begin.end() if begin else 0 :], re.IGNORECASE)
    if word is None or word[0].lower() not in _READING:
        raise ConfigError(f"{name}: query does not begin with SELECT or WITH: give one that reads")
    if ";" in text:
        raise ConfigError(
            f"{name}: query has a semicolon before its end, expected one statement: "
            "leave out the others, or write chr(59) within a text"
        )
    if "\0" in text or (not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)):
        raise ConfigError(f"{name}: query has a character that is no text: remove it")


@contextmanager
def connect(
    url: str,
    *,
    name: str,
    password_file: Path | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Iterator[Connection]:
    """Open a database for reading; whatever is done there is rolled back.

    Raises:
        ConfigError: it cannot be reached, or its driver is not installed.
    """
    target = _target(url, name, password_file)
    engine = _engine(target, name, timeout_seconds)
    try:
        try:
            connection = engine.connect()
        except (SQLAlchemyError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{name}: cannot connect to {_shown(target)}: {_unreached(error, target)}"
            ) from None
        with connection:
            yield connection
    finally:
        engine.dispose()


def select_rows(
    connection: Connection, statement: str | Select[Any], name: str
) -> Iterator[tuple[str, dict[str, Any]] | Unreadable]:
    """Yield each row of a statement, or why it is none; few are held at a time.

    Raises:
        ConfigError: the database does not take the statement, or is lost.
        GovernanceError: the driver cannot read a row.
    """
    options = {"stream_results": True, "yield_per": _BATCH}
    with failures(name):
        if isinstance(statement, str):  # as it is: without parameters % and : mean nothing
            result = connection.exec_driver_sql(
                statement, execution_options={**options, "no_parameters": True}
            )
        else:
            result = connection.execute(statement, execution_options=options)
    with closing(result):
        columns = list(result.keys()) if result.returns_rows else []
        if len(set(columns)) < len(columns) or not columns:
            raise ConfigError(
                f"{name}: query gives no column, or two of one name: name them with AS"
            )
        number, rows = 0, iter(result)
        while True:
            number += 1
            place = f"{name}:{number}"
            with failures(place):
                row = next(rows, None)
            if row is None:
                return
            yield _fields(place, columns, row)


@contextmanager
def failures(place: str) -> Iterator[None]:
    """Turn what a driver says into an error of ours that shows nothing of a row."""
    try:
        yield
    except DBAPIError as error:
        origin, kind = error.orig, type(error.orig).__name__
        state = getattr(origin, "sqlstate", None)
        if _is_of_sqlite(origin) or (state is not None and state.startswith(_SHOWN_STATES)):
            raise ConfigError(f"{place}: database refuses: {_line(error.orig or error)}") from None
        if state is not None or isinstance(error, DataError) or isinstance(origin, sqlite3.Error):
            raise GovernanceError(
                f"{place}: row holds what cannot be read ({state or kind}): "
                "mend it, or cast its column in the query"
            ) from None
        raise ConfigError(
            f"{place}: database fails ({kind}): look at the query, and at the database's own log"
        ) from None
    except (SQLAlchemyError, sqlite3.Warning, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{place}: query cannot be run or read ({type(error).__name__}): mend it"
        ) from None


def _target(url: str, name: str, password_file: Path | None) -> URL:
    try:
        target = make_url(url)
    except (ArgumentError, ValueError):  # whose text may show a password
        raise ConfigError(
            f"{name}: database is no URL, expected one such as 'sqlite:///his.db'"
        ) from None
    if any("pass" in option.lower() for option in target.query):
        raise ConfigError(f"{name}: URL has a password among its options: use password_file")
    if password_file is not None:
        if target.password is not None:
            raise ConfigError(f"{name}: URL has a password and there is a password_file: keep one")
        try:
            password = password_file.read_text("utf-8").strip("\r\n")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{name}: cannot read password_file {str(password_file)!r}"
            ) from error
        target = target.set(password=password)
    if target.drivername == "postgresql":
        target = target.set(drivername="postgresql+psycopg")
    return target


def _engine(target: URL, name: str, timeout_seconds: float) -> Engine:
    kind = target.get_backend_name()
    try:
        if kind == "sqlite":
            return _sqlite(target, name)
        if kind == "postgresql":
            return _postgresql(target, timeout_seconds)
        return create_engine(target, poolclass=NullPool)
    except (ImportError, ArgumentError):
        package = f"python package {_PACKAGES[kind]!r}" if kind in _PACKAGES else "its driver"
        raise ConfigError(
            f"{name}: no driver for {target.drivername[:80]!r} is installed, there are sqlite and "
            f"postgresql+psycopg: install {package}, or export the data"
        ) from None
    except (SQLAlchemyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{name}: URL {_shown(target)} cannot be used ({type(error).__name__})"
        ) from None


def _sqlite(target: URL, name: str) -> Engine:
    path = Path(target.database or "")
    if not path.is_file():
        raise ConfigError(f"{name}: no SQLite file at {str(path)[:80]!r}: name one that exists")
    uri = f"{path.resolve().as_uri()}?mode=ro"

    def opened() -> sqlite3.Connection:
        connection = sqlite3.connect(uri, uri=True, timeout=_CONNECT_SECONDS)
        connection.execute("PRAGMA query_only = ON")
        return connection

    return create_engine("sqlite://", creator=opened, poolclass=NullPool)


def _postgresql(target: URL, timeout_seconds: float) -> Engine:
    milliseconds = int(min(max(timeout_seconds, 0.001), 1_000_000) * 1000)
    engine = create_engine(
        target,
        poolclass=NullPool,
        connect_args={"connect_timeout": _CONNECT_SECONDS},
        isolation_level="REPEATABLE READ",
        execution_options={"postgresql_readonly": True},
    )

    @event.listens_for(engine, "connect")
    def refuse_writing(connection: Any, _: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SET default_transaction_read_only = on")
            cursor.execute(f"SET statement_timeout = {milliseconds}")
        connection.commit()

    return engine


def _shown(target: URL) -> str:
    return repr(target.render_as_string(hide_password=True)[:160])


def _unreached(error: Exception, target: URL) -> str:
    """Return the last line of what the driver says, which names the cause."""
    line = _line(getattr(error, "orig", None) or error)
    return line.replace(str(target.password), "***") if target.password else line


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    diagnosis = getattr(error, "diag", None)
    if diagnosis is not None and diagnosis.message_primary:
        lines = [diagnosis.message_primary]
    return (lines or [type(error).__name__])[-1][:200]


def _is_of_sqlite(error: BaseException | None) -> bool:
    """Return whether SQLite says it, not Python's module, which shows a text that is not UTF-8."""
    return hasattr(error, "sqlite_errorcode") or isinstance(error, sqlite3.ProgrammingError)


def _fields(
    place: str, columns: Sequence[str], row: Sequence[Any]
) -> tuple[str, dict[str, Any]] | Unreadable:
    fields = dict(zip(columns, row, strict=True))
    size = 0
    for column, value in fields.items():
        if value is None or type(value) is int:
            continue
        try:
            fields[column] = value = _plain(value)
        except (ValueError, RecursionError) as error:
            return Unreadable(place, f"column {column[:80]!r} {error}")
        size += len(value) if isinstance(value, str) else 0
    if size > MAX_ENTRY_BYTES:
        return Unreadable(place, f"row has over {MAX_ENTRY_BYTES} characters: leave a column out")
    return place, fields


def _plain(value: Any) -> Any:
    """Return a value as JSON has it; the text of a ValueError follows the column's name."""
    match value:
        case bool() | str() | int():
            return value
        case float() | Decimal():
            return _number(value)
        case datetime():
            offset = value.utcoffset()
            if offset is not None and offset.total_seconds() % 60:  # local mean time, before 1927
                value = value.astimezone(UTC)
            return iso(value.isoformat(timespec="seconds"))
        case date():
            return iso(value.isoformat())
        case time() | UUID():
            return str(value)
        case list() | tuple():
            return [None if part is None else _plain(part) for part in value]
        case dict():
            return {str(k): None if part is None else _plain(part) for k, part in value.items()}
        case bytes() | bytearray() | memoryview():
            raise ValueError("holds bytes, expected text or a number: leave it out of the query")
        case _:
            raise ValueError(f"holds a {type(value).__name__}: cast it to text in the query")


def _number(value: float | Decimal) -> int | float | str:
    """Return the number that writes the same digits; a text where no float does."""
    if not (math.isfinite(value) if isinstance(value, float) else value.is_finite()):
        raise ValueError("holds no finite number, expected one or null: mend it in the query")
    if isinstance(value, float):
        return value
    if -30 < value.adjusted() < 18 and value == value.to_integral_value():
        return int(value)
    return float(value) if Decimal(repr(float(value))) == value else str(value)
