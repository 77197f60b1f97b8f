"""What each resource type of FHIR R4 says, in the terms of a record.

A reader here sees one resource and knows nothing of files, Bundles or patients' numbers. The stable
names in ``fields``: ``status``, ``code`` and ``title`` (what the entry is called), ``category``,
``as_written`` (the author's words where they differ from the code's name), ``other_codes`` (further
codings, each "system|code"), ``class``, ``type``, ``start``, ``end``, ``reason``, ``deceased``,
``route``, ``dosage``, ``criticality``; of labs also ``panel`` and, one for each lab, ``statuses``,
``interpretations``, ``references`` (ranges that have no ends) and ``absent_reasons``.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

from huizhen.client.records.codings import Concept, sex_of
from huizhen.client.records.fhir_elements import (
    Content,
    JsonObject,
    UnfitError,
    attachment_text,
    category,
    concept,
    filled,
    notes,
    number,
    objects,
    one,
    plain,
    string,
    strings,
    time,
    words,
)
from huizhen.client.records.fhir_observations import observation
from huizhen.client.records.record import Finding, FindingKind, Image, Sex

Find = Callable[[JsonObject], JsonObject | None]
"""Returns the resource that a Reference means, where it is at hand."""

_ABSENT: Final = ("not-done", "not-taken")  # of EventStatus and of medication-statement-status
_MAX_SECTIONS: Final = 10_000


def _patient(resource: JsonObject, _: Find) -> Content:
    is_dead = resource.get("deceasedBoolean") is True or "deceasedDateTime" in resource
    return Content("patient", filled({}, deceased=is_dead))


def _encounter(resource: JsonObject, _: Find) -> Content:
    period = one(resource, "period") or one(resource, "actualPeriod")
    kind = one(resource, "class")
    fields = filled(
        {},
        status=string(resource, "status"),
        type="; ".join(words(item) for item in objects(resource, "type")),
        reason="; ".join(words(item) for item in objects(resource, "reasonCode")),
        start=time(period, "start"),
        end=time(period, "end"),
    )
    found = concept(kind)  # R5 has a concept there, R4 a coding
    fields |= filled({}, **{"class": string(kind, "code") or found.code or found.name})
    return Content("encounter", fields, time(period, "start"))


def _finding(
    resource: JsonObject,
    found: Concept,
    kind: FindingKind,
    moment: str,
    is_absent: bool = False,
) -> tuple[tuple[Finding, ...], dict[str, Any]]:
    """Return a finding and the fields that every resource with one has."""
    if not (found.code or found.name):
        raise UnfitError("element 'code' says nothing, expected a code or its name: mend it")
    finding = Finding(
        code=found.code,
        system=found.system,
        name=found.name,
        kind=kind,
        time=moment,
        is_absent=is_absent,
    )
    as_written = found.text if found.text != found.name else ""
    fields = filled({}, as_written=as_written, other_codes=found.others)
    return (finding,), fields


def _condition(resource: JsonObject, _: Find) -> Content:
    moment = time(resource, "onsetDateTime", "onsetPeriod", "recordedDate")
    is_absent = concept(one(resource, "verificationStatus")).code == "refuted"
    code = concept(one(resource, "code"))
    findings, fields = _finding(resource, code, "condition", moment, is_absent)
    status = concept(one(resource, "clinicalStatus")).code
    filled(fields, status=status, category=category(resource))
    return Content("diagnosis", fields, moment, notes(resource), findings)


def _procedure(resource: JsonObject, _: Find) -> Content:
    moment = time(resource, "performedDateTime", "performedPeriod", "occurrenceDateTime")
    status = string(resource, "status")
    code = concept(one(resource, "code"))
    findings, fields = _finding(resource, code, "procedure", moment, status in _ABSENT)
    filled(fields, status=status, category=category(resource))
    return Content("procedure", fields, moment, notes(resource), findings)


def _allergy(resource: JsonObject, _: Find) -> Content:
    moment = time(resource, "onsetDateTime", "onsetPeriod", "recordedDate")
    is_absent = concept(one(resource, "verificationStatus")).code == "refuted"
    code = concept(one(resource, "code"))
    findings, fields = _finding(resource, code, "allergy", moment, is_absent)
    categories = "; ".join(strings(resource, "category"))  # codes here, not concepts
    filled(fields, category=categories, criticality=string(resource, "criticality"))
    return Content("allergy", fields, moment, notes(resource), findings)


def _immunization(resource: JsonObject, _: Find) -> Content:
    moment = time(resource, "occurrenceDateTime", "recorded")
    status = string(resource, "status")
    code = concept(one(resource, "vaccineCode"))
    findings, fields = _finding(resource, code, "drug", moment, status in _ABSENT)
    filled(fields, status=status, route=words(one(resource, "route")))
    return Content("immunization", fields, moment, notes(resource), findings)


def _medication(resource: JsonObject, find: Find) -> Content:
    """Read a MedicationRequest, -Statement, -Administration or -Dispense."""
    moment = time(
        resource, "authoredOn", "effectiveDateTime", "effectivePeriod", "whenHandedOver",
        "whenPrepared", "dateAsserted",
    )  # fmt: skip
    drug = concept(one(resource, "medicationCodeableConcept"))
    reference = one(resource, "medicationReference")
    if not drug.code and reference:
        target = find(reference)
        drug = (
            concept(one(target, "code")) if target else Concept(name=string(reference, "display"))
        )
        if not (drug.code or drug.name):
            raise UnfitError(
                "medication is in another file, expected beside its use: export both as a Bundle"
            )
    status = string(resource, "status")
    findings, fields = _finding(resource, drug, "drug", moment, status in _ABSENT)
    dosages = (*objects(resource, "dosageInstruction"), *objects(resource, "dosage"))
    filled(fields, status=status, dosage="; ".join(t for d in dosages if (t := string(d, "text"))))
    return Content("medication", fields, moment, notes(resource), findings)


def _attachments(items: list[JsonObject], content: Content) -> list[str]:
    texts = []
    for item in items:
        try:
            texts.append(attachment_text(item))
        except UnfitError as error:
            content.problems.append(str(error))
    return texts


def _report(resource: JsonObject, _: Find) -> Content:
    moment = time(resource, "effectiveDateTime", "effectivePeriod", "issued")
    code = concept(one(resource, "code"), "loinc")
    content = Content("report", time=moment)
    texts = _attachments(objects(resource, "presentedForm"), content)
    content.text = "\n".join(text for text in (*texts, string(resource, "conclusion")) if text)
    for item in objects(resource, "conclusionCode"):
        content.findings += _finding(resource, concept(item), "other", moment)[0]
    filled(
        content.fields,
        code=code.code,
        title=code.name,
        other_codes=code.others,
        category=category(resource),
        status=string(resource, "status"),
    )
    return content


def _document(resource: JsonObject, _: Find) -> Content:
    """Read a DocumentReference."""
    kind = concept(one(resource, "type"), "loinc")
    content = Content("note", time=time(resource, "date", "created"))
    bodies = [one(item, "attachment") for item in objects(resource, "content")]
    content.text = "\n".join(_attachments(bodies, content))
    filled(
        content.fields,
        code=kind.code,
        title=string(resource, "description") or kind.name,
        category=category(resource),
        status=string(resource, "status"),
    )
    if not content.text and not content.problems:
        raise UnfitError("document has no attachment, expected its text: export it")
    return content


def _composition(resource: JsonObject, _: Find) -> Content:
    kind = concept(one(resource, "type"), "loinc")
    fields = filled(
        {},
        code=kind.code,
        title=string(resource, "title") or kind.name,
        status=string(resource, "status"),
    )
    return Content("note", fields, time(resource, "date"), "\n".join(_section_texts(resource)))


def _section_texts(resource: JsonObject) -> Iterator[str]:
    """Yield titles and texts in reading order; sections may hold sections."""
    waiting = objects(resource, "section")[::-1]
    for _ in range(_MAX_SECTIONS):
        if not waiting:
            return
        section = waiting.pop()
        yield from filter(
            None, (string(section, "title"), plain(string(one(section, "text"), "div")))
        )
        waiting += objects(section, "section")[::-1]
    raise UnfitError(f"composition has over {_MAX_SECTIONS} sections: split it")


def _imaging(resource: JsonObject, _: Find) -> Content:
    """Read an ImagingStudy; one image for each series, which is named by its UID."""
    images = []
    for series in objects(resource, "series"):
        frames = number(series, "numberOfInstances") or len(objects(series, "instance")) or 1
        modality = string(one(series, "modality"), "code") or words(one(series, "modality"))
        images.append(
            Image(path=string(series, "uid"), modality=modality, frames=max(int(frames), 1))
        )
    title = string(resource, "description")
    fields = filled({}, status=string(resource, "status"), title=title)
    return Content(
        "image", fields, time(resource, "started"), notes(resource), images=tuple(images)
    )


def _observation(resource: JsonObject, _: Find) -> Content:
    return observation(resource)


def _nothing_but_names(kind: str) -> Callable[[JsonObject, Find], Content]:
    return lambda _, __: Content(kind)


READERS: Final[dict[str, Callable[[JsonObject, Find], Content]]] = {
    "Patient": _patient,
    "Encounter": _encounter,
    "Condition": _condition,
    "Observation": _observation,
    "DiagnosticReport": _report,
    "DocumentReference": _document,
    "Composition": _composition,
    "Procedure": _procedure,
    "MedicationRequest": _medication,
    "MedicationStatement": _medication,
    "MedicationAdministration": _medication,
    "MedicationDispense": _medication,
    "AllergyIntolerance": _allergy,
    "Immunization": _immunization,
    "ImagingStudy": _imaging,
    "RelatedPerson": _nothing_but_names("relative"),
    "Coverage": _nothing_but_names("coverage"),
}


def sex_birth_death(resource: JsonObject) -> tuple[Sex, str, str]:
    """Return a Patient's sex, birth and death."""
    sex = sex_of(string(resource, "gender"))
    return sex, time(resource, "birthDate"), time(resource, "deceasedDateTime")
