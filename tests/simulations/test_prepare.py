"""From a file to examples: public sizes, labels, base digests, and what a site must have."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.protocol.errors import ConfigError, GovernanceError
from huizhen.simulations.experiment import load_experiment
from huizhen.simulations.partition import read_sites
from huizhen.simulations.prepare import complete_study, prepare, round_two_digits, subset

DROPPED = "De-identification dropped the fields hospital, id, split."


TABULAR = """
[study]
name = "risk"
[task]
kind = "tabular"
features = {{age = [20, 70], sex = [0, 1]}}
label = "sick"
[strategy]
name = "fedavg"
[privacy]
delta = 1e-3
[simulation]
data = {data}
site = "hospital"
patient = "id"
"""


@pytest.fixture
def prepared_numbers(tmp_path, home):
    """Return what a tabular experiment gives on rows of hospital, split, age, sex and sick."""

    def make(rows, *changes, more=""):
        fields = ("hospital", "split", "age", "sex", "sick")
        records = [
            {"id": f"p{i}", **dict(zip(fields, row, strict=True))} for i, row in enumerate(rows)
        ]
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(f"{json.dumps(one)}\n" for one in records), encoding="utf-8")
        text = TABULAR.format(data=json.dumps(str(data)))
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "tabular.toml"
        path.write_text(text + more, encoding="utf-8")
        experiment = load_experiment(path)
        sites = read_sites(experiment.simulation, experiment.study.task.label)
        study = complete_study(experiment, sites, home)
        return prepare(experiment, study, sites, home=home, say=lambda text: None)

    return make


NUMBERS = [
    *[("North", "train", 20 + 5 * i, i % 2, "no" if i < 4 else "yes") for i in range(8)],
    *[("South", "train", 30 + 5 * i, i % 2, "no" if i < 2 else "yes") for i in range(6)],
    ("North", "test", 71, 1, "yes"),
    ("South", "test", 44, 0, "no"),
]


@pytest.fixture
def prepared(experiment_file, home):
    """Return what an experiment on changed records gives."""

    def make(*changes, records=None, more="", say=lambda text: None):
        experiment = load_experiment(experiment_file(*changes, records=records, more=more))
        sites = read_sites(experiment.simulation, experiment.study.task.label)
        study = complete_study(experiment, sites, home)
        return prepare(experiment, study, sites, home=home, say=say)

    return make


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0, 1), (1, 1), (9, 9), (96, 96), (104, 100), (1259, 1300), (995, 1000), (123_456, 120_000)],
)
def test_a_public_size_has_two_digits(number, expected):
    assert round_two_digits(number) == expected


@given(st.integers(1, 10**7))
def test_a_public_size_is_near_the_true_one(number):
    assert abs(round_two_digits(number) - number) <= 0.05 * number


def test_the_study_is_completed_from_data_and_base(prepared, tiny):
    found = prepared(more="[sites.South]\npatients_public = 20\n")
    study = found.study
    assert {name: terms.patients_public for name, terms in study.sites.items()} == {
        "North": 9,
        "South": 20,
    }
    assert study.task.labels == ("asthma", "epilepsy", "measles")
    assert study.base.digests == dict(tiny.digests)
    assert len(found.train["North"].ids) == len(found.records["North"].train)
    assert found.train["North"].num_patients == 9
    assert found.test["South"].num_patients == 3
    assert found.notes == (DROPPED,)


def test_labels_come_from_the_training_records_alone(prepared, cohort):
    records = cohort()
    unseen = [i for i, one in enumerate(records) if one["split"] == "test"][:2]
    for i in unseen:
        records[i]["disease"] = "plague"
    found = prepared(records=records)
    assert "plague" not in found.study.task.labels
    assert found.notes == (
        "2 test records have a class that the study does not list: each counts as an error.",
        DROPPED,
    )
    assert sum(label == -1 for label in found.test["North"].labels) == 2


def test_cut_texts_are_counted(prepared, cohort):
    records = cohort()
    for one in records[:3]:
        one["text"] = "fever " * 30
    assert prepared(records=records).notes == (
        f"3 of {len(records)} texts were longer than max_tokens = 48 and cut.",
        DROPPED,
    )


@pytest.mark.parametrize("left", [0, 1])
def test_a_site_with_no_or_one_patient_is_refused(prepared, cohort, left):
    keep = [f"North-{i}" for i in (*range(left), 9)]
    records = [one for one in cohort() if one["hospital"] == "South" or one["id"] in keep]
    with pytest.raises(GovernanceError, match=f"^site 'North' has {left} training patient"):
        prepared(records=records)


def test_a_site_without_test_records_takes_part(prepared, cohort):
    records = [one for one in cohort() if (one["hospital"], one["split"]) != ("North", "test")]
    found = prepared(records=records)
    assert not found.test["North"].ids
    assert found.train["North"].ids


def test_a_delta_too_large_for_a_site_is_refused_with_its_name(prepared):
    with pytest.raises(ConfigError, match=r"delta is 0.2, site 'North' has about 9 patients"):
        prepared(("delta = 1e-3", "delta = 0.2"))


def test_a_site_of_the_file_that_the_data_does_not_have_is_refused(prepared):
    with pytest.raises(ConfigError, match=r"\[sites.West\] is not in the data, sites are North, S"):
        prepared(more="[sites.West]\npatients_public = 20\n")


def test_another_base_than_agreed_is_refused(prepared):
    wrong = 'name = "tiny"\n[base.digests]\n"model.safetensors" = "00"'
    with pytest.raises(ConfigError, match=r"'model.safetensors' has digest"):
        prepared(('[base]\nname = "tiny"', f"[base]\n{wrong}"))


def test_one_class_is_no_classification(prepared, cohort):
    records = [one | {"disease": "measles"} for one in cohort()]
    with pytest.raises(ConfigError, match=r"'disease' has 1 classes"):
        prepared(records=records)
    with pytest.raises(ConfigError, match=r"'illness' has 0 classes"):
        prepared(('label = "disease"', 'label = "illness"'))


def test_a_class_without_its_text_is_refused(prepared, cohort):
    records = [one | {"words": f"about {one['disease']}"} for one in cohort()]
    named = ('label = "disease"', 'label = "disease"\nlabel_text = "words"')
    found = prepared(named, records=records)
    assert found.study.task.label_texts == ("about asthma", "about epilepsy", "about measles")
    for one in records:
        if one["disease"] == "epilepsy":
            one["words"] = ""
    with pytest.raises(ConfigError, match=r"'words' is empty for class 'epilepsy'"):
        prepared(named, records=records)


def test_a_site_none_of_whose_labels_the_study_lists_is_refused(prepared, cohort):
    records = [
        one | {"disease": "plague"} if one["hospital"] == "North" else one for one in cohort()
    ]
    listed = ('label = "disease"', 'label = "disease"\nlabels = ["asthma", "epilepsy", "measles"]')
    with pytest.raises(GovernanceError, match=r"^site 'North' has 0 training patients"):
        prepared(listed, records=records)


def test_training_records_of_an_unlisted_class_are_counted(prepared, cohort):
    listed = ('label = "disease"', 'label = "disease"\nlabels = ["asthma", "epilepsy"]')
    found = prepared(listed)
    left = sum(len(examples.ids) for examples in found.train.values())
    out = sum(len(site.train) for site in found.records.values()) - left
    assert out > 0
    assert any(note.startswith(f"{out} training records") for note in found.notes)


def test_a_subset_takes_whole_patients(prepared):
    examples = prepared().train["North"]
    half = subset(examples, 0.5, seed=1)
    assert half.num_patients == 4
    for patient in set(half.patients):
        assert half.patients.count(patient) == examples.patients.count(patient)
    assert subset(examples, 0.5, seed=1).patients == half.patients
    assert subset(examples, 0.01, seed=1).num_patients == 2
    assert [f.name for f in dataclasses.fields(half)] == [
        f.name for f in dataclasses.fields(examples)
    ]


def test_preparing_says_what_it_does_and_shows_no_record(prepared, cohort):
    said: list[str] = []
    prepared(records=[one | {"text": f"SECRET {one['text']}"} for one in cohort()], say=said.append)
    assert said == ["reading 18 records of site North", "reading 18 records of site South"]


def test_a_tabular_study_is_completed_without_a_base(prepared_numbers):
    found = prepared_numbers(NUMBERS)
    study = found.study
    assert study.base is None
    assert study.adapter is None
    assert study.task.labels == ("no", "yes")
    assert {name: terms.patients_public for name, terms in study.sites.items()} == {
        "North": 8,
        "South": 6,
    }
    assert found.train["North"].inputs[1].tolist() == pytest.approx([-0.8, 1.0])
    assert found.notes == (
        "1 of 16 records had a feature outside its public range, moved to the edge.",
        DROPPED,
    )


def test_a_missing_number_is_refused_by_field_and_line_unless_the_study_says_otherwise(
    prepared_numbers,
):
    rows = [*NUMBERS[:3], ("North", "train", None, 0, "yes"), *NUMBERS[4:]]
    with pytest.raises(GovernanceError, match=r"^rows\.jsonl:4: 'age' is missing"):
        prepared_numbers(rows)
    middle = ('label = "sick"', 'label = "sick"\nmissing = "middle"')
    found = prepared_numbers(rows, middle)
    assert found.train["North"].inputs[3].tolist() == [0.0, -1.0]


def test_a_feature_that_no_record_has_is_named(prepared_numbers):
    with pytest.raises(ConfigError, match=r"reads the field 'agee', no record has it: did you me"):
        prepared_numbers(NUMBERS, ("age =", "agee ="))


def test_one_class_is_no_tabular_task(prepared_numbers):
    rows = [(*row[:4], "yes") for row in NUMBERS]
    with pytest.raises(ConfigError, match=r"'sick' has 1 classes"):
        prepared_numbers(rows)
    listed = ('label = "sick"', 'label = "sick"\nlabels = ["yes"]')
    with pytest.raises(ConfigError, match=r"labels has 1 classes"):
        prepared_numbers(rows, listed)


def test_records_without_the_number_of_their_site_are_counted(prepared, cohort):
    records = [one | {"year": 2001 + 8 * (one["hospital"] == "South")} for one in cohort()]
    bins = ('site = "hospital"', 'site = {field = "year", below = [2005]}')
    assert prepared(bins, records=records).notes[0].startswith("De-identification")
    lost = [one for one in records if one["id"] in ("North-0", "North-1", "South-9")]
    for one in lost:
        one["year"] = "?"
    notes = prepared(bins, records=records).notes
    assert notes[0] == f"{len(lost)} records have no number in 'year': they are the site 'unknown'."


def test_ids_that_stand_at_several_sites_are_counted(prepared, cohort):
    records = cohort()
    for one in records:
        if one["id"] in ("South-2", "South-9"):
            one["id"] = one["id"].replace("South", "North")
    assert prepared(records=records).notes[0] == (
        "2 patient ids stand at several sites: if they are the same people, their epsilon adds up "
        "over those sites."
    )


def test_a_class_is_one_however_it_is_written(prepared, cohort):
    numbers = {"asthma": (1, 1.0), "epilepsy": ("2", " 2 "), "measles": ("x", "x\n")}
    records = [
        one | {"disease": numbers[one["disease"]][i % 2], "words": one["disease"]}
        for i, one in enumerate(cohort())
    ]
    found = prepared(
        ('label = "disease"', 'label = "disease"\nlabel_text = "words"'), records=records
    )
    assert found.study.task.labels == ("1", "2", "x")
    assert found.study.task.label_texts == ("asthma", "epilepsy", "measles")
    records[0]["disease"] = ["x"]
    with pytest.raises(GovernanceError, match=r"records.jsonl:1: 'disease' is a list or a table"):
        prepared(records=records)
