"""Random lives of a ledger against a plain model with its own arithmetic."""

import copy
import json
import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from functools import cache
from math import exp, sqrt
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from scipy.optimize import brentq
from scipy.stats import norm

from huizhen.client.ledger import Ledger
from huizhen.protocol.accounting import Spend
from huizhen.protocol.errors import BudgetExhaustedError, PrivacyError, ReleaseLostError
from huizhen.protocol.ledger_entries import Cap
from huizhen.protocol.ledger_statement import totals, verify_export

DELTA = 1e-5
SPENDS = {
    "light": Spend(noise_multiplier=20.0, sampling_rate=1.0, steps=1),
    "heavy": Spend(noise_multiplier=10.0, sampling_rate=1.0, steps=2),
}
CAPS = [(0.35, 5), (0.6, 8), (1.05, 12)]  # ε, and tenths of metrics ε
numbers = st.integers(0, 30)
STUDIES = ["1" * 64, "2" * 64, "3" * 64, "4" * 64]


@cache
def analytic(light, heavy):
    """ε of so many rounds of each: one Gaussian, Balle and Wang 2018, Theorem 8."""
    if light == heavy == 0:
        return 0.0
    mu = sqrt(light * 1 / 20**2 + heavy * 2 / 10**2)
    excess = lambda e: norm.cdf(mu / 2 - e / mu) - exp(e) * norm.cdf(-mu / 2 - e / mu) - DELTA  # noqa: E731
    return brentq(excess, 0, 50, xtol=1e-12) if excess(0) > 0 else 0.0


def within(epsilon, cap):
    assert abs(epsilon / cap - 1) > 4e-3, "the accountant rounds up by less than 0.1 %"
    return epsilon <= cap


class Model:
    """The rules once more, in lists and sums."""

    def __init__(self, cap):
        self.cap, self.studies, self.metrics, self.length = cap, {}, 0, 1

    def epsilon(self, rounds_of):
        rounds = {"light": 0, "heavy": 0}
        for study in self.studies.values():
            rounds[study["spend"]] += rounds_of(study)
        return analytic(**rounds)

    def charged(self):
        return self.epsilon(lambda s: len(s["charged"]))

    def committed(self):
        return self.epsilon(lambda s: len(s["charged"]) if s["closed"] else s["rounds"])

    def is_open(self, name):
        return name in self.studies and not self.studies[name]["closed"]

    def reserve(self, name, spend, rounds):
        """Return whether it is refused, ignored or written."""
        if name in self.studies:
            study = self.studies[name]
            is_same = (study["spend"], study["rounds"]) == (spend, rounds)
            return "ignored" if is_same and not study["closed"] else PrivacyError
        after = copy.deepcopy(self)
        after.studies[name] = {
            "spend": spend, "rounds": rounds, "charged": [], "closed": False,
            "answered": set(), "metrics": False,
        }  # fmt: skip
        if not within(after.committed(), self.cap[0]):
            return BudgetExhaustedError
        self.studies = after.studies
        return "written"

    def charge(self, name, round):
        if not self.is_open(name):
            return PrivacyError
        charged = self.studies[name]["charged"]
        if round in self.studies[name]["answered"]:
            return PrivacyError
        if charged and round <= charged[-1]:
            return "ignored" if round == charged[-1] else PrivacyError
        if len(charged) == self.studies[name]["rounds"]:
            return BudgetExhaustedError
        if not within(self.committed(), self.cap[0]):
            after = copy.deepcopy(self)
            after.studies[name]["charged"].append(round)
            if not within(after.charged(), self.cap[0]):
                return BudgetExhaustedError
        charged.append(round)
        return "written"

    def answer(self, name, round):
        if not self.is_open(name):
            return PrivacyError
        study = self.studies[name]
        if round in study["answered"] or [round] != study["charged"][-1:]:
            return PrivacyError
        study["answered"].add(round)
        return "written"

    def charge_metrics(self, name, tenths):
        if not self.is_open(name):
            return PrivacyError
        if self.studies[name]["metrics"]:
            return ReleaseLostError
        if self.metrics + tenths > self.cap[1]:
            return BudgetExhaustedError
        self.metrics += tenths
        self.studies[name]["metrics"] = True
        return "written"

    def close(self, name):
        if name not in self.studies:
            return PrivacyError
        was, self.studies[name]["closed"] = self.studies[name]["closed"], True
        return "ignored" if was else "written"

    def change_cap(self, cap):
        was, self.cap = self.cap, cap
        return "ignored" if was == cap else "written"


def as_cap(cap):
    return Cap(epsilon=cap[0], delta=DELTA, metrics_epsilon=cap[1] / 10)


class LedgerMachine(RuleBasedStateMachine):
    """One ledger, sometimes through a second connection, sometimes opened anew."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "site" / "ledger.sqlite"
        self.now = datetime(2020, 1, 1, tzinfo=UTC)
        self.backup, self.backed_up = self.folder / "backup", 0

    def clock(self):
        self.now += timedelta(seconds=1)
        return self.now

    @initialize(cap=st.sampled_from(CAPS))
    def create(self, cap):
        self.model = Model(cap)
        ledger = Ledger.create(
            self.path, site="A", cohort="rare", cap=as_cap(cap), clock=self.clock
        )
        self.connections = [ledger, Ledger.open(self.path, clock=self.clock)]
        self.heads = [ledger.head()]

    def check(self, expected, write):
        if isinstance(expected, str):
            entry = write(self.connections[0])
            if expected == "written":
                self.heads.append(entry.head)
            assert entry.head in self.heads
        else:
            with pytest.raises(expected) as caught:
                write(self.connections[0])
            assert caught.type is expected
        assert self.connections[0].head() == self.heads[-1]

    @rule(
        name=st.sampled_from(STUDIES[:3]),
        spend=st.sampled_from(sorted(SPENDS)),
        rounds=st.integers(1, 4),
    )
    def reserve(self, name, spend, rounds):
        asked = (name, SPENDS[spend], rounds)
        expected = self.model.reserve(name, spend, rounds)
        if expected is PrivacyError:
            with pytest.raises(PrivacyError):
                self.connections[0].would_exceed(*asked)
        else:
            exceeds = self.connections[0].would_exceed(*asked)
            assert exceeds == (expected is BudgetExhaustedError)
        self.check(expected, lambda ledger: ledger.reserve(*asked))

    def some_study(self, number):
        """Mostly one that has reserved something: the rest is quickly refused."""
        known = list(self.model.studies) or STUDIES
        return known[number % len(known)] if number else STUDIES[-1]

    @rule(number=numbers, steps=st.lists(st.sampled_from([1, 1, 1, 2, 0, -1]), max_size=4))
    def charge(self, number, steps):
        name = self.some_study(number)
        for step in steps:
            charged = self.model.studies.get(name, {"charged": []})["charged"]
            round = max(1, max(charged, default=0) + step)
            self.check(
                self.model.charge(name, round),
                lambda ledger, round=round: ledger.charge(name, round),
            )

    @rule(number=numbers, step=st.sampled_from([0, 0, 0, 1, -1]))
    def answer(self, number, step):
        name = self.some_study(number)
        charged = self.model.studies.get(name, {"charged": []})["charged"]
        round = max(1, max(charged, default=0) + step)
        expected = self.model.answer(name, round)
        self.check(expected, lambda ledger: ledger.answer(name, round, b"asked", b"sent"))
        known = self.model.studies.get(name, {"answered": set()})["answered"]
        assert (self.connections[0].answered(name, round) is not None) == (round in known)

    @rule(number=numbers, tenths=st.integers(1, 3))
    def charge_metrics(self, number, tenths):
        name = self.some_study(number)
        expected = self.model.charge_metrics(name, tenths)
        self.check(expected, lambda ledger: ledger.charge_metrics(name, "top1", tenths / 10))

    @rule(
        what=st.sampled_from(["close", "cap", "other", "reopen", "back up", "restore"]),
        number=numbers,
    )
    def do_something_rare(self, what, number):
        match what:
            case "close":
                name = self.some_study(number)
                self.check(self.model.close(name), lambda ledger: ledger.close(name))
            case "cap":
                cap = CAPS[number % 3]
                write = lambda ledger: ledger.change_cap(as_cap(cap))  # noqa: E731
                self.check(self.model.change_cap(cap), write)
            case "other":
                self.connections.reverse()
            case "reopen":
                self.connections[0].shut()
                witnessed = self.heads[number % len(self.heads)]
                self.connections[0] = Ledger.open(self.path, witnessed=witnessed, clock=self.clock)
            case "back up":
                self.backed_up = len(self.heads)
                shutil.rmtree(self.backup, ignore_errors=True)
                shutil.copytree(self.path.parent, self.backup)
            case "restore" if len(self.heads) > self.backed_up > 0:
                with pytest.raises(PrivacyError, match="older copy"):
                    Ledger.open(self.backup / "ledger.sqlite", witnessed=self.heads[-1])

    @invariant()
    def the_totals_are_those_of_the_model(self):
        found = self.connections[0].totals()
        assert found.head.sequence == len(self.heads)
        assert found.epsilon_charged == pytest.approx(self.model.charged(), rel=2e-3)
        assert found.epsilon_committed == pytest.approx(self.model.committed(), rel=2e-3)
        assert found.metrics_epsilon == self.model.metrics / 10
        assert found.cap == as_cap(self.model.cap)
        assert {s.study: (s.rounds_charged, s.is_closed) for s in found.studies} == {
            name: (len(s["charged"]), s["closed"]) for name, s in self.model.studies.items()
        }

    def teardown(self):
        if hasattr(self, "connections"):
            document = json.dumps(self.connections[0].export()).encode()
            account = verify_export(document, self.heads[-1])
            assert [entry.head for entry in account.entries] == self.heads
            assert totals(account) == self.connections[1].verify()
            for connection in self.connections:
                connection.shut()
        shutil.rmtree(self.folder)


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(
    max_examples=80,
    stateful_step_count=25,
    suppress_health_check=[HealthCheck.too_slow],
)
