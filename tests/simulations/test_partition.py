"""Who holds which record: groups and patients stay whole, and nobody is in training and in test."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from huizhen.protocol.errors import ConfigError, GovernanceError
from huizhen.simulations.baseline import with_ancestors
from huizhen.simulations.experiment import BinTerms, PartitionTerms, SimulationTerms, SplitTerms
from huizhen.simulations.partition import read_sites

NO_TERMS: list[object] = [[1250], [{"id": "HP:0001250"}], [[]], [[1250, "x"]], {"a": 1}, 7, [None]]


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
    with pytest.raises(GovernanceError, match="1 patients of site 'North' stand in train"):
        read(entries)
    entries = [one | {"pmid": str(i)} for i, one in enumerate(cohort())]  # a patient in two papers
    with pytest.raises(GovernanceError, match="split by patient"):
        read(entries, split=SplitTerms(by="pmid", test=0.5))


@settings(
    max_examples=25,
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
        ({"hospital": ["SECRET"]}, {}, "records.jsonl:3: 'hospital' is a list or a table"),
        ({"split": {"SECRET": 1}}, {}, "records.jsonl:3: 'split' is a list or a table"),
        (
            {"id": "new", "disease": ["SECRET"]},
            {"partition": PartitionTerms(kind="dirichlet", alpha=9, sites=2)},
            "records.jsonl:3: 'disease' is a list or a table",
        ),
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
    with pytest.raises(ConfigError, match=r"no test records, .*'test' in the field 'split'"):
        read(cohort(5, 0))


@pytest.mark.parametrize(("share", "held_out"), [(0.001, 0), (0.02, 0), (0.999, 24), (0.98, 24)])
def test_a_split_that_holds_out_no_group_or_all_is_refused_by_its_name(
    read, cohort, share, held_out
):
    terms = SplitTerms(by="id", test=share)
    problem = (
        rf"^\[simulation\] split holds out {held_out} of 24 groups by 'id'.* test = {share:g},"
    )
    with pytest.raises(ConfigError, match=problem):
        read(cohort(), split=terms)
    assert read(cohort(), split=SplitTerms(by="id", test=0.03))  # one of 24 is enough


def test_the_same_id_at_two_sites_is_two_patients_of_the_study(read, cohort):
    entries = [one | {"id": one["id"].split("-")[1]} for one in cohort()]
    assert [site.patients() for site in read(entries).values()] == [9, 9]


def test_sites_that_number_their_patients_alike_have_each_their_own_split(read, cohort):
    number = {"North": 0, "South": 3}  # South's patients 9 to 11 are North's 12 to 14
    entries = [
        one | {"id": int(one["id"].split("-")[1]) + number[one["hospital"]]} for one in cohort()
    ]
    sites = read(entries)
    assert patients(sites["North"].test) & patients(sites["South"].train) == {"9", "10", "11"}
    with pytest.raises(GovernanceError, match="1 patients of site 'South' stand in training and"):
        read([*entries, {**entries[-1], "split": "train"}])


def test_names_are_the_same_however_they_are_written(read, cohort):
    spelt: dict[str, list[object]] = {"North": [7, 7.0, "7", " 7 "], "South": ["8"]}
    entries = [
        one | {"hospital": (names := spelt[one["hospital"]])[i % len(names)]}
        for i, one in enumerate(cohort())
    ]
    assert list(read(entries)) == ["7", "8"]


def test_ranges_of_a_number_are_sites_and_the_rest_is_unknown(read, cohort):
    years: list[object] = [2001, "2004", 2005, 2009.5, 2010, None, "", "n/a", [1], 10**400, "nan"]
    entries = [
        one | {"id": f"{one['id']} {year!s:.9}", "year": year} for one in cohort() for year in years
    ]
    sites = read(entries, site=BinTerms(field="year", below=(2005, 2010)))
    held = {name: {str(r.fields["year"])[:9] for r in site.train} for name, site in sites.items()}
    assert held == {
        "year under 2005": {"2001", "2004"},
        "year 2005 to 2010": {"2005", "2009.5"},
        "year 2010 on": {"2010"},
        "unknown": {"None", "", "n/a", "[1]", "100000000", "nan"},
    }


def test_ranges_of_a_field_that_no_record_has_are_refused(read, cohort):
    entries = [one | {"year": 2001} for one in cohort()]
    with pytest.raises(ConfigError, match=r"site reads the field 'yaer', .*: did you mean 'year'"):
        read(entries, site=BinTerms(field="yaer", below=(2005,)))
    with pytest.raises(ConfigError, match=r"the field 'text', no record has a number in it$"):
        read(entries, site=BinTerms(field="text", below=(2005,)))


@pytest.mark.parametrize(
    ("terms", "change", "error", "problem"),
    [
        ({"ancestors": "obsrved"}, {}, ConfigError, "'obsrved', no record has it: did you mean 'o"),
        ({"ancestors": "id"}, {}, GovernanceError, "'id', the policy of the sites does not let it"),
        (
            {"ancestors": "observed", "allowed_fields": ("text", "disease")},
            {},
            GovernanceError,
            "'observed', the policy of the sites does not let it",
        ),
        *(
            ({"ancestors": "observed"}, {"observed": value}, GovernanceError, "^records.jsonl:3: ")
            for value in NO_TERMS
        ),
    ],
)
def test_a_field_that_the_baseline_may_not_or_cannot_read_is_refused(
    read, cohort, terms, change, error, problem
):
    entries = [one | {"observed": ["HP:0001250"]} for one in cohort()]
    entries[2] |= change
    with pytest.raises(error, match=problem):
        read(entries, **terms)


@pytest.mark.parametrize(
    "value", [["HP:0001250"], [["HP:0001250", "Seizure"]], "HP:0001250", "", None, []]
)
def test_what_the_baseline_reads_as_hpo_terms_is_let_pass(read, cohort, value):
    entries = [one | {"observed": ["HP:0001250"]} for one in cohort()]
    entries[2] |= {"observed": value}
    del entries[3]["observed"]
    allowed = ("text", "disease", "observed")
    assert read(entries, ancestors="observed", allowed_fields=allowed)
    assert with_ancestors(entries)  # and nothing of it is an error there
