"""Take entries out of an audit log for an inspector; ``protocol/audit_export.py`` checks them."""

import json
from collections.abc import Mapping
from typing import Any

import rfc8785

from huizhen.protocol.audit_checkpoints import claimed_checkpoint, key_ids
from huizhen.protocol.audit_export import FORMAT, MAX_BYTES
from huizhen.protocol.documents import PublicKey
from huizhen.protocol.errors import ConfigError
from huizhen.storage.audit import AuditLog


def export(
    log: AuditLog,
    *,
    first: int = 1,
    last: int | None = None,
    study: str | None = None,
    keys: Mapping[str, PublicKey] | None = None,
) -> bytes:
    """Return an export of the entries that the newest checkpoint speaks for.

    Args:
        log: the log.
        first: the number of the first entry.
        last: of the last; that of the newest checkpoint if None.
        study: a digest, to take the entries of that study alone.
        keys: of parties by name; those that have signed are listed in the export.

    Raises:
        ConfigError: there is no checkpoint, none that speaks for these entries, or more of them
            than a reader takes.
        AuditError: an entry is not as it was written; names it.
        StorageError: the log cannot be read.
    """
    newest = log.newest()
    if newest is None:
        raise ConfigError(f"audit log of {log.log!r} has no checkpoint: sign one, with its key")
    size = claimed_checkpoint(newest).size
    last = size if last is None else last
    if not 1 <= first <= last <= size:
        raise ConfigError(
            f"entries {first} to {last} are asked for, the newest checkpoint speaks for 1 to "
            f"{size}: ask for others, or sign a new one"
        )
    seen = log.witnessed()
    documents, older = [newest], None
    if seen is not None and seen.head.size < size:
        documents.append(seen.document)
        proof = _hex(log.proof(seen.head.size, size))
        older = {"checkpoint": json.loads(seen.document), "proof": proof}
    chosen: list[dict[str, Any]] = [
        {"entry": entry.to_json(), "proof": _hex(log.inclusion(entry.sequence, size))}
        for entry in log.entries(first, last)
        if study is None or entry.facts.get("study") == study
    ]
    data = rfc8785.dumps(
        {
            "format": FORMAT,
            "alliance": log.alliance,
            "log": log.log,
            "first": first,
            "last": last,
            "study": study,
            "entries": chosen,
            "checkpoint": json.loads(newest),
            "witnessed": older,
            "keys": _listed(keys or {}, documents),
        }
    )
    if len(data) > MAX_BYTES:
        raise ConfigError(f"export has {len(data)} bytes, at most {MAX_BYTES} are read: take less")
    return data


def _listed(keys: Mapping[str, PublicKey], documents: list[bytes]) -> dict[str, str]:
    """Return the keys that have signed; none where a document has no signature of any of them."""
    signers = [set(key_ids(document)) for document in documents]
    found = {name: key for name, key in keys.items() if any(key.id in ids for ids in signers)}
    is_enough = all(any(key.id in ids for key in found.values()) for ids in signers)
    return {name: key.raw.hex() for name, key in found.items()} if is_enough else {}


def _hex(proof: list[bytes]) -> list[str]:
    return [one.hex() for one in proof]
