"""FHIR R4 against hand-written resources, real samples and hostile bytes."""

import base64
import contextlib
import io
import json
import time
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from huizhen.client.records.fhir import PASSED_OVER, read_fhir
from huizhen.client.records.fhir_resources import READERS
from huizhen.client.records.record import MAX_ENTRY_BYTES, Record, Unreadable
from huizhen.protocol.errors import ConfigError, GovernanceError

PATIENT = {
    "resourceType": "Patient",
    "id": "p1",
    "name": [{"family": "王", "given": ["建国"]}],
    "identifier": [
        {"value": "770077"},
        {"value": "110101196503071234", "type": {"coding": [{"code": "NNCHN"}]}},
    ],
    "telecom": [
        {"system": "phone", "value": "13800138000"},
        {"system": "email", "value": "w@x.cn"},
    ],
    "address": [{"line": ["建国路88号"], "city": "北京"}],
    "contact": [{"name": {"text": "李梅"}}],
    "gender": "male",
    "birthDate": "1965-03-07",
    "deceasedDateTime": "2024-01-02T03:04:05+08:00",
}
MINE = {"subject": {"reference": "Patient/p1"}, "encounter": {"reference": "Encounter/v1"}}
PUNYCODE = "text/plain;charset=punycode"  # a codec of Python that takes quadratic time
LOINC = "http://loinc.org"


def resource(kind, **elements):
    return {"resourceType": kind, **MINE, **elements}


def observation(**elements):
    code = {"coding": [{"system": LOINC, "code": "718-7", "display": "血红蛋白"}]}
    return resource("Observation", **{"code": code, "status": "final", **elements})


def read_bytes(data, name="in"):
    return list(read_fhir(io.BytesIO(data), name))


def read(*resources):
    data = "\n".join(json.dumps(item) for item in resources).encode()
    return read_bytes(data, "in.ndjson")


def record(item):
    (found,) = read(item)
    assert isinstance(found, Record), found
    return found


def problem(item):
    (found,) = read(item)
    assert isinstance(found, Unreadable), found
    return found.problem


def bundle(*resources):
    items = [{"resource": item} for item in resources]
    return {"resourceType": "Bundle", "entry": items}


def text_of(text):
    return base64.b64encode(text.encode()).decode()


def test_a_patient_is_read_with_everything_that_names_it():
    patient = record(PATIENT)
    assert (patient.patient, patient.kind, patient.place) == ("p1", "patient", "in.ndjson:1")
    assert (patient.sex, patient.birth) == ("male", "1965-03-07")
    assert patient.death == "2024-01-02T03:04:05+08:00"
    assert patient.fields == {"deceased": True}
    assert patient.identifiers == {
        "name": ("王建国", "王 建国", "建国"),
        "mrn": ("770077",),
        "id": ("110101196503071234",),
        "phone": ("13800138000",),
        "email": ("w@x.cn",),
        "address": ("建国路88号 北京", "建国路88号"),
        "relative": ("李梅",),
    }


def test_an_observation_is_a_lab():
    found = record(
        observation(
            category=[{"coding": [{"code": "laboratory"}]}],
            effectiveDateTime="2023-05-06T08:30:00+08:00",
            valueQuantity={
                "value": 128,
                "comparator": "<",
                "unit": "克/升",
                "system": "http://unitsofmeasure.org",
                "code": "g/L",
            },
            referenceRange=[{"low": {"value": 130}, "high": {"value": 175}}],
            interpretation=[{"coding": [{"code": "L"}]}],
            note=[{"text": "轻度溶血"}],
        )
    )
    (lab,) = found.labs
    assert (lab.code, lab.system, lab.name) == ("718-7", "loinc", "血红蛋白")
    assert (lab.value, lab.comparator, lab.text, lab.unit) == (128, "<", "<128", "g/L")
    assert (lab.low, lab.high, lab.time) == (130, 175, "2023-05-06T08:30:00+08:00")
    assert (found.patient, found.encounter, found.text) == ("p1", "v1", "轻度溶血")
    assert found.fields == {
        "statuses": ["final"],
        "interpretations": ["L"],
        "category": "laboratory",
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"valueQuantity": {"value": 0.1, "unit": "mg"}}, (0.1, "0.1", "mg")),
        ({"valueQuantity": {"value": 4, "code": "mg"}}, (4, "4", "mg")),
        ({"valueInteger": 0}, (0, "0", "")),
        ({"valueString": "<0.01"}, (0.01, "<0.01", "")),
        ({"valueString": "阴性"}, (None, "阴性", "")),
        ({"valueBoolean": False}, (None, "false", "")),
        ({"valueCodeableConcept": {"coding": [{"code": "A", "display": "a"}]}}, (None, "a", "")),
        ({"valueCodeableConcept": {"text": "b", "coding": [{"code": "A"}]}}, (None, "b", "")),
        ({"valueDateTime": "2023-05-06"}, (None, "2023-05-06", "")),
        ({"valueRange": {"low": {"value": 1}, "high": {"value": 2}}}, (None, "1-2", "")),
        (
            {"valueRatio": {"numerator": {"value": 1}, "denominator": {"value": 128}}},
            (None, "1:128", ""),
        ),
        ({"dataAbsentReason": {"text": "溶血"}}, (None, "", "")),
        ({}, (None, "", "")),
    ],
)
def test_each_kind_of_value_is_read(value, expected):
    (lab,) = record(observation(**value)).labs
    assert (lab.value, lab.text, lab.unit) == expected


def test_a_missing_value_keeps_its_reason():
    found = record(observation(dataAbsentReason={"text": "溶血"}))
    assert found.fields["absent_reasons"] == ["溶血"]


def test_components_are_labs_and_their_frame_is_none():
    parts = [
        {"code": {"coding": [{"system": LOINC, "code": code}]}, "valueQuantity": {"value": value}}
        for code, value in (("8480-6", 120), ("8462-4", 80))
    ]
    found = record(observation(component=parts))
    assert [(lab.code, lab.value) for lab in found.labs] == [("8480-6", 120), ("8462-4", 80)]
    assert found.fields["panel"] == "血红蛋白"
    assert record(observation(hasMember=[{"reference": "Observation/1"}])).labs == ()


def test_a_range_that_is_text_is_read_or_kept():
    assert (
        record(observation(valueInteger=1, referenceRange=[{"text": "3.5-5.0"}])).labs[0].low == 3.5
    )
    found = record(observation(valueString="阴性", referenceRange=[{"text": "阴性"}]))
    assert found.fields["references"] == ["阴性"]


@pytest.mark.parametrize(
    ("item", "kind", "finding"),
    [
        (resource("Condition", code={"text": "高血压"}), "diagnosis", "condition"),
        (
            resource("Procedure", code={"text": "支架"}, status="completed"),
            "procedure",
            "procedure",
        ),
        (
            resource("MedicationRequest", medicationCodeableConcept={"text": "布洛芬"}),
            "medication",
            "drug",
        ),
        (
            resource("MedicationStatement", medicationReference={"display": "布洛芬"}),
            "medication",
            "drug",
        ),
        (resource("AllergyIntolerance", code={"text": "青霉素"}), "allergy", "allergy"),
        (resource("Immunization", vaccineCode={"text": "乙肝"}), "immunization", "drug"),
    ],
)
def test_what_is_coded_is_a_finding_of_its_kind(item, kind, finding):
    found = record(item)
    assert found.kind == kind
    assert [(f.kind, f.is_absent) for f in found.findings] == [(finding, False)]


def test_of_several_codings_a_known_one_counts_and_the_others_stay():
    code = {
        "text": "二型糖尿病",
        "coding": [
            {"system": "http://h.example/local", "code": "77"},
            {"system": "http://hl7.org/fhir/sid/icd-10", "code": "E11", "display": "2型糖尿病"},
        ],
    }
    found = record(resource("Condition", code=code, onsetDateTime="2019"))
    (finding,) = found.findings
    assert (finding.code, finding.system, finding.name) == ("E11", "icd-10", "2型糖尿病")
    assert (found.time, found.fields["as_written"]) == ("2019", "二型糖尿病")
    assert found.fields["other_codes"] == ("http://h.example/local|77",)


@pytest.mark.parametrize(
    "item",
    [
        resource("Procedure", code={"text": "x"}, status="not-done"),
        resource("Immunization", vaccineCode={"text": "x"}, status="not-done"),
        resource(
            "Condition",
            code={"text": "x"},
            verificationStatus={"coding": [{"code": "refuted"}]},
        ),
    ],
)
def test_what_was_not_so_is_absent(item):
    assert record(item).findings[0].is_absent


def test_a_report_has_its_text_and_conclusion():
    found = record(
        resource(
            "DiagnosticReport",
            code={"coding": [{"code": "36643-5", "display": "胸片"}]},
            presentedForm=[{"contentType": "text/plain;charset=utf-8", "data": text_of("结节")}],
            conclusion="建议随访",
            conclusionCode=[{"text": "肺结节"}],
        )
    )
    assert (found.kind, found.text) == ("report", "结节\n建议随访")
    assert found.fields["title"] == "胸片"
    assert found.findings[0].name == "肺结节"


def test_notes_are_read_from_attachments_and_sections():
    markup = text_of("<div>主诉：<b>头痛</b><br/>三天 &lt; 1周</div>")
    content = [{"attachment": {"contentType": "text/html", "data": markup}}]
    note = record(
        resource(
            "DocumentReference",
            content=content,
            context={"encounter": [{"reference": "Encounter/v9"}]},
            encounter=None,
        )
    )
    assert (note.kind, note.text, note.encounter) == ("note", "主诉：头痛\n三天 < 1周", "v9")
    inner = {"title": "体检", "text": {"div": "<div><p>未见异常</p></div>"}}
    section = {"title": "病史", "section": [inner], "text": {"div": "<div>头痛</div>"}}
    assert record(resource("Composition", section=[section])).text == "病史\n头痛\n体检\n未见异常"


def test_a_part_that_cannot_be_read_does_not_take_the_rest_with_it():
    form = [{"contentType": "application/pdf", "data": "AA=="}]
    found = read(resource("DiagnosticReport", presentedForm=form, conclusion="结论"))
    assert [type(entry) for entry in found] == [Unreadable, Record]
    assert found[1].text == "结论"
    assert "application/pdf" in found[0].problem


def test_an_imaging_study_names_its_series():
    series = [{"uid": "1.2.3", "modality": {"code": "CT"}, "numberOfInstances": 40}]
    found = record(resource("ImagingStudy", series=series, started="2023-05-06"))
    (image,) = found.images
    assert (found.kind, image.path, image.modality, image.frames) == ("image", "1.2.3", "CT", 40)


def test_an_encounter_has_its_own_number():
    period = {"start": "2023-05-06", "end": "2023-05-09"}
    found = record(
        {
            **resource("Encounter", id="v1", period=period),
            "class": {"code": "IMP"},
            "encounter": None,
        }
    )
    assert (found.encounter, found.time) == ("v1", "2023-05-06")
    assert found.fields == {"start": "2023-05-06", "end": "2023-05-09", "class": "IMP"}


@pytest.mark.parametrize(
    "reference",
    ["Patient/p1", "http://h.example/fhir/Patient/p1", "Patient/p1/_history/3", "urn:uuid:aa-bb"],
)
def test_in_a_bundle_every_reference_finds_the_patient(reference):
    items = [
        {"resource": observation(valueInteger=1, subject={"reference": reference})},
        {"fullUrl": "urn:uuid:aa-bb", "resource": PATIENT},
    ]
    first, second = read({"resourceType": "Bundle", "entry": items})
    assert first.place == "in.ndjson:1:entry[0]"
    assert first.patient == second.patient == "p1"
    assert (first.sex, first.birth) == ("male", "1965-03-07")
    assert first.identifiers == second.identifiers


def test_a_patient_without_an_id_is_its_uuid():
    nameless = {key: value for key, value in PATIENT.items() if key != "id"}
    items = [
        {"fullUrl": "urn:uuid:aa-bb", "resource": nameless},
        {"resource": observation(valueInteger=1, subject={"reference": "urn:uuid:aa-bb"})},
    ]
    found = read({"resourceType": "Bundle", "entry": items})
    assert [entry.patient for entry in found] == ["aa-bb", "aa-bb"]
    assert "no id" in problem(nameless)[:40]


def test_a_contained_patient_is_its_identifier():
    inner = {**PATIENT, "id": "p"}
    found = record(observation(valueInteger=1, contained=[inner], subject={"reference": "#p"}))
    assert found.patient == "770077"
    assert found.identifiers["name"][0] == "王建国"


def test_a_medication_is_found_in_its_bundle():
    drug = {"resourceType": "Medication", "id": "m", "code": {"text": "布洛芬"}}
    use = resource("MedicationAdministration", medicationReference={"reference": "Medication/m"})
    (found,) = read(bundle(use, drug))
    assert found.findings[0].name == "布洛芬"
    assert "in another file" in problem(use)


def test_relatives_and_insurances_add_what_names_the_patient():
    relative = {
        "resourceType": "RelatedPerson",
        "patient": {"reference": "Patient/p1"},
        "name": [{"family": "李", "given": ["梅"]}],
    }
    cover = {
        "resourceType": "Coverage",
        "beneficiary": {"reference": "Patient/p1"},
        "subscriberId": "YB1",
    }
    found = read(relative, cover)
    assert found[0].identifiers == {"relative": ("李梅", "李 梅")}
    assert found[1].identifiers == {"insurance": ("YB1",)}


def test_what_is_no_patients_is_passed_over_and_the_rest_is_not():
    assert not PASSED_OVER & set(READERS)
    assert read(*({"resourceType": kind} for kind in sorted(PASSED_OVER))) == []
    assert "resource type 'CarePlan' is not read" in problem(resource("CarePlan"))


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (observation(subject=None), "no patient"),
        (observation(subject={"reference": "Group/1"}), "no patient"),
        (observation(subject={"reference": "urn:uuid:secret"}), "no patient"),
        (observation(subject={"reference": "Patient?identifier=secret"}), "no patient"),
        (observation(subject={"display": "secret"}), "no patient"),
        (observation(subject={"reference": 7}), "'reference' is not text"),
        (observation(subject="secret"), "'subject' is no list"),
        (observation(valueInteger="secret"), "'valueInteger' is no number"),
        (observation(valueQuantity={"value": True}), "'value' is no number"),
        (observation(valueQuantity={"value": 1, "comparator": "secret"}), "comparator"),
        (observation(valueSampledData={}), "'valueSampledData' is not read"),
        (observation(valueSecret={}), "'value[x]' is not read"),
        (observation(effectiveDateTime="secret"), "'effectiveDateTime' is no time"),
        (observation(code=None), "'code' says nothing"),
        (observation(status="entered-in-error"), "in error"),
        (resource("Condition"), "'code' says nothing"),
        (resource("DocumentReference"), "no attachment"),
        (
            resource("DocumentReference", content=[{"attachment": {"url": "http://secret"}}]),
            "link or empty",
        ),
        (
            resource("DocumentReference", content=[{"attachment": {"data": "secret!"}}]),
            "not base64",
        ),
        (
            resource(
                "DocumentReference",
                content=[
                    {"attachment": {"contentType": "text/plain;charset=punycode", "data": "AA"}}
                ],
            ),
            "charset",
        ),
        ({**PATIENT, "birthDate": "secret"}, "'birthDate' is no time"),
        ({"resourceType": "secret 7"}, "no 'resourceType'"),
        ({"resourceType": ["Patient"]}, "no 'resourceType'"),
    ],
)
def test_what_is_no_record_says_so_and_shows_nothing(item, expected):
    lines = json.dumps(PATIENT) + "\n" + json.dumps(item)
    found = read_bytes(lines.encode())[1:]
    assert [(type(entry), entry.place) for entry in found] == [(Unreadable, "in:2")]
    assert expected in found[0].problem
    assert "secret" not in found[0].problem


def test_a_damaged_line_leaves_the_others():
    data = (
        b'\xef\xbb\xbf{"resourceType":"Device"}\r\n\n{"resourceType":\n{"a":NaN}\n'
        + json.dumps(PATIENT).encode()
    )
    found = read_bytes(data)
    assert [entry.place for entry in found] == ["in:3", "in:4", "in:5"]
    assert [type(entry) for entry in found] == [Unreadable, Unreadable, Record]


def test_a_pretty_document_is_read_whole():
    data = (
        b"\xef\xbb\xbf\n"
        + json.dumps(bundle(PATIENT, observation(valueInteger=1)), indent=2).encode()
    )
    assert [entry.kind for entry in read_bytes(data)] == ["patient", "labs"]


def test_a_bundle_of_many_patients_takes_linear_time():
    many = [{**PATIENT, "id": str(i)} for i in range(20_000)]  # half a minute if it were quadratic
    began = time.process_time()
    assert len(read(bundle(*many))) == len(many)
    assert time.process_time() - began < 10


def test_bundles_in_bundles_have_an_end():
    inner = bundle(PATIENT)
    assert [entry.kind for entry in read(bundle(bundle(inner)))] == ["patient"]
    for _ in range(300):
        inner = bundle(inner)
    assert "deep in each other" in problem(inner)


@pytest.mark.parametrize(
    "data", [b"", b"\n \n", b"MSH|^~\\&|", b"[]", b"\xff\xfe{\0", b"<a/>", b"7"]
)
def test_a_file_of_another_kind_is_refused(data):
    with pytest.raises(ConfigError, match=r"^in"):
        read_bytes(data)


def test_a_damaged_document_is_refused():
    with pytest.raises(GovernanceError, match=r"^in:1: document is not JSON"):
        read_bytes(b'{\n"resourceType": "Patient",\n')
    with pytest.raises(GovernanceError, match=r"^in:1: document is not JSON"):
        read_bytes(b'{"a":' * 100_000)


class Endless(io.RawIOBase):
    """A gigabyte that begins in one way and goes on in another; it counts what was taken."""

    def __init__(self, head, rest):
        self.taken, self._head, self._rest = 0, head, rest

    def readable(self):
        return True

    def readinto(self, buffer):
        if self.taken >= 1 << 30:
            return 0
        data = (self._head if not self.taken else b"") + self._rest * len(buffer)
        data = data[: len(buffer)]
        buffer[: len(data)] = data
        self.taken += len(data)
        return len(data)


@pytest.mark.parametrize("head", [b"", b"{\n", b'{"resourceType":"Device"}\n'])
def test_a_gigabyte_in_one_line_or_document_is_refused_early(head):
    stream = Endless(head, b" ")
    tracemalloc.start()
    try:
        with pytest.raises(GovernanceError, match="bytes, which is not read"):
            list(read_fhir(io.BufferedReader(stream), "in"))
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert stream.taken < 2 * MAX_ENTRY_BYTES


def drain(data):
    with contextlib.suppress(ConfigError, GovernanceError):
        for entry in read_fhir(io.BytesIO(data), "in"):
            assert isinstance(entry, Record | Unreadable)
            assert entry.place.startswith("in:")


@given(st.binary(max_size=500))
@example(b"{}")
@example(b"{\n}")
@example(b'{"resourceType":"Bundle","entry":[null]}')
def test_any_bytes_give_entries_or_a_clean_refusal(data):
    drain(data)
    drain(b"{" + data + b"}")


keys = st.sampled_from(
    ["resourceType", "id", "subject", "patient", "reference", "code", "coding", "system", "value",
     "valueQuantity", "valueRatio", "component", "contained", "identifier", "name", "family",
     "given", "text", "div", "section", "content", "attachment", "data", "contentType", "period",
     "start", "birthDate", "series", "uid", "numberOfInstances", "status", "verificationStatus",
     "medicationReference", "entry", "resource", "fullUrl", "dosage", "note", "class", "context"]
)  # fmt: skip
leaves = (
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(0, 9)
    | st.sampled_from(["", "#p", "Patient/1", "text/html", "AA==", "2023-05-06", "a|b", "王"])
)  # fmt: skip
trees = st.recursive(
    leaves, lambda t: st.lists(t, max_size=3) | st.dictionaries(keys, t, max_size=5)
)


@given(st.sampled_from(sorted(READERS)), st.dictionaries(keys, trees, max_size=6), st.booleans())
def test_any_resource_is_read_or_says_why_not(kind, elements, is_owned):
    item = {**elements, "resourceType": kind, **(MINE if is_owned else {})}
    drain(json.dumps(item).encode())
    drain(json.dumps({"resourceType": "Bundle", "entry": [elements, {"resource": item}]}).encode())


def test_the_real_bundle_is_read(samples):
    data = (samples / "hl7_fhir_samples/fhir/ObservationBundle.json").read_bytes()
    patient, visit, result = read_bytes(data)
    assert {entry.patient for entry in (patient, visit, result)} == {"f001"}
    assert "Chalmers" in result.identifiers["name"]
    assert (visit.encounter, visit.fields["class"], result.encounter) == ("123", "IMP", "123")
    (lab,) = result.labs
    assert (lab.code, lab.value, lab.unit, lab.low, lab.high) == (
        "15074-8",
        6.3,
        "mmol/L",
        3.1,
        6.2,
    )


def test_json_that_is_no_fhir_is_no_record(samples):
    (found,) = read_bytes((samples / "hl7_fhir_samples/fhir/ExamplePatient.json").read_bytes())
    assert "no 'resourceType'" in found.problem
