r"""HL7 v2.5.1, chapter 2: segments, fields, components and escapes, with the message's own signs.

A segment is split only as far as it is read. ``""`` (2.5.3, to be deleted) reads as empty. Escapes
(2.7) are undone where they stand for characters; of formatting only the breaks of lines stay. What
is not an escape, such as ``C:\data``, stays as it is.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from huizhen.client.records.codings import Concept, best_concept, system_name
from huizhen.client.records.times import iso

MAX_FIELDS: Final = 200
MAX_COMPONENTS: Final = 40
MAX_REPETITIONS: Final = 1000
MAX_CACHED: Final = 300  # characters of a code with its names; hospitals write the same ones often
_BREAKS: Final = (".br", ".sp", ".ce")
_DATE_AND_HOUR: Final = re.compile(r"(\d{10})([+-]\d{4})?")
_DATE_AND_ZONE: Final = re.compile(r"(\d{4,8})[+-]\d{4}")


class UnfitError(ValueError):
    """A segment cannot be read; the message shows nothing of its content."""


@dataclass(frozen=True, slots=True)
class Syntax:
    """The five signs of a message, MSH-1 and MSH-2, and its encoding."""

    field: str
    component: str
    repetition: str
    escape: str
    subcomponent: str
    encoding: str = "utf-8"

    def plain(self, text: str) -> str:
        """Return text with its escapes undone."""
        if not self.escape or self.escape not in text:
            return text
        return _escapes(self.escape).sub(self._meaning, text)

    def _meaning(self, found: re.Match[str]) -> str:
        code = found[1]
        match code[0]:
            case "F":
                return self.field
            case "S":
                return self.component
            case "T":
                return self.subcomponent
            case "R":
                return self.repetition
            case "E":
                return self.escape
            case "X":
                return self._from_hex(code[1:], found[0])
            case "." if code.startswith(_BREAKS):
                return "\n"
        return ""  # highlighting and indents

    def _from_hex(self, digits: str, whole: str) -> str:
        try:
            return bytes.fromhex(digits).decode(self.encoding).replace("\r", "\n")
        except ValueError:
            return whole


@lru_cache(maxsize=16)
def _escapes(sign: str) -> re.Pattern[str]:
    sign = re.escape(sign)
    return re.compile(rf"{sign}([FSTREHN]|X[0-9A-Fa-f]+|\.[a-z]{{2}}[+-]?\d{{0,4}}){sign}")


class Segment:
    """One segment, whose fields are counted as the standard counts them."""

    __slots__ = ("_fields", "name", "place", "syntax")

    def __init__(self, line: str, place: str, syntax: Syntax) -> None:
        """Split a line into fields."""
        fields = line.split(syntax.field, MAX_FIELDS)
        if len(fields) > MAX_FIELDS:
            raise UnfitError(f"segment has over {MAX_FIELDS} fields: mend the export")
        self.name = fields[0]
        self.place = place
        self.syntax = syntax
        self._fields = [fields[0], syntax.field, *fields[1:]] if fields[0] == "MSH" else fields

    def __repr__(self) -> str:
        return f"Segment(<masked>, {self.place})"

    def raw(self, field: int) -> str:
        """Return a field as it stands; empty where it is absent."""
        value = self._fields[field] if field < len(self._fields) else ""
        return "" if value == '""' else value

    def repeats(self, field: int) -> list[str]:
        """Return the repetitions of a field that hold something, as they stand."""
        raw = self.raw(field)
        if not raw:
            return []
        if self.syntax.repetition not in raw:
            return [raw]
        items = raw.split(self.syntax.repetition, MAX_REPETITIONS)
        if len(items) > MAX_REPETITIONS:
            raise UnfitError(f"{self.name}-{field} repeats over {MAX_REPETITIONS} times: mend it")
        return [item for item in items if item and item != '""']

    def text(self, field: int, component: int = 1) -> str:
        """Return a component of a field's first repetition, its escapes undone."""
        raw = self.raw(field)
        if not raw:
            return ""
        if self.syntax.repetition in raw:
            raw = raw.partition(self.syntax.repetition)[0]
        return self.part(raw, component)

    def part(self, raw: str, component: int, *, sub: bool = False) -> str:
        """Return a component of one repetition, or that component's first part."""
        if self.syntax.component in raw:
            parts = raw.split(self.syntax.component, MAX_COMPONENTS)
            part = parts[component - 1] if component <= len(parts) else ""
        else:
            part = raw if component == 1 else ""
        if not part or part == '""':
            return ""
        if sub:
            part = part.partition(self.syntax.subcomponent)[0]
        return self.syntax.plain(part).strip()

    def time(self, field: int) -> str:
        """Return a field that is a time.

        Raises:
            UnfitError: it is none.
        """
        if not (text := self.text(field)):
            return ""
        try:
            return _time(text[:60])
        except ValueError as error:
            raise UnfitError(f"{self.name}-{field} {error}: mend the export") from error

    def concept(self, field: int, prefer: str = "") -> Concept:
        """Return what a CE, CWE or CNE means: two codings, and from v2.5 the original text."""
        raw = self.raw(field)
        first = raw.partition(self.syntax.repetition)[0] if raw else ""
        return self.meaning(first, prefer)

    def meaning(self, raw: str, prefer: str = "") -> Concept:
        """Return what one repetition of a CE, CWE or CNE means."""
        if not raw:
            return Concept()
        meaning = _meaning if len(raw) < MAX_CACHED else _meaning.__wrapped__
        return meaning(raw, self.syntax, prefer)


@lru_cache(maxsize=4096)
def _meaning(raw: str, syntax: Syntax, prefer: str) -> Concept:
    parts = [
        "" if part == '""' else syntax.plain(part).strip()
        for part in raw.split(syntax.component, MAX_COMPONENTS)
    ]
    parts += [""] * (9 - len(parts))
    code, name, system, code_2, name_2, system_2 = parts[:6]
    codings = [(code, system_name(system), name)]
    if code_2 or name_2:
        codings.append((code_2, system_name(system_2), name_2))
    return best_concept(codings, parts[8], prefer)


@lru_cache(maxsize=4096)
def _time(text: str) -> str:
    """Return a TS, DT or DTM; an hour alone is that hour's begin, a date has no zone."""
    if found := _DATE_AND_HOUR.fullmatch(text):
        text = f"{found[1]}00{found[2] or ''}"
    elif found := _DATE_AND_ZONE.fullmatch(text):
        text = found[1]
    return iso(text)
