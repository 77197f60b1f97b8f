"""What the cells of OMOP's tables say, whether a file has them as text or a database by type."""

import re
from collections.abc import Mapping
from functools import lru_cache
from math import isfinite
from typing import Any

from huizhen.client.records.times import iso

Cells = Mapping[str, Any]
_NOTHING = frozenset({"", "\\N", "NULL"})
_NO_VALUE = _NOTHING | {"NA", "null"}
# as PostgreSQL, SQL Server and R write a missing value; in a text NA may mean something
_WHOLE = re.compile(r"(-?\d{1,18})(?:\.0*)?", re.ASCII)
# 7.0 is 7: a column with gaps makes it so
_LONGEST = 60
# characters of a number; longer ones would fill what is remembered of those before
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?", re.ASCII)


class RowError(ValueError):
    """A row is no record; the text says what was found and expected, and nothing of the row."""


def text(cells: Cells, column: str) -> str:
    """Return a cell's text; empty where there is nothing."""
    value = cells.get(column)
    written = "" if value is None else str(value).strip()
    return "" if written in _NOTHING else written


def whole(cells: Cells, column: str) -> int:
    """Return a cell's whole number; 0 where there is nothing, as OMOP means it of concepts.

    Raises:
        RowError: it is none.
    """
    value = cells.get(column)
    if type(value) is int:
        return value
    try:
        return 0 if value is None else _whole(str(value))
    except ValueError as error:
        raise RowError(f"{column} {error}") from None


def number(cells: Cells, column: str) -> float | None:
    """Return a cell's number; None where there is nothing.

    Raises:
        RowError: it is none, or not finite.
    """
    value = cells.get(column)
    try:
        return None if value is None else _number(str(value))
    except ValueError as error:
        raise RowError(f"{column} {error}") from None


def time(cells: Cells, stem: str) -> str:
    """Return the time in the columns of a date and of a moment, in the one form.

    Midnight is how OMOP writes a moment of which only the day is known (CDM 5.4, on each
    ``…_datetime``); an hour that has an offset may lie on another day than the local date.

    Raises:
        RowError: one is no time, or they are of different days.
    """
    day, moment = cells.get(f"{stem}_date"), cells.get(f"{stem}_datetime")
    try:
        return _time(str(day), str(moment))
    except ValueError as error:
        raise RowError(f"{stem}_date or {stem}_datetime {error}") from None


@lru_cache(maxsize=1 << 14)
def _whole(written: str) -> int:
    written = written.strip()
    if written in _NO_VALUE:
        return 0
    if len(written) <= _LONGEST and (found := _WHOLE.fullmatch(written)):
        return int(found[1])
    raise ValueError("is no whole number: mend the row")


@lru_cache(maxsize=1 << 14)
def _number(written: str) -> float | None:
    written = written.strip()
    if written in _NO_VALUE:
        return None
    is_number = len(written) <= _LONGEST and _NUMBER.fullmatch(written)
    if is_number and isfinite(found := float(written)):
        return found
    raise ValueError("is no number, expected such as 4.5: mend the row")


@lru_cache(maxsize=1 << 14)
def _time(day: str, moment: str) -> str:
    day, moment = (
        iso("" if part in _NO_VALUE or part == "None" else part).removesuffix("T00:00:00")
        for part in (day.strip(), moment.strip())
    )
    if not moment or day.startswith(moment):
        return day
    if not day or moment.startswith(day[:10]) or len(moment) > 19:
        return moment
    raise ValueError("is of another day than the other: mend the row")
