"""An exported ledger is checked by its entries alone, and nothing it states is believed."""

import copy
import hashlib
import json
from datetime import UTC, datetime, timedelta

import pytest
import rfc8785

from huizhen.protocol.accounting import Spend
from huizhen.protocol.errors import BudgetExhaustedError, ConfigError, PrivacyError
from huizhen.protocol.ledger import replay
from huizhen.protocol.ledger_entries import (
    Body,
    Cap,
    CapChanged,
    Charged,
    Closed,
    MetricsCharged,
    Opened,
    Reserved,
    make_entry,
)
from huizhen.protocol.ledger_statement import export, totals, verify_export

S, T = "5" * 64, "7" * 64
SPEND = Spend(noise_multiplier=20.0, sampling_rate=1.0, steps=2)
BODIES: list[Body] = [
    Reserved(study=S, spend=SPEND, rounds=4),
    Charged(study=S, round=1),
    Charged(study=S, round=3),
    MetricsCharged(study=S, name="top1", epsilon=0.25),
    Reserved(study=T, spend=SPEND, rounds=2),
    CapChanged(cap=Cap(epsilon=2.0, delta=1e-6, metrics_epsilon=0.5)),
    Closed(study=S),
]


@pytest.fixture
def account():
    """One entry of each kind, eight in all."""
    now = datetime(2026, 11, 22, 8, 30, tzinfo=UTC)
    cap = Cap(epsilon=1.05, delta=1e-5, metrics_epsilon=1.0)
    account = replay([make_entry(Opened(site="A", cohort="rare", cap=cap), now, None).to_json()])
    for body in BODIES:
        now += timedelta(seconds=1)
        account.append(account.follow(body, now).to_json())
    return account


def values(account):
    return copy.deepcopy([entry.to_json() for entry in account.entries])


def rehashed(entries, first):
    """Make the digests from entry number ``first`` on fit again, as a forger would."""
    for i in range(first - 1, len(entries)):
        rest = {name: value for name, value in entries[i].items() if name != "digest"}
        rest["previous"] = entries[i - 1]["digest"]
        entries[i] = {**rest, "digest": hashlib.sha256(rfc8785.dumps(rest)).hexdigest()}
    return entries


def written(account, change=lambda document: None):
    document = json.loads(json.dumps(export(account)))
    change(document)
    return json.dumps(document, indent=1).encode()


def test_an_export_is_checked_without_the_ledger(account):
    checked = verify_export(written(account), account.head)
    assert checked.entries == account.entries
    assert totals(checked) == totals(account)


def test_whole_numbers_may_be_written_without_a_point(account):
    checked = verify_export(written(account, lambda d: d["totals"]["cap"].update(epsilon=2)))
    assert checked.head == account.head


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        (("epsilon_charged",), 0.01, "epsilon_charged"),
        (("epsilon_committed",), None, "epsilon_committed"),
        (("epsilon_left",), float("nan"), "epsilon_left"),
        (("epsilon_left",), 10**400, "epsilon_left"),
        (("metrics_epsilon",), 0.0, "metrics_epsilon"),
        (("cap", "epsilon"), 1.0, "cap.epsilon"),
        (("cohort",), "other", "cohort"),
        (("head", "sequence"), 9, "head.sequence"),
        (("head",), [[]], "head"),
        (("studies", 0, "rounds_charged"), 1, r"studies\[0\].rounds_charged"),
        (("studies", 0, "is_closed"), 1, r"studies\[0\].is_closed"),
        (("studies",), [], "studies"),
        (("more",), 1, "than"),
    ],
)
def test_totals_that_are_not_those_of_the_entries_are_refused(account, path, value, name):
    def change(document):
        place = document["totals"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    with pytest.raises(PrivacyError, match=rf"^export says another totals[. ]{name}"):
        verify_export(written(account, change))


def test_totals_of_any_depth_are_refused_in_one_line(account):
    deep = "[" * 900 + "]" * 900
    for old in ('"epsilon_left": ', '"studies": '):
        text = json.dumps(export(account)).replace(old, f'{old}{deep}, "x": ')
        with pytest.raises(PrivacyError, match="export says another totals"):
            verify_export(text.encode())


def test_an_export_of_an_older_copy_is_refused_by_a_witness(account):
    older = replay(values(account)[:5])
    with pytest.raises(PrivacyError, match="older copy or another ledger"):
        verify_export(written(older), account.head)


def test_an_exported_reservation_over_the_cap_of_its_time_is_named(account):
    entries = values(account)
    entries[1]["body"]["rounds"] = 400
    forged = replay(rehashed(entries, 2))  # the chain alone does not show it
    with pytest.raises(BudgetExhaustedError, match=r"^entry 2 of the ledger: epsilon would reach"):
        verify_export(written(forged))


def test_exported_metrics_and_charges_over_the_cap_of_their_time_are_named(account):
    forged = values(account)
    forged[4]["body"]["epsilon"] = 1.5
    with pytest.raises(BudgetExhaustedError, match=r"^entry 5 of the ledger: metrics epsilon"):
        replay(rehashed(forged, 5), priced=True)
    forged = values(account)
    low = {"epsilon": 0.01, "delta": 1e-5, "metrics_epsilon": 1}
    forged.insert(3, {**forged[6], "time": forged[3]["time"], "body": {"cap": low}})
    for number, value in enumerate(forged, 1):
        value["sequence"] = number
    with pytest.raises(BudgetExhaustedError, match=r"^entry 5 of the ledger: .* after round 3"):
        replay(rehashed(forged, 4), priced=True)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"format": "huizhen ledger 2", "accountant": "", "entries": [], "totals": {}}',
        b'{"format": "huizhen ledger 1", "accountant": "", "entries": {}, "totals": {}}',
        b'{"a": 1, "a": 1}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_export_is_refused(data):
    with pytest.raises(ConfigError, match="export"):
        verify_export(data)
