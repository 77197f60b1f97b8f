"""Whom a CDA document is about: the patient, what names them, and the visit.

HL7 CDA R2, 4.2 (header); OIDs of numbers in the Chinese shared documents: WS/T 500.1.
"""

import re
from collections.abc import Iterator
from typing import Final

from lxml import etree

from huizhen.client.records.cda_values import V3, Document, given, text_in
from huizhen.client.records.codings import sex_of
from huizhen.client.records.naming import Naming, name_forms
from huizhen.client.records.record import Sex

_SDTC: Final = "{urn:hl7-org:sdtc}"
_CHINA: Final = "2.16.156.10011.1."
# WS/T 500's numbers: 3 of a resident, 19 of a health card, 2 of a health record, 12 of a stay and
# 11 of an outpatient visit; the others that it writes among the patient's are those of papers
_RESIDENT, _CARD, _HEALTH_RECORD = _CHINA + "3", _CHINA + "19", _CHINA + "2"
_STAY, _VISIT = _CHINA + "12", _CHINA + "11"
_CHOICE: Final = (_RESIDENT, _CARD, _HEALTH_RECORD, _STAY, _VISIT)
_NATIONAL: Final = "2.16.840.1.113883.4."  # of the United States: .1 social security, .3 driving
_RELATED: Final = frozenset({"PRS", "NOK", "CAREGIVER", "ECON", "GUARD", "GUAR", "AGNT"})
_LARGE_TO_SMALL: Final = (
    *("state", "city", "county", "township", "streetName"),
    *("houseNumber", "houserNumber", "streetAddressLine"),  # WS/T 500 does write "houserNumber"
)

_UUID: Final = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")


class Header:
    """What the header says.

    Attributes:
        patients: how many the document is of.
        patient: the number of the patient, as ``read_cda`` explains; empty where there is none.
        encounter: of the visit or stay.
        naming: what names the patient.
        sex: and birth, death, as a record has them.
        start: of the visit or stay, and its end.
    """

    def __init__(self, root: etree._Element, document: Document, patient_root: str) -> None:
        """Read it."""
        self.naming = Naming()
        roles = root.findall(f"{V3}recordTarget/{V3}patientRole")
        self.patients = len(roles)
        role = roles[0] if roles else etree.Element(V3 + "patientRole")
        found = role.find(V3 + "patient")
        person = found if found is not None else etree.Element(V3 + "patient")
        ids = [*_ids(role), *_ids(person)]
        self.patient = _patient(ids, patient_root)
        self.sex: Sex = sex_of(_attribute(person, "administrativeGenderCode", "code"))
        self.birth = document.iso(_attribute(person, "birthTime", "value"))
        death = person.find(_SDTC + "deceasedTime")
        self.death = document.iso(death.get("value") if death is not None else "")
        visit = root.find(f"{V3}componentOf/{V3}encompassingEncounter")
        visits = [number for _, number in _ids(visit)] if visit is not None else []
        visits += [number for kind in (_STAY, _VISIT) for root_, number in ids if root_ == kind]
        self.encounter = visits[0] if visits else ""
        self.start, self.end = _period(visit, document)
        for root_, number in ids:
            self.naming.add(_kind(root_), number)
        self._contacts(role)
        self._name(person, "name")
        self._related(root, person)

    def _related(self, root: etree._Element, person: etree._Element) -> None:
        for guardian in person.findall(V3 + "guardian"):
            self._other(guardian)
        for employer in person.findall(V3 + "employerOrganization"):
            self._contacts(employer)
            for name in employer.findall(V3 + "name"):
                self.naming.add("employer", text_in(name))
        for place in person.findall(f"{V3}birthplace/{V3}place"):
            self._contacts(place)
        for participant in (*root.findall(V3 + "participant"), *root.findall(V3 + "informant")):
            for entity in participant:
                if entity.tag == V3 + "relatedEntity" or entity.get("classCode") in _RELATED:
                    self._other(entity)

        for participant in root.iter(V3 + "participant"):
            if participant.get("typeCode") in ("COV", "HLD"):  # of an insurance
                for entity in participant:
                    for _, number in _ids(entity):
                        self.naming.add("insurance", number)

    def _other(self, entity: etree._Element) -> None:
        """Keep the name and address of somebody near to the patient."""
        self._contacts(entity)
        for tag in ("guardianPerson", "associatedPerson", "assignedPerson", "relatedPerson"):
            for person in entity.findall(V3 + tag):
                self._name(person, "relative")

    def _name(self, person: etree._Element, kind: str) -> None:
        for name in person.findall(V3 + "name"):
            parts: dict[str, list[str]] = {"family": [], "given": []}
            for child in name:
                parts.get(etree.QName(child).localname, []).append(text_in(child))
            whole = text_in(name) if not any(parts.values()) else ""
            self.naming.add(kind, *name_forms(" ".join(parts["family"]), parts["given"], whole))

    def _contacts(self, holder: etree._Element) -> None:
        for telecom in holder.findall(V3 + "telecom"):
            scheme, _, number = (telecom.get("value") or "").rpartition(":")
            is_email = scheme.lower() == "mailto" or "@" in number
            self.naming.add("email" if is_email else "phone", given(number.lstrip("/")))
        for address in holder.findall(V3 + "addr"):
            parts = [(etree.QName(child).localname, text_in(child)) for child in address]
            if any(ord(character) > 0x2E7F for _, part in parts for character in part):
                parts.sort(key=lambda part: _place(part[0]))
                written = "".join(part for tag, part in parts if tag in _LARGE_TO_SMALL)
            else:
                written = " ".join(part for _, part in parts if part)
            self.naming.add("address", written or text_in(address))
            for tag, part in parts:
                if tag in ("streetAddressLine", "postalCode") and len(part) > 3:
                    self.naming.add("address", part)


def _patient(ids: list[tuple[str, str]], patient_root: str) -> str:
    if patient_root:
        return next((number for root, number in ids if root == patient_root), "")
    ranked = [(rank, number) for root, number in ids if (rank := _rank(root)) is not None]
    return min(ranked, key=lambda each: each[0])[1] if ranked else ""


def _rank(root: str) -> int | None:
    """Return how well numbers of a kind tell patients apart, the best first; None of papers'."""
    if root.startswith(_CHINA):
        return 1 + _CHOICE.index(root) if root in _CHOICE else None
    return len(_CHOICE) + 1 if root.startswith(_NATIONAL) else 0


def _kind(root: str) -> str:
    if root == _RESIDENT or root.startswith(_NATIONAL):
        return "id"
    return "insurance" if root == _CARD else "mrn"


def _ids(holder: etree._Element) -> Iterator[tuple[str, str]]:
    """Yield the root of each number that is given, and the number; a UUID is both."""
    for each in holder.findall(V3 + "id"):
        root, extension = given(each.get("root")), given(each.get("extension"))
        if each.get("nullFlavor"):
            continue
        if extension or _UUID.fullmatch(root):
            yield root, extension or root


def _period(visit: etree._Element | None, document: Document) -> tuple[str, str]:
    effective = visit.find(V3 + "effectiveTime") if visit is not None else None
    if effective is None:
        return "", ""
    start = _attribute(effective, "low", "value") or effective.get("value")
    return document.iso(start), document.iso(_attribute(effective, "high", "value"))


def _attribute(holder: etree._Element, tag: str, name: str) -> str:
    found = holder.find(V3 + tag)
    return given(found.get(name)) if found is not None else ""


def _place(tag: str) -> int:
    return _LARGE_TO_SMALL.index(tag) if tag in _LARGE_TO_SMALL else len(_LARGE_TO_SMALL)
