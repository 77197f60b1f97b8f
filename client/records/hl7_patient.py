"""Whose an HL7 v2 message is: the patient's number, and everything that names the patient."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from huizhen.client.records.codings import sex_of
from huizhen.client.records.hl7_syntax import Segment, UnfitError
from huizhen.client.records.naming import Naming, identifier_kind, name_forms
from huizhen.client.records.record import Sex

# HL7 v2.5.1, chapters 3 and 6: field, its data type, the kind of identifier; "" asks the number's
# own type (CX.5). Every telephone is kept as "phone" and every address as "address".
_NAMING: Final[dict[str, tuple[tuple[int, str, str], ...]]] = {
    "PID": (
        (2, "CX", ""), (3, "CX", ""), (4, "CX", ""), (5, "XPN", "name"), (6, "XPN", "relative"),
        (9, "XPN", "name"), (11, "XAD", ""), (13, "XTN", ""), (14, "XTN", ""), (18, "CX", ""),
        (19, "ST", "id"), (20, "ST", "id"), (21, "CX", ""), (40, "XTN", ""),
    ),
    "NK1": (
        (2, "XPN", "relative"), (4, "XAD", ""), (5, "XTN", ""), (6, "XTN", ""), (12, "CX", ""),
        (13, "ST", "employer"), (26, "XPN", "relative"), (30, "XPN", "relative"), (31, "XTN", ""),
        (32, "XAD", ""), (33, "CX", ""), (37, "ST", "id"), (40, "XTN", ""), (41, "XTN", ""),
    ),
    "GT1": (
        (2, "CX", ""), (3, "XPN", "relative"), (4, "XPN", "relative"), (5, "XAD", ""),
        (6, "XTN", ""), (7, "XTN", ""), (12, "ST", "id"), (16, "ST", "employer"), (17, "XAD", ""),
        (18, "XTN", ""), (19, "CX", ""), (42, "XPN", "relative"), (51, "ST", "employer"),
    ),
    "IN1": (
        (16, "XPN", "relative"), (19, "XAD", ""), (36, "ST", "insurance"),
        (44, "XAD", ""), (49, "CX", "insurance"),
    ),
    "IN2": (
        (1, "CX", ""), (2, "ST", "id"), (3, "XPN", "employer"), (6, "ST", "insurance"),
        (7, "XPN", "relative"), (8, "ST", "insurance"), (9, "XPN", "relative"),
        (10, "ST", "insurance"), (40, "XPN", "relative"), (52, "XPN", "relative"),
        (61, "CX", "insurance"), (63, "XTN", ""), (64, "XTN", ""),
    ),
    "DB1": ((3, "CX", ""),),
}  # fmt: skip
NAMING_SEGMENTS: Final = frozenset(_NAMING)
_PREFERRED: Final = ("MR", "PI", "PT")  # of CX.5, table 0203: the hospital's own number


@dataclass(slots=True)
class Person:
    """What a message says of its patient."""

    number: str
    sex: Sex = ""
    birth: str = ""
    death: str = ""
    is_dead: bool = False
    identifiers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    problem: str = ""
    # why the PID itself is no record

    def __repr__(self) -> str:
        return "Person(<masked>)"


def read_person(segments: Sequence[Segment]) -> Person:
    """Return whose the segments are, the first of which is a PID.

    Raises:
        UnfitError: they have no number of a patient.
    """
    pid = segments[0]
    person, naming = Person(_number(pid)), Naming()
    for segment in segments:
        for number, kind, identifier in _NAMING.get(segment.name, ()):
            for raw in segment.repeats(number):
                _name(segment, raw, kind, identifier, naming)
    person.identifiers = naming.done()
    person.sex = sex_of(pid.text(8))
    person.is_dead = pid.text(30) == "Y" or bool(pid.text(29))
    try:
        person.birth, person.death = pid.time(7), pid.time(29)
    except UnfitError as error:
        person.problem = str(error)
    return person


def _number(pid: Segment) -> str:
    """Return the patient's number: of PID-3 that of the best type, otherwise PID-2 or PID-4."""
    found = [(pid.part(raw, 1), pid.part(raw, 5).upper()) for raw in pid.repeats(3)]
    found += [(pid.text(field_), "") for field_ in (2, 4)]
    for wanted in (*_PREFERRED, None):
        for number, kind in found:
            if number and wanted in (kind, None):
                return number
    raise UnfitError("PID-3 is empty, expected the patient's number: export it")


def _name(segment: Segment, raw: str, kind: str, identifier: str, naming: Naming) -> None:
    """Gather what names a person in one repetition of a field."""
    part = segment.part
    match kind:  # one of those in _NAMING
        case "CX":
            naming.add(identifier or identifier_kind(part(raw, 5)), part(raw, 1))
        case "ST":
            naming.add(identifier, part(raw, 1))
        case "XPN":
            given = (part(raw, 2), *part(raw, 3).split(maxsplit=9))
            naming.add(identifier, *name_forms(part(raw, 1, sub=True), given))
            families = part(raw, 1).split(segment.syntax.subcomponent, 9)  # own, a partner's
            naming.add(identifier, *(family for family in families if len(family) > 1))
        case "XAD":
            parts = [part(raw, i) for i in (1, 2, 3, 4, 5)]
            street = part(raw, 1).replace(segment.syntax.subcomponent, " ")
            naming.add("address", " ".join((street, *parts[1:])), street if len(street) > 3 else "")
        case "XTN":
            country, area, local = (part(raw, i) for i in (5, 6, 7))
            naming.add("email", part(raw, 4) if "@" in part(raw, 4) else "")
            forms = (part(raw, 1), f"{country} {area} {local}", local, part(raw, 12))
            naming.add("phone", *(form for form in forms if sum(map(str.isdigit, form)) > 4))
        case _:
            raise AssertionError(kind)
