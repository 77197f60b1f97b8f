"""The alliance's table of labs: names, units and limits, so that all hospitals mean one thing.

``labs.toml`` is data, agreed by the alliance; its digest is what a study records. A lab is found by
LOINC code, or by a name that equals one of the table's but for case, spaces and punctuation: what
only resembles a name is another lab.
"""

import dataclasses
import functools
import hashlib
import re
import tomllib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import rfc8785

from huizhen.client.quality.units import MAX_UNIT, Conversion, conversion, spelling
from huizhen.protocol import strict
from huizhen.protocol.errors import ConfigError

FORMAT = 1
MAX_NAME = 200
# characters of a lab's name; longer ones are no names
_MAX_REMEMBERED = 1 << 16
# units and names as hospitals write them: few, unless somebody makes them up
_MARKS = re.compile(r"[\s()\[\]_\-,.、:·'\"*+★▲^&]")


@dataclass(frozen=True, slots=True, kw_only=True)
class LabEntry:
    """One lab of the table."""

    names: tuple[str, ...]
    key: str = ""
    # what it is called in records that were checked; empty in the file: as its table is called
    loinc: tuple[str, ...] = ()
    unit: str = ""
    # UCUM; empty for a result in words
    same: tuple[str, ...] = ()
    # other units whose numbers are the same, such as "[IU]/L" for "U/L"
    lines: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    # unit -> (factor, offset), where neither dimension nor molar mass leads from one to the other
    molar_mass: float = 0.0
    # g/mol; 0 where an amount is not measured
    valence: int = 0
    possible: tuple[float, ...] = ()
    # lowest and highest value that can be; outside, the value is wrong
    plausible: tuple[float, ...] = ()
    # outside, somebody should look

    def __post_init__(self) -> None:
        """Check the limits and the lines."""
        for name, limits in (("possible", self.possible), ("plausible", self.plausible)):
            if limits and (len(limits) != 2 or not limits[0] < limits[1]):
                raise ValueError(f"{name} is {limits}, expected lowest and highest")
        outer, inner = self.possible, self.plausible
        if bool(outer) != bool(inner) or (
            outer and not outer[0] <= inner[0] < inner[1] <= outer[1]
        ):
            raise ValueError("plausible is not within possible")
        if any(len(line) != 2 or not line[0] for line in self.lines.values()):
            raise ValueError("lines need a factor and an offset each")
        if self.molar_mass < 0 or self.valence < 0:
            raise ValueError("molar_mass and valence must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Document:
    """The file as it is written."""

    format: int
    words: Mapping[str, str]
    aliases: Mapping[str, tuple[str, ...]]
    comparators: Mapping[str, tuple[str, ...]]
    results: tuple[str, ...]
    labs: Mapping[str, LabEntry]


class LabTable:
    """The table, made ready for looking up; it never changes but for what it remembers."""

    def __init__(self, document: Mapping[str, Any], name: str = "labs.toml") -> None:
        """Read the table.

        Args:
            document: the parsed file.
            name: what to call it in errors.

        Raises:
            ConfigError: a key is unknown, a value is out of range, or a name means two labs.
        """
        read = strict.build(_Document, document, name)
        if read.format != FORMAT:
            raise ConfigError(f"{name} format is {read.format}, expected {FORMAT}")
        try:
            self.digest = hashlib.sha256(rfc8785.dumps(dict(document))).hexdigest()
        except rfc8785.CanonicalizationError as error:
            raise ConfigError(f"{name} has a number that has no canonical form") from error
        self.results = frozenset(text.casefold() for text in read.results)
        self.comparators = {
            word.casefold(): sign for sign, words in read.comparators.items() for word in words
        }
        self._words = dict(sorted(read.words.items(), key=lambda item: -len(item[0])))
        self.entries: list[LabEntry] = []
        self._by_key: dict[str, LabEntry] = {}
        self._by_loinc: dict[str, LabEntry] = {}
        self._by_name: dict[str, LabEntry] = {}
        for label, entry in read.labs.items():
            self._add(dataclasses.replace(entry, key=entry.key or label), name)
        self._units = self._spellings(read.aliases, name)
        self._named: dict[str, LabEntry | None] = {}
        self._ways: dict[tuple[int, str], Conversion | None] = {}

    def find_key(self, key: str) -> LabEntry | None:
        """Return the lab that records which were checked call so."""
        return self._by_key.get(key)

    def find_loinc(self, code: str) -> LabEntry | None:
        """Return the lab of a LOINC code."""
        return self._by_loinc.get(code)

    def find_name(self, name: str) -> LabEntry | None:
        """Return the lab of a name in English or Chinese, or of a usual abbreviation."""
        try:
            return self._named[name]
        except KeyError:
            pass
        if len(name) > MAX_NAME:
            return None
        if len(self._named) >= _MAX_REMEMBERED:
            self._named.clear()
        self._named[name] = found = self._by_name.get(plain(name))
        return found

    def ucum(self, text: str) -> str:
        """Return a unit in UCUM where it is known, otherwise in one spelling."""
        if len(text) > MAX_UNIT:
            return text
        found = spelling(text, self._words)
        return self._units.get(found) or self._units.get(found.casefold()) or found

    def way(self, entry: LabEntry, text: str) -> Conversion | None:
        """Return the way from a unit, as a hospital writes it, to the lab's own; None: unknown."""
        remembered = id(entry), text
        try:
            return self._ways[remembered]
        except KeyError:
            pass
        if len(self._ways) >= _MAX_REMEMBERED:
            self._ways.clear()
        self._ways[remembered] = found = self._find_way(entry, text)
        return found

    def _find_way(self, entry: LabEntry, text: str) -> Conversion | None:
        unit = self.ucum(text)
        if not unit:
            return Conversion(1.0) if entry.unit == "1" else None
        if unit in entry.same:
            return Conversion(1.0)
        if line := entry.lines.get(unit):
            return Conversion(*line)
        if not entry.unit:
            return None
        return conversion(unit, entry.unit, molar_mass=entry.molar_mass, valence=entry.valence)

    def _add(self, entry: LabEntry, name: str) -> None:
        self.entries.append(entry)
        self._by_key.setdefault(entry.key, entry)
        for code in entry.loinc:
            if self._by_loinc.setdefault(code, entry) is not entry:
                raise ConfigError(f"{name} has LOINC {code} twice: it can mean one lab only")
        for text in entry.names:
            if self._by_name.setdefault(plain(text), entry) is not entry:
                raise ConfigError(f"{name} has the name {text!r} twice: it can mean one lab only")

    def _spellings(self, aliases: Mapping[str, tuple[str, ...]], name: str) -> dict[str, str]:
        """Return spelling -> unit; hospitals write MMOL/L and mg/dl, so case counts last."""
        units = list(aliases)
        for entry in self.entries:
            units += [unit for unit in (entry.unit, *entry.same, *entry.lines) if unit]
        exact: dict[str, str] = {unit: unit for unit in units}
        for unit, texts in aliases.items():
            for text in texts:
                if exact.setdefault(spelling(text, self._words), unit) != unit:
                    raise ConfigError(f"{name} has the unit {text!r} twice")
        folded: dict[str, str] = {}
        for text, unit in exact.items():
            if folded.setdefault(text.casefold(), unit) != unit:
                folded[text.casefold()] = ""  # two units but for case: only the exact text is one
        return {text: unit for text, unit in folded.items() if unit} | exact


def plain(name: str) -> str:
    """Return a name without case, spaces and punctuation; % and # tell labs apart and stay."""
    return _MARKS.sub("", unicodedata.normalize("NFKC", name).casefold())


def load_table(path: Path) -> LabTable:
    """Return the table in a file.

    Raises:
        ConfigError: the file cannot be read, or is no table of labs.
    """
    return LabTable(strict.read_toml(path), path.name)


@functools.cache
def shipped_table() -> LabTable:
    """Return the table that comes with this version."""
    text = package_files("huizhen.client.quality").joinpath("labs.toml").read_text("utf-8")
    return LabTable(tomllib.loads(text))
