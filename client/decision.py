"""Whether a hospital takes part: pure functions of its policy, a study and what is so at the site.

No file is read here, no clock and no setting: everything comes in as a value, so that a table of
cases tests all of it. Two moments have the same rules: ``objections_to_approval``, before people
approve a study, and ``decide``, at every announcement, so that a policy made stricter afterwards
holds too. A further restriction in a policy turns no refusal into an allowance.

What an announcement asks is a round of a signed study, and nothing else: no value in it, and no
argument here, changes how the site trains.

A refusal has a code, which may leave the hospital, and a line for its own people, which does not.
No code depends on a record: a number of patients is the public one that the study states.
"""

from collections.abc import Iterator
from datetime import datetime

from huizhen.client.policy import Policy
from huizhen.client.sandbox import LEVELS
from huizhen.client.situation import (
    Allowed,
    Decision,
    LedgerView,
    Offered,
    Refused,
    SignedApproval,
    Situation,
    check_zone,
)
from huizhen.client.study_rules import by_cohort, by_study
from huizhen.protocol.statements import Announcement, Approval, moment, stamp


def decide(
    policy: Policy,
    offered: Offered,
    approval: SignedApproval | None,
    ledger: LedgerView | None,
    announcement: Announcement,
    here: Situation,
) -> Decision:
    """Return whether to answer an announcement.

    Before this, its signature and what it follows are verified (``protocol/trust.py``,
    ``protocol/chain.py``). After it, the ledger has the last word: it charges or refuses in one
    transaction. A round that was charged goes on after its window, and is asked again at any time.

    Args:
        policy: the hospital's.
        offered: the study that the announcement names.
        approval: of the study; None where there is none, or it was withdrawn.
        ledger: of the approval's cohort; None where there is none.
        announcement: what is asked.
        here: what is so at the site.
    """
    return next(objections(policy, offered, approval, ledger, announcement, here), Allowed())


def objections_to_approval(
    policy: Policy, offered: Offered, draft: Approval, ledger: LedgerView | None, now: datetime
) -> Iterator[Refused]:
    """Give all that speaks against approving a study; nobody need have signed yet.

    Args:
        policy: the hospital's.
        offered: the study.
        draft: names the cohort and the hospital's cap for this study.
        ledger: of that cohort; None where there is none.
        now: the present time, with a zone.
    """
    yield from objections_to_consent(policy, draft, now)
    yield from _by_draft(offered, draft)
    yield from by_study(policy, offered, now)
    yield from by_cohort(policy, offered, draft.cohort)
    yield from _by_ledger(policy, offered, draft, ledger)


def objections(
    policy: Policy,
    offered: Offered,
    approval: SignedApproval | None,
    ledger: LedgerView | None,
    announcement: Announcement,
    here: Situation,
) -> Iterator[Refused]:
    """Give all that speaks against answering an announcement; the first decides."""
    if here.is_stopped:
        yield Refused("stopped", f"[stop] file {policy.stop.file!r} exists: remove it to go on")
    if here.is_paused:
        yield Refused("paused", "the site is paused: resume it to go on")
    yield from _by_announcement(policy, offered, ledger, announcement, here.now)
    if approval is None:
        yield Refused("not_approved", "this site has not approved the study: approve it first")
        yield from by_study(policy, offered, here.now)
    else:
        yield from objections_to_signatures(policy, approval)
        yield from objections_to_approval(policy, offered, approval.approval, ledger, here.now)
    is_metrics = announcement.round > offered.study.rounds.count
    if is_metrics:
        yield from _by_metrics(policy, offered, ledger)
    is_charged = ledger is not None and (
        ledger.has_metrics if is_metrics else ledger.last_round == announcement.round
    )
    yield from _by_moment(policy, here, is_charged=is_charged)


def objections_to_signatures(policy: Policy, approval: SignedApproval) -> Iterator[Refused]:
    """Give whose signature an approval still needs."""
    rule = policy.approval
    signed = rule.stewards.keys() & set(approval.stewards)
    if len(signed) < rule.people:
        missing = ", ".join(sorted(rule.stewards.keys() - signed))
        yield Refused(
            "needs_second_approval",
            f"{len(signed)} of {rule.people} [approval] people have signed: ask {missing}",
        )
    if not approval.is_signed_by_site:
        yield Refused("not_approved", "the site's own key has not signed the approval: sign it")


def objections_to_consent(policy: Policy, draft: Approval, now: datetime) -> Iterator[Refused]:
    """Give why an approval does not hold here and now, whatever it approves."""
    check_zone(now)
    if draft.site != policy.site:
        yield Refused(
            "not_approved", f"the approval is of site {draft.site!r}, expected {policy.site!r}"
        )
    if now < moment(draft.issued):
        yield Refused(
            "approval_not_yet",
            f"the approval is of {draft.issued}, it is {stamp(now)}: set the clock right",
        )
    if now >= moment(draft.expires):
        yield Refused(
            "approval_expired", f"the approval expired {draft.expires}: approve the study again"
        )


def _by_announcement(
    policy: Policy,
    offered: Offered,
    ledger: LedgerView | None,
    announcement: Announcement,
    now: datetime,
) -> Iterator[Refused]:
    study, asked = offered.study, announcement.round
    if announcement.study != offered.digest:
        yield Refused(
            "other_study",
            f"study {announcement.study[:12]} is announced, {offered.digest[:12]} was agreed",
        )
    if policy.site not in announcement.sites:
        yield Refused("not_asked", f"the announcement asks other sites than {policy.site!r}")
    known = set(announcement.sites) & study.sites.keys()
    if len(known) < policy.rounds.min_sites:
        yield Refused(
            "too_few_sites",
            f"round {asked} asks {len(known)} sites of the study, "
            f"[rounds] min_sites is {policy.rounds.min_sites}",
        )
    if asked > study.last_round:
        yield Refused(
            "round_past_the_end", f"round {asked} is asked, the study ends with {study.last_round}"
        )
    if ledger is not None and asked < ledger.last_round:
        yield Refused(
            "round_went_back",
            f"round {asked} is asked, the ledger has charged {ledger.last_round}: "
            "a study does not go back",
        )
    if now >= moment(announcement.deadline):
        yield Refused(
            "deadline_passed", f"it is {stamp(now)}, the deadline was {announcement.deadline}"
        )


def _by_draft(offered: Offered, draft: Approval) -> Iterator[Refused]:
    terms, cap = offered.study.privacy, draft.epsilon_cap
    if draft.study != offered.digest:
        yield Refused(
            "not_approved",
            f"the approval is of study {draft.study[:12]}, expected {offered.digest[:12]}",
        )
    if not offered.study.is_private:
        if cap is not None:
            yield Refused(
                "epsilon_over_cap",
                f"the study's epsilon has no bound, its approval allows {cap}: approve it without",
            )
    elif terms.epsilon > (cap or 0.0):
        yield Refused(
            "epsilon_over_cap",
            f"the study may spend epsilon {terms.epsilon}, its approval allows {cap or 'none'}",
        )


def _by_ledger(
    policy: Policy, offered: Offered, draft: Approval, ledger: LedgerView | None
) -> Iterator[Refused]:
    """Without a unit of privacy nothing is charged, and a ledger says nothing."""
    unit = offered.study.privacy.unit
    if unit == "none":
        return
    if ledger is None:
        yield Refused(
            "ledger_missing",
            f"cohort {draft.cohort!r} has no ledger: make it with 'site ledger create'",
        )
        return
    found, wanted = (ledger.site, ledger.cohort), (policy.site, draft.cohort)
    if found != wanted or ledger.unit != unit:
        yield Refused(
            "ledger_differs",
            f"the ledger is of cohort {ledger.cohort!r} at {ledger.site!r} by {ledger.unit}, "
            f"expected {draft.cohort!r} at {policy.site!r} by {unit}",
        )
    if ledger.is_closed:
        yield Refused("ledger_closed", "the ledger has closed the study: it cannot go on here")
    if ledger.would_exceed:
        yield Refused(
            "ledger_would_pass",
            f"the study would pass the cap of the ledger of cohort {draft.cohort!r}: "
            "see 'site ledger show'",
        )


def _by_metrics(policy: Policy, offered: Offered, ledger: LedgerView | None) -> Iterator[Refused]:
    terms, limits = offered.study.privacy, policy.privacy
    spent = terms.metrics_epsilon
    if spent is None:
        return  # refused as a round past the end
    if not limits.metrics:
        yield Refused("metrics_not_allowed", "metrics are asked, [privacy] metrics is false")
    if spent > limits.max_metrics_epsilon:
        yield Refused(
            "metrics_not_allowed",
            f"the study's metrics_epsilon is {spent}, "
            f"[privacy] max_metrics_epsilon is {limits.max_metrics_epsilon}",
        )
    if terms.metrics_minimum < limits.metrics_minimum:
        yield Refused(
            "metrics_not_allowed",
            f"the study's metrics_minimum is {terms.metrics_minimum}, "
            f"[privacy] metrics_minimum is {limits.metrics_minimum}",
        )
    if ledger is not None and not ledger.has_metrics and spent > ledger.metrics_left:
        yield Refused(
            "ledger_would_pass",
            f"the study's metrics_epsilon is {spent}, the ledger of cohort {ledger.cohort!r} "
            f"has {ledger.metrics_left} left: see 'site ledger show'",
        )


def _by_moment(policy: Policy, here: Situation, *, is_charged: bool) -> Iterator[Refused]:
    if here.parameters > policy.adapter.max_parameters:
        yield Refused(
            "too_many_parameters",
            f"the adapter has {here.parameters} numbers, "
            f"[adapter] max_parameters is {policy.adapter.max_parameters}",
        )
    if LEVELS.index(here.walls) > LEVELS.index(policy.sandbox.require):
        yield Refused(
            "sandbox_too_weak",
            f"the walls around training are {here.walls!r} on this machine, [sandbox] require is "
            f"{policy.sandbox.require!r}: install bubblewrap",
        )
    if is_charged:
        return
    if not policy.schedule.is_open(here.now):
        yield Refused(
            "outside_window", f"it is {stamp(here.now)}, outside the [schedule] windows: wait"
        )
    if here.rounds_today >= policy.rounds.max_rounds_per_day:
        yield Refused(
            "too_many_rounds_today",
            f"{here.rounds_today} rounds began today, "
            f"[rounds] max_rounds_per_day is {policy.rounds.max_rounds_per_day}: wait",
        )
