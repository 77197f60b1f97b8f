"""Phenopackets of both versions are read whole, but for what is genomic."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.client.records.phenopackets import MAX_PARTS, read_phenopackets
from huizhen.client.records.record import MAX_ENTRY_BYTES, Record, Unreadable
from huizhen.protocol.errors import ConfigError, GovernanceError

SECOND = {
    "id": "packet-of-Zhang",
    "subject": {
        "id": "P7",
        "alternateIds": ["ZY0042", ""],
        "dateOfBirth": "2001-02-03T00:00:00Z",
        "sex": "FEMALE",
        "karyotypicSex": "XX",
        "timeAtLastEncounter": {"age": {"iso8601duration": "P21Y3M"}},
        "vitalStatus": {"status": "DECEASED", "timeOfDeath": {"timestamp": "2023-04-05T06:07:08Z"}},
    },
    "phenotypicFeatures": [
        {
            "type": {"id": "HP:0001250", "label": "Seizure"},
            "onset": {"age": {"iso8601duration": "P6M"}},
        },
        {"type": {"id": "HP:0001263", "label": "Delay"}, "excluded": True},
        {
            "type": {"id": "HP:0000252", "label": "Microcephaly"},
            "description": "since birth",
            "onset": {"ontologyClass": {"id": "HP:0003577", "label": "Congenital onset"}},
        },
        {"severity": {"id": "HP:0012828", "label": "Severe"}},
    ],
    "diseases": [
        {
            "term": {"id": "OMIM:154700", "label": "Marfan"},
            "onset": {"timestamp": "2022-03-04T00:00:00Z"},
        },
        {"term": {"id": "MONDO:0007739", "label": "Huntington"}, "excluded": True},
    ],
    "interpretations": [
        {
            "progressStatus": "SOLVED",
            "diagnosis": {
                "disease": {"id": "OMIM:154700", "label": "Marfan"},
                "genomicInterpretations": [{"variant": "SECRET-FBN1"}, {"variant": "SECRET-2"}],
            },
        },
        {
            "progressStatus": "COMPLETED",
            "summary": "SECRET-GENE",
            "diagnosis": {"disease": {"id": "ORPHA:558", "label": "Marfan syndrome"}},
        },
        {"progressStatus": "UNSOLVED", "diagnosis": {"disease": {"id": "OMIM:1", "label": "no"}}},
    ],
    "measurements": [
        {
            "assay": {"id": "LOINC:2345-7", "label": "Glucose"},
            "timeObserved": {"timestamp": "2022-01-02T03:04:05Z"},
            "value": {
                "quantity": {
                    "unit": {"id": "UCUM:mmol/L", "label": "millimole per litre"},
                    "value": 9.8,
                    "referenceRange": {"low": 3.9, "high": 6.1},
                }
            },
        },
        {
            "assay": {"id": "LOINC:5778-6", "label": "Colour"},
            "value": {"ontologyClass": {"id": "NCIT:C48330", "label": "Red"}},
        },
        {
            "assay": {"id": "LOINC:85354-9", "label": "Blood pressure"},
            "complexValue": {
                "typedQuantities": [
                    {
                        "type": {"id": "LOINC:8480-6", "label": "Systolic"},
                        "quantity": {"unit": {"id": "UCUM:mm[Hg]"}, "value": 131},
                    },
                    {
                        "type": {"id": "LOINC:8462-4", "label": "Diastolic"},
                        "quantity": {"unit": {"id": "UCUM:mm[Hg]"}, "value": 77},
                    },
                ]
            },
        },
    ],
    "medicalActions": [
        {
            "procedure": {
                "code": {"id": "NCIT:C80473", "label": "Ablation"},
                "performed": {"timestamp": "2020-02-02"},
            }
        },
        {
            "treatment": {
                "agent": {"id": "DrugCentral:1610", "label": "Losartan"},
                "doseIntervals": [{"interval": {"start": "2020-03-15", "end": "2021-03-15"}}],
            }
        },
        {"radiationTherapy": {"modality": {"id": "NCIT:C28039", "label": "Electron beam"}}},
        {"therapeuticRegimen": {"ontologyClass": {"id": "NCIT:C98356", "label": "Diet"}}},
    ],
    "biosamples": [{"id": "b1"}, {"id": "b2"}],
    "files": [{"uri": "file://SECRET.vcf"}],
    "metaData": {"phenopacketSchemaVersion": "2.0"},
}

FIRST = {
    "id": "p",
    "subject": {"id": "8", "sex": "OTHER_SEX", "ageAtCollection": {"age": "P1Y6M"}},
    "phenotypicFeatures": [
        {
            "type": {"id": "HP:0001250", "label": "Seizure"},
            "negated": True,
            "classOfOnset": {"id": "HP:0003577", "label": "Congenital onset"},
        },
        {"type": {"id": "HP:0001263", "label": "Delay"}, "ageOfOnset": {"age": "P14D"}},
    ],
    "genes": [{"id": "HGNC:3603", "symbol": "SECRET"}],
    "variants": [{"hgvsAllele": {"hgvs": "SECRET"}}],
    "diseases": [
        {
            "term": {"id": "OMIM:1", "label": "A"},
            "ageRangeOfOnset": {"start": {"age": "P10Y"}, "end": {"age": "P20Y"}},
        }
    ],
}


def read(value, **options):
    data = value if isinstance(value, bytes) else json.dumps(value, **options).encode()
    return list(read_phenopackets(io.BytesIO(data), "p.json"))


def test_the_patient_of_a_phenopacket_of_version_2():
    (record,) = read(SECOND)
    assert (record.patient, record.sex, record.kind) == ("P7", "female", "diagnosis")
    assert record.place == "p.json:1"
    assert (record.birth, record.death) == (
        "2001-02-03T00:00:00+00:00",
        "2023-04-05T06:07:08+00:00",
    )
    assert record.identifiers == {"id": ("P7", "packet-of-Zhang", "ZY0042")}
    assert record.fields == {
        "schema": "2.0",
        "genomic_interpretations": 2,
        "age": "P21Y3M",
        "age_years": 21.25,
        "onset_years": {"HP:0001250": 0.5},
        "onset_classes": {"HP:0000252": "HP:0003577"},
        "not_read": {"phenotypicFeatures": 1, "biosamples": 2, "files": 1},
    }
    assert record.text == "Microcephaly: since birth"


def test_the_findings_of_a_phenopacket_of_version_2():
    (record,) = read(SECOND)
    assert [(f.kind, f.system, f.code, f.is_absent, f.time) for f in record.findings] == [
        ("phenotype", "hpo", "HP:0001250", False, ""),
        ("phenotype", "hpo", "HP:0001263", True, ""),
        ("phenotype", "hpo", "HP:0000252", False, ""),
        ("condition", "omim", "154700", False, "2022-03-04T00:00:00+00:00"),
        ("condition", "mondo", "MONDO:0007739", True, ""),
        ("condition", "orphanet", "558", False, ""),
        ("procedure", "ncit", "C80473", False, "2020-02-02"),
        ("drug", "drugcentral", "1610", False, "2020-03-15"),
        ("procedure", "ncit", "C28039", False, ""),
        ("other", "ncit", "C98356", False, ""),
    ]


def test_the_labs_of_a_phenopacket_of_version_2():
    (record,) = read(SECOND)
    found = [(lab.code, lab.value, lab.text, lab.unit, lab.low, lab.high) for lab in record.labs]
    assert found == [
        ("2345-7", 9.8, "9.8", "mmol/L", 3.9, 6.1),
        ("5778-6", None, "Red", "", None, None),
        ("8480-6", 131.0, "131", "mm[Hg]", None, None),
        ("8462-4", 77.0, "77", "mm[Hg]", None, None),
    ]
    assert {lab.system for lab in record.labs} == {"loinc"}
    assert record.labs[0].time == "2022-01-02T03:04:05+00:00"


def test_nothing_genomic_is_in_a_record():
    for packet in (FIRST, SECOND):
        (record,) = read(packet)
        everything = [getattr(record, name) for name in Record.__dataclass_fields__]
        everything += [getattr(f, name) for f in record.findings for name in f.__dataclass_fields__]
        assert "SECRET" not in str(everything)
        assert "XX" not in str(everything)
        assert record.fields["genomic_interpretations"] == 2


def test_version_1_is_read_by_its_own_names():
    (record,) = read(FIRST)
    assert record.sex == "other"
    assert (record.fields["age"], record.fields["age_years"]) == ("P1Y6M", 1.5)
    assert [(f.code, f.is_absent) for f in record.findings] == [
        ("HP:0001250", True),
        ("HP:0001263", False),
        ("1", False),
    ]
    assert record.fields["onset_classes"] == {"HP:0001250": "HP:0003577"}
    assert record.fields["onset_years"] == {"HP:0001263": round(14 / 365.25, 2), "1": 15}


def test_names_with_underscores_are_the_same():
    packet = {
        "subject": {"id": "1", "time_at_last_encounter": {"age": {"iso8601duration": "P0D"}}},
        "phenotypic_features": [{"type": {"id": "HP:0000001"}, "excluded": "true"}],
    }
    (record,) = read(packet)
    assert [(f.code, f.is_absent) for f in record.findings] == [("HP:0000001", True)]
    assert record.fields["age_years"] == 0


@pytest.mark.parametrize(
    "duration", ["", "P", "PT", "58Y", "P58", "P1Y2Y", "P" + "9" * 400 + "Y", "-P1Y", "P1YT"]
)
def test_what_is_no_duration_is_no_age(duration):
    subject = {"id": "1", "timeAtLastEncounter": {"age": {"iso8601duration": duration}}}
    (record,) = read({"subject": subject})
    assert "age" not in record.fields


def test_a_part_that_is_no_list_is_counted():
    (record,) = read({"subject": {"id": "1"}, "diseases": {"term": {"id": "OMIM:1"}}})
    assert (record.findings, record.fields["not_read"]) == ((), {"diseases": 1})


def test_a_time_that_is_none_is_counted():
    (record,) = read({"subject": {"id": "1", "dateOfBirth": "yesterday"}})
    assert (record.birth, record.fields["times_not_read"]) == ("", 1)


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_a_cohort_and_a_family_hold_several(indent):
    for whole in ([FIRST, SECOND], {"id": "c", "members": [FIRST, SECOND]}):
        assert [(r.patient, r.place) for r in read(whole, indent=indent)] == [
            ("8", "p.json:1, phenopacket 1"),
            ("P7", "p.json:1, phenopacket 2"),
        ]
    family = {"proband": SECOND, "relatives": [FIRST], "pedigree": {}}
    assert [r.patient for r in read(family, indent=indent)] == ["P7", "8"]
    assert [r.patient for r in read(SECOND, indent=indent)] == ["P7"]


def test_lines_are_read_each_by_itself_and_what_is_none_is_said():
    lines = [b"", json.dumps(FIRST).encode(), b"{oops}", b" ", b'{"subject": {"id": 7.0}}']
    lines += [b'{"subject": {"id": ""}}', b'{"subject": {}, "subject": {}}', b"[1]", b'{"a": NaN}']
    found = read(b"\n".join(lines))
    assert [entry.patient for entry in found if isinstance(entry, Record)] == ["8", "7"]
    assert [(e.place, e.problem.split(",")[0]) for e in found if isinstance(e, Unreadable)] == [
        ("p.json:3", "entry is not JSON: mend the export"),
        ("p.json:6", "record has no patient id in 'subject.id'"),
        ("p.json:7", "object has a name twice: mend the export"),
        ("p.json:8", "entry is no JSON object"),
        ("p.json:9", "entry is not JSON: mend the export"),
    ]


def test_a_first_line_that_is_broken_leaves_the_others():
    first, second = read(b'{"subject": }\n{"subject": {"id": "2"}}\n')
    assert isinstance(first, Unreadable)
    assert second.patient == "2"


def test_lines_may_be_more_than_an_entry_in_all():
    line = json.dumps({"subject": {"id": "1"}, "note": "x" * (1 << 20)}).encode() + b"\n"
    assert len(read(line * 20)) == 20


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (b"<a/>", ConfigError, "does not begin as JSON"),
        (b"\x1f\x8b", ConfigError, "does not begin as JSON"),
        ('{"a": "秘密"'.encode(), GovernanceError, "not JSON"),
        (b"[1, 2", GovernanceError, "not JSON"),
        (b'[{"subject": {"id": "\\ud800"}}]', GovernanceError, "not JSON"),
        (b"[" * 100_000, GovernanceError, "not JSON"),
        (b"[" + b"0," * MAX_PARTS + b"0]", GovernanceError, "values"),
        (b"[\n" + b" " * MAX_ENTRY_BYTES, GovernanceError, "bytes"),
        (b'{"a": "' + b"x" * MAX_ENTRY_BYTES, GovernanceError, "line has over"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_reason(data, error, match):
    with pytest.raises(error, match=match) as caught:
        read(data)
    assert "秘密" not in str(caught.value)


CHILD = """
import io, re, sys, time
from huizhen.client.records.phenopackets import read_phenopackets
from huizhen.protocol.errors import HuizhenError

class Endless(io.RawIOBase):
    def __init__(self, head, filling, size):
        self.head, self.block, self.left = head, filling * (1 + (1 << 18) // len(filling)), size
    def readable(self):
        return True
    def readinto(self, buffer):
        block = self.head or self.block[: min(len(buffer), self.left)]
        self.left -= 0 if self.head else len(block)
        self.head = b""
        buffer[: len(block)] = block
        return len(block)

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

GB, FULL = 1 << 30, (16 << 20) - (1 << 16)
CASES = {
    "a line of 1 GB": (b'{"a": "', b"x", GB),
    "a document of 1 GB": (b'{\\n"a": "', b"x", GB),
    "100,000 levels": (b"", b"[", 100_000),
    "levels just under the limit": (b"", b'{"a":', FULL),
    "empty lists without an end": (b"[0", b",[]", FULL),
    "objects without an end": (b"[0", b',{"a":0}', FULL),
    "a number without an end": (b"[", b"9", FULL),
    "a text without an end": (b'["', b"x", FULL),
}
stream, before, begin = io.BufferedReader(Endless(*CASES[sys.argv[1]])), peak(), time.process_time()
try:
    list(read_phenopackets(stream, "p.json"))
except HuizhenError as error:
    print(type(error).__name__, peak() - before, time.process_time() - begin)
"""
BOMBS = [line.split('"')[1] for line in CHILD.splitlines() if line.startswith('    "')]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures by Linux's /proc")
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_within_64_mb_and_a_second(bomb):
    child = subprocess.run(  # noqa: S603 - our own text
        [sys.executable, "-c", CHILD, bomb], capture_output=True, text=True, timeout=60, check=True
    )
    error, megabytes, seconds = child.stdout.split()
    assert error == "GovernanceError"
    assert float(megabytes) < 64
    assert float(seconds) < 1


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*sorted(SECOND), "id", "type", "value"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


def grown(example):
    """Return a strategy for values that have the form of an example, wrong in some places."""
    if isinstance(example, dict):
        return (
            st.fixed_dictionaries({}, optional={k: grown(v) for k, v in example.items()}) | values
        )
    if isinstance(example, list):
        return st.lists(st.one_of([grown(each) for each in example]), max_size=3) | values
    return st.just(example) | values


@given(grown(SECOND), st.sampled_from([None, 1]))
def test_any_phenopacket_is_a_record_or_a_clean_error(packet, indent):
    with contextlib.suppress(GovernanceError, ConfigError):
        for entry in read(packet, indent=indent):
            assert isinstance(entry, Record | Unreadable)


@given(st.binary() | st.lists(st.sampled_from([*'{}[]:,"\n', "a", "\\", "0", "-", "\ud800"])).map(
    lambda pieces: "".join(pieces).encode("utf-8", "surrogatepass")
))  # fmt: skip
def test_any_bytes_are_records_or_a_clean_error(data):
    with contextlib.suppress(GovernanceError, ConfigError):
        for entry in read(data):
            assert isinstance(entry, Record | Unreadable)


def test_the_real_samples_have_as_many_findings_as_they_name(samples):
    paths = sorted((samples / "hl7_fhir_samples" / "phenopackets").glob("*.json"))
    assert len(paths) == 15
    for path in paths:
        packet = json.loads(path.read_text())
        with path.open("rb") as stream:
            (record,) = read_phenopackets(stream, path.name)
        assert isinstance(record, Record)
        features = packet["phenotypicFeatures"]
        found = [f for f in record.findings if f.kind == "phenotype"]
        assert [f.code for f in found] == [feature["type"]["id"] for feature in features]
        assert [f.is_absent for f in found] == [bool(f.get("excluded")) for f in features]
        diseases = {d["term"]["id"] for d in packet["diseases"]}
        diseases |= {i["diagnosis"]["disease"]["id"] for i in packet["interpretations"]}
        conditions = [f for f in record.findings if f.kind == "condition"]
        assert sorted(f"OMIM:{f.code}" for f in conditions) == sorted(diseases)
        assert len(record.findings) == len(features) + len(diseases)
        genomic = [len(i["diagnosis"]["genomicInterpretations"]) for i in packet["interpretations"]]
        assert record.fields["genomic_interpretations"] == sum(genomic) > 0
        onsets = [f for f in features if "onset" in f] + [
            d for d in packet["diseases"] if "onset" in d
        ]
        years, classes = (record.fields.get(f"onset_{name}", {}) for name in ("years", "classes"))
        assert len(years) + len(classes) == len(onsets)
        assert ("age_years" in record.fields) == ("timeAtLastEncounter" in packet["subject"])
        assert record.sex == packet["subject"]["sex"].lower().replace("unknown_sex", "")
        assert "not_read" not in record.fields
