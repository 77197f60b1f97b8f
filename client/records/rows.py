"""Tables of text: JSONL, CSV and TSV, plain or gzipped, as rows of named values.

Every error names the file and the line and never shows what the row says.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from huizhen.client.records.opening import opened
from huizhen.client.records.record import MAX_ENTRY_BYTES, Record, Unreadable, patient_of
from huizhen.client.records.text import AUTO, Lines
from huizhen.protocol.errors import ConfigError, GovernanceError

Row = tuple[str, dict[str, Any]]
# the place, file and line, and the fields
KINDS = ("jsonl", "csv", "tsv")
SUFFIXES = tuple(f".{kind}{zipped}" for zipped in ("", ".gz") for kind in KINDS)
MAX_DEPTH = 40
_DIGITS_64 = 19
csv.field_size_limit(MAX_ENTRY_BYTES)  # of the process; nobody else here reads CSV


def read_rows(path: Path, *, encoding: str = AUTO) -> Iterator[Row | Unreadable]:
    """Yield the rows of a file.

    Args:
        path: a file that ends in one of ``SUFFIXES``.
        encoding: of the text, or ``auto``; a byte order mark is dropped.

    Raises:
        ConfigError: the file is missing, of another kind, or in another encoding.
        GovernanceError: what follows cannot be read either.
    """
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise ConfigError(
            f"data is {str(path)!r}, expected a file that ends in {', '.join(SUFFIXES)}"
        )
    kind = name.removesuffix(".gz").rpartition(".")[2]
    with opened(path, path.name) as stream:
        yield from rows_of(Lines(stream, path.name, encoding), kind)


def rows_of(lines: Lines, kind: str) -> Iterator[Row | Unreadable]:
    """Yield the rows of an open file; ``kind`` is one of ``KINDS``.

    Raises:
        ConfigError: it is in another encoding, or a column has two names.
        GovernanceError: what follows cannot be read either.
        OSError: the stream cannot be read.
    """
    if kind == "jsonl":
        return _json_rows(lines, lines.name)
    return _separated_rows(lines, lines.name, "," if kind == "csv" else "\t")


def read_lines(data: bytes, name: str) -> Iterator[Row]:
    """Yield the rows of JSON lines in memory, which this program has written.

    Args:
        data: JSON, one entry a line, in UTF-8.
        name: what to call the export in places and errors.

    Raises:
        ConfigError: the bytes are not UTF-8.
        GovernanceError: a line is not a record.
    """
    return whole(rows_of(Lines(io.BytesIO(data), name, "utf-8"), "jsonl"))


def whole(rows: Iterable[Row | Unreadable]) -> Iterator[Row]:
    """Yield rows and refuse what could not be read, for those who have no rule for it.

    Raises:
        GovernanceError: a row could not be read.
    """
    for row in rows:
        if isinstance(row, Unreadable):
            raise GovernanceError(f"{row.place}: {row.problem}")
        yield row


def to_record(fields: Mapping[str, Any], patient_field: str, place: str) -> Record:
    """Return the record of a row.

    Raises:
        GovernanceError: the row has no patient id, without which no patient can be protected.
    """
    return Record(patient_of(fields.get(patient_field), patient_field, place), fields, place)


def _json_rows(lines: Iterable[str], name: str) -> Iterator[Row | Unreadable]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        fields = _quick(line)
        if fields is not None:
            yield place, fields
            continue
        try:
            yield place, _careful(line)
        except ValueError as error:
            yield Unreadable(place, str(error))


def _quick(line: str) -> dict[str, Any] | None:
    """Return a line's fields if it is plain JSON, None where a closer look is due.

    ``orjson`` keeps the last of two fields of one name, and makes a float of a long number.
    """
    try:
        fields = orjson.loads(line)
    except ValueError:
        return None
    if not isinstance(fields, dict) or " :" in line or "\t:" in line or "\r:" in line:
        return None
    seen = len(fields)
    for value in fields.values():
        if isinstance(value, list | dict | float):
            if isinstance(value, float) and abs(value) < 2**53:
                continue
            return None
    return fields if line.count('":') == seen else None


def _careful(line: str) -> dict[str, Any]:
    """Return a line's fields.

    Raises:
        ValueError: it is no record; the message says why, and does not show it.
    """
    try:
        fields = json.loads(
            line,
            parse_constant=_no_number,
            parse_float=_finite,
            parse_int=_exact,
            object_pairs_hook=_once,
        )
    except _TwiceError as error:
        raise ValueError("line has a field twice: mend the export") from error
    except (ValueError, RecursionError) as error:
        raise ValueError("line is not JSON: mend the export") from error
    if not isinstance(fields, dict):
        raise ValueError("line is not a JSON object, expected one a line")
    if not _is_shallow(fields, MAX_DEPTH):
        raise ValueError(f"line is nested over {MAX_DEPTH} deep: mend the export")
    if "\\ud" in line.lower() and not _is_unicode(fields):
        raise ValueError("line holds half of a surrogate pair: mend the export")
    return fields


class _TwiceError(ValueError):
    """A JSON object names a field twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _TwiceError
    return fields


def _no_number(_: str) -> float:
    """Refuse NaN and Infinity, which JSON does not have: a missing value must not become a text."""
    raise ValueError("not a number")


def _finite(text: str) -> float:
    """Return a number, and refuse one that is larger than any: 1e999 is no value."""
    if not math.isfinite(value := float(text)):
        raise ValueError("number is too large")
    return value


def _exact(text: str) -> int | str:
    """Return a whole number, or its digits where 64 bits do not hold it: a long id keeps them."""
    return int(text) if len(text) < _DIGITS_64 else text


def _is_shallow(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_is_shallow(one, depth - 1) for one in inner)


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _separated_rows(lines: Iterable[str], name: str, separator: str) -> Iterator[Row | Unreadable]:
    reader = csv.reader(lines, delimiter=separator, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ConfigError(f"{name}: header has a column twice: rename one")
        for values in reader:
            if not values:
                continue
            place = f"{name}:{reader.line_num}"
            if len(values) == len(header):
                yield place, dict(zip(header, values, strict=True))
            else:
                yield Unreadable(
                    place,
                    f"row has {len(values)} columns, the header {len(header)}: mend the export",
                )
    except csv.Error as error:
        raise GovernanceError(f"{name}:{reader.line_num}: {error}: mend the export") from error
