"""Who holds which record: groups and patients stay whole, and nobody is in training and in test."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from huizhen.protocol.errors import ConfigError, GovernanceError
from huizhen.simulations.experiment import PartitionTerms, SimulationTerms, SplitTerms
from huizhen.simulations.partition import read_sites


@pytest.fixture
def read(tmp_path):
    def read(entries, label="disease", **terms):
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in entries))
        settings = {"data": str(path), "patient": "id"}
        if "partition" not in terms:
            settings["site"] = "hospital"
        return read_sites(SimulationTerms(**(settings | terms)), label)

    return read


def patients(records):
    return {record.patient for record in records}


def test_the_fields_say_who_holds_what_and_what_is_kept_for_the_test(read, cohort):
    sites = read(cohort())
    assert list(sites) == ["North", "South"]
    for name, site in sites.items():
        assert patients(site.train) == {f"{name}-{i}" for i in range(9)}
        assert patients(site.test) == {f"{name}-{i}" for i in range(9, 12)}
        assert site.patients() == 9
    assert sum(len(s.train) + len(s.test) for s in sites.values()) == len(cohort())


def test_sites_that_are_numbers_come_in_the_order_of_numbers(read, cohort):
    names = ["10", "9", "2", "b", "²", "9" * 30]
    entries = [one | {"hospital": name} for one in cohort() for name in names]
    assert list(read(entries)) == ["2", "9", "10", "9" * 30, "b", "²"]


@pytest.mark.parametrize("share", [0.2, 0.3, 0.5])
def test_a_drawn_split_keeps_groups_whole_even_over_sites(read, cohort, share):
    entries = [one | {"pmid": one["id"].split("-")[1]} for one in cohort(30, 0)]
    sites = read(entries, split=SplitTerms(by="pmid", test=share)).values()
    train = {r.fields["pmid"] for site in sites for r in site.train}
    test = {r.fields["pmid"] for site in sites for r in site.test}
    assert not train & test  # one publication has cases at several sites
    assert len(test) == round(share * 30)
    assert len(train) + len(test) == 30


def test_a_drawn_split_follows_from_its_seed_and_not_from_the_order_of_records(read, cohort):
    terms = {"split": SplitTerms(by="id", seed=4)}
    first, again = read(cohort(), **terms), read(cohort()[::-1], **terms)
    other = read(cohort(), split=SplitTerms(by="id", seed=5))
    tests = [{n: patients(s.test) for n, s in sites.items()} for sites in (first, again, other)]
    assert tests[0] == tests[1] != tests[2]


def test_a_patient_in_training_and_in_test_is_refused(read, cohort):
    entries = cohort()
    entries.append(entries[0] | {"split": "test"})
    with pytest.raises(GovernanceError, match="1 patients stand in training and in test"):
        read(entries)
    entries = [one | {"pmid": str(i)} for i, one in enumerate(cohort())]  # a patient in two papers
    with pytest.raises(GovernanceError, match="split by patient"):
        read(entries, split=SplitTerms(by="pmid", test=0.5))


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.floats(0.05, 100), st.integers(1, 12), st.integers(0, 5))
def test_a_dirichlet_partition_deals_whole_patients(read, cohort, alpha, count, seed):
    terms = PartitionTerms(kind="dirichlet", alpha=alpha, sites=count, seed=seed)
    entries = [{k: v for k, v in one.items() if k != "hospital"} for one in cohort(20, 5)]
    sites = read(entries, partition=terms)
    holders = [patients(site.train + site.test) for site in sites.values()]
    assert len(sites) <= count
    assert sum(len(held) for held in holders) == len(set.union(*holders)) == 50
    assert sum(len(s.train) + len(s.test) for s in sites.values()) == len(entries)
    again = read(entries, partition=terms)
    assert [patients(site.train) for site in again.values()] == [
        patients(site.train) for site in sites.values()
    ]


def test_a_small_alpha_skews_the_classes_and_a_large_one_does_not(read, cohort):
    def skew(alpha):
        """Return the mean share of each site's commonest class."""
        terms = PartitionTerms(kind="dirichlet", alpha=alpha, sites=4)
        shares = []
        for site in read(cohort(150, 1), partition=terms).values():
            classes = [record.fields["disease"] for record in site.train]
            shares.append(max(classes.count(c) for c in set(classes)) / len(classes))
        return sum(shares) / len(shares)

    assert skew(1000.0) < 0.45 < 0.6 < skew(0.05)


@pytest.mark.parametrize(
    ("change", "terms", "problem"),
    [
        ({"id": None}, {}, "records.jsonl:3: record has no patient id in 'id'"),
        ({"hospital": ""}, {}, "records.jsonl:3: there is no site in the field 'hospital'"),
        ({"split": "SECRET"}, {}, "records.jsonl:3: 'split' is neither 'train' nor 'test'"),
        ({}, {"site": "center"}, "records.jsonl:1: there is no site in the field 'center'"),
        ({}, {"split": "part"}, "records.jsonl:1: there is no split in the field 'part'"),
        ({}, {"split": SplitTerms(by="pmid")}, "there is no group in the field 'pmid'"),
    ],
)
def test_what_is_missing_is_named_with_its_line_and_no_content(
    read, cohort, change, terms, problem
):
    entries = cohort()
    entries[2] |= {"text": "SECRET"} | change
    with pytest.raises((ConfigError, GovernanceError), match=problem) as caught:
        read(entries, **terms)
    assert "SECRET" not in str(caught.value)


def test_data_without_records_or_without_test_records_is_refused(read, cohort):
    with pytest.raises(ConfigError, match="holds no records"):
        read([])
    with pytest.raises(ConfigError, match="no test records"):
        read(cohort(5, 0))


def test_the_same_id_at_two_sites_is_two_patients_of_the_study(read, cohort):
    entries = [one | {"id": one["id"].split("-")[1]} for one in cohort()]
    assert [site.patients() for site in read(entries).values()] == [9, 9]
