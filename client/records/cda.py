"""Clinical documents: HL7 CDA R2 as C-CDA 2.1, or as WS/T 500 writes it (互联互通共享文档).

One document is one ``patient`` record and one record for each section that says something: a
section is what a doctor reads at once and a model may be asked about, and it has a kind of its own
(``labs``, ``diagnosis``, ``drug``, ``procedure``, ``allergy``, ``report`` or ``note``). All have
the document's time; findings and labs have their own.

Fields of the patient record: ``document``, ``document_system``, ``document_name`` (the document's
code), ``language``, ``encounter_start``, ``encounter_end``, ``sections``. Fields of a section's:
``document``, ``section``, ``section_system``, ``section_name`` (its code), ``entries`` and
``entries_not_read`` (those of which nothing was read: planned, cancelled, of a relative, without a
value), and where there are any ``interpretations`` (one for each lab, as HL7 codes them: "H") and
``times_not_read``. A section's text begins with its title.

A patient may have several numbers, each of a root (who gave it). The hospital's own first is taken,
otherwise one that WS/T 500 knows: of the resident, the health card, the health record, the stay,
the outpatient visit; otherwise a national one. The root is left out, as in other exports of the
hospital; a UUID is a number by itself. Numbers of stays and visits do not tell patients apart
safely: where they are all there is, name the right root.
"""

from collections.abc import Iterator
from typing import Any, BinaryIO

from lxml import etree

from huizhen.client.records.cda_header import Header
from huizhen.client.records.cda_sections import Section, read_section, sections_of
from huizhen.client.records.cda_values import V3, Coded, Document, given, narrative
from huizhen.client.records.record import Entry, Record, Unreadable
from huizhen.client.records.xml import line_of, read_xml
from huizhen.protocol.errors import ConfigError


def read_cda(stream: BinaryIO, name: str, *, patient_root: str = "") -> Iterator[Entry]:
    """Yield the patient of a document, then its sections.

    A place is the file and the line where the document's patient or the section begins.

    Args:
        stream: an open file that holds one document.
        name: of the file.
        patient_root: the OID of the numbers that are the patients'; a document without one of these
            is unreadable.

    Raises:
        ConfigError: the file is no clinical document.
        GovernanceError: it is not well-formed, or beyond the bounds.
        OSError: the stream cannot be read.
    """
    root = read_xml(stream, name)
    if root.tag != V3 + "ClinicalDocument":
        raise ConfigError(
            f"{name} begins with {_cut(root.tag)!r}, expected ClinicalDocument of urn:hl7-org:v3: "
            "name a CDA document"
        )
    document = Document(root)
    header = Header(root, document, patient_root)
    place = f"{name}:{line_of(root)}"
    if header.patients > 1:
        yield Unreadable(
            place, f"document is of {header.patients} patients, expected one: split it"
        )
        return
    if not header.patient:
        yield Unreadable(place, "document has no patient id, expected one: fill recordTarget")
        return
    sections = [
        (line_of(element), read_section(element, document)) for element in sections_of(root)
    ]
    for _, section in sections:
        for kind, text in section.identifiers:
            header.naming.add(kind, text)
    yield from _records(root, document, header, sections, name)


def _records(
    root: etree._Element,
    document: Document,
    header: Header,
    sections: list[tuple[int, Section]],
    name: str,
) -> Iterator[Entry]:
    concept = document.coded(root.find(V3 + "code"))
    code = concept.code if concept else ""
    shared: dict[str, Any] = {
        "patient": header.patient,
        "encounter": header.encounter,
        "time": document.time(root),
        "sex": header.sex,
        "birth": header.birth,
        "death": header.death,
        "identifiers": header.naming.done(),
    }
    place = f"{name}:{line_of(root)}"
    fields = _fields(root, concept, header) | {"sections": len(sections)}
    yield Record(fields=fields, place=place, kind="patient", **shared)
    for line, section in sections:
        if section.text or section.findings or section.labs or section.fields["entries"]:
            yield Record(
                fields={"document": code, **section.fields},
                place=f"{name}:{line}",
                kind=section.kind,
                text=section.text,
                findings=tuple(section.findings),
                labs=tuple(section.labs),
                **shared,
            )
    for body in root.findall(f"{V3}component/{V3}nonXMLBody"):
        yield _other_body(body, code, f"{name}:{line_of(body)}", shared)


def _fields(root: etree._Element, concept: Coded | None, header: Header) -> dict[str, Any]:
    language = root.find(V3 + "languageCode")
    return {
        "document": concept.code if concept else "",
        "document_system": concept.system if concept else "",
        "document_name": concept.name if concept else "",
        "language": given(language.get("code")) if language is not None else "",
        "encounter_start": header.start,
        "encounter_end": header.end,
    }


def _other_body(body: etree._Element, code: str, place: str, shared: dict[str, Any]) -> Entry:
    """Return a body that is not of sections: a text, or what only a person can open."""
    text = body.find(V3 + "text")
    if text is not None and text.get("representation") != "B64":
        media = text.get("mediaType") or "text/plain"
        if media == "text/plain" and (said := narrative(text)):
            return Record(fields={"document": code}, place=place, kind="note", text=said, **shared)
    media = _cut(text.get("mediaType") or "") if text is not None else ""
    return Unreadable(
        place, f"body is a file {media!r}, expected sections or text: export it as text"
    )


def _cut(text: str) -> str:
    return text[:80]
