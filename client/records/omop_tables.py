"""Tables of the OMOP common data model, a row at a time, wherever they lie.

A database is read in one transaction, each table in the order of its key, so that a row's number
is the same each time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import (
    ColumnClause,
    ColumnElement,
    Connection,
    Select,
    column,
    inspect,
    select,
    table,
    union,
)

from huizhen.client.records.omop_files import Folder
from huizhen.client.records.omop_layout import LAYOUTS, Rows, expect_columns, tell_unread
from huizhen.client.records.sql import connect, failures, select_rows
from huizhen.protocol.errors import ConfigError


class Tables(Protocol):
    """Where the tables lie."""

    def has(self, name: str) -> bool:
        """Return whether there is a table of this name, in lower case."""

    def rows(self, name: str, columns: Sequence[str]) -> Rows:
        """Yield the place and those columns of each row, but for those there are not."""

    def used_concepts(self) -> Rows:
        """Yield the rows of CONCEPT that other tables refer to, perhaps with more."""


@contextmanager
def open_tables(
    source: Path | str, *, name: str, schema: str, password_file: Path | None, encoding: str
) -> Iterator[Tables]:
    """Open a folder of CSV files, or a database by its URL.

    Raises:
        ConfigError: there is neither, or it has no table PERSON.
    """
    tables: Tables
    if isinstance(source, str) and "://" in source:
        with connect(source, name=name, password_file=password_file) as connection:
            tables = Database(connection, name, schema)
            _expect_person(tables, name)
            yield tables
        return
    tables = Folder(Path(source), name, encoding)
    _expect_person(tables, name)
    yield tables


def _expect_person(tables: Tables, name: str) -> None:
    if not tables.has("person"):
        raise ConfigError(
            f"{name}: no table PERSON, expected OMOP CDM 5.4: name its folder or schema"
        )


class Database:
    """The tables of a schema."""

    def __init__(self, connection: Connection, name: str, schema: str) -> None:
        self._connection, self._name, self._schema = connection, name, schema or None
        with failures(name):
            look = inspect(connection)
            found = look.get_table_names(self._schema) + look.get_view_names(self._schema)
            self._tables = {actual.lower(): actual for actual in sorted(found)}
            self._columns = {
                known: {
                    c["name"].lower(): c["name"] for c in look.get_columns(actual, self._schema)
                }
                for known, actual in self._tables.items()
                if known in LAYOUTS
            }
        tell_unread(name, self._tables)

    def has(self, name: str) -> bool:
        """Return whether there is a table of this name, in lower case."""
        return name in self._tables

    def rows(self, name: str, columns: Sequence[str]) -> Rows:
        """Yield the place and those columns of each row, but for those there are not."""
        place = f"{self._name}/{name}"
        expect_columns(place, name, self._columns[name])
        order = self._columns[name].get(LAYOUTS[name].key)
        statement = self._select(name, columns)
        if order is not None:
            statement = statement.order_by(column(order))
        return select_rows(self._connection, statement, place)

    def used_concepts(self) -> Rows:
        """Yield the rows of CONCEPT that other tables refer to."""
        layout = LAYOUTS["concept"]
        expect_columns(f"{self._name}/concept", "concept", self._columns["concept"])
        used = [
            self._select(name, (wanted,))
            for name, columns in self._columns.items()
            for wanted in LAYOUTS[name].concepts
            if wanted in columns
        ]
        statement = self._select("concept", layout.columns)
        if used:
            number: ColumnClause[Any] = column(self._columns["concept"][layout.key])
            statement = statement.where(number.in_(union(*used)))
        return select_rows(self._connection, statement, f"{self._name}/concept")

    def _select(self, name: str, columns: Sequence[str]) -> Select[Any]:
        there = self._columns[name]
        chosen: list[ColumnElement[Any]] = [
            column(there[wanted]).label(wanted) for wanted in columns if wanted in there
        ]
        return select(*chosen).select_from(table(self._tables[name], schema=self._schema))
