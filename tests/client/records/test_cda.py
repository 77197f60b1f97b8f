"""Clinical documents, American and Chinese: what they say is read, what they do not say is not."""

import contextlib
import io
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from huizhen.client.records.cda import read_cda
from huizhen.client.records.record import Record, Unreadable
from huizhen.protocol.errors import ConfigError, GovernanceError

V3 = {"v": "urn:hl7-org:v3"}
HEAD = (
    '<ClinicalDocument xmlns="urn:hl7-org:v3" xmlns:sdtc="urn:hl7-org:sdtc" '
    'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">'
)
PATIENT = (
    '<recordTarget><patientRole><id root="1.2.3" extension="42"/></patientRole></recordTarget>'
)
LOINC, SNOMED = "2.16.840.1.113883.6.1", "2.16.840.1.113883.6.96"
CATALOGUE = "2.16.156.10011.2.2.1"


def read(text, **options):
    data = text if isinstance(text, bytes) else text.encode()
    return list(read_cda(io.BytesIO(data), "a.xml", **options))


def document(*sections, header=PATIENT):
    body = "".join(f"<component>{section}</component>" for section in sections)
    body = f"<component><structuredBody>{body}</structuredBody></component>"
    return f"{HEAD}{header}{body}</ClinicalDocument>"


def section(code, *entries, text="<text/>", title=""):
    coded = f'<code code="{code}" codeSystem="{LOINC}"/>{title and f"<title>{title}</title>"}'
    return f"<section>{coded}{text}{''.join(f'<entry>{e}</entry>' for e in entries)}</section>"


def observation(code, value, inside="", attributes="", system=LOINC):
    return (
        f'<observation classCode="OBS" moodCode="EVN" {attributes}>'
        f'<code code="{code}" codeSystem="{system}" displayName="name of {code}"/>'
        f"{inside}{value}</observation>"
    )


def only(*sections):
    """Return the one record of a document beside its patient's."""
    patient, record = read(document(*sections))
    assert (patient.kind, patient.patient, patient.findings) == ("patient", "42", ())
    return record


# The header.

AMERICAN = """
<id root="2.16.840.1.113883.19" extension="doc-1"/>
<code code="18842-5" codeSystem="2.16.840.1.113883.6.1" displayName="Discharge note"/>
<title>Discharge of Isabella Jones</title>
<effectiveTime value="201409171904-0500"/><languageCode code="en-US"/>
<recordTarget><patientRole>
  <id root="2.16.840.1.113883.4.1" extension="111-00-2330"/><id nullFlavor="UNK"/>
  <id root="2.16.840.1.113883.19.5" extension="998991"/>
  <addr use="HP"><streetAddressLine>1357 Amber Drive</streetAddressLine><city>Beaverton</city>
    <state>OR</state><postalCode>97867</postalCode></addr>
  <telecom value="tel:(816)276-6909"/><telecom value="mailto:isa@example.org"/>
  <telecom nullFlavor="UNK"/>
  <patient>
    <name use="L"><prefix>Ms</prefix><given>Isabella</given><given>Q</given>
      <family>Jones</family></name>
    <administrativeGenderCode code="F" codeSystem="2.16.840.1.113883.5.1"/>
    <birthTime value="19750501"/><sdtc:deceasedTime value="20150102"/>
    <guardian><telecom value="tel:(999)555-1212"/>
      <guardianPerson><name><given>Ralph</given><family>Jones</family></name></guardianPerson>
    </guardian>
    <birthplace><place><addr><city>Eugene</city></addr></place></birthplace>
  </patient>
</patientRole></recordTarget>
<author><assignedAuthor><assignedPerson><name>Dr Seven</name></assignedPerson></assignedAuthor>
</author>
<participant typeCode="IND"><associatedEntity classCode="NOK">
  <associatedPerson><name><given>Martha</given><family>Mum</family></name></associatedPerson>
</associatedEntity></participant>
<participant typeCode="HLD"><participantRole><id root="1.9" extension="POL-77"/></participantRole>
</participant>
<componentOf><encompassingEncounter><id root="1.8" extension="V-5"/>
  <effectiveTime><low value="20140909"/><high value="20140916"/></effectiveTime>
</encompassingEncounter></componentOf>
"""


def test_the_header_says_whose_a_document_is():
    (record,) = read(document(header=AMERICAN))
    assert (record.patient, record.encounter, record.kind) == ("998991", "V-5", "patient")
    assert record.place == "a.xml:1"
    assert (record.sex, record.birth, record.death) == ("female", "1975-05-01", "2015-01-02")
    assert record.time == "2014-09-17T19:04:00-05:00"
    assert record.fields == {
        "document": "18842-5",
        "document_system": "loinc",
        "document_name": "Discharge note",
        "language": "en-US",
        "encounter_start": "2014-09-09",
        "encounter_end": "2014-09-16",
        "sections": 0,
    }


def test_what_names_the_patient_is_gathered_and_is_nowhere_else():
    first, second = read(document(section("10164-2", text="<text>Fell.</text>"), header=AMERICAN))
    names = first.identifiers
    assert names["id"] == ("111-00-2330",)
    assert names["mrn"] == ("998991",)
    assert names["insurance"] == ("POL-77",)
    assert names["email"] == ("isa@example.org",)
    assert names["phone"] == ("(816)276-6909", "(999)555-1212")
    assert names["address"][:2] == ("1357 Amber Drive Beaverton OR 97867", "1357 Amber Drive")
    assert "Isabella Q Jones" in names["name"]
    assert "Jones" in names["name"]
    assert {"Ralph Jones", "Martha Mum"} <= set(names["relative"])
    assert second.identifiers == names
    for record in (first, second):
        shown = str((record.fields, record.text, record.findings, record.labs))
        for texts in names.values():
            assert not [text for text in texts if text in shown]


RESIDENT, CARD, STAY, VISIT, REPORT = (f"2.16.156.10011.1.{n}" for n in (3, 19, 12, 11, 33))


@pytest.mark.parametrize(
    ("ids", "patient"),
    [
        ([(VISIT, "MZ1"), (STAY, "ZY2"), (REPORT, "R3"), (RESIDENT, "1101X")], "1101X"),
        ([(STAY, "ZY2"), (CARD, "C4"), (RESIDENT, "-")], "C4"),
        ([(VISIT, "MZ1"), (STAY, "ZY2")], "ZY2"),
        ([(RESIDENT, "1101X"), ("1.2.3", "EMPI9"), ("1.2.4", "8")], "EMPI9"),
        ([("2.16.840.1.113883.4.1", "111-00")], "111-00"),
        ([("36e3e930-7b14-11db-9fe1-0800200c9a66", "")], "36e3e930-7b14-11db-9fe1-0800200c9a66"),
    ],
)
def test_of_several_numbers_the_one_that_tells_patients_apart_is_taken(ids, patient):
    numbers = "".join(f'<id root="{root}" extension="{number}"/>' for root, number in ids)
    header = f"<recordTarget><patientRole>{numbers}</patientRole></recordTarget>"
    assert [record.patient for record in read(document(header=header))] == [patient]


def test_a_hospital_may_name_the_numbers_that_are_its_patients():
    numbers = '<id root="1.2.3" extension="EMPI9"/><id root="1.2.4" extension="8"/>'
    header = f"<recordTarget><patientRole>{numbers}</patientRole></recordTarget>"
    assert [r.patient for r in read(document(header=header), patient_root="1.2.4")] == ["8"]
    (entry,) = read(document(header=header), patient_root="1.2.5")
    assert entry.problem.startswith("document has no patient id")


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ("", "document has no patient id"),
        ("<recordTarget><patientRole/></recordTarget>", "document has no patient id"),
        (PATIENT.replace('"42"', '" "'), "document has no patient id"),
        (PATIENT.replace("1.2.3", REPORT), "document has no patient id"),
        (PATIENT * 2, "document is of 2 patients"),
    ],
)
def test_a_document_of_nobody_or_of_several_is_unreadable(header, problem):
    (entry,) = read(document(header=header))
    assert isinstance(entry, Unreadable)
    assert entry.problem.startswith(problem)


@pytest.mark.parametrize(("code", "sex"), [("M", "male"), ("2", "female"), ("UN", "other")])
def test_a_sex_is_read_by_either_table(code, sex):
    gender = f'<patient><administrativeGenderCode code="{code}"/></patient></patientRole>'
    (record,) = read(document(header=PATIENT.replace("</patientRole>", gender)))
    assert record.sex == sex


# The sections.


def test_a_narrative_becomes_lines():
    text = """<text>
      <paragraph>First <content styleCode="Bold">bold</content> line<br/>second line</paragraph>
      <list><item>one</item><item><content revised="delete">gone</content>two</item></list>
      <table><caption>Blood</caption><thead><tr><th>Name</th><th>Value</th></tr></thead>
        <tbody><tr><td>Na</td><td><paragraph>140</paragraph><paragraph>ok</paragraph></td></tr>
        </tbody></table>
      <content>10</content><sup>3</sup>/ul</text>"""
    record = only(section("10164-2", text=text, title="HISTORY"))
    assert record.kind == "note"
    assert record.text.split("\n") == [
        "HISTORY",
        "First bold line",
        "second line",
        "- one",
        "- two",
        "Blood",
        "Name | Value",
        "Na | 140 ok",
        "103/ul",
    ]


def test_results_have_value_unit_range_time_and_interpretation():
    inside = '<effectiveTime value="20000323143000-0500"/><interpretationCode code="L"/>'
    limits = (
        '<referenceRange><observationRange><value xsi:type="IVL_PQ"><low value="150" unit="{0}"/>'
        '<high value="350" unit="{0}"/></value></observationRange></referenceRange>'
    )
    panel = "".join(
        f"<component>{each}</component>"
        for each in (
            observation(
                "1-1",
                '<value xsi:type="PQ" value="123" unit="10+3/ul"/>' + limits.format("10+3/ul"),
                inside,
            ),
            observation("1-2", '<value xsi:type="PQ" value="0.5" unit="g"/>' + limits.format("mg")),
            observation("1-3", '<value xsi:type="ST">&lt;0.01</value>'),
            observation("1-4", '<value xsi:type="CD" code="7" displayName="Yellow"/>'),
            observation("1-5", '<value xsi:type="INT" value="0"/>'),
            observation("1-6", '<value xsi:type="IVL_PQ"><high value="5" unit="U"/></value>'),
            observation(
                "1-7",
                '<value xsi:type="IVL_PQ"><low value="1" inclusive="false"/></value>'
                "<referenceRange><observationRange><text>3.5 - 5</text></observationRange>"
                "</referenceRange>",
            ),
            observation("1-8", '<value xsi:type="PQ" nullFlavor="NA"/>'),
            observation(
                "1-0",
                '<value xsi:type="RTO"><numerator value="1"/><denominator value="128"/></value>',
            ),
            observation("1-9", '<value xsi:type="TS" value="20200102"/>'),
        )
    )
    organizer = f'<organizer moodCode="EVN"><effectiveTime value="2001"/>{panel}</organizer>'
    record = only(section("30954-2", organizer))
    assert record.kind == "labs"
    found = [
        (lab.code, lab.value, lab.comparator, lab.text, lab.unit, lab.low, lab.high)
        for lab in record.labs
    ]
    assert found == [
        ("1-1", 123.0, "", "123", "10+3/ul", 150.0, 350.0),
        ("1-2", 0.5, "", "0.5", "g", None, None),
        ("1-3", 0.01, "<", "<0.01", "", None, None),
        ("1-4", None, "", "Yellow", "", None, None),
        ("1-5", 0.0, "", "0", "", None, None),
        ("1-6", 5.0, "<=", "<=5", "U", None, None),
        ("1-7", 1.0, ">", ">1", "", 3.5, 5.0),
        ("1-0", None, "", "1:128", "", None, None),
        ("1-9", None, "", "20200102", "", None, None),
    ]
    assert [lab.time for lab in record.labs[:2]] == ["2000-03-23T14:30:00-05:00", "2001"]
    assert record.fields["interpretations"] == ("L", *[""] * 8)
    assert {lab.system for lab in record.labs} == {"loinc"}
    assert record.labs[0].name == "name of 1-1"


def value(code, name="", system=SNOMED):
    return f'<value xsi:type="CD" code="{code}" codeSystem="{system}" displayName="{name}"/>'


def concern(inner, attributes=""):
    return (
        f'<act classCode="ACT" moodCode="EVN" {attributes}><code code="CONC"/>'
        f'<entryRelationship typeCode="SUBJ">{inner}</entryRelationship></act>'
    )


def test_problems_are_conditions_and_what_they_are_made_of_is_not_read_twice():
    age = observation("445518008", '<value xsi:type="PQ" value="57" unit="a"/>', system=SNOMED)
    time_ = '<effectiveTime><low value="20080103"/></effectiveTime>'
    problem = observation(
        "29308-4",
        value("233604007", "Pneumonia") + f"<entryRelationship>{age}</entryRelationship>",
        time_,
    )
    absent = observation("29308-4", value("195967001"), attributes='negationInd="true"')
    unknown = observation("29308-4", '<value xsi:type="CD" nullFlavor="UNK"/>')
    record = only(section("11450-4", *(concern(each) for each in (problem, absent, unknown))))
    assert record.kind == "diagnosis"
    assert [(f.code, f.name, f.time, f.is_absent) for f in record.findings] == [
        ("233604007", "Pneumonia", "2008-01-03", False),
        ("195967001", "", "", True),
    ]
    assert {(f.kind, f.system) for f in record.findings} == {("condition", "snomed")}
    assert record.labs == ()
    assert (record.fields["entries"], record.fields["entries_not_read"]) == (3, 1)


def test_a_name_may_stand_in_the_narrative_and_a_code_in_a_translation():
    coded = (
        '<value xsi:type="CD" nullFlavor="OTH"><originalText><reference value="#p1"/>'
        '</originalText><translation code="J18.9" codeSystem="2.16.840.1.113883.6.90"/></value>'
    )
    text = '<text><list><item><content ID="p1">Lung <br/>fever</content></item></list></text>'
    record = only(section("11450-4", observation("29308-4", coded), text=text))
    assert [(f.code, f.system, f.name) for f in record.findings] == [
        ("J18.9", "icd-10-cm", "Lung fever")
    ]


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (("x", "x"), 1),
        (('moodCode="EVN"', 'moodCode="EVN "'), 1),
        (('moodCode="EVN"', 'moodCode="INT"'), 0),
        (('moodCode="EVN"', 'moodCode="RQO"'), 0),
        (("<code", '<statusCode code="cancelled"/><code'), 0),
        (("<code", '<statusCode code="nullified"/><code'), 0),
        (("<code", "<subject><relatedSubject classCode='PRS'/></subject><code"), 0),
        (("<entry>", '<entry><act moodCode="INT"><entryRelationship>'), 0),
        (("<entry>", '<entry><act moodCode="EVN"><entryRelationship>'), 1),
        (("11450-4", "10157-6"), 0),
        (("11450-4", "18776-5"), 0),
    ],
)
def test_what_is_planned_cancelled_or_of_a_relative_is_no_finding(change, count):
    text = section("11450-4", observation("29308-4", value("1")))
    text = text.replace(*change)
    if "<act" in text:
        text = text.replace("</entry>", "</entryRelationship></act></entry>")
    record = only(text)
    assert len(record.findings) == count
    assert record.fields["entries_not_read"] == 1 - count


def test_allergies_are_to_their_substance_and_reactions_are_no_findings():
    reaction = observation("ASSERTION", value("73879007", "Nausea"))
    substance = (
        '<participant typeCode="CSM"><participantRole><playingEntity><code code="2670" '
        'codeSystem="2.16.840.1.113883.6.88" displayName="Codeine"/></playingEntity>'
        "</participantRole></participant>"
    )
    inside = f"{substance}<entryRelationship>{reaction}</entryRelationship>"
    allergy = observation("ASSERTION", value("419511003") + inside)
    none_known = observation("ASSERTION", value("419199007"), attributes='negationInd="true"')
    record = only(section("48765-2", concern(allergy), concern(none_known)))
    assert record.kind == "allergy"
    assert [(f.kind, f.code, f.is_absent) for f in record.findings] == [
        ("allergy", "2670", False),
        ("allergy", "419199007", True),
    ]


def drug(code, mood="EVN", inside="", attributes=""):
    return (
        f'<substanceAdministration moodCode="{mood}" {attributes}><effectiveTime>'
        '<low value="2014"/></effectiveTime><consumable><manufacturedProduct>'
        f"<manufacturedMaterial>{code}"
        f"</manufacturedMaterial></manufacturedProduct></consumable>{inside}"
        "</substanceAdministration>"
    )


def test_drugs_are_given_prescribed_or_refused_and_their_reasons_are_no_findings():
    coded = '<code code="{}" codeSystem="2.16.840.1.113883.6.88"/>'
    reason = f"<entryRelationship>{observation('29308-4', value('9'))}</entryRelationship>"
    record = only(
        section(
            "10160-0",
            drug(coded.format("1"), inside=reason),
            drug(coded.format("2"), mood="INT"),
            drug(coded.format("3"), attributes='negationInd="true"'),
            drug('<code nullFlavor="NA"/><name>Herb tea</name>'),
            drug(coded.format("5"), mood="PRP"),
        )
    )
    assert record.kind == "drug"
    assert [(f.kind, f.code, f.name, f.time, f.is_absent) for f in record.findings] == [
        ("drug", "1", "", "2014", False),
        ("drug", "2", "", "2014", False),
        ("drug", "3", "", "2014", True),
        ("drug", "", "Herb tea", "2014", False),
    ]


def test_procedures_are_procedures_acts_and_observations():
    coded = f'<code code="{{}}" codeSystem="{SNOMED}"/><effectiveTime value="20120512"/>'
    record = only(
        section(
            "47519-4",
            f'<procedure moodCode="EVN">{coded.format(1)}</procedure>',
            f'<act moodCode="EVN">{coded.format(2)}</act>',
            observation("3", value("4", "normal ECG"), system=SNOMED),
        )
    )
    assert [(f.kind, f.code, f.time) for f in record.findings] == [
        ("procedure", "1", "2012-05-12"),
        ("procedure", "2", "2012-05-12"),
        ("procedure", "3", ""),
    ]
    assert [(lab.code, lab.text) for lab in record.labs] == [("3", "normal ECG")]


def test_a_section_in_a_section_is_a_record_of_its_own():
    inner = section("8716-3", observation("8302-2", '<value value="177" unit="cm"/>'))
    outer = section("29545-1", text="<text>Well.</text>")
    outer = outer.replace("</section>", f"<component>{inner}</component></section>")
    _, first, second = read(document(outer))
    assert (first.kind, first.text, first.labs) == ("note", "Well.", ())
    assert [(lab.value, lab.unit) for lab in second.labs] == [(177.0, "cm")]


def test_a_time_that_is_none_is_counted_and_an_empty_section_is_no_record():
    wrong = observation("1-1", '<value value="1"/>', '<effectiveTime value="20231399"/>')
    record = only(section("30954-2", wrong), section("10164-2"))
    assert (record.labs[0].time, record.fields["times_not_read"]) == ("", 1)


def test_a_body_that_is_a_file_is_said_to_be_one():
    text = '<text mediaType="application/pdf" representation="B64">JVBERi0x</text>'
    body = f"<component><nonXMLBody>{text}</nonXMLBody></component></ClinicalDocument>"
    _, entry = read(HEAD + PATIENT + body)
    assert entry == Unreadable(
        "a.xml:1",
        "body is a file 'application/pdf', expected sections or text: export it as text",
    )
    _, entry = read(HEAD + PATIENT + body.replace(text, "<text>Fell\nill.</text>"))
    assert (entry.kind, entry.text) == ("note", "Fell ill.")


# The Chinese shared documents (WS/T 500), written by hand in the standard's structure.


def element(code, name, value_, inside="", time=""):
    when = f'<effectiveTime value="{time}"/>' if time else ""
    return (
        f'<observation classCode="OBS" moodCode="EVN"><code code="{code}" displayName="{name}" '
        f'codeSystem="{CATALOGUE}" codeSystemName="卫生信息数据元目录"/>{when}{value_}{inside}'
        "</observation>"
    )


def said(text):
    return f'<value xsi:type="ST">{text}</value>'


def within(inner):
    return f'<entryRelationship typeCode="COMP">{inner}</entryRelationship>'


ICD = "2.16.156.10011.2.3.3.11.3"
CHINESE = f"""
<realmCode code="CN"/><typeId root="2.16.840.1.113883.1.3" extension="POCD_MT000040"/>
<templateId root="2.16.156.10011.2.1.1.27"/><id root="2.16.156.10011.1.1" extension="D1"/>
<code code="C0007" codeSystem="2.16.156.10011.2.4"/><title>检验报告</title>
<effectiveTime value="20230506083000"/><languageCode code="zh-CN"/>
<recordTarget typeCode="RCT" contextControlCode="OP"><patientRole classCode="PAT">
  <id root="{VISIT}" extension="-"/><id root="{STAY}" extension="ZY0042"/>
  <id root="{REPORT}" extension="R77"/>
  <addr use="H"><houserNumber>88号</houserNumber><streetName>建国路</streetName>
    <township/><county>朝阳区</county><city>北京市</city><state>北京</state></addr>
  <telecom value="13800000000"/>
  <patient classCode="PSN"><id root="{RESIDENT}" extension="110101199003070134"/>
    <name>陈小明</name><administrativeGenderCode code="1" codeSystem="2.16.156.10011.2.3.3.4"/>
    <birthTime value="19900307"/><employerOrganization><name>红星机床厂</name>
    </employerOrganization></patient>
</patientRole></recordTarget>
<participant typeCode="NOT"><assignedEntity classCode="ECON"><telecom value="13900000000"/>
  <assignedPerson><name>陈大明</name></assignedPerson></assignedEntity></participant>
<componentOf><encompassingEncounter><effectiveTime/></encompassingEncounter></componentOf>
"""
DIAGNOSIS = section(
    "29548-5",
    element("DE05.01.025.00", "诊断名称", said("糖尿病")),
    element(
        "DE05.01.024.00",
        "诊断代码",
        f'<value xsi:type="CD" code="E11.900" codeSystem="{ICD}"/>',
        time="20230505",
    ),
)
GLUCOSE = "".join(
    f"<component>{each}</component>"
    for each in (
        element("DE04.30.019.00", "检验项目代码", said("GLU"), time="20230506073000"),
        element("DE04.30.017.00", "检验结果代码", value("2", "异常", "2.16.156.10011.2.3.2.38")),
        element(
            "DE04.30.015.00",
            "检验定量结果",
            '<value xsi:type="REAL" value="9.8"/>',
            within(element("DE04.30.016.00", "计量单位", said("mmol/L"))),
        ),
    )
)
LABORATORY = section(
    "30954-2",
    element("DE02.10.027.00", "检验方法名称", said("酶法")),
    f'<organizer classCode="BATTERY" moodCode="EVN"><statusCode/>{GLUCOSE}</organizer>',
    element(
        "DE04.30.020.00",
        "检验项目名称",
        said("乙肝表面抗原"),
        within(element("DE04.30.009.00", "检验结果", said("阴性"))),
    ),
    element(
        "DE04.30.020.00",
        "检验项目名称",
        said("钾"),
        within(
            element("DE04.30.015.00", "定量结果", '<value xsi:type="PQ" value="4.1" unit="mM"/>')
        ),
    ),
    element("DE04.30.020.00", "检验项目名称", said("未做")),
)
REPORTED = section(
    "x",
    element("DE04.50.130.00", "检验报告结果", said("血糖升高")),
    element("DE02.01.039.00", "报告人", said("李检验")),
    element("DE06.00.179.00", "备注", said("/")),
).replace(f'code="x" codeSystem="{LOINC}"', 'displayName="检验报告"')


def test_a_chinese_laboratory_report():
    entries = read(document(DIAGNOSIS, LABORATORY, REPORTED, header=CHINESE))
    patient, diagnosis, labs, report = entries
    assert (patient.patient, patient.encounter) == ("110101199003070134", "ZY0042")
    assert (patient.sex, patient.birth, patient.time) == (
        "male",
        "1990-03-07",
        "2023-05-06T08:30:00",
    )
    assert [entry.kind for entry in entries] == ["patient", "diagnosis", "labs", "report"]
    (finding,) = diagnosis.findings
    assert (finding.code, finding.system, finding.name) == ("E11.900", "icd-10-cn", "糖尿病")
    assert (finding.kind, finding.time) == ("condition", "2023-05-05")
    assert diagnosis.text == "诊断名称：糖尿病\n诊断代码：E11.900"
    assert [(r.code, r.name, r.value, r.text, r.unit, r.time) for r in labs.labs] == [
        ("GLU", "", 9.8, "9.8", "mmol/L", "2023-05-06T07:30:00"),
        ("", "乙肝表面抗原", None, "阴性", "", ""),
        ("", "钾", 4.1, "4.1", "mM", ""),
    ]
    assert labs.fields["interpretations"] == ("A", "", "")
    assert report.text == "检验报告结果：血糖升高"
    assert report.fields["entries_not_read"] == 1


def test_what_names_a_chinese_patient_is_gathered():
    (patient, *others) = read(document(DIAGNOSIS, LABORATORY, REPORTED, header=CHINESE))
    assert patient.identifiers == {
        "mrn": ("ZY0042", "R77"),
        "id": ("110101199003070134",),
        "phone": ("13800000000", "13900000000"),
        "address": ("北京北京市朝阳区建国路88号",),
        "name": ("陈小明",),
        "employer": ("红星机床厂",),
        "relative": ("陈大明", "李检验"),
    }
    for record in others:
        assert record.identifiers == patient.identifiers
        assert not [name for name in ("陈小明", "李检验", "ZY0042") if name in record.text]


def test_a_chinese_discharge_summary():
    tcm = "2.16.156.10011.2.3.3.14"
    admitted = section("11450-4", element("DE05.10.148.00", "入院情况", said("咳嗽三天")))
    discharged = section(
        "11535-2",
        element("DE05.01.024.00", "出院诊断-西医诊断编码", value("J18.901", "肺炎", ICD)),
        element("DE05.10.130.00", "出院诊断-中医病名代码", value("BNF010", "咳嗽病", tcm)),
        element("DE06.00.193.00", "出院情况", said("好转")),
    )
    operated = section(
        "47519-4",
        '<procedure classCode="PROC" moodCode="EVN"><code code="33.2400" '
        'codeSystem="2.16.156.10011.2.3.3.12" displayName="支气管镜检查"/>'
        '<effectiveTime value="20230501"/>'
        + within(element("DE06.00.257.00", "手术切口类别代码", value("1", "0类切口", "1.2")))
        + "</procedure>",
    )
    examined = section(
        "29545-1",
        element("DE04.10.206.00", "体温", '<value xsi:type="PQ" value="38.5" unit="℃"/>'),
        element("DE06.00.310.00", "住院天数", '<value xsi:type="PQ" value="7" unit="天"/>'),
    )
    family = section("10157-6", element("DE02.10.103.00", "家族史", value("I10", "高血压", ICD)))
    _, first, second, third, fourth, fifth = read(
        document(admitted, discharged, operated, examined, family)
    )
    assert first.text == "入院情况：咳嗽三天"
    assert second.text.split("\n") == [
        "出院诊断-西医诊断编码：肺炎 J18.901",
        "出院诊断-中医病名代码：咳嗽病 BNF010",
        "出院情况：好转",
    ]
    assert [(f.kind, f.code, f.system) for f in second.findings] == [
        ("condition", "J18.901", "icd-10-cn"),
        ("condition", "BNF010", tcm),
    ]
    assert [(f.kind, f.code, f.system, f.time) for f in third.findings] == [
        ("procedure", "33.2400", "icd-9-cm-3", "2023-05-01")
    ]
    assert third.text == "手术切口类别代码：0类切口"
    assert [(lab.code, lab.name, lab.value, lab.unit) for lab in fourth.labs] == [
        ("DE04.10.206.00", "体温", 38.5, "℃")
    ]
    assert fourth.text == "体温：38.5 ℃\n住院天数：7 天"
    assert (fifth.text, fifth.findings) == ("家族史：高血压 I10", ())


# What is no such document, and what is made to harm.


@pytest.mark.parametrize(
    "text", ["<a/>", "<ClinicalDocument/>", '<section xmlns="urn:hl7-org:v3"/>']
)
def test_another_document_is_refused(text):
    with pytest.raises(ConfigError, match="expected ClinicalDocument"):
        read(text)


@pytest.mark.parametrize(
    "inner",
    [
        '<text><content ID="a">' + "x" * 100_000 + "</content></text>"
        + '<entry><observation><code code="1"/><value><reference value="#a"/></value>'
        "</observation></entry>" * 10_000,
        "<text>" + "<table><tr><td>" * 80 + "x " * 1_000_000 + "</td></tr></table>" * 80
        + "</text>",
        "<text>" + "<br/>" * 300_000 + "</text>",
        "<text>" + "".join(f'<content ID="a{i}">' for i in range(200)) + "<br/>" * 200_000
        + "</content>" * 200 + "</text>" + "".join(
            f'<entry><observation><code code="1"/><value><reference value="#a{i}"/></value>'
            "</observation></entry>" for i in range(200)
        ),
        "<text>" + "<section><text>" * 100 + "<br/>" * 200_000 + "</text></section>" * 100
        + "</text>",
        "<text/><entry><observation><code code='1'/>" + "<value value='1'/>" * 100_000
        + "</observation></entry>",
        "<text/><entry>" + "<act><entryRelationship>" * 110
        + "<organizer>" + "<component><act/></component>" * 100_000 + "</organizer>"
        + "</entryRelationship></act>" * 110 + "</entry>",
    ],
)  # fmt: skip
def test_a_document_cannot_keep_the_reader_busy(inner):
    begin = time.process_time()
    assert len(read(document(f"<section>{inner}</section>"))) > 0
    assert time.process_time() - begin < 10


WHOLE = document(DIAGNOSIS, LABORATORY, REPORTED, header=CHINESE).encode()


@given(st.data())
def test_a_damaged_document_is_records_or_a_clean_error(data):
    begin = data.draw(st.integers(0, len(WHOLE)))
    end = data.draw(st.integers(begin, min(len(WHOLE), begin + 60)))
    filling = data.draw(
        st.binary(max_size=5) | st.sampled_from([b"", b"<a>", b"</section>", b'""'])
    )
    with contextlib.suppress(ConfigError, GovernanceError):
        for entry in read(WHOLE[:begin] + filling + WHOLE[end:]):
            assert isinstance(entry, Record | Unreadable)


names = st.sampled_from(
    [
        *("section", "entry", "observation", "act", "organizer", "component", "entryRelationship"),
        *("code", "value", "effectiveTime", "low", "high", "text", "id", "name", "addr", "telecom"),
        *("substanceAdministration", "consumable", "manufacturedProduct", "manufacturedMaterial"),
        *("patient", "translation", "originalText", "reference", "referenceRange", "nonXMLBody"),
    ]
)
keys = ("code", "codeSystem", "value", "unit", "root", "extension", "nullFlavor", "displayName")
contents = ("1", "", "-", CATALOGUE, ICD, "DE04.30.015.00", "DE04.30.019.00", "CSM", "x", "#x")
attributes = st.dictionaries(
    st.sampled_from([*keys, "moodCode", "ID", "negationInd", "typeCode"]),
    st.sampled_from([*contents, "true", "20230101", "1e999", "EVN", "DE04.10.206.00"]),
    max_size=4,
)


def tree(inner):
    return st.builds(grown, names, attributes, st.lists(inner, max_size=4))


def grown(name, attributes_, children):
    made = etree.Element(f"{{{V3['v']}}}{name}", attributes_)
    made.extend(children)
    return made


@given(
    st.lists(
        st.recursive(st.builds(grown, names, attributes, st.just([])), tree, max_leaves=25),
        max_size=4,
    )
)
def test_any_arrangement_of_cda_is_records(parts):
    root = etree.fromstring(f"{HEAD}{PATIENT}</ClinicalDocument>")
    for part in parts:
        grown_section = etree.SubElement(root, f"{{{V3['v']}}}section")
        entry = etree.SubElement(grown_section, f"{{{V3['v']}}}entry")
        entry.append(part)
        root[0][0].append(grown("patient", {}, []))
    for entry in read(etree.tostring(root)):
        assert isinstance(entry, Record | Unreadable)


# Real samples.


def sample(samples, name):
    path = samples / "hl7_fhir_samples" / "ccda" / name
    with path.open("rb") as stream:
        entries = list(read_cda(stream, name))
    return entries, etree.parse(path)


DONE = "not(v:statusCode[@code='aborted' or @code='cancelled'])"
OF_TEMPLATE = "v:templateId[@root='2.16.840.1.113883.10.20.22.4.{}']"


@pytest.mark.parametrize(
    "name", ["CCD.ccda", "History_and_Physical.ccda", "Discharge_Summary.ccda", "sample.ccda"]
)
def test_the_real_samples_have_as_many_findings_as_xpath_finds(samples, name):
    entries, document_ = sample(samples, name)
    records = [entry for entry in entries if isinstance(entry, Record)]

    def count(path):
        return int(document_.xpath(f"count({path})", namespaces=V3))

    def template(*numbers, condition="true()"):
        roots = " or ".join(OF_TEMPLATE.format(number) for number in numbers)
        return f"//v:structuredBody//*[{roots}][{DONE}][{condition}]"

    def kind(wanted):
        return sum(finding.kind == wanted for r in records for finding in r.findings)

    assert kind("condition") == count(template(4, condition="v:value/@code"))
    assert kind("allergy") == count(template(7))
    assert kind("procedure") == count(template(12, 13, 14))
    assert kind("drug") == count(template(16, 52))
    measured = count(template(2, 27, 78, 38, condition="v:value[@value or @code or text()]"))
    labs = sum(
        len(r.labs) for r in records if r.fields["section" if "section" in r.fields else "document"]
        in ("30954-2", "8716-3", "29762-2")
    )  # fmt: skip
    texts = count(template(38, condition="v:value/v:reference"))
    assert labs == measured + texts
    sections = count("//v:section[v:title or v:text]")
    assert len([r for r in records if r.kind != "patient"]) == sections
    assert count("//v:nonXMLBody") == len(entries) - len(records)


def test_the_real_history_is_read_to_its_values(samples):
    entries, _ = sample(samples, "History_and_Physical.ccda")
    by_code = {lab.code: lab for record in entries for lab in record.labs}
    platelets = by_code["26515-7"]
    assert (platelets.value, platelets.unit) == (123.0, "10+3/ul")
    assert (platelets.low, platelets.high) == (150.0, 350.0)
    assert by_code["10159-2"].text == "5 years of working with asbestos"
    conditions = {f.code for r in entries for f in r.findings if f.kind == "condition"}
    assert conditions == {"233604007", "195967001"}  # not the father's infarction and diabetes
    assert {f.code for r in entries for f in r.findings if f.is_absent} == {"103"}
