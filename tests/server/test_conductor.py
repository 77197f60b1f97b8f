"""The rounds, step by step, over a Flower that does what a test says; the store is a real one."""

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.federation.lying_federation import (
    ALLIANCE,
    KEYS,
    SIZES,
    LyingSite,
    coordination,
    make_study,
)

from huizhen.protocol.errors import ConfigError
from huizhen.protocol.statements import Approval, Receipt, Record, Withdrawal, digest_of, stamp
from huizhen.server import conductor as conducting
from huizhen.server.conductor import Conductor
from huizhen.server.flower import NoReply, Reply

NODES = {site: number for number, site in enumerate(sorted(SIZES), 1)}


class FakeFlower:
    """Both a run and its SuperLink's list of nodes."""

    def __init__(self):
        self.here = set(NODES.values())
        self.asked: list[tuple[int, str]] = []
        self.answers: dict[str, Any] = {}
        self.forgotten: list[str] = []
        self.came: dict[int, datetime] = {}
        self._names = itertools.count()

    def online(self):
        return self.here

    def push(self, nodes, document, payload, *, seconds):
        made = {node: f"m{next(self._names)}" for node in nodes}
        self.asked += made.items()
        return made

    def pull(self, name, *, max_bytes):
        return self.answers.pop(name, None)

    def forget(self, name):
        self.forgotten.append(name)

    def admit(self, key):
        return NODES[key.decode().removeprefix("node of ")]

    def nodes(self):
        return {}

    def activations(self):
        return self.came

    def last(self, site):
        """Return the name of the last message that a site was asked."""
        return [name for node, name in self.asked if node == NODES[site]][-1]

    def times(self, site):
        return sum(node == NODES[site] for node, _ in self.asked)


class Time:
    """The monotonic clock of the conductor."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


class Play:
    """A conductor, and the sites that answer as a test says."""

    def __init__(self, alliance, offer, time):
        self.alliance, self.offer, self.time = alliance, offer, time
        self.flower: Any = FakeFlower()
        self.conductor = Conductor(
            alliance.parts, lambda: alliance.trust, alliance.trust.keys_at, owner="test"
        )

    def step(self, seconds=0.0):
        """Let time pass and do what can be done; both clocks go."""
        self.time.now += seconds
        self.alliance.clock.pass_minutes(seconds / 60)
        return self.conductor.step(self.flower, self.flower)

    @property
    def round(self):
        return self.conductor._works[self.offer.digest].round

    def answer(self, *sites):
        for site in sites:
            reply = Reply(*LyingSite(site).honest(self.round))
            self.flower.answers[self.flower.last(site)] = reply

    def records(self):
        stored = self.alliance.parts.store.rounds.records(self.offer.digest)
        return [Record.read(one.document, self.alliance.trust.coordinator) for one in stored]

    def state(self):
        return self.alliance.parts.store.studies.study(self.offer.digest).state


def approve(alliance, offer, site, **changes):
    now = alliance.clock()
    values = {
        "alliance": ALLIANCE, "study": offer.digest, "site": site, "cohort": "all",
        "epsilon_cap": None, "issued": stamp(now), "expires": stamp(now + timedelta(days=9)),
        **changes,
    }  # fmt: skip
    alliance.parts.store.studies.add_approval(
        offer.digest, site, Approval(**values).signed(KEYS[site]), issued=now, now=now
    )


@pytest.fixture
def play(tmp_path, monkeypatch):
    time = Time()
    monkeypatch.setattr(conducting, "time", time)
    with coordination(tmp_path) as alliance:
        offer = alliance.offer(make_study())
        for site in SIZES:
            approve(alliance, offer, site)
        yield Play(alliance, offer, time)


def test_a_study_goes_from_its_first_announcement_to_its_release(play):
    for number in (1, 2):
        assert play.step()
        assert play.flower.times("North") == number
        play.answer(*SIZES)
        assert play.step()  # more is to be done at once: the next round, or the end
    play.step()
    assert [len(one.counted) for one in play.records()] == [3, 3]
    assert play.state() == "finished"
    [release] = play.alliance.parts.store.studies.releases(play.offer.digest)
    assert release is not None
    assert not play.step(), "nothing is left to do"


def test_a_site_that_breaks_is_asked_again_after_longer_and_longer(play):
    play.step()
    times: list[float] = []
    for _ in range(600):
        if play.flower.times("South") > len(times):
            times.append(play.time.now)
            play.flower.answers[play.flower.last("South")] = NoReply("no_answer")
        play.step(0.25)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert gaps == sorted(gaps)
    assert gaps[0] < 2
    assert 20 < gaps[-1] < 80


def test_a_site_that_is_not_there_is_asked_when_it_comes(play):
    play.flower.here.discard(NODES["East"])
    play.step()
    assert {node for node, _ in play.flower.asked} == {NODES["North"], NODES["South"]}
    play.flower.here.add(NODES["East"])
    play.step(2)
    assert play.flower.times("East") == 1


def test_the_round_waits_for_all_until_the_deadline_and_names_who_was_missing(play):
    play.step()
    play.answer("North", "South")
    play.step(1)
    play.step(200)
    assert play.records() == []
    play.step(101)
    [record] = play.records()
    assert [(one.site, one.code) for one in record.absent] == [("East", "no_answer")]


def test_a_site_that_refuses_does_not_hold_the_round_once_the_quorum_is_there(play):
    play.step()
    refusal = Reply(*LyingSite("East").refusal(play.round, "paused"))
    play.flower.answers[play.flower.last("East")] = refusal
    play.answer("North")
    play.step(1)
    assert play.records() == []
    play.answer("South")
    play.step(1)
    [record] = play.records()
    assert [(one.site, one.code) for one in record.absent] == [("East", "paused")]


def test_a_site_that_is_away_holds_the_round_for_a_minute(play):
    play.step()
    play.flower.here.discard(NODES["East"])
    play.answer("North", "South")
    play.step(2)
    play.step(50)
    assert play.records() == []
    play.step(11)
    assert len(play.records()) == 1


def test_a_site_that_refused_and_thought_better_of_it_counts(play):
    play.step()
    refusal = Reply(*LyingSite("East").refusal(play.round, "paused"))
    play.flower.answers[play.flower.last("East")] = refusal
    play.answer("North")
    play.step(1)
    play.step(3)  # asked again
    play.answer("East")
    play.step()
    play.answer("South")
    play.step()
    [record] = play.records()
    assert record.absent == ()


def test_up_4_an_answer_that_is_too_large_is_recorded_with_its_code(play):
    play.step()
    play.flower.answers[play.flower.last("East")] = NoReply("too_large")
    play.answer("North", "South")
    play.step(1)
    play.flower.here.discard(NODES["East"])
    play.step(2)
    play.step(61)
    [record] = play.records()
    assert [(one.site, one.code) for one in record.absent] == [("East", "too_large")]
    [refused] = play.alliance.parts.store.updates.refusals(play.offer.digest, 1)
    assert (refused.site, refused.code, refused.payload) == ("East", "too_large", None)


def test_a_late_answer_is_told_that_it_was_late(play):
    play.step()
    play.answer("North", "South")
    late, reply = play.flower.last("East"), Reply(*LyingSite("East").honest(play.round))
    play.step(302)
    play.flower.answers[late] = reply
    play.step(2)
    receipt = play.alliance.parts.store.updates.receipt(
        play.offer.digest, 1, "East", digest_of(reply.payload)
    )
    assert receipt is not None
    assert play.alliance.events().count("update_refused") == 1


def test_a_second_answer_with_the_bytes_that_count_is_not_told_that_it_was_late(play):
    play.step()
    first = play.flower.last("South")
    play.step(302)
    play.step()
    reply = Reply(*LyingSite("South").honest(play.round))
    play.answer(*SIZES)
    play.step()
    assert len(play.records()) == 1
    play.flower.answers[first] = reply
    play.step(2)
    updates = play.alliance.parts.store.updates
    assert updates.refusals(play.offer.digest, 1) == ()
    receipt = updates.receipt(play.offer.digest, 1, "South", digest_of(reply.payload))
    assert Receipt.read(receipt.document, play.alliance.trust.coordinator).code is None


def test_without_a_quorum_the_round_is_announced_again_and_keeps_what_it_has(play):
    play.step()
    play.answer("North")
    play.step(302)
    assert play.records() == []
    play.step()
    assert play.round.attempt == 2
    assert play.flower.times("South") == 2
    assert play.flower.times("North") == 1  # its update counts still
    play.answer("South", "East")
    play.step()
    [record] = play.records()
    assert (record.attempt, len(record.counted)) == (2, 3)


def test_a_site_that_was_started_anew_is_asked_again_and_no_other(play):
    play.step()
    play.flower.came = {node: datetime.now(UTC) - timedelta(seconds=9) for node in NODES.values()}
    play.step(5)
    assert play.flower.times("South") == 1
    first = play.flower.last("South")
    play.flower.came[NODES["South"]] = datetime.now(UTC)
    play.step(5)
    assert play.flower.times("South") == 2
    assert play.flower.times("North") == 1
    play.flower.answers[first] = Reply(*LyingSite("South").honest(play.round))
    play.step()
    assert play.round.counted == ("South",)  # the first message counts as well
    play.step(5)
    assert play.flower.times("South") == 2


def test_a_site_that_withdraws_is_not_asked_again(play):
    play.step()
    alliance, digest = play.alliance, play.offer.digest
    said = Withdrawal(alliance=ALLIANCE, study=digest, site="East", issued=stamp(alliance.clock()))
    alliance.parts.store.studies.add_withdrawal(
        digest, "East", said.signed(KEYS["East"]), issued=alliance.clock(), now=alliance.clock()
    )
    play.step(2)
    play.answer("North", "South")
    play.step(2)
    [record] = play.records()
    assert [(one.site, one.code) for one in record.absent] == [("East", "not_approved")]


def test_an_approval_that_ran_out_does_not_stand(tmp_path, monkeypatch):
    monkeypatch.setattr(conducting, "time", time := Time())
    with coordination(tmp_path) as alliance:
        offer = alliance.offer(make_study())
        for site in ("North", "South"):
            approve(alliance, offer, site)
        approve(alliance, offer, "East", expires=stamp(alliance.clock() + timedelta(seconds=30)))
        play = Play(alliance, offer, time)
        play.step()
        assert play.round.sites == ("East", "North", "South")
        play.step(40)
        assert play.round.sites == ("North", "South")


def test_a_site_that_approves_while_a_round_is_open_is_asked_in_the_next(tmp_path, monkeypatch):
    """The announcement does not name it, and it would refuse with ``not_asked``."""
    monkeypatch.setattr(conducting, "time", time := Time())
    with coordination(tmp_path) as alliance:
        offer = alliance.offer(make_study())
        for site in ("North", "South"):
            approve(alliance, offer, site)
        play = Play(alliance, offer, time)
        play.step()
        approve(alliance, offer, "East")
        play.step(2)
        assert play.flower.times("East") == 0
        play.answer("North", "South")
        play.step()
        play.step()
        assert len(play.records()) == 1
        assert play.flower.times("East") == 1


def test_a_study_with_too_few_approvals_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(conducting, "time", time := Time())
    with coordination(tmp_path) as alliance:
        offer = alliance.offer(make_study())
        approve(alliance, offer, "North")
        play = Play(alliance, offer, time)
        assert not play.step()
        assert play.flower.asked == []
        approve(alliance, offer, "South")
        assert play.step(2)


def test_a_paused_study_is_left_where_it_is(play):
    play.step()
    play.answer("North")
    play.step()
    studies = play.alliance.parts.store.studies
    studies.change_state(play.offer.digest, "paused", play.alliance.clock())
    assert not play.step(2)
    studies.change_state(play.offer.digest, "open", play.alliance.clock())
    play.step(2)
    assert play.round.counted == ("North",)


def test_a_study_whose_objects_are_damaged_rests_and_the_others_go_on(play):
    alliance = play.alliance
    play.step()
    play.answer(*SIZES)
    play.step()  # from here on the two have objects of their own
    other = alliance.offer(make_study(study={"name": "other"}))
    for site in SIZES:
        approve(alliance, other, site)
    place = next(alliance.parts.objects.folder.rglob(other.state))
    good, _ = place.read_bytes(), place.write_bytes(b"junk")
    play.step(1)
    assert other.digest in play.conductor._troubled
    play.answer(*SIZES)
    play.step()
    assert len(play.records()) == 2
    place.write_bytes(good)
    play.step(301)
    assert other.digest in play.conductor._works


def test_a_round_whose_approvals_all_end_waits_for_one(play):
    play.step()
    alliance, studies = play.alliance, play.alliance.parts.store.studies
    for site in SIZES:
        said = Withdrawal(
            alliance=ALLIANCE, study=play.offer.digest, site=site, issued=stamp(alliance.clock())
        )
        studies.add_withdrawal(
            play.offer.digest, site, said.signed(KEYS[site]), issued=alliance.clock(),
            now=alliance.clock(),
        )  # fmt: skip
    play.step(2)
    play.step(400)
    assert play.conductor._works == {}
    assert play.conductor._troubled == {}
    alliance.clock.pass_minutes(1)
    for site in SIZES:
        approve(alliance, play.offer, site)
    play.step(2)
    play.answer(*SIZES)
    play.step()
    assert len(play.records()) == 1


def test_a_release_that_was_made_before_a_kill_is_not_made_again(play, monkeypatch):
    for _ in range(2):
        play.step()
        play.answer(*SIZES)
        play.step()
    studies = type(play.alliance.parts.store.studies)
    with monkeypatch.context() as patch:
        patch.setattr(studies, "change_state", lambda *_: (_ for _ in ()).throw(ConfigError("x")))
        play.step(1)
    assert play.state() == "open"
    play.step(301)
    assert play.state() == "finished"
    assert len(play.alliance.parts.store.studies.releases(play.offer.digest)) == 1


def test_an_answer_to_an_earlier_attempt_counts(play):
    play.step()
    reply, first = Reply(*LyingSite("South").honest(play.round)), play.flower.last("South")
    play.answer("North")
    play.step(302)
    play.step()
    play.flower.answers[first] = reply
    play.step()
    assert play.round.counted == ("North", "South")


def test_what_nobody_waits_for_is_taken_off_superlink(play):
    play.step()
    studies = play.alliance.parts.store.studies
    studies.change_state(play.offer.digest, "paused", play.alliance.clock())
    play.step(2)
    play.step(700)
    assert set(play.flower.forgotten) == {name for _, name in play.flower.asked}


def test_one_study_s_trouble_is_not_the_others(play):
    studies, now = play.alliance.parts.store.studies, play.alliance.clock()
    studies.propose("0" * 64, "unsigned", b"{}", now)  # the first in the list
    studies.change_state("0" * 64, "open", now)
    for _ in range(2):
        play.step(1)
        play.answer(*SIZES)
        play.step()
    assert len(play.records()) == 2
    assert "0" * 64 in play.conductor._troubled


def test_a_new_flower_run_asks_again_those_who_have_not_answered(play):
    play.step()
    play.answer("North")
    play.step()
    play.conductor._forget_run()
    play.step()
    assert play.flower.times("North") == 1
    assert play.flower.times("South") == play.flower.times("East") == 2


def test_another_process_of_the_coordinator_leaves_the_study_alone(play):
    play.step()
    trust = play.alliance.trust
    second = Conductor(play.alliance.parts, lambda: trust, trust.keys_at, owner="other")
    flower: Any = FakeFlower()
    assert not second.step(flower, flower)
    assert flower.asked == []
