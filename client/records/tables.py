"""Excel workbooks and Parquet files as rows of named values, like those of text (``rows.py``).

A workbook is a ZIP of XML: it is inflated once to count before anything reads it, since a file of
some kilobytes may hold gigabytes, and one cell at the far corner makes a sheet of 17 thousand
million. Parquet is read by batches.
"""

import math
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl

from huizhen.client.records.record import Unreadable
from huizhen.client.records.rows import Row
from huizhen.protocol.errors import ConfigError, GovernanceError

MAX_WORKBOOK_BYTES = 256 << 20  # inflated
MAX_CELLS = 20_000_000
MAX_EXCEL_NUMBER = 10**15  # Excel keeps 15 digits (ECMA-376 numbers are doubles)
BATCH_ROWS = 4096
_POSITION = re.compile(rb'\br="([A-Z]{0,3})(\d{1,7})"')
_BLOCK_BYTES = 1 << 20


def read_excel(
    stream: BinaryIO, name: str, *, sheet: str | None = None
) -> Iterator[Row | Unreadable]:
    """Yield the rows of a sheet of an ``.xlsx`` workbook; the first row with values is the header.

    Numbers become text as Excel shows them without a format, days and moments ISO 8601.

    Args:
        stream: an open file that can seek.
        name: what to call it in places: file, sheet and row.
        sheet: which; the first one when None.

    Raises:
        ConfigError: it is no such workbook, or has no such sheet.
        GovernanceError: it holds more than can be read, or a column has two names.
    """
    from python_calamine import CalamineError, CalamineWorkbook  # only Excel needs it

    _check_size(stream, name)
    stream.seek(0)
    try:
        with CalamineWorkbook.from_filelike(stream) as book:
            if sheet is not None and sheet not in book.sheet_names:
                known = ", ".join(map(repr, book.sheet_names))
                raise ConfigError(f"{name} has no sheet {sheet!r}: it has {known[:200]}")
            if not book.sheet_names:
                raise ConfigError(f"{name} has no sheet, expected at least one")
            title = sheet or book.sheet_names[0]
            yield from _sheet_rows(book.get_sheet_by_name(title).iter_rows(), f"{name}:{title}")
    except (CalamineError, zipfile.BadZipFile, OSError, ValueError) as error:
        raise ConfigError(f"{name} is no Excel workbook that can be read: save it anew") from error


def read_parquet(path: Path) -> Iterator[Row | Unreadable]:
    """Yield the rows of a Parquet file; nested columns stay lists and tables.

    Raises:
        ConfigError: it is missing, or is no Parquet file.
        GovernanceError: a value is binary, or a column's values cannot be read.
    """
    try:
        batches = pl.scan_parquet(path).collect_batches(chunk_size=BATCH_ROWS)
        number = 0
        for batch in batches:
            for column, kind in batch.schema.items():
                if isinstance(kind, pl.Binary | pl.Object):
                    raise GovernanceError(
                        f"{path.name}: column {column[:80]!r} is binary, expected text or numbers: "
                        "leave it out"
                    )
            for values in batch.iter_rows():
                number += 1
                fields = {
                    key: _plain(value) for key, value in zip(batch.columns, values, strict=True)
                }
                yield f"{path.name}:{number}", fields
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = getattr(error, "strerror", None) or "it is no Parquet file, or damaged"
        raise ConfigError(f"cannot read {str(path)!r}: {reason}") from error


def _sheet_rows(rows: Iterator[list[Any]], name: str) -> Iterator[Row | Unreadable]:
    header: list[str] | None = None
    for number, values in enumerate(rows, 1):
        if not any(value != "" for value in values):
            continue
        place = f"{name}:{number}"
        if header is None:
            header = [str(_plain(value)) for value in values]
            named = [column for column in header if column]
            if len(set(named)) < len(named):
                raise GovernanceError(f"{place}: header has a column twice: rename one")
            continue
        try:
            yield place, _named(header, values)
        except ValueError as error:
            yield Unreadable(place, str(error))


def _named(header: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """Return a row's fields as text, columns without a name left out where they are empty.

    Raises:
        ValueError: it cannot be read rightly; the message says why, and does not show it.
    """
    fields = {}
    for column, value in zip(header, values, strict=True):
        if not column:
            if value != "":
                raise ValueError("row has a value in a column without a name: name or empty it")
            continue
        if isinstance(value, float) and not abs(value) < MAX_EXCEL_NUMBER:
            raise ValueError(
                f"{column[:80]!r} is a number of over 15 digits, of which Excel has lost the last "
                "ones: export the column as text"
            )
        fields[column] = _text(value)
    return fields


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(_plain(value))


def _plain(value: Any) -> Any:
    """Return a value as JSON has it; what JSON has not becomes ISO 8601 text, or None."""
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value)  # Decimal


def _check_size(stream: BinaryIO, name: str) -> None:
    """Refuse a workbook that is too large, before anything holds it whole."""
    left = MAX_WORKBOOK_BYTES
    try:
        with zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
            declared = sum(member.file_size for member in members)
            for member in members:
                if declared > MAX_WORKBOOK_BYTES:
                    break
                member.file_size = MAX_WORKBOOK_BYTES + 1  # read on, whatever the header claims
                with archive.open(member) as file:
                    left -= _measure(file, name, left, member.filename)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(
            f"{name} is no .xlsx workbook, is damaged or has a password: save it anew as .xlsx"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {name!r}: {error}") from error
    if declared > MAX_WORKBOOK_BYTES or left < 0:
        raise GovernanceError(
            f"{name} holds over {MAX_WORKBOOK_BYTES} bytes when unpacked: save it as CSV"
        )


def _measure(file: Any, name: str, limit: int, member: str) -> int:
    """Return how many bytes a member unpacks to, a little over ``limit`` at most."""
    size, rows, columns, tail = 0, 0, 0, b""
    is_sheet = member.lower().endswith(".xml")
    while size <= limit and (block := file.read(_BLOCK_BYTES)):
        size += len(block)
        if not is_sheet:
            continue
        for letters, digits in _POSITION.findall(tail + block):
            rows, columns = max(rows, int(digits)), max(columns, _column(letters))
        tail = block[-40:]
        if rows * columns > MAX_CELLS:
            raise GovernanceError(
                f"{name} has a sheet of {rows} rows and {columns} columns, at most {MAX_CELLS} "
                "cells can be read: delete what is empty, or save it as CSV"
            )
    return size


def _column(letters: bytes) -> int:
    number = 0
    for letter in letters:
        number = 26 * number + letter - 64
    return number
