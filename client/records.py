"""Records as a hospital exports them: JSONL or CSV, plain or gzipped, one record a line.

Every error names the file and the line and never shows what the record says.
"""

import csv
import gzip
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huizhen.protocol.errors import ConfigError, GovernanceError

MAX_LINE_BYTES = 16 << 20
SUFFIXES = (".jsonl", ".csv", ".jsonl.gz", ".csv.gz")


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a hospital's export; its content never shows in logs or errors."""

    patient: str
    fields: Mapping[str, Any]
    place: str
    # file and line

    def __repr__(self) -> str:
        return f"Record(<masked>, {self.place})"


def read_rows(path: Path, *, encoding: str = "utf-8") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place (file and line) and the fields of each entry.

    Args:
        path: a ``.jsonl`` or ``.csv`` file, perhaps with ``.gz`` after it.
        encoding: of the text; a byte order mark is dropped.

    Raises:
        ConfigError: the file is missing, of another kind, or in another encoding.
        GovernanceError: a line is not a record.
    """
    if not path.name.lower().endswith(SUFFIXES):
        raise ConfigError(
            f"data is {str(path)!r}, expected a file that ends in {', '.join(SUFFIXES)}"
        )
    try:
        with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as stream:
            text = _decode(stream, path, encoding)
            is_csv = ".csv" in path.suffixes
            yield from _csv_rows(text, path) if is_csv else _json_rows(text, path)
    except gzip.BadGzipFile as error:
        raise ConfigError(
            f"{path.name} ends in .gz but is not gzip: unpack or rename it"
        ) from error
    except EOFError as error:
        raise ConfigError(f"{path.name} is cut short: copy it again") from error
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror or error}") from error


def to_record(fields: Mapping[str, Any], patient_field: str, place: str) -> Record:
    """Return the record of an entry.

    Raises:
        GovernanceError: the entry has no patient id, without which no patient can be protected.
    """
    patient = fields.get(patient_field)
    if patient is None or isinstance(patient, list | dict) or not str(patient).strip():
        raise GovernanceError(
            f"{place}: record has no patient id in {patient_field!r}, every record needs one: "
            "fill it, or name the right field"
        )
    return Record(str(patient).strip(), fields, place)


def _decode(stream: Any, path: Path, encoding: str) -> Iterator[str]:
    """Yield the lines as text, refusing what is not in the declared encoding."""
    name = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    number = 0
    if name.lower().replace("-", "").startswith("utf16"):
        yield from io.TextIOWrapper(stream, encoding=name, errors="strict")
        return
    try:
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise GovernanceError(
                    f"{path.name}:{number}: line has over {MAX_LINE_BYTES} bytes: split it"
                )
            yield line.decode(name if number == 1 else name.removesuffix("-sig"))
    except LookupError as error:
        raise ConfigError(f"encoding is {encoding!r}, expected a name such as 'gb18030'") from error
    except UnicodeDecodeError as error:
        raise ConfigError(_wrong_encoding(line, path, number, encoding)) from error


def _wrong_encoding(line: bytes, path: Path, number: int, encoding: str) -> str:
    for guess in (
        ("gb18030", "utf-16") if not line.startswith((b"\xff\xfe", b"\xfe\xff")) else ("utf-16",)
    ):
        try:
            line.decode(guess)
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
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise GovernanceError(f"{place}: line is not JSON: mend the export") from error
        if not isinstance(fields, dict):
            raise GovernanceError(f"{place}: line is not a JSON object, expected one a line")
        yield place, fields


def _csv_rows(lines: Iterator[str], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(lines, strict=True)
    try:
        for fields in reader:
            place = f"{path.name}:{reader.line_num}"
            if None in fields or None in fields.values():
                raise GovernanceError(
                    f"{place}: row has another number of columns than the header: mend the export"
                )
            yield place, dict(fields)
    except csv.Error as error:
        raise GovernanceError(f"{path.name}:{reader.line_num}: {error}: mend the export") from error
