"""FHIR R4: NDJSON as of Bulk Data exports, or one document that is a Bundle or a resource.

Read are the types of ``fhir_resources.READERS``. A type of ``PASSED_OVER`` holds nothing of a
patient and is skipped; every other one is an ``Unreadable``. A record's patient is the id of the
Patient; a contained Patient has none, there it is the first identifier. Where the Patient is at
hand, in the same Bundle, each record has its sex, birth and identifiers. Where a JSON object names
an element twice, the last counts.

A place is ``file:line``, within a Bundle ``file:line:entry[i]``, counted from 0 as in FHIRPath.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, BinaryIO, Final

import orjson

from huizhen.client.records.fhir_elements import (
    JsonObject,
    UnfitError,
    concept,
    name_person,
    objects,
    one,
    string,
)
from huizhen.client.records.fhir_resources import READERS, sex_birth_death
from huizhen.client.records.naming import Naming
from huizhen.client.records.record import MAX_ENTRY_BYTES, Entry, Record, Sex, Unreadable
from huizhen.protocol.errors import ConfigError, GovernanceError

PASSED_OVER: Final = frozenset(
    (
        "Organization", "Practitioner", "PractitionerRole", "Location", "HealthcareService",
        "Endpoint", "Device", "DeviceDefinition", "Medication", "Substance", "MessageHeader",
        "Provenance", "OperationOutcome", "CapabilityStatement", "StructureDefinition", "ValueSet",
        "CodeSystem", "ConceptMap", "NamingSystem", "SearchParameter", "OperationDefinition",
        "ImplementationGuide", "Questionnaire", "PlanDefinition", "ActivityDefinition", "Library",
        "Measure", "Subscription", "Schedule", "Slot", "AuditEvent", "ResearchStudy",
    )
)  # fmt: skip
"""Types that hold nothing of a patient by themselves: who, where, and what words mean."""

_TYPE: Final = re.compile(r"[A-Za-z]{1,60}")
_REFERENCE: Final = re.compile(r"(?:.*/)?([A-Za-z]{1,60})/([^/?#|\s]{1,200})(?:/_history/[^/]*)?")
_SUBJECTS: Final = ("subject", "patient", "beneficiary")
_MAX_DEPTH: Final = 3  # a batch-response holds searchsets; nothing real nests deeper


@dataclass(slots=True)
class _Person:
    """What is known of a patient."""

    number: str
    sex: Sex = ""
    birth: str = ""
    death: str = ""
    identifiers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    problem: str = ""
    # why the Patient itself is no record

    def __repr__(self) -> str:
        return "_Person(<masked>)"


def read_fhir(stream: BinaryIO, name: str) -> Iterator[Entry]:
    """Yield the entries of a FHIR R4 file.

    A first line that begins and ends with braces is NDJSON, a resource or Bundle a line; anything
    else is one document, which is held in memory and so has a limit of ``MAX_ENTRY_BYTES``.

    Args:
        stream: an open file, UTF-8 with or without a byte order mark.
        name: of the file, for places.

    Raises:
        ConfigError: the file is not JSON of FHIR.
        GovernanceError: a line or the document is too large, or the document is damaged.
    """
    number, is_lines = 0, False
    while line := stream.readline(MAX_ENTRY_BYTES + 1):
        number += 1
        place = f"{name}:{number}"
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        _check_size(line, place, "line")
        if not (text := line.strip()):
            continue
        if not is_lines and not (text.startswith(b"{") and text.endswith(b"}")):
            rest = stream.read(MAX_ENTRY_BYTES + 1 - len(line))
            _check_size(line + rest, place, "document")
            yield from _entries(_document(line + rest, place), place)
            return
        is_lines = True
        try:
            resource = orjson.loads(text)
        except orjson.JSONDecodeError:
            yield Unreadable(place, "line is not JSON, expected a resource: mend the export")
            continue
        yield from _entries(resource, place)
    if not is_lines:
        raise ConfigError(f"{name}: file is empty, expected FHIR resources: export it again")


def _check_size(data: bytes, place: str, what: str) -> None:
    if len(data) > MAX_ENTRY_BYTES:
        raise GovernanceError(
            f"{place}: {what} has over {MAX_ENTRY_BYTES} bytes, which is not read: "
            "export as NDJSON, a resource a line"
        )


def _document(data: bytes, place: str) -> Any:
    if data.lstrip()[:1] != b"{":
        raise ConfigError(f"{place}: file is not FHIR, expected a JSON object in UTF-8: check it")
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise GovernanceError(f"{place}: document is not JSON: mend the export") from error


def _entries(
    resource: Any, place: str, scope: "_Scope | None" = None, depth: int = 0
) -> Iterator[Entry]:
    """Yield the entries of a resource, which may be a Bundle."""
    try:
        kind = _type_of(resource)
        if kind == "Bundle":
            if depth == _MAX_DEPTH:
                raise UnfitError(f"Bundles lie over {_MAX_DEPTH} deep in each other: unpack them")
            items = objects(resource, "entry")
            inner = _Scope(items)
            for i, item in enumerate(items):
                if found := _resource_of(item):
                    yield from _entries(found, f"{place}:entry[{i}]", inner, depth + 1)
        elif kind not in PASSED_OVER:
            yield from _read(resource, kind, place, scope or _Scope([{"resource": resource}]))
    except UnfitError as error:
        yield Unreadable(place, str(error))


def _type_of(resource: Any) -> str:
    kind = resource.get("resourceType") if isinstance(resource, dict) else None
    if not isinstance(kind, str) or not _TYPE.fullmatch(kind):
        raise UnfitError("entry has no 'resourceType', expected a resource of FHIR R4: check it")
    return kind


def _resource_of(item: JsonObject) -> Any:
    """Return the resource of a Bundle's entry; None of a bare response or deletion.

    Some exporters leave out the wrapping ``resource``: the entry then is the resource.
    """
    return item if "resourceType" in item else item.get("resource")


def _read(resource: JsonObject, kind: str, place: str, scope: "_Scope") -> Iterator[Entry]:
    """Yield the record of a resource, and what of it could not be read."""
    if kind not in READERS:
        raise UnfitError(f"resource type {kind!r} is not read: leave it out of the export")
    status = concept(one(resource, "verificationStatus")).code or resource.get("status")
    if status == "entered-in-error":
        raise UnfitError("resource was entered in error: leave it out of the export")
    person = scope.person_of(resource, kind)
    if kind == "Patient" and person.problem:
        raise UnfitError(person.problem)
    content = READERS[kind](resource, lambda reference: scope.find(reference, resource))
    for problem in content.problems:
        yield Unreadable(place, problem)
    if content.problems and not (content.text or content.findings):
        return
    yield Record(
        person.number,
        content.fields,
        place,
        kind=content.kind,
        encounter=scope.encounter_of(resource, kind),
        time=content.time,
        text=content.text,
        findings=content.findings,
        labs=content.labs,
        images=content.images,
        sex=person.sex,
        birth=person.birth,
        death=person.death,
        identifiers=_identifiers(resource, kind, person),
    )


def _identifiers(resource: JsonObject, kind: str, person: _Person) -> Mapping[str, tuple[str, ...]]:
    """Return what names the patient; a relative and an insurance add theirs."""
    if kind not in ("RelatedPerson", "Coverage"):
        return person.identifiers
    naming = Naming()
    for key, values in person.identifiers.items():
        naming.add(key, *values)
    if kind == "RelatedPerson":
        name_person(resource, naming, "relative")
    else:
        numbers = [string(item, "value") for item in objects(resource, "identifier")]
        naming.add("insurance", string(resource, "subscriberId"), *numbers)
    return naming.done()


class _Scope:
    """The resources that may refer to each other: of a Bundle, or one alone."""

    def __init__(self, items: list[JsonObject]) -> None:
        self._items = items
        self._persons: dict[int, _Person] = {}
        self._numbers: dict[int, str] = {}
        # by the identity of a resource, which lives as long as its Bundle

    @cached_property
    def _by_key(self) -> dict[str, tuple[JsonObject, str]]:
        """Return resources with their numbers, by full URL and by "Type/id"."""
        found: dict[str, tuple[JsonObject, str]] = {}
        for item in self._items:
            resource, url = _resource_of(item), item.get("fullUrl")
            if not isinstance(resource, dict):
                continue
            number = resource.get("id")
            if isinstance(number, str) and number:
                found[f"{resource.get('resourceType')}/{number}"] = (resource, number)
            elif isinstance(url, str):
                number = url.rpartition(":")[2]
            if isinstance(url, str) and isinstance(number, str):
                found[url] = (resource, number)
            if isinstance(number, str):
                self._numbers[id(resource)] = number
        return found

    def find(self, reference: JsonObject, source: JsonObject) -> JsonObject | None:
        """Return the resource that a Reference of a resource means, if it is here."""
        url = string(reference, "reference")
        if url.startswith("#"):
            inner = objects(source, "contained")
            return next((item for item in inner if item.get("id") == url[1:]), None)
        if url in self._by_key:
            return self._by_key[url][0]
        parts = _REFERENCE.fullmatch(url)
        return self._by_key.get(f"{parts[1]}/{parts[2]}", (None, ""))[0] if parts else None

    def _number(self, reference: JsonObject, kind: str) -> str:
        """Return the id of the resource of a type that a Reference means; empty if none."""
        url = string(reference, "reference")
        if url in self._by_key:
            resource, number = self._by_key[url]
            return number if resource.get("resourceType") == kind else ""
        parts = _REFERENCE.fullmatch(url)
        return parts[2] if parts and parts[1] == kind else ""

    def encounter_of(self, resource: JsonObject, kind: str) -> str:
        """Return the visit's id, where one is named."""
        if kind == "Encounter":
            return string(resource, "id")
        context = one(resource, "encounter") or one(resource, "context")
        if "encounter" in context:  # DocumentReference.context
            context = one(context, "encounter")
        return self._number(context, "Encounter")

    def person_of(self, resource: JsonObject, kind: str) -> _Person:
        """Return whose a resource is.

        Raises:
            UnfitError: that cannot be told.
        """
        if kind == "Patient":
            if not self._by_key or not (number := self._numbers.get(id(resource), "")):
                raise UnfitError("Patient has no id, every record needs one: export ids")
            return self._known(resource, number)
        reference = (
            one(resource, "subject") or one(resource, "patient") or one(resource, "beneficiary")
        )
        target = self.find(reference, resource)
        if target is not None and target.get("resourceType") == "Patient":
            is_inside = string(reference, "reference").startswith("#")
            return self._known(target, "" if is_inside else self._number(reference, "Patient"))
        if target is None and (number := self._number(reference, "Patient")):
            return _Person(number)
        raise UnfitError(
            "resource names no patient that can be told, every record needs one: "
            "write subject.reference as 'Patient/id'"
        )

    def _known(self, patient: JsonObject, number: str) -> _Person:
        if (person := self._persons.get(id(patient))) is None:
            person = self._persons[id(patient)] = _person(patient, number)
        return person


def _person(patient: JsonObject, number: str) -> _Person:
    """Return what a Patient says of itself."""
    naming, person = Naming(), _Person(number)
    try:
        name_person(patient, naming)
        for contact in objects(patient, "contact"):
            name_person(contact, naming, "relative")
        person.sex, person.birth, person.death = sex_birth_death(patient)
    except UnfitError as error:
        person.problem = str(error)
    person.identifiers = naming.done()
    if not person.number:  # contained: its id counts only inside its resource
        items = patient.get("identifier")
        values = (
            [i.get("value") for i in items if isinstance(i, dict)]
            if isinstance(items, list)
            else []
        )
        person.number = next((v.strip() for v in values if isinstance(v, str) and v.strip()), "")
    if not person.number:
        raise UnfitError("contained Patient has no identifier, every record needs one: export it")
    return person
