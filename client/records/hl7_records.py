"""The records of one HL7 v2 message: its patients, visits, results, documents and findings.

A message may have several PIDs; each begins the segments of one patient. Results under one OBR are
one record of kind "labs"; where they are nothing but text, and under a TXA, one of kind "report" or
"note"; an OBR without results is an "order". The stable names in ``fields``: ``event`` (MSH-9),
``class``, ``service``, ``start``, ``end``, ``reason``, ``discharge``, ``deceased``, ``code``,
``title``, ``status``, ``panel``, ``other_codes``; of labs those of ``hl7_results.Results``; of
findings, one for each, ``as_written``, ``types``, ``severities``, ``reactions`` and ``doses``.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from huizhen.client.records.hl7_findings import FINDING_SEGMENTS, Findings
from huizhen.client.records.hl7_patient import NAMING_SEGMENTS, Person, read_person
from huizhen.client.records.hl7_results import Results
from huizhen.client.records.hl7_syntax import Segment, UnfitError
from huizhen.client.records.record import Entry, Record, Unreadable

PASSED_OVER: Final = frozenset(
    (
        "MSH", "SFT", "UAC", "EVN", "MSA", "ERR", "DSC", "PD1", "ARV", "ROL", "PRT", "ORC", "TQ1",
        "TQ2", "CTD", "CTI", "RXR", "RXC", "FT1", "BLG", "IN3", "UB1", "UB2", "SPM", "SAC", "INV",
        "CON", "PV2",
    )
)  # fmt: skip
"""Segments that say nothing of the patient's health: routing, staff, timing, money, containers."""

_READ: Final = frozenset(("PID", "PV1", "OBR", "OBX", "NTE", "TXA", "MRG"))
_KNOWN: Final = PASSED_OVER | _READ | NAMING_SEGMENTS | FINDING_SEGMENTS
_WITHOUT_PATIENT: Final = frozenset(
    ("ACK", "QBP", "QRY", "RSP", "RTB", "MFN", "MFK", "MFQ", "NMD", "NMQ", "NMR", "ESU", "SSU")
)
_CANCELS: Final = frozenset(
    (
        "A11", "A12", "A13", "A23", "A25", "A26", "A27", "A29", "A32", "A33", "A38", "A52", "A53",
        "A55", "T11",
    )
)  # fmt: skip
"""Events that take an earlier message back, HL7 v2.5.1, table 0003."""


@dataclass(slots=True)
class _Group:
    """An OBR or a TXA, and what stands under it."""

    head: Segment | None
    results: Results = field(default_factory=Results)
    place: str = ""
    time: str = ""
    # when its results were observed that do not say so themselves
    notes: list[str] = field(default_factory=list)
    is_empty: bool = True

    def __repr__(self) -> str:
        return f"_Group(<masked>, {self.place})"


def read_message(segments: Sequence[Segment], place: str, reported: set[str]) -> Iterator[Entry]:
    """Yield the entries of a message.

    Args:
        segments: of one message, the first of which is its MSH.
        place: of the message.
        reported: types of segments that are not read and were named already; it grows.
    """
    for segment in segments:
        if segment.name not in _KNOWN and segment.name not in reported:
            reported.add(segment.name)
            yield Unreadable(
                segment.place,
                f"segment type {segment.name!r} is not read (said once a file): leave it out",
            )
    head = segments[0]
    event = head.text(9, 2)
    starts = [i for i, segment in enumerate(segments) if segment.name == "PID"]
    if event in _CANCELS:
        problem = f"event {event!r} takes an earlier message back: export without both"
        yield Unreadable(place, problem)
    elif not starts and head.text(9) not in _WITHOUT_PATIENT:
        yield Unreadable(place, "message has no PID, every record needs a patient: leave it out")
    else:
        starts.append(len(segments))
        for start, end in itertools.pairwise(starts):
            yield from _Patient(head, event).read(segments[start:end])


class _Patient:
    """The segments of one patient in one message."""

    def __init__(self, head: Segment, event: str) -> None:
        self._head, self._event = head, event
        self._person = Person("")
        self._encounter = self._sent = ""
        self._groups = [_Group(None)]
        self._findings = Findings(event)
        self._notes: list[str] = []

    def read(self, segments: Sequence[Segment]) -> Iterator[Entry]:
        """Yield the patient's entries: Unreadables as they are met, then the records."""
        pid = segments[0]
        try:
            self._person = read_person(segments)
        except UnfitError as error:
            yield Unreadable(pid.place, str(error))
            return
        try:
            self._sent = self._head.time(7)
        except UnfitError as error:
            yield Unreadable(self._head.place, str(error))
        if self._person.problem:
            yield Unreadable(pid.place, self._person.problem)
        visit = next((segment for segment in segments if segment.name == "PV1"), None)
        self._encounter = visit.text(19) if visit else ""
        yield from self._take_all(segments)
        if not self._person.problem:
            fields = {"deceased": True} if self._person.is_dead else {}
            yield self._record(pid.place, "patient", fields, self._sent, text=self._joined())
        if visit:
            yield from self._visit(visit, segments)
        for group in self._groups:
            yield from self._group(group)
        for place, kind, fields, findings in self._findings.records():
            time = next((finding.time for finding in findings if finding.time), "") or self._sent
            yield self._record(place, kind, fields, time, findings=findings)

    def _joined(self) -> str:
        return "\n".join(self._notes)

    def _take_all(self, segments: Sequence[Segment]) -> Iterator[Unreadable]:
        notes = self._notes
        self._groups[0].time = self._sent
        for segment in segments:
            name, group = segment.name, self._groups[-1]
            try:
                if name in ("OBR", "TXA"):
                    group = _Group(segment, place=segment.place)
                    self._groups.append(group)
                    notes = group.notes
                    first, second = (4, 6) if name == "TXA" else (7, 22)
                    group.time = segment.time(first) or segment.time(second)
                elif name == "OBX":
                    notes = group.notes
                    group.place, group.is_empty = group.place or segment.place, False
                    group.results.add(segment, group.time)
                elif name in FINDING_SEGMENTS:
                    self._findings.add(segment)
                elif name == "MRG":
                    raise UnfitError(
                        "two numbers of one patient are merged, expected one: export after it"
                    )
                elif name == "NTE":
                    lines = (segment.syntax.plain(raw).strip() for raw in segment.repeats(3))
                    notes.extend(line for line in lines if line)
            except UnfitError as error:
                yield Unreadable(segment.place, str(error))

    def _visit(self, visit: Segment, segments: Sequence[Segment]) -> Iterator[Entry]:
        more = next((segment for segment in segments if segment.name == "PV2"), None)
        try:
            start, end = visit.time(44), visit.time(45)
        except UnfitError as error:
            yield Unreadable(visit.place, str(error))
            return
        fields = {
            "event": self._event,
            "class": visit.text(2),
            "service": visit.text(10),
            "start": start,
            "end": end,
            "discharge": visit.text(36),
            "reason": (more.text(3, 2) or more.text(3)) if more else "",
        }
        yield self._record(visit.place, "encounter", fields, start or self._sent)

    def _group(self, group: _Group) -> Iterator[Entry]:
        """Yield the records of an OBR or a TXA, or of results under neither."""
        head, results, time = group.head, group.results, group.time or self._sent
        name = head.name if head is not None else ""
        fields = _header(head)
        narratives = "\n".join(text for _, text in results.narratives)
        only_text = len(results.narratives) == len(results.labs)
        if narratives and (name == "TXA" or only_text):
            text = "\n".join((narratives, *group.notes))
            fields["title"] = fields.pop("panel", "") or fields.get("title", "")
            kind = "note" if name == "TXA" else "report"
            last, _ = results.narratives[-1]
            fields["status"] = fields.get("status", "") or results.statuses[last]
            yield self._record(group.place, kind, fields, time, text=text)
            group.notes, results, fields = [], results.without_narratives(), {}
        if results.labs or results.images:
            yield self._record(
                group.place,
                "labs" if results.labs else "image",
                fields | results.columns(),
                next((lab.time for lab in results.labs if lab.time), time),
                text="\n".join(group.notes),
                labs=tuple(results.labs),
                images=tuple(results.images),
            )
        elif head is not None and name == "OBR" and group.is_empty:
            fields["reason"] = "; ".join(x for x in (head.text(13), head.text(31, 2)) if x)
            fields["title"] = fields.pop("panel", "")
            text = "\n".join(group.notes)
            yield self._record(group.place, "order", fields, time, text=text)
        elif group.notes:  # comments whose results could not be read
            yield self._record(group.place, "note", fields, time, text="\n".join(group.notes))
        elif name == "TXA" and group.is_empty:
            yield Unreadable(group.place, "document has no text under its TXA: export its text")

    def _record(
        self, place: str, kind: str, fields: dict[str, Any], time: str, **content: Any
    ) -> Record:
        person = self._person
        return Record(
            person.number,
            {key: value for key, value in fields.items() if value},
            place,
            kind=kind,
            encounter=self._encounter,
            time=time,
            sex=person.sex,
            birth=person.birth,
            death=person.death,
            identifiers=person.identifiers,
            **content,
        )


def _header(head: Segment | None) -> dict[str, Any]:
    """Return what an OBR or a TXA says of what stands under it."""
    if head is None:
        return {}
    if head.name == "TXA":
        return {"code": head.text(2), "title": head.text(16), "status": head.text(17)}
    code = head.concept(4, "loinc")
    return {"code": code.code, "panel": code.name, "other_codes": code.others}
