"""What sections of the Chinese shared documents say by data elements instead of a text.

WS/T 500 (电子病历共享文档规范) leaves the text for people empty and writes each fact as an
observation whose code is a data element of WS 363 (卫生信息数据元目录): DE05.10.148.00 is 入院情况.
Each becomes a line of text; diagnoses, operations and results become findings and labs as well.
"""

from dataclasses import replace
from typing import Final

from lxml import etree

from huizhen.client.records.cda_values import V3, Coded, Document, given
from huizhen.client.records.codings import system_name
from huizhen.client.records.record import Finding, FindingKind, Lab

CATALOGUE: Final = "2.16.156.10011.2.2.1"
_KINDS: Final[dict[str, FindingKind]] = {
    "2.16.156.10011.2.3.3.11": "condition",  # ICD-10, and its editions
    "2.16.156.10011.2.3.3.12": "procedure",  # ICD-9-CM-3
    "2.16.156.10011.2.3.3.14": "condition",  # GB/T 15657, diseases and patterns of Chinese medicine
}
_ITEM_CODE, _ITEM_NAME = "DE04.30.019.00", "DE04.30.020.00"
_NUMBER, _TEXT, _UNIT = "DE04.30.015.00", "DE04.30.009.00", "DE04.30.016.00"
_ABNORMAL = "DE04.30.017.00"
# a code of 1 normal, 2 abnormal, 3 uncertain
_RESULTS: Final = (_NUMBER, _TEXT, _ABNORMAL)
# of one item the first of these that is there is its result
_MEASURED: Final = ("DE04.10.", "DE04.50.")
# physical examination and laboratory: a number there is a measurement of the patient
_DIAGNOSIS_NAME: Final = "DE05.01.025.00"
_INTERPRETATIONS: Final = {"1": "N", "2": "A", "3": "IND"}
_NAMING: Final[dict[str, str]] = {
    "DE02.01.039.00": "relative",  # 本人姓名, which is said of whoever signs as well
    "DE02.01.030.00": "id",
    "DE02.01.010.00": "phone",
    "DE02.01.012.00": "email",
}
_ADDRESS: Final = "DE02.01.009."


class DataElements:
    """The data elements of one section, taken in the order of the document.

    Attributes:
        lines: one for each that says something.
        findings: diagnoses and operations.
        labs: results and measurements.
        interpretations: of each of the labs, empty where there is none.
        identifiers: what names the patient or others, with its kind; it is in none of the above.
    """

    def __init__(self, document: Document) -> None:
        """Begin with none."""
        self.lines: list[str] = []
        self.findings: list[Finding] = []
        self.labs: list[Lab] = []
        self.interpretations: list[str] = []
        self.identifiers: list[tuple[str, str]] = []
        self._document = document
        self._name = ""
        self._begin()

    def _begin(self) -> None:
        self._item: Coded | None = None
        self._results: dict[str, Lab] = {}
        self._interpretation = ""
        self._unit = ""
        self._time = ""

    def close(self) -> None:
        """End what belongs together: an organizer, or the section."""
        found = next((self._results[code] for code in _RESULTS if code in self._results), None)
        if found is not None:
            item = self._item or Coded("", "", "")
            self.labs.append(
                replace(
                    found,
                    code=item.code,
                    system=item.system,
                    name=item.name,
                    unit=found.unit or self._unit,
                    time=found.time or self._time,
                )
            )
            self.interpretations.append(self._interpretation)
        self._begin()
        self._name = ""

    def take(
        self, observation: etree._Element, time: str, *, is_absent: bool, is_fact: bool
    ) -> None:
        """Take an observation whose code is a data element.

        Args:
            observation: that observation.
            time: when it holds.
            is_absent: whether it is negated.
            is_fact: whether it is so of the patient; of what is planned, or of a relative, there
                is only a line.
        """
        concept = self._document.coded(observation.find(V3 + "code"))
        if concept is None:
            return
        for value, probe in self._document.results(concept, observation, time):
            coded = self._document.coded(value) if value.get("code") is not None else None
            said = (coded.name or coded.code) if coded else probe.text
            if names := _names(concept.code):
                self.identifiers.append((names, said))
                continue
            kind = _kind(value) if coded else None
            if coded and kind:
                said = f"{coded.name} {coded.code}".strip()
                if is_fact:
                    self._find(coded, kind, time, is_absent)
            elif is_fact and not is_absent:
                self._take_lab(concept, coded, probe)
            unit = f" {probe.unit}" if probe.unit else ""
            self.lines.append(
                f"{concept.name or concept.code}：{'无 ' if is_absent else ''}{said}{unit}"
            )
            if concept.code == _DIAGNOSIS_NAME:
                self._name = said

    def _find(self, coded: Coded, kind: FindingKind, time: str, is_absent: bool) -> None:
        name, self._name = coded.name or self._name, ""
        self.findings.append(
            Finding(
                code=coded.code,
                system=coded.system,
                name=name,
                kind=kind,
                time=time,
                is_absent=is_absent,
            )
        )

    def _take_lab(self, concept: Coded, coded: Coded | None, probe: Lab) -> None:
        code = concept.code
        if code in (_ITEM_CODE, _ITEM_NAME):
            before = self._item or Coded("", "", "")
            if self._results or (before.code if code == _ITEM_CODE else before.name):
                self.close()
                before = Coded("", "", "")
            self._time = probe.time
            if code == _ITEM_NAME:
                self._item = replace(before, name=probe.text)
            elif coded:
                self._item = replace(coded, name=coded.name or before.name)
            else:
                self._item = replace(before, code=probe.text)
        elif code == _UNIT:
            self._unit = probe.text
        elif code in _RESULTS:
            if code in self._results:  # another result of the same item
                item, unit = self._item, self._unit
                self.close()
                self._item, self._unit = item, unit
            self._results[code] = probe
            if code == _ABNORMAL and coded:
                self._interpretation = _INTERPRETATIONS.get(coded.code, coded.code)
        elif code.startswith(_MEASURED) and probe.value is not None:
            self.labs.append(replace(probe, system=system_name(CATALOGUE)))
            self.interpretations.append("")


def is_data_element(code: etree._Element | None) -> bool:
    """Tell whether a code is a data element of the catalogue."""
    if code is None:
        return False
    root, value = (code.get("codeSystem") or "").strip(), given(code.get("code"))
    return root.startswith("2.16.156.10011.2.2") or (value.startswith("DE0") and "." in value)


def _names(code: str) -> str:
    """Return the kind of identifier that a data element is, empty for the others."""
    return "address" if code.startswith(_ADDRESS) else _NAMING.get(code, "")


def _kind(value: etree._Element) -> FindingKind | None:
    """Return the kind of finding that a code is by its system; None where that tells nothing."""
    root = (value.get("codeSystem") or "").strip() + "."
    return next((kind for system, kind in _KINDS.items() if root.startswith(system + ".")), None)
