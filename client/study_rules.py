"""What a policy says of a study itself, whoever approves it and whatever is asked."""

from collections.abc import Iterator
from datetime import datetime

from huizhen.client.policy import Policy, base_digest
from huizhen.client.policy_terms import UNITS
from huizhen.client.situation import Offered, Refused
from huizhen.protocol.statements import stamp
from huizhen.protocol.study_terms import AdapterTerms, BaseTerms


def by_study(policy: Policy, offered: Offered, now: datetime) -> Iterator[Refused]:
    """Give what speaks against a study on any cohort."""
    study, limits = offered.study, policy.rounds
    if policy.site not in study.sites:
        yield Refused("not_in_study", f"the study has no [sites] {policy.site!r}")
    if now >= offered.ends:
        yield Refused("study_ended", f"it is {stamp(now)}, the study ended {stamp(offered.ends)}")
    if study.base is not None:
        yield from _by_base(policy, study.base)
    if study.adapter is not None:
        yield from _by_adapter(policy, study.adapter)
    if min(len(study.sites), study.quorum) < limits.min_sites:
        yield Refused(
            "too_few_sites",
            f"the study has {len(study.sites)} sites and quorum {study.quorum}, "
            f"[rounds] min_sites is {limits.min_sites}",
        )
    if study.rounds.count > limits.max_rounds:
        yield Refused(
            "too_many_rounds",
            f"the study has {study.rounds.count} rounds, [rounds] max_rounds is "
            f"{limits.max_rounds}",
        )
    if offered.mechanism is not None:
        yield from _by_privacy(policy, offered, offered.mechanism.noise_multiplier)


def by_cohort(policy: Policy, offered: Offered, name: str) -> Iterator[Refused]:
    """Give what speaks against a study on one cohort."""
    study, cohort = offered.study, policy.cohorts.get(name)
    if cohort is None:
        yield Refused(
            "cohort_unknown", f"the approval names cohort {name!r}, there is no [cohorts.{name}]"
        )
        return
    if UNITS.index(study.privacy.unit) > UNITS.index(cohort.unit):
        yield Refused(
            "unit_not_allowed",
            f"the study's unit is {study.privacy.unit!r}, [cohorts.{name}] unit is {cohort.unit!r}",
        )
    # Without a unit of privacy epsilon has no bound: the cohort's unit alone decides.
    if study.is_private and study.privacy.epsilon > (cohort.epsilon or 0.0):
        allowed = "absent: decide it" if cohort.epsilon is None else cohort.epsilon
        yield Refused(
            "epsilon_over_cap",
            f"the study may spend epsilon {study.privacy.epsilon}, [cohorts.{name}] epsilon is "
            f"{allowed}",
        )
    terms = study.sites.get(policy.site)
    if terms is not None and terms.patients_public < cohort.min_patients:
        yield Refused(
            "too_few_patients",
            f"the study states {terms.patients_public} patients for this site, "
            f"[cohorts.{name}] min_patients is {cohort.min_patients}",
        )


def _by_privacy(policy: Policy, offered: Offered, noise_multiplier: float) -> Iterator[Refused]:
    terms, limits = offered.study.privacy, policy.privacy
    if terms.epsilon > limits.max_epsilon:
        yield Refused(
            "epsilon_over_cap",
            f"the study may spend epsilon {terms.epsilon}, [privacy] max_epsilon is "
            f"{limits.max_epsilon}",
        )
    if terms.delta > limits.max_delta:
        yield Refused(
            "delta_too_large",
            f"the study's delta is {terms.delta}, [privacy] max_delta is {limits.max_delta}",
        )
    if noise_multiplier < limits.min_noise_multiplier:
        yield Refused(
            "noise_too_low",
            f"the study's noise_multiplier is {noise_multiplier}, "
            f"[privacy] min_noise_multiplier is {limits.min_noise_multiplier}",
        )


def _by_base(policy: Policy, base: BaseTerms) -> Iterator[Refused]:
    """An allowed base is the one of its name with exactly its files."""
    if policy.bases.allow_any:
        return
    if not base.digests:
        yield Refused(
            "base_not_allowed",
            f"the study pins no file of base {base.name!r}, [bases] allow_any is false",
        )
        return
    found = base_digest(base.digests)
    if policy.bases.allowed.get(base.name) != found:
        yield Refused(
            "base_not_allowed",
            f"the study's base is {base.name!r} with digest {found}, which [bases.allowed] has "
            "not: add it if it may be trained",
        )


def _by_adapter(policy: Policy, adapter: AdapterTerms) -> Iterator[Refused]:
    if adapter.rank > policy.adapter.max_rank:
        yield Refused(
            "rank_too_large",
            f"the study's rank is {adapter.rank}, [adapter] max_rank is {policy.adapter.max_rank}",
        )
    others = sorted(set(adapter.target_modules) - set(policy.adapter.target_modules))
    if others:
        names = ", ".join(f"{name!r}" for name in others)
        yield Refused(
            "module_not_allowed",
            f"the study trains {names}, which [adapter] target_modules does not allow",
        )
