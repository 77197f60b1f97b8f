"""What would help a plan, by how much and at what price; and the plan in words.

Each lever is pulled alone, and the whole plan computed again, σ calibrated anew: what looks like
help for one step need not be help for the study. Fewer steps, for one, need less noise in each and
leave less signal to stand against it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from huizhen.protocol.planning import Plan, SiteOutlook, Terms, Verdict, study_ratio_of

_SITES_TOLD = 3  # of the drowned ones, by size


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One change of the terms, and what it makes of the mean over the sites."""

    lever: str
    change: str
    study_ratio: float
    times_less_noise: float
    # under 1 where the change makes things worse
    price: str


def advise(plan: Plan) -> tuple[Advice, ...]:
    """Return what each lever alone would do, the most helpful first.

    A lever that is at its end is left out, and so is one that δ does not allow.

    Raises:
        ConfigError: no noise suffices for a change.
        PrivacyError: the accountant cannot certify a change.
    """
    sites = {site.name: site.patients for site in plan.sites}
    found = []
    for lever, change, price, other_sites, terms in _changes(sites, plan.terms):
        if max(other_sites.values()) * terms.delta < 1:
            after = study_ratio_of(other_sites, terms)
            found.append(
                Advice(
                    lever=lever,
                    change=change,
                    study_ratio=after,
                    times_less_noise=plan.study_ratio / after,
                    price=price,
                )
            )
    return tuple(sorted(found, key=lambda advice: advice.study_ratio))


def alike(sites: Sequence[SiteOutlook]) -> list[tuple[SiteOutlook, int]]:
    """Return one site of each size, the smallest first, and how many there are of it."""
    sizes = sorted({site.patients for site in sites})
    same = [[site for site in sites if site.patients == size] for size in sizes]
    return [(group[0], len(group)) for group in same]


def explain(plan: Plan) -> tuple[str, ...]:
    """Return the plan's verdict in sentences: on each drowned site, then on all together."""
    drowned = [pair for pair in alike(plan.sites) if pair[0].verdict == "drowned"]
    lines = [_drowned(site, count) for site, count in drowned[:_SITES_TOLD]]
    if untold := sum(count for _, count in drowned[_SITES_TOLD:]):
        lines.append(f"{untold} more of the sites are drowned.")
    if len(plan.sites) == 1:
        return (*lines, _MEANING[plan.verdict])
    lines.append(
        f"Together ({len(plan.sites)} sites, {plan.terms.weights} weights) the noise is "
        f"{plan.study_ratio:.2f} times as long as the longest signal. {_MEANING[plan.verdict]}"
    )
    rest = {s.name: s.patients for s in plan.sites if s.verdict != "drowned"}
    if drowned and rest and (without := study_ratio_of(rest, plan.terms)) < plan.study_ratio:
        lines.append(
            f"Without the drowned sites it would be {without:.2f}: they blur the mean more than "
            "they add to it."
        )
    return tuple(lines)


_MEANING: dict[Verdict, str] = {
    "clear": "Noise should not be what limits this study.",
    "noisy": "Privacy will cost accuracy where the task is hard.",
    "drowned": "On these terms most of what is learned is noise: change them before training.",
}


def counted(count: int, name: str) -> str:
    """Return a number and what it counts, in the singular or the plural."""
    return f"{count:,} {name}" if count == 1 else f"{count:,} {name}s"


def _drowned(site: SiteOutlook, count: int) -> str:
    share = math.floor(100 * site.study_ratio**2 / (1 + site.study_ratio**2))
    level, clear = site.patients_not_drowned, site.patients_clear
    if level is None:
        enough = "No number of patients that delta allows would bring the two level."
    else:
        rate = f"At its sampling rate of {site.sampling_rate:.2g}"
        enough = f"{rate}, {level:,} patients would bring the two level"
        enough += "." if clear is None else f" and {clear:,} make the signal clear."
    like = f" and {count - 1} like it" if count > 1 else ""
    return (
        f"{site.name}{like} ({site.patients:,} patients): over the study the noise is "
        f"{site.study_ratio:.1f} times as long as the longest signal; {share} % or more of what "
        f"it sends is noise. {enough}"
    )


def _changes(
    sites: Mapping[str, int], terms: Terms
) -> Iterator[tuple[str, str, str, Mapping[str, int], Terms]]:
    """Return each lever: its name, the change and its price in words, what it leads to."""
    cap = None if terms.batch_cap is None else 2 * terms.batch_cap
    if any(terms.rate(patients) < 1 for patients in sites.values()):
        if terms.expected_batch is None:
            more = replace(terms, sampling_rate=min(1.0, 2 * terms.sampling_rate), batch_cap=cap)
            words = f"sampling rate {more.sampling_rate:g}"
        else:
            more = replace(terms, expected_batch=2 * terms.expected_batch, batch_cap=cap)
            words = f"expected batch {more.expected_batch:g}"
        yield "rate", words, "more computing at each site", sites, more
    if terms.rounds > 1:
        fewer = replace(terms, rounds=terms.rounds // 2)
        words = f"{counted(fewer.rounds, 'round')}, half as many steps"
        yield "fewer steps", words, "less training", sites, fewer
    longer = replace(terms, rounds=2 * terms.rounds)
    yield (
        "more steps",
        f"{longer.rounds} rounds, twice as many steps",
        "more computing",
        sites,
        longer,
    )
    loose = replace(terms, epsilon=2 * terms.epsilon)
    yield "epsilon", f"epsilon {loose.epsilon:g}", "a weaker promise to each patient", sites, loose
    if terms.parameters > 1:
        small = replace(terms, parameters=terms.parameters // 2)
        words = f"{small.parameters:,} parameters"
        yield "parameters", words, "a lower rank, fewer layers or features", sites, small
    twice = {name: 2 * patients for name, patients in sites.items()}
    scaled = terms if terms.expected_batch is not None else replace(terms, batch_cap=cap)
    yield "patients", "twice the patients at each site", "time, or wider criteria", twice, scaled
    both = {**sites, **{f"{name}, again": patients for name, patients in sites.items()}}
    yield "sites", f"{len(both)} sites like these", "more partners", both, terms
    if terms.weights == "equal" and len(set(sites.values())) > 1:
        public = replace(terms, weights="public")
        words, price = "sites weighted by public size", "large sites count for more"
        yield "weights", words, price, sites, public
