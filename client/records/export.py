"""A hospital's whole export: every file and query that its ``data.toml`` names, in one order.

The order is that of ``[[sources]]``, and within a pattern that of the files' names, so the same
export gives the same records in the same order.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from huizhen.client.records.mapping import map_rows
from huizhen.client.records.opening import opened
from huizhen.client.records.record import Entry, Unreadable
from huizhen.client.records.rows import Row, rows_of
from huizhen.client.records.tables import read_excel, read_parquet
from huizhen.client.records.terms import Format, SourceTerms, format_of
from huizhen.client.records.text import AUTO, Lines
from huizhen.protocol.errors import ConfigError

Heard = Callable[[str], None]
_T = TypeVar("_T")
_TABLES: tuple[Format, ...] = ("csv", "tsv", "jsonl", "excel", "parquet")  # in files


@dataclass(frozen=True, slots=True)
class Part:
    """One file, folder or query."""

    terms: SourceTerms
    name: str
    # in places and errors
    path: Path | None
    # None: a database
    format: Format
    bytes: int
    # 0 for a database


def parts(sources: Sequence[SourceTerms], folder: Path) -> list[Part]:
    """Return what is to be read, in order; files of one name get their folders too.

    Args:
        sources: of a ``data.toml``.
        folder: which that lies in.

    Raises:
        ConfigError: a file is missing, or nothing says its format.
    """
    found: list[tuple[SourceTerms, Path | None]] = []
    for terms in sources:
        if terms.path is None:
            found.append((terms, None))
        else:
            found += [(terms, path) for path in _files(terms.path, folder)]
    counts = Counter(path.name for _, path in found if path is not None)
    made = []
    for number, (terms, path) in enumerate(found, 1):
        if path is None:
            made.append(Part(terms, f"query {number}", None, terms.format or "sql", 0))
            continue
        name = path.name if counts[path.name] == 1 else _relative(path, folder)
        kind = format_of(terms, path)
        if path.is_dir() != (kind == "omop"):
            raise ConfigError(
                f"{str(path)!r} is {'a folder' if path.is_dir() else 'a file'}, format {kind!r} "
                f"needs {'a folder' if kind == 'omop' else 'a file'}: mend the path"
            )
        made.append(Part(terms, name, path, kind, _size(path)))
    return made


def read_part(part: Part, folder: Path, heard: Heard = lambda _: None) -> Iterator[Entry]:
    """Yield the entries of a part.

    Args:
        part: of ``parts``.
        folder: which ``data.toml`` lies in.
        heard: is told the encoding of a table of text, once it was read.

    Raises:
        ConfigError: it cannot be opened, or is not what the source says.
        GovernanceError: what follows cannot be read either.
    """
    if part.format == "omop":
        return _omop(part, folder)
    if part.path is None:
        return _query(part, folder)
    if part.format in _TABLES:
        rows = rows_of_part(part, heard)
        return map_rows(rows, part.terms, part.name, is_uniform=part.format != "jsonl")
    return _opened(part.path, part.name, lambda stream: _documents(part, stream))


def rows_of_part(part: Part, heard: Heard = lambda _: None) -> Iterator[Row | Unreadable]:
    """Yield the rows of a table in a file, as they stand there.

    Raises:
        ConfigError: it is no table, cannot be opened, or is in another encoding.
        GovernanceError: what follows cannot be read either.
    """
    if part.path is None or part.format not in _TABLES:
        raise ConfigError(f"{part.name} is {part.format}, expected a table in a file")
    if part.format == "parquet":
        return read_parquet(part.path)
    return _opened(part.path, part.name, lambda stream: _rows(part, stream, heard))


def _opened(path: Path, name: str, read: Callable[[BinaryIO], Iterator[_T]]) -> Iterator[_T]:
    with opened(path, name) as stream:
        yield from read(stream)


def _rows(part: Part, stream: BinaryIO, heard: Heard) -> Iterator[Row | Unreadable]:
    if part.format == "excel":
        yield from read_excel(stream, part.name, sheet=part.terms.sheet)
        return
    lines = Lines(stream, part.name, part.terms.encoding)
    yield from rows_of(lines, part.format)
    heard(lines.encoding)


def _documents(part: Part, stream: BinaryIO) -> Iterator[Entry]:
    terms, name = part.terms, part.name
    match part.format:
        case "fhir":
            from huizhen.client.records.fhir import read_fhir

            return read_fhir(stream, name)
        case "hl7v2":
            from huizhen.client.records.hl7v2 import read_hl7v2

            return read_hl7v2(stream, name, encoding=_named(terms.encoding, "utf-8"))
        case "phenopackets":
            from huizhen.client.records.phenopackets import read_phenopackets

            return read_phenopackets(stream, name)
        case "cda":
            from huizhen.client.records.cda import read_cda

            return read_cda(stream, name, patient_root=terms.patient_root or "")
        case "dicom":
            from huizhen.client.records.dicom import read_dicom

            return read_dicom(stream, name, charset=_named(terms.encoding, ""))
        case _:
            raise ConfigError(f"{name} is a file, format {part.format!r} is none: mend format")


def _named(encoding: str, default: str) -> str:
    return default if encoding == AUTO else encoding


def _query(part: Part, folder: Path) -> Iterator[Entry]:
    from huizhen.client.records.sql import read_sql

    terms = part.terms
    password = None if terms.password_file is None else folder / terms.password_file
    rows = read_sql(terms.url or "", terms.query or "", name=part.name, password_file=password)
    with closing(rows):  # type: ignore[type-var]  # a generator
        yield from map_rows(rows, terms, part.name, is_uniform=True)


def _omop(part: Part, folder: Path) -> Iterator[Entry]:
    from huizhen.client.records.omop import read_omop

    terms = part.terms
    return read_omop(
        part.path or terms.url or "",
        name=part.name,
        schema=terms.schema or "",
        password_file=None if terms.password_file is None else folder / terms.password_file,
        encoding=_named(terms.encoding, "utf-8"),
    )


def _files(pattern: str, folder: Path) -> list[Path]:
    """Return the files that a path or pattern names, by name."""
    try:
        plain = folder / pattern
        if plain.exists():
            return [plain]
        base = Path(plain.anchor) if Path(pattern).is_absolute() else folder
        found = sorted(base.glob(str(plain.relative_to(base))))
    except (OSError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"path is {pattern!r}, which cannot be looked for: {error}") from error
    if not found:
        raise ConfigError(f"there is no file {pattern!r} in {str(folder)!r}: mend the path")
    return found


def _relative(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return path.stat().st_size
