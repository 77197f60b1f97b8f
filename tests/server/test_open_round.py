"""One open round among liars: whatever they send, it has a code, and the round goes on."""

import time
import tracemalloc
from datetime import timedelta

import numpy as np
import pytest
from tests.federation.lying_federation import (
    BOARD,
    COORDINATOR,
    FIRST,
    LIES,
    NOW,
    SIZES,
    LyingSite,
    begin_trust,
    coordination,
    make_membership,
    make_study,
)

from huizhen.protocol.adapter import shapes_of
from huizhen.protocol.chain import Chain
from huizhen.protocol.documents import public_of
from huizhen.protocol.errors import AggregationError, ProtocolError, StorageError
from huizhen.protocol.statements import (
    Announcement,
    Receipt,
    Record,
    Update,
    digest_of,
    moment,
)
from huizhen.protocol.wire import decode, encode
from huizhen.server import store_updates
from huizhen.server.rounds import Coordinator, RoundState
from huizhen.server.store_rounds import Rounds
from huizhen.server.store_updates import Updates
from huizhen.storage.audit import AuditLog
from huizhen.strategies.stored import decode_state

NORTH, SOUTH, EAST = (LyingSite(site, (n / 4, -n / 8)) for n, site in enumerate(SIZES, 1))
OWN = [public_of(COORDINATOR)]


@pytest.fixture
def alliance(tmp_path):
    with coordination(tmp_path) as made:
        yield made


@pytest.fixture
def offer(alliance):
    return alliance.offer(make_study())


@pytest.fixture
def opened(alliance, offer):
    return alliance.open(offer)


def send(open_round, site, answer=None):
    return open_round.receive(site.site, *(answer or site.honest(open_round)))


def told(alliance, site):
    """Return the codes of the receipts that a site has got, oldest first."""
    receipts = alliance.parts.store.updates.receipts(site.site)
    return [Receipt.read(one.document, OWN).code for one in receipts]


def close_first(alliance, offer):
    """Commit round 1 and return the next one."""
    open_round = alliance.open(offer)
    for site in (NORTH, SOUTH, EAST):
        assert send(open_round, site) is None
    open_round.close()
    return alliance.open(offer)


# What an honest round is.


def test_an_honest_round_is_announced_counted_and_committed(alliance, opened, offer):
    asked = Announcement.read(opened.document, OWN)
    assert (asked.round, asked.attempt, asked.parent) == (1, 1, offer.digest)
    assert (asked.adapter, asked.sites) == (digest_of(opened.adapter), tuple(sorted(SIZES)))
    for site in (NORTH, SOUTH, EAST):
        assert send(opened, site) is None
        assert told(alliance, site) == [None]
    digest = opened.close()
    last = alliance.parts.store.rounds.last_record(offer.digest)
    record = Record.read(last.document, OWN)
    assert digest_of(last.document) == digest
    assert [one.site for one in record.counted] == sorted(SIZES)
    assert record.absent == ()
    assert record.result == opened.result == digest_of(alliance.parts.objects.get(record.result))


def test_the_site_s_own_chain_follows_what_the_coordinator_says(alliance, offer):
    chain = Chain(alliance="rare", study=offer.digest, result=offer.adapter)
    for number in (1, 2):
        open_round = alliance.open(offer)
        chain, asked = chain.check(
            open_round.document, open_round.adapter, OWN, site="North", now=NOW
        )
        assert asked.round == number
        for site in (NORTH, SOUTH, EAST):
            send(open_round, site)
        open_round.close()
        last = alliance.parts.store.rounds.last_record(offer.digest)
        chain = chain.accept_record(last.document, OWN)
    assert chain.round == 2


# Every lie alone, and all together.


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_refused_with_its_code_and_the_round_goes_on(alliance, opened, offer, name):
    lie, code = LIES[name]
    send(opened, NORTH)
    before = alliance.state(offer.digest)
    document, payload = lie(SOUTH, opened)
    assert opened.receive("South", document, payload) == code
    assert alliance.state(offer.digest) == before
    refusal = alliance.parts.store.updates.refusals(offer.digest, 1)[-1]
    assert (refusal.site, refusal.code, refusal.payload) == ("South", code, digest_of(payload))
    entry = alliance.parts.audit.entries()[-1]
    assert (entry.event, entry.facts["code"], entry.facts["site"]) == (
        "update_refused", code, "South",
    )  # fmt: skip
    assert told(alliance, SOUTH) == [code]
    assert send(opened, SOUTH) is None  # it may do better
    assert send(opened, EAST) is None
    opened.close()


def test_up_5_a_round_among_liars_gives_the_bytes_of_one_without(tmp_path):
    results = []
    for name, lies in (("honest", {}), ("lying", LIES)):
        with coordination(tmp_path / name) as alliance:
            opened = alliance.open(alliance.offer(make_study()))
            for lie, _ in lies.values():
                opened.receive("South", *lie(SOUTH, opened))
            for site in (NORTH, SOUTH, EAST):
                assert send(opened, site) is None
            for lie, _ in lies.values():
                assert opened.receive("South", *lie(SOUTH, opened)) is not None
            opened.close()
            results.append(opened.result)
    assert results[0] == results[1]


@pytest.mark.parametrize("name", [name for name in LIES if name.startswith("up 4")])
def test_up_4_a_claim_of_more_than_there_is_costs_nothing(opened, name):
    answer = LIES[name][0](SOUTH, opened)
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        assert opened.receive("South", *answer) == "malformed"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - begin < 1
    assert peak < 64 << 20


def test_up_1_no_changed_byte_of_an_update_counts(alliance, opened, offer):
    """Each byte but those of the five values, which may be what the site likes."""
    good = SOUTH.update(opened)
    before = alliance.state(offer.digest)
    for at in range(0, len(good) - 4 * 5, 9):
        changed = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
        assert send(opened, SOUTH, SOUTH.signed(opened, changed)) is not None
    assert alliance.state(offer.digest) == before


# UP-3 and replays.


def test_up_3_a_site_is_counted_once_whatever_it_sends(alliance, opened, offer):
    assert send(opened, SOUTH) is None
    before = alliance.state(offer.digest)
    assert send(opened, SOUTH) is None  # asked again, answered again
    assert alliance.state(offer.digest) == before
    other = LyingSite("South", (9, 9))
    assert send(opened, other) == "duplicate"
    assert alliance.state(offer.digest) == before
    assert told(alliance, SOUTH) == [None, "duplicate"]
    assert opened.counted == ("South",)


def test_up_3_a_counted_site_that_refuses_afterwards_is_still_counted(alliance, opened, offer):
    send(opened, SOUTH)
    send(opened, NORTH)
    send(opened, SOUTH, SOUTH.refusal(opened, "paused"))
    opened.close()
    record = Record.read(alliance.parts.store.rounds.last_record(offer.digest).document, OWN)
    assert [one.site for one in record.counted] == ["North", "South"]


def test_id_7_an_answer_of_the_last_round_is_not_one_to_this(alliance, offer):
    first = alliance.open(offer)
    old = {site.site: site.honest(first) for site in (NORTH, SOUTH, EAST)}
    for site in (NORTH, SOUTH, EAST):
        send(first, site)
    first.close()
    second = alliance.open(offer)
    before = alliance.state(offer.digest)
    for site in (NORTH, SOUTH, EAST):
        assert send(second, site, old[site.site]) == "wrong_round"
    assert alliance.state(offer.digest) == before
    assert second.counted == ()


def test_id_7_an_answer_to_one_study_is_none_to_another(alliance, offer):
    other = alliance.open(alliance.offer(make_study(study={"purpose": "Another."})))
    answer = SOUTH.honest(alliance.open(offer))
    assert other.receive("South", *answer) == "wrong_study"
    assert other.counted == ()


def test_an_old_update_under_a_new_signature_is_no_answer_to_the_next_round(alliance, offer):
    first = alliance.open(offer)
    old = SOUTH.update(first)
    second = close_first(alliance, offer)
    assert send(second, SOUTH, SOUTH.signed(second, old)) == "wrong_round"


# Attempts.


def test_an_answer_to_an_earlier_attempt_of_the_same_round_counts(alliance, opened):
    answer = SOUTH.honest(opened)
    alliance.clock.pass_minutes(6)
    assert opened.is_due
    opened.announce()
    assert opened.attempt == 2
    assert not opened.is_due
    assert send(opened, SOUTH, answer) is None
    assert opened.missing == ("East", "North")


def test_an_answer_that_mixes_two_attempts_is_refused(alliance, opened):
    """The attempt that it names is not the announcement that it names."""
    first = digest_of(opened.document)
    opened.announce()
    for changes in ({"announcement": first}, {"attempt": 1}):
        answer = SOUTH.signed(opened, SOUTH.update(opened), **changes)
        assert send(opened, SOUTH, answer) == "wrong_announcement"
    assert send(opened, SOUTH) is None


def test_an_attempt_names_all_who_take_part_and_has_a_deadline_of_its_own(alliance, opened):
    """A policy's min_sites is about those who take part, not about those who are late."""
    send(opened, NORTH)
    alliance.clock.pass_minutes(6)
    opened.announce()
    asked = Announcement.read(opened.document, OWN)
    assert asked.sites == ("East", "North", "South")
    assert opened.missing == ("East", "South")
    assert moment(asked.deadline) == opened.deadline + timedelta(seconds=1)
    assert opened.deadline == alliance.clock() + timedelta(minutes=5)


# UP-6: weights.


def test_up_6_the_weight_of_a_site_is_its_public_share_and_no_more(alliance, opened, offer):
    """By hand: shares 1/2, 3/8, 1/8 of 800 patients; no message has a place for another number."""
    for site in (NORTH, SOUTH, EAST):
        send(opened, site)
    opened.close()
    x = decode(alliance.parts.objects.get(opened.result), shapes=shapes_of(FIRST)).tensors
    mean = 1 / 2 * 0.25 + 3 / 8 * 0.5 + 1 / 8 * 0.75
    assert x["l.0.lora_A"].tolist() == [[9 + mean] * 3]
    half = -mean / 2
    assert x["l.0.lora_B"].tolist() == [[1 + mean], [-2 + half]]


# UP-7: the quorum.


def test_up_7_a_round_under_its_quorum_is_not_committed(alliance, opened, offer):
    send(opened, NORTH)
    for lie, _ in LIES.values():
        opened.receive("South", *lie(SOUTH, opened))
    assert not opened.has_quorum
    before = alliance.state(offer.digest)
    with pytest.raises(AggregationError, match="the quorum is 2"):
        opened.close()
    assert alliance.state(offer.digest) == before
    send(opened, EAST)
    assert opened.has_quorum
    opened.close()


def test_the_record_says_why_each_other_site_is_not_in_it(alliance, offer):
    opened = alliance.open(offer, ["North", "South", "East"])
    send(opened, NORTH)
    send(opened, EAST)
    send(opened, SOUTH, SOUTH.refusal(opened, "epsilon_over_cap"))
    opened.close()
    record = Record.read(alliance.parts.store.rounds.last_record(offer.digest).document, OWN)
    assert [(one.site, one.code) for one in record.absent] == [("South", "epsilon_over_cap")]


@pytest.mark.parametrize("case", ["silent", "not approved", "forged by others"])
def test_nobody_puts_a_word_into_another_site_s_mouth(alliance, offer, case):
    sites = ["North", "East"] if case == "not approved" else list(SIZES)
    opened = alliance.open(offer, sites)
    if case == "forged by others":
        forged = LIES["signed by a stranger"][0](SOUTH, opened)
        assert opened.receive("South", *forged) == "not_signed"
    send(opened, NORTH)
    send(opened, EAST)
    opened.close()
    record = Record.read(alliance.parts.store.rounds.last_record(offer.digest).document, OWN)
    expected = "not_approved" if case == "not approved" else "no_answer"
    assert [(one.site, one.code) for one in record.absent] == [("South", expected)]


# ID-2 and ID-8.


def test_id_2_a_site_without_a_standing_approval_does_not_count(alliance, offer):
    opened = alliance.open(offer, ["North", "East"])
    assert send(opened, SOUTH) == "not_approved"
    assert opened.counted == ()


def test_id_2_a_revoked_member_s_answer_is_refused(alliance, opened):
    alliance.trust = begin_trust().follow(
        make_membership(2, begin_trust().digest, South="revoked"), now=NOW
    )
    opened.trust = alliance.trust
    assert send(opened, SOUTH) == "not_signed"
    assert send(opened, NORTH) is None


def test_id_8_another_member_s_node_carries_no_answer_of_this_one(alliance, opened):
    """North's whole honest answer, sent by South's node, counts for nobody."""
    assert opened.receive("South", *NORTH.honest(opened)) == "not_signed"
    assert opened.receive("nobody", *NORTH.honest(opened)) == "not_signed"
    assert opened.counted == ()
    assert send(opened, NORTH) is None


@pytest.mark.parametrize("signer", [BOARD, COORDINATOR])
def test_id_2_neither_board_nor_coordinator_answers_for_a_site(opened, signer):
    answer = SOUTH.signed(opened, SOUTH.update(opened), key=signer)
    assert send(opened, SOUTH, answer) == "not_signed"


# Refusals are bounded.


def test_a_site_that_sends_junk_without_end_fills_no_disk(alliance, opened, offer, monkeypatch):
    monkeypatch.setattr(store_updates, "MAX_RECEIPTS", 5)
    monkeypatch.setattr(store_updates, "MAX_REFUSED", 7)
    for number in range(10):
        payload = b"%d" % number
        assert send(opened, SOUTH, SOUTH.signed(opened, payload)) == "malformed"
    assert len(alliance.parts.store.updates.receipts("South")) == 5
    assert len(alliance.parts.store.updates.refusals(offer.digest, 1)) == 7
    assert not list((alliance.parts.objects.folder).rglob(digest_of(b"7")))


def test_the_same_refusal_has_one_receipt(alliance, opened):
    answer = SOUTH.signed(opened, b"junk")
    for _ in range(3):
        assert send(opened, SOUTH, answer) == "malformed"
    assert told(alliance, SOUTH) == ["malformed"]


def test_every_receipt_is_the_coordinator_s_and_names_what_came(alliance, opened):
    send(opened, SOUTH, SOUTH.signed(opened, b"junk"))
    send(opened, SOUTH)
    found = alliance.parts.store.updates.receipts("South")
    read = [Receipt.read(one.document, OWN) for one in found]
    assert [(one.payload, one.code) for one in read] == [
        (digest_of(b"junk"), "malformed"),
        (digest_of(SOUTH.update(opened)), None),
    ]
    assert {(one.study, one.round, one.site) for one in read} == {(opened.digest, 1, "South")}


# Metrics.


@pytest.fixture
def measured(alliance):
    """A private study of two rounds that lets metrics out."""
    terms = {"unit": "patient", "epsilon": 8.0, "delta": 1e-4, "sampling_rate": 0.3}
    study = make_study(
        privacy={**terms, "metrics_epsilon": 0.5, "learning_rate": 0.5},
        rounds={"count": 2, "local_steps": 2},
        task={"labels": ["a", "b", "c", "d"]},
    )
    return alliance, alliance.offer(study)


def counts(open_round):
    from huizhen.protocol.metrics import cells_of

    cells = cells_of(open_round.study.task)
    return dict.fromkeys(cells, 0) | {cells[0]: 31}


def test_metrics_are_taken_after_the_last_round_and_lies_among_them_refused(measured):
    alliance, offer = measured
    close_first(alliance, offer)
    opened = close_first(alliance, offer)
    assert opened.is_metrics

    def said(sender, **changes):
        data = sender.metrics(opened, **{"counts": counts(opened), **changes})
        return send(opened, sender, sender.signed(opened, data))

    assert said(NORTH) is None
    assert said(SOUTH, site="North") == "wrong_site"
    assert said(SOUTH, epsilon_counts=0.6) == "malformed"
    assert said(SOUTH, counts={"right": 40}) == "malformed"
    assert said(SOUTH, study="6" * 64) == "malformed"
    assert said(SOUTH, round=3) == "malformed"
    assert said(SOUTH, round=1) == "wrong_round"
    assert send(opened, SOUTH, SOUTH.signed(opened, b"{}")) == "malformed"
    assert send(opened, SOUTH, SOUTH.signed(opened, SOUTH.update(opened))) == "malformed"
    assert said(NORTH, counts=counts(opened) | {next(iter(counts(opened))): 12}) == "duplicate"
    adapter = opened.adapter
    opened.close()
    record = Record.read(alliance.parts.store.rounds.last_record(offer.digest).document, OWN)
    assert [one.site for one in record.counted] == ["North"]
    assert record.result == digest_of(adapter)  # UP-5: metrics change no adapter


# Restarts.


def test_a_restart_in_the_middle_gives_the_same_bytes(tmp_path):
    results = []
    for name, restarts in (("whole", False), ("killed", True)):
        folder = tmp_path / name
        with coordination(folder) as alliance:
            offer = alliance.offer(make_study())
            opened = alliance.open(offer)
            for site in (SOUTH, NORTH) if restarts else (NORTH, SOUTH, EAST):
                send(opened, site)
            if not restarts:
                opened.close()
                results.append(opened.result)
                continue
        with coordination(folder) as alliance:
            opened = alliance.open(offer)
            assert opened.counted == ("North", "South")
            assert (opened.attempt, opened.missing) == (2, ("East",))
            assert send(opened, EAST) is None
            opened.close()
            results.append(opened.result)
    assert results[0] == results[1]


def test_after_a_restart_answers_to_what_was_asked_before_still_count(tmp_path):
    with coordination(tmp_path) as alliance:
        offer = alliance.offer(make_study())
        opened = alliance.open(offer)
        answer, before = SOUTH.honest(opened), digest_of(opened.adapter)
    with coordination(tmp_path) as alliance:
        opened = alliance.open(offer)
        assert digest_of(opened.adapter) == before
        assert send(opened, SOUTH, answer) is None


def test_a_kept_update_that_the_disk_has_changed_stops_the_round(tmp_path):
    with coordination(tmp_path) as alliance:
        offer = alliance.offer(make_study())
        opened = alliance.open(offer)
        send(opened, SOUTH)
        payload = digest_of(SOUTH.update(opened))
        [place] = (tmp_path / "home" / "objects").rglob(payload)
        place.chmod(0o600)
        place.write_bytes(place.read_bytes()[:-1] + b"\x00")
    with coordination(tmp_path) as alliance, pytest.raises(StorageError, match="was changed"):
        alliance.open(offer)


def test_a_late_answer_to_a_round_that_another_process_has_closed_is_told_so(alliance, offer):
    """Two processes of one coordinator: the second closes the round, the first does not know."""
    slow, fast = alliance.open(offer), alliance.open(offer)
    send(fast, NORTH)
    send(fast, SOUTH)
    fast.close()
    before = alliance.parts.store.rounds.last_record(offer.digest)
    assert send(slow, EAST) == "late"
    assert told(alliance, EAST) == ["late"]
    assert alliance.parts.store.rounds.last_record(offer.digest) == before
    send(slow, NORTH)
    send(slow, SOUTH)
    with pytest.raises(ProtocolError, match="round 1 is committed"):
        slow.close()


# AU-2: the entry comes before the effect.


def failing(monkeypatch, event):
    """Have the log fail at one event."""
    append = AuditLog.append

    def full(self, name, /, **facts):
        if name == event:
            raise StorageError("disk is full")
        return append(self, name, **facts)

    monkeypatch.setattr(AuditLog, "append", full)


def test_au_2_an_update_that_cannot_be_logged_is_neither_kept_nor_acknowledged(
    alliance, opened, offer, tmp_path, monkeypatch
):
    with coordination(tmp_path / "undisturbed") as other:
        close_first(other, other.offer(make_study()))
        (record,) = other.parts.store.rounds.records(offer.digest)
        undisturbed = record.adapter
    with monkeypatch.context() as patch:
        failing(patch, "update_counted")
        with pytest.raises(StorageError, match="disk is full"):
            send(opened, SOUTH)
    assert opened.counted == ()
    assert alliance.parts.store.updates.updates(offer.digest, 1) == ()
    assert told(alliance, SOUTH) == []
    for site in (SOUTH, NORTH, EAST):
        assert send(opened, site) is None
    opened.close()
    assert opened.result == undisturbed  # it is not twice in the sum


def test_au_2_a_refusal_that_cannot_be_logged_is_not_told(alliance, opened, offer, monkeypatch):
    with monkeypatch.context() as patch:
        failing(patch, "update_refused")
        with pytest.raises(StorageError):
            send(opened, SOUTH, SOUTH.signed(opened, b"junk"))
    assert told(alliance, SOUTH) == []
    assert alliance.parts.store.updates.refusals(offer.digest, 1) == ()


def test_au_2_a_round_that_cannot_be_logged_is_not_committed(alliance, opened, offer, monkeypatch):
    for site in (NORTH, SOUTH, EAST):
        send(opened, site)
    with monkeypatch.context() as patch:
        failing(patch, "round_committed")
        with pytest.raises(StorageError):
            opened.close()
    assert alliance.parts.store.rounds.last_record(offer.digest) is None
    alliance.open(offer).close()  # from the updates that are kept
    assert alliance.events()[-1] == "round_committed"


def test_au_2_a_round_that_cannot_be_logged_is_not_announced(alliance, offer, monkeypatch):
    with monkeypatch.context() as patch:
        failing(patch, "round_announced")
        with pytest.raises(StorageError):
            alliance.open(offer)  # there is no round whose document could be sent
    assert alliance.open(offer).document


@pytest.mark.parametrize(
    ("where", "name", "event"),
    [(Updates, "add_update", "update_counted"), (Rounds, "commit_record", "round_committed")],
)
def test_au_2_the_entry_is_in_the_log_when_the_store_is_written(
    alliance, opened, monkeypatch, where, name, event
):
    seen, real = [], getattr(where, name)

    def spy(self, *arguments):
        seen.append(alliance.events()[-1])
        return real(self, *arguments)

    monkeypatch.setattr(where, name, spy)
    for site in (NORTH, SOUTH):
        send(opened, site)
    opened.close()
    assert seen
    assert set(seen) == {event}


# CO-2: anybody can compute it again.


def test_co_2_the_result_follows_from_the_recorded_signed_updates_alone(alliance, offer):
    """With nothing but the offer, the membership, the records and what they name by digest."""
    for _ in range(2):
        opened = alliance.open(offer)
        for site in (EAST, NORTH, SOUTH)[: 3 - (opened.round == 2)]:
            send(opened, site)
        opened.receive("South", *LIES["up 1, a NaN"][0](SOUTH, opened))
        opened.close()
    store, objects = alliance.parts.store, alliance.parts.objects
    study, trust = offer.agreed(), begin_trust()
    state = RoundState(round=1, strategy=decode_state(objects.get(offer.state)))
    parent = offer.digest
    for stored in store.rounds.records(offer.digest):
        record = Record.read(stored.document, trust.coordinator)
        coordinator = Coordinator(study, shapes_of(FIRST))
        assert record.parent == parent
        assert record.adapter == digest_of(coordinator.announcement(state))
        documents = {
            digest_of(one.document): one.document
            for one in store.updates.counted(offer.digest, record.round)
        }
        for one in record.counted:
            said = Update.read(documents[one.document], trust.keys(one.site))
            assert (said.site, said.round, said.payload) == (one.site, record.round, one.payload)
            state, receipt = coordinator.receive(state, objects.get(one.payload))
            assert receipt.refusal is None
        state = coordinator.close_round(state)
        assert record.result == digest_of(coordinator.announcement(state))
        parent = digest_of(stored.document)


def test_co_2_a_result_that_does_not_follow_is_noticed(alliance, offer):
    """The computation above, with one value of one update changed, gives another digest."""
    opened = alliance.open(offer)
    for site in (NORTH, SOUTH, EAST):
        send(opened, site)
    opened.close()
    coordinator = Coordinator(offer.agreed(), shapes_of(FIRST))
    state = coordinator.first(FIRST)
    for site in (NORTH, SOUTH, LyingSite("East", (0.75, -0.376))):
        state, _ = coordinator.receive(state, site.update(opened))
    assert digest_of(coordinator.announcement(coordinator.close_round(state))) != opened.result


def test_the_announced_adapter_is_the_first_of_the_offer(opened, offer):
    assert digest_of(opened.adapter) == offer.adapter
    message = decode(opened.adapter, shapes=shapes_of(FIRST))
    assert encode(message) == opened.adapter
    assert all(np.array_equal(message.tensors[name], FIRST[name]) for name in FIRST)
