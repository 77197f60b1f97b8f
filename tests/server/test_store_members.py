"""Invitations work once, memberships follow each other, revoked certificates stay so."""

from dataclasses import replace

import pytest

from huizhen.protocol.errors import ProtocolError
from huizhen.server.store_database import DuplicateError
from huizhen.server.store_members import StoredCertificate, StoredInvitation

TOKEN, KEY, OTHER = "7" * 64, "a" * 64, "b" * 64


@pytest.fixture
def invited(store, making):
    invitation = StoredInvitation(
        token=TOKEN, site="北京 A", made=making.at(), expires=making.at(3600)
    )
    store.members.add_invitation(invitation)
    return store.members


def test_an_invitation_is_used_once(invited, making):
    assert invited.use_invitation(TOKEN, "北京 A", making.at(5), key=KEY) is True
    with pytest.raises(ProtocolError, match="invitation of site '北京 A' is used"):
        invited.use_invitation(TOKEN, "北京 A", making.at(6), key=OTHER)
    [found] = invited.invitations()
    assert (found.used, found.key) == (making.at(5), KEY)


def test_an_answer_that_was_lost_may_be_asked_for_by_the_same_key(invited, making):
    invited.use_invitation(TOKEN, "北京 A", making.at(5), key=KEY)
    assert invited.use_invitation(TOKEN, "北京 A", making.at(9), key=KEY) is False
    assert invited.invitations()[0].used == making.at(5)
    with pytest.raises(ProtocolError, match="expired"):
        invited.use_invitation(TOKEN, "北京 A", making.at(3600), key=KEY)


@pytest.mark.parametrize(
    ("token", "site", "seconds", "reason"),
    [
        ("8" * 64, "北京 A", 5, "no invitation of site '北京 A' has this token"),
        (TOKEN, "B", 5, "no invitation of site 'B' has this token"),
        (TOKEN, "北京 A", 3600, "has expired"),
    ],
)
def test_a_guessed_stolen_or_late_token_is_refused(invited, making, token, site, seconds, reason):
    with pytest.raises(ProtocolError, match=reason):
        invited.use_invitation(token, site, making.at(seconds), key=KEY)
    assert invited.use_invitation(TOKEN, "北京 A", making.at(3599), key=KEY) is True


def test_a_token_is_given_to_one_site(invited, making):
    with pytest.raises(DuplicateError, match="there is an invitation with this token"):
        invited.add_invitation(replace(invited.invitations()[0], site="B"))
    assert len(invited.invitations()) == 1


def test_memberships_are_numbered_without_gaps(store, making):
    members = store.members
    assert members.latest_membership() is None
    with pytest.raises(ProtocolError, match="version 2, the last is 0: expected 1"):
        members.add_membership(2, b"two", making.at())
    assert members.add_membership(1, b"\x00one\xff", making.at()) is True
    with pytest.raises(ProtocolError, match="version 3, the last is 1: expected 2"):
        members.add_membership(3, b"three", making.at())
    assert members.add_membership(2, b"two", making.at(1)) is True
    assert [(one.version, one.document) for one in members.memberships()] == [
        (1, b"\x00one\xff"),
        (2, b"two"),
    ]
    assert [one.version for one in members.memberships(after=1)] == [2]
    assert members.memberships()[-1] == members.latest_membership()
    assert members.latest_membership().received == making.at(1)


def test_a_second_document_of_a_version_is_refused(store, making):
    store.members.add_membership(1, b"one", making.at())
    assert store.members.add_membership(1, b"one", making.at(9)) is False
    with pytest.raises(DuplicateError, match="another membership has version 1"):
        store.members.add_membership(1, b"forged", making.at())
    assert store.members.latest_membership().document == b"one"


def test_a_revoked_certificate_stays_revoked(store, making):
    members = store.members
    mine = StoredCertificate(serial="a1", site="A", issued=making.at(), not_after=making.at(86_400))
    members.add_certificate(mine)
    members.add_certificate(replace(mine, serial="b2", site="B", issued=making.at(1)))
    assert members.certificate("a1") == mine
    assert members.revoke_certificate("a1", making.at(50)) is True
    assert members.revoke_certificate("a1", making.at(60)) is False
    assert members.certificate("a1") == replace(mine, revoked=making.at(50))
    assert members.certificate("b2").revoked is None
    assert [one.serial for one in members.certificates()] == ["a1", "b2"]
    assert [one.serial for one in members.certificates("B")] == ["b2"]


def test_a_serial_number_is_given_once(store, making):
    mine = StoredCertificate(serial="a1", site="A", issued=making.at(), not_after=making.at(1))
    store.members.add_certificate(mine)
    with pytest.raises(DuplicateError, match="serial number 'a1'"):
        store.members.add_certificate(replace(mine, site="B"))
    with pytest.raises(ProtocolError, match="no certificate has serial number 'c3'"):
        store.members.revoke_certificate("c3", making.at())
    assert store.members.certificate("c3") is None
