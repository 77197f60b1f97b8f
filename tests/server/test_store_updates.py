"""A site counts once per round whatever it sends, and nobody fills the disk."""

from dataclasses import replace
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from huizhen.protocol.errors import ProtocolError
from huizhen.server import store_updates
from huizhen.server.store import Store
from huizhen.server.store_database import DuplicateError
from huizhen.server.store_updates import LateError, StoredRefusal

PAYLOAD = "7" * 64


def test_the_same_update_again_is_a_known_one(asked, making):
    update = making.update("A", document=b"\x00first")
    assert asked.updates.add_update(update, b"told") is True
    asked.rounds.open_attempt(making.attempt(attempt=2))
    resent = replace(update, attempt=2, document=b"signed for attempt 2", received=making.at(9))
    assert asked.updates.add_update(update, b"told") is False
    assert asked.updates.add_update(resent, b"told") is False
    assert asked.updates.updates(making.study, 1) == (update,)


def test_a_second_payload_of_a_site_is_refused_and_the_first_stays(asked, making):
    asked.updates.add_update(making.update("A", payload="u"), b"told")
    asked.rounds.open_attempt(making.attempt(attempt=2))
    for attempt in (1, 2):
        with pytest.raises(DuplicateError, match=r"site 'A' sent update 0000\w+ in round 1"):
            asked.updates.add_update(making.update("A", payload="other", attempt=attempt), b"told")
    assert asked.updates.last_update(making.study, "A") == making.update("A", payload="u")
    assert asked.updates.add_update(making.update("B", payload="u"), b"told") is True


def test_an_update_for_a_committed_round_changes_nothing(asked, making):
    asked.updates.add_update(making.update("A"), b"told")
    asked.rounds.commit_record(making.record(), ["A"])
    with pytest.raises(LateError, match="round 1 is committed, the update came too late"):
        asked.updates.add_update(making.update("B"), b"told")
    assert asked.updates.add_update(making.update("A"), b"told") is False
    with pytest.raises(DuplicateError):
        asked.updates.add_update(making.update("A", payload="other"), b"told")
    assert asked.updates.updates(making.study, 1) == (making.update("A"),)
    assert asked.updates.counted(making.study, 1) == (making.update("A"),)


@pytest.mark.parametrize("values", [{"round": 2}, {"attempt": 2}, {"study": "6" * 64}], ids=str)
def test_an_update_that_nobody_asked_for_is_refused(asked, making, values):
    with pytest.raises(ProtocolError, match=r"attempt \d of round \d was not announced"):
        asked.updates.add_update(making.update("A", **values), b"told")
    assert asked.updates.updates(making.study, 1) == ()


def test_updates_are_sorted_by_site_as_bytes_in_any_database(asked, making):
    sites = ["北京", "b", "B", "a c", "ab", "É"]
    for site in sites:
        asked.updates.add_update(making.update(site), b"told")
    found = [one.site for one in asked.updates.updates(making.study, 1)]
    assert found == ["B", "a c", "ab", "b", "É", "北京"]
    asked.rounds.commit_record(making.record(), sites)
    assert [one.site for one in asked.updates.counted(making.study, 1)] == found


def refusal(making, site="A", code="malformed", **values):
    defaults = {"round": 1, "attempt": 1, "payload": PAYLOAD, "received": making.at(3)}
    return StoredRefusal(study=making.study, site=site, code=code, **{**defaults, **values})


def test_refusals_are_kept_in_order(asked, making):
    known, unknown = refusal(making), refusal(making, site=None, code="unknown_site", payload=None)
    assert asked.updates.add_refusal(known) is True
    assert asked.updates.add_refusal(unknown) is True
    assert asked.updates.add_refusal(known) is True
    assert asked.updates.refusals(making.study, 1) == (known, unknown, known)
    assert asked.updates.refusals(making.study, 2) == ()
    assert asked.counts().refusals == {"malformed": 2, "unknown_site": 1}


def test_a_flood_of_refusals_does_not_fill_the_disk(asked, making, monkeypatch):
    monkeypatch.setattr(store_updates, "MAX_REFUSED", 3)
    kept = [asked.updates.add_refusal(refusal(making, code=f"c{n}")) for n in range(5)]
    assert kept == [True, True, True, False, False]
    assert [one.code for one in asked.updates.refusals(making.study, 1)] == ["c0", "c1", "c2"]
    asked.rounds.commit_record(making.record(), ())
    assert asked.updates.add_refusal(refusal(making, round=1)) is False
    assert asked.updates.add_refusal(refusal(making, round=2)) is True  # a bound per round
    for round in (0, 3, 1000):  # and no more rounds than there are
        with pytest.raises(ProtocolError, match=f"round is {round}, the next is 2"):
            asked.updates.add_refusal(refusal(making, round=round))


def test_a_site_reads_its_receipts_from_where_it_stopped(asked, making):
    updates = asked.updates
    for number in range(3):
        assert updates.add_receipt(making.study, 1, "A", PAYLOAD, f"r{number}".encode()) is True
    assert updates.add_receipt(making.study, 1, "B", PAYLOAD, b"\x00b") is True
    assert updates.add_receipt(making.study, 1, "A", PAYLOAD, b"r1") is False
    first = updates.receipts("A", limit=2)
    rest = updates.receipts("A", after=first[-1].number)
    assert [one.document for one in first + rest] == [b"r0", b"r1", b"r2"]
    assert updates.receipts("A", after=rest[-1].number) == ()
    [other] = updates.receipts("B")
    assert (other.study, other.round, other.payload) == (making.study, 1, PAYLOAD)
    assert other.document == b"\x00b"


def test_the_last_receipt_for_a_payload_holds(asked, making):
    """Too late for one attempt, and counted in the next."""
    updates = asked.updates
    assert updates.receipt(making.study, 1, "A", PAYLOAD) is None
    updates.add_receipt(making.study, 1, "A", PAYLOAD, b"late")
    updates.add_receipt(making.study, 1, "A", PAYLOAD, b"counted")
    updates.add_receipt(making.study, 1, "A", "8" * 64, b"duplicate")
    assert updates.receipt(making.study, 1, "A", PAYLOAD).document == b"counted"
    assert updates.receipt(making.study, 1, "A", "8" * 64).document == b"duplicate"
    assert updates.receipt(making.study, 1, "B", PAYLOAD) is None


def test_an_update_and_what_its_site_is_told_are_kept_together(asked, making, monkeypatch):
    """Killed between the two, a coordinator would count it and never say so."""
    monkeypatch.setattr(store_updates, "MAX_RECEIPTS", 1)
    updates, update = asked.updates, making.update("A")
    updates.add_receipt(making.study, 1, "A", update.payload, b"not approved")
    with monkeypatch.context() as patch:
        patch.setattr(store_updates, "_keep_receipt", Mock(side_effect=RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            updates.add_update(update, b"counted")
    assert updates.updates(making.study, 1) == ()
    updates.add_update(update, b"counted")  # above the bound, of which it takes nothing
    assert updates.receipt(making.study, 1, "A", update.payload).document == b"counted"


def test_a_site_that_sends_ever_other_bytes_does_not_fill_the_disk(asked, making, monkeypatch):
    monkeypatch.setattr(store_updates, "MAX_RECEIPTS", 2)
    add = asked.updates.add_receipt
    kept = [add(making.study, 1, "A", f"{n}" * 64, f"{n}".encode()) for n in range(4)]
    assert kept == [True, True, False, False]
    assert add(making.study, 1, "B", PAYLOAD, b"b") is True
    with pytest.raises(ProtocolError, match="round is 3, the next is 1"):
        add(making.study, 3, "A", PAYLOAD, b"c")


class Model:
    """What a store must hold, as plain values."""

    def __init__(self):
        self.updates, self.attempts, self.committed, self.counted = {}, set(), 0, {}

    def add(self, round, attempt, site, payload):
        if (round, site) in self.updates:
            return "known" if self.updates[round, site] == payload else "DuplicateError"
        if round <= self.committed:
            return "LateError"
        if (round, attempt) not in self.attempts:
            return "ProtocolError"
        self.updates[round, site] = payload
        return "new"

    def announce(self, round, attempt):
        if (round, attempt) in self.attempts:
            return "known"
        later = [a for r, a in self.attempts if r == round and a >= attempt]
        if round != self.committed + 1 or later:
            return "ProtocolError"
        self.attempts.add((round, attempt))
        return "new"

    def commit(self):
        round = self.committed + 1
        if (round, 1) not in self.attempts:
            return "ProtocolError"
        self.committed = round
        self.counted[round] = sorted(site for r, site in self.updates if r == round)
        return "new"


steps = st.one_of(
    st.tuples(
        st.just("add"), st.integers(1, 3), st.integers(1, 2), st.sampled_from("AB"),
        st.sampled_from("uv"),
    ),
    st.tuples(st.just("announce"), st.integers(1, 3), st.integers(1, 2)),
    st.tuples(st.just("commit")),
)  # fmt: skip


@pytest.fixture(scope="module")
def long_lived(tmp_path_factory):
    """One store for all examples: each has a study of its own."""
    with Store.open(f"sqlite:///{tmp_path_factory.mktemp('model')}/store.sqlite") as opened:
        yield opened


@settings(max_examples=30)
@given(st.lists(steps, max_size=25))
def test_any_order_of_events_leaves_what_a_plain_model_says(making, long_lived, events):
    model, store = Model(), long_lived
    study = f"{len(store.studies.studies()) + 1:064x}"
    store.studies.propose(study, "s", b"offer", making.at())
    store.studies.change_state(study, "open", making.at())
    for name, *values in [("announce", 1, 1), *events]:
        assert getattr(model, name)(*values) == outcome(store, making, study, name, values)
    for round in (1, 2, 3):
        found = {(round, one.site): one.payload for one in store.updates.updates(study, round)}
        wanted = {key: making.digest(v) for key, v in model.updates.items() if key[0] == round}
        assert found == wanted
        sites = [one.site for one in store.updates.counted(study, round)]
        assert sites == model.counted.get(round, [])
    assert store.counts().rounds.get(study, 0) == model.committed


def outcome(store, making, study, name, values):
    last = store.rounds.last_record(study)
    round, parent = (1, study) if last is None else (last.round + 1, last.digest)
    try:
        if name == "add":
            r, attempt, site, payload = values
            update = making.update(site, round=r, attempt=attempt, payload=payload, study=study)
            is_new = store.updates.add_update(update, b"told")
        elif name == "announce":
            is_new = store.rounds.open_attempt(making.attempt(*values, study=study))
        else:
            sites = [one.site for one in store.updates.updates(study, round)]
            record = making.record(parent, round=round, study=study)
            is_new = store.rounds.commit_record(record, sites)
    except ProtocolError as error:
        return type(error).__name__
    return "new" if is_new else "known"
