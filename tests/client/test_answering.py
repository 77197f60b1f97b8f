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

from huizhen.client import answering, training_site
from huizhen.client.answering import Answer
from huizhen.client.frames import Start
from huizhen.client.governance import admit
from huizhen.client.records.record import Record
from huizhen.client.trainer import Code, TrainerError
from huizhen.client.worker_trainer import WorkerTrainer
from huizhen.protocol.documents import claimed, public_of, sign
from huizhen.protocol.errors import (
    ConfigError,
    HuizhenError,
    PrivacyError,
    ProtocolError,
    StorageError,
)
from huizhen.protocol.statements import Refusal, Update, digest_of, stamp
from huizhen.protocol.wire import decode
from huizhen.server.desk import now
from huizhen.simulations.live import edit
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


def test_what_a_strategy_keeps_here_is_there_after_a_restart(coordinator, home, trainers):
    """Without a ledger it is the note of the last answer that names it."""
    steps = {"length": "steps", "optimizer": "sgd", "momentum": 0.0}
    strategy = {"name": "scaffold", "weights": "equal"}
    offered = coordinator.offer(make_study(strategy=strategy, rounds=steps))
    approve(home, offered)
    asked = coordinator.open(offered)
    kept = {f"{name}.control": np.full_like(value, 0.5) for name, value in FIRST.items()}
    trainers[1]["kept"] = kept
    with answering_at(home) as site:
        site.answer(asked.document, asked.adapter)
    with answering_at(home) as site:
        site.answer(asked.document, asked.adapter)
        assert site._site is not None
        found = site._site.join().kept
        assert found.keys() == kept.keys()
        assert all((found[name] == 0.5).all() for name in kept)
        [place] = (home.folder / "outbox" / offered.digest).glob("*.own")
    place.unlink()
    with answering_at(home) as site:
        site.answer(asked.document, asked.adapter)
        assert site._site is not None
        assert site._site.join().kept == {}


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
        assert code_of(site.answer(first.document, first.adapter), home) == "round_closed"
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


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
        answer = site.answer(asked.document, asked.adapter)
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
    ("error", "exact"),
    [
        *((TrainerError(code, log="its log"), code.value) for code in Code),
        (PrivacyError("an error of ours"), "privacy"),
        (ProtocolError("an error of ours"), "not_verified"),
        (ConfigError("an error of ours"), "site_misconfigured"),
        (HuizhenError("an error of ours"), "failed"),
        (KeyError(CANARY), "failed"),
        (ZeroDivisionError(CANARY), "failed"),
    ],
    ids=lambda one: one if isinstance(one, str) else type(one).__name__,
)
@pytest.mark.parametrize("moment", ["ready", "train"])
def test_eg_3_whatever_keeps_a_site_from_training_leaves_as_one_code(
    site, plain, home, trainers, monkeypatch, caplog, error, exact, moment
):
    """Else a refusal would say something of the records, or how many patients they are of."""
    _, asked = plain

    def fail(*args):
        raise error

    monkeypatch.setattr(LyingTrainer, moment, fail)
    answer = site.answer(asked.document, asked.adapter)
    assert code_of(answer, home) == "cannot_train"
    *_, ended, refused = site._audit.entries()
    assert (ended.event, ended.facts["code"]) == ("training_ended", exact)
    assert (refused.event, refused.facts["code"]) == ("announcement_refused", "cannot_train")
    assert f"exact={exact} " in caplog.text
    for said in (repr(dict(claimed(answer.document))), repr(site._audit.entries()), caplog.text):
        assert "张三" not in said


def test_eg_3_a_setting_that_is_wrong_leaves_as_the_same_code(site, plain, home, caplog):
    _, asked = plain
    edit(home.folder / "policy.toml", {"max_rounds_per_day": "max_rounds_per_week"})
    assert code_of(site.answer(asked.document, asked.adapter), home) == "cannot_train"
    assert "exact=site_misconfigured " in caplog.text


def test_eg_3_the_true_number_of_patients_is_compared_with_no_number_of_the_policy(
    site, plain, home, trainers, monkeypatch
):
    """12 patients where the policy's min_patients is 20 and the public size 60: it trains."""
    offered, asked = plain
    policy = home.policy()
    started: list[Start] = []
    assert policy.cohorts["all"].min_patients == 20
    assert offered.agreed().sites["North"].patients_public == 60

    class Counting(LyingTrainer):
        def ready(self):
            records = [Record(f"patient {n}", {"t": "text", "y": "a"}, "r") for n in range(12)]
            admit(records, started[0].policy)
            return super().ready()

    def make(study, start, records, **_):
        started.append(start)
        return Counting(study, start.site)

    monkeypatch.setattr(training_site, "WorkerTrainer", make)
    assert site.answer(asked.document, asked.adapter).payload
    assert started[0].policy.minimum_patients == home.settings().records.minimum_patients == 2


def test_an_error_that_nobody_foresaw_does_not_end_the_agent(
    site, plain, home, monkeypatch, caplog
):
    _, asked = plain

    def fail(*args, **named):
        raise ZeroDivisionError(CANARY)

    with monkeypatch.context() as patch:
        patch.setattr(answering, "declared_values", fail)
        assert code_of(site.answer(asked.document, asked.adapter), home) == "failed"
    with monkeypatch.context() as patch:
        patch.setattr(answering, "claimed", fail)
        assert site.answer(asked.document, asked.adapter) is None
    assert caplog.text.count("type=ZeroDivisionError at=test_answering.py:") == 2
    assert "张三" not in caplog.text
    assert site.answer(asked.document, asked.adapter).payload


# What people decide while it trains.


@pytest.mark.parametrize("decided", ["paused", "not_approved"])
def test_what_is_paused_or_withdrawn_while_it_trains_does_not_leave(
    site, plain, home, trainers, decided
):
    offered, asked = plain
    approval = home.study(offered.digest).approval()

    def meanwhile(_):
        if decided == "paused":
            home.paused.touch()
        else:
            home.study(offered.digest).withdraw()
        return dict(FIRST)

    trainers[1]["result"] = meanwhile
    assert code_of(site.answer(asked.document, asked.adapter), home) == decided
    assert "update_sent" not in events(site)
    [kept] = (home.folder / "outbox").rglob("*.update")
    home.paused.unlink(missing_ok=True)
    home.study(offered.digest).keep_approval(approval)
    assert site.answer(asked.document, asked.adapter).payload == kept.read_bytes()
    assert rounds_trained(trainers) == [1]


def test_the_log_says_training_only_where_something_is_trained(site, plain, trainers):
    _, asked = plain
    for _ in range(3):
        assert site.answer(asked.document, asked.adapter).payload
    found = events(site)
    assert [found.count(one) for one in ("training_started", "training_ended")] == [1, 1]
    assert found.count("update_sent") == 3
    assert found[-2:] == ["announcement_accepted", "update_sent"]


def test_what_was_kept_without_a_ledger_and_is_lost_is_trained_again(site, plain, home, trainers):
    _, asked = plain
    assert site.answer(asked.document, asked.adapter).payload
    [kept] = (home.folder / "outbox").rglob("*.update")
    for damage in (lambda: kept.write_bytes(b"changed"), kept.unlink):
        damage()
        site.close()
        assert site.answer(asked.document, asked.adapter).payload
    assert rounds_trained(trainers) == [1, 1, 1]


@pytest.mark.parametrize("file", ["data", "ledger", "held_out"])
def test_code_5_another_cohort_s_file_where_the_worker_reads_is_refused(
    site, plain, home, caplog, monkeypatch, file
):
    """The real walls are made, up to the moment that a process would start."""
    _, asked = plain
    monkeypatch.setattr(training_site, "WorkerTrainer", WorkerTrainer)
    shown = "../bases/other.thing"
    held_out = f'[records.held_out]\nother = "{shown}"\n\n[records]'
    name, old, new = {
        "data": ("policy.toml", 'data = "other.jsonl"', f'data = "{shown}"'),
        "ledger": ("policy.toml", 'ledger = "other.sqlite"', f'ledger = "{shown}"'),
        "held_out": ("site.toml", "[records]", held_out),
    }[file]
    text = (home.folder / name).read_text("utf-8")
    assert old in text
    (home.folder / name).write_text(text.replace(old, new), "utf-8")
    assert code_of(site.answer(asked.document, asked.adapter), home) == "cannot_train"
    assert "exact=site_misconfigured" in caplog.text
    assert "which the process that trains may read" in caplog.text


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
