"""A membership moves forward or not at all; in each test one attack alone is tried."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from huizhen.protocol.documents import public_of, sign
from huizhen.protocol.errors import WireError
from huizhen.protocol.statements import (
    Announcement,
    Board,
    Former,
    Member,
    Membership,
    Update,
    digest_of,
    stamp,
)
from huizhen.protocol.trust import CLOCK_MARGIN, Trust, TrustError, check_change

NOW = datetime(2026, 3, 1, 9, tzinfo=UTC)
LATER = NOW + timedelta(hours=3)
S = "5" * 64


def private(number):
    return Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)


def key(number):
    return public_of(private(number)).raw.hex()


BOARD = [private(number) for number in (1, 2, 3)]
TERMS = Board(keys=(key(1), key(2), key(3)), threshold=2)
COORDINATOR = private(7)


def member(site="North", number=11, **changes):
    values = {
        "site": site, "identity": key(number), "node_key": f"node {number}", "status": "active",
        "since": stamp(NOW), "until": None, "former": (),
    }  # fmt: skip
    return Member(**{**values, **changes})


NORTH, SOUTH = member(), member("South", 12)


def membership(*members, signers=BOARD[:2], **changes):
    """Return a membership's document; the first one unless changed."""
    values = {
        "alliance": "rare", "version": 1, "previous": None, "issued": stamp(NOW), "board": TERMS,
        "coordinator": key(7), "members": members or (NORTH, SOUTH),
    }  # fmt: skip
    return Membership(**{**values, **changes}).signed(*signers)


def begin(data, **changes):
    return Trust.begin(data, **{"alliance": "rare", "board": TERMS, "now": NOW, **changes})


FIRST = membership()


def second(*members, **changes):
    """Return a document that follows the first one unless a test spoils it."""
    values = {"version": 2, "previous": digest_of(FIRST), "issued": stamp(LATER), **changes}
    return membership(*members, **values)


@pytest.fixture
def trust():
    return begin(FIRST)


def refused(trust, data, code, match, now=LATER):
    before = trust.digest
    with pytest.raises(TrustError, match=match) as caught:
        trust.follow(data, now=now)
    assert caught.value.code == code
    assert trust.digest == before


def test_what_follows_is_accepted_and_what_is_held_is_taken_again(trust):
    data = second(NORTH, SOUTH, member("East", 13))
    after = trust.follow(data, now=LATER)
    assert after.member("East").identity == key(13)
    assert after.follow(data, now=LATER) is after
    assert (trust.membership.version, after.membership.version) == (1, 2)  # the old is a value


def test_any_two_of_the_board_may_sign():
    for pair in ((0, 1), (0, 2), (1, 2)):
        assert begin(membership(signers=[BOARD[i] for i in pair])).membership.version == 1


# ID-3: the version, the signatures, the history.


def test_id_3_a_replayed_membership_is_refused(trust):
    after = trust.follow(second(), now=LATER)
    refused(after, FIRST, "old_version", "version 1, 2 is held")


def test_id_3_a_skipped_version_is_refused(trust):
    refused(trust, second(version=3), "gap", "version 3, 2 comes next")


def test_id_3_another_membership_of_the_same_version_is_refused(trust):
    refused(trust, membership(NORTH), "fork", "1 is another than the one held")


def test_id_3_a_membership_of_another_history_is_refused(trust):
    refused(trust, second(previous=digest_of(b"other")), "fork", "follows another history")
    refused(trust, second(previous=None), "fork", "follows another history")


@pytest.mark.parametrize("signers", [BOARD[:1], [BOARD[0], private(9)], [COORDINATOR]])
def test_id_3_a_membership_signed_by_too_few_of_the_board_is_refused(trust, signers):
    refused(trust, second(signers=signers), "not_signed", "must have signed")
    with pytest.raises(TrustError, match="must have signed"):
        begin(membership(signers=signers))


def test_id_3_a_member_s_or_the_coordinator_s_signature_is_none_of_the_board_s(trust):
    refused(trust, second(signers=[BOARD[0], COORDINATOR, private(11)]), "not_signed", "1 of 3")


def test_id_3_a_board_that_makes_itself_is_refused(trust):
    """A new board signed by itself alone: only the old one may hand over."""
    stolen = Board(keys=(key(21), key(22)), threshold=2)
    data = second(board=stolen, signers=[private(21), private(22)])
    refused(trust, data, "not_signed", "0 of 3 known keys")


def test_id_3_a_new_board_must_prove_that_it_holds_its_keys(trust):
    given_over = Board(keys=(key(21), key(22)), threshold=2)
    refused(trust, second(board=given_over), "not_signed", "0 of 2 known keys")
    whole = second(board=given_over, signers=[*BOARD[:2], private(21), private(22)])
    after = trust.follow(whole, now=LATER)
    third = membership(version=3, previous=digest_of(whole), issued=stamp(LATER), board=given_over)
    refused(after, third, "not_signed", "0 of 2 known keys")  # the old board decides no more


def test_id_3_fewer_signatures_than_the_new_board_asks_for_are_refused(trust):
    """Lowering m is for the old m to decide, raising it for the new."""
    more = Board(keys=TERMS.keys, threshold=3)
    refused(trust, second(board=more), "not_signed", "signed by 2 of 3 known keys, 3")
    trust.follow(second(board=more, signers=BOARD), now=LATER)
    fewer = Board(keys=TERMS.keys, threshold=1)
    refused(trust, second(board=fewer, signers=BOARD[:1]), "not_signed", "2 must")


def test_a_membership_of_another_alliance_is_refused(trust):
    refused(trust, second(alliance="common"), "wrong_alliance", "of 'common', expected 'rare'")
    with pytest.raises(TrustError, match="of 'rare', expected 'common'") as caught:
        begin(FIRST, alliance="common")
    assert caught.value.code == "wrong_alliance"


@pytest.mark.parametrize(
    "pinned",
    [
        Board(keys=TERMS.keys, threshold=1),
        Board(keys=TERMS.keys[:2], threshold=2),
        Board(keys=(*TERMS.keys[:2], key(4)), threshold=2),
    ],
)
def test_an_invitation_that_pins_another_board_begins_nothing(pinned):
    with pytest.raises(TrustError, match="another board than was pinned") as caught:
        begin(FIRST, board=pinned)
    assert caught.value.code == "fork"


def test_the_order_of_the_pinned_keys_is_nobody_s_business():
    assert begin(FIRST, board=Board(keys=TERMS.keys[::-1], threshold=2)).digest == digest_of(FIRST)


def test_a_membership_from_the_future_is_refused(trust):
    data = second(issued=stamp(LATER + CLOCK_MARGIN + timedelta(seconds=1)))
    refused(trust, data, "from_the_future", "check the clock")
    trust.follow(second(issued=stamp(LATER + CLOCK_MARGIN)), now=LATER)


def test_a_membership_dated_before_the_one_it_follows_is_refused(trust):
    early = second(issued=stamp(NOW - timedelta(seconds=1)))
    refused(trust, early, "fork", "dated before")
    trust.follow(second(issued=stamp(NOW)), now=LATER)


# What a membership is in itself.


def test_a_board_that_names_a_key_twice_is_refused():
    """One person would count for two."""
    doubled = Board(keys=(key(1), key(2), key(2)), threshold=2)
    with pytest.raises(TrustError, match="names a key twice") as caught:
        begin(membership(board=doubled), board=doubled)
    assert caught.value.code == "malformed"


def test_a_board_that_can_never_sign_is_refused(trust):
    """The next membership could not be made."""
    endless = Board(keys=TERMS.keys, threshold=4)
    refused(trust, second(board=endless, signers=BOARD), "malformed", "3 keys, 4 cannot sign")


@pytest.mark.parametrize(
    ("members", "what"),
    [
        ((NORTH, member("North", 13)), "name"),
        ((NORTH, member("South", 11, node_key="another")), "key"),
        ((NORTH, member("South", 13, node_key="node 11")), "node key"),
        ((NORTH, member("South", 12, former=(Former(identity=key(11), until=stamp(NOW)),))), "key"),
        ((NORTH, member("South", 12, former=(Former(identity=key(12), until=stamp(NOW)),))), "key"),
    ],
    ids=["name", "identity", "node", "former of another", "former of its own"],
)
def test_id_8_two_members_with_one_name_or_key_are_refused(members, what):
    with pytest.raises(TrustError, match=f"two members have the same {what}$") as caught:
        begin(membership(*members))
    assert caught.value.code == "malformed"


@pytest.mark.parametrize(
    "changes", [{"status": "revoked"}, {"until": stamp(NOW)}], ids=["no time", "no status"]
)
def test_half_a_revocation_is_refused(changes):
    with pytest.raises(TrustError, match="revoked without a time"):
        begin(membership(member(**changes)))


# What may change between two.


def test_a_swapped_member_key_is_refused(trust):
    refused(trust, second(member(number=13), SOUTH), "fork", "swaps the key of site 'North'")


def test_a_swapped_key_with_a_wrong_former_key_is_refused(trust):
    forged = member(number=13, former=(Former(identity=key(14), until=stamp(LATER)),))
    refused(trust, second(forged, SOUTH), "fork", "swaps the key")


def test_a_former_key_without_a_change_is_refused(trust):
    forged = member(former=(Former(identity=key(14), until=stamp(LATER)),))
    refused(trust, second(forged, SOUTH), "fork", "swaps the key")


def test_a_forgotten_member_is_refused(trust):
    refused(trust, second(NORTH), "fork", "forgets site 'South': revoke it")


REVOKED = member(status="revoked", until=stamp(LATER))


def test_id_1_a_revived_member_is_refused(trust):
    after = trust.follow(data := second(REVOKED, SOUTH), now=LATER)
    for forged in (
        NORTH,
        member(number=13, former=(Former(identity=key(11), until=stamp(LATER)),)),
        member(status="revoked", until=stamp(LATER + timedelta(days=1))),
    ):
        third = membership(forged, SOUTH, version=3, previous=digest_of(data), issued=stamp(LATER))
        refused(after, third, "fork", "which is revoked")


@pytest.mark.parametrize("change", ["since", "former"])
def test_a_rewritten_history_of_a_member_is_refused(change):
    once = Former(identity=key(14), until=stamp(NOW))
    held = member(former=(once,))
    first = membership(held, SOUTH)
    forged = {
        "since": held.model_copy(update={"since": stamp(NOW - timedelta(days=9))}),
        "former": held.model_copy(
            update={"former": (Former(identity=key(14), until=stamp(LATER)),)}
        ),
    }[change]
    data = membership(forged, SOUTH, version=2, previous=digest_of(first), issued=stamp(LATER))
    refused(begin(first), data, "fork", "rewrites the history of site 'North'")


# ID-2 and ID-9: which keys count, and when.


def test_id_2_a_stranger_a_revoked_member_and_another_s_key_sign_nothing(trust):
    after = trust.follow(second(REVOKED, SOUTH), now=LATER)
    with pytest.raises(TrustError, match="not in the alliance") as stranger:
        after.keys("West")
    with pytest.raises(TrustError, match="'North' is revoked since") as revoked:
        after.keys("North")
    assert (stranger.value.code, revoked.value.code) == ("not_a_member", "revoked")
    assert [one.raw.hex() for one in after.keys("South")] == [key(12)]
    assert [one.raw.hex() for one in after.coordinator] == [key(7)]
    assert [one.raw.hex() for one in after.board] == list(TERMS.keys)


def test_id_9_an_old_key_counts_for_what_was_signed_before_its_rotation_alone():
    first, second_, third = (NOW + timedelta(hours=n) for n in (1, 2, 3))
    # Listed in the wrong order: what counts is the time.
    former = (Former(identity=key(14), until=stamp(second_)),
              Former(identity=key(13), until=stamp(first)))  # fmt: skip
    trust = begin(membership(member(former=former), SOUTH))

    def at(time):
        return [one.raw.hex() for one in trust.keys_at("North", time)]

    second_long = timedelta(seconds=1)
    assert at(NOW) == at(first - second_long) == [key(13)]
    assert at(first) == at(second_ - second_long) == [key(14)]
    assert at(second_) == at(third) == [key(11)]
    assert [one.raw.hex() for one in trust.keys("North")] == [key(11)]  # now, the newest alone
    with pytest.raises(TrustError, match="was not in the alliance then"):
        trust.keys_at("North", NOW - second_long)
    with pytest.raises(TrustError, match="was not in the alliance then"):
        trust.keys_at("West", NOW)


def test_id_2_a_revoked_key_counts_for_what_was_signed_before_alone(trust):
    after = trust.follow(second(REVOKED, SOUTH), now=LATER)
    assert [k.raw.hex() for k in after.keys_at("North", LATER - timedelta(seconds=1))] == [key(11)]
    with pytest.raises(TrustError, match="was revoked at") as caught:
        after.keys_at("North", LATER)
    assert caught.value.code == "revoked"


# Whatever arrives.


@pytest.mark.parametrize(
    "other",
    [
        sign("announcement", {"version": 2}, *BOARD),
        Update(
            alliance="rare", study=S, round=1, attempt=1, site="North", announcement=S, payload=S,
            ledger=None,
        ).signed(*BOARD),
    ],
    ids=["kind", "statement"],
)  # fmt: skip
def test_a_document_of_another_kind_is_no_membership(trust, other):
    refused(trust, other, "not_signed", "expected")


def test_a_membership_with_a_key_more_is_refused(trust):
    body = Membership.read(second(), trust.board, 2).model_dump(mode="json", by_alias=True)
    with pytest.raises(TrustError, match="wrong 'admin'"):
        trust.follow(sign("membership", body | {"admin": key(9)}, *BOARD), now=LATER)


@given(st.binary(max_size=200))
def test_no_bytes_move_a_membership(data):
    trust = begin(FIRST)
    with pytest.raises((TrustError, WireError)):
        trust.follow(data, now=LATER)


@given(st.integers(0, len(FIRST) - 1), st.integers(0, 7))
def test_no_flipped_bit_of_a_membership_is_accepted(place, bit):
    data = bytearray(FIRST)
    data[place] ^= 1 << bit
    with pytest.raises((TrustError, WireError)):
        begin(bytes(data))


histories = st.lists(
    st.tuples(st.sampled_from(["join", "rotate", "revoke"]), st.integers(0, 5)), max_size=12
)


@settings(max_examples=40)
@given(histories)
def test_any_honest_history_is_followed_and_none_of_its_documents_twice(steps):
    """Joining, rotating and revoking in any order; each older document is refused afterwards."""
    trust, documents, fresh = begin(FIRST), [FIRST], iter(range(30, 100))
    for number, (what, which) in enumerate(steps, 2):
        members = list(trust.membership.members)
        old = members[which % len(members)]
        if what == "join":
            members.append(member(f"site {number}", next(fresh)))
        elif old.status == "revoked":
            continue
        elif what == "rotate":
            used = (*old.former, Former(identity=old.identity, until=stamp(LATER)))
            changed = {"identity": key(next(fresh)), "former": used}
            members[which % len(members)] = old.model_copy(update=changed)
        else:
            changed = {"status": "revoked", "until": stamp(LATER)}
            members[which % len(members)] = old.model_copy(update=changed)
        version = trust.membership.version + 1
        data = membership(*members, version=version, previous=trust.digest, issued=stamp(LATER))
        trust = trust.follow(data, now=LATER)
        documents.append(data)
    for data in documents[:-1]:
        with pytest.raises(TrustError):
            trust.follow(data, now=LATER)


def test_what_no_site_would_follow_is_found_before_anybody_signs(trust):
    """What ``follow`` refuses of a signed document, ``check_change`` refuses of a draft."""

    def draft(*members):
        return Membership(
            alliance="rare", version=2, previous=trust.digest, issued=stamp(LATER), board=TERMS,
            coordinator=key(7), members=members,
        )  # fmt: skip

    check_change(trust.membership, draft(NORTH, SOUTH, member("East", 13)))
    check_change(None, draft(NORTH))
    for members, match in (
        ((NORTH, SOUTH, member("East", 13, node_key="node 11")), "same node key"),
        ((NORTH,), "forgets site"),
        ((member(number=13), SOUTH), "swaps the key"),
    ):
        with pytest.raises(TrustError, match=match):
            check_change(trust.membership, draft(*members))
    crowded = [Former(identity=key(n), until=stamp(NOW)) for n in range(30, 131)]
    with pytest.raises(WireError, match="former"):
        check_change(None, draft(NORTH.model_copy(update={"former": tuple(crowded)})))
    early = draft(NORTH, SOUTH).model_copy(update={"issued": stamp(NOW - timedelta(seconds=1))})
    with pytest.raises(TrustError, match="dated before"):
        check_change(trust.membership, early)


def test_an_announcement_is_of_the_coordinator_that_the_membership_names(trust):
    """ID-2: whoever else signs it, a member or the board, is not the coordinator."""
    asked = Announcement(
        alliance="rare", study=S, round=1, attempt=1, parent=S, adapter=S, membership=1,
        sites=("North",), issued=stamp(NOW), deadline=stamp(LATER),
    )  # fmt: skip
    assert Announcement.read(asked.signed(COORDINATOR), trust.coordinator) == asked
    for forger in (private(11), BOARD[0], private(99)):
        with pytest.raises(Exception, match="must have signed"):
            Announcement.read(asked.signed(forger), trust.coordinator)
