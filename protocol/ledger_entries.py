"""The entries of a privacy ledger: what each may say, and the chain that they form.

An entry's digest is the SHA-256 of the RFC 8785 JSON of its other fields, the digest of the entry
before among them, so that changing one entry changes all that follow (Haber and Stornetta 1991).
Whoever rewrites the rest as well is found by a witness that kept a ``Head``. Fields and kinds are
only added, each with a new schema, never changed.

    open     site, cohort, the hospital's own cap and the schema; the first entry and no other
    cap      the hospital changed its cap
    reserve  a study may charge so many rounds of one mechanism
    charge   a round, before its first gradient
    answer   a charged round has an update that may leave, by its digest; no other one may
    metrics  the one release of noised counts of a name, before anything is counted
    release  what those metrics are, by digest; nothing else may leave in their place
    close    the study has ended
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import rfc8785

from huizhen.protocol.accounting import Spend
from huizhen.protocol.errors import ConfigError, PrivacyError
from huizhen.protocol.strict import build
from huizhen.protocol.wire import MAX_ROUND

SCHEMA = 1
CLOCK_TOLERANCE_SECONDS = 10
# Cutting to whole seconds takes up to 1, and time services step a clock by a few after a boot or a
# pause of the machine; a wrong zone, a wrong date or a restored machine is off by far more.
Unit = Literal["patient", "record"]  # of privacy; a ledger has one, since ε of both do not compose
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_BEFORE_THE_FIRST = "0" * 64


@dataclass(frozen=True, slots=True)
class Head:
    """A ledger's last entry, or one that a witness saw."""

    sequence: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cap:
    """What the hospital lets all studies on a cohort spend together, per unit of privacy."""

    epsilon: float
    delta: float
    metrics_epsilon: float = 0.0
    # for noised counts, besides epsilon; 0 lets none leave

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(f"epsilon is {self.epsilon}, expected more than 0")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta is {self.delta}, expected between 0 and 1")
        if not (math.isfinite(self.metrics_epsilon) and self.metrics_epsilon >= 0):
            raise ValueError(f"metrics_epsilon is {self.metrics_epsilon}, expected 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The body of ``open``."""

    schema: int = SCHEMA
    site: str
    cohort: str
    unit: Unit = "patient"
    neighbours: Literal["add_or_remove_one"] = "add_or_remove_one"
    cap: Cap

    def __post_init__(self) -> None:
        _check_name("site", self.site)
        _check_name("cohort", self.cohort)


@dataclass(frozen=True, slots=True, kw_only=True)
class CapChanged:
    """The body of ``cap``."""

    cap: Cap


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """The body of ``reserve``."""

    study: str
    # its digest
    spend: Spend
    # of one round, for one unit of privacy
    rounds: int

    def __post_init__(self) -> None:
        _check_digest("study", self.study)
        _check_count("rounds", self.rounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Charged:
    """The body of ``charge``."""

    study: str
    round: int

    def __post_init__(self) -> None:
        _check_digest("study", self.study)
        _check_count("round", self.round)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """The body of ``answer``."""

    study: str
    round: int
    announcement: str
    # SHA-256 of the bytes that asked
    update: str
    # SHA-256 of the bytes that answer

    def __post_init__(self) -> None:
        _check_digest("study", self.study)
        _check_count("round", self.round)
        for name in ("announcement", "update"):
            _check_digest(name, getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsCharged:
    """The body of ``metrics``."""

    study: str
    name: str
    epsilon: float

    def __post_init__(self) -> None:
        _check_digest("study", self.study)
        _check_name("name", self.name)
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise PrivacyError(f"metrics epsilon is {self.epsilon}, expected more than 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsReleased:
    """The body of ``release``."""

    study: str
    name: str
    announcement: str
    # SHA-256 of the bytes that asked
    metrics: str
    # SHA-256 of the bytes that leave

    def __post_init__(self) -> None:
        _check_digest("study", self.study)
        _check_name("name", self.name)
        for name in ("announcement", "metrics"):
            _check_digest(name, getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """The body of ``close``."""

    study: str

    def __post_init__(self) -> None:
        _check_digest("study", self.study)


Body = (
    Opened | CapChanged | Reserved | Charged | Answered | MetricsCharged | MetricsReleased | Closed
)

_KINDS: dict[str, type[Body]] = {
    "open": Opened,
    "cap": CapChanged,
    "reserve": Reserved,
    "charge": Charged,
    "answer": Answered,
    "metrics": MetricsCharged,
    "release": MetricsReleased,
    "close": Closed,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One link of the chain."""

    sequence: int
    # 1 is the first
    time: str
    # UTC, ISO 8601, whole seconds; never before the time of the entry before
    kind: str
    body: Mapping[str, Any]
    previous: str
    # the digest of the entry before; zeros in the first
    digest: str

    @property
    def head(self) -> Head:
        """What a witness keeps of the entry."""
        return Head(self.sequence, self.digest)

    def to_json(self) -> dict[str, Any]:
        """Return the entry as plain JSON values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def canonical(self) -> bytes:
        """Return the RFC 8785 JSON of the entry."""
        return rfc8785.dumps(self.to_json())


def make_entry(body: Body, now: datetime, after: Entry | None) -> Entry:
    """Return the entry that says ``body`` and follows ``after``.

    Args:
        body: what it says.
        now: the present time, with a zone.
        after: the last entry; None for the first.

    Raises:
        PrivacyError: the clock went back, or the body is nothing that could be read again.
    """
    now = now.astimezone(UTC).replace(microsecond=0)
    if after is not None:
        last = _instant(after.time)
        if now < last - timedelta(seconds=CLOCK_TOLERANCE_SECONDS):
            raise PrivacyError(
                f"the clock says {now.strftime(_TIME)}, the ledger's last entry is of "
                f"{after.time}: set the clock right, or find out whether this machine was "
                "restored"
            )
        now = max(now, last)
    values = {
        "sequence": 1 if after is None else after.sequence + 1,
        "time": now.strftime(_TIME),
        "kind": next(kind for kind, cls in _KINDS.items() if isinstance(body, cls)),
        "body": dataclasses.asdict(body),
        "previous": _BEFORE_THE_FIRST if after is None else after.digest,
    }
    where = f"entry {values['sequence']} of the ledger"
    # What is written is what its JSON reads back as, so nothing unreadable is ever appended.
    entry = read_entry(
        json.loads(_canonical({**values, "digest": _digest(values, where)}, where)), after
    )
    read_body(entry)
    return entry


def read_entry(value: Any, after: Entry | None) -> Entry:
    """Return the entry in a parsed JSON value, checked to follow ``after``.

    Raises:
        PrivacyError: it is no entry, was changed, or does not follow; the message names its number.
    """
    number = 1 if after is None else after.sequence + 1
    where = f"entry {number} of the ledger"
    types = {
        "sequence": int,
        "time": str,
        "kind": str,
        "body": dict,
        "previous": str,
        "digest": str,
    }
    if not isinstance(value, dict) or value.keys() != types.keys():
        raise PrivacyError(f"{where} has other fields than {', '.join(types)}")
    for name, kind in types.items():
        if type(value[name]) is not kind:
            raise PrivacyError(f"{where} has a {name} that is not of type {kind.__name__}")
    entry = Entry(**value)
    if entry.digest != _digest({name: value[name] for name in types if name != "digest"}, where):
        raise PrivacyError(f"{where} was changed, its digest is not that of what it says")
    if entry.sequence != number:
        raise PrivacyError(f"{where} is missing, number {entry.sequence} stands in its place")
    if entry.previous != (_BEFORE_THE_FIRST if after is None else after.digest):
        raise PrivacyError(f"{where} does not follow the one before it: the chain is broken")
    try:
        time = _instant(entry.time)
    except ValueError as error:
        raise PrivacyError(f"{where} has time {entry.time[:40]!r}, expected {_TIME}") from error
    if after is not None and time < _instant(after.time):
        raise PrivacyError(f"{where} is of {entry.time}, before the entry it follows")
    return entry


def read_body(entry: Entry) -> Body:
    """Return what an entry says, as a value.

    Raises:
        ConfigError: a newer version of Huizhen wrote it.
        PrivacyError: it says nothing that is allowed; the message names its number.
    """
    where = f"entry {entry.sequence} of the ledger"
    schema = entry.body.get("schema", SCHEMA) if entry.kind == "open" else SCHEMA
    if schema != SCHEMA:
        raise ConfigError(f"ledger has schema {schema!r}, this version reads {SCHEMA}: upgrade it")
    if entry.kind not in _KINDS:
        raise ConfigError(f"{where} is of the unknown kind {entry.kind[:40]!r}: upgrade huizhen")
    try:
        return build(_KINDS[entry.kind], entry.body, f"{where},")
    except ConfigError as error:  # names the place itself
        raise PrivacyError(str(error)) from error
    except PrivacyError as error:
        raise PrivacyError(f"{where}: {error}") from error


def _digest(values: Mapping[str, Any], where: str) -> str:
    return hashlib.sha256(_canonical(values, where)).hexdigest()


def _canonical(values: Mapping[str, Any], where: str) -> bytes:
    try:
        return rfc8785.dumps(dict(values))
    except (rfc8785.CanonicalizationError, UnicodeEncodeError, RecursionError) as error:
        raise PrivacyError(f"{where} holds a value that RFC 8785 cannot write") from error


def _instant(time: str) -> datetime:
    found = datetime.strptime(time, _TIME).replace(tzinfo=UTC)
    if found.strftime(_TIME) != time:
        raise ValueError("a digit is missing")
    return found


def _check_name(what: str, name: str) -> None:
    if not (1 <= len(name) <= 200 and name.isprintable() and name == name.strip()):
        raise PrivacyError(f"{what} is {name[:210]!r}, expected 1 to 200 printable characters")


def _check_digest(what: str, digest: str) -> None:
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise PrivacyError(f"{what} is {digest[:80]!r}, expected a SHA-256 in hex")


def _check_count(what: str, count: int) -> None:
    if not 1 <= count <= MAX_ROUND:
        raise PrivacyError(f"{what} is {count}, expected 1 to {MAX_ROUND}")
