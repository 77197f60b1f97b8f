"""Who gets in, who stays in and who does not: the registry on a real store, with a real log."""

import dataclasses
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from huizhen.protocol.documents import countersign, public_of
from huizhen.protocol.errors import GovernanceError, ProtocolError, StorageError
from huizhen.protocol.invitation import Invitation
from huizhen.protocol.statements import (
    Board,
    Enrolment,
    Renewal,
    Rotation,
    digest_of,
    moment,
    stamp,
)
from huizhen.protocol.trust import Trust, TrustError
from huizhen.server.authority import Authority, site_of
from huizhen.server.home import PublicTerms
from huizhen.server.registry import (
    MAX_CERTIFICATES,
    MAX_DRAFTS,
    Keys,
    Registry,
    WaitingForBoardError,
)
from huizhen.server.store import Store
from huizhen.storage.audit import AuditLog

NOW = datetime(2026, 3, 1, 9, tzinfo=UTC)
PUBLIC = PublicTerms(names=("x",), fleet="x:1", service="x:2", door="x:3")


def private(number):
    return Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)


def hexed(key):
    return public_of(key).raw.hex()


BOARD = [private(number) for number in (1, 2, 3)]


class Clock:
    def __init__(self):
        self.now = NOW

    def __call__(self):
        return self.now


class Hospital:
    """A site's keys, and what it asks for."""

    def __init__(self, site, number, clock):
        self.site, self.clock = site, clock
        self.identity = private(number)
        self.node = ec.derive_private_key(number, ec.SECP384R1())
        self.tls = ec.derive_private_key(number, ec.SECP256R1())

    @property
    def node_pem(self):
        public = self.node.public_key()
        return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()

    @property
    def request(self):
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes

        made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        return made.sign(self.tls, hashes.SHA256()).public_bytes(Encoding.PEM).decode()

    def enrolment(self, token, *, signer=None, **changes):
        values = {
            "alliance": "rare", "site": self.site, "identity": hexed(self.identity),
            "node_key": self.node_pem, "request": self.request,
            "token": digest_of(token.encode()), "issued": stamp(self.clock()), **changes,
        }  # fmt: skip
        return Enrolment(**values).signed(signer or self.identity)

    def renewal(self, *, signer=None, **changes):
        values = {
            "alliance": "rare", "site": self.site, "request": self.request,
            "issued": stamp(self.clock()), **changes,
        }  # fmt: skip
        return Renewal(**values).signed(signer or self.identity)

    def rotation(self, new, *signers, **changes):
        values = {
            "alliance": "rare", "site": self.site, "old": hexed(self.identity), "new": hexed(new),
            "issued": stamp(self.clock()), **changes,
        }  # fmt: skip
        return Rotation(**values).signed(*(signers or (self.identity, new)))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def parts(tmp_path, clock):
    with (
        Store.open(f"sqlite:///{tmp_path}/home/store.sqlite") as store,
        AuditLog.create(
            tmp_path / "home" / "audit.sqlite", alliance="rare", log="coordinator", clock=clock
        ) as audit,
    ):
        yield store, audit


@pytest.fixture
def make(parts, clock, tmp_path):
    """Return a registry; ``here`` are the board's keys that lie on this machine."""
    store, audit = parts
    signer = ec.derive_private_key(99, ec.SECP384R1())

    def make(here=BOARD[:1], threshold=1, board=BOARD):
        keys = Keys(
            identity=private(7), board=here, authority=Authority.make("rare", signer, clock())
        )
        terms = Board(keys=tuple(map(hexed, board)), threshold=threshold)
        drafts = tmp_path / "board"
        drafts.mkdir(exist_ok=True)
        return Registry(
            store, audit, keys, alliance="rare", board=terms, drafts=drafts, clock=clock
        )

    return make


@pytest.fixture
def registry(make):
    made = make()
    made.found()
    return made


@pytest.fixture
def north(clock):
    return Hospital("North", 11, clock)


@pytest.fixture
def south(clock):
    return Hospital("South", 12, clock)


def invite(registry, site="North", days=7):
    return registry.invite(site, PUBLIC, days=days).token


@pytest.fixture
def joined(registry, north):
    registry.enrol(north.enrolment(token := invite(registry)), token)
    return registry


def seen(parts):
    """All that a replay or a refused request may not change."""
    store, audit = parts
    return (
        audit.head().size,
        [(one.version, one.document) for one in store.members.memberships()],
        store.members.certificates(),
    )


def events(parts):
    return [one.event for one in parts[1].entries()]


def test_an_invited_site_gets_in_with_its_keys(registry, north, parts):
    token = invite(registry)
    certificate, memberships = registry.enrol(north.enrolment(token), token)
    member = registry.trust().member("North")
    assert (member.identity, member.node_key) == (hexed(north.identity), north.node_pem)
    assert site_of(certificate.encode()) == "North"
    trust = Trust.begin(
        memberships[0], alliance="rare", board=registry.trust().membership.board, now=NOW
    )
    assert trust.follow(memberships[1], now=NOW).digest == registry.trust().digest
    assert events(parts)[-3:] == ["site_enrolled", "membership_published", "certificate_issued"]


def test_the_token_is_kept_by_its_digest_alone(registry, parts):
    token = invite(registry)
    [kept] = parts[0].members.invitations()
    assert kept.token == digest_of(token.encode())
    assert token not in repr(parts[1].entries())


def test_an_invitation_pins_alliance_board_and_authority(registry):
    made = registry.invite("North", PUBLIC, days=7)
    assert Invitation.parse(made.to_bytes()) == made
    assert (made.pins.alliance, made.pins.board.threshold) == ("rare", 1)
    assert "BEGIN CERTIFICATE" in made.pins.authority
    assert moment(made.expires) == NOW + timedelta(days=7)


def test_a_member_is_not_invited_again(joined):
    with pytest.raises(GovernanceError, match="is or was a member"):
        invite(joined)
    joined.revoke("North")
    with pytest.raises(GovernanceError, match="is or was a member"):
        invite(joined)


# One-time tokens.


def refused(registry, parts, match, ask):
    before = seen(parts)
    with pytest.raises(ProtocolError, match=match):
        ask()
    assert seen(parts) == before
    registry.trust()  # and the alliance goes on


def test_a_guessed_token_is_refused(registry, north, parts):
    invite(registry)
    refused(
        registry, parts, "has this token",
        lambda: registry.enrol(north.enrolment("guess"), "guess"),
    )  # fmt: skip


def test_without_a_token_a_stranger_has_no_membership_built(registry, north, parts, monkeypatch):
    built = []
    monkeypatch.setattr(registry, "_made", lambda *facts: built.append(facts))
    for node_key in (north.node_pem, "none"):
        ask = north.enrolment("guess", node_key=node_key)
        refused(registry, parts, "has this token", lambda ask=ask: registry.enrol(ask, "guess"))
    assert built == []


def test_a_token_for_another_site_is_refused(registry, south, parts):
    token = invite(registry, "North")
    ask = south.enrolment(token)
    refused(registry, parts, "'South' has this token", lambda: registry.enrol(ask, token))


def test_a_token_after_its_time_is_refused(registry, north, parts, clock):
    token = invite(registry)
    clock.now += timedelta(days=7)
    ask = north.enrolment(token)
    refused(registry, parts, "has expired", lambda: registry.enrol(ask, token))


def test_a_token_that_was_used_is_refused_to_another_key(joined, parts, clock):
    token = invite(joined, "South")
    joined.enrol(Hospital("South", 12, clock).enrolment(token), token)
    thief = Hospital("South", 13, clock)
    refused(joined, parts, "is used", lambda: joined.enrol(thief.enrolment(token), token))


def test_an_enrolment_that_was_signed_for_another_token_is_refused(registry, north, parts):
    old, new = invite(registry), invite(registry)
    refused(registry, parts, "for another token", lambda: registry.enrol(north.enrolment(old), new))


# Whose keys.


def test_an_enrolment_that_its_own_key_has_not_signed_is_refused(registry, north, parts):
    token = invite(registry)
    forged = north.enrolment(token, signer=private(66))
    refused(registry, parts, "0 of 1 known keys", lambda: registry.enrol(forged, token))


def test_id_8_a_member_s_node_key_is_nobody_else_s(joined, south, north, parts):
    """Its membership would be one that nobody follows, and the alliance would stand still."""
    token = invite(joined, "South")
    stolen = south.enrolment(token, node_key=north.node_pem)
    refused(joined, parts, "same node key", lambda: joined.enrol(stolen, token))
    joined.enrol(south.enrolment(token), token)  # the invitation is not used up
    assert joined.trust().member("South").node_key == south.node_pem


def test_id_8_a_member_s_identity_is_nobody_else_s(joined, parts, clock):
    twin = Hospital("South", 12, clock)
    twin.identity = private(11)
    token = invite(joined, "South")
    refused(joined, parts, "same key", lambda: joined.enrol(twin.enrolment(token), token))


def test_a_member_s_former_key_is_nobody_s_any_more(joined, north, parts, clock):
    joined.rotate(north.rotation(private(14)))
    reviver = Hospital("South", 12, clock)
    reviver.identity = private(11)
    token = invite(joined, "South")
    refused(joined, parts, "same key", lambda: joined.enrol(reviver.enrolment(token), token))


def test_other_keys_for_a_member_are_refused(joined, parts, clock, north):
    """The answer to its enrolment was lost, and its node key has changed meanwhile."""
    token = invite_again(joined, parts)
    other = north.enrolment(token, node_key=Hospital("x", 40, clock).node_pem)
    refused(joined, parts, "member with other keys", lambda: joined.enrol(other, token))


def invite_again(registry, parts):
    """Put an unused invitation of a member into the store: ``invite`` itself makes none."""
    from huizhen.server.store_members import StoredInvitation

    token = "t" * 43
    parts[0].members.add_invitation(
        StoredInvitation(
            token=digest_of(token.encode()), site="North", made=NOW, expires=NOW + timedelta(days=1)
        )
    )
    return token


@pytest.mark.parametrize(
    ("node_key", "match"),
    [
        ("", "not a public key in PEM"),
        ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "not a public key"),
        ("P-256", "not of P-384"),
        ("Ed25519", "not of P-384"),
        ("windows", "not in its one encoding"),
        ("trailing", "not in its one encoding"),
        ("private", "not a public key in PEM"),
    ],
)
def test_a_node_key_in_another_form_is_refused(registry, north, parts, node_key, match):
    """Two spellings of one key would be two nodes."""
    from cryptography.hazmat.primitives.serialization import NoEncryption, PrivateFormat

    def public(key):
        return (
            key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        )

    text = {
        "P-256": public(north.tls),
        "Ed25519": public(north.identity),
        "windows": north.node_pem.replace("\n", "\r\n"),
        "trailing": north.node_pem + "\n",
        "private": north.node.private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        ).decode(),
    }.get(node_key, node_key)
    token = invite(registry)
    ask = north.enrolment(token, node_key=text)
    refused(registry, parts, match, lambda: registry.enrol(ask, token))


def test_a_request_that_is_none_gets_no_certificate(registry, north, parts):
    token = invite(registry)
    with pytest.raises(ProtocolError, match="certificate request"):
        registry.enrol(north.enrolment(token, request="none"), token)
    assert parts[0].members.certificates() == ()
    registry.enrol(north.enrolment(token), token)  # the same keys may ask again


# Clocks, alliances, replays.


@pytest.mark.parametrize("seconds", [-301, 301])
@pytest.mark.parametrize("kind", ["enrolment", "renewal", "rotation"])
def test_a_document_of_another_time_is_refused(joined, north, south, parts, kind, seconds):
    issued = stamp(NOW + timedelta(seconds=seconds))
    token = invite(joined, "South")
    ask = {
        "enrolment": lambda: joined.enrol(south.enrolment(token, issued=issued), token),
        "renewal": lambda: joined.renew(north.renewal(issued=issued)),
        "rotation": lambda: joined.rotate(north.rotation(private(14), issued=issued)),
    }[kind]
    refused(joined, parts, f"{seconds} s from this clock: set the site's clock", ask)


@pytest.mark.parametrize("kind", ["enrolment", "renewal", "rotation"])
def test_a_document_for_another_alliance_is_refused(joined, north, south, parts, kind):
    token = invite(joined, "South")
    ask = {
        "enrolment": lambda: joined.enrol(south.enrolment(token, alliance="common"), token),
        "renewal": lambda: joined.renew(north.renewal(alliance="common")),
        "rotation": lambda: joined.rotate(north.rotation(private(14), alliance="common")),
    }[kind]
    refused(joined, parts, "of alliance 'common', not 'rare'", ask)


def test_id_7_a_replayed_enrolment_gives_what_it_gave_and_writes_nothing(
    registry, north, parts, clock
):
    token = invite(registry)
    ask = north.enrolment(token)
    first = registry.enrol(ask, token)
    before = seen(parts)
    clock.now += timedelta(minutes=4)
    assert registry.enrol(ask, token) == first
    assert seen(parts) == before
    clock.now += timedelta(minutes=2)
    refused(registry, parts, "set the site's clock", lambda: registry.enrol(ask, token))


def test_id_7_a_replayed_renewal_gives_what_it_gave_and_writes_nothing(joined, north, parts, clock):
    first = joined.renew(ask := north.renewal())
    before = seen(parts)
    assert joined.renew(ask) == first
    assert seen(parts) == before
    clock.now += timedelta(days=3)
    assert joined.renew(north.renewal()) != first


def test_id_7_a_replayed_rotation_changes_nothing(joined, north, parts):
    joined.rotate(ask := north.rotation(private(14)))
    before = seen(parts)
    joined.rotate(ask)
    assert seen(parts) == before
    north.identity = private(14)
    joined.rotate(north.rotation(private(15)))
    refused(joined, parts, "another key than the rotation replaces", lambda: joined.rotate(ask))


# Renewal.


def test_a_renewal_is_for_the_member_who_signed_it(joined, north, south, parts):
    token = invite(joined, "South")
    joined.enrol(south.enrolment(token), token)
    assert site_of(joined.renew(north.renewal()).encode()) == "North"
    forged = north.renewal(signer=south.identity)
    refused(joined, parts, "0 of 1 known keys", lambda: joined.renew(forged))


def test_id_2_a_stranger_or_a_revoked_member_gets_no_certificate(joined, north, south, parts):
    refused(joined, parts, "'South' is not in the alliance", lambda: joined.renew(south.renewal()))
    joined.revoke("North")
    refused(joined, parts, "'North' is revoked", lambda: joined.renew(north.renewal()))


def test_a_member_that_asks_again_within_the_hour_gets_the_same_certificate(
    joined, north, parts, clock
):
    before = seen(parts)
    certificates = set()
    for _ in range(5):
        clock.now += timedelta(minutes=10)
        certificates.add(joined.renew(north.renewal()))
    assert len(certificates) == 1
    assert seen(parts) == before
    clock.now += timedelta(minutes=10)
    assert joined.renew(north.renewal()) not in certificates


def test_a_member_with_another_tls_key_gets_another_certificate_but_not_without_end(
    joined, north, south, parts, clock
):
    first = joined.renew(north.renewal())
    for number in range(1, MAX_CERTIFICATES):
        north.tls = ec.derive_private_key(1000 + number, ec.SECP256R1())
        assert joined.renew(north.renewal()) != first
    last = joined.renew(north.renewal())
    north.tls = ec.derive_private_key(2000, ec.SECP256R1())
    refused(joined, parts, "10 keys within an hour", lambda: joined.renew(north.renewal()))
    north.tls = ec.derive_private_key(1000 + number, ec.SECP256R1())
    assert joined.renew(north.renewal()) == last
    joined.enrol(south.enrolment(token := invite(joined, "South")), token)
    clock.now += timedelta(hours=1)
    assert joined.renew(north.renewal()) != last


# Rotation. ID-9.


def test_id_9_the_new_key_is_in_force_and_the_old_one_is_not(joined, north, parts, clock):
    clock.now += timedelta(hours=1)
    joined.rotate(north.rotation(private(14)))
    trust = joined.trust()
    assert [key.raw.hex() for key in trust.keys("North")] == [hexed(private(14))]
    before = trust.keys_at("North", clock() - timedelta(seconds=1))
    assert [key.raw.hex() for key in before] == [hexed(private(11))]
    refused(joined, parts, "0 of 1 known keys", lambda: joined.renew(north.renewal()))
    north.identity = private(14)
    assert site_of(joined.renew(north.renewal()).encode()) == "North"
    assert "key_rotated" in events(parts)


def test_id_9_a_rotation_needs_both_keys(joined, north, parts):
    for signer, match in ((private(11), "1 of 2"), (private(14), "1 of 2"), (private(66), "0 of")):
        forged = north.rotation(private(14), signer)
        refused(joined, parts, match, lambda forged=forged: joined.rotate(forged))


def test_id_9_a_rotation_of_another_member_s_key_is_refused(joined, north, south, parts):
    """South signs with its own two keys, and says to be North."""
    token = invite(joined, "South")
    joined.enrol(south.enrolment(token), token)
    south.site = "North"
    ask = south.rotation(private(14))
    refused(joined, parts, "another key than the rotation replaces", lambda: joined.rotate(ask))


def test_id_9_a_key_that_was_somebody_s_comes_back_to_nobody(joined, north, south, parts):
    """A membership with it would be one that nobody follows, and the alliance would stand still."""
    token = invite(joined, "South")
    joined.enrol(south.enrolment(token), token)
    joined.rotate(north.rotation(private(14)))
    north.identity = private(14)
    for taken in (private(11), private(12)):
        ask = north.rotation(taken)
        refused(joined, parts, "same key", lambda ask=ask: joined.rotate(ask))
    refused(
        joined, parts, "must have signed", lambda: joined.rotate(north.rotation(private(14)))
    )  # to itself: one key is no two


def test_a_member_that_has_rotated_a_hundred_times_is_told_so(joined, north, parts, clock):
    for number in range(101, 201):
        joined.rotate(north.rotation(private(number)))
        north.identity = private(number)
    ask = north.rotation(private(201))
    refused(joined, parts, "former", lambda: joined.rotate(ask))


# Revocation.


def test_id_1_a_revoked_member_stays_revoked(joined, north, parts):
    joined.revoke("North")
    with pytest.raises(TrustError, match="'North' is revoked"):
        joined.trust().keys("North")
    refused(joined, parts, "is revoked", lambda: joined.revoke("North"))
    refused(joined, parts, "is revoked", lambda: joined.rotate(north.rotation(private(14))))
    token = invite_again(joined, parts)
    with pytest.raises(ProtocolError):
        joined.enrol(north.enrolment(token, identity=hexed(private(14)), signer=private(14)), token)
    with pytest.raises(TrustError, match="'North' is revoked"):
        joined.trust().member("North")


def test_id_1_a_revoked_member_enrols_with_its_own_keys_in_vain(joined, north, parts):
    joined.revoke("North")
    token = invite_again(joined, parts)
    refused(joined, parts, "is revoked", lambda: joined.enrol(north.enrolment(token), token))


def test_a_stranger_is_not_revoked(joined, parts):
    refused(joined, parts, "not in the alliance", lambda: joined.revoke("West"))


# A board of several people.


@pytest.fixture
def shared(make):
    """A registry of which one of three keys lies here, and two must sign."""
    return make(threshold=2)


def drafts(tmp_path, version):
    return sorted((tmp_path / "board").glob(f"membership-{version}-*.json"))


def sign_draft(tmp_path, version, *keys):
    [draft] = drafts(tmp_path, version)
    return countersign(draft.read_bytes(), *keys)


def test_a_change_waits_for_the_board(shared, tmp_path, parts):
    with pytest.raises(
        WaitingForBoardError, match=r"1 of the board to sign membership-1-\w{12}\.json"
    ):
        shared.found()
    with pytest.raises(GovernanceError, match="no membership"):
        shared.trust()
    shared.accept(sign_draft(tmp_path, 1, BOARD[2]))
    assert shared.trust().membership.version == 1
    assert drafts(tmp_path, 1) == []


def test_id_3_a_draft_without_enough_of_the_board_is_not_accepted(shared, tmp_path, parts):
    with pytest.raises(WaitingForBoardError):
        shared.found()
    for keys in ((), (private(66),), (private(7),)):
        with pytest.raises(TrustError, match="1 of 3 known keys, 2"):
            shared.accept(sign_draft(tmp_path, 1, *keys))
    assert parts[0].members.latest_membership() is None


def test_a_site_asks_again_once_the_board_has_signed(shared, north, tmp_path, parts):
    with pytest.raises(WaitingForBoardError):
        shared.found()
    shared.accept(sign_draft(tmp_path, 1, BOARD[1]))
    token = invite(shared)
    with pytest.raises(WaitingForBoardError):
        shared.enrol(north.enrolment(token), token)
    assert parts[0].members.certificates() == ()
    shared.accept(sign_draft(tmp_path, 2, BOARD[1]))
    certificate, memberships = shared.enrol(north.enrolment(token), token)
    assert (site_of(certificate.encode()), len(memberships)) == ("North", 2)


@pytest.fixture
def waiting(shared, north, south, tmp_path):
    """Two members in version 3, of whom one must sign each change."""
    with pytest.raises(WaitingForBoardError):
        shared.found()
    shared.accept(sign_draft(tmp_path, 1, BOARD[1]))
    for version, hospital in ((2, north), (3, south)):
        token = invite(shared, hospital.site)
        with pytest.raises(WaitingForBoardError):
            shared.enrol(hospital.enrolment(token), token)
        shared.accept(sign_draft(tmp_path, version, BOARD[1]))
    return shared


def test_id_1_a_member_cannot_write_over_the_draft_of_its_own_revocation(waiting, north, tmp_path):
    with pytest.raises(WaitingForBoardError):
        waiting.revoke("North")
    [revocation] = drafts(tmp_path, 4)
    document = revocation.read_bytes()
    with pytest.raises(WaitingForBoardError) as caught:
        waiting.rotate(north.rotation(private(14)))
    assert revocation.read_bytes() == document
    [rotation] = set(drafts(tmp_path, 4)) - {revocation}
    assert rotation.name in str(caught.value)
    waiting.accept(countersign(document, BOARD[1]))
    with pytest.raises(TrustError, match="is revoked"):
        waiting.trust().member("North")
    assert drafts(tmp_path, 4) == []  # what has lost its place is not left for anybody to sign


def test_the_same_change_again_logs_nothing_and_leaves_what_was_signed(
    waiting, north, tmp_path, parts, clock
):
    changes = [
        lambda: waiting.rotate(north.rotation(private(14))),
        lambda: waiting.revoke("North"),
    ]
    for change in changes:
        with pytest.raises(WaitingForBoardError):
            change()
    for place in drafts(tmp_path, 4):
        place.write_bytes(countersign(place.read_bytes(), BOARD[2]))
    before = seen(parts), [one.read_bytes() for one in drafts(tmp_path, 4)]
    for change in changes:
        clock.now += timedelta(minutes=1)
        with pytest.raises(WaitingForBoardError, match=r"membership-4-\w{12}\.json"):
            change()
    assert (seen(parts), [one.read_bytes() for one in drafts(tmp_path, 4)]) == before


def test_beside_a_draft_that_somebody_has_spoiled_another_is_made(waiting, tmp_path):
    with pytest.raises(WaitingForBoardError):
        waiting.revoke("North")
    [draft] = drafts(tmp_path, 4)
    draft.rename(spoiled := draft.with_name("membership-4-spoiled.json"))
    spoiled.write_bytes(b"{}")
    with pytest.raises(WaitingForBoardError):
        waiting.revoke("North")
    assert drafts(tmp_path, 4) == sorted([draft, spoiled])


def test_a_member_does_not_fill_the_disk_with_drafts(waiting, north, south, tmp_path, parts):
    for number in range(MAX_DRAFTS):
        with pytest.raises(WaitingForBoardError):
            waiting.rotate(north.rotation(private(100 + number)))
    ask = north.rotation(private(200))
    refused(waiting, parts, "20 drafts of membership 4 wait", lambda: waiting.rotate(ask))
    with pytest.raises(WaitingForBoardError):
        waiting.rotate(north.rotation(private(100)))
    with pytest.raises(WaitingForBoardError):  # the board's own hand is not bound
        waiting.revoke("North")
    assert len(drafts(tmp_path, 4)) == MAX_DRAFTS + 1


# Whose key counted when: the board may sign days after the draft.


def keys_at(registry, site, time):
    return [key.raw.hex() for key in registry.keys_at(site, time)]


def test_id_9_a_rotation_that_waits_for_the_board_leaves_the_old_key_in_force(
    waiting, make, north, tmp_path, clock
):
    old, new = hexed(private(11)), hexed(private(14))
    clock.now += timedelta(days=1)
    with pytest.raises(WaitingForBoardError):
        waiting.rotate(north.rotation(private(14)))
    drafted = clock.now
    clock.now += timedelta(days=3)
    waiting.accept(sign_draft(tmp_path, 4, BOARD[1]))
    changed = clock.now
    for registry in (waiting, make(threshold=2)):  # and so after a restart
        assert keys_at(registry, "North", drafted + timedelta(days=1)) == [old]
        assert keys_at(registry, "North", changed - timedelta(seconds=1)) == [old]
        assert keys_at(registry, "North", changed) == [new, old]
        assert keys_at(registry, "North", changed + timedelta(seconds=59)) == [new, old]
        assert keys_at(registry, "North", changed + timedelta(seconds=60)) == [new]
        assert keys_at(registry, "South", changed) == [hexed(private(12))]


def test_id_1_a_revocation_that_waits_for_the_board_does_not_reach_back(waiting, tmp_path, clock):
    clock.now += timedelta(days=1)
    with pytest.raises(WaitingForBoardError):
        waiting.revoke("North")
    clock.now += timedelta(days=3)
    waiting.accept(sign_draft(tmp_path, 4, BOARD[1]))
    for seconds in (-86_400, -1, 0, 59):
        time = clock.now + timedelta(seconds=seconds)
        assert keys_at(waiting, "North", time) == [hexed(private(11))]
    with pytest.raises(TrustError, match="'North' was revoked then") as caught:
        waiting.keys_at("North", clock.now + timedelta(seconds=60))
    assert caught.value.code == "revoked"


def test_who_was_no_member_then_had_no_key_then(joined, clock):
    for site, time in (("North", clock.now - timedelta(seconds=1)), ("West", clock.now)):
        with pytest.raises(TrustError, match="was not in the alliance then") as caught:
            joined.keys_at(site, time)
        assert caught.value.code == "not_a_member"


def test_a_coordinator_without_a_key_of_the_board_decides_nothing(make, tmp_path):
    alone = make(here=[], threshold=1)
    with pytest.raises(WaitingForBoardError):
        alone.found()
    with pytest.raises(TrustError, match="0 of 3 known keys"):
        alone.accept(sign_draft(tmp_path, 1))
    alone.accept(sign_draft(tmp_path, 1, BOARD[0]))


def test_id_3_a_membership_that_does_not_follow_is_not_accepted(registry, parts):
    held = registry.trust()
    made = held.membership.model_copy(update={"version": 3, "previous": held.digest})
    refused(registry, parts, "2 comes next", lambda: registry.accept(made.signed(BOARD[0])))
    other = held.membership.model_copy(update={"version": 2, "previous": digest_of(b"x")})
    refused(registry, parts, "another history", lambda: registry.accept(other.signed(BOARD[0])))


def test_a_stored_membership_that_was_changed_is_noticed(registry, make, parts, monkeypatch):
    """Whoever writes to the database is no board."""
    stored = parts[0].members.latest_membership()
    document = registry.trust().membership.signed(private(66))
    forged = dataclasses.replace(stored, document=document)
    other = make()
    monkeypatch.setattr(parts[0].members, "memberships", lambda after=0: (forged,))
    with pytest.raises(TrustError, match="must have signed"):
        other.trust()


# AU-2: the entry comes first.


@pytest.mark.parametrize("change", ["invite", "enrol", "rotate", "revoke", "renew"])
def test_au_2_what_cannot_be_logged_does_not_happen(
    joined, north, south, parts, monkeypatch, clock, change
):
    token = invite(joined, "South")
    ask = {
        "invite": lambda: invite(joined, "East"),
        "enrol": lambda: joined.enrol(south.enrolment(token), token),
        "rotate": lambda: joined.rotate(north.rotation(private(14))),
        "revoke": lambda: joined.revoke("North"),
        "renew": lambda: joined.renew(north.renewal()),
    }[change]
    clock.now += timedelta(hours=1)  # so that a renewal gives another certificate
    before, invitations = seen(parts), len(parts[0].members.invitations())

    def full(self, event, /, **facts):
        raise StorageError("disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(AuditLog, "append", full)
        with pytest.raises(StorageError, match="disk is full"):
            ask()
    assert seen(parts) == before
    assert len(parts[0].members.invitations()) == invitations
    ask()


def test_a_clock_that_goes_back_stops_changes_and_breaks_nothing(joined, south, parts, clock):
    """A membership dated before the one it follows would be refused by every site."""
    token = invite(joined, "South")
    clock.now -= timedelta(minutes=1)
    ask = south.enrolment(token)
    refused(joined, parts, "dated before", lambda: joined.enrol(ask, token))
    clock.now += timedelta(minutes=1)
    joined.enrol(south.enrolment(token), token)
