"""The sections of a CDA document: what they are, what they say, and what they code.

HL7 C-CDA 2.1 (templates under 2.16.840.1.113883.10.20.22) and the Chinese shared documents
(WS/T 500, ``cda_chinese.py``). What is planned, cancelled or said of a relative is no finding.
"""

from dataclasses import dataclass, field
from typing import Any, Final

from lxml import etree

from huizhen.client.records.cda_chinese import DataElements, is_data_element
from huizhen.client.records.cda_values import V3, Document, given, narrative, text_in
from huizhen.client.records.record import Finding, FindingKind, Lab

_KINDS: Final[dict[str, str]] = {
    **dict.fromkeys(("30954-2", "8716-3"), "labs"),
    **dict.fromkeys(
        # problems, diagnoses: of admission, of discharge, before and after an operation; past ones
        (
            *("11450-4", "46241-6", "42347-5", "11535-2", "29548-5", "29308-4", "11348-0"),
            *("10219-4", "10218-6"),
        ),
        "diagnosis",
    ),
    **dict.fromkeys(("10160-0", "10183-2", "29549-3", "42346-7", "11369-6"), "drug"),
    **dict.fromkeys(("47519-4", "29554-3"), "procedure"),
    "48765-2": "allergy",
    **dict.fromkeys(("18748-4", "55111-9", "22637-3"), "report"),
}
_REPORTS: Final = frozenset({"检验报告", "检查报告"})  # sections of WS/T 500 that have no code
_FAMILY, _PLAN = "10157-6", "18776-5"
_DIAGNOSES: Final = frozenset(
    (
        # LOINC's and SNOMED's words for diagnosis, problem, complaint, symptom, condition, finding
        *("ASSERTION", "29308-4", "75326-9", "75322-8", "75325-1", "75323-6", "75321-0"),
        *("75318-6", "75319-4", "282291009", "64572001", "404684003", "55607006", "409586006"),
        *("418799008", "248536006", "373930000"),
    )
)
_PROBLEM, _ALLERGIES = ".22.4.4", (".22.4.7", ".22.4.90")
_PROCEDURES: Final = (".22.4.12", ".22.4.13", ".22.4.14")
_NOT_DONE: Final = frozenset({"cancelled", "nullified", "aborted"})
_STATEMENTS: Final = frozenset(
    V3 + tag
    for tag in ("observation", "organizer", "act", "procedure", "substanceAdministration", "supply")
)


@dataclass(slots=True)
class Section:
    """What one section says; ``fields`` and ``kind`` as a record has them."""

    kind: str
    fields: dict[str, Any]
    text: str = ""
    findings: list[Finding] = field(default_factory=list)
    labs: list[Lab] = field(default_factory=list)
    identifiers: list[tuple[str, str]] = field(default_factory=list)


def sections_of(root: etree._Element) -> list[etree._Element]:
    """Return the sections of a document, also those within others, in its order.

    WS/T 500's own examples leave ``structuredBody`` out.
    """
    found, ahead = [], [root]
    while ahead:
        holder = ahead.pop()
        if holder.tag == V3 + "section":
            found.append(holder)
        inner = [
            part
            for component in holder.findall(V3 + "component")
            for part in component
            if part.tag in (V3 + "structuredBody", V3 + "section")
        ]
        ahead += reversed(inner)
    return found


def read_section(element: etree._Element, document: Document) -> Section:
    """Return what a section says, without the sections within it."""
    concept = document.coded(element.find(V3 + "code"))
    code, name = (concept.code, concept.name) if concept else ("", "")
    kind = _KINDS.get(code, "report" if name in _REPORTS else "note")
    walk, unread_times = _Walk(document, kind), document.unread_times
    entries = element.findall(V3 + "entry")
    unread_entries = 0
    for entry in entries:
        before = walk.count()
        for statement in entry:
            walk.statement(statement, is_fact=code not in (_FAMILY, _PLAN))
        unread_entries += walk.count() == before
    walk.elements.close()
    section = Section(kind, {"section": code, "section_name": name})
    section.fields["section_system"] = concept.system if concept else ""
    section.fields |= {"entries": len(entries), "entries_not_read": unread_entries}
    if document.unread_times > unread_times:
        section.fields["times_not_read"] = document.unread_times - unread_times
    section.findings = walk.findings + walk.elements.findings
    section.labs = walk.labs + walk.elements.labs
    section.identifiers = walk.elements.identifiers
    interpretations = walk.interpretations + walk.elements.interpretations
    if any(interpretations):
        section.fields["interpretations"] = tuple(interpretations)
    section.text = _text(element, walk.elements.lines)
    return section


def _text(element: etree._Element, lines: list[str]) -> str:
    """Return the narrative, or what the data elements say, under the section's title."""
    text, title = element.find(V3 + "text"), element.find(V3 + "title")
    body = narrative(text) if text is not None else ""
    body = body or "\n".join(lines)
    head = narrative(title).replace("\n", " ") if title is not None else ""
    return f"{head}\n{body}" if head and body else body


class _Walk:
    """A way through the clinical statements of one section."""

    def __init__(self, document: Document, kind: str) -> None:
        self.findings: list[Finding] = []
        self.labs: list[Lab] = []
        self.interpretations: list[str] = []
        self.elements = DataElements(document)
        self._document = document
        self._kind = kind

    def count(self) -> int:
        elements = self.elements
        return len(self.findings) + len(self.labs) + len(elements.lines) + len(elements.identifiers)

    def statement(
        self, element: etree._Element, time: str = "", *, is_absent: bool = False, is_fact: bool
    ) -> None:
        """Read a statement and those within it.

        Args:
            element: the statement; what is none is passed over.
            time: of what holds it.
            is_absent: whether what holds it is negated.
            is_fact: whether it says something of the patient that is so; otherwise only its data
                elements are read.
        """
        if element.tag not in _STATEMENTS:
            return
        status = element.find(V3 + "statusCode")
        is_done = status is None or status.get("code") not in _NOT_DONE
        is_own = element.find(V3 + "subject") is None
        is_fact = is_fact and is_done and is_own and _is_real(element)
        is_absent = is_absent or (element.get("negationInd") or "").strip() == "true"
        time = self._document.time(element, time)
        if element.tag == V3 + "observation" and is_data_element(element.find(V3 + "code")):
            self.elements.take(element, time, is_absent=is_absent, is_fact=is_fact)
        elif is_fact:
            is_fact = not self._read(element, time, is_absent)
        for holder in element:
            if holder.tag in (V3 + "entryRelationship", V3 + "component"):
                for inner in holder:
                    self.statement(inner, time, is_absent=is_absent, is_fact=is_fact)
        if element.tag == V3 + "organizer":
            self.elements.close()

    def _read(self, element: etree._Element, time: str, is_absent: bool) -> bool:
        """Read one statement; return whether it said something, to which those in it only add."""
        match etree.QName(element).localname:
            case "observation":
                return self._observation(element, time, is_absent)
            case "procedure":
                return self._find(element.find(V3 + "code"), "procedure", time, is_absent)
            case "act" if self._kind == "procedure" or _has(element, _PROCEDURES):
                return self._find(element.find(V3 + "code"), "procedure", time, is_absent)
            case "substanceAdministration" | "supply":
                return self._drug(element, time, is_absent)
            case _:
                return False

    def _observation(self, element: etree._Element, time: str, is_absent: bool) -> bool:
        code = element.find(V3 + "code")
        values = element.findall(V3 + "value")
        if self._kind == "allergy" or _has(element, _ALLERGIES):
            path = f"{V3}participantRole/{V3}playingEntity/{V3}code"
            substances = [
                found
                for participant in element.findall(f"{V3}participant[@typeCode='CSM']")
                if (found := participant.find(path)) is not None
            ]
            return self._find_all(substances or values, "allergy", time, is_absent)
        if self._kind == "procedure" or _has(element, _PROCEDURES):
            is_procedure = self._find(code, "procedure", time, is_absent)
            return self._measure(element, time) or is_procedure
        is_problem = (
            self._kind == "diagnosis"
            or _has(element, (_PROBLEM,))
            or (code is not None and code.get("code") in _DIAGNOSES)
        )
        if is_problem:
            return self._find_all(values, "condition", time, is_absent)
        return not is_absent and self._measure(element, time)

    def _measure(self, element: etree._Element, time: str) -> bool:
        concept = self._document.coded(element.find(V3 + "code"))
        labs = [lab for _, lab in self._document.results(concept, element, time)]
        interpretation = element.find(V3 + "interpretationCode")
        said = given(interpretation.get("code")) if interpretation is not None else ""
        self.labs += labs
        self.interpretations += [said] * len(labs)
        return bool(labs)

    def _drug(self, element: etree._Element, time: str, is_absent: bool) -> bool:
        for holder in ("consumable", "product"):
            for product in element.findall(f"{V3}{holder}/{V3}manufacturedProduct"):
                for tag in ("manufacturedMaterial", "manufacturedLabeledDrug"):
                    material = product.find(V3 + tag)
                    if material is None:
                        continue
                    name = material.find(V3 + "name")
                    said = text_in(name) if name is not None else ""
                    if self._find(material.find(V3 + "code"), "drug", time, is_absent, said):
                        return True
        return False

    def _find_all(
        self, codes: list[etree._Element], kind: FindingKind, time: str, is_absent: bool
    ) -> bool:
        before = len(self.findings)
        for code in codes:
            self._find(code, kind, time, is_absent)
        return len(self.findings) > before

    def _find(
        self,
        code: etree._Element | None,
        kind: FindingKind,
        time: str,
        is_absent: bool,
        name: str = "",
    ) -> bool:
        concept = self._document.coded(code)
        if concept is None and not name:
            return False
        self.findings.append(
            Finding(
                code=concept.code if concept else "",
                system=concept.system if concept else "",
                name=(concept.name if concept else "") or name,
                kind=kind,
                time=time,
                is_absent=is_absent,
            )
        )
        return True


def _is_real(element: etree._Element) -> bool:
    """Tell whether a statement is of what is or was; a drug may be prescribed as well."""
    mood = (element.get("moodCode") or "EVN").strip()
    is_drug = element.tag in (V3 + "substanceAdministration", V3 + "supply")
    return mood == "EVN" or (is_drug and mood in ("INT", "RQO"))


def _has(element: etree._Element, templates: tuple[str, ...]) -> bool:
    return any(
        (template.get("root") or "").endswith(templates)
        for template in element.findall(V3 + "templateId")
    )
