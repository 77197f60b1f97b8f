"""What a structured report says becomes text, findings and measurements, and names no person."""

import io
from dataclasses import replace

import pytest
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from huizhen.client.records.dicom import read_dicom
from huizhen.client.records.dicom_file import load
from huizhen.client.records.dicom_reports import Code, annotations_of, code_in, report_of
from huizhen.client.records.dicom_values import Header
from huizhen.client.records.record import Finding, Image, Lab, Record, Unreadable


def code(value, scheme, meaning, uid=None):
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    if uid:
        item.CodingSchemeUID = uid
    return item


def item(kind, name, relation="CONTAINS", below=(), **values):
    found = Dataset()
    found.RelationshipType, found.ValueType = relation, kind
    if name:
        found.ConceptNameCodeSequence = [name]
    for keyword, value in values.items():
        setattr(found, keyword, value)
    if below:
        found.ContentSequence = list(below)
    return found


def measured(value, unit, scheme="UCUM", **values):
    found = Dataset()
    found.NumericValue = value
    found.MeasurementUnitsCodeSequence = [code(unit, scheme, "unit")]
    for keyword, one in values.items():
        setattr(found, keyword, one)
    return found


FINDING = code("121071", "DCM", "Finding")
NODULE = code("27925004", "SCT", "Nodule")
DIAMETER = code("81827009", "SCT", "Diameter")


def report(*items):
    root = item("CONTAINER", code("18748-4", "LN", "Chest CT"), below=items)
    del root.RelationshipType
    return root


def said(*items):
    return report_of(Header(report(*items)), "2023-05-06")


def test_a_report_becomes_a_record():
    root = report(item("TEXT", FINDING, TextValue="a nodule"))
    root.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.33"
    root.SOPInstanceUID = "1.2.3"
    root.Modality, root.PatientID, root.ContentDate = "SR", "P7", "20230506"
    root.SeriesDescription = "CT report"
    root.file_meta = FileMetaDataset()
    for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian):
        root.file_meta.TransferSyntaxUID = syntax
        out = io.BytesIO()
        dcmwrite(out, root, enforce_file_format=True)
        out.seek(0)
        (record,) = read_dicom(out, "a.dcm")
        assert isinstance(record, Record)
        assert (record.kind, record.time, record.images) == ("report", "2023-05-06", ())
        expected = "Series Description: CT report\nChest CT\n  Finding: a nodule"
        assert record.text == expected


def test_items_are_lines_as_deep_as_they_lie():
    found = said(
        item(
            "CONTAINER",
            code("121070", "DCM", "Findings"),
            below=[
                item("TEXT", FINDING, TextValue="first\r\nsecond"),
                item("DATE", code("1", "99HOS", "Seen"), Date="20230506"),
                item("DATETIME", code("2", "99HOS", "Since"), DateTime="20230506083000"),
                item("TIME", code("3", "99HOS", "At"), Time="083000"),
            ],
        )
    )
    assert found.lines == [
        "Chest CT",
        "  Findings",
        "    Finding: first\n    second",
        "    Seen: 2023-05-06",
        "    Since: 2023-05-06T08:30:00",
        "    At: 083000",
    ]


def test_measurements_are_labs_with_their_unit():
    found = said(
        item(
            "NUM",
            DIAMETER,
            MeasuredValueSequence=[measured("8.5", "mm")],
            ObservationDateTime="20230507083000",
        ),
        item("NUM", code("1", "99HOS", "Count"), MeasuredValueSequence=[measured("3", "1")]),
    )
    assert found.labs == [
        Lab(
            code="81827009",
            system="snomed",
            name="Diameter",
            value=8.5,
            text="8.5",
            unit="mm",
            time="2023-05-07T08:30:00",
        ),
        Lab(code="1", name="Count", value=3, text="3", time="2023-05-06"),
    ]
    assert found.lines[1:] == ["  Diameter: 8.5 mm", "  Count: 3"]


def test_an_exact_value_is_taken_before_its_decimal_text():
    exact = measured("0.33", "mm", FloatingPointValue=1 / 3)
    assert said(item("NUM", DIAMETER, MeasuredValueSequence=[exact])).labs[0].value == 1 / 3


def test_a_value_that_could_not_be_measured_keeps_its_reason():
    qualifier = code("114000", "DCM", "Not a number")
    found = said(item("NUM", DIAMETER, NumericValueQualifierCodeSequence=[qualifier]))
    assert (found.labs[0].value, found.labs[0].text) == (None, "Not a number")


def test_codes_are_findings_and_their_modifiers_are_heard():
    absent = item(
        "CODE", FINDING, "HAS CONCEPT MOD", ConceptCodeSequence=[code("2667000", "SCT", "Absent")]
    )
    found = said(
        item("CODE", FINDING, ConceptCodeSequence=[NODULE]),
        item("CODE", FINDING, ConceptCodeSequence=[NODULE], below=[absent]),
        item("CODE", code("1", "99HOS", "Side"), ConceptCodeSequence=[code("L", "99HOS", "left")]),
    )
    nodule = Finding(
        code="27925004", system="snomed", name="Nodule", kind="condition", time="2023-05-06"
    )
    assert found.findings == [
        nodule,
        replace(nodule, is_absent=True),
        Finding(code="L", name="left", kind="other", time="2023-05-06"),
    ]
    assert found.lines[1:] == [
        "  Finding: Nodule",
        "  Finding: Nodule",
        "    Finding: Absent",
        "  Side: left",
    ]


def test_persons_are_left_out_and_the_subject_becomes_identifiers():
    found = said(
        item("PNAME", code("121008", "DCM", "Observer"), "HAS OBS CONTEXT", PersonName="Li^Si"),
        item("TEXT", code("121011", "DCM", "Role"), "HAS OBS CONTEXT", TextValue="Dr. Li"),
        item("PNAME", code("121029", "DCM", "Subject"), "HAS OBS CONTEXT", PersonName="张^三"),
        item("TEXT", code("121030", "DCM", "Subject ID"), "HAS OBS CONTEXT", TextValue="P7"),
        item("PNAME", code("1", "99HOS", "Told to"), PersonName="Wang^Wu"),
    )
    assert found.identifiers == {"name": ("张三",), "mrn": ("P7",)}
    assert found.lines == ["Chest CT"]


def test_images_that_a_report_refers_to_are_its_images():
    reference = Dataset()
    reference.ReferencedSOPInstanceUID = "1.2.3"
    reference.ReferencedFrameNumber = [4, 5]
    found = said(
        item("IMAGE", None, ReferencedSOPSequence=[reference]),
        item("IMAGE", None, ReferencedSOPSequence=[reference]),
        item("SCOORD", FINDING, GraphicData=[1.0, 2.0]),
    )
    assert list(found.images.values()) == [Image(path="1.2.3", frames=2)]
    assert found.lines == ["Chest CT"]


@pytest.mark.parametrize(
    ("given", "system"),
    [
        (code("1", "SCT", "m"), "snomed"),
        (code("1", "LN", "m"), "loinc"),
        (code("1", "I10", "m"), "icd-10"),
        (code("1", "99HOSPITAL", "m"), ""),
        (code("1", "OWN", "m", "2.16.840.1.113883.6.96"), "snomed"),
        (code("1", "OWN", "m", "1.2.3"), "1.2.3"),
        (code("1", "OWN", "m"), "OWN"),
    ],
)
def test_code_systems_have_one_name(given, system):
    assert code_in(Header(given)) == Code("1", system, "m")


def test_annotations_of_a_waveform_are_readings_and_measurements():
    text, number = Dataset(), measured("75", "ms")
    text.UnformattedTextValue = "sinus rhythm"
    number.ConceptNameCodeSequence = [code("1", "SCPECG", "QRS")]
    waveform = Dataset()
    waveform.WaveformAnnotationSequence = [text, number]
    found = annotations_of(Header(waveform), "2023")
    assert found.lines == ["sinus rhythm", "QRS: 75 ms"]
    assert [(lab.name, lab.value, lab.unit) for lab in found.labs] == [("QRS", 75.0, "ms")]


def test_nothing_of_a_report_shows_in_its_repr():
    found = said(item("TEXT", FINDING, TextValue="PLANTED"))
    assert "PLANTED" not in repr(found)
    assert "Nodule" not in repr(code_in(Header(NODULE)))


def test_real_reports_are_read(samples):
    data = (samples / "dicom_samples/test-SR.dcm").read_bytes()
    (entry,) = read_dicom(io.BytesIO(data), "a.dcm")
    assert isinstance(entry, Unreadable)  # the sample has no patient id
    found = report_of(Header(load(io.BytesIO(data), "a.dcm")), "")
    assert "    Diameter: 3 cm" in found.lines
    assert [(lab.value, lab.unit) for lab in found.labs] == [(3.0, "cm"), (3.0, "cm")]
    assert not any("Riesmeier" in line for line in found.lines)
    plain = (samples / "dicom_samples/reportsi.dcm").read_bytes()
    found = report_of(Header(load(io.BytesIO(plain), "a.dcm")), "")
    assert found.lines == ["Document Title", "  Section Heading", "    Report Text: Enter text"]
