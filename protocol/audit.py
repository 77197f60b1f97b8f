"""The entries of an audit log: what happened, from a closed list, with facts of fixed types.

Each party keeps one log of its own decisions. An entry is RFC 8785 JSON, and its bytes are the leaf
of the log's Merkle tree (RFC 6962), so that a head, a size and a root, commits to all of them and
their order. The order is that of the numbers; the time is what the party's clock said.

``EVENTS`` names every event and the facts it has: digests, numbers, names of parties, codes. There
is no place for a sentence, so that nothing of a record, an exception or a secret can be written
here. Events and facts are only added, each with a new name, never changed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Annotated, Any, Literal

import rfc8785
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from huizhen.protocol.errors import AuditError, ConfigError
from huizhen.protocol.merkle import leaf_hash
from huizhen.protocol.statements import (
    Attempt,
    Code,
    Digest,
    Head,
    Key,
    Name,
    Round,
    SiteName,
    Size,
    Time,
    moment,
    stamp,
)

SCHEMA = 1
MAX_BYTES = 4096
# of an entry; what the facts' types allow is less
KeyPurpose = Literal["identity", "node", "tls", "steward"]
Version = Annotated[int, Field(ge=1, le=1 << 53)]
EpsilonCap = Annotated[float, Field(gt=0)]

_ASKED = {"study": Digest, "round": Round, "attempt": Attempt}
_PERHAPS = {"study": Digest | None, "round": Round | None, "attempt": Attempt | None}
# null where what arrived did not say it, or cannot be believed
_SENT = {**_ASKED, "payload": Digest, "bytes": Size}

EVENTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # either party, about itself
        "log_opened": {"alliance": Name, "log": SiteName},
        "key_made": {"purpose": KeyPurpose, "fingerprint": Digest},
        # the fingerprint as ``storage.keys.fingerprint`` gives it
        "key_rotated": {"old": Key, "new": Key},
        "certificate_renewed": {"fingerprint": Digest, "until": Time},
        "work_paused": {"code": Code},
        "work_resumed": {"code": Code},
        "work_stopped": {"code": Code},
        # the kill switch, and which of its ways
        "log_exported": {"document": Digest, "first": Size, "last": Size, "study": Digest | None},
        "witness_refused": {"log": SiteName, "code": Code},
        # a site
        "alliance_joined": {"identity": Key, "authority": Digest},
        # the certificate authority's fingerprint, as the invitation pinned it
        "membership_accepted": {"version": Version, "document": Digest},
        "membership_refused": {"document": Digest, "code": Code},
        "study_offered": {"study": Digest},
        "approval_given": {"study": Digest, "cohort": Name, "epsilon_cap": EpsilonCap | None},
        "approval_withdrawn": {"study": Digest},
        "policy_changed": {"policy": Digest},
        "announcement_accepted": {**_ASKED, "announcement": Digest},
        "announcement_refused": {**_PERHAPS, "announcement": Digest, "code": Code},
        "training_started": _ASKED,
        "training_ended": {**_ASKED, "code": Code | None},
        # null: with an update
        "ledger_reserved": {"study": Digest, "ledger": Head},
        "ledger_charged": {"study": Digest, "round": Round, "ledger": Head},
        "update_sent": _SENT,
        "metrics_sent": _SENT,
        "receipt_received": {
            "study": Digest,
            "round": Round,
            "payload": Digest,
            "code": Code | None,
        },
        # null: it is counted
        "record_accepted": {"study": Digest, "round": Round, "record": Digest},
        "record_refused": {"record": Digest, "code": Code},
        # the coordinator
        "invitation_made": {"site": SiteName},
        "site_enrolled": {"site": SiteName, "identity": Key},
        "site_revoked": {"site": SiteName},
        "certificate_issued": {"site": SiteName, "fingerprint": Digest, "until": Time},
        "membership_published": {"version": Version, "document": Digest},
        "approval_received": {"study": Digest, "site": SiteName},
        "withdrawal_received": {"study": Digest, "site": SiteName},
        "study_opened": {"study": Digest},
        "study_paused": {"study": Digest},
        "study_resumed": {"study": Digest},
        "study_closed": {"study": Digest},
        "study_finished": {"study": Digest},
        "round_announced": {**_ASKED, "announcement": Digest},
        "round_abandoned": {**_ASKED, "code": Code},
        "update_counted": {**_ASKED, "site": SiteName, "payload": Digest},
        "update_refused": {
            **_PERHAPS,
            "site": SiteName | None,
            "payload": Digest | None,
            "code": Code,
        },
        "round_committed": {**_ASKED, "record": Digest, "result": Digest},
        "release_made": {"study": Digest, "release": Digest, "adapter": Digest},
    }
)

_STRICT = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


def _model(event: str) -> type[BaseModel]:
    facts: dict[str, Any] = {name: (kind, ...) for name, kind in EVENTS[event].items()}
    return create_model(event, __config__=_STRICT, **facts)


_MODELS = {event: _model(event) for event in EVENTS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One thing that happened."""

    sequence: int
    # 1 is the first
    time: str
    # UTC, RFC 3339, whole seconds
    event: str
    facts: Mapping[str, Any]
    # JSON values, those that ``EVENTS`` gives the event

    def to_json(self) -> dict[str, Any]:
        """Return the entry as plain JSON values."""
        return {
            "schema": SCHEMA,
            "sequence": self.sequence,
            "time": self.time,
            "event": self.event,
            "facts": dict(self.facts),
        }

    def canonical(self) -> bytes:
        """Return the RFC 8785 JSON of the entry: its one encoding, and the leaf."""
        return rfc8785.dumps(self.to_json())

    def leaf(self) -> bytes:
        """Return the entry's hash in the Merkle tree, 32 bytes."""
        return leaf_hash(self.canonical())


def make_entry(event: str, facts: Mapping[str, Any], *, sequence: int, now: datetime) -> Entry:
    """Return the entry that says what happened.

    Args:
        event: one of ``EVENTS``.
        facts: exactly those that the event has.
        sequence: its number.
        now: the present time, with a zone.

    Raises:
        ValueError: the event is none, or a fact is missing, too many or of another type. The
            message names the fact and never repeats its value.
    """
    if event not in _MODELS:
        raise ValueError(f"{event[:48]!r} is no event of an audit log")
    try:
        found = _MODELS[event].model_validate(dict(facts))
    except ValidationError as error:
        raise ValueError(f"event {event!r} {_first_problem(error)}") from None
    entry = Entry(
        sequence=sequence, time=stamp(now), event=event, facts=found.model_dump(mode="json")
    )
    # What is written is what reads back, so nothing unreadable is ever appended.
    try:
        return read_entry(entry.canonical(), sequence)
    except (AuditError, rfc8785.CanonicalizationError) as error:
        raise ValueError(f"event {event!r} has facts that could not be read again") from error


def read_entry(data: bytes, sequence: int) -> Entry:
    """Return the entry that bytes are, which must be number ``sequence``.

    Raises:
        ConfigError: a newer version of Huizhen wrote it.
        AuditError: it is no entry, not in its one encoding, or has another number; names it.
    """
    where = f"entry {sequence} of the audit log"
    value = _parse(data)
    if value is None:
        raise AuditError(f"{where} is not as it was written")
    if type(value.get("schema")) is not int or value["schema"] != SCHEMA:
        raise ConfigError(f"{where} has another schema than {SCHEMA}: upgrade huizhen")
    if value.keys() != {"schema", "sequence", "time", "event", "facts"}:
        raise AuditError(f"{where} has other fields than an entry")
    number, time, event, facts = (value[key] for key in ("sequence", "time", "event", "facts"))
    if type(number) is not int or number != sequence:
        what = f"number {number}" if type(number) is int else "something else"
        raise AuditError(f"{where} is missing, {what} stands in its place")
    if not isinstance(event, str) or not isinstance(facts, dict) or not _is_time(time):
        raise AuditError(f"{where} has a time, an event or facts of another type")
    if event not in _MODELS:
        raise ConfigError(f"{where} is of an event unknown to this version: upgrade huizhen")
    try:
        _MODELS[event].model_validate_json(rfc8785.dumps(facts))
    except ValidationError as error:
        raise AuditError(f"{where}, {event}, {_first_problem(error)}") from None
    return Entry(sequence=sequence, time=time, event=event, facts=facts)


def _parse(data: bytes) -> dict[str, Any] | None:
    """Return the object that bytes are the one encoding of; None if of nothing."""
    if len(data) > MAX_BYTES:
        return None
    try:
        value = json.loads(data.decode("utf-8"))
        is_canonical = isinstance(value, dict) and rfc8785.dumps(value) == data
    except (ValueError, RecursionError):
        return None
    return value if is_canonical else None


def _is_time(time: Any) -> bool:
    try:
        moment(time)
    except (ValueError, TypeError):
        return False
    return True


def _first_problem(error: ValidationError) -> str:
    """Name the first wrong fact and the kind of mistake, never a value: it may be anything."""
    first = error.errors(include_input=False, include_context=False, include_url=False)[0]
    fact = ".".join(str(part)[:40] for part in first["loc"] if isinstance(part, str))
    return f"has a wrong fact {fact!r}: {first['type']}"
