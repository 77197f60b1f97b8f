"""DICOM: one file is one record, read from its header; the pixels stay where they are.

What names the patient goes to ``identifiers``. Descriptions and comments may hold names too and go
to ``text``, which is de-identified later. ``fields`` has stable names for what a model may use:

    modality, body_part, laterality, view, manufacturer, model, photometric, sop_class, syntax
    study, series, series_number, instance_number     the hospital's own: for grouping, not to leave
    age_years, size_m, weight_kg                      of the patient
    rows, columns, frames, samples, bits, pixel_spacing, slice_thickness, kvp, exposure,
    echo_time, repetition_time, field_strength        as DICOM has them: mm, kV, mAs, ms, T
    channels, frequency, seconds                      of a waveform
    unreadable                                        keywords of values the standard does not allow

The encounter is the admission's number (0038,0010), which other systems know too; where there is
none the study's UID, which every file has.
"""

import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from pydicom.datadict import dictionary_description
from pydicom.uid import UID

from huizhen.client.records.codings import sex_of
from huizhen.client.records.dicom_file import load, quiet
from huizhen.client.records.dicom_reports import Report, annotations_of, code_in, code_of, report_of
from huizhen.client.records.dicom_values import Header
from huizhen.client.records.record import (
    Entry,
    Finding,
    FindingKind,
    Image,
    Record,
    Unreadable,
)

_IDENTIFIERS = {
    "mrn": ("PatientID", "OtherPatientIDs", "MedicalRecordLocator"),
    "id": ("AccessionNumber", "AdmissionID"),
    "phone": ("PatientTelephoneNumbers", "PatientTelecomInformation"),
    "address": ("PatientAddress", "PatientInstitutionResidence"),
    "insurance": ("InsurancePlanIdentification",),
}
_NAMES = {
    "name": ("PatientName", "OtherPatientNames", "PatientBirthName"),
    "relative": ("PatientMotherBirthName", "ResponsiblePerson"),
}
_TEXTS = (
    "StudyDescription",
    "SeriesDescription",
    "ProtocolName",
    "RequestedProcedureDescription",
    "PerformedProcedureStepDescription",
    "ReasonForStudy",
    "ReasonForTheRequestedProcedure",
    "AdmittingDiagnosesDescription",
    "AdditionalPatientHistory",
    "PatientComments",
    "StudyComments",
    "ImageComments",
    "InterpretationText",
)
_WORDS = {
    "modality": "Modality",
    "body_part": "BodyPartExamined",
    "laterality": "Laterality",
    "view": "ViewPosition",
    "manufacturer": "Manufacturer",
    "model": "ManufacturerModelName",
    "photometric": "PhotometricInterpretation",
    "study": "StudyInstanceUID",
    "series": "SeriesInstanceUID",
}
_NUMBERS = {
    "series_number": "SeriesNumber",
    "instance_number": "InstanceNumber",
    "size_m": "PatientSize",
    "weight_kg": "PatientWeight",
    "rows": "Rows",
    "columns": "Columns",
    "frames": "NumberOfFrames",
    "samples": "SamplesPerPixel",
    "bits": "BitsStored",
    "slice_thickness": "SliceThickness",
    "kvp": "KVP",
    "exposure": "Exposure",
    "echo_time": "EchoTime",
    "repetition_time": "RepetitionTime",
    "field_strength": "MagneticFieldStrength",
}
_TIMES = (
    ("AcquisitionDateTime", ""),
    ("AcquisitionDate", "AcquisitionTime"),
    ("ContentDate", "ContentTime"),
    ("SeriesDate", "SeriesTime"),
    ("StudyDate", "StudyTime"),
)
_CODED: dict[str, FindingKind] = {
    "AdmittingDiagnosesCodeSequence": "condition",
    "ReasonForRequestedProcedureCodeSequence": "condition",
    "ProcedureCodeSequence": "procedure",
}
_YEARS = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
_GARBLED = re.compile(r"[\x1b\x80-\x9f\ufffd]")


def read_dicom(stream: BinaryIO, name: str, *, charset: str = "") -> Iterator[Entry]:
    """Yield the one record of a DICOM file; its place is the file.

    Args:
        stream: the file, with the preamble or without; nothing after the header is read.
        name: the file's, by which the record refers to its pixels.
        charset: a defined term, such as ``GB18030``, in place of the one that the file declares.

    Raises:
        ConfigError: it is no DICOM, or ``charset`` is no such term.
        GovernanceError: it is cut short, damaged, or larger than a header may be.
    """
    dataset = load(stream, name, charset=charset)
    with quiet(name):
        entry = _entry(Header(dataset), name)
    yield entry


def time_of(header: Header) -> str:
    """Return when a file's content was acquired, or the nearest to that which it tells."""
    return next((time for pair in _TIMES if (time := header.time(*pair))), "")


def _entry(header: Header, name: str) -> Entry:
    patient = header.text("PatientID")
    if not patient:
        problem = "data set has no PatientID, every record needs one: fill it, or leave it out"
        return Unreadable(name, problem)
    time = time_of(header)
    kind, report = _content(header, time)
    findings = (*_findings(header, time), *report.findings)
    birth, identifiers = header.time("PatientBirthDate"), _identifiers(header, report)
    text = "\n".join([*_descriptions(header), *report.lines])
    record = Record(
        patient,
        _fields(header),
        name,
        kind=kind,
        encounter=header.text("AdmissionID") or header.text("StudyInstanceUID"),
        time=time,
        text=text,
        findings=findings,
        labs=tuple(report.labs),
        images=_images(header, name) if kind == "image" else tuple(report.images.values()),
        sex=sex_of(header.text("PatientSex")),
        birth=birth,
        identifiers=identifiers,
    )
    return Unreadable(name, problem) if (problem := _distrust(header, record)) else record


def _content(header: Header, time: str) -> tuple[str, Report]:
    """Return what kind of record a data set is, and what it says in so many words."""
    if header.text("ValueType") == "CONTAINER":
        return "report", report_of(header, time)
    if "WaveformSequence" in header.dataset:
        return "waveform", annotations_of(header, time)
    return ("image" if "Rows" in header.dataset else "dicom"), Report()


def _fields(header: Header) -> dict[str, Any]:
    """Return what has no place elsewhere; called last, when all that is unreadable is known."""
    fields: dict[str, Any] = {
        **{field: header.text(keyword) for field, keyword in _WORDS.items()},
        **{field: header.number(keyword) for field, keyword in _NUMBERS.items()},
        "body_part": header.text("BodyPartExamined")
        or code_of(header, "AnatomicRegionSequence").meaning,
        "sop_class": UID(header.text("SOPClassUID")).name,
        "syntax": UID(header.dataset.file_meta.TransferSyntaxUID).name,
        "pixel_spacing": tuple(_spacing(header)),
        "age_years": _age(header),
        **_waveform(header),
        "unreadable": tuple(sorted(header.unreadable)),
    }
    return {field: value for field, value in fields.items() if value not in (None, "", ())}


def _spacing(header: Header) -> list[float]:
    """Return the distances of rows and of columns in mm, which enhanced images give once for all.

    Of a projection it is the distance at the detector (PS3.3 10.7.1).
    """
    shared = header.items("SharedFunctionalGroupsSequence")
    measures = [one for group in shared for one in group.items("PixelMeasuresSequence")]
    for owner in (header, *measures):
        found = owner.numbers("PixelSpacing") or owner.numbers("ImagerPixelSpacing")
        if len(found) == 2:
            return found
    return []


def _age(header: Header) -> float | None:
    """Return the age in years (PS3.5 6.2, AS: three digits and a letter)."""
    text = header.text("PatientAge")
    if found := re.fullmatch(r"(\d{3})([DWMY])", text):
        return round(int(found[1]) * _YEARS[found[2]], 2)
    if text:
        header.unreadable.add("PatientAge")
    return None


def _waveform(header: Header) -> dict[str, Any]:
    """Return what the first, and longest, group of a waveform's channels is."""
    for group in header.items("WaveformSequence")[:1]:
        frequency, samples = (
            group.number("SamplingFrequency"),
            group.number("NumberOfWaveformSamples"),
        )
        return {
            "channels": group.number("NumberOfWaveformChannels"),
            "frequency": frequency,
            "seconds": round(samples / frequency, 3) if samples and frequency else None,
        }
    return {}


def _images(header: Header, name: str) -> tuple[Image, ...]:
    frames = header.number("NumberOfFrames") or 1
    return (Image(path=name, modality=header.text("Modality"), frames=max(1, int(frames))),)


def _identifiers(header: Header, report: Report) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {key: list(texts) for key, texts in report.identifiers.items()}
    for key, keywords in _NAMES.items():
        found.setdefault(key, []).extend(one for word in keywords for one in header.names(word))
    for key, keywords in _IDENTIFIERS.items():
        found.setdefault(key, []).extend(one for word in keywords for one in header.texts(word))
    for other in header.items("OtherPatientIDsSequence"):
        found["mrn"] += other.texts("PatientID")
    return {key: tuple(dict.fromkeys(texts)) for key, texts in found.items() if texts}


def _descriptions(header: Header) -> list[str]:
    """Return the texts that describe a study, each with the standard's name of its element."""
    return [
        f"{dictionary_description(keyword)}: {text}"
        for keyword in _TEXTS
        for text in header.texts(keyword)
    ]


def _findings(header: Header, time: str) -> list[Finding]:
    codes = [
        (code_in(item), kind) for keyword, kind in _CODED.items() for item in header.items(keyword)
    ]
    return [
        Finding(code=code.value, system=code.system, name=code.meaning, kind=kind, time=time)
        for code, kind in codes
        if code.value or code.meaning
    ]


def _distrust(header: Header, record: Record) -> str:
    """Return why a record's text cannot be trusted to say what was written, if it cannot.

    A name that is not read, or in the wrong character set, is not found in texts again, and so
    not removed from them.
    """
    naming = {word for words in (*_NAMES.values(), *_IDENTIFIERS.values()) for word in words}
    if lost := header.unreadable & naming:
        return f"{min(lost)} cannot be read, expected what the standard allows: mend the export"
    texts = [record.patient, record.text, *(t for ts in record.identifiers.values() for t in ts)]
    texts += [finding.name for finding in record.findings] + [lab.name for lab in record.labs]
    declared = header.texts("SpecificCharacterSet")
    if any(_GARBLED.search(text) for text in texts):
        return "text is not in the declared character set: give the file's own as charset"
    if not set(declared) - {"ISO_IR 6", "ISO 2022 IR 6"} and not all(
        text.isascii() for text in texts
    ):
        return (
            "text is not ASCII and SpecificCharacterSet names nothing else: "
            "give the file's own as charset, such as GB18030"
        )
    return ""
