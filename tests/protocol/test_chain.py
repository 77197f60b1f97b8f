"""A study's rounds are one chain; every way to bend it has a test in which it alone lies."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from huizhen.protocol.chain import Chain, ChainError
from huizhen.protocol.documents import public_of, sign
from huizhen.protocol.errors import ProtocolError
from huizhen.protocol.statements import Announcement, Counted, Record, Refused, digest_of, stamp

NOW = datetime(2026, 3, 1, 9, tzinfo=UTC)
S = "5" * 64
COORDINATOR, MEMBER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (7, 11))
KEYS = [public_of(COORDINATOR)]


def adapter(round):
    return b"adapter of round %d" % round


FIRST = Chain(alliance="rare", study=S, result=digest_of(adapter(1)))


def record(round=1, parent=S, key=COORDINATOR, **changes):
    values = {
        "alliance": "rare", "study": S, "round": round, "attempt": 1, "parent": parent,
        "adapter": digest_of(adapter(round)), "result": digest_of(adapter(round + 1)),
        "counted": (Counted(site="North", payload="a" * 64, document="b" * 64),),
        "absent": (Refused(site="South", code="no_answer"),), "closed": stamp(NOW),
    }  # fmt: skip
    return Record(**{**values, **changes}).signed(key)


def asking(round=1, parent=S, key=COORDINATOR, **changes):
    values = {
        "alliance": "rare", "study": S, "round": round, "attempt": 1, "parent": parent,
        "adapter": digest_of(adapter(round)), "membership": 3, "sites": ("North", "South"),
        "issued": stamp(NOW), "deadline": stamp(NOW + timedelta(minutes=5)),
    }  # fmt: skip
    return Announcement(**{**values, **changes}).signed(key)


def check(chain, data, payload=None, site="North", now=NOW):
    payload = adapter(chain.round + 1) if payload is None else payload
    return chain.check(data, payload, KEYS, site=site, now=now)


def records(count):
    """Return an honest history and the chain after it."""
    chain, made = FIRST, []
    for number in range(1, count + 1):
        made.append(record(number, chain.parent))
        chain = chain.accept_record(made[-1], KEYS)
    return chain, made


def refused(code, match):
    class Raises:
        def __enter__(self):
            self.raises = pytest.raises(ChainError, match=match)
            self.caught = self.raises.__enter__()

        def __exit__(self, *rest):
            done = self.raises.__exit__(*rest)
            assert self.caught.value.code == code
            return done

    return Raises()


def test_an_honest_study_goes_on():
    chain, made = records(3)
    assert (chain.round, chain.record) == (3, digest_of(made[-1]))
    asked = asking(4, chain.parent, attempt=2)
    after, said = check(chain, asked)
    assert (said.round, said.attempt) == (4, 2)
    assert after == replace(chain, attempt=2, announcement=digest_of(asked))
    closed = after.accept_record(record(4, chain.parent), KEYS)
    assert (closed.attempt, closed.announcement) == (0, None)


def test_what_was_accepted_last_is_taken_again():
    chain, made = records(2)
    assert chain.accept_record(made[-1], KEYS) is chain
    after, _ = check(chain, asked := asking(3, chain.parent))
    assert check(after, asked)[0] == after


# Records. CO-1: one history, at every site, for ever.


@pytest.mark.parametrize(
    ("changes", "code", "match"),
    [
        ({"key": MEMBER}, "not_signed", "0 of 1 known keys"),
        ({"alliance": "common"}, "wrong_alliance", "'common', expected 'rare'"),
        ({"study": "6" * 64}, "wrong_study", "study is 6666"),
        ({"round": 2}, "fork", "round 2 is another than was accepted"),
        ({"round": 1}, "fork", "round 1 is another than was accepted"),
        ({"round": 4}, "behind", "round 4, 3 is next"),
        ({"parent": "c" * 64}, "fork", "follows another history"),
        ({"adapter": "d" * 64}, "fork", "began with another adapter"),
    ],
    ids=["forged", "alliance", "study", "fork", "rollback", "skipped", "history", "adapter"],
)
def test_co_1_a_record_that_bends_the_history_is_refused(changes, code, match):
    chain, _ = records(2)
    values = {"round": 3, "parent": chain.parent, **changes}
    with refused(code, match):
        chain.accept_record(record(**values), KEYS)


def test_co_1_a_first_record_that_does_not_name_the_study_is_refused():
    with refused("fork", "follows another history"):
        FIRST.accept_record(record(parent="c" * 64), KEYS)


def test_co_1_a_first_record_of_another_adapter_than_was_offered_is_refused():
    with refused("fork", "another adapter"):
        FIRST.accept_record(record(adapter="d" * 64), KEYS)


def test_co_1_two_histories_that_a_coordinator_shows_cannot_be_joined():
    """Sites that were told different records refuse what follows the other's."""
    north = FIRST.accept_record(record(), KEYS)
    south = FIRST.accept_record(record(attempt=2), KEYS)
    for chain, other in ((north, south), (south, north)):
        with refused("fork", "follows another history"):
            chain.accept_record(record(2, other.parent), KEYS)
        with refused("fork", "follows another history"):
            check(chain, asking(2, other.parent))


# Announcements.


@pytest.mark.parametrize(
    ("changes", "code", "match"),
    [
        ({"key": MEMBER}, "not_signed", "0 of 1 known keys"),
        ({"alliance": "common"}, "wrong_alliance", "'common', expected 'rare'"),
        ({"study": "6" * 64}, "wrong_study", "study is 6666"),
        ({"round": 2}, "round_closed", "round 2 is announced, round 2 is closed"),
        ({"round": 1}, "rollback", "round 1 is announced, round 2 is closed"),
        ({"round": 4}, "behind", "round 4 is announced, 3 is next here"),
        ({"parent": "c" * 64}, "fork", "follows another history"),
        ({"attempt": 4}, "replayed", "attempt 4 is announced, 5 was before"),
        ({"membership": 4}, "fork", "attempt 5 is announced in two ways"),
        ({"sites": ("South",)}, "not_asked", "announced to other sites"),
        ({"adapter": "d" * 64}, "wrong_adapter", "not the one that is announced"),
        ({"deadline": stamp(NOW - timedelta(seconds=1))}, "deadline_passed", "was due at"),
    ],
    ids=[
        "forged", "alliance", "study", "last round", "rollback", "skipped", "history",
        "replayed attempt", "attempt told in two ways", "not asked", "adapter", "late",
    ],
)  # fmt: skip
def test_an_announcement_that_does_not_follow_is_refused(changes, code, match):
    chain, _ = records(2)
    plain = {"round": 3, "parent": chain.parent, "attempt": 5}
    if changes.keys() & {"sites", "adapter", "deadline"}:
        plain["attempt"] = 6  # else it is the fork that refuses
    chain, _ = check(chain, asking(**{**plain, "attempt": 5}))
    with refused(code, match):
        check(chain, asking(**{**plain, **changes}))


def test_another_adapter_than_the_one_announced_is_refused():
    with refused("wrong_adapter", "not the one that is announced"):
        check(FIRST, asking(), b"another")


def test_an_announced_adapter_that_the_last_record_did_not_give_is_refused():
    chain, _ = records(1)
    data = asking(2, chain.parent, adapter=digest_of(b"another"))
    with refused("wrong_adapter", "not what the last record gave"):
        check(chain, data, b"another")
    first = asking(adapter=digest_of(b"another"))
    with refused("wrong_adapter", "not what the last record gave"):
        check(FIRST, first, b"another")


def test_co_1_an_announcement_after_a_rollback_is_refused():
    """A coordinator that was restored from a backup asks again for a round that is closed."""
    chain, _ = records(3)
    before, _ = records(1)
    with refused("rollback", "round 2 is announced, round 3 is closed"):
        check(chain, asking(2, before.parent), adapter(2))


def test_a_message_that_waited_while_its_round_closed_is_no_rollback():
    chain, _ = records(2)
    waiting = asking(3, chain.parent)
    after, _ = records(3)
    with refused("round_closed", "round 3 is announced, round 3 is closed"):
        check(after, waiting, adapter(3))


def test_id_7_a_replayed_announcement_of_an_older_attempt_is_refused():
    older, newer = asking(attempt=1), asking(attempt=2)
    chain, _ = check(FIRST, older)
    chain, _ = check(chain, newer)
    with refused("replayed", "attempt 1 is announced, 2 was before"):
        check(chain, older)
    assert check(chain, newer)[0] == chain


def test_an_announcement_is_no_record_and_a_record_no_announcement():
    with refused("not_signed", "expected"):
        FIRST.accept_record(asking(), KEYS)
    with refused("not_signed", "expected"):
        check(FIRST, record())


def test_the_deadline_itself_is_in_time():
    due = NOW + timedelta(minutes=5)
    assert check(FIRST, asking(), now=due)[1].round == 1
    with refused("deadline_passed", "was due"):
        check(FIRST, asking(), now=due + timedelta(seconds=1))


@pytest.mark.parametrize("extra", [{"epsilon": 1e6}, {"local_steps": 1000}, {"code": "import os"}])
def test_code_2_an_announcement_that_says_more_than_a_round_is_refused(extra):
    """Nothing in it can change how a site trains, not even signed by the coordinator."""
    body = Announcement.read(asking(), KEYS).model_dump(mode="json", by_alias=True)
    check(FIRST, sign("announcement", body, COORDINATOR))
    with refused("not_signed", f"wrong '{next(iter(extra))}'"):
        check(FIRST, sign("announcement", body | extra, COORDINATOR))


# Whatever comes, in whatever order.


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from("ra"), st.integers(1, 5), st.booleans()), max_size=20))
def test_a_chain_only_grows(events):
    """A model of three lines: what is not the next of the one history changes nothing."""
    _, honest = records(5)
    forks = [record(n, digest_of(honest[n - 2]) if n > 1 else S, attempt=9) for n in range(1, 6)]
    chain = FIRST
    for what, number, is_honest in events:
        parent = digest_of(honest[number - 2]) if number > 1 else S
        before = chain
        try:
            if what == "r":
                chain = chain.accept_record((honest if is_honest else forks)[number - 1], KEYS)
            else:
                chain, _ = check(chain, asking(number, parent), adapter(number))
        except ChainError:
            assert chain is before
        else:
            assert chain.round >= before.round
            assert chain.round - before.round <= 1


@settings(max_examples=50)
@given(st.binary(max_size=100))
def test_no_bytes_move_a_chain(data):
    with pytest.raises(ProtocolError):
        FIRST.accept_record(data, KEYS)
    with pytest.raises(ProtocolError):
        check(FIRST, data)


def test_a_chain_comes_back_as_it_was_kept():
    chain, _ = records(2)
    chain, _ = check(chain, asking(3, chain.parent))
    assert Chain(**chain.to_json()) == chain
