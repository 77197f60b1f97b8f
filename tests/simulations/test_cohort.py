"""The cohort is what its docstring says: deterministic, skewed, and true to the frequencies."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
from scipy.stats import binom

from huizhen.protocol.errors import ConfigError, StorageError
from huizhen.simulations import cohort, hpo
from huizhen.simulations.cohort import make_cohort, write_cohort


@pytest.fixture(scope="module")
def records():
    return make_cohort(seed=11)


@pytest.fixture(scope="module")
def diseases():
    return {d.id: d for d in hpo.read_diseases()}


def patients_of(records, key):
    found = defaultdict(set)
    for record in records:
        found[record[key]].add(record["patient"])
    return found


def test_the_same_seed_writes_the_same_bytes_in_another_process(tmp_path):
    here = write_cohort(tmp_path / "here.jsonl", seed=7, patients=700)
    code = (
        "import sys, pathlib; from huizhen.simulations.cohort import write_cohort; "
        "write_cohort(pathlib.Path(sys.argv[1]), seed=int(sys.argv[2]), patients=700)"
    )
    digests = [hashlib.sha256(here.read_bytes()).hexdigest()]
    for seed, name, hashing in (("7", "same", "1"), ("8", "other", "1")):
        there = tmp_path / name
        subprocess.run(  # noqa: S603
            [sys.executable, "-c", code, str(there), seed],
            check=True,
            env=os.environ | {"PYTHONHASHSEED": hashing},
        )
        digests.append(hashlib.sha256(there.read_bytes()).hexdigest())
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_written_lines_are_the_records_and_nothing_else_is_left(tmp_path, records):
    path = write_cohort(tmp_path / "new" / "cohort.jsonl", seed=11)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == records
    assert list(path.parent.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write_cohort(tmp_path / "file" / "cohort.jsonl", seed=1)


def test_no_patient_is_in_both_splits_or_in_two_hospitals(records):
    for key in ("split", "site"):
        groups = list(patients_of(records, key).values())
        assert sum(map(len, groups)) == len(set().union(*groups)) == 900


def test_hospitals_are_skewed_in_size_as_stated(records):
    assert set(patients_of(records, "site")) == {f"hospital-{c}" for c in "abcdef"}
    sizes = [len(p) for _, p in sorted(patients_of(records, "site").items())]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] / sizes[-1] == pytest.approx(5, rel=0.02)
    train = patients_of([r for r in records if r["split"] == "train"], "site")
    assert min(map(len, train.values())) >= 30
    assert sum(map(len, train.values())) / 900 == pytest.approx(0.72, abs=0.005)


def test_hospitals_are_skewed_in_diseases_and_every_disease_can_be_learnt(records):
    label_of = {r["patient"]: r["label"] for r in records}
    totals = Counter(label_of.values())
    assert len(totals) == 24
    assert set(totals.values()) == {37, 38}
    train = [r for r in records if r["split"] == "train"]
    assert {r["label"] for r in train} == set(totals)

    def distance(rows):  # total variation between a hospital's diseases and the even share
        sites = patients_of(rows, "site")
        even = 1 / len(totals)
        shares = [Counter(label_of[p] for p in patients) for patients in sites.values()]
        return np.mean(
            [sum(abs(c[label] / c.total() - even) for label in totals) / 2 for c in shares]
        )

    skewed = distance(records)
    even = make_cohort(seed=11, alpha=1e4)
    label_of = {r["patient"]: r["label"] for r in even}
    assert skewed > 0.35 > 0.25 > distance(even)


def test_every_record_is_well_formed(records):
    names = hpo.read_ontology().names
    visits = defaultdict(list)
    for r in records:
        visits[r["patient"]].append(r)
        assert r["terms"]
        assert len(r["terms"]) == len(set(r["terms"]))
        assert r["observed_labels"] == [names[t] for t in r["terms"]]
        assert r["sex"] in ("MALE", "FEMALE")
        assert 0 <= r["age_years"] < 90
    for one in visits.values():
        assert [r["visit"] for r in one] == list(range(1, len(one) + 1))
        assert len(one) <= 4
        assert len({(r["site"], r["disease"], r["label"], r["split"], r["sex"]) for r in one}) == 1
        assert [r["age_years"] for r in one] == sorted(r["age_years"] for r in one)


def test_visits_come_as_often_as_stated(records):
    last = Counter(Counter(r["patient"] for r in records).values())
    assert [last[n] / 900 for n in (1, 2, 3, 4)] == pytest.approx(cohort.VISITS, abs=0.06)


def test_the_phenotypes_of_the_cohort_follow_the_annotated_frequencies(diseases):
    # Without noise, and with all phenotypes noted, the first visit is what the patient has.
    rows = make_cohort(
        seed=3, diseases=4, patients=8000, sites=2, terms_per_visit=1e4, general_share=0,
        noise_share=0,
    )  # fmt: skip
    by_disease = defaultdict(list)
    for r in rows:
        if r["visit"] == 1:
            by_disease[r["disease"]].append(set(r["terms"]))
    tested = 0
    for disease, patients in by_disease.items():
        frequencies = diseases[disease].frequencies
        assert set().union(*patients) <= set(frequencies)
        n = len(patients)
        # A patient without any phenotype is drawn again: it lifts a share by less than this.
        empty = np.prod([1 - f for f in frequencies.values()])
        for term, share in frequencies.items():
            count = sum(term in p for p in patients)
            # A right share fails once in 5·10⁸ at n = 2000; one wrong by 0.07 never passes.
            low = binom.ppf(1e-9, n, share)
            high = binom.ppf(1 - 1e-9, n, min(1, share / (1 - empty)))
            assert low <= count <= high, (disease, term, share, count / n)
            tested += 1
    assert tested >= 4 * cohort.MIN_PHENOTYPES


def test_noise_and_general_terms_are_as_frequent_as_stated(diseases):
    rows = make_cohort(seed=5, patients=4000, general_share=0.2, noise_share=0.1)
    noted = general = foreign = 0
    for r in rows:
        own = set(diseases[r["disease"]].frequencies)
        above = {p for t in own for p in hpo.read_ontology().parents[t]} - own
        noted += len(r["terms"])
        general += sum(t in above for t in r["terms"])
        foreign += sum(t not in own | above for t in r["terms"])
    assert 0.05 < foreign / noted < 0.1  # 0.1 / 1.1, less what happens to fit
    assert 0.1 < general / noted < 0.2  # 0.2 / 1.1, less parents that the disease has too


def test_a_visit_notes_only_a_few(records):
    assert 2.2 < np.mean([len(r["terms"]) for r in records]) < 3.4


@pytest.mark.parametrize(
    ("annotations", "share"),
    [
        (["HP:0040281"], 0.895),
        (["HP:0040282"], 0.545),
        (["HP:0040285"], 0.0),
        (["12.5%"], 0.125),
        (["3/8"], 0.375),
        (["2/5", "3/5"], 0.5),
        (["1/1"], None),
        (["1/2", "2/3"], 0.6),
        ([""], None),
        (["30%", "7/10"], 0.5),
        (["0/11"], 0.0),
    ],
)
def test_annotations_become_a_frequency(annotations, share):
    assert hpo.frequency_of(annotations) == (None if share is None else pytest.approx(share))


def test_known_annotations_are_read_from_the_file(diseases):
    # Marfan syndrome, OMIM:154700: read off phenotype.hpoa by hand.
    marfan = diseases["OMIM:154700"]
    assert marfan.name == "Marfan syndrome"
    assert "HP:0002616" in marfan.frequencies  # aortic root aneurysm
    assert not marfan.is_x_linked_recessive


def test_chosen_diseases_qualify_and_come_in_families(diseases):
    chosen = cohort.choose_diseases(24, np.random.default_rng(2))
    assert len({d.id for d in chosen}) == 24
    assert all(d.known >= cohort.MIN_PHENOTYPES for d in chosen)
    system_of = {d.id: s for s, members in cohort._by_system().items() for d in members}
    families = [chosen[i : i + 4] for i in range(0, 24, 4)]
    systems = [{system_of[d.id] for d in family} for family in families]
    assert all(len(s) == 1 for s in systems)
    assert len(set.union(*systems)) == 6
    within = [cohort._similarity(f[0], d) for f in families for d in f[1:]]
    across = [cohort._similarity(f[0], g[0]) for f in families for g in families if f is not g]
    assert min(within) > np.median(across)
    assert np.median(within) > 2 * np.median(across)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"patients": 300}, "smallest hospital"),
        ({"sites": 0}, "1 to 26 sites"),
        ({"alpha": 0}, "alpha"),
        ({"test_share": 1.0}, "test_share"),
        ({"diseases": 2000, "patients": 90000}, "ask less"),
    ],
)
def test_impossible_cohorts_are_refused(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        make_cohort(seed=1, **kwargs)


def test_the_notice_names_the_ontology_and_the_release_in_the_file():
    assert "Human Phenotype Ontology" in hpo.HPO_NOTICE
    assert "2025-01-16" in hpo.HPO_NOTICE
