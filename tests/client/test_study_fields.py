"""What a task may name: of a record, of an encounter, of a patient."""

import pytest

from huizhen.client.clean import CleanRecord
from huizhen.client.data_terms import ExampleTerms
from huizhen.client.records.record import Finding, Lab
from huizhen.client.study_fields import study_records


def lab(key, value, time="", text=""):
    return Lab(code=key, system="huizhen", value=value, text=text, time=time)


def record(place, **values):
    given = {"patient": "p", "is_held_out": False, "kind": "note", "fields": {}}
    return CleanRecord(place=place, **{**given, **values})


def fields(records, **terms):
    return [dict(one.fields) for one in study_records(records, ExampleTerms(**terms))]


STAY = [
    record(
        "a:2", time="2023-05-08", encounter="v", text="better", fields={"label": "", "ward": "B"},
        labs=(lab("ldh", 300.0), lab("crp", None, text="阴性")), age=62.0,
    ),
    record(
        "a:1", time="2023-05-06", encounter="v", text="cough", fields={"label": "A", "ward": "A"},
        findings=(Finding(code="J18", name="肺炎"), Finding(code="I10"),
                  Finding(code="R50", name="发热", is_absent=True)),
        labs=(lab("ldh", 250.0, "2023-05-02"), lab("ldh", 200.0, "2023-05-06")),
        sex="female", age=61.0,
    ),
    record("a:3", time="2023-06-01", encounter="w", text="later", findings=(Finding(code="I10"),)),
    record("a:4", text="alone"),
]  # fmt: skip


def test_each_record_is_an_example():
    found = fields(STAY)
    assert [one["text"] for one in found] == ["better", "cough", "later", "alone"]
    assert found[1] == {
        "text": "cough", "kind": "note", "findings": ["肺炎", "I10"], "sex": "female", "age": 61.0,
        "ldh": 200.0, "label": "A", "ward": "A",
    }  # fmt: skip
    assert found[0]["crp"] == "阴性"
    assert "ldh" not in found[2]


def test_an_encounter_is_an_example_in_the_order_of_time():
    found = fields(STAY, group="encounter")
    assert [one["text"] for one in found] == ["cough\n\nbetter", "later", "alone"]
    assert found[0]["label"] == "A"  # the later one is empty
    assert found[0]["ward"] == "B"
    assert (found[0]["age"], found[0]["sex"]) == (61.0, "female")


@pytest.mark.parametrize(
    ("which", "value"), [("last", 300), ("first", 250), ("min", 200), ("max", 300), ("mean", 250)]
)
def test_which_result_of_a_patient_is_read(which, value):
    given = STAY[1].labs + STAY[0].labs
    dated = [
        record("a:1", labs=(lab("ldh", one.value, one.time or f"2023-06-0{i}"),))
        for i, one in enumerate((one for one in given if one.value), 1)
    ]
    [found] = fields(dated, group="patient", labs=which)
    assert found["ldh"] == value


def test_findings_of_a_patient_stand_once_and_absent_ones_not():
    [found] = fields(STAY, group="patient")
    assert found["findings"] == ["肺炎", "I10"]


def test_a_lab_in_another_unit_or_of_another_hospital_is_another_field():
    labs = (
        lab("glucose", 5.0), Lab(code="", name="glucose", value=90.0, unit="qq"),
        Lab(code="text", name="", value=1.0),
    )  # fmt: skip
    [found] = fields([record("a:1", text="words", labs=labs, fields={"text": "evil", "age": 97})])
    assert (found["glucose"], found["glucose (qq)"], found["text (?)"]) == (5.0, 90.0, 1.0)
    assert (found["text"], found["age"]) == ("words", None)


def test_a_result_without_a_time_of_its_own_has_its_record_s():
    january = record("a:1", time="2023-01-01", labs=(lab("ldh", 1.0, "2023-01-01"),))
    june = record("a:2", time="2023-06-01", labs=(lab("ldh", 2.0),))
    assert fields([june, january], group="patient")[0]["ldh"] == 2.0


def test_two_patients_with_one_number_of_an_encounter_are_two_examples():
    two = [record("a:1", encounter="v"), record("a:2", encounter="v", patient="q")]
    assert [one.patient for one in study_records(two, ExampleTerms(group="encounter"))] == [
        "p",
        "q",
    ]


def test_who_somebody_is_makes_no_example_unless_asked_for():
    both = [record("a:1", kind="patient"), record("a:2", kind="labs"), record("a:3")]
    assert [one["kind"] for one in fields(both)] == ["labs", "note"]
    assert [one["kind"] for one in fields(both, kinds=("labs", "patient"))] == ["patient", "labs"]


def test_sides_and_places_are_kept_and_nothing_shows():
    [one] = study_records([record("a:7", is_held_out=True, text="SECRET")], ExampleTerms())
    assert (one.is_held_out, one.place, repr(one)) == (True, "a:7", "StudyRecord(<masked>, a:7)")
