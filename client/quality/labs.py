"""The labs of a record in the alliance's names and units, and what is wrong with them.

A result whose lab and unit are known becomes one of the system ``LAB_SYSTEM``: its code is the
table's key, its unit the table's. Every other result stays as its source has it, or is left out if
the rules say so. So whoever uses only results of ``LAB_SYSTEM`` never mixes units.
"""

import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

from huizhen.client.quality.lab_table import LabEntry, LabTable
from huizhen.client.quality.problems import DEFAULT_RULES, Code, Problem, Rules
from huizhen.client.quality.units import MAX_UNIT, Conversion
from huizhen.client.records.record import Comparator, Lab, Record

LAB_SYSTEM = "huizhen"
_SLIPS = (0.001, 0.01, 0.1, 10.0, 100.0, 1000.0)
# what a wrong prefix or a lost decimal point makes of a value
_MAX_RESULT = 200
# characters; a longer text is no result
_NUMBER = re.compile(r"[+-]?(?:\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})(?:[eE][+-]?\d{1,2})?(?![\d,])")
_SPAN = re.compile(r"\d+(?:\.\d+)?\s*[-~:]\s*\d+(?:\.\d+)?(?![\d.]).{0,20}")
# "2-3/HP" of cells that are counted, "1:160" of a titre: results, but no numbers
_FLAG = re.compile(r"(?:[↑↓*]+|(?<![A-Za-z/])[HhLl])$")


class Result(NamedTuple):
    """What a result says as a text."""

    value: float | None
    # None: in words
    comparator: Comparator = ""
    unit: str = ""


def check_labs(
    record: Record,
    table: LabTable,
    rules: Rules | None = None,
    declared: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Record, list[Problem]]:
    """Return the record with its labs in the table's terms, and what was wrong or changed.

    Args:
        record: whose labs to check.
        table: the alliance's.
        rules: what becomes of each problem.
        declared: key of a lab -> unit of its results that come without one, which the hospital
            vouches for.

    Raises:
        GovernanceError: a problem that the rules refuse.
    """
    if not record.labs:
        return record, []
    check = _Check(record, table, rules or DEFAULT_RULES, declared)
    labs = tuple(check.run())
    return (record if labs == record.labs else replace(record, labs=labs)), check.problems


def read_result(text: str, table: LabTable) -> Result | None:
    """Return what a result says: a number, or words that the table knows; None for neither.

    What can be read in two ways ("1,234", "5,6") is not read.
    """
    text = unicodedata.normalize("NFKC", text[: _MAX_RESULT + 1]).strip()
    if not text or len(text) > _MAX_RESULT:
        return None
    if text.casefold() in table.results or text.partition("(")[0].strip().casefold() in (
        table.results
    ):
        return Result(None)
    rest, sign = text.casefold(), ""
    for word in sorted(table.comparators, key=len, reverse=True):
        if rest.startswith(word):
            text, sign = text[len(word) :].lstrip(), table.comparators[word]
            break
    if not sign and _SPAN.fullmatch(text):
        return Result(None)
    found = _NUMBER.match(text)
    if not found:
        return None
    unit = _FLAG.sub("", text[found.end() :].strip()).strip()
    if len(unit) > MAX_UNIT or unit[:1].isdigit() or unit[:1] in {"-", ".", ":", "+"}:
        return None
    return Result(float(found[0]), sign, unit)  # type: ignore[arg-type]  # the table's four


@dataclass(slots=True)
class _Reading:
    """A result on its way into the table's terms."""

    entry: LabEntry
    value: float
    comparator: Comparator
    way: Conversion
    from_text: bool


class _Check:
    """One record's labs."""

    def __init__(
        self, record: Record, table: LabTable, rules: Rules, declared: Mapping[str, str]
    ) -> None:
        self._record, self._table, self._rules, self._declared = record, table, rules, declared
        self.problems: list[Problem] = []

    def run(self) -> list[Lab]:
        """Return the labs that remain."""
        seen: dict[tuple[str, str], Lab] = {}
        told: set[tuple[str, str]] = set()
        kept = []
        for lab in self._record.labs:
            checked = self._one(lab)
            if checked is None or self._is_repeated(checked, seen, told):
                continue
            kept.append(checked)
        return kept

    def _settle(self, code: Code, subject: str) -> bool:
        """Note a problem; return whether it is to be mended."""
        problem = self._rules.settle(code, self._record.place, subject[:80])
        self.problems.append(problem)
        return problem.action == "fix"

    def _left(self, lab: Lab, code: Code, subject: str) -> Lab | None:
        """Return a lab as its source has it, or none where the rules leave it out."""
        return None if self._settle(code, subject) else lab

    def _one(self, lab: Lab) -> Lab | None:
        entry, problem = self._find(lab)
        if entry is None:
            return self._left(lab, problem, lab.name or lab.code)
        read = self._read(lab, entry)
        if isinstance(read, Code):
            return self._left(lab, read, entry.key)
        if read is None:
            return _in_words(lab, entry)
        if read.from_text and self._rules.action(Code.NUMBER_IN_TEXT) != "fix":
            return self._left(lab, Code.NUMBER_IN_TEXT, entry.key)
        is_other = read.way != (1.0, 0.0)
        if is_other and self._rules.action(Code.CONVERTED_UNIT) != "fix":
            return self._left(lab, Code.CONVERTED_UNIT, entry.key)
        value = read.way.of(read.value)
        if not self._is_possible(entry, value, read.comparator):
            return None
        for is_so, code in (
            (read.from_text, Code.NUMBER_IN_TEXT),
            (is_other, Code.CONVERTED_UNIT),
        ):
            if is_so:
                self._settle(code, entry.key)
        low, high = self._range(lab, entry, read.way)
        return Lab(
            code=entry.key,
            system=LAB_SYSTEM,
            name=lab.name,
            value=value,
            comparator=read.comparator,
            text=lab.text,
            unit=entry.unit,
            low=low,
            high=high,
            time=lab.time,
        )

    def _find(self, lab: Lab) -> tuple[LabEntry | None, Code]:
        """Return the lab's entry, or none and why.

        A LOINC code that the table lacks is another lab, whatever its name is.
        """
        if lab.system == LAB_SYSTEM:
            return self._table.find_key(lab.code), Code.UNKNOWN_LAB
        if lab.system == "loinc":
            coded = self._table.find_loinc(lab.code)
            named = self._table.find_name(lab.name) if lab.name else None
            if coded and named and coded.key != named.key and not _is_kin(coded, named):
                return None, Code.AMBIGUOUS_LAB
            return coded, Code.UNKNOWN_LAB
        named = self._table.find_name(lab.name) if lab.name else None
        coded = self._table.find_name(lab.code) if lab.code else None
        if coded and named and coded.key != named.key:
            return None, Code.AMBIGUOUS_LAB
        return named or (None if lab.name else coded), Code.UNKNOWN_LAB

    def _read(self, lab: Lab, entry: LabEntry) -> _Reading | Code | None:
        """Return the number of a result and the way to the table's unit; None: it is in words."""
        value, comparator, unit = lab.value, lab.comparator, lab.unit
        if value is None:
            result = read_result(lab.text, self._table)
            if result is None:
                return Code.NO_NUMBER
            if result.value is None:
                return None
            value, comparator = result.value, result.comparator
            ways = {self._table.way(entry, text) for text in (unit, result.unit) if text.strip()}
            if len(ways) > 1:  # the field of the unit and the text disagree
                return Code.UNIT_SUSPECT
            unit = unit if unit.strip() else result.unit
        if not math.isfinite(value):
            return Code.IMPOSSIBLE_VALUE
        unit = unit.strip() or self._declared.get(entry.key, "")
        way = self._table.way(entry, unit)
        if way is None:
            return Code.UNKNOWN_UNIT if unit else Code.MISSING_UNIT
        return _Reading(entry, value, comparator, way, lab.value is None)

    def _is_possible(self, entry: LabEntry, value: float, comparator: Comparator) -> bool:
        """Note a value outside the limits; return whether the lab stays."""
        if not math.isfinite(value):
            return not self._settle(Code.IMPOSSIBLE_VALUE, entry.key)
        if not entry.possible or _within(value, comparator, entry.plausible):
            return True
        is_possible = _within(value, comparator, entry.possible)
        code = Code.IMPLAUSIBLE_VALUE if is_possible else Code.IMPOSSIBLE_VALUE
        leaves = self._settle(code, entry.key)
        slips: tuple[float, ...] = _SLIPS
        if entry.molar_mass and (way := self._table.way(entry, "mg/dL")):
            slips += (way.factor, 1 / way.factor)
        low, high = entry.plausible
        if any(low <= value * slip <= high for slip in slips if value > 0):
            leaves |= self._settle(Code.UNIT_SUSPECT, entry.key)
        return not leaves

    def _range(
        self, lab: Lab, entry: LabEntry, way: Conversion
    ) -> tuple[float | None, float | None]:
        """Return the reference range in the table's unit."""
        low = None if lab.low is None else way.of(lab.low)
        high = None if lab.high is None else way.of(lab.high)
        is_bad = any(end is not None and not math.isfinite(end) for end in (low, high)) or (
            low is not None and high is not None and low > high
        )
        if is_bad and self._settle(Code.REFERENCE_RANGE, entry.key):
            return None, None
        return low, high

    def _is_repeated(
        self, lab: Lab, seen: dict[tuple[str, str], Lab], told: set[tuple[str, str]]
    ) -> bool:
        """Note a second result of one lab and moment; return whether it is left out."""
        moment = lab.time or self._record.time
        if lab.system != LAB_SYSTEM or not moment:
            return False
        first = seen.setdefault((lab.code, moment), lab)
        if first is lab:
            return False
        if _says(first) == _says(lab):
            return self._settle(Code.REPEATED_LAB, lab.code)
        if (lab.code, moment) not in told:
            told.add((lab.code, moment))
            self._settle(Code.CONTRADICTORY_LABS, lab.code)
        return False


def _is_kin(one: LabEntry, other: LabEntry) -> bool:
    """Return whether a name may mean the code's lab: "glucose" is written for capillary blood."""
    return one.key.startswith(other.key + "_") or other.key.startswith(one.key + "_")


def _in_words(lab: Lab, entry: LabEntry) -> Lab:
    return replace(lab, code=entry.key, system=LAB_SYSTEM, comparator="", unit="")


def _within(value: float, comparator: Comparator, limits: tuple[float, ...]) -> bool:
    """Return whether a value may lie within limits; "<5" says nothing of the lower one."""
    low, high = limits
    return (value >= low or (comparator in ("<", "<=") and value >= 0)) and (
        value <= high or comparator in (">", ">=")
    )


def _says(lab: Lab) -> tuple[float | None, str, str]:
    return lab.value, lab.comparator, lab.text if lab.value is None else ""
