"""Noise against signal: by hand, against noise that is drawn, and at the thresholds."""

from itertools import pairwise
from math import sqrt

import numpy as np
import pytest

from huizhen.protocol.accounting import Spend, epsilon
from huizhen.protocol.errors import ConfigError
from huizhen.protocol.mechanism import Mechanism
from huizhen.protocol.planning import Terms, plan, study_ratio_of, terms_of, verdict_of

TERMS = Terms(
    epsilon=6.0,
    delta=1e-5,
    rounds=3,
    steps_per_round=4,
    parameters=3600,
    sampling_rate=0.5,
    max_grad_norm=0.7,
)
SITES = {"north": 30, "south": 120, "west": 250}


def with_terms(**changes):
    values = {name: getattr(TERMS, name) for name in Terms.__dataclass_fields__}
    return Terms(**values | changes)


def test_the_ratios_are_those_of_the_formulas():
    found = plan(SITES, TERMS)
    assert [site.name for site in found.sites] == ["north", "south", "west"]
    for site, n in zip(found.sites, (30, 120, 250), strict=True):
        sigma = site.noise_multiplier
        assert (site.patients, site.sampling_rate) == (n, 0.5)
        assert site.noise_per_coordinate == pytest.approx(sigma * 0.7 / (0.5 * n))
        assert site.step_ratio == pytest.approx(sigma * 60 / (0.5 * n))  # √3600
        assert site.study_ratio == pytest.approx(sigma * 60 / (0.5 * n * sqrt(12)))


@pytest.mark.parametrize("weights", ["equal", "public"])
def test_noise_that_is_drawn_has_the_planned_length(weights):
    found = plan(SITES, with_terms(weights=weights))
    rng = np.random.default_rng(3)
    total = sum(SITES.values())
    share = {s: n / total if weights == "public" else 1 / 3 for s, n in SITES.items()}
    steps = np.zeros((12, 3600))  # T, d: the noise of the mean over the sites, in each step
    for site in found.sites:
        own = rng.normal(0, site.noise_per_coordinate, (12, 3600))
        alone = np.linalg.norm(own.sum(axis=0)) / (12 * 0.7)  # the signal: 12 steps of length C
        assert alone == pytest.approx(site.study_ratio, rel=0.1)
        steps += share[site.name] * own
    # A mean of 3,600 squares is off by 5 % in one case of 20; the seed is fixed.
    assert np.linalg.norm(steps, axis=1).mean() / 0.7 == pytest.approx(found.step_ratio, rel=0.03)
    study = np.linalg.norm(steps.sum(axis=0)) / (12 * 0.7)
    assert study == pytest.approx(found.study_ratio, rel=0.1)


def test_the_noise_spends_what_was_agreed_and_no_more():
    found = plan(SITES, TERMS)
    rounds, spent = zip(*found.epsilon_after, strict=True)
    assert rounds == (1, 2, 3)
    assert all(a < b for a, b in pairwise(spent))
    assert 0.998 * 6 < spent[-1] <= 6
    sigma = found.sites[0].noise_multiplier
    two_rounds = Spend(noise_multiplier=sigma, sampling_rate=0.5, steps=8)
    assert spent[1] == epsilon([two_rounds], 1e-5)


def test_of_many_rounds_some_are_shown_and_always_the_last():
    shown = [round for round, _ in plan({"a": 50}, with_terms(rounds=101)).epsilon_after]
    assert len(shown) == 40
    assert shown[-1] == 101
    assert all(1 <= b - a <= 3 for a, b in pairwise(shown))


def test_each_site_is_told_what_it_has_spent_after_some_rounds():
    terms = with_terms(rounds=10, sampling_rate=1.0, expected_batch=25)
    found = plan(SITES, terms)
    assert list(found.epsilon_of_sites) == list(SITES)
    for site in found.sites:
        points = found.epsilon_of_sites[site.name]
        assert [round for round, _ in points] == [1, 3, 5, 8, 10]
        step = Spend(
            noise_multiplier=site.noise_multiplier, sampling_rate=site.sampling_rate, steps=1
        )
        assert points == tuple((r, epsilon([step.times(4 * r)], 1e-5)) for r, _ in points)
    assert len({points[0] for points in found.epsilon_of_sites.values()}) == 3


@pytest.mark.parametrize(
    ("rounds", "shown"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 3, 4]), (101, [1, 26, 51, 76, 101])]
)
def test_the_rounds_told_are_the_first_the_quarters_and_the_last(rounds, shown):
    assert [r for r, _ in plan({"a": 50}, with_terms(rounds=rounds)).epsilon_of_sites["a"]] == shown


def test_a_cap_that_a_study_would_refuse_is_refused():
    # 250 patients at 0.5: 125 + 4·√125 = 169.7
    plan(SITES, with_terms(batch_cap=170))
    with pytest.raises(ConfigError, match=r"batch_cap is 169, west has 250 patients: .* least 170"):
        plan(SITES, with_terms(batch_cap=169))


def test_an_expected_batch_gives_each_site_its_own_rate_and_noise():
    found = plan(SITES, with_terms(sampling_rate=1.0, expected_batch=60))
    assert [site.sampling_rate for site in found.sites] == [1.0, 0.5, 0.24]
    assert found.sites[1].noise_multiplier == plan(SITES, TERMS).sites[1].noise_multiplier
    assert found.sites[0].noise_multiplier > found.sites[2].noise_multiplier


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [(0.0, "clear"), (1 / 3, "clear"), (0.34, "noisy"), (1.0, "noisy"), (1.01, "drowned")],
)
def test_the_thresholds(ratio, verdict):
    assert verdict_of(ratio) == verdict


def test_so_many_patients_are_just_enough():
    site = plan({"small": 30}, TERMS).sites[0]
    assert site.verdict == "drowned"
    for enough, before, after in (
        (site.patients_not_drowned, "drowned", "noisy"),
        (site.patients_clear, "noisy", "clear"),
    ):
        assert enough is not None
        assert plan({"larger": enough}, TERMS).sites[0].verdict == after
        assert plan({"larger": enough - 1}, TERMS).sites[0].verdict == before


def test_no_number_of_patients_is_named_that_delta_forbids():
    site = plan({"small": 9}, with_terms(delta=0.01, epsilon=0.5)).sites[0]
    assert (site.patients_not_drowned, site.patients_clear) == (None, None)


def test_the_curve_runs_through_the_sites():
    found = plan({"a": 81}, TERMS)
    sizes, ratios = zip(*found.ratio_of_patients, strict=True)
    assert (sizes[0], sizes[-1]) == (27, 243)
    assert 81 in sizes
    assert ratios[sizes.index(81)] == found.sites[0].study_ratio
    assert all(a > b for a, b in pairwise(ratios))


def test_one_site_is_together_with_itself():
    found = plan({"a": 81}, TERMS)
    assert found.study_ratio == pytest.approx(found.sites[0].study_ratio)
    assert found.step_ratio == pytest.approx(found.sites[0].step_ratio)
    assert study_ratio_of({"a": 81}, TERMS) == found.study_ratio


def test_equal_weights_let_the_smallest_site_blur_the_mean():
    equal, public = (plan(SITES, with_terms(weights=w)) for w in ("equal", "public"))
    assert equal.study_ratio > 2 * public.study_ratio
    assert [s.study_ratio for s in equal.sites] == [s.study_ratio for s in public.sites]


# The runs of README and LOG.md that the module's docstring appeals to.
@pytest.mark.parametrize(
    ("sizes", "parameters", "epsilon", "delta", "rounds", "ratio"),
    [
        ((350, 260, 230, 200, 120, 96), 47_607, 1.0, 1e-5, 20, 1.63),
        ((350, 260, 230, 200, 120, 96), 47_607, 3.0, 1e-5, 20, 0.644),
        ((350, 260, 230, 200, 120, 96), 47_607, 100.0, 1e-5, 20, 0.087),
        ((210, 150, 110, 79, 58, 42), 37_200, 8.0, 1e-4, 10, 0.564),
    ],
)
def test_the_measured_runs_had_the_ratios_that_are_named(
    sizes, parameters, epsilon, delta, rounds, ratio
):
    terms = Terms(
        epsilon=epsilon,
        delta=delta,
        rounds=rounds,
        steps_per_round=4,
        parameters=parameters,
        sampling_rate=0.2,
        weights="public",
    )
    assert study_ratio_of({str(n): n for n in sizes}, terms) == pytest.approx(ratio, rel=0.01)


def test_a_study_gives_its_terms(make_study):
    study = make_study(
        privacy={"epsilon": 3.0, "max_grad_norm": 0.4, "sampling_rate": 0.25},
        rounds={"count": 7, "local_steps": 5},
        strategy={"weights": "public"},
    )
    assert terms_of(study, 123) == Terms(
        epsilon=3.0,
        delta=1e-3,
        rounds=7,
        steps_per_round=5,
        parameters=123,
        sampling_rate=0.25,
        max_grad_norm=0.4,
        weights="public",
    )


def test_a_study_is_planned_with_the_noise_it_will_use(make_study):
    sites = {"A": {"patients_public": 40}, "B": {"patients_public": 30}}
    free = make_study(privacy={"delta": 1e-8}, sites=sites)
    capped = make_study(
        privacy={"delta": 1e-8, "batch_cap": 38, "max_grad_norm": "auto"}, sites=sites
    )
    sigmas = []
    for study in (free, capped):
        found = plan({"A": 40, "B": 30}, terms_of(study, 123))
        sigmas.append(found.sites[0].noise_multiplier)
        assert found.sites[1].noise_multiplier == Mechanism.of(study).noise_multiplier == sigmas[-1]
    assert sigmas[1] > sigmas[0]
    assert terms_of(capped, 123).max_grad_norm == 1.0


def test_a_study_without_privacy_has_no_plan(make_study):
    with pytest.raises(ConfigError, match="unit is 'none', a plan needs 'patient' or 'record'"):
        terms_of(make_study(privacy={"unit": "none"}), 123)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"delta": 0.0}, "delta is 0.0"),
        ({"delta": 1.0}, "delta is 1.0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"steps_per_round": -1}, "steps_per_round is -1"),
        ({"parameters": 0}, "parameters is 0"),
        ({"sampling_rate": 0.0}, "sampling_rate is 0.0"),
        ({"sampling_rate": 1.1}, "sampling_rate is 1.1"),
        ({"expected_batch": 0.0}, "expected_batch is 0.0"),
        ({"batch_cap": 0}, "batch_cap is 0"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm is inf"),
    ],
)
def test_terms_out_of_range_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        with_terms(**change)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({}, "there are no sites"),
        ({"a": 0}, "a has 0 patients"),
        ({"a": 100_000}, r"delta is 1e-05, a has 100000 patients: it must be under 1e-05"),
    ],
)
def test_sites_that_cannot_be_planned_are_refused(sites, message):
    with pytest.raises(ConfigError, match=message):
        plan(sites, TERMS)
