"""The segments of HL7 v2.5.1 that say something coded: diagnoses, allergies, procedures, drugs."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from huizhen.client.records.codings import Concept, system_name
from huizhen.client.records.hl7_syntax import Segment, UnfitError
from huizhen.client.records.record import Finding, FindingKind


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a segment has what; 0: it has no such field."""

    record: str
    kind: FindingKind
    code: int
    time: int = 0
    name: int = 0
    columns: tuple[tuple[str, int], ...] = ()


_ALLERGY: Final = (("types", 2), ("severities", 4), ("reactions", 5))
_LAYOUTS: Final = {
    "DG1": _Layout("diagnosis", "condition", 3, 5, 4, (("types", 6),)),
    "AL1": _Layout("allergy", "allergy", 3, 6, 0, _ALLERGY),
    "IAM": _Layout("allergy", "allergy", 3, 11, 0, _ALLERGY),
    "PR1": _Layout("procedure", "procedure", 3, 5, 4),
    "RXA": _Layout("medication", "drug", 5, 3),
    "RXD": _Layout("medication", "drug", 2, 3),
    "RXE": _Layout("medication", "drug", 2),
    "RXG": _Layout("medication", "drug", 4),
    "RXO": _Layout("medication", "drug", 1),
}
FINDING_SEGMENTS: Final = frozenset(_LAYOUTS)
_AMOUNTS: Final = {"RXA": (6, 7), "RXD": (4, 5), "RXE": (3, 5), "RXG": (5, 7), "RXO": (2, 4)}
_NOT_GIVEN: Final = ("RE", "NA")  # RXA-20, table 0322: refused, not administered


@dataclass(slots=True)
class _Kind:
    place: str
    findings: list[Finding] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"_Kind(<masked>, {self.place})"


class Findings:
    """Gathers what is coded in a message, by the kind of record it becomes."""

    def __init__(self, event: str) -> None:
        """Begin with nothing.

        Args:
            event: of the message, MSH-9.2; what V04 gives is a vaccine.
        """
        self._event = event
        self._kinds: dict[str, _Kind] = {}

    def __repr__(self) -> str:
        return "Findings(<masked>)"

    def add(self, segment: Segment) -> None:
        """Add a segment of ``FINDING_SEGMENTS``.

        Raises:
            UnfitError: it says nothing, was deleted, or has a time that is none.
        """
        name, layout = segment.name, _LAYOUTS[segment.name]
        code = _named(segment, layout)
        # table 0206, action code: D is a deletion
        action = {"IAM": 6, "DG1": 21, "RXA": 21, "PR1": 20}.get(name, 0)
        if action and segment.text(action) == "D":
            raise UnfitError(f"{name}-{action} is 'D', it was deleted: leave it out of the export")
        is_vaccine = name == "RXA" and (code.system == "cvx" or self._event == "V04")
        kind = self._kinds.setdefault(
            "immunization" if is_vaccine else layout.record, _Kind(segment.place)
        )
        finding = Finding(
            code=code.code,
            system=code.system,
            name=code.name,
            kind=layout.kind,
            time=segment.time(layout.time) if layout.time else "",
            is_absent=name == "RXA" and segment.text(20) in _NOT_GIVEN,
        )
        values = {
            key: segment.text(number, 2) or segment.text(number) for key, number in layout.columns
        }
        if name in _AMOUNTS:
            amount, unit = (segment.text(number) for number in _AMOUNTS[name])
            values["doses"] = f"{amount} {unit}".strip()
        values["as_written"] = code.text if code.text != code.name else ""
        values["other_codes"] = " ".join(code.others)
        for key in (*kind.columns, *values):
            column = kind.columns.setdefault(key, [""] * len(kind.findings))
            if len(column) == len(kind.findings):
                column.append(values.get(key, ""))
        kind.findings.append(finding)

    def records(self) -> Iterator[tuple[str, str, dict[str, Any], tuple[Finding, ...]]]:
        """Yield the place, kind, fields and findings of each record."""
        for name, kind in self._kinds.items():
            columns = {key: column for key, column in kind.columns.items() if any(column)}
            yield kind.place, name, columns, tuple(kind.findings)


def _named(segment: Segment, layout: _Layout) -> Concept:
    """Return the code with its system and name, which older versions have in their own fields."""
    code = segment.concept(layout.code)
    name = code.name or (segment.text(layout.name) if layout.name else "")
    system = code.system
    if not system and layout.record in ("diagnosis", "procedure"):
        system = system_name(segment.text(2))  # DG1-2 and PR1-2, the coding method
    text = code.text or (segment.text(layout.name) if layout.name else "")
    if not (code.code or name):
        raise UnfitError(f"{segment.name}-{layout.code} is empty, expected a code or name: mend it")
    return Concept(code.code, system, name, text, code.others)
