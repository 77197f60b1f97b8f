"""What an inspector is shown of an audit log: entries, each proven to be in a signed checkpoint.

One RFC 8785 JSON object, made by ``storage/audit_export.py``. It can be checked without the log,
offline, against keys that the reader trusts or a head that somebody else has seen:

    alliance, log    whose log it is
    first, last      the numbers from which entries were taken, study the digest to which alone
    entries          each with the Merkle proof (RFC 6962 §2.1.1) of its place under the checkpoint
    checkpoint       the newest that the owner has signed, with all countersignatures
    witnessed        the newest that a witness has signed and the proof that the other extends it;
                     null where that is the same, or there is none
    keys             of parties that have signed; that a key the reader does not know is of the
                     party beside it is the exporter's word

Of a range every entry must be there, so a missing one is found. The entries of one study prove that
they are in the log, not that they are all that it has of the study: only the whole log shows that.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import rfc8785

from huizhen.protocol.audit import Entry, read_entry
from huizhen.protocol.audit_checkpoints import (
    Keys,
    check_head,
    claimed_checkpoint,
    only_key,
    read_checkpoint,
)
from huizhen.protocol.audit_tree import Tree
from huizhen.protocol.documents import PublicKey, public_key, verify
from huizhen.protocol.errors import AuditError, ConfigError, ProtocolError
from huizhen.protocol.merkle import is_extension, is_included, leaf_hash
from huizhen.protocol.statements import Checkpoint, Head, moment

FORMAT = "huizhen audit 1"
MAX_BYTES = 1 << 28
_FIELDS: Mapping[str, Any] = {
    "format": str,
    "alliance": str,
    "log": str,
    "first": int,
    "last": int,
    "study": str | None,
    "entries": list,
    "checkpoint": dict,
    "witnessed": dict | None,
    "keys": dict,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What an export shows, once it is verified."""

    alliance: str
    log: str
    head: Head
    # of the checkpoint
    signers: tuple[str, ...]
    # parties that have signed the checkpoint, of those whose keys are known; the owner among them
    witnessed: Head | None
    witnesses: tuple[str, ...]
    # parties beside the owner that have signed ``witnessed``
    first: int
    last: int
    study: str | None
    entries: tuple[Entry, ...]

    @property
    def is_whole(self) -> bool:
        """Whether every entry of the log is there, up to the checkpoint."""
        return self.study is None and (self.first, self.last) == (1, self.head.size)


def verify_export(
    data: bytes, *, keys: Keys | PublicKey | None = None, witnessed: Head | None = None
) -> Exported:
    """Return what an export shows, after checking every entry of it.

    Args:
        data: the file.
        keys: of parties that the reader trusts, the owner's among them; or the owner's alone.
        witnessed: a head of the log that somebody else has seen.

    Raises:
        ConfigError: the file is no export, there is nothing to check it against, or a newer version
            wrote it.
        AuditError: an entry was changed, left out, moved or added, or the end was cut off; names
            the first that is wrong.
        ProtocolError: the owner has not signed the checkpoint, or a signature is wrong.
    """
    if keys is None and witnessed is None:
        raise ConfigError("nothing was given to check the export against: give a key or a head")
    value = _parse(data)
    if isinstance(keys, PublicKey):
        keys = only_key(value["log"], keys)
    checkpoint, signers = _checkpoint(value["checkpoint"], keys)
    if (checkpoint.alliance, checkpoint.log) != (value["alliance"], value["log"]):
        raise AuditError("export names another log than its checkpoint")
    entries = _entries(value, checkpoint)
    middle, witnesses = _middle(value, checkpoint, signers, keys)
    _check_listed(value, checkpoint, keys)
    found = Exported(
        alliance=checkpoint.alliance,
        log=checkpoint.log,
        head=Head(size=checkpoint.size, root=checkpoint.root),
        signers=signers,
        witnessed=middle,
        witnesses=witnesses,
        first=value["first"],
        last=value["last"],
        study=value["study"],
        entries=entries,
    )
    if witnessed is not None:
        _check_witnessed(found, witnessed)
    return found


def _parse(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise ConfigError(f"export has {len(data)} bytes, at most {MAX_BYTES} are read")
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError("export is not JSON") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ConfigError(f"export is not of the format {FORMAT!r}")
    if value.keys() != _FIELDS.keys():
        raise AuditError(f"export has other fields than {', '.join(_FIELDS)}")
    for name, kind in _FIELDS.items():
        if not isinstance(value[name], kind) or isinstance(value[name], bool):
            raise AuditError(f"export has a {name} of another type")
    try:
        is_canonical = rfc8785.dumps(value) == data
    except (ValueError, RecursionError):
        is_canonical = False
    if not is_canonical:
        raise AuditError("export is not in its one encoding: it was changed after it was made")
    return value


def _checkpoint(value: Any, keys: Keys | None) -> tuple[Checkpoint, tuple[str, ...]]:
    data = rfc8785.dumps(value)
    if keys is None:
        return claimed_checkpoint(data), ()
    return read_checkpoint(data, keys)


def _entries(value: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[Entry, ...]:
    """Return the entries; each must be the next of the selection and in the checkpoint's tree."""
    first, last, study = value["first"], value["last"], value["study"]
    if not 1 <= first <= last + 1 <= checkpoint.size + 1:
        raise AuditError(f"export is of entries {first} to {last}, there are {checkpoint.size}")
    root, found, expected = bytes.fromhex(checkpoint.root), [], first
    for item in value["entries"]:
        number, proof = _number(item, expected), _proof(item, f"entry {expected}")
        if study is None and number != expected:
            raise AuditError(f"entry {expected} of the audit log is missing, {number} comes after")
        if not expected <= number <= last:
            raise AuditError(f"entry {number} of the audit log is out of its place")
        # Only what is proven to be in the log can come from a newer version.
        written = rfc8785.dumps(item["entry"])
        if not is_included(leaf_hash(written), number - 1, checkpoint.size, root, proof):
            raise AuditError(f"entry {number} of the audit log is not the one that was signed")
        entry = read_entry(written, number)
        if study is not None and entry.facts.get("study") != study:
            raise AuditError(f"entry {number} of the audit log is not of study {study[:12]!r}")
        found.append(entry)
        expected = number + 1
    if study is None and expected != last + 1:
        raise AuditError(f"entry {expected} of the audit log is missing, the export ends before it")
    return tuple(found)


def _middle(
    value: Mapping[str, Any], newest: Checkpoint, signers: tuple[str, ...], keys: Keys | None
) -> tuple[Head | None, tuple[str, ...]]:
    """Return the head that witnesses have signed, and which of the known parties have."""
    others = tuple(name for name in signers if name != newest.log)
    if others:
        return Head(size=newest.size, root=newest.root), others
    found = value["witnessed"]
    if found is None or keys is None:
        return None, ()
    if found.keys() != {"checkpoint", "proof"}:
        raise AuditError("export has a witnessed checkpoint with other fields")
    older, names = read_checkpoint(rfc8785.dumps(found["checkpoint"]), keys)
    proof = _proof(found, "the witnessed checkpoint")
    before, after = bytes.fromhex(older.root), bytes.fromhex(newest.root)
    if (older.alliance, older.log) != (newest.alliance, newest.log):
        raise AuditError("export has a witnessed checkpoint of another log")
    if not is_extension(older.size, before, newest.size, after, proof):
        raise AuditError(
            f"the audit log of {newest.size} entries does not extend the {older.size} that "
            "witnesses have signed"
        )
    others = tuple(name for name in names if name != newest.log)
    return (Head(size=older.size, root=older.root) if others else None), others


def _check_listed(value: Mapping[str, Any], newest: Checkpoint, keys: Keys | None) -> None:
    """Refuse a list of keys that are not those that have signed, or not the trusted ones."""
    try:
        listed = {name: public_key(bytes.fromhex(key)) for name, key in value["keys"].items()}
    except (ProtocolError, TypeError, ValueError) as error:
        raise AuditError("export lists a key that is no Ed25519 key in hex") from error
    if not listed:
        return
    trusted = {} if keys is None else keys(moment(newest.issued))
    documents = [value["checkpoint"]]
    if value["witnessed"] is not None:
        documents.append(value["witnessed"]["checkpoint"])
    signed: set[str] = set()
    for document in documents:
        data = rfc8785.dumps(document)
        signed.update(verify(data, kind=Checkpoint.kind, keys=listed.values()).signers)
    owners = {key.raw: name for name, key in trusted.items()}
    for name, key in listed.items():
        is_trusted = trusted.get(name, key) == key and owners.get(key.raw, name) == name
        if key.id not in signed or not is_trusted:
            raise AuditError(f"export lists a key of {name[:64]!r} that is not the one that signed")


def _check_witnessed(found: Exported, seen: Head) -> None:
    """Refuse an export of a log that does not reach, or does not have, a head that was seen."""
    for head in (found.head, found.witnessed):
        if head is not None and head.size == seen.size:
            if head.root != seen.root:
                raise AuditError(
                    f"somebody saw the first {seen.size} entries as {seen.root[:12]}, the export "
                    f"has them as {head.root[:12]}: this is another log"
                )
            return
    if seen.size > found.head.size:
        raise AuditError(
            f"entry {found.head.size + 1} of the audit log is missing: somebody saw {seen.size} "
            f"entries, the export's checkpoint is of {found.head.size}"
        )
    if not found.is_whole:
        raise ConfigError(
            f"a part of the log cannot be compared with its head at {seen.size} entries: ask for "
            "an export of the whole"
        )
    tree = Tree()
    for entry in found.entries:
        tree.append(entry.leaf())
    check_head(tree, seen)


def _number(item: Any, expected: int) -> int:
    if not isinstance(item, dict) or item.keys() != {"entry", "proof"}:
        raise AuditError(f"entry {expected} of the audit log has no proof")
    number = item["entry"].get("sequence") if isinstance(item["entry"], dict) else None
    if type(number) is not int:
        raise AuditError(f"entry {expected} of the audit log has no number")
    return number


def _proof(item: Mapping[str, Any], what: str) -> list[bytes]:
    proof = item["proof"]
    if not isinstance(proof, list) or not all(
        isinstance(one, str) and re.fullmatch(r"[0-9a-f]{64}", one) for one in proof
    ):
        raise AuditError(f"proof of {what} is not a list of hashes in hex")
    return [bytes.fromhex(one) for one in proof]
