"""Every line of a policy refuses alone; no restriction makes a refusal an allowance."""

import copy
import dataclasses
import inspect
import itertools
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from huizhen.client.decision import decide, objections, objections_to_approval
from huizhen.client.policy import base_digest, parse_policy
from huizhen.client.situation import (
    Allowed,
    Code,
    LedgerView,
    Offered,
    Refused,
    SignedApproval,
    Situation,
)
from huizhen.protocol.accounting import Spend
from huizhen.protocol.documents import public_of, sign
from huizhen.protocol.errors import WireError
from huizhen.protocol.mechanism import Mechanism
from huizhen.protocol.statements import Announcement, Approval, Refusal, stamp
from huizhen.protocol.study import parse_study

MIDNIGHT = datetime(2026, 11, 24, 0, 30, tzinfo=UTC)  # a Tuesday
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
FILES = {"model.safetensors": "ab" * 32, "config.json": "cd" * 32}
KEYS = {"Wang": "a" * 64, "Li": "b" * 64, "Zhao": "c" * 64}

# A world in which nothing speaks against taking part, at the limit of every key that has one.
WORLD: dict[str, Any] = {
    "policy": {
        "policy": {"site": "North"},
        "privacy": {
            "max_epsilon": 4.0,
            "max_delta": 1e-5,
            "min_noise_multiplier": 1.125,
            "metrics": True,
            "max_metrics_epsilon": 0.5,
            "metrics_minimum": 15,
        },
        "cohorts": {
            "rare": {"epsilon": 4.0, "unit": "patient", "min_patients": 300, "data": "a.jsonl"}
        },
        "bases": {"allowed": {"small": base_digest(FILES)}},
        "adapter": {"max_rank": 8, "max_parameters": 5000, "target_modules": ["q_proj", "v_proj"]},
        "rounds": {"min_sites": 4, "max_rounds": 20, "max_rounds_per_day": 7},
        "schedule": {"windows": ["Tue 08:30-09:00"], "timezone": "Asia/Shanghai"},
        "approval": {"people": 2, "stewards": KEYS},
        "sandbox": {"require": "full"},
    },
    "study": {
        "study": {"name": "case reports"},
        "base": {"name": "small", "digests": FILES},
        "adapter": {"rank": 8, "target_modules": ["q_proj", "v_proj"]},
        "task": {"kind": "instruction", "text": "{q}", "answer": "{a}"},
        "privacy": {"epsilon": 4.0, "delta": 1e-5, "metrics_epsilon": 0.5, "metrics_minimum": 15},
        "rounds": {"count": 20, "local_steps": 4},
        "sites": {name: {"patients_public": 300} for name in ("North", "South", "East", "West")},
    },
    "offer": {"noise_multiplier": 1.125, "ends": MIDNIGHT + DAY},
    "approval": {
        "study": "the study",
        "site": "North",
        "cohort": "rare",
        "epsilon_cap": 4.0,
        "issued": MIDNIGHT,
        "expires": MIDNIGHT + HOUR,
    },
    "signed": {"is_signed_by_site": True, "stewards": ("Li", "Wang")},
    "ledger": {
        "site": "North",
        "cohort": "rare",
        "unit": "patient",
        "is_closed": False,
        "last_round": 4,
        "would_exceed": False,
        "has_metrics": False,
        "metrics_left": 0.5,
    },
    "announcement": {
        "study": "the study",
        "round": 5,
        "sites": ("North", "South", "East", "West"),
        "deadline": MIDNIGHT + HOUR,
    },
    "here": {
        "now": MIDNIGHT,
        "is_stopped": False,
        "is_paused": False,
        "walls": "full",
        "rounds_today": 6,
        "parameters": 5000,
    },
}
GONE = object()  # in place of a value that is to be absent


class Parts(NamedTuple):
    policy: Any
    offered: Offered
    approval: SignedApproval | None
    ledger: LedgerView | None
    announcement: Announcement
    here: Situation

    def codes(self):
        return {refused.code for refused in objections(*self)}

    def before(self):
        assert self.approval is not None
        draft = self.approval.approval
        return self.policy, self.offered, draft, self.ledger, self.here.now


def changed(tree, changes):
    tree = copy.deepcopy(tree)
    for path, value in changes.items():
        *way, last = path.split("/")
        place = tree
        for name in way:
            place = place.setdefault(name, {})
        if value is GONE:
            del place[last]
        else:
            place[last] = value
    return tree


def offered_of(tables, *, noise_multiplier, ends):
    study = parse_study(tables, "study.toml")
    spend = Spend(
        noise_multiplier=noise_multiplier,
        sampling_rate=study.privacy.sampling_rate,
        steps=study.rounds.local_steps,
    )
    mechanism = Mechanism(per_round=spend, delta=study.privacy.delta) if study.is_private else None
    return Offered(study=study, digest=study.digest(), ends=ends, mechanism=mechanism)


def named(values, digest):
    """Times as statements have them, and the study by its digest."""
    found = {k: stamp(v) if isinstance(v, datetime) else v for k, v in values.items()}
    return {k: digest if v == "the study" else v for k, v in found.items()} | {"alliance": "Test"}


def parts(**changes):
    world = changed(WORLD, {path.replace("__", "/"): value for path, value in changes.items()})
    offered = offered_of(world["study"], **world["offer"])
    approval = None
    if world.get("signed") is not None:
        body = Approval(**named(world["approval"], offered.digest))
        approval = SignedApproval(approval=body, **world["signed"])
    announcement = Announcement(
        attempt=1,
        parent="e" * 64,
        adapter="f" * 64,
        membership=3,
        issued=stamp(MIDNIGHT),
        **named(world["announcement"], offered.digest),
    )
    return Parts(
        parse_policy(world["policy"], "policy.toml"),
        offered,
        approval,
        None if world.get("ledger") is None else LedgerView(**world["ledger"]),
        announcement,
        Situation(**world["here"]),
    )


def case(name, code, key=None, /, *, early=False, **changes):
    """A change to the world, the code that it alone gives, and the policy's key that decides.

    Early: refused as well when people would approve the study.
    """
    return pytest.param(code, key, early, changes, id=name)


METRICS = {"announcement__round": 21, "ledger__last_round": 20}
NONE: dict[str, Any] = {
    "policy__cohorts__rare__unit": "none",
    "study__privacy": {"unit": "none"},
    "approval__epsilon_cap": None,
    "ledger": None,
}
TABULAR = {
    "study__base": GONE,
    "study__adapter": GONE,
    "study__task": {
        "kind": "tabular",
        "features": {"age": [0, 100]},
        "label": "sick",
        "labels": ["yes", "no"],
    },
    "study__strategy": {"name": "fedavg"},
}
FOUR = WORLD["study"]["sites"]
THREE = {name: FOUR[name] for name in ("North", "South", "East")}

CASES = [
    case("as it is", None),
    # what stops everything
    case("stopped", "stopped", "stop.file", here__is_stopped=True),
    case("stopped by another file", "stopped", "stop.file", here__is_stopped=True,
         policy__stop={"file": "HALT"}),
    case("paused", "paused", here__is_paused=True),
    # the announcement
    case("another study is announced", "other_study", announcement__study="9" * 64),
    case("other sites are asked", "not_asked", policy__rounds__min_sites=3,
         announcement__sites=("South", "East", "West")),
    case("three sites are asked", "too_few_sites", "rounds.min_sites",
         announcement__sites=("North", "South", "East")),
    case("a site is asked twice", "too_few_sites", "rounds.min_sites",
         announcement__sites=("North", "South", "East", "East")),
    case("a stranger is asked", "too_few_sites", "rounds.min_sites",
         announcement__sites=("North", "South", "East", "Nowhere")),
    case("strangers are asked besides", None,
         announcement__sites=("North", "South", "East", "West", "Nowhere")),
    case("alone, where that is allowed", None, policy__rounds__min_sites=1,
         announcement__sites=("North",)),
    case("alone", "too_few_sites", "rounds.min_sites", policy__rounds__min_sites=2,
         announcement__sites=("North",)),
    case("the first round", None, announcement__round=1, ledger__last_round=0),
    case("the last round", None, announcement__round=20),
    case("two rounds past the last", "round_past_the_end", announcement__round=22),
    case("metrics that the study has not", "round_past_the_end", announcement__round=21,
         study__privacy__metrics_epsilon=GONE, policy__privacy__metrics=False),
    case("the charged round again", None, ledger__last_round=5),
    case("a round before the charged one", "round_went_back", ledger__last_round=6),
    case("a round before the metrics", "round_went_back", ledger__last_round=20,
         ledger__has_metrics=True),
    case("a second before the deadline", None, announcement__deadline=MIDNIGHT + HOUR / 3600),
    case("at the deadline", "deadline_passed", announcement__deadline=MIDNIGHT),
    case("after the deadline", "deadline_passed", announcement__deadline=MIDNIGHT - DAY),
    # the approval
    case("no approval", "not_approved", signed=None, approval=None),
    case("signed by people alone", "not_approved", signed__is_signed_by_site=False),
    case("an approval of another study", "not_approved", early=True, approval__study="9" * 64),
    case("an approval of another site", "not_approved", early=True, approval__site="South"),
    case("one steward", "needs_second_approval", "approval.people", signed__stewards=("Li",)),
    case("no steward", "needs_second_approval", "approval.people", signed__stewards=()),
    case("one steward twice", "needs_second_approval", "approval.people",
         signed__stewards=("Li", "Li")),
    case("a former steward", "needs_second_approval", "approval.stewards",
         policy__approval__stewards={name: KEYS[name] for name in ("Wang", "Zhao")}),
    case("two of three that must", "needs_second_approval", "approval.people",
         policy__approval__people=3),
    case("three stewards", None, policy__approval__people=3,
         signed__stewards=("Li", "Wang", "Zhao")),
    case("one that must", None, policy__approval__people=1, signed__stewards=("Zhao",)),
    case("nobody that must", None, policy__approval={}, signed__stewards=()),
    case("signed by stewards of nobody", None, policy__approval={}, signed__stewards=("Li",)),
    case("approved in a second", "approval_not_yet", early=True,
         approval__issued=MIDNIGHT + HOUR / 3600),
    case("approved a while ago", None, approval__issued=MIDNIGHT - 99 * DAY),
    case("a second before it expires", None, approval__expires=MIDNIGHT + HOUR / 3600),
    case("as it expires", "approval_expired", early=True, approval__expires=MIDNIGHT),
    case("after it expired", "approval_expired", early=True, approval__expires=MIDNIGHT - DAY),
    case("a lower cap of people", "epsilon_over_cap", early=True, approval__epsilon_cap=3.99),
    case("no cap of people", "epsilon_over_cap", early=True, approval__epsilon_cap=None),
    case("a higher cap of people", None, approval__epsilon_cap=40.0),
    case("a cohort without a section", "cohort_unknown", "cohorts", early=True,
         policy__cohorts={}),
    case("another cohort has a section", "cohort_unknown", "cohorts", early=True,
         policy__cohorts={"common": WORLD["policy"]["cohorts"]["rare"]}),
    case("an approval of another cohort", "cohort_unknown", "cohorts", early=True,
         approval__cohort="Rare", ledger__cohort="Rare"),
    # the study
    case("a study of others", "not_in_study", early=True, study__sites={
        "Nord": FOUR["North"], **{name: FOUR[name] for name in ("South", "East", "West")}},
        study__rounds__quorum=4, announcement__sites=("North", "Nord", "South", "East", "West")),
    case("a second before the study's end", None, offer__ends=MIDNIGHT + HOUR / 3600),
    case("at the study's end", "study_ended", early=True, offer__ends=MIDNIGHT),
    case("after the study's end", "study_ended", early=True, offer__ends=MIDNIGHT - DAY),
    case("a larger epsilon than any study may have", "epsilon_over_cap", "privacy.max_epsilon",
         early=True, policy__privacy__max_epsilon=3.99),
    case("an epsilon of a hundred", "epsilon_over_cap", "privacy.max_epsilon", early=True,
         study__privacy__epsilon=100.0, policy__cohorts__rare__epsilon=100.0,
         approval__epsilon_cap=100.0),
    case("a larger delta", "delta_too_large", "privacy.max_delta", early=True,
         study__privacy__delta=1.01e-5),
    case("a smaller delta", None, study__privacy__delta=1e-9),
    case("a smaller max_delta", "delta_too_large", "privacy.max_delta", early=True,
         policy__privacy__max_delta=1e-6),
    case("less noise", "noise_too_low", "privacy.min_noise_multiplier", early=True,
         offer__noise_multiplier=1.12),
    case("more noise is demanded", "noise_too_low", "privacy.min_noise_multiplier", early=True,
         policy__privacy__min_noise_multiplier=2.0),
    case("more noise", None, offer__noise_multiplier=9.0),
    case("a larger epsilon than the cohort's", "epsilon_over_cap", "cohorts.epsilon", early=True,
         policy__cohorts__rare__epsilon=3.99),
    case("no epsilon decided", "epsilon_over_cap", "cohorts.epsilon", early=True,
         policy__cohorts__rare__epsilon=GONE),
    case("a smaller epsilon", None, study__privacy__epsilon=0.5),
    case("unit record", "unit_not_allowed", "cohorts.unit", early=True,
         study__privacy__unit="record", ledger__unit="record"),
    case("unit record, allowed", None, study__privacy__unit="record", ledger__unit="record",
         policy__cohorts__rare__unit="record"),
    case("unit patient where record would do", None, policy__cohorts__rare__unit="record"),
    case("unit patient where none would do", None, policy__cohorts__rare__unit="none"),
    case("unit record where none would do", None, study__privacy__unit="record",
         ledger__unit="record", policy__cohorts__rare__unit="none"),
    case("unit none, allowed", None, **NONE),
    case("unit none, a cohort without epsilon", None,
         **{**NONE, "policy__cohorts__rare__epsilon": GONE}),
    case("unit none", "unit_not_allowed", "cohorts.unit", early=True,
         **{**NONE, "policy__cohorts__rare__unit": "patient"}),
    case("unit none where record would do", "unit_not_allowed", "cohorts.unit", early=True,
         **{**NONE, "policy__cohorts__rare__unit": "record"}),
    case("unit none, approved with a cap", "epsilon_over_cap", early=True,
         **{**NONE, "approval__epsilon_cap": 1000.0}),
    case("unit none, metrics", "round_past_the_end",
         **{**NONE, "announcement__round": 21}),
    case("too few patients", "too_few_patients", "cohorts.min_patients", early=True,
         study__sites={**FOUR, "North": {"patients_public": 299}}),
    case("too few patients for a higher minimum", "too_few_patients", "cohorts.min_patients",
         early=True, policy__cohorts__rare__min_patients=301),
    case("few patients elsewhere", None,
         study__sites={**FOUR, "South": {"patients_public": 3}}),
    case("a base of another name", "base_not_allowed", "bases.allowed", early=True,
         study__base__name="smaller"),
    case("a base with another file", "base_not_allowed", "bases.allowed", early=True,
         study__base__digests={**FILES, "config.json": "ce" * 32}),
    case("a base with a file more", "base_not_allowed", "bases.allowed", early=True,
         study__base__digests={**FILES, "more.json": "cd" * 32}),
    case("a base with a file less", "base_not_allowed", "bases.allowed", early=True,
         study__base__digests={"model.safetensors": "ab" * 32}),
    case("a base with files exchanged", "base_not_allowed", "bases.allowed", early=True,
         study__base__digests=dict(zip(FILES, reversed(FILES.values()), strict=True))),
    case("a base without a file pinned", "base_not_allowed", "bases.allow_any", early=True,
         study__base__digests={}, policy__bases__allowed__small=base_digest({})),
    case("no base allowed", "base_not_allowed", "bases.allowed", early=True, policy__bases={}),
    case("any base allowed", None, policy__bases={"allow_any": True}),
    case("any base, none pinned", None, policy__bases={"allow_any": True},
         study__base__digests={}),
    case("a base allowed among others", None,
         policy__bases__allowed={"small": base_digest(FILES), "large": "1" * 64}),
    case("a larger rank", "rank_too_large", "adapter.max_rank", early=True,
         study__adapter__rank=9),
    case("a smaller rank allowed", "rank_too_large", "adapter.max_rank", early=True,
         policy__adapter__max_rank=7),
    case("a smaller rank", None, study__adapter__rank=1),
    case("another module", "module_not_allowed", "adapter.target_modules", early=True,
         study__adapter__target_modules=["q_proj", "lm_head"]),
    case("fewer modules allowed", "module_not_allowed", "adapter.target_modules", early=True,
         policy__adapter__target_modules=["q_proj"]),
    case("no modules allowed", "module_not_allowed", "adapter.target_modules", early=True,
         policy__adapter__target_modules=[]),
    case("a part of a module's name", "module_not_allowed", "adapter.target_modules", early=True,
         study__adapter__target_modules=["proj"]),
    case("fewer modules", None, study__adapter__target_modules=["v_proj"]),
    case("a study of three sites", "too_few_sites", "rounds.min_sites", early=True,
         study__sites=THREE, announcement__sites=("North", "South", "East")),
    case("a quorum of three", "too_few_sites", "rounds.min_sites", early=True,
         study__rounds__quorum=3),
    case("a quorum of four", None, study__rounds__quorum=4),
    case("five sites demanded", "too_few_sites", "rounds.min_sites", early=True,
         policy__rounds__min_sites=5),
    case("more rounds", "too_many_rounds", "rounds.max_rounds", early=True,
         study__rounds__count=21),
    case("fewer rounds allowed", "too_many_rounds", "rounds.max_rounds", early=True,
         policy__rounds__max_rounds=19),
    case("fewer rounds", None, study__rounds__count=5),
    case("a tabular study", None, **TABULAR),
    case("a tabular study where no base is allowed", None, **TABULAR, policy__bases={},
         policy__adapter__target_modules=[]),
    case("a tabular study of many features", "too_many_parameters", "adapter.max_parameters",
         **TABULAR, here__parameters=5001),
    # the ledger
    case("no ledger", "ledger_missing", early=True, ledger=None),
    case("a ledger of another site", "ledger_differs", early=True, ledger__site="South"),
    case("a ledger of another cohort", "ledger_differs", early=True, ledger__cohort="common"),
    case("a ledger by record", "ledger_differs", early=True, ledger__unit="record"),
    case("a ledger by patient", "ledger_differs", early=True, study__privacy__unit="record",
         policy__cohorts__rare__unit="record"),
    case("closed in the ledger", "ledger_closed", early=True, ledger__is_closed=True),
    case("over the ledger's cap", "ledger_would_pass", early=True, ledger__would_exceed=True),
    # metrics
    case("metrics", None, **METRICS),
    case("metrics not allowed", "metrics_not_allowed", "privacy.metrics", **METRICS,
         policy__privacy__metrics=False),
    case("metrics not allowed, in a round", None, policy__privacy__metrics=False),
    case("metrics of a larger epsilon", "metrics_not_allowed", "privacy.max_metrics_epsilon",
         **METRICS, policy__privacy__max_metrics_epsilon=0.49),
    case("metrics over fewer patients", "metrics_not_allowed", "privacy.metrics_minimum",
         **METRICS, policy__privacy__metrics_minimum=16),
    case("metrics over fewer patients, in a round", None, policy__privacy__metrics_minimum=16),
    case("metrics over the ledger's cap", "ledger_would_pass", **METRICS,
         ledger__metrics_left=0.49),
    case("the last round where no metrics are allowed", None, announcement__round=20,
         policy__privacy__metrics=False),
    case("metrics again", None, **METRICS, ledger__metrics_left=0.0, ledger__has_metrics=True),
    # the moment
    case("more parameters", "too_many_parameters", "adapter.max_parameters",
         here__parameters=5001),
    case("fewer parameters allowed", "too_many_parameters", "adapter.max_parameters",
         policy__adapter__max_parameters=4999),
    case("no network alone", "sandbox_too_weak", "sandbox.require", here__walls="network"),
    case("no sandbox", "sandbox_too_weak", "sandbox.require", here__walls="none"),
    case("no sandbox where no network is demanded", "sandbox_too_weak", "sandbox.require",
         policy__sandbox__require="network", here__walls="none"),
    case("no network, as demanded", None, policy__sandbox__require="network",
         here__walls="network"),
    case("all of it where no network is demanded", None, policy__sandbox__require="network"),
    case("no sandbox, as allowed", None, policy__sandbox__require="none",
         here__walls="none"),
    case("before the window", "outside_window", "schedule.windows",
         here__now=MIDNIGHT - HOUR / 3600, approval__issued=MIDNIGHT - DAY),
    case("at the window's end", "outside_window", "schedule.windows",
         here__now=MIDNIGHT + HOUR / 2),
    case("in the window's last second", None, here__now=MIDNIGHT + HOUR / 2 - HOUR / 3600),
    case("a window on another day", "outside_window", "schedule.windows",
         policy__schedule__windows=["Mon 08:00-24:00", "Wed-Sun 00:00-24:00"]),
    case("one of two windows", None,
         policy__schedule__windows=["Mon 00:00-24:00", "Mon-Fri 08:00-09:00"]),
    case("no window", "outside_window", "schedule.windows", policy__schedule__windows=[]),
    case("the window's time elsewhere", "outside_window", "schedule.timezone",
         policy__schedule__timezone="Europe/Berlin"),
    case("the hospital's time in another zone", None,
         here__now=datetime.fromisoformat("2026-11-23T19:30:00-05:00")),
    case("any time", None, policy__schedule={}),
    case("a charged round goes on after the window", None, ledger__last_round=5,
         here__now=MIDNIGHT + HOUR / 2),
    case("a charged round is asked on a full day", None, ledger__last_round=5,
         here__rounds_today=7),
    case("charged metrics go on after the window", None, **METRICS, ledger__has_metrics=True,
         here__now=MIDNIGHT + HOUR / 2),
    case("metrics wait for the window", "outside_window", "schedule.windows", **METRICS,
         here__now=MIDNIGHT + HOUR / 2),
    case("a round without a ledger waits for the window", "outside_window", "schedule.windows",
         **NONE, here__now=MIDNIGHT + HOUR / 2),
    case("a full day", "too_many_rounds_today", "rounds.max_rounds_per_day",
         here__rounds_today=7),
    case("fewer rounds a day", "too_many_rounds_today", "rounds.max_rounds_per_day",
         policy__rounds__max_rounds_per_day=6),
    case("the day's first round", None, here__rounds_today=0),
]  # fmt: skip


def test_there_are_a_hundred_cases():
    assert len(CASES) >= 100
    assert len({one.id for one in CASES}) == len(CASES)


@pytest.mark.parametrize(("code", "key", "early", "changes"), CASES)
def test_each_case_is_decided_by_the_one_thing_that_differs(code, key, early, changes):
    world = parts(**changes)
    decision = decide(*world)
    if code is None:
        assert decision == Allowed()
        assert list(objections(*world)) == []
        return
    assert isinstance(decision, Refused)
    assert world.codes() == {decision.code} == {code}
    if key is not None:
        section, _, name = key.partition(".")
        assert f"[{section}" in decision.line
        assert name in decision.line or name in ("stewards", "timezone", "allow_any", "allowed")


@pytest.mark.parametrize(("code", "key", "early", "changes"), CASES)
def test_people_are_told_before_they_approve(code, key, early, changes):
    world = parts(**changes)
    if world.approval is not None:
        found = {refused.code for refused in objections_to_approval(*world.before())}
        assert found == ({code} if early else set())


def test_every_code_is_given_and_may_leave():
    given_codes = {one.values[0] for one in CASES} - {None}
    assert given_codes == set(get_args(Code))
    for code in given_codes:
        Refusal(
            alliance="Test",
            study="a" * 64,
            round=1,
            attempt=1,
            site="North",
            announcement="b" * 64,
            code=code,
        )


def test_a_line_says_what_was_found_and_which_key_decided():
    found = parts(
        here__is_stopped=True,
        here__now=MIDNIGHT + HOUR / 2,
        policy__cohorts__rare__epsilon=GONE,
        policy__adapter__target_modules=["k_proj"],
        policy__rounds__min_sites=5,
        signed__stewards=("Zhao",),
        ledger__would_exceed=True,
    )
    assert [refused.line for refused in objections(*found)] == [
        "[stop] file 'STOP' exists: remove it to go on",
        "round 5 asks 4 sites of the study, [rounds] min_sites is 5",
        "1 of 2 [approval] people have signed: ask Li, Wang",
        "the study trains 'q_proj', 'v_proj', which [adapter] target_modules does not allow",
        "the study has 4 sites and quorum 4, [rounds] min_sites is 5",
        "the study may spend epsilon 4.0, [cohorts.rare] epsilon is absent: decide it",
        "the study would pass the cap of the ledger of cohort 'rare': see 'site ledger show'",
        "it is 2026-11-24T01:00:00Z, outside the [schedule] windows: wait",
    ]


def table(heading):
    """The cells of the table under a heading of docs/policy.md, code marks removed."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "policy.md").read_text("utf-8")
    section = text.split(f"\n{heading}\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\| (`.*) \|$", section, re.MULTILINE)
    return [[cell.strip().strip("`") for cell in line.split(" |")] for line in lines]


def test_the_page_has_every_code_in_its_order_and_when_it_is_told():
    found = {code: early for code, early, _ in table("## Codes")}
    assert list(found) == list(get_args(Code))
    early = {one.values[0] for one in CASES if one.values[2]}
    assert {code for code, told in found.items() if told == "yes"} == early


@pytest.mark.parametrize(
    "section",
    [
        "policy",
        "cohorts.NAME",
        "privacy",
        "bases",
        "adapter",
        "rounds",
        "schedule",
        "approval",
        "sandbox",
        "stop",
    ],
)
def test_the_page_says_how_each_key_refuses_and_each_that_refuses_does_so_alone(section):
    cases = {(one.values[1], one.values[0]) for one in CASES if one.values[0] and one.values[1]}
    start = section.partition(".")[0]
    expected = {(key.partition(".")[2], code) for key, code in cases if key.startswith(f"{start}.")}
    found = {(key, code) for key, _, code, _ in table(f"## `[{section}]`") if code}
    assert found == expected


def test_all_that_speaks_against_is_given_and_the_first_decides():
    world = parts(here__is_stopped=True, here__walls="none", ledger=None, signed__stewards=())
    found = [refused.code for refused in objections(*world)]
    assert found == ["stopped", "needs_second_approval", "ledger_missing", "sandbox_too_weak"]
    assert decide(*world) == next(objections(*world))


# ---- A policy can only tighten.

# Each key from the loosest to the tightest; a list stands for a whole section or cohort.
LADDERS: dict[str, list[Any]] = {
    "privacy/max_epsilon": [50.0, 4.0, 3.0, 0.1],
    "privacy/max_delta": [0.1, 1e-5, 1e-7],
    "privacy/min_noise_multiplier": [0.0, 1.125, 3.0],
    "privacy/metrics": [True, False],
    "privacy/max_metrics_epsilon": [9.0, 0.5, 0.1],
    "privacy/metrics_minimum": [1, 15, 20],
    "cohorts/rare/epsilon": [50.0, 4.0, 0.1, GONE],
    "cohorts/rare/unit": ["none", "record", "patient"],
    "cohorts/rare/min_patients": [1, 300, 1000],
    "cohorts/rare": [None, GONE],
    "bases/allow_any": [True, False],
    "bases/allowed": [{"small": base_digest(FILES), "large": "1" * 64}, {"large": "1" * 64}, {}],
    "adapter/max_rank": [99, 8, 1],
    "adapter/max_parameters": [10_000, 5000, 1],
    "adapter/target_modules": [["q_proj", "v_proj", "o_proj"], ["q_proj", "o_proj"], []],
    "rounds/min_sites": [1, 3, 4, 9],
    "rounds/max_rounds": [99, 20, 1],
    "rounds/max_rounds_per_day": [99, 7, 1],
    "schedule/windows": [
        ["Mon-Sun 00:00-24:00"],
        ["Mon-Fri 06:00-20:00", "Sun 06:00-07:00"],
        ["Mon-Fri 08:00-09:00"],
        ["Tue 08:30-08:31"],
        [],
    ],
    "approval": [
        {},
        {"people": 1, "stewards": KEYS},
        {"people": 2, "stewards": KEYS},
        {"people": 3, "stewards": KEYS},
    ],
    "sandbox/require": ["none", "network", "full"],
}
WORLDS: dict[str, list[Any]] = {
    "study__privacy": [
        {},
        {"epsilon": 4.0, "delta": 1e-5, "metrics_epsilon": 0.5, "metrics_minimum": 15},
        {"epsilon": 2.0, "delta": 1e-6, "unit": "record"},
        {"unit": "none"},
    ],
    "study__base__digests": [FILES, {}],
    "study__adapter__target_modules": [["q_proj"], ["q_proj", "v_proj"]],
    "study__rounds__count": [4, 20, 30],
    "study__rounds__quorum": [1, 3, 4],
    "offer__noise_multiplier": [0.6, 1.125, 4.0],
    "approval__epsilon_cap": [None, 4.0, 9.0],
    "signed__stewards": [(), ("Wang",), ("Wang", "Zhao"), ("Li", "Wang", "Zhao")],
    "ledger__unit": ["patient", "record"],
    "ledger__last_round": [4, 5],
    "announcement__round": [5, 21],
    "announcement__sites": [("North", "South", "East"), ("North", "South", "East", "West")],
    "here__now": [MIDNIGHT, MIDNIGHT + 20 * HOUR / 3600, MIDNIGHT + HOUR / 2],
    "here__walls": ["none", "network", "full"],
    "here__rounds_today": [0, 6, 50],
    "here__parameters": [100, 5000, 5001],
}


def policy_at(steps):
    tables = changed(WORLD["policy"], {"stop": {"file": "STOP"}})
    cohort_is_gone = LADDERS["cohorts/rare"][steps["cohorts/rare"]] is GONE
    changes = {
        key: LADDERS[key][step]
        for key, step in steps.items()
        if key != "cohorts/rare" and not (cohort_is_gone and key.startswith("cohorts/"))
    }
    if cohort_is_gone:
        changes["cohorts/rare"] = GONE
    return parse_policy(changed(tables, changes), "policy.toml")


@st.composite
def tightenings(draw):
    """A policy and one that differs from it in further restrictions alone, as steps on ladders."""
    some = st.sets(st.sampled_from(sorted(LADDERS)), max_size=2)
    loose, tight = dict.fromkeys(LADDERS, 0), {}
    for key in draw(some):
        loose[key] = draw(st.integers(0, len(LADDERS[key]) - 1))
    for key in draw(some) | {draw(st.sampled_from(sorted(LADDERS)))}:
        tight[key] = draw(st.integers(loose[key], len(LADDERS[key]) - 1))
    return loose, loose | tight


# A few things that differ, so that what a restriction does is not hidden by all else.
worlds = st.sets(st.sampled_from(sorted(WORLDS)), max_size=4).flatmap(
    lambda paths: st.fixed_dictionaries({path: st.sampled_from(WORLDS[path]) for path in paths})
)


def found_in(world):
    """The codes at an announcement, and those before an approval."""
    return world.codes(), {refused.code for refused in objections_to_approval(*world.before())}


def check_only_tightens(loose, tight):
    for before, after in zip(loose, tight, strict=True):
        assert not before or after
        if "cohort_unknown" not in after:  # a cohort that is gone takes its reasons with it
            assert before <= after


@settings(max_examples=150)
@given(tightenings(), worlds)
def test_no_restriction_turns_a_refusal_into_an_allowance(pair, changes):
    world = parts(**changes)
    loose, tight = (world._replace(policy=policy_at(steps)) for steps in pair)
    check_only_tightens(found_in(loose), found_in(tight))
    assert (decide(*loose) == Allowed()) == (not loose.codes())


@pytest.mark.parametrize("key", LADDERS)
def test_no_step_of_a_key_does_beside_any_step_of_another(key):
    """All pairs of keys, in every world in which one thing differs: none is left to chance."""
    beside: list[dict[str, int]] = [
        {other: step}
        for other, ladder in LADDERS.items()
        if other != key
        for step in range(1, len(ladder))
    ]
    differing = [{path: value} for path, values in WORLDS.items() for value in values]
    built = {str(world): world for world in (parts(), *(parts(**one) for one in differing))}
    for others in ({}, *beside):
        steps = [
            policy_at(dict.fromkeys(LADDERS, 0) | others | {key: step})
            for step in range(len(LADDERS[key]))
        ]
        for world in built.values():
            found = [found_in(world._replace(policy=policy)) for policy in steps]
            for loose, tight in itertools.pairwise(found):
                check_only_tightens(loose, tight)


@settings(max_examples=150)
@given(tightenings(), worlds)
def test_what_is_answered_could_also_be_approved(pair, changes):
    world = parts(**changes)._replace(policy=policy_at(pair[0]))
    if decide(*world) == Allowed():
        assert list(objections_to_approval(*world.before())) == []


# ---- Nothing but the signed study says how the site trains.


def test_an_announcement_has_no_field_that_changes_the_mathematics():
    """Code-2: a coordinator can ask for a round, by digests and times, and for nothing else."""
    assert set(Announcement.model_fields) == {
        "schema_number",
        "alliance",
        "study",
        "round",
        "attempt",
        "parent",
        "adapter",
        "membership",
        "sites",
        "issued",
        "deadline",
    }


@pytest.mark.parametrize("name", ["run_config", "learning_rate", "noise_multiplier", "local_steps"])
def test_an_announcement_with_an_override_is_refused(name):
    key = Ed25519PrivateKey.generate()
    body = parts().announcement.model_dump(mode="json", by_alias=True)
    found = Announcement.read(sign("announcement", body, key), [public_of(key)])
    assert found == parts().announcement
    with pytest.raises(WireError, match=f"announcement has a wrong {name!r}"):
        Announcement.read(sign("announcement", body | {name: 1}, key), [public_of(key)])


def test_a_decision_takes_no_overrides():
    taken = set(inspect.signature(decide).parameters)
    assert taken == {"policy", "offered", "approval", "ledger", "announcement", "here"}
    assert taken == set(inspect.signature(objections).parameters)
    assert [f.name for f in dataclasses.fields(Situation)] == [
        "now",
        "is_stopped",
        "is_paused",
        "walls",
        "rounds_today",
        "parameters",
    ]


def test_a_time_without_a_zone_is_refused():
    policy, offered, draft, ledger, now = parts().before()
    with pytest.raises(ValueError, match="expected one with a zone"):
        list(objections_to_approval(policy, offered, draft, ledger, now.replace(tzinfo=None)))
    with pytest.raises(ValueError, match="expected one with a zone"):
        parts(here__now=now.replace(tzinfo=None))


PURE = """
import sys
sys.path.insert(0, sys.argv[1])
from test_decision import objections, objections_to_approval, parts, Allowed, decide
import huizhen.client.approvals
loaded = {"torch", "transformers", "flwr", "grpc"} & sys.modules.keys()
first, second = parts(), parts(here__is_stopped=True, ledger=None, signed=None)
decide(*first)  # reads the time zone
seen = []
sys.addaudithook(lambda event, args: seen.append((event, args)) if events else None)
events = True
decisions = decide(*first), len(list(objections(*second)))
decisions += (list(objections_to_approval(*first.before())),)
events = False
print(loaded, seen, decisions)
"""


def test_a_decision_reads_no_file_and_needs_no_torch():
    """The audit events of the interpreter would show an open file, a socket or an import."""
    script = PURE.replace("seen = []", "seen = []; events = False")
    done = subprocess.run(  # noqa: S603  our own interpreter
        [sys.executable, "-c", script, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "set() [] (Allowed(), 2, [])\n", done.stderr[-2000:]
