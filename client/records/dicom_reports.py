"""DICOM structured reports: the content tree as lines of text, findings and measurements.

PS3.3 C.17.3 gives the tree, C.18 its items, PS3.16 the codes. Each item is a line ``name: value``,
indented as deep as it lies. Left out of the text are who observed (HAS OBS CONTEXT), all names of
persons, and coordinates; an image that is referred to is one of ``images``. Who is reported on
becomes identifiers.
"""

from dataclasses import dataclass, field

from huizhen.client.records.codings import system_name
from huizhen.client.records.dicom_values import Header
from huizhen.client.records.record import Finding, FindingKind, Image, Lab

_SUBJECT = {"121029": "name", "121030": "mrn", "121022": "id"}
# PS3.16, DCM: name and id of the subject, and the accession number
_ABSENT = frozenset({"2667000", "272519000", "373067005", "R-00339"})
# SNOMED's absent, absence and no: a modifier that says what is named was not there
_CONDITIONS = frozenset({"121071", "121073", "121077", "29308-4", "439401001"})
# names of items whose code is a finding, an impression, a conclusion or a diagnosis
_CODES = ("CodeValue", "LongCodeValue", "URNCodeValue")
_REFERENCES = frozenset(
    {"IMAGE", "COMPOSITE", "WAVEFORM", "SCOORD", "SCOORD3D", "TCOORD", "UIDREF"}
)


@dataclass(frozen=True, slots=True)
class Code:
    """A coded concept."""

    value: str = ""
    system: str = ""
    # by its short name; empty for a hospital's own
    meaning: str = ""

    def __repr__(self) -> str:
        return "Code(<masked>)"


@dataclass(slots=True)
class Report:
    """What a structured report says."""

    lines: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    labs: list[Lab] = field(default_factory=list)
    images: dict[str, Image] = field(default_factory=dict)
    # by what names them
    identifiers: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return "Report(<masked>)"


def code_of(owner: Header, keyword: str) -> Code:
    """Return the first code of a sequence; without parts where there is none."""
    return next((code_in(item) for item in owner.items(keyword)), Code())


def code_in(item: Header) -> Code:
    """Return the code that an item of a sequence is (PS3.3 8.8)."""
    value = next((text for one in _CODES if (text := item.text(one))), "")
    scheme = item.text("CodingSchemeDesignator")
    system = "" if scheme.startswith("99") else system_name(scheme)
    if system == scheme and (uid := item.text("CodingSchemeUID")):
        system = system_name(uid)
    return Code(value, system, item.text("CodeMeaning"))


def report_of(root: Header, time: str) -> Report:
    """Return what a structured report says.

    Args:
        root: the report's data set, whose root item it is.
        time: of the report, for items that give none.
    """
    report = Report()
    _add(report, root, time, 0)
    return report


def annotations_of(header: Header, time: str) -> Report:
    """Return what a waveform's annotations say (PS3.3 C.10.10): readings and measurements."""
    report = Report()
    for item in header.items("WaveformAnnotationSequence"):
        report.lines += item.texts("UnformattedTextValue")
        name = code_of(item, "ConceptNameCodeSequence")
        if item.numbers("NumericValue"):
            report.labs.append(_measurement(name, item, time))
            report.lines.append(_line(name, _shown(report.labs[-1]), 0))
        elif value := code_of(item, "ConceptCodeSequence").meaning:
            report.lines.append(_line(name, value, 0))
    return report


def _add(report: Report, item: Header, time: str, depth: int) -> None:
    """Add an item and all below it; the reading of the file has bounded how deep that goes."""
    name = code_of(item, "ConceptNameCodeSequence")
    time = item.time("ObservationDateTime") or time
    if (key := _SUBJECT.get(name.value)) and name.system == "dicom":
        found = item.names("PersonName") + item.texts("TextValue")
        report.identifiers[key] = report.identifiers.get(key, ()) + found
    elif item.text("RelationshipType") != "HAS OBS CONTEXT":
        kind = item.text("ValueType")
        if kind in _REFERENCES:
            _refer(report, item, kind)
        elif line := _value(report, item, kind, name, time):
            report.lines.append("  " * depth + _line(name, line, depth))
        elif kind == "CONTAINER" and name.meaning:
            report.lines.append("  " * depth + name.meaning)
    for below in item.items("ContentSequence"):
        _add(report, below, time, depth + 1)


def _value(report: Report, item: Header, kind: str, name: Code, time: str) -> str:
    """Return an item's value as text, and add the finding or measurement that it is."""
    match kind:
        case "TEXT":
            return item.text("TextValue")
        case "CODE":
            code = code_of(item, "ConceptCodeSequence")
            if item.text("RelationshipType") in ("CONTAINS", "HAS PROPERTIES", "INFERRED FROM"):
                report.findings.append(_finding(code, name, item, time))
            return code.meaning or code.value
        case "NUM":
            measured = next(iter(item.items("MeasuredValueSequence")), None)
            report.labs.append(_measurement(name, measured, time, item))
            return _shown(report.labs[-1])
        case "DATETIME":
            return item.time("DateTime")
        case "DATE":
            return item.time("Date")
        case "TIME":
            return item.text("Time")
        case _:
            return ""


def _finding(code: Code, name: Code, item: Header, time: str) -> Finding:
    kind: FindingKind = "condition" if name.value in _CONDITIONS else "other"
    modifiers = (
        code_of(below, "ConceptCodeSequence").value
        for below in item.items("ContentSequence")
        if below.text("RelationshipType") == "HAS CONCEPT MOD"
    )
    return Finding(
        code=code.value,
        system=code.system,
        name=code.meaning,
        kind=kind,
        time=time,
        is_absent=any(modifier in _ABSENT for modifier in modifiers),
    )


def _measurement(name: Code, measured: Header | None, time: str, item: Header | None = None) -> Lab:
    """Return a measured value; where there is none, the reason that the item gives (C.18.1)."""
    value, text, unit = None, "", Code()
    if measured is not None:
        exact = measured.numbers("FloatingPointValue") or measured.numbers("NumericValue")
        value, text = next(iter(exact), None), measured.text("NumericValue")
        unit = code_of(measured, "MeasurementUnitsCodeSequence")
    if value is None and item is not None:
        text = code_of(item, "NumericValueQualifierCodeSequence").meaning or text
    return Lab(
        code=name.value,
        system=name.system,
        name=name.meaning,
        value=value,
        text=text,
        unit="" if (unit.value, unit.system) == ("1", "ucum") else unit.value,
        time=time,
    )


def _refer(report: Report, item: Header, kind: str) -> None:
    for one in item.items("ReferencedSOPSequence") if kind == "IMAGE" else ():
        if uid := one.text("ReferencedSOPInstanceUID"):
            report.images[uid] = Image(
                path=uid, frames=max(1, len(one.values("ReferencedFrameNumber")))
            )


def _shown(lab: Lab) -> str:
    return f"{lab.text} {lab.unit}".strip()


def _line(name: Code, value: str, depth: int) -> str:
    """Return an item's line, its further lines as deep as the first."""
    value = value.replace("\n", "\n" + "  " * depth)
    return f"{name.meaning}: {value}" if name.meaning else value
