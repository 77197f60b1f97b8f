"""What a decision is made from follows from the signed study and the ledger alone."""

import tomllib
from datetime import UTC, datetime, timedelta

import pytest

from huizhen.client.ledger import Ledger
from huizhen.client.situation import LedgerView, Offered, Situation
from huizhen.protocol.accounting import Spend
from huizhen.protocol.errors import ConfigError, ProtocolError
from huizhen.protocol.ledger_entries import Cap
from huizhen.protocol.mechanism import Mechanism
from huizhen.protocol.statements import StudyOffer, stamp
from huizhen.protocol.study import parse_study

NOW = datetime(2026, 11, 24, 0, 30, tzinfo=UTC)
END = NOW + timedelta(days=30)
STUDY = """
[study]
name = "risk"
[task]
kind = "tabular"
features = { age = [0, 100] }
label = "sick"
labels = ["yes", "no"]
[strategy]
name = "fedavg"
[privacy]
epsilon = 2.0
[sites]
North.patients_public = 300
"""
SPEND = Spend(noise_multiplier=8.0, sampling_rate=0.2, steps=4)


def study_of(**privacy):
    tables = tomllib.loads(STUDY)
    tables["privacy"] |= privacy
    return parse_study(tables, "study.toml")


def offer_of(study, **changes):
    body = {
        "alliance": "Test",
        "study": study.resolved(),
        "digest": study.digest(),
        "adapter": "a" * 64,
        "state": "b" * 64,
        "issued": stamp(NOW),
        "ends": stamp(END),
    }
    return StudyOffer(**body | changes)


def test_what_a_study_spends_follows_from_the_study():
    study = study_of()
    found = Offered.of(offer_of(study))
    assert found.study == study
    assert found.mechanism == Mechanism.of(study)
    assert (found.digest, found.ends) == (study.digest(), END)


def test_a_study_without_a_unit_has_no_mechanism():
    assert Offered.of(offer_of(study_of(unit="none"))).mechanism is None


def test_an_offer_with_the_digest_of_another_study_is_refused():
    with pytest.raises(ProtocolError, match="offered study has digest"):
        Offered.of(offer_of(study_of(), digest=study_of(epsilon=3.0).digest()))


def test_an_epsilon_that_no_noise_gives_is_refused():
    with pytest.raises(ConfigError):
        Offered.of(offer_of(study_of(epsilon=1e-9)))


@pytest.mark.parametrize(
    ("delta", "spend"),
    [
        (1e-6, {}),
        (1e-5, {"sampling_rate": 0.3}),
        (1e-5, {"steps": 5}),
    ],
)
def test_the_mechanism_of_another_study_is_refused(delta, spend):
    study = study_of()
    values = {"noise_multiplier": 8.0, "sampling_rate": 0.2, "steps": 4} | spend
    mechanism = Mechanism(per_round=Spend(**values), delta=delta)
    with pytest.raises(ValueError, match="which is not the study's"):
        Offered(study=study, digest=study.digest(), ends=END, mechanism=mechanism)


@pytest.mark.parametrize("unit", ["patient", "none"])
def test_a_mechanism_is_there_where_there_is_a_unit_and_nowhere_else(unit):
    study = study_of(unit=unit)
    mechanism = Mechanism(per_round=SPEND, delta=1e-5) if unit == "none" else None
    with pytest.raises(ValueError, match=f"the study's unit is '{unit}'"):
        Offered(study=study, digest=study.digest(), ends=END, mechanism=mechanism)


def test_a_time_without_a_zone_is_refused():
    naive = NOW.replace(tzinfo=None)
    study = study_of(unit="none")
    with pytest.raises(ValueError, match="expected one with a zone"):
        Offered(study=study, digest=study.digest(), ends=naive, mechanism=None)
    with pytest.raises(ValueError, match="expected one with a zone"):
        Situation(
            now=naive,
            is_stopped=False,
            is_paused=False,
            walls="full",
            rounds_today=0,
            parameters=1,
        )


@pytest.fixture
def ledger(tmp_path):
    cap = Cap(epsilon=2.0, delta=1e-5, metrics_epsilon=0.75)
    path = tmp_path / "site" / "ledger.sqlite"
    with Ledger.create(path, site="North", cohort="rare", cap=cap) as ledger:
        yield ledger


def view(ledger, digest, rounds=20):
    exceeds = ledger.would_exceed(digest, SPEND, rounds)
    return LedgerView.of(ledger.totals(), digest, would_exceed=exceeds)


def test_a_ledger_knows_nothing_of_a_new_study(ledger):
    assert view(ledger, "1" * 64) == LedgerView(
        site="North",
        cohort="rare",
        unit="patient",
        is_closed=False,
        last_round=0,
        would_exceed=False,
        has_metrics=False,
        metrics_left=0.75,
    )
    assert view(ledger, "1" * 64, rounds=2000).would_exceed


def test_a_ledger_knows_what_a_study_was_charged(ledger):
    digest, other = "1" * 64, "2" * 64
    ledger.reserve(digest, SPEND, 20)
    ledger.charge(digest, 3)
    ledger.charge(digest, 5)
    found = view(ledger, digest)
    assert (found.last_round, found.has_metrics, found.is_closed) == (5, False, False)
    ledger.charge_metrics(digest, "held_out", 0.5)
    found = view(ledger, digest)
    assert (found.has_metrics, found.metrics_left) == (True, 0.25)
    found = view(ledger, other)
    assert (found.last_round, found.has_metrics, found.metrics_left) == (0, False, 0.25)


def test_a_ledger_knows_that_a_study_was_closed(ledger):
    digest = "1" * 64
    ledger.reserve(digest, SPEND, 20)
    ledger.close(digest)
    assert LedgerView.of(ledger.totals(), digest, would_exceed=False).is_closed
    assert not LedgerView.of(ledger.totals(), "2" * 64, would_exceed=False).is_closed
