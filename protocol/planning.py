"""What a study's privacy terms leave of its signal, before anyone trains: arithmetic, no data.

    σ  noise_multiplier        C  max_grad_norm        q  sampling_rate
    n  a site's patients       T  steps of the study   d  trained parameters
    w  weights of the sites, which add up to 1

In each step of DP-SGD (Abadi et al. 2016, Algorithm 1) a site's mean clipped gradient, at most C
long, gets noise of σC/(qn) per coordinate, about σC√d/(qn) long. Over T steps the signal adds up to
at most TC, the noise, drawn anew each time, to √T of a step's. The ratio of noise to signal is so

    one step   σ√d/(qn)            the study   ρ = σ√d/(qn√T)            several sites   √Σ(wρ)²

C and the learning rate cancel. ρ is a floor: the signal is C only if every patient is clipped and
all pull the same way, and they do not. It says how much of the *length* of what was learned is
noise, ρ²/(1 + ρ²) of its square; a model may live with more, where the task needs few of the d
directions. Two thresholds, by that share:

    ρ ≤ 1/3    clear     a tenth or less is noise
    ρ ≤ 1      noisy
    above      drowned   over half is noise, even if every patient pulled the same way

What the project's own private runs show agrees: with 51 diseases of ``rare_disease_fed6``, ρ from
0.09 to 0.64 made no difference (top-1 0.42) and 1.6 lost a third of it (0.27); with the demo's
synthetic hospitals, 0.56 lost a fifth (0.41 against 0.51 at 0.11).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from huizhen.protocol.accounting import Spend, calibrate, epsilon
from huizhen.protocol.errors import ConfigError
from huizhen.protocol.mechanism import patients_bound
from huizhen.protocol.strategy_terms import Weights, shares_of
from huizhen.protocol.study import Study
from huizhen.protocol.study_terms import PrivacyTerms

Verdict = Literal["clear", "noisy", "drowned"]
CLEAR, DROWNED = 1 / 3, 1.0
_ROUNDS_SHOWN, _SIZES_SHOWN = 40, 9  # points of the two curves


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a study asks for, as far as its noise depends on it.

    Raises:
        ConfigError: a value is out of range.
    """

    epsilon: float
    delta: float
    rounds: int
    steps_per_round: int
    parameters: int
    # d: everything that is trained, heads too
    sampling_rate: float = 1.0
    expected_batch: float | None = None
    # patients, in place of sampling_rate: each site's rate is expected_batch / n, at most 1
    batch_cap: int | None = None
    max_grad_norm: float = 1.0
    weights: Weights = "equal"

    def __post_init__(self) -> None:
        for name in ("epsilon", "delta", "sampling_rate", "expected_batch", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}, expected more than 0")
        for name in ("rounds", "steps_per_round", "parameters", "batch_cap"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, expected at least 1")
        if self.sampling_rate > 1:
            raise ConfigError(f"sampling_rate is {self.sampling_rate}, expected at most 1")
        if self.delta >= 1:
            raise ConfigError(f"delta is {self.delta}, expected less than 1")

    @property
    def steps(self) -> int:
        """T."""
        return self.rounds * self.steps_per_round

    def rate(self, patients: int) -> float:
        """Return q of a site."""
        if self.expected_batch is None:
            return self.sampling_rate
        return min(1.0, self.expected_batch / patients)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteOutlook:
    """What one site's updates will hold."""

    name: str
    patients: int
    sampling_rate: float
    noise_multiplier: float
    noise_per_coordinate: float
    # of the mean gradient of a step, in the units of max_grad_norm
    step_ratio: float
    study_ratio: float
    verdict: Verdict
    patients_not_drowned: int | None
    # the fewest at the same sampling rate; None where delta would have to be smaller
    patients_clear: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a study's terms come to."""

    terms: Terms
    sites: tuple[SiteOutlook, ...]
    step_ratio: float
    # of the mean over the sites
    study_ratio: float
    verdict: Verdict
    epsilon_after: tuple[tuple[int, float], ...]
    # round and ε, of the smallest site
    epsilon_of_sites: dict[str, tuple[tuple[int, float], ...]]
    # by site: round and ε after the first round, each quarter of the rounds and the last
    ratio_of_patients: tuple[tuple[int, float], ...]
    # number of patients and study_ratio that a site of these terms would have


def terms_of(study: Study, parameters: int) -> Terms:
    """Return the terms of a study.

    Raises:
        ConfigError: the study is not private.
    """
    if not study.is_private:
        raise ConfigError("[privacy] unit is 'none', a plan needs 'patient' or 'record'")
    privacy, norm = study.privacy, study.privacy.max_grad_norm
    return Terms(
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        rounds=study.rounds.count,
        steps_per_round=study.rounds.local_steps,
        parameters=parameters,
        sampling_rate=privacy.sampling_rate,
        batch_cap=privacy.batch_cap,
        max_grad_norm=1.0 if norm == "auto" else norm,
        weights=study.strategy.weights,
    )


def plan(sites: Mapping[str, int], terms: Terms) -> Plan:
    """Return what the terms come to.

    Args:
        sites: the public number of patients of each site.
        terms: what the study asks for.

    Raises:
        ConfigError: a site has no patients, δ lets a whole patient out, the batch cap is smaller
            than a study allows, or no noise suffices.
        PrivacyError: the accountant cannot certify the terms.
    """
    if not sites:
        raise ConfigError("there are no sites, expected at least one")
    outlooks = tuple(_outlook(name, patients, sites, terms) for name, patients in sites.items())
    _check_cap(outlooks, terms)
    smallest = min(outlooks, key=lambda site: site.patients)
    study_ratio = _together(outlooks, terms)
    shown = _spread(terms.rounds, _ROUNDS_SHOWN)
    milestones = sorted({1, *_spread(terms.rounds, 4)})
    return Plan(
        terms=terms,
        sites=outlooks,
        step_ratio=study_ratio * math.sqrt(terms.steps),
        study_ratio=study_ratio,
        verdict=verdict_of(study_ratio),
        epsilon_after=_epsilon_after(shown, smallest.patients, sites, terms),
        epsilon_of_sites={
            site.name: _epsilon_after(milestones, site.patients, sites, terms) for site in outlooks
        },
        ratio_of_patients=tuple(_ratio_of_patients(sites, terms)),
    )


def study_ratio_of(sites: Mapping[str, int], terms: Terms) -> float:
    """Return the ratio of noise to signal of the mean over the sites, over the whole study.

    Raises:
        ConfigError: as ``plan``.
        PrivacyError: as ``plan``.
    """
    outlooks = [_outlook(name, patients, sites, terms) for name, patients in sites.items()]
    return _together(outlooks, terms)


def verdict_of(study_ratio: float) -> Verdict:
    """Return what a ratio over the whole study means; the thresholds are this module's."""
    return "clear" if study_ratio <= CLEAR else "noisy" if study_ratio <= DROWNED else "drowned"


def _outlook(name: str, patients: int, sites: Mapping[str, int], terms: Terms) -> SiteOutlook:
    if patients < 1:
        raise ConfigError(f"{name} has {patients} patients, expected at least 1")
    if terms.delta * patients >= 1:
        raise ConfigError(
            f"delta is {terms.delta:g}, {name} has {patients} patients: "
            f"it must be under {1 / patients:.2g}"
        )
    spend = _spend(patients, sites, terms)
    sigma, rate = spend.noise_multiplier, spend.sampling_rate
    noise = sigma / (rate * patients)
    ratio = noise * math.sqrt(terms.parameters / terms.steps)
    return SiteOutlook(
        name=name,
        patients=patients,
        sampling_rate=rate,
        noise_multiplier=sigma,
        noise_per_coordinate=noise * terms.max_grad_norm,
        step_ratio=noise * math.sqrt(terms.parameters),
        study_ratio=ratio,
        verdict=verdict_of(ratio),
        patients_not_drowned=_enough(patients * ratio / DROWNED, terms),
        patients_clear=_enough(patients * ratio / CLEAR, terms),
    )


def _check_cap(sites: Sequence[SiteOutlook], terms: Terms) -> None:
    """Refuse a batch cap that a study would refuse."""
    for site in sites:
        least = PrivacyTerms(sampling_rate=site.sampling_rate).least_batch_cap(site.patients)
        if terms.batch_cap is not None and terms.batch_cap < least:
            raise ConfigError(
                f"batch_cap is {terms.batch_cap}, {site.name} has {site.patients} patients: "
                f"it must be at least {least}"
            )


def _spend(patients: int, sites: Mapping[str, int], terms: Terms) -> Spend:
    """Return a site's spend of the whole study, calibrated for all its rounds."""
    rate, cap = terms.rate(patients), terms.batch_cap
    bound = None if cap is None else max(map(patients_bound, sites.values()))
    sigma = calibrate(
        terms.epsilon, terms.delta, rate, terms.steps, batch_cap=cap, patients_bound=bound
    )
    return Spend(
        noise_multiplier=sigma,
        sampling_rate=rate,
        steps=terms.steps,
        batch_cap=cap,
        patients_bound=bound,
    )


def _enough(patients: float, terms: Terms) -> int | None:
    """Return a number of patients rounded up, if δ allows so many."""
    found = math.ceil(patients)
    return found if terms.delta * found < 1 else None


def _together(outlooks: Sequence[SiteOutlook], terms: Terms) -> float:
    """Return the ratio over the study of the weighted mean of the sites' updates."""
    shares = shares_of(terms.weights, {site.name: site.patients for site in outlooks})
    return math.hypot(*(shares[site.name] * site.study_ratio for site in outlooks))


def _spread(rounds: int, points: int) -> list[int]:
    """Return at most so many rounds, evenly spread up to the last."""
    points = min(rounds, points)
    return sorted({math.ceil(rounds * (i + 1) / points) for i in range(points)})


def _epsilon_after(
    after: Sequence[int], patients: int, sites: Mapping[str, int], terms: Terms
) -> tuple[tuple[int, float], ...]:
    """Return round and ε of a site, after each of these rounds."""
    spend = replace(_spend(patients, sites, terms), steps=terms.steps_per_round)
    return tuple((round, epsilon([spend.times(round)], terms.delta)) for round in after)


def _ratio_of_patients(sites: Mapping[str, int], terms: Terms) -> Iterator[tuple[int, float]]:
    """Return patients and ratio, from a third of the smallest site to three times the largest."""
    low, high = max(min(sites.values()) / 3, 1), 3 * max(sites.values())
    for i in range(_SIZES_SHOWN):
        patients = round(low * (high / low) ** (i / (_SIZES_SHOWN - 1)))
        if terms.delta * patients < 1:
            yield patients, _outlook("a site", patients, sites, terms).study_ratio
