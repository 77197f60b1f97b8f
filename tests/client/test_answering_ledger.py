"""A site's budget: what was spent is spent, whatever copy of its folder is brought back."""

import shutil
from dataclasses import replace
from typing import Any

import pytest
from tests.federation.lying_coordinator import (
    PRIVATE,
    SITES,
    LyingTrainer,
    announce,
    answering_at,
    approve,
    code_of,
    copy,
    counted,
    head_of,
    join,
    lying_coordinator,
    make_ledger,
    make_study,
    own_key,
    rounds_trained,
    standing_of,
)
from tests.federation.lying_federation import private

from huizhen.client import joining, training_site
from huizhen.client.ledger import Ledger
from huizhen.client.trainer import Code, TrainerError
from huizhen.protocol.errors import ProtocolError, StorageError
from huizhen.protocol.ledger_entries import Cap
from huizhen.protocol.statements import Head, Update
from huizhen.server.desk import now
from huizhen.server.open_round import KEPT_BACK
from huizhen.simulations.live import edit
from huizhen.storage.audit import AuditLog

STRANGER = private(66)


@pytest.fixture
def coordinator(tmp_path):
    with lying_coordinator(tmp_path / "alliance") as made:
        yield made


@pytest.fixture
def home(coordinator, tmp_path):
    """North's folder; it has joined with South and East, and has a ledger."""
    homes = {site: join(coordinator, tmp_path / "sites", site) for site in SITES}
    make_ledger(homes["North"])
    return homes["North"]


@pytest.fixture
def trainers(monkeypatch):
    """The trainers that were made, and what the next one does."""
    made: list[LyingTrainer] = []
    terms: dict[str, Any] = {}

    def make(study, start, records, **_):
        made.append(LyingTrainer(study, start.site, **terms))
        return made[-1]

    monkeypatch.setattr(training_site, "WorkerTrainer", make)
    return made, terms


@pytest.fixture
def paid(coordinator, home, trainers):
    """A private study that is approved, before its first round."""
    offered = coordinator.offer(make_study(privacy=PRIVATE))
    approve(home, offered)
    return offered, coordinator.open(offered)


def another(coordinator, home, cohort="all"):
    """Offer a second private study, approve it, and return its open round."""
    offered = coordinator.offer(make_study(study={"purpose": "Another."}, privacy=PRIVATE))
    approve(home, offered, cohort)
    return coordinator.open(offered)


def bring_back(backup, home):
    """Put the older ledger in place of the newer one."""
    for place in home.folder.glob("ledger.sqlite*"):
        if place.is_file():
            place.unlink()
    shutil.copy2(backup / "ledger.sqlite", home.folder / "ledger.sqlite")


def test_pb_3_a_paid_round_asked_again_has_the_same_bytes_and_costs_nothing(
    paid, home, coordinator, trainers
):
    _, asked = paid
    with answering_at(home) as site:
        first = site.answer(asked.document, asked.adapter)
        head = head_of(home)
        assert site.answer(asked.document, asked.adapter) == first
        again = site.answer(announce(coordinator, asked, attempt=2), asked.adapter)
        found = [one.event for one in site._audit.entries()]
    assert again.payload == first.payload
    assert head_of(home) == head
    assert rounds_trained(trainers) == [1]
    for event in ("ledger_reserved", "training_started", "ledger_charged", "training_ended"):
        assert found.count(event) == 1  # sending kept bytes again charges and trains nothing
    assert found.count("update_sent") == 3
    said = Update.read(first.document, own_key(home)).ledger
    assert said == Head(size=head.sequence, root=head.digest)


def test_pb_1_the_charge_is_on_the_disk_before_the_training(paid, home, trainers):
    _, asked = paid
    trainers[1]["error"] = TrainerError(Code.CRASHED)
    with answering_at(home) as site:
        assert code_of(site.answer(asked.document, asked.adapter), home) == "cannot_train"
        head = head_of(home)
        booked = [one for one in site._audit.entries() if one.event.startswith("ledger_")]
    assert [one.event for one in booked] == ["ledger_reserved", "ledger_charged"]
    assert booked[1].facts["ledger"] == {"size": head.sequence, "root": head.digest}
    with Ledger.open(home.folder / "ledger.sqlite") as ledger:
        [study] = ledger.totals().studies
        assert study.last_round == 1


@pytest.mark.parametrize("event", ["ledger_reserved", "ledger_charged"])
def test_au_5_a_booking_that_cannot_be_logged_lets_nothing_leave(
    paid, home, trainers, monkeypatch, event
):
    _, asked = paid
    append = AuditLog.append

    def full(self, name, /, **facts):
        if name == event:
            raise StorageError("disk is full")
        return append(self, name, **facts)

    with answering_at(home) as site:
        with monkeypatch.context() as patch:
            patch.setattr(AuditLog, "append", full)
            with pytest.raises(StorageError, match="disk is full"):
                site.answer(asked.document, asked.adapter)
        assert "update_sent" not in [one.event for one in site._audit.entries()]
        assert site.answer(asked.document, asked.adapter).payload  # once the disk has room
    assert rounds_trained(trainers) == [1]


@pytest.mark.parametrize("damage", ["lost", "changed"])
def test_a_paid_update_that_is_lost_is_refused_and_the_next_round_goes_on(
    paid, coordinator, home, trainers, damage
):
    """No end of the agent: it would be started again for ever, and all its studies stand still."""
    _, asked = paid
    second = another(coordinator, home)
    with answering_at(home) as site:
        assert site.answer(asked.document, asked.adapter).payload
        [kept] = home.folder.glob("ledger.sqlite.outbox/*/*.update")
        if damage == "lost":
            kept.unlink()
        else:
            kept.write_bytes(b"changed")
        head = head_of(home)
        assert code_of(site.answer(asked.document, asked.adapter), home) == "release_lost"
        assert head_of(home) == head
        assert site.answer(second.document, second.adapter).payload
    assert rounds_trained(trainers) == [1, 1]


@pytest.mark.parametrize(
    ("has_file", "has_answered", "code"),
    [
        (False, True, "metrics_not_allowed"),
        (True, False, "metrics_not_allowed"),
        (True, True, "cannot_train"),  # what it has of held-out records is not told
    ],
)
def test_metrics_that_a_site_never_lets_out_are_refused_for_good(
    coordinator, home, trainers, has_file, has_answered, code
):
    """By settings and ledger alone, with a code that the coordinator takes for an answer."""
    edit(home.folder / "policy.toml", {"metrics = false": "metrics = true "})
    with Ledger.open(home.folder / "ledger.sqlite") as ledger:
        ledger.change_cap(Cap(epsilon=50.0, delta=1e-4, metrics_epsilon=1.0))
    if has_file:
        with (home.folder / "site.toml").open("a", encoding="utf-8") as file:
            file.write('\n[records.held_out]\nall = "held-out.jsonl"\n')
    private = {**PRIVATE, "metrics_epsilon": 0.5, "metrics_minimum": 20}
    offered = coordinator.offer(make_study(privacy=private, rounds={"count": 1}))
    approve(home, offered)
    asked = coordinator.open(offered)
    with answering_at(home) as site:
        if has_answered:
            assert site.answer(asked.document, asked.adapter).payload
        site._standing.keep_chain(replace(site._standing.chain(offered.digest), round=1, attempt=0))
        metrics = announce(coordinator, asked, round=2)
        assert code_of(site.answer(metrics, asked.adapter), home) == code
    assert "metrics_not_allowed" in KEPT_BACK


def test_pb_5_an_older_copy_of_the_ledger_is_refused(paid, home, trainers, tmp_path):
    _, asked = paid
    backup = tmp_path / "backup"
    copy(home.folder, backup)
    with answering_at(home) as site:
        counted(asked, "North", site.answer(asked.document, asked.adapter))
    bring_back(backup, home)
    head = head_of(home)
    with answering_at(home) as site:
        assert code_of(site.answer(asked.document, asked.adapter), home) == "privacy"
    assert head_of(home) == head
    assert rounds_trained(trainers) == [1]


def test_pb_5_another_study_on_the_older_ledger_is_refused_too(
    paid, coordinator, home, trainers, tmp_path
):
    """What one study spent since the backup binds the other: they share the cohort's patients."""
    _, asked = paid
    second = another(coordinator, home)
    backup = tmp_path / "backup"
    copy(home.folder, backup)
    with answering_at(home) as site:
        counted(asked, "North", site.answer(asked.document, asked.adapter))
    bring_back(backup, home)
    with answering_at(home) as site:
        assert code_of(site.answer(second.document, second.adapter), home) == "privacy"
    assert rounds_trained(trainers) == [1]


def test_pb_5_the_furthest_of_all_studies_binds(paid, coordinator, home, trainers, tmp_path):
    """The backup is younger than the first study's last update, and older than the second's."""
    _, asked = paid
    second, backup = another(coordinator, home), tmp_path / "backup"
    with answering_at(home) as site:
        counted(asked, "North", site.answer(asked.document, asked.adapter))
    copy(home.folder, backup)
    with answering_at(home) as site:
        counted(second, "North", site.answer(second.document, second.adapter))
    bring_back(backup, home)
    with answering_at(home) as site:
        assert code_of(site.answer(asked.document, asked.adapter), home) == "privacy"
    assert rounds_trained(trainers) == [1, 1]


def test_pb_5_a_whole_folder_from_before_a_study_is_refused(
    paid, coordinator, home, trainers, tmp_path
):
    """Even its log does not know what it has signed since."""
    _, asked = paid
    backup = tmp_path / "backup"
    copy(home.folder, backup)
    second = another(coordinator, home)
    with answering_at(home) as site:
        counted(second, "North", site.answer(second.document, second.adapter))
    copy(backup, home.folder)
    with answering_at(home) as site:
        assert code_of(site.answer(asked.document, asked.adapter), home) == "privacy"
    assert rounds_trained(trainers) == [1]


def test_pb_7_another_cohort_s_ledger_has_nothing_to_do_with_it(
    paid, coordinator, home, trainers, tmp_path
):
    _, asked = paid
    make_ledger(home, "other")
    second = another(coordinator, home, "other")
    with answering_at(home) as site:
        for open_round in (asked, second, asked):
            answer = site.answer(open_round.document, open_round.adapter)
            assert answer.payload
            counted(open_round, "North", answer)


def test_pb_5_a_coordinator_that_makes_up_an_update_stops_it_and_spends_nothing(
    paid, coordinator, home, trainers
):
    """It cannot sign for the site; what it says instead keeps the ledger shut."""
    offered, asked = paid
    forged = Update(
        alliance="rare", study=offered.digest, round=1, attempt=1, site="North",
        announcement="a" * 64, payload="b" * 64, ledger=Head(size=99, root="c" * 64),
    ).signed(STRANGER)  # fmt: skip

    def lie(answer):
        answer.data.append(forged)
        return answer

    coordinator.tell("LastUpdates", lie)
    head = head_of(home)
    try:
        with answering_at(home) as site:
            assert code_of(site.answer(asked.document, asked.adapter), home) == "not_verified"
    finally:
        coordinator.be_honest()
    assert head_of(home) == head
    with answering_at(home) as site:
        assert site.answer(asked.document, asked.adapter).payload


def test_id_9_a_site_goes_on_after_its_key_was_replaced(paid, coordinator, home):
    """What it signed before, its approval and its updates, counts after; the old key does not."""
    offered, asked = paid
    with answering_at(home) as site:
        old = site.answer(asked.document, asked.adapter)
        counted(asked, "North", old)
    before = own_key(home)
    with standing_of(home) as standing:
        joining.rotate(home, standing, now)
    asked = coordinator.open(offered)
    with answering_at(home) as site:
        answer = site.answer(asked.document, asked.adapter)
    assert answer.payload == old.payload
    assert Update.read(answer.document, own_key(home)).site == "North"
    with pytest.raises(ProtocolError, match="0 of 1 known keys"):
        Update.read(answer.document, before)
    counted(asked, "North", answer)
