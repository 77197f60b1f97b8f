"""The ledger's rules and chain, against hand-worked values and every kind of tampering."""

import copy
import dataclasses
import hashlib
import json
import re
from datetime import UTC, datetime, timedelta
from math import exp, sqrt

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from huizhen.protocol.accounting import Spend
from huizhen.protocol.errors import BudgetExhaustedError, ConfigError, PrivacyError
from huizhen.protocol.ledger import check_witnessed, replay
from huizhen.protocol.ledger_entries import (
    Answered,
    Cap,
    CapChanged,
    Charged,
    Closed,
    Head,
    MetricsCharged,
    MetricsReleased,
    Opened,
    Reserved,
    make_entry,
)
from huizhen.protocol.ledger_statement import totals

S, T = "5" * 64, "7" * 64
START = datetime(2026, 11, 22, 8, 30, 59, 999_999, tzinfo=UTC)
CAP = Cap(epsilon=1.05, delta=1e-5, metrics_epsilon=1.0)
SPEND = Spend(noise_multiplier=20.0, sampling_rate=1.0, steps=2)


class Book:
    """Writes entries as a site does: each rule first, one second after the other."""

    def __init__(self, cap=CAP):
        first = make_entry(Opened(site="A", cohort="rare", cap=cap), START, None)
        self.account = replay([first.to_json()])

    def say(self, body, now=None):
        if (before := self.account.written(body)) is not None:
            return before
        self.account.check_budget(body)
        now = now or START + timedelta(seconds=len(self.account.entries))
        return self.account.append(self.account.follow(body, now).to_json())

    def reserve(self, study=S, rounds=4, spend=SPEND):
        return self.say(Reserved(study=study, spend=spend, rounds=rounds))

    def charge(self, round, study=S):
        return self.say(Charged(study=study, round=round))

    def values(self):
        return copy.deepcopy([entry.to_json() for entry in self.account.entries])


def analytic(steps, delta=1e-5, sigma=20.0):
    """Balle and Wang 2018, Theorem 8: T steps without sampling are one Gaussian, μ = √T/σ."""
    mu = sqrt(steps) / sigma
    return brentq(
        lambda e: norm.cdf(mu / 2 - e / mu) - exp(e) * norm.cdf(-mu / 2 - e / mu) - delta, 0, 50
    )


def rehashed(values, first):
    """Make the digests from entry number ``first`` on fit again, as a forger would."""
    for i in range(first - 1, len(values)):
        rest = {name: value for name, value in values[i].items() if name != "digest"}
        rest["previous"] = values[i - 1]["digest"] if i else "0" * 64
        values[i] = {**rest, "digest": hashlib.sha256(rfc8785.dumps(rest)).hexdigest()}
    return values


@pytest.fixture
def book():
    """One entry of each kind, eight in all."""
    book = Book()
    book.reserve()
    book.charge(1)
    book.charge(3)
    book.say(MetricsCharged(study=S, name="top1", epsilon=0.25))
    book.reserve(T, 2)
    book.say(CapChanged(cap=Cap(epsilon=2.0, delta=1e-6, metrics_epsilon=0.5)))
    book.say(Closed(study=S))
    return book


def test_the_digest_is_the_sha256_of_the_canonical_json_of_the_rest():
    body = (
        '{"cap":{"delta":0.00001,"epsilon":1.05,"metrics_epsilon":1},"cohort":"rare",'
        '"neighbours":"add_or_remove_one","schema":1,"site":"A","unit":"patient"}'
    )
    text = f'{{"body":{body},"kind":"open","previous":"{"0" * 64}","sequence":1,'
    text += '"time":"2026-11-22T08:30:59Z"}'
    assert Book().account.head == Head(1, hashlib.sha256(text.encode()).hexdigest())


def test_each_entry_holds_the_digest_of_the_one_before(book):
    entries = book.account.entries
    assert [entry.sequence for entry in entries] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [e.previous for e in entries] == ["0" * 64, *(e.digest for e in entries[:-1])]
    assert entries[2].body == {"study": S, "round": 1}


def test_epsilon_composes_over_studies_and_what_is_closed_is_free_again():
    book = Book()
    book.reserve(S, 4)
    book.reserve(T, 3)
    book.charge(1)
    book.charge(2, T)
    found = totals(book.account)
    assert found.epsilon_charged == pytest.approx(analytic(4), rel=1e-3)
    assert found.epsilon_committed == pytest.approx(analytic(14), rel=1e-3)
    assert found.epsilon_left == pytest.approx(1.05 - analytic(14), abs=1e-3)
    assert [s.epsilon_charged for s in found.studies] == pytest.approx([analytic(2)] * 2, rel=1e-3)
    assert found.studies[0].epsilon_committed == pytest.approx(analytic(8), rel=1e-3)
    book.say(Closed(study=S))
    after = totals(book.account)
    assert after.epsilon_charged == found.epsilon_charged
    assert after.epsilon_committed == pytest.approx(analytic(8), rel=1e-3)
    assert [s.is_closed for s in after.studies] == [True, False]


def test_an_empty_ledger_has_spent_nothing():
    found = totals(Book().account)
    assert (found.epsilon_charged, found.epsilon_committed, found.epsilon_left) == (0, 0, 1.05)
    assert (found.metrics_epsilon, found.metrics_left, found.studies) == (0, 1, ())


def test_pb_2_and_pb_7_two_studies_that_pass_the_cap_together_are_refused_with_all_numbers():
    book = Book()
    book.reserve(S, 4)
    book.charge(1)
    fit = max(n for n in range(1, 40) if analytic(8 + 2 * n) <= 1.05)
    with pytest.raises(BudgetExhaustedError) as caught:
        book.reserve(T, 40)
    found = re.fullmatch(
        r"epsilon would reach ([\d.]+) with 40 rounds of study 777777777777, the cap of cohort "
        r"'rare' allows ([\d.]+) at delta 1e-05 \(([\d.]+) is spent, ([\d.]+) with what is "
        r"reserved, the study alone needs ([\d.]+)\): (\d+) of its rounds would fit",
        str(caught.value),
    )
    assert found is not None
    expected = [analytic(88), 1.05, analytic(2), analytic(8), analytic(80), fit]
    assert [float(number) for number in found.groups()] == pytest.approx(expected, rel=2e-3)
    with pytest.raises(BudgetExhaustedError, match=f": {fit} of its rounds"):
        book.reserve(T, fit + 1)
    assert len(book.account.entries) == 3
    book.reserve(T, fit)


def test_of_a_study_that_is_over_the_cap_with_one_round_none_fits():
    with pytest.raises(BudgetExhaustedError, match=": 0 of its rounds would fit"):
        Book().reserve(spend=dataclasses.replace(SPEND, noise_multiplier=2.0), rounds=1)


def test_reserving_the_same_again_writes_nothing_and_other_terms_are_refused(book):
    assert book.reserve(T, 2).sequence == 6
    with pytest.raises(PrivacyError, match=r"has reserved 2 rounds of .* now 3 of"):
        book.reserve(T, 3)
    with pytest.raises(PrivacyError, match="other terms make another study"):
        book.reserve(T, 2, dataclasses.replace(SPEND, noise_multiplier=21.0))
    with pytest.raises(PrivacyError, match="was closed by entry 8"):
        book.reserve(S, 4)
    assert len(book.account.entries) == 8


def test_rounds_may_be_skipped_but_never_charged_backwards():
    book = Book()
    book.reserve(rounds=3)
    first, third = book.charge(2), book.charge(5)
    assert book.charge(5) is third
    for round in (1, 2, 4):
        with pytest.raises(PrivacyError, match=f"round {round} .* round 5 is charged"):
            book.charge(round)
    assert book.charge(9).sequence == 5
    assert first.body["round"] == 2


def test_never_more_rounds_are_charged_than_reserved():
    book = Book()
    book.reserve(rounds=2)
    book.charge(1)
    last = book.charge(2)
    assert book.charge(2) is last
    with pytest.raises(BudgetExhaustedError, match="all 2 rounds that it reserved are charged"):
        book.charge(3)


@pytest.mark.parametrize(
    "body",
    [
        Charged(study=T, round=1),
        MetricsCharged(study=T, name="a", epsilon=0.1),
        Closed(study=T),
    ],
    ids=["charge", "metrics", "close"],
)
def test_nothing_is_charged_without_a_reservation(body):
    book = Book()
    book.reserve(S)
    with pytest.raises(PrivacyError, match="study 777777777777 has reserved nothing"):
        book.say(body)


def test_nothing_is_charged_under_a_closed_study(book):
    for body in (
        Charged(study=S, round=4),
        Charged(study=S, round=3),
        MetricsCharged(study=S, name="top1", epsilon=0.1),
    ):
        with pytest.raises(PrivacyError, match="was closed by entry 8"):
            book.say(body)
    assert book.say(Closed(study=S)).sequence == 8


def test_ten_times_a_tenth_is_one_and_not_more():
    book = Book()
    book.reserve()
    for n in range(10):
        book.say(MetricsCharged(study=S, name=f"top{n}", epsilon=0.1))
    with pytest.raises(BudgetExhaustedError, match=r"reach 1\.0\d+ with 'more'.* allows 1 \(1 is"):
        book.say(MetricsCharged(study=S, name="more", epsilon=1e-9))
    found = totals(book.account)
    assert (found.metrics_epsilon, found.metrics_left) == (1.0, 0.0)
    assert found.studies[0].metrics_epsilon == 1.0
    assert found.epsilon_with_metrics == found.epsilon_charged + 1.0


def test_metrics_of_one_name_are_charged_once_in_a_study():
    book = Book()
    book.reserve()
    book.say(MetricsCharged(study=S, name="held_out", epsilon=0.1))
    with pytest.raises(PrivacyError, match="charged by entry 3: they leave once"):
        book.say(MetricsCharged(study=S, name="held_out", epsilon=0.1))
    book.reserve(T)
    book.say(MetricsCharged(study=T, name="held_out", epsilon=0.1))
    assert totals(book.account).metrics_epsilon == pytest.approx(0.2)


def test_metrics_that_were_charged_are_named_once():
    book = Book()
    book.reserve()
    body = MetricsReleased(study=S, name="held_out", announcement="b" * 64, metrics="c" * 64)
    with pytest.raises(PrivacyError, match="nothing more leaves"):
        book.say(body)
    book.say(MetricsCharged(study=S, name="held_out", epsilon=0.1))
    book.say(body)
    for again in (body, dataclasses.replace(body, metrics="d" * 64)):
        with pytest.raises(PrivacyError, match="nothing more leaves"):
            book.say(again)


def answered(round, study=S, update="c" * 64):
    return Answered(study=study, round=round, announcement="b" * 64, update=update)


def test_an_answered_round_is_charged_no_more_and_answered_no_more():
    book = Book()
    book.reserve()
    book.charge(1)
    assert book.charge(1).sequence == 3  # a retry, before anything may leave
    book.say(answered(1))
    with pytest.raises(PrivacyError, match="is answered: send the same bytes"):
        book.charge(1)
    for again in (answered(1), answered(1, update="d" * 64)):
        with pytest.raises(PrivacyError, match="nothing more leaves for it"):
            book.say(again)
    book.charge(2)
    with pytest.raises(PrivacyError, match="nothing more leaves for it"):
        book.say(answered(1))
    book.say(answered(2))


@pytest.mark.parametrize("body", [answered(1), answered(4)], ids=["not charged", "beyond"])
def test_nothing_is_answered_that_was_not_charged(body):
    book = Book()
    book.reserve()
    with pytest.raises(PrivacyError):
        book.say(body)
    book.charge(2)
    with pytest.raises(PrivacyError):
        book.say(body)
    book.say(Closed(study=S))
    with pytest.raises(PrivacyError, match="was closed"):
        book.say(answered(2))


def test_without_a_metrics_budget_no_metric_leaves():
    book = Book(Cap(epsilon=1.0, delta=1e-5))
    book.reserve()
    with pytest.raises(BudgetExhaustedError, match="allows 0 "):
        book.say(MetricsCharged(study=S, name="top1", epsilon=1e-6))


def test_a_lowered_cap_stops_reservations_at_once_and_charges_where_they_would_pass_it():
    book = Book()
    book.reserve(rounds=15)
    book.charge(1)
    allowed = max(n for n in range(1, 15) if analytic(2 * n) <= 0.35)
    book.say(CapChanged(cap=Cap(epsilon=0.35, delta=1e-5)))
    with pytest.raises(BudgetExhaustedError, match=": 0 of its rounds would fit"):
        book.reserve(T, 1)
    for round in range(2, allowed + 1):
        book.charge(round)
    assert allowed >= 2
    with pytest.raises(
        BudgetExhaustedError, match=rf"after round {allowed + 1} of .* allows 0\.35 at"
    ):
        book.charge(allowed + 1)
    assert totals(book.account).epsilon_charged <= 0.35
    book.say(CapChanged(cap=CAP))
    book.charge(allowed + 1)


def test_the_same_cap_again_writes_nothing(book):
    assert book.say(CapChanged(cap=book.account.cap)).sequence == 7
    assert Book().say(CapChanged(cap=CAP)).sequence == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: Charged(study=S, round=0),
        lambda: Charged(study=S, round=1_000_001),
        lambda: Charged(study="ab", round=1),
        lambda: Charged(study="5" * 63 + "G", round=1),
        lambda: Reserved(study=S, spend=SPEND, rounds=0),
        lambda: MetricsCharged(study=S, name="", epsilon=0.1),
        lambda: MetricsCharged(study=S, name="a\nb", epsilon=0.1),
        lambda: MetricsCharged(study=S, name="top1", epsilon=0.0),
        lambda: MetricsCharged(study=S, name="top1", epsilon=-0.1),
        lambda: MetricsCharged(study=S, name="top1", epsilon=float("nan")),
        lambda: MetricsCharged(study=S, name="top1", epsilon=float("inf")),
        lambda: Opened(site="A", cohort="", cap=CAP),
        lambda: Opened(site="A\u202e", cohort="rare", cap=CAP),
        lambda: Opened(site="\ud800", cohort="rare", cap=CAP),
        lambda: Opened(site="A" * 201, cohort="rare", cap=CAP),
        lambda: Opened(site=" A", cohort="rare", cap=CAP),
        lambda: Book().say(Charged(study=S, round=True)),
    ],
)
def test_what_is_out_of_range_is_no_entry(make):
    with pytest.raises(PrivacyError):
        make()


@pytest.mark.parametrize("noise", [0.0, -1.0, float("inf"), float("nan"), 0.09])
def test_pb_4_no_spend_is_noiseless_negative_or_infinite(noise):
    with pytest.raises(PrivacyError, match="noise_multiplier"):
        Spend(noise_multiplier=noise, sampling_rate=0.2, steps=4)


@pytest.mark.parametrize("round", [True, 2.5, "3"])
def test_what_could_not_be_read_back_is_never_written(round):
    book = Book()
    body = Charged(study=S, round=4)
    object.__setattr__(body, "round", round)
    with pytest.raises(PrivacyError, match=r"entry 2 of the ledger, round is .* a whole number"):
        book.account.follow(body, START)


@pytest.mark.parametrize(
    "values",
    [
        {"epsilon": 0.0},
        {"epsilon": float("nan")},
        {"epsilon": float("inf")},
        {"delta": 0.0},
        {"delta": 1.0},
        {"metrics_epsilon": -0.1},
        {"metrics_epsilon": float("inf")},
    ],
)
def test_a_cap_out_of_range_is_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Cap(**{"epsilon": 1.0, "delta": 1e-5, **values})


def test_a_clock_that_went_back_is_refused_with_both_times(book):
    now = START + timedelta(seconds=7)  # as of the last entry
    with pytest.raises(
        PrivacyError, match=r"says 2026-11-22T08:30:55Z, .* of 2026-11-22T08:31:06Z"
    ):
        book.say(Charged(study=T, round=1), now - timedelta(seconds=11))
    entry = book.say(Charged(study=T, round=1), now - timedelta(seconds=10))
    assert entry.time == "2026-11-22T08:31:06Z"  # a small step back does not show in the chain


def test_a_time_of_another_zone_is_written_in_utc():
    book = Book()
    east = START.astimezone(tz=datetime.strptime("+0800", "%z").tzinfo)
    assert book.say(CapChanged(cap=Cap(epsilon=2.0, delta=1e-5)), east).time.endswith("T08:30:59Z")


@given(st.floats(1e-300, 1e15), st.floats(1e-300, 1, exclude_max=True), st.floats(0, 1e15))
def test_any_cap_reads_back_as_it_was_written(epsilon, delta, metrics):
    cap = Cap(epsilon=epsilon, delta=delta, metrics_epsilon=metrics)
    entry = make_entry(Opened(site="St. Mary's (北)", cohort="罕见病 1", cap=cap), START, None)
    account = replay([json.loads(entry.canonical())])
    assert account.cap == cap
    assert account.head == entry.head


def test_a_number_that_rfc_8785_cannot_write_is_refused():
    with pytest.raises(PrivacyError, match="entry 1 of the ledger holds a value that RFC 8785"):
        Book(Cap(epsilon=2.0**53, delta=1e-5))


def leaves(value, path=()):
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in leaves(item, (*path, key))]
    return [path]


def changed(value):
    if isinstance(value, str):
        return ("0" if value[:1] != "0" else "1") + value[1:]
    return 1 if value is None else value + 1


def test_a_change_of_any_field_of_any_entry_is_found_and_named(book):
    values, tried = book.values(), 0
    for i, value in enumerate(values):
        for *above, last in leaves(value):
            forged = copy.deepcopy(values)
            place = forged[i]
            for key in above:
                place = place[key]
            place[last] = changed(place[last])
            with pytest.raises(PrivacyError, match=f"^entry {i + 1} of the ledger"):
                replay(forged)
            del place[last]
            with pytest.raises(PrivacyError, match=f"^entry {i + 1} of the ledger"):
                replay(forged)
            tried += 1
    assert tried == sum(len(leaves(value)) for value in values) > 60


def test_an_entry_that_is_removed_moved_or_doubled_is_found(book):
    values = book.values()
    for i in range(len(values) - 1):
        without = values[:i] + values[i + 1 :]
        with pytest.raises(PrivacyError, match=f"^entry {i + 1} of the ledger is missing"):
            replay(without)
        swapped = [*values[:i], values[i + 1], values[i], *values[i + 2 :]]
        with pytest.raises(PrivacyError, match=f"^entry {i + 1} of the ledger is missing"):
            replay(swapped)
        with pytest.raises(PrivacyError, match=f"^entry {i + 2} of the ledger is missing"):
            replay([*values[: i + 1], values[i], *values[i + 1 :]])
    with pytest.raises(PrivacyError, match="no entries"):
        replay([])


def test_one_entry_that_is_forged_with_its_digest_breaks_the_chain_after_it(book):
    for number in range(1, 8):
        values = book.values()
        values[number - 1]["time"] = values[0]["time"]
        if number == 1:
            values[0]["body"]["site"] = "B"
        forged = rehashed(values[:number], number) + values[number:]
        if number > 2:  # with this time, an entry stands before the one it follows
            with pytest.raises(
                PrivacyError, match=f"^entry {number} .* before the entry it follows"
            ):
                replay(forged)
        else:
            with pytest.raises(PrivacyError, match=f"^entry {number + 1} .* the chain is broken"):
                replay(forged)


def test_a_chain_forged_to_its_end_is_found_by_a_witness(book):
    witnessed = book.account.entries[3].head
    check_witnessed(replay(book.values()), witnessed)
    values = book.values()
    del values[3]
    for number, value in enumerate(values, 1):
        value["sequence"] = number
    forged = replay(rehashed(values, 4))
    with pytest.raises(
        PrivacyError, match=r"saw entry 4 as .* here it is .*: this is another ledger"
    ):
        check_witnessed(forged, witnessed)


def test_an_older_copy_is_found_by_a_witness(book):
    older = replay(book.values()[:5])
    check_witnessed(older, book.account.entries[4].head)
    with pytest.raises(PrivacyError, match="saw entry 8, the ledger ends with 5: this is an older"):
        check_witnessed(older, book.account.head)
    with pytest.raises(PrivacyError, match="saw entry 0"):
        check_witnessed(older, Head(0, older.head.digest))


FORGERIES = [
    # a chain whose digests fit, and the entry that breaks a rule
    (4, {"round": 1}, "entry 4 of the ledger: says again what entry 3 says"),
    (4, {"round": 0}, "entry 4 of the ledger: round is 0"),
    (4, {"study": T}, "entry 4 of the ledger: study 777777777777 has reserved nothing"),
    (2, {"rounds": 1}, "entry 4 of the ledger: .*all 1 rounds"),
    (
        2,
        {"spend": {"noise_multiplier": 0, "sampling_rate": 1, "steps": 2}},
        "entry 2 of the ledger",
    ),
    (2, {"spend": {"noise_multiplier": -3, "sampling_rate": 1, "steps": 2}}, "entry 2 of the led"),
    (2, {"refund": True}, "entry 2 of the ledger, has an unknown key 'refund'"),
    (5, {"epsilon": -0.25}, "entry 5 of the ledger: .*more than 0"),
    (6, {"study": S}, "entry 6 of the ledger: study 555555555555 has reserved 4 rounds"),
    (7, {"cap": {"epsilon": 0, "delta": 1e-5}}, "entry 7 of the ledger, cap"),
    (8, {"study": "9" * 64}, "entry 8 of the ledger: study 999999999999 has reserved nothing"),
]


@pytest.mark.parametrize(("number", "fields", "message"), FORGERIES)
def test_a_chain_that_breaks_a_rule_is_refused_though_its_digests_fit(
    book, number, fields, message
):
    values = book.values()
    values[number - 1]["body"] |= fields
    with pytest.raises(PrivacyError, match=f"^{message}"):
        replay(rehashed(values, number))


@pytest.mark.parametrize("time", ["2026-11-22T08:31:00", "2026-11-22 08:31:00Z", "soon", ""])
def test_a_time_in_another_form_is_refused(book, time):
    values = book.values()
    values[1]["time"] = time
    with pytest.raises(PrivacyError, match=r"^entry 2 of the ledger has time"):
        replay(rehashed(values, 2))


@pytest.mark.parametrize("value", [None, 3, [], {}, {"sequence": 1}])
def test_what_is_no_entry_is_refused(book, value):
    with pytest.raises(PrivacyError, match=r"^entry 9 of the ledger has other fields"):
        replay([*book.values(), value])
    with pytest.raises(PrivacyError, match=r"^entry 1 of the ledger has other fields"):
        replay([value])


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (1, {"body": {"schema": 2, "new": 1}}, "ledger has schema 2, this version reads 1"),
        (3, {"kind": "transfer"}, "entry 3 of the ledger is of the unknown kind 'transfer'"),
    ],
)
def test_what_a_newer_version_wrote_asks_for_an_upgrade(book, number, change, message):
    values = book.values()
    values[number - 1] |= change
    with pytest.raises(ConfigError, match=f"{message}: upgrade"):
        replay(rehashed(values, number))


def test_a_ledger_is_opened_once_and_first(book):
    with pytest.raises(PrivacyError, match="opened once"):
        book.say(Opened(site="A", cohort="rare", cap=Cap(epsilon=9.0, delta=1e-5)))
    values = book.values()[1:]
    values[0]["sequence"] = 1
    with pytest.raises(PrivacyError, match="entry 1 of the ledger is of kind 'reserve'"):
        replay(rehashed(values[:1], 1))
