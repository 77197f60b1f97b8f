"""The data types of CDA as plain values: codes, times, results, and the text for people to read.

HL7 CDA R2 with its abstract data types (R1). What is not given is ``nullFlavor`` there, and often a
bare dash or slash in the Chinese shared documents (WS/T 500), which leave no element empty.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from lxml import etree

from huizhen.client.records.codings import system_name
from huizhen.client.records.record import Lab
from huizhen.client.records.results import number_of, range_of
from huizhen.client.records.times import iso

V3 = "{urn:hl7-org:v3}"
_TYPE = "{http://www.w3.org/2001/XMLSchema-instance}type"
_EMPTY = frozenset({"", "-", "--", "—", "/", "\\", "NA", "N/A"})
_BLOCKS = frozenset(
    V3 + tag for tag in ("paragraph", "list", "item", "table", "tr", "caption", "br", "text")
)
_CELLS = frozenset({V3 + "td", V3 + "th"})
MAX_NAME = 200
# characters of a name that is taken from the text for people


@dataclass(frozen=True, slots=True)
class Coded:
    """A concept: its code, its system's short name, and what the source calls it."""

    code: str
    system: str
    name: str


class Document:
    """What all parts of one document share: its texts by their ``ID``, and what was not read."""

    def __init__(self, root: etree._Element) -> None:
        """Find the texts that codes refer to."""
        self.unread_times = 0
        self._anchors = {
            anchor: element for element in root.iter() if (anchor := element.get("ID"))
        }
        self._texts: dict[str, str] = {}

    def referred(self, element: etree._Element | None) -> str:
        """Return a text that is given here, or in the narrative that a reference names."""
        if element is None:
            return ""
        if own := given(element.text):
            return " ".join(own.split())
        reference = element.find(V3 + "reference")
        anchor = (reference.get("value") or "").removeprefix("#") if reference is not None else ""
        if anchor not in self._texts and anchor in self._anchors:
            self._texts[anchor] = _beginning(self._anchors[anchor])
        return self._texts.get(anchor, "")

    def coded(self, element: etree._Element | None) -> Coded | None:
        """Return the concept of a code or of a coded value, its own or its first translation's.

        None where there is neither a code nor a name.
        """
        if element is None:
            return None
        name = given(element.get("displayName")) or self.referred(element.find(V3 + "originalText"))
        for each in (element, *element.findall(V3 + "translation")):
            if code := given(each.get("code")):
                own = given(each.get("displayName")) or name
                return Coded(code, system_name(each.get("codeSystem") or ""), own)
        return Coded("", "", name) if name else None

    def time(self, statement: etree._Element, default: str = "") -> str:
        """Return when a statement holds: its time, or the beginning of its interval."""
        for effective in statement.findall(V3 + "effectiveTime"):
            for element in (effective, effective.find(V3 + "low"), effective.find(V3 + "center")):
                if element is not None and (found := self.iso(element.get("value"))):
                    return found
        return default

    def iso(self, text: str | None) -> str:
        """Return a time in the one form; what cannot be read is counted, and empty."""
        try:
            return iso(given(text))
        except ValueError:
            self.unread_times += 1
            return ""

    def results(
        self, concept: Coded | None, observation: etree._Element, time: str
    ) -> Iterator[tuple[etree._Element, Lab]]:
        """Yield each value of an observation that says something, and the result it is."""
        values = observation.findall(V3 + "value")
        limits = _Limits(observation) if values else None
        for value in values:
            if concept and limits and (lab := self._lab(concept, value, limits, time)):
                yield value, lab

    def _lab(
        self, concept: Coded, value: etree._Element, limits: "_Limits", time: str
    ) -> Lab | None:
        result = self._result(value)
        if result is None:
            return None
        text, unit = result
        is_number = _type(value) not in ("TS", "BL") and value.get("code") is None
        number, comparator = number_of(text) if is_number else (None, "")
        low, high = limits.of(unit)
        return Lab(
            code=concept.code,
            system=concept.system,
            name=concept.name,
            value=number,
            comparator=comparator,
            text=text,
            unit=unit,
            low=low,
            high=high,
            time=time,
        )

    def _result(self, value: etree._Element) -> tuple[str, str] | None:
        """Return the text and the unit of a value of any type; None where there is none."""
        for each in (value, *value.findall(V3 + "translation")):
            if text := given(each.get("value")):
                return text, given(each.get("unit"))
        low, high = value.find(V3 + "low"), value.find(V3 + "high")
        if low is not None or high is not None:
            return None if "TS" in _type(value) else _interval(low, high)
        parts = [value.find(V3 + part) for part in ("numerator", "denominator")]
        ratio = [given(part.get("value")) for part in parts if part is not None]
        if len(ratio) == 2 and all(ratio):
            return ":".join(ratio), ""
        if text := self.referred(value):
            return text, ""
        concept = self.coded(value)
        return (concept.name or concept.code, "") if concept else None


def given(text: str | None) -> str:
    """Return a text without the signs that stand for nothing."""
    bare = (text or "").strip()
    return "" if bare in _EMPTY else bare


def text_in(element: etree._Element) -> str:
    """Return all text of an element and of those in it, in one line."""
    return given(" ".join("".join(str(piece) for piece in element.itertext()).split()))


def narrative(element: etree._Element) -> str:
    """Return a text for people as lines: one for each paragraph, item and row of a table.

    Cells are set apart by bars. What is marked as deleted (CDA R2, 4.3.5.1) is left out.
    """
    pieces: list[str] = []
    _write(element, pieces, is_in_cell=False)
    lines = (" ".join(line.split()).strip(" |") for line in "".join(pieces).split("\n"))
    return "\n".join(line for line in lines if line.strip("- "))


def _write(element: etree._Element, pieces: list[str], *, is_in_cell: bool) -> None:
    if element.get("revised") == "delete":
        return
    is_cell, is_block = element.tag in _CELLS, element.tag in _BLOCKS
    end = " " if is_in_cell else "\n"
    pieces.append(" | " if is_cell else end if is_block else "")
    if element.tag == V3 + "item" and not is_in_cell:
        pieces.append("- ")
    pieces.append(_spaced(element.text))
    for child in element:
        _write(child, pieces, is_in_cell=is_in_cell or is_cell)
        pieces.append(_spaced(child.tail))
    pieces.append(end if is_block else "")


def _beginning(element: etree._Element) -> str:
    """Return the beginning of a text, however much follows or however deep it goes."""
    steps = islice(etree.iterwalk(element, events=("start", "end")), MAX_NAME)
    pieces = [
        each.text if step == "start" else each.tail if each is not element else ""
        for step, each in steps
    ]
    return " ".join(" ".join(piece[:MAX_NAME] for piece in pieces if piece).split())[:MAX_NAME]


def _spaced(text: str | None) -> str:
    """Return a text in one line, keeping that there is space at its ends."""
    if not text:
        return ""
    return " ".join(("x" + text + "x").split())[1:-1]


def _type(value: etree._Element) -> str:
    return (value.get(_TYPE) or "").rpartition(":")[2].strip()


def _interval(low: etree._Element | None, high: etree._Element | None) -> tuple[str, str] | None:
    ends: Mapping[str, etree._Element | None] = {">": low, "<": high}
    found = {
        sign + ("" if end.get("inclusive") == "false" else "="): end
        for sign, end in ends.items()
        if end is not None and given(end.get("value"))
    }
    if not found:
        return None
    unit = given(next(iter(found.values())).get("unit"))
    if len(found) == 1:
        sign, end = next(iter(found.items()))
        return sign + given(end.get("value")), unit
    return "-".join(given(end.get("value")) for end in found.values()), unit


class _Limits:
    """The reference range of an observation, looked for once however many values it has."""

    def __init__(self, observation: etree._Element) -> None:
        self._ends: list[tuple[float | None, str]] = [(None, ""), (None, "")]
        found = observation.find(f"{V3}referenceRange/{V3}observationRange")
        if found is None:
            return
        limits = [found.find(f"{V3}value/{V3}{end}") for end in ("low", "high")]
        self._ends = [
            (None, "")
            if limit is None
            else (number_of(given(limit.get("value")))[0], given(limit.get("unit")))
            for limit in limits
        ]
        text = found.find(V3 + "text")
        if limits == [None, None] and text is not None:
            self._ends = [(end, "") for end in range_of(text_in(text))]

    def of(self, unit: str) -> tuple[float | None, float | None]:
        """Return the ends that are in a unit, or in none of their own."""
        low, high = (end if own in ("", unit) else None for end, own in self._ends)
        return low, high
