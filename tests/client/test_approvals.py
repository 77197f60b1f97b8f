"""Who must sign has signed, each once; the site signs last, and nothing that its policy refuses."""

import dataclasses
import json
import tomllib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from huizhen.client.approvals import (
    approval_stands,
    draft_approval,
    read_approval,
    sign_as_site,
    sign_as_steward,
)
from huizhen.client.policy import parse_policy
from huizhen.client.situation import LedgerView, Offered
from huizhen.protocol.accounting import Spend
from huizhen.protocol.documents import countersign, public_of
from huizhen.protocol.errors import GovernanceError, ProtocolError, WireError
from huizhen.protocol.mechanism import Mechanism
from huizhen.protocol.statements import Approval, Withdrawal
from huizhen.protocol.study import parse_study

NOW = datetime(2026, 11, 24, 0, 30, tzinfo=UTC)
DAY = timedelta(days=1)
SITE, WANG, LI, ZHAO, STRANGER = (
    Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in range(1, 6)
)
PEOPLE = {"Wang": WANG, "Li": LI, "Zhao": ZHAO}
IDENTITY = public_of(SITE)


def policy_of(people, **stewards):
    approval = {
        "people": people,
        "stewards": {name: public_of(key).raw.hex() for name, key in stewards.items()},
    }
    tables = {
        "policy": {"site": "North"},
        "cohorts": {"rare": {"epsilon": 4.0, "data": "a.jsonl"}},
        "rounds": {"min_sites": 1},
        "approval": approval,
    }
    return parse_policy(tables, "policy.toml")


TWO = policy_of(2, **PEOPLE)
ALONE = policy_of(0)

STUDY = parse_study(
    tomllib.loads("""
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
epsilon = 3.0
[sites]
North.patients_public = 300
"""),
    "study.toml",
)
SPEND = Spend(noise_multiplier=2.0, sampling_rate=0.2, steps=4)
OFFERED = Offered(
    study=STUDY,
    digest=STUDY.digest(),
    ends=NOW + 30 * DAY,
    mechanism=Mechanism(per_round=SPEND, delta=1e-5),
)
LEDGER = LedgerView(
    site="North",
    cohort="rare",
    unit="patient",
    is_closed=False,
    last_round=0,
    would_exceed=False,
    has_metrics=False,
    metrics_left=0.0,
)


def draft(**changes):
    values: dict[str, Any] = {
        "alliance": "Test",
        "cohort": "rare",
        "epsilon_cap": 3.5,
        "now": NOW,
        "expires": NOW + 7 * DAY,
    }
    return draft_approval(TWO, OFFERED, **values | changes)


def by_people(*keys, document=None, policy=TWO):
    document = document or draft()
    for key in keys:
        document = sign_as_steward(document, policy, IDENTITY, key)
    return document


def by_site(document, policy=TWO, now=NOW, ledger=LEDGER):
    return sign_as_site(document, policy, OFFERED, ledger, SITE, now)


def stands(data, policy=TWO, now=NOW):
    return approval_stands(data, policy, IDENTITY, now)


def test_a_draft_says_what_is_approved():
    found = draft()
    assert (found.study, found.site, found.cohort) == (OFFERED.digest, "North", "rare")
    assert (found.issued, found.expires) == ("2026-11-24T00:30:00Z", "2026-12-01T00:30:00Z")
    assert found.epsilon_cap == 3.5


def test_an_approval_ends_with_the_study():
    assert draft(expires=NOW + 400 * DAY).expires == "2026-12-24T00:30:00Z"


@pytest.mark.parametrize("name", ["now", "expires"])
def test_a_time_without_a_zone_is_refused(name):
    with pytest.raises(ValueError, match="expected one with a zone"):
        draft(**{name: NOW.replace(tzinfo=None)})


def test_the_sites_key_is_enough_where_nobody_else_need_sign():
    data = by_site(draft(), ALONE)
    found = stands(data, ALONE)
    assert found.is_in_force
    assert found.refusal is None
    assert found.signed.approval == draft()
    assert (found.signed.stewards, found.missing) == ((), ())
    assert Approval.read(data, [IDENTITY]) == draft()  # what the coordinator sees


@pytest.mark.parametrize("keys", [(WANG, LI), (LI, WANG), (ZHAO, LI), (WANG, LI, ZHAO)])
def test_two_stewards_and_the_site_put_an_approval_in_force(keys):
    data = by_site(by_people(*keys))
    found = stands(data)
    assert found.is_in_force
    names = sorted(name for name, key in PEOPLE.items() if key in keys)
    assert found.signed.stewards == tuple(names)
    assert found.missing == tuple(sorted(PEOPLE.keys() - set(names)))
    assert Approval.read(data, [IDENTITY]) == draft()


def test_those_who_have_not_signed_are_named():
    assert stands(draft().signed(SITE)).missing == ("Li", "Wang", "Zhao")


def test_the_order_of_signatures_does_not_matter():
    assert by_site(by_people(WANG, LI)) == by_site(by_people(LI, WANG))


@pytest.mark.parametrize(
    ("keys", "missing"),
    [
        ((), "0 of 2 [approval] people have signed: ask Li, Wang, Zhao"),
        ((WANG,), "1 of 2 [approval] people have signed: ask Li, Zhao"),
    ],
)
def test_the_site_does_not_sign_before_enough_people_have(keys, missing):
    with pytest.raises(GovernanceError) as caught:
        by_site(by_people(*keys))
    assert str(caught.value) == missing


def test_one_steward_who_signs_twice_counts_once():
    twice = by_people(WANG, WANG)
    assert twice == by_people(WANG)
    with pytest.raises(GovernanceError, match="1 of 2"):
        by_site(twice)
    forced = countersign(countersign(twice, WANG), SITE)
    assert stands(forced).refusal.code == "needs_second_approval"


def test_a_signature_copied_under_another_name_is_no_second_one():
    """Who has one steward's signature cannot make it the other's."""
    value = json.loads(by_people(WANG))
    [entry] = value["signatures"]
    other = {**entry, "keyid": public_of(LI).id}
    value["signatures"] = sorted([entry, other], key=lambda one: one["keyid"])
    with pytest.raises(ProtocolError, match="wrong signature of key"):
        read_approval(rfc8785.dumps(value), TWO, IDENTITY)


def test_the_sites_own_key_is_no_steward():
    policy = policy_of(2, Wang=WANG, Bot=SITE)
    with pytest.raises(GovernanceError, match="is of no steward"):
        sign_as_steward(draft(), policy, IDENTITY, SITE)
    found = stands(countersign(draft().signed(WANG), SITE), policy)
    assert found.signed.stewards == ("Wang",)
    assert found.refusal.code == "needs_second_approval"


def test_a_stranger_cannot_sign_as_a_steward():
    with pytest.raises(GovernanceError, match=f"key {public_of(STRANGER).raw.hex()} is of no"):
        by_people(STRANGER)
    forced = countersign(by_people(WANG), STRANGER, SITE)
    found = stands(forced)
    assert found.signed.stewards == ("Wang",)
    assert found.refusal.code == "needs_second_approval"


def test_people_alone_put_nothing_in_force():
    found = stands(by_people(WANG, LI, ZHAO))
    assert not found.signed.is_signed_by_site
    assert found.refusal.code == "not_approved"
    assert found.missing == ()


def test_a_steward_who_was_taken_out_counts_no_more():
    data = by_site(by_people(WANG, LI))
    after = policy_of(2, Wang=WANG, Zhao=ZHAO)
    found = stands(data, after)
    assert (found.signed.stewards, found.missing) == (("Wang",), ("Zhao",))
    assert found.refusal.code == "needs_second_approval"


def test_a_policy_that_asks_for_more_people_afterwards_holds():
    data = by_site(draft(), ALONE)
    assert stands(data, TWO).refusal.code == "needs_second_approval"
    assert stands(countersign(data, WANG, LI), TWO).is_in_force


def test_an_approval_holds_from_its_issue_to_its_end():
    data = by_site(by_people(WANG, LI))
    second = timedelta(seconds=1)
    assert stands(data, now=NOW - second).refusal.code == "approval_not_yet"
    assert stands(data, now=NOW).is_in_force
    assert stands(data, now=NOW + 7 * DAY - second).is_in_force
    assert stands(data, now=NOW + 7 * DAY).refusal.code == "approval_expired"


def test_an_approval_of_another_site_is_refused():
    other = draft().model_copy(update={"site": "South"})
    with pytest.raises(GovernanceError, match="approval is of site 'South'"):
        by_people(WANG, document=other)
    with pytest.raises(GovernanceError, match="approval is of site 'South'"):
        by_site(other, ALONE)
    forced = other.signed(WANG, LI, SITE)
    assert stands(forced).refusal.code == "not_approved"
    with pytest.raises(GovernanceError, match="approval is of site 'South'"):
        by_people(ZHAO, document=forced)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"cohort": "common"}, "there is no"),
        ({"epsilon_cap": 2.5}, "its approval allows 2.5"),
        ({"epsilon_cap": None}, "its approval allows none"),
        ({"expires": NOW}, "the approval expired"),
        ({"now": NOW + DAY}, "set the clock right"),
    ],
)
def test_the_site_signs_nothing_that_its_policy_refuses(changes, line):
    with pytest.raises(GovernanceError, match=line):
        by_site(by_people(WANG, LI, document=draft(**changes)))


def test_the_site_signs_nothing_that_its_ledger_does_not_cover():
    ready = by_people(WANG, LI)
    with pytest.raises(GovernanceError, match="has no ledger"):
        by_site(ready, ledger=None)
    with pytest.raises(GovernanceError, match="would pass the cap"):
        by_site(ready, ledger=dataclasses.replace(LEDGER, would_exceed=True))


def test_a_changed_approval_is_refused():
    """A higher cap under the same signatures."""
    value = json.loads(by_site(by_people(WANG, LI)))
    more = json.loads(draft(epsilon_cap=30.0).signed(WANG))
    forged = rfc8785.dumps(value | {"payload": more["payload"]})
    with pytest.raises(ProtocolError, match="wrong signature"):
        read_approval(forged, TWO, IDENTITY)
    with pytest.raises(ProtocolError, match="wrong signature"):
        stands(forged)


def test_a_document_of_another_kind_is_no_approval():
    body = {"study": OFFERED.digest, "site": "North", "issued": draft().issued}
    withdrawal = Withdrawal(alliance="Test", **body).signed(SITE, WANG, LI)
    with pytest.raises(ProtocolError, match=r"vnd\.huizhen\.withdrawal\+json', expected"):
        stands(withdrawal)
    with pytest.raises(ProtocolError, match="expected"):
        by_people(ZHAO, document=withdrawal)


@given(st.binary(max_size=200))
def test_bytes_of_anyone_are_refused(data):
    with pytest.raises(WireError):
        stands(data)


@pytest.mark.parametrize("signer", [STRANGER, None])
def test_an_approval_that_nobody_known_has_signed_is_refused(signer):
    with pytest.raises(ProtocolError, match="signed by 0 of 4 known keys"):
        by_people(WANG, document=draft().signed(signer or STRANGER))


@given(st.sets(st.sampled_from(sorted(PEOPLE))), st.booleans(), st.integers(0, 3))
def test_an_approval_is_in_force_exactly_when_enough_people_and_the_site_signed(who, site, people):
    policy = policy_of(people, **PEOPLE) if people else ALONE
    keys = [PEOPLE[name] for name in who] + [SITE] * site
    data = draft().signed(*(keys or [STRANGER]))
    if not (site or (who and people)):  # nobody whose signature counts
        with pytest.raises(ProtocolError, match="signed by 0 of"):
            stands(data, policy)
        return
    assert stands(data, policy).is_in_force == (site and (len(who) >= people or not people))
