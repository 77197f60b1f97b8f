"""Who is in the alliance, as the coordinator keeps it: invitations, members, certificates.

Every change is a new membership document, signed by the board. Where the board's keys lie here
(one key, one person: what ``init`` makes), a change is in force at once. Where they lie with
several people, the change waits as a draft until enough of them have signed it.
"""

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import zip_longest
from pathlib import Path

import rfc8785
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)

from huizhen.protocol.documents import (
    Document,
    PublicKey,
    claimed,
    public_key,
    public_of,
    verify,
)
from huizhen.protocol.errors import GovernanceError, ProtocolError, StorageError, WireError
from huizhen.protocol.invitation import Invitation, Pins
from huizhen.protocol.statements import (
    Board,
    Enrolment,
    Former,
    Member,
    Membership,
    Renewal,
    Rotation,
    digest_of,
    moment,
    stamp,
)
from huizhen.protocol.trust import Trust, TrustError, check_change
from huizhen.server.authority import Authority, fingerprint, pem, requested_key
from huizhen.server.home import PublicTerms
from huizhen.server.store import Store
from huizhen.server.store_members import StoredCertificate, StoredInvitation
from huizhen.storage.audit import AuditLog
from huizhen.storage.files import write_whole

MOST_SKEW = timedelta(minutes=5)
# between a site's clock and this one, in what it signs
KEY_OVERLAP = timedelta(minutes=1)
# in which the key before a change still counts: who receives looks at the membership now and then
CERTIFICATE_REPEATS = timedelta(hours=1)
# in which the same key is given the same certificate
MAX_CERTIFICATES = 10
# per site, in that time
MAX_DRAFTS = 20
# that members bring about between two memberships


class WaitingForBoardError(GovernanceError):
    """A change is drafted, and enough of the board have yet to sign it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """What the coordinator signs with."""

    identity: Ed25519PrivateKey
    board: Sequence[Ed25519PrivateKey]
    # of the board's keys, those that lie here
    authority: Authority


class Registry:
    """The coordinator's knowledge of its members."""

    def __init__(
        self,
        store: Store,
        audit: AuditLog,
        keys: Keys,
        *,
        alliance: str,
        board: Board,
        drafts: Path,
        clock: Callable[[], datetime],
    ) -> None:
        """Use the store.

        Args:
            store: open.
            audit: open.
            keys: to sign with.
            alliance: its name.
            board: the pinned one, of the settings.
            drafts: the folder for what waits for the board.
            clock: gives the present time, with a zone.
        """
        self._store, self._audit, self._keys, self._clock = store, audit, keys, clock
        self._alliance, self._board, self._drafts = alliance, board, drafts
        self._trust: Trust | None = None
        self._history: dict[str, list[tuple[datetime, str | None]]] = {}
        # each site's keys, oldest first, with when the store took in who has them; None: revoked
        self._certified: dict[str, list[tuple[datetime, x509.Certificate]]] = {}
        # what each site was given of late: who asks again gets no other
        self._lock = threading.Lock()

    def found(self) -> None:
        """Make the first membership, without members; again is free.

        Raises:
            WaitingForBoardError: the board must sign it.
        """
        if self._store.members.latest_membership() is None:
            self._propose(self._made(None, ()))

    def trust(self) -> Trust:
        """Return the newest membership, its whole history checked; for any thread.

        Raises:
            GovernanceError: there is none yet.
        """
        with self._lock:
            return self._newest()

    def _newest(self) -> Trust:
        held = 0 if self._trust is None else self._trust.membership.version
        for stored in self._store.members.memberships(held):
            now = self._clock()
            if self._trust is None:
                self._trust = Trust.begin(
                    stored.document, alliance=self._alliance, board=self._board, now=now
                )
            else:
                self._trust = self._trust.follow(stored.document, now=now)
            for member in self._trust.membership.members:
                key = member.identity if member.status == "active" else None
                known = self._history.setdefault(member.site, [])
                if not known or known[-1][1] != key:
                    known.append((stored.received, key))
        if self._trust is None:
            raise GovernanceError("alliance has no membership: the board must sign the first")
        return self._trust

    def keys_at(self, site: str, received: datetime) -> list[PublicKey]:
        """Return the keys under which counts what a site sent and the coordinator then received.

        A membership is in force here from when the store took it in, which may be days after the
        times that stand in it: a board elsewhere signs later than the draft is made.

        Args:
            site: its name.
            received: by this coordinator's clock.

        Returns:
            The key by the membership that was in force, and after it the one before, if that was
            replaced less than ``KEY_OVERLAP`` earlier.

        Raises:
            TrustError: the site was not in the alliance then, or was revoked.
            GovernanceError: there is no membership yet.
        """
        with self._lock:
            self._newest()
            known = tuple(self._history.get(site, ()))
        found = [
            key
            for (begin, key), after in zip_longest(known, known[1:])
            if begin <= received and (after is None or received < after[0] + KEY_OVERLAP)
        ]
        if keys := [public_key(bytes.fromhex(key)) for key in reversed(found) if key is not None]:
            return keys
        if found:
            raise TrustError("revoked", f"site {site!r} was revoked then")
        raise TrustError("not_a_member", f"site {site!r} was not in the alliance then")

    def invite(self, site: str, public: PublicTerms, *, days: float) -> Invitation:
        """Return an invitation for a site that is not a member.

        Raises:
            GovernanceError: the site is a member, or was one.
        """
        if any(member.site == site for member in self.trust().membership.members):
            raise GovernanceError(f"site {site!r} is or was a member: choose another name")
        token, now = secrets.token_urlsafe(32), self._clock()
        expires = now + timedelta(days=days)
        made = Invitation(
            site=site,
            pins=Pins(
                alliance=self._alliance,
                board=self._board,
                authority=pem(self._keys.authority.certificate).decode(),
            ),
            fleet=public.fleet,
            service=public.service,
            door=public.door,
            token=token,
            expires=stamp(expires),
        )
        self._audit.append("invitation_made", site=site)
        self._store.members.add_invitation(
            StoredInvitation(
                token=digest_of(token.encode()), site=site, made=now, expires=moment(made.expires)
            )
        )
        return made

    def enrol(self, document: bytes, token: str) -> tuple[str, tuple[bytes, ...]]:
        """Let a site in; return its certificate, PEM, and all memberships, oldest first.

        Raises:
            ProtocolError: the document, the token or a key is not what it must be.
            WaitingForBoardError: the board must sign; the site asks again with the same keys.
        """
        said = Enrolment.of(_self_signed(document, "enrolment", "identity"))
        self._check_time(said.alliance, said.issued)
        if digest_of(token.encode()) != said.token:
            raise ProtocolError("enrolment is for another token")
        now = self._clock()
        self._store.members.check_invitation(said.token, said.site, now, key=said.identity)
        _check_node_key(said.node_key)
        held = self.trust()
        joined = Member(
            site=said.site,
            identity=said.identity,
            node_key=said.node_key,
            status="active",
            since=stamp(now),
            until=None,
            former=(),
        )
        is_new = all(member.site != said.site for member in held.membership.members)
        changed = self._made(held, (*held.membership.members, joined)) if is_new else None
        member = joined if is_new else held.member(said.site)
        self._store.members.use_invitation(said.token, said.site, now, key=said.identity)
        if changed is not None:
            self._check_room(changed)
            self._propose(changed, "site_enrolled", site=said.site, identity=said.identity)
        elif (member.identity, member.node_key) != (said.identity, said.node_key):
            raise ProtocolError(f"site {said.site!r} is a member with other keys")
        certificate = self._certify(said.site, said.request)
        return certificate, tuple(one.document for one in self._store.members.memberships())

    def renew(self, document: bytes) -> str:
        """Return a new certificate for a member, PEM.

        Raises:
            ProtocolError: the document is not a member's, or not fresh.
        """
        site = str(claimed(document).get("site"))
        said = Renewal.read(document, self.trust().keys(site))
        self._check_time(said.alliance, said.issued)
        return self._certify(said.site, said.request)

    def rotate(self, document: bytes) -> None:
        """Put a member's new identity key in force.

        Raises:
            ProtocolError: it is not signed by the member's key and by the new one, or the new one
                is or was somebody's.
            WaitingForBoardError: the board must sign.
        """
        said = Rotation.of(_self_signed(document, "rotation", "old", "new"))
        self._check_time(said.alliance, said.issued)
        held = self.trust()
        member = held.member(said.site)
        if member.identity == said.new:
            return
        if member.identity != said.old:
            raise ProtocolError(f"site {said.site!r} has another key than the rotation replaces")
        former = (*member.former, Former(identity=said.old, until=stamp(self._clock())))
        changed = member.model_copy(update={"identity": said.new, "former": former})
        made = self._made(held, _replaced(held.membership.members, changed))
        self._check_room(made)
        self._propose(made, "key_rotated", old=said.old, new=said.new)

    def revoke(self, site: str) -> None:
        """Shut a member out for ever.

        Raises:
            ProtocolError: it is no member.
            WaitingForBoardError: the board must sign.
        """
        held = self.trust()
        member = held.member(site)
        now = self._clock()
        changed = member.model_copy(update={"status": "revoked", "until": stamp(now)})
        made = self._made(held, _replaced(held.membership.members, changed))
        self._propose(made, "site_revoked", site=site)

    def accept(self, document: bytes) -> Trust:
        """Put a membership in force that the board has signed elsewhere.

        Raises:
            ProtocolError: it does not follow the newest, or too few have signed.
        """
        latest, now = self._store.members.latest_membership(), self._clock()
        if latest is None:
            made = Trust.begin(document, alliance=self._alliance, board=self._board, now=now)
        else:
            made = self.trust().follow(document, now=now)
        self._publish(made.membership.version, document)
        return self.trust()

    def _made(self, held: Trust | None, members: Sequence[Member]) -> Membership:
        """Return the membership with these members that follows the one that is held.

        Raises:
            ProtocolError: no site would follow it, so that it must not be signed.
        """
        before = None if held is None else held.membership
        try:
            made = Membership(
                alliance=self._alliance,
                version=1 if before is None else before.version + 1,
                previous=None if held is None else held.digest,
                issued=stamp(self._clock()),
                board=self._board if before is None else before.board,
                coordinator=public_of(self._keys.identity).raw.hex(),
                members=tuple(members),
            )
        except ValueError as error:
            raise ProtocolError("membership would be larger than one may be") from error
        check_change(before, made)
        return made

    def _propose(self, made: Membership, event: str = "", **facts: str) -> None:
        """Log a change and put it in force, or leave it for the board to sign.

        Raises:
            WaitingForBoardError: the board must sign it. The same change again logs nothing, and
                leaves the draft that waits, with the signatures that it has.
        """
        own = [key for key in self._keys.board if public_of(key).raw.hex() in made.board.keys]
        missing = made.board.threshold - len(own)
        place = self._waiting(made) if missing > 0 else None
        if place is None:
            if event:
                self._audit.append(event, **facts)
            document = made.signed(*(own or [self._keys.identity]))
            if missing <= 0:
                self._publish(made.version, document)
                return
            body = digest_of(rfc8785.dumps(made.model_dump(mode="json", by_alias=True)))
            place = self._drafts / f"membership-{made.version}-{body[:12]}.json"
            write_whole(place, document)
        raise WaitingForBoardError(
            f"membership {made.version} waits for {missing} of the board to sign {place.name}"
        )

    def _publish(self, version: int, document: bytes) -> None:
        """Put a membership in force; the other drafts of its version cannot follow any more."""
        self._audit.append("membership_published", version=version, document=digest_of(document))
        self._store.members.add_membership(version, document, self._clock())
        for draft in self._drafts_of(version):
            draft.unlink(missing_ok=True)

    def _drafts_of(self, version: int) -> list[Path]:
        return sorted(self._drafts.glob(f"membership-{version}-*.json"))

    def _waiting(self, made: Membership) -> Path | None:
        """Return the draft of the same change that waits for the board already, or None."""
        for place in self._drafts_of(made.version):
            try:
                draft = Membership.of_body(claimed(place.read_bytes()))
            except WireError:  # somebody has edited it: another is made beside it
                continue
            except OSError as error:
                raise StorageError(f"cannot read {str(place)!r}: {error.strerror}") from error
            if _without_times(draft) == _without_times(made):
                return place
        return None

    def _check_room(self, made: Membership) -> None:
        """Refuse a member's change where many wait, unless it is one of them."""
        if len(self._drafts_of(made.version)) >= MAX_DRAFTS and self._waiting(made) is None:
            raise ProtocolError(
                f"{MAX_DRAFTS} drafts of membership {made.version} wait for the board: ask again "
                "when it has signed one"
            )

    def _certify(self, site: str, request: str) -> str:
        now, public = self._clock(), requested_key(request)
        known = [
            (made, one)
            for made, one in self._certified.get(site, [])
            if timedelta(0) <= now - made < CERTIFICATE_REPEATS
        ]
        for _, one in known:
            if one.public_key() == public:
                return pem(one).decode()
        if len(known) >= MAX_CERTIFICATES:
            raise ProtocolError(
                f"site {site!r} has asked for certificates of {len(known)} keys within an hour: "
                "use one of them, or ask later"
            )
        made = self._keys.authority.for_site(site, request, now)
        self._audit.append(
            "certificate_issued",
            site=site,
            fingerprint=fingerprint(made),
            until=stamp(made.not_valid_after_utc),
        )
        self._store.members.add_certificate(
            StoredCertificate(
                serial=f"{made.serial_number:x}",
                site=site,
                issued=now,
                not_after=made.not_valid_after_utc,
            )
        )
        self._certified[site] = [*known, (now, made)]
        return pem(made).decode()

    def _check_time(self, alliance: str, issued: str) -> None:
        if alliance != self._alliance:
            raise ProtocolError(f"document is of alliance {alliance!r}, not {self._alliance!r}")
        skew = moment(issued) - self._clock()
        if abs(skew) > MOST_SKEW:
            raise ProtocolError(
                f"document is dated {issued}, {skew.total_seconds():.0f} s from this clock: "
                "set the site's clock"
            )


def _self_signed(document: bytes, kind: str, *names: str) -> Document:
    """Return a document that is signed by every key that it names itself under ``names``."""
    said, keys = claimed(document), []
    for name in names:
        try:
            keys.append(public_key(bytes.fromhex(str(said.get(name)))))
        except ValueError as error:
            raise ProtocolError(f"document names no key under {name!r}") from error
    return verify(document, kind=kind, keys=keys, threshold=len(names))


def _replaced(members: Sequence[Member], changed: Member) -> list[Member]:
    return [changed if member.site == changed.site else member for member in members]


def _without_times(said: Membership) -> tuple[object, ...]:
    """Return what two drafts of one change have in common, whenever they were made."""
    members = [(one.site, one.identity, one.node_key, one.status) for one in said.members]
    return (said.alliance, said.version, said.previous, said.board, said.coordinator, members)


def _check_node_key(text: str) -> None:
    """Refuse what is not a P-384 public key in its one encoding, which Flower asks for."""
    try:
        key = load_pem_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ProtocolError("node key is not a public key in PEM") from error
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP384R1):
        raise ProtocolError("node key is not of P-384")
    if key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) != text.encode():
        raise ProtocolError("node key is not in its one encoding")
