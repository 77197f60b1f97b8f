"""What a hospital's decision is made from, and what it is: the values of ``decision.py``.

Whoever makes the first ones has read the files and the clock, and has verified the signatures.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Self

from huizhen.client.sandbox import Level
from huizhen.protocol.ledger_statement import Totals
from huizhen.protocol.mechanism import Mechanism
from huizhen.protocol.statements import Approval, StudyOffer, moment
from huizhen.protocol.study import Study

Code = Literal[
    "stopped",
    "paused",
    # what the announcement asks
    "other_study",
    "not_asked",
    "too_few_sites",
    "round_past_the_end",
    "round_went_back",
    "deadline_passed",
    # whether people agreed
    "not_approved",
    "needs_second_approval",
    "approval_not_yet",
    "approval_expired",
    # what the study is
    "not_in_study",
    "study_ended",
    "base_not_allowed",
    "rank_too_large",
    "module_not_allowed",
    "too_many_rounds",
    "noise_too_low",
    "epsilon_over_cap",
    "delta_too_large",
    "cohort_unknown",
    "unit_not_allowed",
    "too_few_patients",
    # what the ledger says
    "ledger_missing",
    "ledger_differs",
    "ledger_closed",
    "ledger_would_pass",
    # how it is now
    "metrics_not_allowed",
    "too_many_parameters",
    "sandbox_too_weak",
    "outside_window",
    "too_many_rounds_today",
]


@dataclass(frozen=True, slots=True)
class Allowed:
    """Nothing speaks against it."""


@dataclass(frozen=True, slots=True)
class Refused:
    """What speaks against it."""

    code: Code
    # may leave; docs/policy.md lists them
    line: str
    # for people at the site: what was found, which key decided, what to do


Decision = Allowed | Refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """A study that the alliance's board offers, and what follows from it alone."""

    study: Study
    digest: str
    ends: datetime
    mechanism: Mechanism | None
    # what a round spends; None where the study has no unit of privacy

    def __post_init__(self) -> None:
        terms, found = self.study.privacy, self.mechanism
        if (found is not None) != self.study.is_private:
            raise ValueError(f"mechanism is {found}, the study's unit is {terms.unit!r}")
        if found is not None and (found.delta, found.sampling_rate, found.steps_per_round) != (
            terms.delta,
            terms.sampling_rate,
            self.study.rounds.local_steps,
        ):
            raise ValueError(f"mechanism is {found}, which is not the study's")
        check_zone(self.ends)

    @classmethod
    def of(cls, offer: StudyOffer) -> Self:
        """Return an offer whose signatures were verified; the noise takes a second to find.

        Raises:
            ProtocolError: it is no study of this version, or its digest is another.
            ConfigError: no amount of noise gives its epsilon.
            PrivacyError: its epsilon cannot be certified.
        """
        study = offer.agreed()
        mechanism = Mechanism.of(study) if study.is_private else None
        return cls(study=study, digest=offer.digest, ends=moment(offer.ends), mechanism=mechanism)


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedApproval:
    """An approval and who has signed it; ``approvals.read_approval`` makes it from a document."""

    approval: Approval
    is_signed_by_site: bool
    stewards: tuple[str, ...]
    # who have signed, by the names of the policy


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerView:
    """What a cohort's ledger says about one study."""

    site: str
    cohort: str
    unit: Literal["patient", "record"]
    is_closed: bool
    # the study, not the ledger
    last_round: int
    # the latest charged one; 0 before the first
    would_exceed: bool
    # the cap does not cover what the study may still spend
    has_metrics: bool
    # whether the study's metrics are charged
    metrics_left: float
    # epsilon up to the cap

    @classmethod
    def of(cls, totals: Totals, study: str, *, would_exceed: bool) -> Self:
        """Return the view of one study.

        Args:
            totals: what ``Ledger.totals`` gives.
            study: its digest.
            would_exceed: what ``Ledger.would_exceed`` gives for all its rounds; False where it is
                closed.
        """
        found = next((one for one in totals.studies if one.study == study), None)
        return cls(
            site=totals.site,
            cohort=totals.cohort,
            unit=totals.unit,
            is_closed=found is not None and found.is_closed,
            last_round=0 if found is None else found.last_round,
            would_exceed=would_exceed,
            has_metrics=found is not None and found.metrics_epsilon > 0,
            metrics_left=totals.metrics_left,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What is so at the site when a round is announced."""

    now: datetime
    is_stopped: bool
    # ``Policy.is_stopped``
    is_paused: bool
    walls: Level
    # that this machine gives, as ``sandbox.probe`` found them
    rounds_today: int
    # that began since ``Schedule.day_begins``, of all studies
    parameters: int
    # numbers in the announced adapter

    def __post_init__(self) -> None:
        check_zone(self.now)


def check_zone(time: datetime) -> None:
    """Refuse a time that means another moment elsewhere.

    Raises:
        ValueError: it has no zone.
    """
    if time.utcoffset() is None:
        raise ValueError(f"time is {time}, expected one with a zone")
