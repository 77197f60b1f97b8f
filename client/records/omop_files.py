"""Tables of the OMOP common data model as a folder of CSV files.

Files are read by lines, not by a library for tables: a place names the line, a broken row costs
only itself, and what is packed is never unpacked whole.
"""

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO

from huizhen.client.records.omop_layout import LAYOUTS, Rows, expect_columns, tell_unread
from huizhen.client.records.record import MAX_ENTRY_BYTES, Unreadable
from huizhen.protocol.errors import ConfigError, GovernanceError

MAX_CONCEPTS = 1_000_000
# that the tables may refer to; CONCEPT may have many more
MAX_UNPACKED = 300
# times its own size that a file may unpack to; tables of numbers come near 30
_LONGEST_HEADER = 1 << 14
_LONGEST_NUMBER = 30
_PART = 64
# bytes that Python needs for a text, with its place in a list
_WITHIN_QUOTES = re.compile(r'[^"]*+(?:""[^"]*+)*+')
_ENCODINGS = ("utf-8", "gb18030", "gbk", "gb2312", "ascii", "iso8859-1", "cp1252")
# in which no byte of a character looks like a line's end, a quote or a comma


class Folder:
    """A folder of CSV files, one a table, with commas or tabs, perhaps packed by gzip."""

    def __init__(self, path: Path, name: str, encoding: str) -> None:
        self._name, self._files = name, dict[str, Path]()
        try:
            self._encoding = codecs.lookup(encoding).name
            if self._encoding not in _ENCODINGS:
                raise LookupError
        except (LookupError, ValueError) as error:
            raise ConfigError(
                f"{name}: encoding is {encoding[:80]!r}, expected one of {', '.join(_ENCODINGS)}"
            ) from error
        try:
            found = sorted(file for file in path.iterdir() if file.is_file())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{name}: {str(path)[:80]!r} is no folder that can be read"
            ) from error
        for file in found:
            known = file.name.lower().removesuffix(".gz")
            if known.endswith(".csv"):
                other = self._files.setdefault(known.removesuffix(".csv"), file)
                if other != file:
                    raise ConfigError(
                        f"{name}: {other.name[:80]!r}, {file.name[:80]!r} are one table: keep one"
                    )
        tell_unread(name, self._files)

    def has(self, name: str) -> bool:
        """Return whether there is a table of this name, in lower case."""
        return name in self._files

    def rows(self, name: str, columns: Sequence[str]) -> Rows:
        """Yield the place and those columns of each row, but for those there are not."""
        path = self._files[name]
        place = f"{self._name}/{path.name}"
        try:
            with path.open("rb") as raw:
                if path.name.lower().endswith(".gz"):
                    with gzip.open(raw) as unpacked:
                        lines = Lines(unpacked, place, self._encoding, packed=raw)  # type: ignore[arg-type]  # GzipFile reads as a BinaryIO
                        yield from _rows(lines, name, columns)
                else:
                    yield from _rows(Lines(raw, place, self._encoding), name, columns)
        except gzip.BadGzipFile as error:
            raise ConfigError(f"{place}: file is not gzip: unpack or rename it") from error
        except (EOFError, zlib.error) as error:
            raise ConfigError(f"{place}: file is cut short or damaged: copy it again") from error
        except OSError as error:
            raise ConfigError(f"{place}: cannot be read: {error.strerror or 'damaged'}") from error

    def used_concepts(self) -> Rows:
        """Yield the rows of CONCEPT that other tables refer to: two passes, neither held."""
        used: set[str] = set()
        for name in sorted(self._files.keys() & LAYOUTS.keys()):
            columns = LAYOUTS[name].concepts
            for row in self.rows(name, columns) if columns else ():
                if not isinstance(row, Unreadable):
                    used.update(v for v in row[1].values() if len(v) < _LONGEST_NUMBER)
                if len(used) > MAX_CONCEPTS:
                    raise GovernanceError(
                        f"{self._name}: tables refer to over {MAX_CONCEPTS} concepts: "
                        "split the persons into several folders"
                    )
        used = {value.strip().split(".")[0] for value in used if value}  # 8532.0 where gaps are
        for row in self.rows("concept", LAYOUTS["concept"].columns):
            if isinstance(row, Unreadable) or row[1]["concept_id"].strip() in used:
                yield row


class Lines:
    """The lines of a file as text, none longer than an entry may be."""

    def __init__(
        self, stream: BinaryIO, place: str, encoding: str, packed: BinaryIO | None = None
    ) -> None:
        self.place, self.number = place, 0
        self.is_damaged = False
        # a line since this was last reset is not in the encoding
        self._stream, self._encoding, self._packed, self._size = stream, encoding, packed, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(MAX_ENTRY_BYTES + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self._size += len(line) + _PART
        if len(line) > MAX_ENTRY_BYTES:
            raise GovernanceError(
                f"{self.place}:{self.number}: line has over {MAX_ENTRY_BYTES} bytes: split it"
            )
        if self._packed is not None and self.number % 4096 == 0:
            self._refuse_bomb(self._packed)
        try:
            text = line.decode(self._encoding)
        except UnicodeDecodeError:
            self.is_damaged = True
            text = line.decode("ascii", "replace")
        return text.removeprefix("\ufeff") if self.number == 1 else text

    def _refuse_bomb(self, packed: BinaryIO) -> None:
        if self._size > MAX_UNPACKED * max(packed.tell(), 1 << 16):
            raise GovernanceError(
                f"{self.place}: file unpacks to over {MAX_UNPACKED} times its size: unpack it first"
            )


def _rows(lines: Lines, name: str, columns: Sequence[str]) -> Rows:
    first = next(lines, "").rstrip("\r\n")
    if len(first) > _LONGEST_HEADER:
        raise ConfigError(f"{lines.place}: header has over {_LONGEST_HEADER} characters: mend it")
    delimiter = "\t" if "\t" in first else ","
    header = [cell.strip().strip('"').lower() for cell in first.split(delimiter)]
    if len(set(header)) < len(header):
        raise ConfigError(f"{lines.place}: header has a column twice: rename one")
    expect_columns(lines.place, name, header)
    there = [wanted for wanted in columns if wanted in header]
    # OHDSI's own files of vocabulary have tabs and no quotes: there " is a character as others
    # (https://github.com/OHDSI/Vocabulary-v5.0/wiki).
    is_quoted = not (delimiter == "\t" and name == "concept")
    chosen = itemgetter(*(header.index(wanted) for wanted in there), 0, 0)
    width = len(header)
    lines.is_damaged = False
    for line in lines:
        number, text = lines.number, line.rstrip("\r\n")
        if not text:
            continue
        cells: list[str] | None = []
        if is_quoted and '"' in text:
            cells = quoted(text, lines, delimiter, width)
        elif text.count(delimiter) == width - 1:  # counted first: cells take much more than text
            cells = text.split(delimiter)
        if cells is not None and len(cells) == width and not lines.is_damaged:
            yield f"{lines.place}:{number}", dict(zip(there, chosen(cells), strict=False))
            continue
        problem = "row has another number of columns than the header: mend the export"
        if lines.is_damaged:
            problem = "row is not in the declared encoding: set encoding to the file's own"
        elif cells is None:
            problem = f"row up to line {lines.number} has a quote that is not closed or not doubled"
        lines.is_damaged = False
        yield Unreadable(f"{lines.place}:{number}", problem)


def quoted(line: str, lines: Lines, delimiter: str, width: int) -> list[str] | None:
    """Return the cells of a row with quotes (RFC 4180, 2.5 to 2.7), which may go on over lines.

    Args:
        line: where the row begins.
        lines: those after it.
        delimiter: a comma or tab.
        width: how many cells there should be; one more is enough to tell.

    Returns:
        None where a quote within a cell is not doubled: the row, and what its quote took in, is
        lost.

    Raises:
        GovernanceError: a quote stays open for longer than an entry may be.
    """
    begin, size, at = lines.number, len(line), 0
    cells: list[str] = []
    while len(cells) <= width:
        if not line.startswith('"', at):
            end = line.find(delimiter, at)
            if end < 0:
                return [*cells, line[at:]]
            cells.append(line[at:end])
            at = end + 1
            continue
        parts, at = [], at + 1
        while (end := _end(line, at)) == len(line):
            parts.append(line[at:])
            following = next(lines, None)
            size += len(following or "") + _PART
            if following is None or size > MAX_ENTRY_BYTES:
                raise GovernanceError(
                    f"{lines.place}:{begin}: quote is not closed by the end of the file or within "
                    f"{MAX_ENTRY_BYTES} bytes: mend the export"
                )
            line, at = following.rstrip("\r\n"), 0
        cells.append("\n".join([*parts, line[at:end]]).replace('""', '"'))
        at = end + 1
        if at == len(line):
            return cells
        if not line.startswith(delimiter, at):
            return None
        at += 1
    return cells


def _end(line: str, at: int) -> int:
    """Return where the text within quotes ends, at a quote that is not doubled or at the end."""
    found = _WITHIN_QUOTES.match(line, at)
    return found.end() if found else at
