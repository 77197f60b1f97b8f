"""A study on a real desk: offered once, moved only where there is a way, its objects kept."""

import os
from datetime import timedelta

import pytest
from tests.federation.lying_federation import ALLIANCE, FIRST, KEYS, NOW, make_study, private
from tests.server.test_registry import Hospital

from huizhen.protocol.documents import countersign, public_of
from huizhen.protocol.errors import ConfigError, ProtocolError, StorageError
from huizhen.protocol.statements import digest_of
from huizhen.server.desk import open_desk
from huizhen.server.founding import found
from huizhen.server.home import Home
from huizhen.server.registry import WaitingForBoardError
from huizhen.server.studies import accept, change, find, offer, offered, sweep
from huizhen.storage.files import write_whole

ENDS = NOW + timedelta(days=90)


def founded(folder, clock, board=(), threshold=1):
    """Make a coordinator's folder and open it; ``board`` are keys beside the desk's own."""
    home = Home(folder)
    found(
        home, alliance=ALLIANCE, names=["127.0.0.1"], first_port=18440, clock_now=clock(),
        board=[public_of(key).raw.hex() for key in board], threshold=threshold,
    )  # fmt: skip
    return open_desk(home, clock=clock)


def join(desk, clock):
    """Let three sites in, with the keys that ``LyingSite`` signs with."""
    for number, site in enumerate(KEYS, 11):
        token = desk.registry.invite(site, desk.settings.public, days=1).token
        desk.registry.enrol(Hospital(site, number, clock).enrolment(token), token)


def age(desk):
    """Date every object two days back."""
    for place in desk.objects.folder.glob("??/??/*"):
        os.utime(place, (place.stat().st_atime, place.stat().st_mtime - 2 * 86_400))


def test_an_offer_is_made_once(desk):
    made = offer(desk, make_study(), FIRST, ends=ENDS)
    again = offer(desk, make_study(), FIRST, ends=ENDS + timedelta(days=1))
    assert again == offered(desk, find(desk, made.digest[:6]))
    assert (again.digest, again.ends) == (made.digest, made.ends)
    assert [one.state for one in desk.store.studies.studies()] == ["proposed"]


def test_a_site_that_is_no_member_is_named(tmp_path, clock):
    with founded(tmp_path, clock) as desk:
        desk.registry.found()
        with pytest.raises(ConfigError, match=r"\[sites\..*\] is no member .*members are none"):
            offer(desk, make_study(), FIRST, ends=ENDS)


def test_a_study_is_found_by_name_and_a_wrong_name_shows_all(desk):
    made = offer(desk, make_study(), FIRST, ends=ENDS)
    study = find(desk, made.digest)
    assert find(desk, study.name) == study
    with pytest.raises(ConfigError, match=f"0 studies are called 'x'.*{made.digest[:12]}"):
        find(desk, "x")


def test_a_study_moves_only_where_there_is_a_way_and_each_move_is_logged(desk):
    made = offer(desk, make_study(), FIRST, ends=ENDS)
    for state in ("open", "paused", "open", "closed"):
        assert change(desk, find(desk, made.digest), state)
        assert not change(desk, find(desk, made.digest), state)
    with pytest.raises(ConfigError):
        change(desk, find(desk, made.digest), "open")
    events = [one.event for one in desk.audit.entries() if one.event.startswith("study_")]
    assert events == ["study_opened", "study_paused", "study_resumed", "study_closed"]


def test_a_move_that_there_is_no_way_for_is_not_logged(desk):
    made = offer(desk, make_study(), FIRST, ends=ENDS)
    with pytest.raises(ConfigError, match="is proposed, it may become open or closed"):
        change(desk, find(desk, made.digest), "paused")
    change(desk, find(desk, made.digest), "open")
    desk.store.studies.change_state(made.digest, "finished", NOW)
    before = desk.audit.head()
    for state in ("closed", "open", "paused"):
        with pytest.raises(ConfigError, match="is finished, it may become nothing else"):
            change(desk, find(desk, made.digest), state)
    assert desk.audit.head() == before


def test_what_a_killed_process_left_goes_after_a_day_and_what_an_offer_names_stays(desk):
    made = offer(desk, make_study(), FIRST, ends=ENDS)
    left = desk.objects.put(b"left behind")
    assert sweep(desk) == 0
    age(desk)
    assert sweep(desk) == 1
    assert not desk.objects.has(left)
    assert desk.objects.has(made.adapter)
    assert desk.objects.has(made.state)


def test_beside_a_draft_that_is_none_nothing_is_removed(desk):
    left = desk.objects.put(b"left behind")
    age(desk)
    draft = desk.home.folder / "board" / "study-1.json"
    for junk in (b"", b"{}", b"\xff"):
        write_whole(draft, junk)
        with pytest.raises(StorageError, match="is none"):
            sweep(desk)
    assert desk.objects.has(left)


def test_what_waits_for_the_board_is_not_swept_and_can_be_accepted_after(tmp_path, clock):
    board = [private(number) for number in (1, 2)]
    with founded(tmp_path, clock, board, threshold=2) as desk:
        with pytest.raises(WaitingForBoardError):
            desk.registry.found()
        [draft] = (desk.home.folder / "board").iterdir()
        desk.registry.accept(countersign(countersign(draft.read_bytes(), board[0]), board[1]))
        for number, site in enumerate(KEYS, 11):
            token = desk.registry.invite(site, desk.settings.public, days=1).token
            request = Hospital(site, number, clock).enrolment(token)
            with pytest.raises(WaitingForBoardError):
                desk.registry.enrol(request, token)
            [draft] = (desk.home.folder / "board").iterdir()
            desk.registry.accept(countersign(countersign(draft.read_bytes(), board[0]), board[1]))
            desk.registry.enrol(request, token)
        with pytest.raises(WaitingForBoardError):
            offer(desk, make_study(), FIRST, ends=ENDS)
        age(desk)
        assert sweep(desk) == 0
        [draft] = (desk.home.folder / "board").iterdir()
        document = draft.read_bytes()
        with pytest.raises(ProtocolError):
            accept(desk, document)  # nobody has signed it
        made = accept(desk, countersign(countersign(document, board[0]), board[1]))
        assert accept(desk, countersign(countersign(document, board[0]), board[1])) == made
        age(desk)
        assert sweep(desk) == 0
        assert digest_of(desk.objects.get(made.adapter)) == made.adapter
