"""Whose signature counts on a checkpoint, and who has to give one."""

from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from huizhen.protocol.audit_checkpoints import (
    COORDINATOR,
    check_head,
    claimed_checkpoint,
    claimed_membership,
    key_ids,
    keys_of_members,
    only_key,
    read_checkpoint,
    same_statement,
    signed_by,
    with_signatures,
    witnesses_of,
)
from huizhen.protocol.audit_tree import Tree
from huizhen.protocol.documents import countersign, public_of, sign
from huizhen.protocol.errors import AuditError, ConfigError, ProtocolError, WireError
from huizhen.protocol.merkle import leaf_hash
from huizhen.protocol.statements import (
    Board,
    Checkpoint,
    Former,
    Head,
    Member,
    Membership,
)

BOARD, COORD, NORTH, SOUTH, OLD, STRANGER = (
    Ed25519PrivateKey.from_private_bytes(bytes([n] * 32)) for n in range(1, 7)
)
EARLY, LATER = datetime(2026, 2, 1, tzinfo=UTC), datetime(2026, 8, 1, tzinfo=UTC)


def hexed(key):
    return public_of(key).raw.hex()


def member(site, key, **more):
    values = {"status": "active", "since": "2026-01-01T00:00:00Z", "until": None, "former": ()}
    return Member(site=site, identity=hexed(key), node_key=site, **{**values, **more})


MEMBERS = (
    member("North", NORTH, former=(Former(identity=hexed(OLD), until="2026-06-01T00:00:00Z"),)),
    member("South", SOUTH, status="revoked", until="2026-07-01T00:00:00Z"),
)


def membership(*members):
    return Membership(
        alliance="rare",
        version=1,
        previous=None,
        issued="2026-01-01T00:00:00Z",
        board=Board(keys=(hexed(BOARD),), threshold=1),
        coordinator=hexed(COORD),
        members=members,
    )


def checkpoint(*keys, log="North", issued="2026-08-01T00:00:00Z"):
    said = Checkpoint(alliance="rare", log=log, size=3, root="a" * 64, issued=issued)
    return said.signed(*keys)


@pytest.mark.parametrize(
    ("log", "sites", "expected"),
    [
        ("B", "ABCD", ("coordinator", "C", "D")),
        ("C", "ABCD", ("coordinator", "D", "A")),
        ("D", "DCBA", ("coordinator", "A", "B")),
        ("A", "AB", ("coordinator", "B")),
        ("A", "A", ("coordinator",)),
        ("A", "BC", ("coordinator", "B", "C")),
        ("A", "ABBCC", ("coordinator", "B", "C")),
    ],
)
def test_a_site_s_log_is_witnessed_by_the_coordinator_and_the_next_two(log, sites, expected):
    assert witnesses_of(log, list(sites)) == expected


def test_nobody_witnesses_their_own_log():
    sites = [f"site {n}" for n in range(9)]
    for log in [*sites, COORDINATOR]:
        for count in range(10):
            assert log not in witnesses_of(log, sites[:count])
    assert witnesses_of(COORDINATOR, sites) == ("site 0", "site 1")
    assert COORDINATOR not in witnesses_of(COORDINATOR, [*sites, COORDINATOR])


def test_every_site_is_asked_as_often_as_any_other():
    sites = [f"site {n}" for n in range(9)]
    asked = [name for log in sites for name in witnesses_of(log, sites)[1:]]
    assert sorted(asked) == sorted(sites * 2)


def test_a_rotated_key_counts_only_before_and_a_revoked_site_not_after():
    keys = keys_of_members(membership(*MEMBERS))
    assert keys(EARLY) == {
        "coordinator": public_of(COORD),
        "North": public_of(OLD),
        "South": public_of(SOUTH),
    }
    assert keys(LATER) == {"coordinator": public_of(COORD), "North": public_of(NORTH)}
    assert keys(datetime(2026, 6, 1, tzinfo=UTC))["North"] == public_of(NORTH)


def test_no_site_takes_the_coordinator_s_name():
    with pytest.raises(ProtocolError, match="a member is named 'coordinator'"):
        keys_of_members(membership(member("coordinator", NORTH)))


def test_signers_are_named_and_strangers_are_not():
    keys = keys_of_members(membership(*MEMBERS))
    said, names = read_checkpoint(checkpoint(NORTH, COORD, STRANGER, SOUTH), keys)
    assert (said.size, names) == (3, ("North", "coordinator"))
    early = checkpoint(OLD, SOUTH, issued="2026-02-01T00:00:00Z")
    assert read_checkpoint(early, keys)[1] == ("North", "South")


def test_a_checkpoint_without_its_owner_s_signature_is_refused():
    keys = keys_of_members(membership(*MEMBERS))
    for other in (COORD, OLD):
        with pytest.raises(ProtocolError, match="signed by"):
            read_checkpoint(checkpoint(other), keys)
    with pytest.raises(ProtocolError, match="not signed by its owner"):
        read_checkpoint(checkpoint(COORD, OLD), keys)
    with pytest.raises(ConfigError, match="no key of 'East'"):
        read_checkpoint(checkpoint(NORTH, log="East"), keys)
    with pytest.raises(ConfigError, match="no key of 'South' at 2026-08"):
        read_checkpoint(checkpoint(SOUTH, log="South"), keys)
    with pytest.raises(ProtocolError, match="is signed by 0 of 1"):
        read_checkpoint(checkpoint(STRANGER), only_key("North", public_of(NORTH)))


def test_signatures_are_taken_over_by_key_and_others_are_left():
    own = checkpoint(NORTH)
    first, second = countersign(own, COORD), countersign(own, SOUTH, STRANGER)
    both = with_signatures(first, second, [public_of(SOUTH).id])
    assert both == checkpoint(NORTH, COORD, SOUTH)
    assert with_signatures(both, first, [public_of(COORD).id]) == both
    assert key_ids(both) == tuple(sorted(public_of(k).id for k in (NORTH, COORD, SOUTH)))
    assert signed_by(both, [public_of(NORTH).id]) == own
    other = checkpoint(NORTH, issued="2026-08-02T00:00:00Z")
    assert same_statement(own, first)
    assert not same_statement(own, other)
    with pytest.raises(WireError, match="of another document"):
        with_signatures(own, other, [])


def test_a_claim_is_read_whoever_signed_it():
    assert claimed_checkpoint(checkpoint(STRANGER)).log == "North"
    with pytest.raises(WireError):
        claimed_checkpoint(sign("checkpoint", {"size": 3}, NORTH))


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b"1", checkpoint(NORTH) + b" "])
def test_bytes_that_are_no_document_are_refused(data):
    for read in (claimed_checkpoint, claimed_membership, key_ids):
        with pytest.raises(WireError):
            read(data)


def test_a_membership_is_taken_from_a_file_only_as_its_board_signed_it():
    said = membership(*MEMBERS)
    assert claimed_membership(said.signed(BOARD)) == said
    with pytest.raises(ProtocolError, match="signed by 0 of 1"):
        claimed_membership(said.signed(STRANGER))


def test_a_head_that_the_log_never_had_is_an_older_copy_or_another_log():
    tree = Tree()
    for n in range(5):
        tree.append(leaf_hash(b"%d" % n))
    check_head(tree, Head(size=3, root=tree.root(3).hex()))
    with pytest.raises(AuditError, match="saw 6 entries, the audit log ends with 5: this is an"):
        check_head(tree, Head(size=6, root="a" * 64))
    with pytest.raises(AuditError, match="this is another log"):
        check_head(tree, Head(size=3, root=tree.root(4).hex()))
