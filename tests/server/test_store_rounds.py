"""Committed rounds are one chain that never changes, whoever else works on the study."""

from dataclasses import replace

import pytest

from huizhen.protocol.errors import ProtocolError
from huizhen.protocol.statements import digest_of
from huizhen.server.store import Store
from huizhen.server.store_database import DuplicateError

OTHER = "6" * 64


def test_an_attempt_is_kept_before_it_is_sent(opened, making):
    assert opened.rounds.last_attempt(making.study) is None
    assert opened.rounds.open_attempt(making.attempt()) is True
    assert opened.rounds.open_attempt(making.attempt()) is False
    assert opened.rounds.last_attempt(making.study) == making.attempt()
    with pytest.raises(DuplicateError, match="attempt 1 of round 1 was announced in other words"):
        opened.rounds.open_attempt(making.attempt(announcement=b"another"))
    assert opened.rounds.attempts(making.study, 1) == (making.attempt(),)


def test_attempt_numbers_only_grow(opened, making):
    with pytest.raises(ProtocolError, match="attempt 0 of round 1 was announced, the last was 0"):
        opened.rounds.open_attempt(making.attempt(attempt=0))
    for number in (2, 5):
        opened.rounds.open_attempt(making.attempt(attempt=number))
    for number in (1, 3, 4, 0, -1):
        with pytest.raises(ProtocolError, match=f"attempt {number} of round 1 .* the last was 5"):
            opened.rounds.open_attempt(making.attempt(attempt=number))
    assert [one.attempt for one in opened.rounds.attempts(making.study, 1)] == [2, 5]
    assert opened.rounds.last_attempt(making.study).attempt == 5


def test_only_the_next_round_is_announced(asked, making):
    for round in (0, 2):
        with pytest.raises(ProtocolError, match=f"round {round} was announced, round 1 is the"):
            asked.rounds.open_attempt(making.attempt(round=round))
    asked.rounds.commit_record(making.record(), ())
    with pytest.raises(ProtocolError, match="round 1 was announced, round 2 is the next"):
        asked.rounds.open_attempt(making.attempt(attempt=2))
    assert asked.rounds.open_attempt(making.attempt(round=2)) is True
    assert asked.rounds.last_attempt(making.study) == making.attempt(round=2)


@pytest.mark.parametrize("state", ["paused", "closed", "finished"])
def test_a_study_that_is_not_open_announces_nothing(opened, making, state):
    opened.studies.change_state(making.study, state, making.at())
    with pytest.raises(ProtocolError, match=f"study 'rare diseases' is {state}: open it first"):
        opened.rounds.open_attempt(making.attempt())


def commit_two(store, making):
    first = making.record()
    second = making.record(first.digest, round=2)
    store.updates.add_update(making.update("A"), b"told")
    store.updates.add_update(making.update("B"), b"told")
    assert store.rounds.commit_record(first, ["B"]) is True
    store.rounds.open_attempt(making.attempt(round=2))
    assert store.rounds.commit_record(second, []) is True
    return first, second


def test_records_are_a_chain_from_the_study(asked, making):
    assert asked.rounds.last_record(making.study) is None
    first, second = commit_two(asked, making)
    assert first.digest == digest_of(first.document)
    assert asked.rounds.records(making.study) == (first, second)
    assert asked.rounds.records(making.study, after=1) == (second,)
    assert asked.rounds.last_record(making.study) == second
    assert asked.rounds.last_record(OTHER) is None
    assert [one.site for one in asked.updates.counted(making.study, 1)] == ["B"]
    assert [one.site for one in asked.updates.updates(making.study, 1)] == ["A", "B"]
    assert asked.counts().rounds == {making.study: 2}
    assert asked.counts().updates == {making.study: 1}


def test_committing_the_same_round_again_changes_nothing(asked, making):
    first, second = commit_two(asked, making)
    assert asked.rounds.commit_record(first, ["B"]) is False
    with pytest.raises(DuplicateError, match=f"round 1 is committed as record {first.digest[:12]}"):
        asked.rounds.commit_record(replace(first, document=b"rewritten"), ["A"])
    assert asked.rounds.records(making.study) == (first, second)
    assert [one.site for one in asked.updates.counted(making.study, 1)] == ["B"]


@pytest.mark.parametrize(
    ("round", "parent"), [(3, OTHER), (4, None), (3, "5" * 64), (-1, None)], ids=str
)
def test_a_record_that_does_not_follow_the_last_is_refused(asked, making, round, parent):
    first, second = commit_two(asked, making)
    asked.rounds.open_attempt(making.attempt(round=3))
    for wrong in (parent or second.digest, first.digest):
        with pytest.raises(ProtocolError, match="expected round 3 after"):
            asked.rounds.commit_record(making.record(wrong, round=round), ())
    assert asked.rounds.last_record(making.study) == second
    assert asked.rounds.commit_record(making.record(second.digest, round=3), ()) is True


def test_the_first_record_names_the_study(asked, making):
    with pytest.raises(ProtocolError, match="expected round 1 after 555555555555"):
        asked.rounds.commit_record(making.record(OTHER), ())


def test_a_round_that_was_not_announced_or_counts_what_is_not_kept_is_refused(asked, making):
    with pytest.raises(ProtocolError, match="attempt 2 of round 1 was not announced"):
        asked.rounds.commit_record(making.record(attempt=2), ())
    asked.updates.add_update(making.update("A"), b"told")
    with pytest.raises(ProtocolError, match="counts an update of 'B', which is not kept"):
        asked.rounds.commit_record(making.record(), ["A", "B"])
    assert asked.rounds.last_record(making.study) is None
    assert asked.updates.counted(making.study, 1) == ()


def test_a_round_may_be_committed_while_the_study_is_paused_but_not_when_it_is_over(asked, making):
    asked.studies.change_state(making.study, "paused", making.at())
    assert asked.rounds.commit_record(making.record(), ()) is True
    asked.studies.change_state(making.study, "open", making.at())
    asked.rounds.open_attempt(making.attempt(round=2))
    asked.studies.change_state(making.study, "closed", making.at())
    with pytest.raises(ProtocolError, match="is closed, no round can be committed"):
        asked.rounds.commit_record(making.record(making.record().digest, round=2), ())


def test_what_was_committed_is_there_after_reopening(asked, making, url):
    records = commit_two(asked, making)
    asked.shut()
    with Store.open(url) as again:
        assert again.rounds.records(making.study) == records
        assert again.rounds.attempts(making.study, 2) == (making.attempt(round=2),)
        assert again.updates.last_update(making.study, "A") == making.update("A")


def test_one_owner_works_on_a_study_at_a_time(opened, making, url):
    rounds, at = opened.rounds, making.at
    assert rounds.lease(making.study, "me", 60, at()) is True
    with Store.open(url) as other:
        assert other.rounds.lease(making.study, "you", 60, at(59)) is False
        assert rounds.lease(making.study, "me", 60, at(50)) is True  # renewed until 110
        assert other.rounds.lease(making.study, "you", 60, at(109)) is False
        assert other.rounds.lease(making.study, "you", 60, at(110)) is True  # it ran out
    assert rounds.lease(making.study, "me", 60, at(111)) is False


def test_a_lease_is_given_back_by_its_owner_alone(opened, making):
    rounds = opened.rounds
    rounds.lease(making.study, "me", 60, making.at())
    assert rounds.release_lease(making.study, "you") is False
    assert rounds.lease(making.study, "you", 60, making.at(1)) is False
    assert rounds.release_lease(making.study, "me") is True
    assert rounds.release_lease(making.study, "me") is False
    assert rounds.lease(making.study, "you", 60, making.at(1)) is True


def test_a_lease_is_of_one_study(opened, making):
    opened.studies.propose(OTHER, "strokes", b"offer", making.at())
    assert opened.rounds.lease(making.study, "me", 60, making.at()) is True
    assert opened.rounds.lease(OTHER, "you", 60, making.at()) is True
