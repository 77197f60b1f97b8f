"""Whom to believe: the alliance's membership as a value that only moves forward.

Trust begins with what an invitation pins: the alliance's name and its board, compared by people
over another channel. From there each membership document must be signed by the board of the version
before (m of n), name that version's digest and carry the next number. A replayed, skipped, forked
or rewritten membership is refused. There are no files and no clock here.

The rules for keys follow The Update Framework's root role (https://theupdateframework.io, §5.3): a
new board is signed by the old one and by itself.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, TypeAlias

from huizhen.protocol.documents import PublicKey, public_key
from huizhen.protocol.errors import ProtocolError
from huizhen.protocol.statements import Board, Member, Membership, StudyOffer, digest_of, moment

CLOCK_MARGIN = timedelta(minutes=5)
COORDINATOR = "coordinator"  # its name in logs; no site has it

Code: TypeAlias = Literal[
    "wrong_alliance", "old_version", "gap", "fork", "not_signed", "from_the_future", "malformed",
    "not_a_member", "revoked",
]  # fmt: skip


class TrustError(ProtocolError):
    """Somebody claims what the membership does not give them; ``code`` may be told to anyone."""

    def __init__(self, code: Code, text: str) -> None:
        """Name the reason."""
        super().__init__(text)
        self.code: Code = code


def keys_of(board: Board) -> list[PublicKey]:
    """Return a board's keys."""
    return [public_key(bytes.fromhex(key)) for key in board.keys]


def check_change(held: Membership | None, made: Membership) -> None:
    """Refuse a draft that nobody could follow once it is signed.

    Args:
        held: the newest membership; None before the first.
        made: what the board is about to sign.

    Raises:
        TrustError: it contradicts itself, or changes what no membership may change.
        WireError: it is larger than a membership may be.
    """
    Membership.of_body(made.model_dump(mode="json", by_alias=True))
    _check_possible(made)
    if held is not None:
        _check_follows(held, made)


@dataclass(frozen=True, slots=True)
class Trust:
    """A membership that was accepted."""

    membership: Membership
    digest: str
    # of its document

    @classmethod
    def begin(cls, data: bytes, *, alliance: str, board: Board, now: datetime) -> "Trust":
        """Return the trust that begins with a pinned board.

        Args:
            data: the membership document, of whatever version.
            alliance: the pinned name.
            board: the pinned board, which must have signed it and still be the board.
            now: the present time.

        Raises:
            TrustError: the document is of others, or not signed by enough of the board.
            WireError: it is no membership.
        """
        found = _read(data, board, now)
        if found.alliance != alliance:
            raise TrustError(
                "wrong_alliance", f"membership is of {found.alliance!r}, expected {alliance!r}"
            )
        if (set(found.board.keys), found.board.threshold) != (set(board.keys), board.threshold):
            raise TrustError("fork", "membership has another board than was pinned")
        return cls(found, digest_of(data))

    def follow(self, data: bytes, *, now: datetime) -> "Trust":
        """Return the trust with the next membership; the one that is held is taken again.

        Raises:
            TrustError: it is older, skips a version, is another history, or lacks signatures.
            WireError: it is no membership.
        """
        if digest_of(data) == self.digest:
            return self
        held = self.membership
        found = _read(data, held.board, now)
        if found.alliance != held.alliance:
            raise TrustError(
                "wrong_alliance", f"membership is of {found.alliance!r}, expected {held.alliance!r}"
            )
        if found.version == held.version:
            raise TrustError("fork", f"membership {found.version} is another than the one held")
        if found.version < held.version:
            raise TrustError(
                "old_version", f"membership is version {found.version}, {held.version} is held"
            )
        if found.version > held.version + 1:
            raise TrustError(
                "gap", f"membership is version {found.version}, {held.version + 1} comes next"
            )
        if found.previous != self.digest:
            raise TrustError("fork", f"membership {found.version} follows another history")
        if found.board != held.board:
            _read(data, found.board, now)  # a new board must prove that it holds its keys
        _check_follows(held, found)
        return Trust(found, digest_of(data))

    @property
    def coordinator(self) -> list[PublicKey]:
        """The coordinator's key, as ``Statement.read`` takes it."""
        return [public_key(bytes.fromhex(self.membership.coordinator))]

    @property
    def active(self) -> tuple[Member, ...]:
        """The sites that are in the alliance now."""
        return tuple(one for one in self.membership.members if one.status == "active")

    @property
    def board(self) -> list[PublicKey]:
        """The board's keys."""
        return keys_of(self.membership.board)

    def offer(self, data: bytes) -> StudyOffer:
        """Return what a study's document offers, enough of the board having signed it.

        Raises:
            WireError: the bytes are no offer.
            ProtocolError: a signature is wrong, or too few of the board have signed.
        """
        return StudyOffer.read(data, self.board, self.membership.board.threshold)

    def member(self, site: str) -> Member:
        """Return a site that is in the alliance now.

        Raises:
            TrustError: it was never in it, or is revoked.
        """
        for member in self.membership.members:
            if member.site == site:
                if member.status == "revoked":
                    raise TrustError("revoked", f"site {site!r} is revoked since {member.until}")
                return member
        raise TrustError("not_a_member", f"site {site!r} is not in the alliance")

    def keys(self, site: str) -> list[PublicKey]:
        """Return the key that a site signs with now.

        Raises:
            TrustError: the site is not in the alliance, or revoked.
        """
        return [public_key(bytes.fromhex(self.member(site).identity))]

    def keys_at(self, site: str, time: datetime) -> list[PublicKey]:
        """Return the keys under which a site's older document counts.

        Only for documents whose time somebody else has witnessed: who holds an old key can write
        any date.

        Raises:
            TrustError: the site was not in the alliance then.
        """
        for member in self.membership.members:
            if member.site != site:
                continue
            if member.until is not None and time >= moment(member.until):
                raise TrustError("revoked", f"site {site!r} was revoked at {member.until}")
            if time < moment(member.since):
                break
            for former in sorted(member.former, key=lambda one: one.until):
                if time < moment(former.until):
                    return [public_key(bytes.fromhex(former.identity))]
            return [public_key(bytes.fromhex(member.identity))]
        raise TrustError("not_a_member", f"site {site!r} was not in the alliance then")


def _read(data: bytes, board: Board, now: datetime) -> Membership:
    """Return a membership that a board has signed and that is possible in itself."""
    try:
        found = Membership.read(data, keys_of(board), board.threshold)
    except TrustError:
        raise
    except ProtocolError as error:
        raise TrustError("not_signed", str(error)) from error
    if moment(found.issued) > now + CLOCK_MARGIN:
        raise TrustError("from_the_future", f"membership is dated {found.issued}: check the clock")
    _check_possible(found)
    return found


def _check_possible(found: Membership) -> None:
    """Refuse a membership that contradicts itself."""
    if len(set(found.board.keys)) != len(found.board.keys):
        raise TrustError("malformed", "board names a key twice")
    if found.board.threshold > len(found.board.keys):
        raise TrustError(
            "malformed",
            f"board has {len(found.board.keys)} keys, {found.board.threshold} cannot sign",
        )
    for what, values in _unique(found.members):
        if len(set(values)) != len(values):
            raise TrustError("malformed", f"two members have the same {what}")
    for member in found.members:
        if member.site == COORDINATOR:
            raise TrustError("malformed", "a member has the coordinator's name")
        if (member.status == "revoked") != (member.until is not None):
            raise TrustError("malformed", f"member {member.site!r} is revoked without a time")


def _unique(members: Sequence[Member]) -> Iterable[tuple[str, list[str]]]:
    """Give what must differ between members."""
    keys = [member.identity for member in members]
    former = [old.identity for member in members for old in member.former]
    yield "name", [member.site for member in members]
    yield "key", keys + former
    yield "node key", [member.node_key for member in members]


def _check_follows(held: Membership, found: Membership) -> None:
    """Refuse what no membership changes, whoever signs it."""
    if moment(found.issued) < moment(held.issued):
        raise TrustError("fork", f"membership {found.version} is dated before the one it follows")
    _check_members(held.members, found.members)


def _check_members(before: Sequence[Member], after: Sequence[Member]) -> None:
    """Refuse a membership that forgets a member, revives one, or swaps a key in silence."""
    found = {member.site: member for member in after}
    for old in before:
        new = found.get(old.site)
        if new is None:
            raise TrustError("fork", f"membership forgets site {old.site!r}: revoke it instead")
        if old.status == "revoked" and new != old:
            raise TrustError("fork", f"membership changes site {old.site!r}, which is revoked")
        if new.since != old.since or new.former[: len(old.former)] != old.former:
            raise TrustError("fork", f"membership rewrites the history of site {old.site!r}")
        added = [one.identity for one in new.former[len(old.former) :]]
        if added != ([] if new.identity == old.identity else [old.identity]):
            raise TrustError("fork", f"membership swaps the key of site {old.site!r}")
