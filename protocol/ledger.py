"""The privacy ledger of one cohort at one site: what its entries add up to, and what may follow.

A cohort names a set of patients; every study on them is booked here, because their losses compose.
A ledger has one unit, the patient unless it says ``record``; neighbours: add or remove one. Entries
hold mechanisms and never a computed ε: ε always follows anew from all of them. The rules hold for a
new entry, and again whenever a chain is read (``ledger_entries.py`` has its format):

* What is charged or still reserved composes to at most the cap's ε at the cap's δ. A cap lowered
  under that stops reservations at once, and charges from the one that would pass it.
* A charge is never refunded. Closing a study frees what it reserved and did not charge.
* A study's charged rounds increase. A round that was skipped is gone: a coordinator that asks for
  it after a later one was reset or replays, and a study is one line of adapters.
* Only the latest charged round of an open study may be charged again, for a retry, until an entry
  says which update answers it; nothing is written. Training it anew after that, or an earlier one,
  could only serve a second release under one charge.
* A study's metrics of one name are charged once. Pure ε adds up.

What the sum assumes: the terms of a study were not chosen by looking at updates of earlier studies
on the cohort (composition with parameters chosen adaptively needs more: Rogers et al. 2016; Feldman
and Zrnic 2021). A patient held out in one study may be trained on in another, so one patient's loss
is at most (``epsilon_with_metrics``, δ): basic composition with the pure ε of all metrics.
"""

import bisect
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from fractions import Fraction
from typing import Any

from huizhen.protocol.accounting import Spend, epsilon
from huizhen.protocol.errors import BudgetExhaustedError, PrivacyError, ReleaseLostError
from huizhen.protocol.ledger_entries import (
    Answered,
    Body,
    CapChanged,
    Charged,
    Closed,
    Entry,
    Head,
    MetricsCharged,
    MetricsReleased,
    Opened,
    Reserved,
    make_entry,
    read_body,
    read_entry,
)


@dataclass(slots=True)
class StudyAccount:
    """One study's part of a ledger."""

    terms: Reserved
    reservation: Entry
    charges: dict[int, Entry] = field(default_factory=dict)
    # by round, in the order of the rounds
    answers: dict[int, Answered] = field(default_factory=dict)
    # by round: what may leave
    metrics: dict[str, Entry] = field(default_factory=dict)
    # by name
    releases: dict[str, MetricsReleased] = field(default_factory=dict)
    # by name: what may leave
    metrics_epsilon: Fraction = Fraction(0)
    closing: Entry | None = None

    @property
    def last_round(self) -> int:
        """The latest charged round; 0 before the first."""
        return next(reversed(self.charges), 0)

    @property
    def committed_rounds(self) -> int:
        """The rounds that are paid for or may still be."""
        return self.terms.rounds if self.closing is None else len(self.charges)


class Account:
    """What a chain of entries says; it grows one checked entry at a time."""

    def __init__(self, first: Any) -> None:
        """Begin with a ledger's first entry, as a parsed JSON value.

        Raises:
            ConfigError: a newer version of Huizhen wrote it.
            PrivacyError: it does not open a ledger.
        """
        entry = read_entry(first, None)
        body = read_body(entry)
        if not isinstance(body, Opened):
            raise PrivacyError(f"entry 1 of the ledger is of kind {entry.kind!r}, expected 'open'")
        self.site, self.cohort, self.unit, self.cap = body.site, body.cohort, body.unit, body.cap
        self.entries = [entry]
        self.studies: dict[str, StudyAccount] = {}
        self.metrics_epsilon = Fraction(0)
        self._cap_entry = entry

    @property
    def head(self) -> Head:
        """The last entry, for a witness to keep."""
        return self.entries[-1].head

    def append(self, value: Any, *, priced: bool = False) -> Entry:
        """Take in the next entry, a parsed JSON value, and return it.

        Args:
            value: the entry.
            priced: also compute whether the cap of its time allowed it, which may take seconds.

        Raises:
            ConfigError: a newer version of Huizhen wrote it.
            PrivacyError: it breaks the chain or a rule; the message names its number.
        """
        entry = read_entry(value, self.entries[-1])
        body = read_body(entry)
        try:
            if (before := self.written(body)) is not None:
                raise PrivacyError(f"says again what entry {before.sequence} says")
            if priced:
                self.check_budget(body)
        except PrivacyError as error:
            raise type(error)(f"entry {entry.sequence} of the ledger: {error}") from error
        self._apply(entry, body)
        return entry

    def follow(self, body: Body, now: datetime) -> Entry:
        """Return the entry that would say ``body`` next; the account stays as it is.

        Raises:
            PrivacyError: the clock went back, or the body is out of range.
        """
        return make_entry(body, now, self.entries[-1])

    def written(self, body: Body) -> Entry | None:
        """Return the entry that already says ``body``, or None where a new one may say it.

        Raises:
            PrivacyError: the rules allow neither; the budget is not looked at.
        """
        match body:
            case Opened():
                raise PrivacyError("a ledger is opened once, by its first entry")
            case CapChanged():
                return self._cap_entry if body.cap == self.cap else None
            case Reserved():
                return self._written_reservation(body)
            case Charged():
                return self._written_charge(body)
            case Answered():
                return self._written_answer(body)
            case MetricsCharged():
                if (before := self._open_study(body.study).metrics.get(body.name)) is not None:
                    raise ReleaseLostError(
                        f"metrics {body.name!r} of study {body.study[:12]} were charged by entry "
                        f"{before.sequence}: they leave once, and what was drawn is kept or lost"
                    )
                return None
            case MetricsReleased():
                return self._written_release(body)
            case Closed():
                return self._study(body.study).closing

    def check_budget(self, body: Body) -> None:
        """Refuse what the cap does not cover.

        Raises:
            BudgetExhaustedError: naming the cap, what is spent, what was asked and what would fit.
        """
        match body:
            case Reserved():
                if self.exceeds(body):
                    raise BudgetExhaustedError(self._refused_reservation(body))
            case Charged():
                self._check_charge(body)
            case MetricsCharged():
                self._check_metrics(body)
            case Opened() | CapChanged() | Answered() | MetricsReleased() | Closed():
                pass

    def exceeds(self, asked: Reserved) -> bool:
        """Return whether the cap does not cover a new reservation beside all there is."""
        spends = self.committed() + times(asked.spend, asked.rounds)
        return self.epsilon(spends) > self.cap.epsilon

    def charged(self) -> list[Spend]:
        """Return what is paid for, study by study."""
        return [x for s in self.studies.values() for x in times(s.terms.spend, len(s.charges))]

    def committed(self) -> list[Spend]:
        """Return what is paid for or may still be, study by study."""
        return [x for s in self.studies.values() for x in times(s.terms.spend, s.committed_rounds)]

    def epsilon(self, spends: Iterable[Spend]) -> float:
        """Return the ε of a composition at the cap's δ.

        Raises:
            PrivacyError: the accountant cannot certify it.
        """
        return epsilon(tuple(spends), self.cap.delta)

    def _apply(self, entry: Entry, body: Body) -> None:
        match body:
            case CapChanged():
                self.cap, self._cap_entry = body.cap, entry
            case Reserved():
                self.studies[body.study] = StudyAccount(body, entry)
            case Charged():
                self.studies[body.study].charges[body.round] = entry
            case MetricsCharged():
                self.metrics_epsilon += exact(body.epsilon)
                self.studies[body.study].metrics_epsilon += exact(body.epsilon)
                self.studies[body.study].metrics[body.name] = entry
            case Answered():
                self.studies[body.study].answers[body.round] = body
            case MetricsReleased():
                self.studies[body.study].releases[body.name] = body
            case Closed():
                self.studies[body.study].closing = entry
            case Opened():
                pass  # written() lets no second one come here
        self.entries.append(entry)

    def _written_reservation(self, body: Reserved) -> Entry | None:
        study = self.studies.get(body.study)
        if study is None:
            return None
        if study.closing is not None:
            raise PrivacyError(
                f"study {body.study[:12]} was closed by entry {study.closing.sequence}: "
                "nothing can be reserved for it again"
            )
        if study.terms != body:
            raise PrivacyError(
                f"study {body.study[:12]} has reserved {study.terms.rounds} rounds of "
                f"{study.terms.spend}, now {body.rounds} of {body.spend} are asked: "
                "other terms make another study"
            )
        return study.reservation

    def _written_charge(self, body: Charged) -> Entry | None:
        study = self._open_study(body.study)
        if body.round in study.answers:
            raise PrivacyError(
                f"round {body.round} of study {body.study[:12]} is answered: send the same bytes "
                "again, no other update may be trained under its charge"
            )
        if body.round == study.last_round:
            return study.charges[body.round]
        if body.round < study.last_round:
            raise PrivacyError(
                f"round {body.round} of study {body.study[:12]} is asked, round "
                f"{study.last_round} is charged: a study does not go back"
            )
        if len(study.charges) >= study.terms.rounds:
            raise BudgetExhaustedError(
                f"round {body.round} of study {body.study[:12]} is asked, all "
                f"{study.terms.rounds} rounds that it reserved are charged"
            )
        return None

    def _written_answer(self, body: Answered) -> Entry | None:
        study = self._open_study(body.study)
        if body.round in study.answers or body.round != study.last_round:
            raise PrivacyError(
                f"round {body.round} of study {body.study[:12]} is answered already, or is not the "
                f"last one charged, {study.last_round}: nothing more leaves for it"
            )
        return None

    def _written_release(self, body: MetricsReleased) -> Entry | None:
        study = self._open_study(body.study)
        if body.name in study.releases or body.name not in study.metrics:
            raise PrivacyError(
                f"metrics {body.name!r} of study {body.study[:12]} left already, or were not "
                "charged: nothing more leaves"
            )
        return None

    def _study(self, digest: str) -> StudyAccount:
        if digest not in self.studies:
            raise PrivacyError(
                f"study {digest[:12]} has reserved nothing: reserve its rounds first"
            )
        return self.studies[digest]

    def _open_study(self, digest: str) -> StudyAccount:
        study = self._study(digest)
        if study.closing is not None:
            raise PrivacyError(
                f"study {digest[:12]} was closed by entry {study.closing.sequence}: "
                "nothing can be charged under it"
            )
        return study

    @property
    def _allows(self) -> str:
        return (
            f"the cap of cohort {self.cohort!r} allows {self.cap.epsilon:g} "
            f"at delta {self.cap.delta:g}"
        )

    def _refused_reservation(self, asked: Reserved) -> str:
        committed, alone = self.committed(), times(asked.spend, asked.rounds)
        fit = bisect.bisect_left(
            range(1, asked.rounds),
            True,
            key=lambda rounds: self.exceeds(dataclasses.replace(asked, rounds=rounds)),
        )
        spent = self.epsilon(self.charged())
        return (
            f"epsilon would reach {self.epsilon(committed + alone):.4g} with {asked.rounds} rounds "
            f"of study {asked.study[:12]}, {self._allows} ({spent:.4g} is spent, "
            f"{self.epsilon(committed):.4g} with what is reserved, the study alone needs "
            f"{self.epsilon(alone):.4g}): {fit} of its rounds would fit"
        )

    def _check_charge(self, body: Charged) -> None:
        # What is committed covers the charge, unless the cap was lowered after the reservation.
        if self.epsilon(self.committed()) <= self.cap.epsilon:
            return
        charged = self.charged()
        after = self.epsilon([*charged, self.studies[body.study].terms.spend])
        if after > self.cap.epsilon:
            raise BudgetExhaustedError(
                f"epsilon would reach {after:.4g} after round {body.round} of study "
                f"{body.study[:12]}, {self._allows} ({self.epsilon(charged):.4g} is spent): "
                "raise the cap or close the study"
            )

    def _check_metrics(self, body: MetricsCharged) -> None:
        after = self.metrics_epsilon + exact(body.epsilon)
        if after > exact(self.cap.metrics_epsilon):
            raise BudgetExhaustedError(
                f"metrics epsilon would reach {float(after):.12g} with {body.name!r}, the cap of "
                f"cohort {self.cohort!r} allows {self.cap.metrics_epsilon:.12g} "
                f"({float(self.metrics_epsilon):.12g} is spent): send fewer or raise the cap"
            )


def replay(entries: Iterable[Any], *, priced: bool = False) -> Account:
    """Return the account of a whole chain of entries, parsed JSON values.

    Args:
        entries: from the first on.
        priced: also compute whether each reservation and charge was within the cap of its time.

    Raises:
        ConfigError: a newer version of Huizhen wrote it.
        PrivacyError: naming the first entry that is wrong.
    """
    account: Account | None = None
    for value in entries:
        if account is None:
            account = Account(value)
        else:
            account.append(value, priced=priced)
    if account is None:
        raise PrivacyError("ledger has no entries, expected at least the one that opens it")
    return account


def check_witnessed(account: Account, witnessed: Head) -> None:
    """Refuse a ledger that lacks an entry which a witness saw.

    Raises:
        PrivacyError: the entry is missing or another.
    """
    last = account.head.sequence
    if not 1 <= witnessed.sequence <= last:
        raise PrivacyError(
            f"a witness saw entry {witnessed.sequence}, the ledger ends with {last}: "
            "this is an older copy or another ledger"
        )
    found = account.entries[witnessed.sequence - 1].digest
    if found != witnessed.digest:
        raise PrivacyError(
            f"a witness saw entry {witnessed.sequence} as {witnessed.digest[:12]}, here it is "
            f"{found[:12]}: this is another ledger, or a copy that went its own way"
        )


def times(spend: Spend, rounds: int) -> list[Spend]:
    """Return so many rounds of one mechanism, as a composition."""
    return [spend.times(rounds)] if rounds else []


def exact(epsilon: float) -> Fraction:
    """Return the number that an entry's JSON shows, so that ten times 0.1 is 1."""
    return Fraction(repr(float(epsilon)))
