"""Advice is what planning again would give; the words say what the numbers say."""

from dataclasses import replace
from itertools import pairwise
from math import sqrt

import pytest

from huizhen.protocol.plan_advice import advise, alike, explain
from huizhen.protocol.planning import Terms, plan, study_ratio_of

TERMS = Terms(
    epsilon=6.0, delta=1e-5, rounds=6, steps_per_round=2, parameters=3600, sampling_rate=0.5
)
SITES = {"north": 30, "south": 120, "west": 250}


def advice(sites=SITES, **changes):
    return {one.lever: one for one in advise(plan(sites, replace(TERMS, **changes)))}


@pytest.mark.parametrize(
    ("lever", "change"),
    [
        ("rate", {"sampling_rate": 1.0}),
        ("fewer steps", {"rounds": 3}),
        ("more steps", {"rounds": 12}),
        ("epsilon", {"epsilon": 12.0}),
        ("parameters", {"parameters": 1800}),
        ("weights", {"weights": "public"}),
    ],
)
def test_a_lever_is_worth_what_planning_again_gives(lever, change):
    one, before = advice()[lever], study_ratio_of(SITES, TERMS)
    assert one.study_ratio == study_ratio_of(SITES, replace(TERMS, **change))
    assert one.times_less_noise == pytest.approx(before / one.study_ratio)


def test_what_is_known_in_advance():
    found = advice()
    assert found["patients"].times_less_noise == pytest.approx(2)
    assert found["sites"].times_less_noise == pytest.approx(sqrt(2))
    assert found["parameters"].times_less_noise == pytest.approx(sqrt(2))
    assert found["fewer steps"].times_less_noise < 1 < found["more steps"].times_less_noise


def test_the_best_comes_first():
    ratios = [one.study_ratio for one in advise(plan(SITES, TERMS))]
    assert all(a <= b for a, b in pairwise(ratios))


def test_an_expected_batch_grows_in_place_of_the_rate():
    found = advice(sampling_rate=1.0, expected_batch=40)
    assert found["rate"].change == "expected batch 80"
    doubled = replace(TERMS, sampling_rate=1.0, expected_batch=80)
    assert found["rate"].study_ratio == study_ratio_of(SITES, doubled)
    assert found["patients"].times_less_noise < 2  # the same batch out of more patients


def test_a_cap_grows_with_the_batch():
    found = advice(batch_cap=170)
    doubled = replace(TERMS, sampling_rate=1.0, batch_cap=340)
    assert found["rate"].study_ratio == study_ratio_of(SITES, doubled)
    assert found["patients"].times_less_noise == pytest.approx(2, rel=0.05)


def test_a_lever_at_its_end_is_left_out():
    assert "rate" not in advice(sampling_rate=1.0)
    assert "rate" not in advice(sampling_rate=1.0, expected_batch=250)
    assert "fewer steps" not in advice(rounds=1)
    assert "parameters" not in advice(parameters=1)
    assert "weights" not in advice(weights="public")
    assert "weights" not in advice({"a": 30, "b": 30})
    assert "patients" not in advice(delta=0.003)  # 500 patients would need a smaller delta


def test_sites_of_one_size_are_told_once():
    pairs = alike(plan({"a": 30, "b": 250, "c": 30}, TERMS).sites)
    assert [(site.name, count) for site, count in pairs] == [("a", 2), ("b", 1)]


def test_the_words_for_a_small_hospital_among_large_ones():
    found = plan({"small": 30, "large": 2500}, TERMS)
    small = found.sites[0]
    about_small, together, without = explain(found)
    assert about_small.startswith("small (30 patients): over the study the noise is ")
    assert f"{small.study_ratio:.1f} times as long as the longest signal" in about_small
    assert f"rate of 0.5, {small.patients_not_drowned} patients would bring" in about_small
    assert f"and {small.patients_clear} make the signal clear." in about_small
    assert together.startswith(
        f"Together (2 sites, equal weights) the noise is {found.study_ratio:.2f}"
    )
    rest = study_ratio_of({"large": 2500}, TERMS)
    assert f"Without the drowned sites it would be {rest:.2f}" in without


def test_the_share_of_noise_follows_from_the_ratio():
    [line, _] = explain(plan({"small": 30}, TERMS))
    ratio = study_ratio_of({"small": 30}, TERMS)
    share = int(100 * ratio**2 / (1 + ratio**2))
    assert 50 < share < 99
    assert f"; {share} % or more of what it sends is noise" in line


@pytest.mark.parametrize(
    ("patients", "words"),
    [
        (30, "most of what is learned is noise: change them before training"),
        (100, "Privacy will cost accuracy where the task is hard."),
        (4000, "Noise should not be what limits this study."),
    ],
)
def test_the_words_for_all_sites_together(patients, words):
    assert words in explain(plan({"a": patients, "b": patients}, TERMS))[-1]
    assert words in explain(plan({"a": patients}, TERMS))[-1]


def test_clear_sites_get_one_sentence():
    assert len(explain(plan({"a": 4000, "b": 5000}, TERMS))) == 1


def test_many_drowned_sites_are_counted():
    lines = explain(plan({f"s{n}": n for n in (10, 11, 12, 13, 14)} | {"t": 14}, TERMS))
    assert lines[3] == "3 more of the sites are drowned."


def test_a_number_of_patients_that_delta_forbids_is_not_promised():
    lines = explain(plan({"a": 9}, replace(TERMS, delta=0.01, epsilon=0.5)))
    assert "No number of patients that delta allows" in lines[0]
