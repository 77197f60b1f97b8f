"""Checkpoints of audit logs: who has signed how far a log had come.

The owner of a log signs its head; the coordinator and two other sites countersign what they have
seen, each after checking that the log only grew. A head that somebody else has signed cannot be
taken back: a log that was truncated, rewritten or restored from a copy does not reach it any more,
and of a forked log no witness signs both branches.
"""

import base64
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import datetime
from typing import Any, TypeAlias

import rfc8785

from huizhen.protocol.audit_tree import Tree
from huizhen.protocol.documents import Document, PublicKey, public_key, verify
from huizhen.protocol.errors import AuditError, ConfigError, ProtocolError, WireError
from huizhen.protocol.statements import Checkpoint, Head, Membership, moment

COORDINATOR = "coordinator"
# the name of the coordinator's own log, which no site may have
WITNESSES = 2
# sites, beside the coordinator

Keys: TypeAlias = Callable[[datetime], Mapping[str, PublicKey]]
# the key under which each party's signature counts in a document of that time


def witnesses_of(log: str, sites: Collection[str]) -> tuple[str, ...]:
    """Return who witnesses a log: the coordinator, and the next two sites in a ring of all.

    Args:
        log: whose log; it is no witness of its own.
        sites: that are in the alliance now.
    """
    others = sorted(set(sites) - {COORDINATOR})
    ring = [site for site in others if site > log] + [site for site in others if site < log]
    first = () if log == COORDINATOR else (COORDINATOR,)
    return (*first, *ring[:WITNESSES])


def only_key(party: str, key: PublicKey) -> Keys:
    """Return the keys of one party that never changed its key."""
    return lambda time: {party: key}


def keys_of_members(membership: Membership) -> Keys:
    """Return the keys of all that are or were in an alliance.

    A key counts in documents dated before it was replaced or its owner was revoked. That is a claim
    of the signer, so a document under such a key is only as good as a witness's signature on it.

    Raises:
        ProtocolError: a member has the coordinator's name.
    """
    if any(member.site == COORDINATOR for member in membership.members):
        raise ProtocolError(f"a member is named {COORDINATOR!r}, which is the coordinator's")

    def keys(time: datetime) -> dict[str, PublicKey]:
        found = {COORDINATOR: _key(membership.coordinator)}
        for member in membership.members:
            if member.until is None or time < moment(member.until):
                former = sorted(member.former, key=lambda one: moment(one.until))
                old = [one.identity for one in former if time < moment(one.until)]
                found[member.site] = _key([*old, member.identity][0])
        return found

    return keys


def read_checkpoint(data: bytes, keys: Keys) -> tuple[Checkpoint, tuple[str, ...]]:
    """Return what a checkpoint says, and which parties have signed it, by name.

    Signatures of parties without a key here are not looked at.

    Raises:
        WireError: the bytes are no checkpoint.
        ConfigError: there is no key of the log's owner.
        ProtocolError: the owner has not signed it, or a signature is wrong.
    """
    claimed = claimed_checkpoint(data)
    known = keys(moment(claimed.issued))
    if claimed.log not in known:
        raise ConfigError(
            f"no key of {claimed.log!r} at {claimed.issued} was given: its checkpoint cannot be "
            "verified"
        )
    document = verify(data, kind=Checkpoint.kind, keys=known.values())
    names = tuple(sorted(name for name, key in known.items() if key.id in document.signers))
    if claimed.log not in names:
        raise ProtocolError(f"checkpoint of {claimed.log!r} is not signed by its owner")
    return Checkpoint.of(document), names


def check_head(tree: Tree, seen: Head) -> None:
    """Refuse a log that is not the one whose head somebody has seen, or an older copy of it.

    Raises:
        AuditError: it ends before the head, or had another root at its size.
    """
    if tree.size < seen.size:
        raise AuditError(
            f"somebody saw {seen.size} entries, the audit log ends with {tree.size}: this is an "
            "older copy, or its end was cut off"
        )
    if tree.root(seen.size).hex() != seen.root:
        raise AuditError(
            f"somebody saw the first {seen.size} entries as {seen.root[:12]}, here they are "
            f"{tree.root(seen.size).hex()[:12]}: this is another log, or one of them was changed"
        )


def claimed_checkpoint(data: bytes) -> Checkpoint:
    """Return what a checkpoint says; none of its signatures is looked at.

    Raises:
        WireError: the bytes are no checkpoint.
    """
    return Checkpoint.of(Document(Checkpoint.kind, _parts(data)[1], (), data))


def claimed_membership(data: bytes) -> Membership:
    """Return what a membership says, as its own board has signed it: whose board is not looked at.

    Raises:
        WireError: the bytes are no membership.
        ProtocolError: the board that it names has not signed it.
    """
    claimed = Membership.of(Document(Membership.kind, _parts(data)[1], (), data))
    board = [_key(key) for key in claimed.board.keys]
    return Membership.read(data, board, claimed.board.threshold)


def key_ids(data: bytes) -> tuple[str, ...]:
    """Return the ids of the keys that have signed a document, as it says, sorted."""
    return tuple(sorted(_parts(data)[2]))


def same_statement(first: bytes, second: bytes) -> bool:
    """Whether two documents say the same, whoever has signed them."""
    return _parts(first)[1] == _parts(second)[1]


def signed_by(data: bytes, names: Collection[str]) -> bytes:
    """Return a document without the signatures of other keys than the named ones.

    Args:
        data: the document.
        names: ids of keys whose signatures were verified.

    Raises:
        WireError: the bytes are no document.
    """
    value = _parts(data)[0]
    value["signatures"] = [one for one in value["signatures"] if one["keyid"] in names]
    return rfc8785.dumps(value)


def with_signatures(data: bytes, other: bytes, names: Iterable[str]) -> bytes:
    """Return a document with those signatures of its copy that are under the named keys as well.

    Args:
        data: the document; its own signatures stay.
        other: the copy, which says the same.
        names: ids of keys whose signatures on the copy were verified.

    Raises:
        WireError: the bytes are no documents, or say different things.
    """
    if not same_statement(data, other):
        raise WireError("signatures are of another document than this one")
    value, _, signatures = _parts(data)
    more = _parts(other)[2]
    signatures.update((name, more[name]) for name in names)
    value["signatures"] = [{"keyid": name, "sig": signatures[name]} for name in sorted(signatures)]
    return rfc8785.dumps(value)


def _key(text: str) -> PublicKey:
    return public_key(bytes.fromhex(text))


def _parts(data: bytes) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Return an envelope, its body and its signatures by key id; nothing is verified."""
    try:
        value = json.loads(data.decode("utf-8"))
        body = json.loads(base64.b64decode(value["payload"], validate=True).decode("utf-8"))
        signatures = {one["keyid"]: one["sig"] for one in value["signatures"]}
        is_canonical = rfc8785.dumps(value) == data and isinstance(body, dict)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise WireError("bytes are no signed document") from error
    if not is_canonical or not all(isinstance(s, str) for s in signatures):
        raise WireError("document is not in its one canonical encoding")
    return value, body, signatures
