"""Records as a hospital exports them: JSONL or CSV, plain or gzipped, one record a line.

Every error names the file and the line and never shows what the record says.
"""

import codecs
import contextlib
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huizhen.client.records.record import MAX_ENTRY_BYTES, Record, patient_of
from huizhen.protocol.errors import ConfigError, GovernanceError

SUFFIXES = (".jsonl", ".csv", ".jsonl.gz", ".csv.gz")


def read_rows(path: Path, *, encoding: str = "utf-8") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place (file and line) and the fields of each entry.

    Args:
        path: a ``.jsonl`` or ``.csv`` file, perhaps with ``.gz`` after it.
        encoding: of the text; a byte order mark is dropped.

    Raises:
        ConfigError: the file is missing, of another kind, or in another encoding.
        GovernanceError: a line is not a record.
    """
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise ConfigError(
            f"data is {str(path)!r}, expected a file that ends in {', '.join(SUFFIXES)}"
        )
    try:
        with path.open("rb") as raw, gzip.open(raw) if name.endswith(".gz") else raw as stream:
            text = _decode(stream, path, encoding)
            is_csv = name.removesuffix(".gz").endswith(".csv")
            yield from _csv_rows(text, path) if is_csv else _json_rows(text, path)
    except gzip.BadGzipFile as error:
        raise ConfigError(
            f"{path.name} ends in .gz but is not gzip: unpack or rename it"
        ) from error
    except (EOFError, zlib.error) as error:
        raise ConfigError(f"{path.name} is cut short or damaged: copy it again") from error
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read {str(path)!r}: {reason}") from error


def read_lines(data: bytes, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the fields of each entry of an export that is in memory.

    Args:
        data: JSON, one entry a line, in UTF-8.
        name: what to call the export in places and errors.

    Raises:
        ConfigError: the bytes are not UTF-8.
        GovernanceError: a line is not a record.
    """
    path = Path(name)
    yield from _json_rows(_decode(io.BytesIO(data), path, "utf-8"), path)


def to_record(fields: Mapping[str, Any], patient_field: str, place: str) -> Record:
    """Return the record of an entry.

    Raises:
        GovernanceError: the entry has no patient id, without which no patient can be protected.
    """
    return Record(patient_of(fields.get(patient_field), patient_field, place), fields, place)


def _decode(stream: Any, path: Path, encoding: str) -> Iterator[str]:
    """Yield the lines as text, refusing what is not in the declared encoding."""
    number, wide = 0, None
    line: Any = b""
    try:
        codec = codecs.lookup(encoding).name
        if codec.startswith(("utf-16", "utf-32")):  # where the byte of a line's end means more
            wide = io.TextIOWrapper(stream, encoding=codec, newline="\n")
        source: Any = wide or stream
        while line := source.readline(MAX_ENTRY_BYTES + 1):
            number += 1
            if len(line) > MAX_ENTRY_BYTES:
                raise GovernanceError(
                    f"{path.name}:{number}: line has over {MAX_ENTRY_BYTES} bytes: split it"
                )
            text: str = line if wide else line.decode(codec)
            yield text.removeprefix("\ufeff") if number == 1 else text
    except UnicodeError as error:
        if wide:
            number, line = number + 1, b""
        raise ConfigError(_wrong_encoding(line, path, number, encoding)) from error
    except (LookupError, ValueError) as error:
        raise ConfigError(f"encoding is {encoding!r}, expected a name such as 'gb18030'") from error
    finally:
        if wide:
            with contextlib.suppress(ValueError):  # a reader that stopped early closed the file
                wide.detach()


def _wrong_encoding(line: bytes, path: Path, number: int, encoding: str) -> str:
    marked = line.startswith((b"\xff\xfe", b"\xfe\xff"))
    for guess in ("utf-16",) if marked else ("gb18030", "utf-16") if line else ():
        try:
            line[: len(line) & ~1 if guess == "utf-16" else None].decode(guess)
        except UnicodeDecodeError:
            continue
        return (
            f"{path.name}:{number}: line is not {encoding}, it looks like {guess}: "
            f'set encoding = "{guess}"'
        )
    return f"{path.name}:{number}: line is not {encoding}: set encoding to the file's own"


def _json_rows(lines: Iterator[str], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path.name}:{number}"
        try:
            fields = json.loads(line, parse_constant=_no_number, object_pairs_hook=_once)
        except _TwiceError as error:
            raise GovernanceError(f"{place}: line has a field twice: mend the export") from error
        except (ValueError, RecursionError) as error:
            raise GovernanceError(f"{place}: line is not JSON: mend the export") from error
        if not isinstance(fields, dict):
            raise GovernanceError(f"{place}: line is not a JSON object, expected one a line")
        if "\\ud" in line.lower() and not _is_unicode(fields):
            raise GovernanceError(f"{place}: line holds half of a surrogate pair: mend the export")
        yield place, fields


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


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv_rows(lines: Iterator[str], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(lines, strict=True)
    try:
        header = reader.fieldnames or []
        if len(set(header)) < len(header):
            raise ConfigError(f"{path.name}: header has a column twice: rename one")
        for fields in reader:
            place = f"{path.name}:{reader.line_num}"
            if None in fields or None in fields.values():
                raise GovernanceError(
                    f"{place}: row has another number of columns than the header: mend the export"
                )
            yield place, dict(fields)
    except csv.Error as error:
        line = reader.reader.line_num  # the outer count stays at the last whole row
        raise GovernanceError(f"{path.name}:{line}: {error}: mend the export") from error
