"""Code systems and administrative codes have one name however a format writes them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.client.records.codings import sex_of, system_name


@pytest.mark.parametrize(
    ("given_name", "short"),
    [
        ("http://loinc.org", "loinc"),
        ("https://loinc.org/", "loinc"),
        ("LN", "loinc"),
        ("urn:oid:2.16.840.1.113883.6.1", "loinc"),
        ("2.16.840.1.113883.6.96", "snomed"),
        ("http://snomed.info/sct/900000000000207008/version/20230131", "snomed"),
        ("SCT", "snomed"),
        (" I10 ", "icd-10"),
        ("2.16.840.1.113883.6.90", "icd-10-cm"),
        ("2.16.156.10011.2.3.3.11", "icd-10-cn"),
        ("2.16.156.10011.2.3.3.11.3", "icd-10-cn"),
        ("2.16.156.10011.2.3.3.12", "icd-9-cm-3"),
        ("HP", "hpo"),
        ("http://www.nlm.nih.gov/research/umls/rxnorm", "rxnorm"),
        ("http://unitsofmeasure.org/", "ucum"),
    ],
)
def test_a_well_known_system_has_its_short_name(given_name, short):
    assert system_name(given_name) == short


@pytest.mark.parametrize("local", ["", "L", "99LAB", "99zzz"])
def test_a_hospitals_own_codes_have_no_system(local):
    assert system_name(local) == ""


def test_an_unknown_system_keeps_its_uri_or_oid():
    assert system_name("urn:oid:1.2.3.4") == "1.2.3.4"
    assert system_name("http://hospital.example/Codes/") == "http://hospital.example/Codes/"
    assert system_name("2.16.156.10011.2.3.3.110") == "2.16.156.10011.2.3.3.110"


@given(st.text())
def test_any_text_has_a_short_name_that_stays_itself(text):
    assert len(system_name(text)) <= 200
    assert system_name(system_name("SCT")) == "snomed"


@pytest.mark.parametrize(
    ("code", "sex"),
    [("M", "male"), ("female", "female"), ("1", "male"), ("2", "female"), ("女", "female")],
)
def test_a_sex_is_read_from_every_code_table(code, sex):
    assert sex_of(code) == sex


@pytest.mark.parametrize("code", ["U", "unknown", "0", "9", "", "N"])
def test_no_sex_is_made_of_an_unknown_one(code):
    assert sex_of(code) == ""
