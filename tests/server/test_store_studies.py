"""A study moves one way, and what a site withdrew nobody brings back."""

import pytest

from huizhen.protocol.errors import ConfigError, ProtocolError
from huizhen.server import store_studies
from huizhen.server.store_database import DuplicateError, read_all

OTHER = "6" * 64
STATES = ("proposed", "open", "paused", "finished", "closed")
WAYS = {
    ("proposed", "open"),
    ("proposed", "closed"),
    ("open", "paused"),
    ("open", "finished"),
    ("open", "closed"),
    ("paused", "open"),
    ("paused", "finished"),
    ("paused", "closed"),
}


@pytest.fixture
def proposed(store, making):
    store.studies.propose(making.study, "rare diseases", b"\x00offer", making.at())
    return store.studies


def test_a_proposed_study_is_kept(proposed, making):
    found = proposed.study(making.study)
    assert (found.name, found.document, found.state) == ("rare diseases", b"\x00offer", "proposed")
    assert proposed.propose(making.study, "rare diseases", b"\x00offer", making.at(9)) is False
    with pytest.raises(DuplicateError, match="study 555555555555 has another document"):
        proposed.propose(making.study, "rare diseases", b"another", making.at())
    assert proposed.propose(OTHER, "strokes", b"offer", making.at(1)) is True
    assert [one.digest for one in proposed.studies()] == [making.study, OTHER]
    assert proposed.study("4" * 64) is None


@pytest.mark.parametrize("start", STATES)
def test_a_study_moves_only_where_it_may(store, making, start):
    path = {"proposed": (), "open": ("open",)}.get(start, ("open", start))
    for number, end in enumerate(STATES):
        digest = f"{number}" * 64
        store.studies.propose(digest, "strokes", b"offer", making.at())
        for state in path:
            store.studies.change_state(digest, state, making.at(1), reason="as agreed")
        if end == start or (start, end) in WAYS:
            moved = store.studies.change_state(digest, end, making.at(2), reason="so decided")
            assert moved is (end != start)
        else:
            with pytest.raises(ConfigError, match=f"'strokes' is {start}, it may become"):
                store.studies.change_state(digest, end, making.at(2), reason="so decided")
            assert store.studies.study(digest).state == start
        if (start, end) in WAYS:
            found = store.studies.study(digest)
            assert (found.state, found.reason, found.changed) == (end, "so decided", making.at(2))


def test_an_unknown_study_cannot_move(store, making):
    with pytest.raises(ConfigError, match="no study has digest '444444444444'"):
        store.studies.change_state("4" * 64, "open", making.at())


def said(studies, making):
    return {site: one.kind for site, one in studies.standing(making.study).items()}


def test_the_last_word_of_each_site_stands(proposed, making):
    at = making.at
    assert proposed.standing(making.study) == {}
    assert proposed.add_approval(making.study, "A", b"yes", issued=at(1), now=at(2)) is True
    assert proposed.add_approval(making.study, "B", b"yes", issued=at(1), now=at(2)) is True
    assert proposed.add_withdrawal(making.study, "A", b"no", issued=at(3), now=at(4)) is True
    assert said(proposed, making) == {"A": "withdrawal", "B": "approval"}
    assert proposed.add_approval(making.study, "A", b"yes again", issued=at(5), now=at(6)) is True
    assert said(proposed, making) == {"A": "approval", "B": "approval"}
    found = proposed.consents(making.study, "A")
    assert [one.document for one in found] == [b"yes", b"no", b"yes again"]
    assert (found[1].issued, found[1].received) == (at(3), at(4))
    assert proposed.standing(making.study)["A"] == found[2]


def test_a_replayed_approval_does_not_undo_a_withdrawal(proposed, making):
    at = making.at
    proposed.add_approval(making.study, "A", b"yes", issued=at(1), now=at(2))
    proposed.add_withdrawal(making.study, "A", b"no", issued=at(3), now=at(4))
    assert proposed.add_approval(making.study, "A", b"yes", issued=at(1), now=at(5)) is False
    for issued in (at(1), at(3)):  # the same words with one more signature, or an unsent old one
        with pytest.raises(ProtocolError, match="it must approve anew"):
            proposed.add_approval(making.study, "A", b"yes, resigned", issued=issued, now=at(5))
    assert said(proposed, making) == {"A": "withdrawal"}


def test_an_older_withdrawal_after_a_newer_one_does_not_let_an_approval_between_in(
    proposed, making
):
    at = making.at
    proposed.add_withdrawal(making.study, "A", b"no, late", issued=at(9), now=at(9))
    proposed.add_withdrawal(making.study, "A", b"no, early", issued=at(3), now=at(10))
    with pytest.raises(ProtocolError, match="withdrew at 2026-01-31T09:00:09Z"):
        proposed.add_approval(making.study, "A", b"yes", issued=at(5), now=at(11))


def test_a_withdrawal_stands_whatever_its_time(proposed, making):
    """A site whose clock went back must still be able to stop."""
    proposed.add_approval(making.study, "A", b"yes", issued=making.at(1000), now=making.at())
    proposed.add_withdrawal(making.study, "A", b"no", issued=making.at(-1000), now=making.at(1))
    assert said(proposed, making) == {"A": "withdrawal"}
    assert (
        proposed.add_withdrawal(making.study, "A", b"no", issued=making.at(), now=making.at())
        is False
    )


def test_what_a_site_says_about_a_study_is_bounded_and_a_withdrawal_gets_through(
    proposed, making, monkeypatch
):
    monkeypatch.setattr(store_studies, "MAX_APPROVALS", 4)
    monkeypatch.setattr(store_studies, "MAX_CONSENTS", 6)
    at, study = making.at, making.study
    proposed.add_withdrawal(study, "A", b"no", issued=at(), now=at())
    for number in range(3):
        words = b"yes %d" % number
        assert proposed.add_approval(study, "A", words, issued=at(1), now=at(1)) is True
    assert proposed.is_new("approval", study, "A", b"yes 2", issued=at(1)) is False
    for ask in (
        lambda: proposed.is_new("approval", study, "A", b"more", issued=at(1)),
        lambda: proposed.add_approval(study, "A", b"more", issued=at(1), now=at(1)),
    ):
        with pytest.raises(ProtocolError, match="site 'A' has said 4 things about study 5555"):
            ask()
    assert proposed.add_approval(study, "B", b"yes", issued=at(1), now=at(1)) is True
    for number in range(2):
        words = b"no %d" % number
        assert proposed.is_new("withdrawal", study, "A", words, issued=at(1)) is True
        assert proposed.add_withdrawal(study, "A", words, issued=at(1), now=at(1)) is True
    with pytest.raises(ProtocolError, match="withdrawals are taken after fewer than 6"):
        proposed.add_withdrawal(study, "A", b"no 2", issued=at(1), now=at(1))
    assert said(proposed, making) == {"A": "withdrawal", "B": "approval"}


def test_of_each_site_the_last_word_alone_is_read(proposed, making, monkeypatch):
    for number in range(5):
        for site in ("A", "B"):
            words = b"yes %d" % number
            proposed.add_approval(making.study, site, words, issued=making.at(), now=making.at())
    read: list[object] = []

    def counting(*facts):
        read.extend(found := read_all(*facts))
        return found

    monkeypatch.setattr(store_studies, "read_all", counting)
    found = proposed.standing(making.study)
    assert {site: one.document for site, one in found.items()} == {"A": b"yes 4", "B": b"yes 4"}
    assert len(read) == 2


def test_releases_are_kept_in_order(proposed, making):
    assert proposed.add_release(making.study, b"\x00first", making.at()) is True
    assert proposed.add_release(making.study, b"second", making.at(1)) is True
    assert proposed.add_release(making.study, b"\x00first", making.at(2)) is False
    assert [one.document for one in proposed.releases(making.study)] == [b"\x00first", b"second"]
    assert proposed.releases(OTHER) == ()


def test_what_names_an_unknown_study_is_refused(store, making):
    acts = (
        lambda: store.studies.add_approval(OTHER, "A", b"yes", issued=making.at(), now=making.at()),
        lambda: store.studies.add_release(OTHER, b"release", making.at()),
        lambda: store.rounds.open_attempt(making.attempt(study=OTHER)),
        lambda: store.rounds.commit_record(making.record(OTHER, study=OTHER), ()),
        lambda: store.rounds.lease(OTHER, "me", 60, making.at()),
        lambda: store.updates.add_receipt(OTHER, 1, "A", "7" * 64, b"receipt"),
        lambda: store.sites.report_progress(OTHER, "A", "training", making.at()),
    )
    for act in acts:
        with pytest.raises(ProtocolError, match="study '666666666666' is not one of"):
            act()


def test_a_time_without_a_zone_is_refused(store, making):
    with pytest.raises(ValueError, match="has no zone"):
        store.studies.propose(making.study, "strokes", b"offer", making.at().replace(tzinfo=None))
    assert store.studies.studies() == ()
