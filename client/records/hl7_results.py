"""OBX of HL7 v2.5.1, 7.4.2: one result, whose type of value OBX-2 says.

OBX-11 decides what a result is: D and W were withdrawn (deleted, wrong) and are no result, X was
never to be had and is one without a value; every other status is kept beside its lab.
"""

import base64
import binascii
from dataclasses import dataclass, field
from typing import Any, Final

from huizhen.client.records.hl7_syntax import Segment, UnfitError
from huizhen.client.records.record import Comparator, Image, Lab
from huizhen.client.records.results import number_of, range_of

_NARRATIVE: Final = ("TX", "FT")
_CODED: Final = ("CE", "CWE", "CNE", "CF")
_TIMES: Final = ("TS", "DT", "DTM", "TM")
_PERSONAL: Final = frozenset(
    ["XPN", "XCN", "XAD", "XTN", "XON", "PN", "CN", "AD", "TN", "CX", "CK"]
)
_WITHDRAWN: Final = ("D", "W")
_SIGNS: Final[dict[str, Comparator]] = {
    "": "",
    "=": "",
    "<": "<",
    "<=": "<=",
    ">": ">",
    ">=": ">=",
}


@dataclass(slots=True)
class Results:
    """The results under one header, and their columns: an entry for each lab."""

    labs: list[Lab] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)
    interpretations: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    # ranges that have no ends, as written
    absent_reasons: list[str] = field(default_factory=list)
    narratives: list[tuple[int, str]] = field(default_factory=list)
    # the texts among the results, each with the place of its lab
    images: list[Image] = field(default_factory=list)

    def __repr__(self) -> str:
        return "Results(<masked>)"

    def columns(self) -> dict[str, Any]:
        """Return the columns that say something."""
        names = ("statuses", "interpretations", "references", "absent_reasons")
        return {name: column for name in names if any(column := getattr(self, name))}

    def add(self, obx: Segment, time: str) -> None:
        """Add a result.

        Args:
            obx: the segment.
            time: when it was observed, where OBX-14 does not say.

        Raises:
            UnfitError: it is no result that can be read.
        """
        kind, status = obx.text(2).upper(), obx.text(11).upper()
        _refuse(kind, status)
        if kind == "RP":
            self._add_pointer(obx)
            return
        code = obx.concept(3, "loinc")
        if not (code.code or code.name):
            raise UnfitError("OBX-3 is empty, expected what was measured: mend the export")
        moment = obx.time(14) or time
        written = obx.text(7)
        low, high = range_of(written)
        unit = obx.text(6) or obx.text(6, 2)
        flags = " ".join([obx.part(raw, 1) for raw in obx.repeats(8)])
        for value, sign, text in _values(obx, kind, status):
            if kind in _NARRATIVE or kind == "ED":
                self.narratives.append((len(self.labs), text))
            lab = Lab(
                code=code.code,
                system=code.system,
                name=code.name,
                value=value,
                comparator=sign,
                text=text,
                unit=unit,
                low=low,
                high=high,
                time=moment,
            )
            self.labs.append(lab)
            self.statuses.append(status)
            self.interpretations.append(flags)
            self.references.append(written if low is None and high is None else "")
            self.absent_reasons.append("cannot be obtained" if status == "X" else "")

    def _add_pointer(self, obx: Segment) -> None:
        """Add an RP: pointer, application, type and subtype of data."""
        pointer = obx.text(5)
        if obx.text(5, 3).upper() not in ("IM", "IMAGE") or not pointer:
            raise UnfitError("result points to a document elsewhere, expected its text: export it")
        self.images.append(Image(path=pointer))

    def without_narratives(self) -> "Results":
        """Return the results whose texts stand elsewhere."""
        texts = {i for i, _ in self.narratives}
        kept = [i for i in range(len(self.labs)) if i not in texts]
        return Results(
            [self.labs[i] for i in kept],
            [self.statuses[i] for i in kept],
            [self.interpretations[i] for i in kept],
            [self.references[i] for i in kept],
            [self.absent_reasons[i] for i in kept],
            images=self.images,
        )


def _refuse(kind: str, status: str) -> None:
    """Refuse what is no result, or says who or where."""
    if status in _WITHDRAWN:
        raise UnfitError(
            f"result was withdrawn (OBX-11 is {status!r}): "
            "leave it out, and what it was in earlier messages"
        )
    if kind in _PERSONAL:
        raise UnfitError(f"result is a {kind!r}, a person or place, expected a value: leave it")


def _values(obx: Segment, kind: str, status: str) -> list[tuple[float | None, Comparator, str]]:
    """Return the number, comparator and text of each value of a result."""
    if status == "X" or not (raw := obx.raw(5)):
        return [(None, "", "")]
    if kind in _NARRATIVE:  # a repetition is a line; signs in free text are often not escaped
        return [(None, "", obx.syntax.plain(raw.replace(obx.syntax.repetition, "\n")).strip())]
    if kind == "ED":
        return [(None, "", _encapsulated(obx))]
    return [_value(obx, kind, item) for item in obx.repeats(5)] or [(None, "", "")]


def _value(obx: Segment, kind: str, raw: str) -> tuple[float | None, Comparator, str]:
    if kind == "SN":
        return _structured(obx, raw)
    if kind in _CODED:
        meaning = obx.meaning(raw)
        return None, "", meaning.text or meaning.name or meaning.code
    if kind == "ST":
        text = obx.syntax.plain(raw).strip()
        return *number_of(text), text
    text = obx.part(raw, 1)
    return *((None, "") if kind in _TIMES else number_of(text)), text


def _structured(obx: Segment, raw: str) -> tuple[float | None, Comparator, str]:
    """Return an SN: comparator, number, separator and suffix, second number (2.A.71)."""
    sign, first, separator, second = (obx.part(raw, i) for i in (1, 2, 3, 4))
    text = f"{'' if sign == '=' else sign}{first}{separator}{second}"
    value, inner = number_of(first)
    if sign not in _SIGNS or inner or separator or second:
        return None, "", text
    return value, _SIGNS[sign] if value is not None else "", text


def _encapsulated(obx: Segment) -> str:
    """Return the text of an ED: application, type, subtype, encoding, data (2.A.24)."""
    kind, subtype, coding, data = (obx.text(5, i) for i in (2, 3, 4, 5))
    is_text = kind.upper() in ("TEXT", "TX", "FT") or f"{kind}/{subtype}".lower() == "text/plain"
    if not data or not is_text or subtype.upper() not in ("", "PLAIN", "TEXT", "TXT"):
        raise UnfitError("result is an attachment that is no plain text: export its text")
    if coding.upper() != "BASE64":
        return data
    try:
        return base64.b64decode("".join(data.split()), validate=True).decode(obx.syntax.encoding)
    except (binascii.Error, ValueError) as error:
        raise UnfitError("attachment is not base64 of text: mend the export") from error
