"""A site among liars: what it is asked, what it is handed, what trains in it, and its own disk."""

import shutil
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.federation.lying_coordinator import (
    SITES,
    LyingTrainer,
    announce,
    answering_at,
    approve,
    code_of,
    copy,
    join,
    lying_coordinator,
    make_study,
    own_key,
    rounds_trained,
)
from tests.federation.lying_federation import FIRST, LyingSite

from huizhen.client import training_site
from huizhen.client.answering import Answer
from huizhen.client.trainer import Code, TrainerError
from huizhen.protocol.documents import claimed, public_of, sign
from huizhen.protocol.errors import HuizhenError, PrivacyError, ProtocolError, StorageError
from huizhen.protocol.statements import Refusal, Update, digest_of, stamp
from huizhen.protocol.wire import decode
from huizhen.server.desk import now
from huizhen.storage.audit import AuditLog
from huizhen.storage.keys import load_key

STRANGER = Ed25519PrivateKey.from_private_bytes(b"\x42" * 32)
CANARY = "张三 ZHANG-SAN 110101199003074477"


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory):
    with lying_coordinator(tmp_path_factory.mktemp("alliance")) as made:
        yield made


@pytest.fixture(scope="module")
def homes(coordinator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sites")
    return {site: join(coordinator, folder, site) for site in SITES}


@pytest.fixture(scope="module")
def plain(coordinator, homes):
    """A study without a unit of privacy, and its first announcement."""
    offered = coordinator.offer(make_study())
    approve(homes["North"], offered)
    return offered, coordinator.open(offered)


@pytest.fixture
def home(homes, tmp_path):
    """North's folder as it was when it had joined and approved; each test has its own."""
    place = type(homes["North"])(tmp_path / "site")
    copy(homes["North"].folder, place.folder)
    return place


@pytest.fixture
def trainers(monkeypatch):
    """The trainers that were made; a test may set what the next one does."""
    made: list[LyingTrainer] = []
    terms: dict[str, Any] = {}

    def make(study, start, records, **_):
        made.append(LyingTrainer(study, start.site, **terms))
        return made[-1]

    monkeypatch.setattr(training_site, "WorkerTrainer", make)
    return made, terms


class Clock:
    """The present, and what a test adds."""

    def __init__(self):
        self.more = timedelta()

    def __call__(self):
        return now() + self.more


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def site(home, trainers, clock):
    with answering_at(home, clock) as made:
        yield made


def events(site):
    return [one.event for one in site._audit.entries()]


def test_an_honest_announcement_is_answered_and_each_step_is_logged_before(site, plain, home):
    offered, asked = plain
    answer = site.answer(asked.document, asked.adapter)
    update = Update.read(answer.document, own_key(home))
    assert (update.study, update.round, update.site) == (offered.digest, 1, "North")
    assert update.announcement == digest_of(asked.document)
    assert update.payload == digest_of(answer.payload)
    shapes = {name: value.shape for name, value in FIRST.items()}
    assert decode(answer.payload, shapes=shapes).site == "North"
    assert events(site)[-4:] == [
        "announcement_accepted", "training_started", "training_ended", "update_sent",
    ]  # fmt: skip


# ID-2: who asks.


@pytest.mark.parametrize("forger", ["stranger", "site", "board", "another member"])
def test_id_2_an_announcement_that_somebody_else_signed_gets_no_answer(
    site, plain, home, homes, coordinator, trainers, forger
):
    _, asked = plain
    key = {
        "stranger": STRANGER,
        "site": load_key(home.key("identity")),
        "board": coordinator.desk.keys.board[0],
        "another member": load_key(homes["South"].key("identity")),
    }[forger]
    before = site._standing.chain(asked.digest)
    assert site.answer(announce(coordinator, asked, key=key), asked.adapter) is None
    assert site._standing.chain(asked.digest) == before
    assert trainers[0] == []
    entry = site._audit.entries()[-1]
    assert (entry.event, entry.facts["code"]) == ("announcement_refused", "not_verified")


@pytest.mark.parametrize(
    "document", [b"", b"{}", b"\x80\x04K\x01.", b"[" * 9000, b"x" * (2 << 20)],
    ids=["empty", "no document", "pickle", "nested", "large"],
)  # fmt: skip
def test_what_is_no_document_gets_no_answer(site, plain, trainers, document):
    _, asked = plain
    assert site.answer(document, asked.adapter) is None
    assert trainers[0] == []


def test_an_answer_of_another_site_is_no_announcement(site, plain, trainers):
    _, asked = plain
    document, payload = LyingSite("South").honest(asked)
    assert site.answer(document, payload) is None
    assert trainers[0] == []


@pytest.mark.parametrize("extra", [{"epsilon": 1e6}, {"local_steps": 99}, {"fab": "a" * 64}])
def test_code_2_an_announcement_with_an_override_gets_no_answer(
    site, plain, coordinator, trainers, extra
):
    _, asked = plain
    body = dict(claimed(asked.document)) | extra
    document = sign("announcement", body, coordinator.desk.keys.identity)
    assert site.answer(document, asked.adapter) is None
    assert trainers[0] == []


# What follows.


@pytest.mark.parametrize(
    ("changes", "payload", "code"),
    [
        ({"parent": "c" * 64}, None, "fork"),
        ({"round": 2}, None, "behind"),
        ({"sites": ("South", "East")}, None, "not_asked"),
        ({"sites": ("North",)}, None, "too_few_sites"),
        ({}, b"another adapter", "wrong_adapter"),
        ({"adapter": digest_of(b"another")}, b"another", "wrong_adapter"),
        ({"deadline": "2026-01-01T00:00:00Z"}, None, "deadline_passed"),
    ],
    ids=["fork", "skipped", "others asked", "asked alone", "swapped", "changed", "late"],
)
def test_an_announcement_that_does_not_follow_is_refused_and_nothing_trains(
    site, plain, home, coordinator, trainers, changes, payload, code
):
    _, asked = plain
    document = announce(coordinator, asked, **changes)
    answer = site.answer(document, payload if payload is not None else asked.adapter)
    assert code_of(answer, home) == code
    assert not any(one.trained for one in trainers[0])
    entry = site._audit.entries()[-1]
    assert (entry.event, entry.facts["code"]) == ("announcement_refused", code)


def test_a_study_that_the_site_was_never_offered_gets_no_answer(site, plain, coordinator, trainers):
    _, asked = plain
    document = announce(coordinator, asked, study="6" * 64, parent="6" * 64)
    assert site.answer(document, asked.adapter) is None
    assert trainers[0] == []


def test_a_study_that_nobody_approved_here_is_refused(site, coordinator, home, trainers):
    offered = coordinator.offer(make_study(study={"purpose": "Not approved."}))
    asked = coordinator.open(offered)
    assert code_of(site.answer(asked.document, asked.adapter), home) == "not_approved"
    assert not any(one.trained for one in trainers[0])


def test_a_withdrawn_consent_ends_it(site, plain, home, trainers):
    offered, asked = plain
    site._home.study(offered.digest).withdraw()
    assert code_of(site.answer(asked.document, asked.adapter), home) == "not_approved"


@pytest.mark.parametrize(("file", "code"), [("STOP", "stopped"), ("PAUSED", "paused")])
def test_eg_6_nothing_trains_while_the_switch_is_on(site, plain, home, trainers, file, code):
    _, asked = plain
    (home.folder / file).touch()
    assert code_of(site.answer(asked.document, asked.adapter), home) == code
    assert not any(one.trained for one in trainers[0])
    (home.folder / file).unlink()
    assert site.answer(asked.document, asked.adapter).payload


# ID-7: replays.


def test_id_7_a_replayed_announcement_is_answered_with_the_same_bytes(site, plain, home, trainers):
    _, asked = plain
    first = site.answer(asked.document, asked.adapter)
    chain = site._standing.chain(asked.digest)
    for _ in range(3):
        assert site.answer(asked.document, asked.adapter) == first
    assert site._standing.chain(asked.digest) == chain
    assert [one.trained for one in trainers[0]] == [[1]]


def test_id_7_the_same_bytes_after_a_restart(home, plain, trainers):
    _, asked = plain
    with answering_at(home) as site:
        first = site.answer(asked.document, asked.adapter)
    with answering_at(home) as site:
        assert site.answer(asked.document, asked.adapter) == first
    assert rounds_trained(trainers) == [1]


def test_id_7_an_earlier_attempt_is_refused_after_a_later_one(
    site, plain, home, coordinator, trainers
):
    _, asked = plain
    later = announce(coordinator, asked, attempt=5)
    first = site.answer(later, asked.adapter)
    assert code_of(site.answer(asked.document, asked.adapter), home) == "replayed"
    again = site.answer(later, asked.adapter)
    assert again == first
    assert [one.trained for one in trainers[0]] == [[1]]


def test_id_7_one_attempt_told_in_two_ways_is_refused(site, plain, home, coordinator):
    _, asked = plain
    site.answer(asked.document, asked.adapter)
    other = announce(coordinator, asked, deadline=stamp(now() + timedelta(days=1)))
    assert code_of(site.answer(other, asked.adapter), home) == "fork"


# CO-1: rollbacks and forks, over a real history.


@pytest.fixture
def past(coordinator, homes):
    """A study whose first round is closed, as North has accepted it; and its announcements."""
    number = len(coordinator.desk.store.studies.studies())
    offered = coordinator.offer(make_study(study={"purpose": f"History {number}."}))
    approve(homes["North"], offered)
    first = coordinator.open(offered)
    for site in SITES:
        liar = Joined(site, homes[site])
        assert first.receive(site, *liar.honest(first)) is None
    first.close()
    return offered, first, coordinator.open(offered)


class Joined(LyingSite):
    """A lying site with the key of its folder."""

    def __init__(self, site, home):
        super().__init__(site)
        self.home = home

    @property
    def key(self):
        return load_key(self.home.key("identity"))


def test_co_1_a_site_that_was_away_catches_up_and_answers(past, home, homes, trainers):
    offered, _, second = past
    copy(homes["North"].folder, home.folder)
    with answering_at(home) as site:
        answer = site.answer(second.document, second.adapter)
        assert Update.read(answer.document, own_key(home)).round == 2
        assert "record_accepted" in events(site)
        assert site._standing.chain(offered.digest).round == 1


def test_co_1_a_coordinator_that_has_forgotten_a_round_is_refused(past, home, homes, trainers):
    offered, first, second = past
    copy(homes["North"].folder, home.folder)
    with answering_at(home) as site:
        site.answer(second.document, second.adapter)
        chain = site._standing.chain(offered.digest)
        assert code_of(site.answer(first.document, first.adapter), home) == "rollback"
        assert site._standing.chain(offered.digest) == chain
    assert rounds_trained(trainers) == [2]


def test_co_1_another_history_is_refused(past, home, homes, coordinator, trainers):
    _, first, second = past
    copy(homes["North"].folder, home.folder)
    with answering_at(home) as site:
        site.answer(second.document, second.adapter)
        forked = announce(coordinator, second, parent="c" * 64, attempt=9)
        assert code_of(site.answer(forked, second.adapter), home) == "fork"
        # The adapter of the first round again, as the second's.
        stale = announce(coordinator, second, adapter=digest_of(first.adapter), attempt=9)
        assert code_of(site.answer(stale, first.adapter), home) == "wrong_adapter"
    assert rounds_trained(trainers) == [2]


def test_co_1_a_forged_record_moves_nothing(past, home, homes, coordinator, trainers):
    """The service hands out a record that the coordinator's key has not signed."""
    from huizhen.protocol.statements import Record

    offered, _, second = past
    copy(homes["North"].folder, home.folder)
    honest = coordinator.desk.store.rounds.last_record(offered.digest).document
    record = Record.read(honest, [public_of(coordinator.desk.keys.identity)])

    def forge(answer):
        answer.data[0] = record.signed(STRANGER)
        return answer

    coordinator.tell("Records", forge)
    try:
        with answering_at(home) as site:
            answer = site.answer(second.document, second.adapter)
            assert code_of(answer, home) == "behind"
            assert "record_refused" in events(site)
            assert site._standing.chain(offered.digest).round == 0
    finally:
        coordinator.be_honest()


# EG-1 and EG-3: what leaves.

odd_arrays = st.one_of(
    st.just(np.zeros((1, 3), np.float64)),
    st.just(np.zeros((3, 1), np.float32)),
    st.just(np.array([[1, np.nan, 1]], np.float32)),
    st.just(np.array([[np.inf, 1, 1]], np.float32)),
    st.just(np.full((1, 3), 2.0**31, np.float32)),
    st.just(np.zeros((0,), np.float32)),
    st.just(np.array([[b"text" * 9]])),
    st.just(np.array([[CANARY]])),
    st.just(np.zeros((1, 3), np.float32)),
    st.just(np.asfortranarray(np.zeros((1, 3), np.float32))),
)
odd_updates = st.dictionaries(
    st.sampled_from([*FIRST, "l.0.lora_C", CANARY, ""]), odd_arrays, max_size=4
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(odd_updates)
def test_eg_1_whatever_the_trainer_returns_only_the_agreed_tensors_leave(
    plain, home, monkeypatch, returned
):
    """An answer is a signed document and the one encoding of the agreed tensors, or a refusal."""
    _, asked = plain
    monkeypatch.setattr(
        training_site, "WorkerTrainer",
        lambda study, start, records, **_: LyingTrainer(study, start.site, lambda _: returned),
    )  # fmt: skip
    shutil.rmtree(home.folder / "outbox", ignore_errors=True)
    with answering_at(home) as site:
        try:
            answer = site.answer(asked.document, asked.adapter)
        except (AttributeError, TypeError, ValueError):
            return  # what no trainer returns ends the agent: nothing leaves
    assert isinstance(answer, Answer)
    assert answer.__slots__ == ("document", "payload")
    if answer.payload == b"":
        Refusal.read(answer.document, own_key(home))
    else:
        Update.read(answer.document, own_key(home))
        shapes = {name: value.shape for name, value in FIRST.items()}
        message = decode(answer.payload, shapes=shapes)
        assert set(message.tensors) == set(FIRST)
    for text in (CANARY.encode(), b"lora_C", b"text"):
        assert text not in answer.document + answer.payload


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TrainerError(Code.BAD_RECORDS, log=CANARY), "bad_records"),
        (TrainerError(Code.CRASHED), "crashed"),
        (PrivacyError(CANARY), "privacy"),
        (ProtocolError(CANARY), "not_verified"),
        (HuizhenError(CANARY), "failed"),
    ],
    ids=lambda one: one if isinstance(one, str) else type(one).__name__,
)
def test_eg_3_an_error_leaves_as_its_code(site, plain, home, trainers, error, code):
    _, asked = plain
    trainers[1]["error"] = error
    answer = site.answer(asked.document, asked.adapter)
    assert code_of(answer, home) == code
    assert CANARY.encode() not in answer.document
    assert CANARY.encode() not in repr(dict(claimed(answer.document))).encode()
    assert "张三" not in repr(site._audit.entries())


def test_eg_3_an_error_that_nobody_foresaw_leaves_as_nothing(site, plain, trainers):
    _, asked = plain
    trainers[1]["error"] = KeyError(CANARY)
    with pytest.raises(KeyError):
        site.answer(asked.document, asked.adapter)
    assert "update_sent" not in events(site)


# AU-5: without a log nothing leaves.


@pytest.mark.parametrize(
    "event", ["announcement_accepted", "training_started", "training_ended", "update_sent"]
)
def test_au_5_what_cannot_be_logged_does_not_leave(site, plain, trainers, monkeypatch, event):
    _, asked = plain
    append = AuditLog.append

    def full(self, name, /, **facts):
        if name == event:
            raise StorageError("disk is full")
        return append(self, name, **facts)

    with monkeypatch.context() as patch:
        patch.setattr(AuditLog, "append", full)
        with pytest.raises(StorageError, match="disk is full"):
            site.answer(asked.document, asked.adapter)
    trained = bool(trainers[0] and trainers[0][-1].trained)
    assert trained == (event in ("training_ended", "update_sent"))
    assert site.answer(asked.document, asked.adapter).payload  # once the disk has room


def test_au_5_a_refusal_that_cannot_be_logged_does_not_leave(site, plain, home, monkeypatch):
    _, asked = plain
    (home.folder / "PAUSED").touch()

    def full(self, event, /, **facts):
        raise StorageError("disk is full")

    monkeypatch.setattr(AuditLog, "append", full)
    with pytest.raises(StorageError):
        site.answer(asked.document, asked.adapter)
