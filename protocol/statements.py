"""What the parties of an alliance state to each other: the bodies of its signed documents.

Each class is one kind of document of ``protocol/documents.py``: ``signed`` writes it, ``read``
takes it back from bytes whose signatures ``verify`` has checked. Parsing is strict: a key too many
or too few, or a value of another type, refuses the whole. A statement that is bound to something
names it by the SHA-256 of its bytes: the study, the announcement, the record before.

Who may say what, and when it still counts, is in ``protocol/trust.py`` and ``protocol/chain.py``.
"""

import hashlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal, Self

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from huizhen.protocol.documents import Document, PublicKey, public_key, sign, verify
from huizhen.protocol.errors import ConfigError, ProtocolError, WireError
from huizhen.protocol.study import FORMAT, Study, check_site_name, parse_study
from huizhen.protocol.wire import MAX_ROUND

MAX_SITES = 1000
MAX_ATTEMPT = 1_000_000


def digest_of(data: bytes) -> str:
    """Return the SHA-256 of bytes in hex, by which statements name each other."""
    return hashlib.sha256(data).hexdigest()


def stamp(time: datetime) -> str:
    """Return a moment as statements write it: RFC 3339, UTC, whole seconds."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def moment(text: str) -> datetime:
    """Return the moment that ``stamp`` wrote.

    Raises:
        ValueError: the text is not one that ``stamp`` writes.
    """
    time = datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    if stamp(time) != text:
        raise ValueError(f"time is {text[:40]!r}, expected as 2026-01-31T09:00:00Z")
    return time


def _time(text: str) -> str:
    moment(text)
    return text


def _site(name: str) -> str:
    try:
        check_site_name(name)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return name


def _key(text: str) -> str:
    try:
        public_key(bytes.fromhex(text))
    except ProtocolError as error:
        raise ValueError(str(error)) from error
    return text


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Key = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$"), AfterValidator(_key)]
# 32 raw bytes of Ed25519 in hex
Time = Annotated[str, Field(max_length=20), AfterValidator(_time)]
SiteName = Annotated[str, AfterValidator(_site)]
Round = Annotated[int, Field(ge=1, le=MAX_ROUND)]
Attempt = Annotated[int, Field(ge=1, le=MAX_ATTEMPT)]
Code = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,47}$")]
# why something was refused; never text of anybody's data
Name = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,100}$")]
Size = Annotated[int, Field(ge=0, le=1 << 53)]


class _Part(BaseModel):
    """A value inside a statement."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Statement(_Part):
    """One kind of document."""

    kind: ClassVar[str]
    schema_number: Literal[1] = Field(default=1, alias="schema")
    alliance: Name

    def signed(self, *keys: Ed25519PrivateKey) -> bytes:
        """Return the document, signed.

        Raises:
            WireError: it is too large.
        """
        return sign(self.kind, self.model_dump(mode="json", by_alias=True), *keys)

    @classmethod
    def read(cls, data: bytes, keys: Iterable[PublicKey], threshold: int = 1) -> Self:
        """Return what a document says.

        Args:
            data: what arrived, from anyone.
            keys: whose signatures count.
            threshold: how many different ones must have signed.

        Raises:
            WireError: the bytes are no such document.
            ProtocolError: a signature is wrong, or too few of the keys have signed.
        """
        return cls.of(verify(data, kind=cls.kind, keys=keys, threshold=threshold))

    @classmethod
    def of(cls, document: Document) -> Self:
        """Return what a verified document says.

        Raises:
            WireError: its body is not what this kind has.
        """
        if document.kind != cls.kind:
            raise WireError(f"document is of kind {document.kind!r}, expected {cls.kind!r}")
        return cls.of_body(document.body)

    @classmethod
    def of_body(cls, body: Mapping[str, Any]) -> Self:
        """Return what a body says, whoever has signed it.

        Raises:
            WireError: it is not what this kind has.
        """
        try:
            made = cls.model_validate_json(rfc8785.dumps(dict(body)))
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(str(part)[:40] for part in first["loc"])
            raise WireError(f"{cls.kind} has a wrong {place!r}: {first['msg'][:200]}") from error
        if type(body.get("schema")) is not int:  # its default is for writers, and true is no 1
            raise WireError(f"{cls.kind} has no 'schema', expected 1")
        return made


class Former(_Part):
    """A key that a member has replaced: it verifies what was signed before."""

    identity: Key
    until: Time


class Member(_Part):
    """One site of the alliance."""

    site: SiteName
    identity: Key
    # signs the site's documents
    node_key: Annotated[str, Field(max_length=1000)]
    # Flower's, P-384, PEM
    status: Literal["active", "revoked"]
    since: Time
    until: Time | None
    # when it was revoked
    former: Annotated[tuple[Former, ...], Field(max_length=100)]


class Board(_Part):
    """Who decides for the alliance: so many of these keys must sign."""

    keys: Annotated[tuple[Key, ...], Field(min_length=1, max_length=20)]
    threshold: Annotated[int, Field(ge=1, le=20)]


class Membership(Statement):
    """Who is in the alliance; signed by the board, each version follows the one before."""

    kind: ClassVar[str] = "membership"
    version: Annotated[int, Field(ge=1, le=1 << 53)]
    previous: Digest | None
    # of the version before; null for the first
    issued: Time
    board: Board
    coordinator: Key
    members: Annotated[tuple[Member, ...], Field(max_length=MAX_SITES)]


class StudyOffer(Statement):
    """What sites are asked to take part in; signed by the board."""

    kind: ClassVar[str] = "study"
    study: dict[str, Any]
    # resolved, as ``Study.resolved`` gives it
    digest: Digest
    adapter: Digest
    # of the bytes that the first round announces
    state: Digest
    # of the strategy's first state, as the coordinator keeps it
    issued: Time
    ends: Time

    def agreed(self) -> Study:
        """Return the study that is offered.

        Raises:
            ProtocolError: it is no study of this version, or its digest is another.
        """
        tables = {key: value for key, value in self.study.items() if value is not None}
        if (form := tables.pop("format", None)) != FORMAT:
            raise ProtocolError(f"study has format {form!r}, this version reads {FORMAT}")
        try:
            study = parse_study(tables, "the offered study")
        except ConfigError as error:
            raise ProtocolError(str(error)) from error
        if study.digest() != self.digest:
            raise ProtocolError(
                f"offered study has digest {study.digest()[:12]}, the offer says "
                f"{self.digest[:12]}: versions differ, or somebody changed it"
            )
        return study


class Approval(Statement):
    """A site's consent to one study; signed by its identity key, or by its stewards as well."""

    kind: ClassVar[str] = "approval"
    study: Digest
    site: SiteName
    cohort: Name
    epsilon_cap: Annotated[float, Field(gt=0)] | None
    # null where the study has no unit of privacy
    issued: Time
    expires: Time


class Withdrawal(Statement):
    """A site's end of its consent; signed by its identity key."""

    kind: ClassVar[str] = "withdrawal"
    study: Digest
    site: SiteName
    issued: Time


class Announcement(Statement):
    """What the coordinator asks of sites now; signed by the coordinator."""

    kind: ClassVar[str] = "announcement"
    study: Digest
    round: Round
    # one past the study's last asks for metrics
    attempt: Attempt
    parent: Digest
    # of the last round's record; the study's digest before the first round
    adapter: Digest
    # of the bytes that come with it
    membership: Annotated[int, Field(ge=1, le=1 << 53)]
    sites: Annotated[tuple[SiteName, ...], Field(min_length=1, max_length=MAX_SITES)]
    # all that take part in the round, also those that have answered an earlier attempt
    issued: Time
    deadline: Time


class Head(_Part):
    """How far a log or ledger has come, for others to remember."""

    size: Size
    root: Digest


class Update(Statement):
    """A site's answer to an announcement; signed by its identity key."""

    kind: ClassVar[str] = "update"
    study: Digest
    round: Round
    attempt: Attempt
    site: SiteName
    announcement: Digest
    payload: Digest
    # of the bytes that come with it: an update in the wire format, or metrics
    ledger: Head | None
    # entries and digest of the last; null without a unit of privacy


class Refusal(Statement):
    """A site's refusal of an announcement; signed by its identity key."""

    kind: ClassVar[str] = "refusal"
    study: Digest
    round: Round
    attempt: Attempt
    site: SiteName
    announcement: Digest
    code: Code


class Receipt(Statement):
    """What became of what a site sent; signed by the coordinator."""

    kind: ClassVar[str] = "receipt"
    study: Digest
    round: Round
    attempt: Attempt
    site: SiteName
    payload: Digest
    code: Code | None
    # null: it is counted
    issued: Time


class Counted(_Part):
    """An update in the sum."""

    site: SiteName
    payload: Digest
    document: Digest


class Refused(_Part):
    """A site that is not in the sum, and why."""

    site: SiteName
    code: Code


class Record(Statement):
    """A closed round; signed by the coordinator, each record follows the one before."""

    kind: ClassVar[str] = "record"
    study: Digest
    round: Round
    attempt: Attempt
    parent: Digest
    adapter: Digest
    # what was announced
    counted: Annotated[tuple[Counted, ...], Field(max_length=MAX_SITES)]
    # by site
    absent: Annotated[tuple[Refused, ...], Field(max_length=MAX_SITES)]
    # by site: every site of the study that is not counted
    result: Digest
    # of the bytes that the next round announces
    closed: Time


class Release(Statement):
    """A finished study's adapter; signed by the coordinator."""

    kind: ClassVar[str] = "release"
    study: Digest
    record: Digest
    adapter: Digest
    certificate: Digest | None
    issued: Time


class Checkpoint(Statement):
    """How far a party's audit log has come; signed by it, countersigned by witnesses."""

    kind: ClassVar[str] = "checkpoint"
    log: SiteName
    # the party's name
    size: Size
    root: Digest
    issued: Time


class Enrolment(Statement):
    """A site's wish to join, with proof of its identity key; signed by that key."""

    kind: ClassVar[str] = "enrolment"
    site: SiteName
    identity: Key
    node_key: Annotated[str, Field(max_length=1000)]
    request: Annotated[str, Field(max_length=4000)]
    # PKCS #10, PEM, for the TLS certificate
    token: Digest
    # of the invitation's one-time token
    issued: Time


class Renewal(Statement):
    """A site's wish for a new TLS certificate; signed by its identity key."""

    kind: ClassVar[str] = "renewal"
    site: SiteName
    request: Annotated[str, Field(max_length=4000)]
    # PKCS #10, PEM
    issued: Time


class Rotation(Statement):
    """A site's change of its identity key; signed by the old key and by the new one."""

    kind: ClassVar[str] = "rotation"
    site: SiteName
    old: Key
    new: Key
    issued: Time
