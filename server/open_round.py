"""One round of one study while it is open: what was announced, what came, when it closes.

The coordinator's store is the truth. Everything that arrives is on the disk before it counts, so
that a round process that was killed adds the kept updates again, in whatever order, and comes to
the same bytes (``strategies/mean.py``). Each answer gets a signed receipt; nothing is dropped in
silence. There is no network here: ``conductor.py`` asks and hands in what came.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from huizhen.protocol.adapter import shapes_of
from huizhen.protocol.documents import PublicKey, public_of
from huizhen.protocol.errors import DamagedError, ProtocolError, WireError
from huizhen.protocol.metrics import parse_metrics
from huizhen.protocol.statements import (
    Announcement,
    Counted,
    Receipt,
    Record,
    Refusal,
    Refused,
    StudyOffer,
    Update,
    digest_of,
    stamp,
)
from huizhen.protocol.trust import Trust
from huizhen.protocol.wire import Message, max_bytes
from huizhen.server.objects import Objects
from huizhen.server.rounds import Coordinator, RoundState
from huizhen.server.store import Store
from huizhen.server.store_database import DuplicateError
from huizhen.server.store_rounds import StoredAttempt, StoredRecord
from huizhen.server.store_updates import LateError, StoredRefusal, StoredUpdate
from huizhen.storage.audit import AuditLog
from huizhen.strategies import mean
from huizhen.strategies.base import StrategyState
from huizhen.strategies.stored import decode_state, encode_state

MAX_METRICS_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 16
KEPT_BACK = frozenset({"metrics_not_allowed", "cannot_train", "release_lost", "ledger_would_pass"})
# why a site lets no metrics out, now or later


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the rounds of every study share."""

    store: Store
    objects: Objects
    audit: AuditLog
    key: Ed25519PrivateKey
    # the coordinator's
    clock: Callable[[], datetime]


class OpenRound:
    """The round after the last committed one."""

    def __init__(self, parts: Parts, offer: StudyOffer, trust: Trust, sites: Sequence[str]) -> None:
        """Take up the round where the store says it stands, and announce it.

        Args:
            parts: shared.
            offer: of an open study.
            trust: the newest membership.
            sites: who may answer: members whose approval stands.

        Raises:
            ProtocolError: the study is not open any more.
            StorageError: something cannot be written: nothing is announced.
        """
        self._parts, self.study, self.trust = parts, offer.agreed(), trust
        self.digest = offer.digest
        self.sites = tuple(sorted(sites))
        last = parts.store.rounds.last_record(self.digest)
        self._kept = offer.state if last is None else last.strategy_state
        self._adapter = offer.adapter if last is None else last.adapter
        state = decode_state(parts.objects.get(self._kept))
        self.round = 1 if last is None else last.round + 1
        self.parent = self.digest if last is None else last.digest
        self._coordinator = Coordinator(self.study, shapes_of(state.x))
        self.is_metrics = self.round > self.study.rounds.count
        # While answers come the sum alone is in memory; the state is read again to close.
        self._state = RoundState(round=self.round, strategy=StrategyState({}))
        shapes = self._coordinator.sent_shapes(self._state)
        del state
        self.max_bytes = MAX_METRICS_BYTES if self.is_metrics else max_bytes(shapes)
        self._payloads: dict[str, str] = {}
        for update in parts.store.updates.updates(self.digest, self.round):
            self._take_again(update)
        self._codes: dict[str, str] = {}
        self.declined: set[str] = set()
        # the sites that have signed a refusal of this attempt, and sent nothing better since
        self._announcements: dict[str, int] = {
            digest_of(one.announcement): one.attempt
            for one in parts.store.rounds.attempts(self.digest, self.round)
        }
        self.result = ""  # digest of what the closed round gave
        self.announce()

    @property
    def adapter(self) -> bytes:
        """The bytes that are announced, read from the disk."""
        return self._parts.objects.get(self._adapter)

    @property
    def counted(self) -> tuple[str, ...]:
        """The sites whose update of this round is kept and valid."""
        return tuple(sorted(self._payloads))

    @property
    def missing(self) -> tuple[str, ...]:
        """The sites that may answer and have not; metrics that a site keeps are an answer.

        One that has approved since the announcement is not named in it, and is asked in the next.
        """
        kept = self._codes if self.is_metrics else {}
        return tuple(
            site
            for site in self.sites
            if site in self._named
            and site not in self._payloads
            and kept.get(site) not in KEPT_BACK
        )

    @property
    def is_due(self) -> bool:
        """Whether the deadline of this attempt has passed."""
        return self._parts.clock() > self.deadline

    @property
    def has_quorum(self) -> bool:
        """Whether enough sites have answered; metrics need none."""
        return self.is_metrics or len(self._payloads) >= self.study.quorum

    def announce(self) -> None:
        """Begin the next attempt, with a deadline of its own."""
        now = self._parts.clock()
        last = self._parts.store.rounds.last_attempt(self.digest)
        is_same_round = last is not None and last.round == self.round
        self.attempt = last.attempt + 1 if last is not None and is_same_round else 1
        self.deadline = now + timedelta(minutes=self.study.rounds.deadline_minutes)
        statement = Announcement(
            alliance=self.trust.membership.alliance,
            study=self.digest,
            round=self.round,
            attempt=self.attempt,
            parent=self.parent,
            adapter=self._adapter,
            membership=self.trust.membership.version,
            sites=self.sites,  # all that take part, also those that have answered already
            issued=stamp(now),
            deadline=stamp(self.deadline + timedelta(seconds=1)),
        )
        self.document, self._named = statement.signed(self._parts.key), self.sites
        self._parts.store.rounds.open_attempt(
            StoredAttempt(
                study=self.digest,
                round=self.round,
                attempt=self.attempt,
                announcement=self.document,
                adapter=statement.adapter,
                opened=now,
                deadline=self.deadline,
            )
        )
        self._announcements[digest_of(self.document)] = self.attempt
        self.declined.clear()
        self._parts.audit.append(
            "round_announced",
            study=self.digest,
            round=self.round,
            attempt=self.attempt,
            announcement=digest_of(self.document),
        )

    def receive(self, site: str, document: bytes, payload: bytes) -> str | None:
        """Take a site's answer; return None where it counts, else the code of why not.

        Args:
            site: the member whose Flower node sent it; the signature must be this site's.
            document: an ``Update`` or a ``Refusal``.
            payload: what belongs to it.

        Raises:
            StorageError: it cannot be kept: it does not count, and the site is told nothing.
        """
        try:
            keys = self.trust.keys(site)
            said = _read(document, keys)
        except ProtocolError:
            return self._refuse(site, "not_signed", payload, is_known=False)
        problem = self._check(site, said, payload)
        if problem is not None:
            return self._refuse(site, problem, payload)
        if isinstance(said, Refusal):
            self._codes[site] = said.code
            self.declined.add(site)
            self._keep_refusal(site, said.code, None)
            return said.code
        digest = digest_of(payload)
        if self._payloads.get(site) == digest:  # asked again, answered again
            self._receipt(site, digest, None)
            return None
        found = self._examine(site, payload)
        if isinstance(found, str):
            return self._refuse(site, found, payload)
        self._parts.objects.put(payload)
        update = StoredUpdate(
            study=self.digest,
            round=self.round,
            site=site,
            attempt=said.attempt,
            payload=digest,
            document=document,
            received=self._parts.clock(),
        )
        self._parts.audit.append(
            "update_counted",
            study=self.digest,
            round=self.round,
            attempt=said.attempt,
            site=site,
            payload=digest,
        )
        try:
            self._parts.store.updates.add_update(update, self._signed(site, digest, None))
        except DuplicateError:
            return self._refuse(site, "duplicate", payload)
        except LateError:
            return self._refuse(site, "late", payload)
        self._count(site, digest, found)
        self._codes.pop(site, None)
        self.declined.discard(site)
        return None

    def unusable(self, site: str, code: str) -> None:
        """Note an answer whose bytes could not be had: too large, or no message at all.

        There is no digest of them, so there can be no receipt; the record names the code.

        Raises:
            StorageError: it cannot be kept.
        """
        self._codes[site] = code
        self._log_refusal(site, code, None)

    def receive_late(self, site: str, document: bytes, payload: bytes) -> None:
        """Tell a site that its answer came after the round was closed.

        Raises:
            StorageError: it cannot be kept.
        """
        try:
            said = _read(document, self.trust.keys(site))
        except ProtocolError:
            return
        if self._payloads.get(site) == digest_of(payload):
            return  # asked twice, answered twice: it counts, and was told so
        if isinstance(said, Update) and self._check(site, said, payload) is None:
            self._refuse(site, "late", payload)

    def close(self) -> str:
        """Close the round for ever and return the digest of its record.

        Raises:
            AggregationError: fewer sites than the quorum were counted.
            StorageError: it cannot be written; the round is still open, and is to be made anew.
        """
        parts, now = self._parts, self._parts.clock()
        if self.is_metrics:
            state, self.result = self._kept, self._adapter
        else:
            combined = self._coordinator.combine(self._state)
            # The next adapter needs the room; where writing fails, the round is opened anew.
            self._state = replace(self._state, accumulator=mean.start(), given=())
            x = decode_state(parts.objects.get(self._kept))
            after = self._coordinator.step(replace(self._state, strategy=x), combined)
            del combined, x
            self.result = parts.objects.put(self._coordinator.announcement(after))
            state = parts.objects.put(encode_state(after.strategy))
        kept = {one.site: one for one in parts.store.updates.updates(self.digest, self.round)}
        record = Record(
            alliance=self.trust.membership.alliance,
            study=self.digest,
            round=self.round,
            attempt=self.attempt,
            parent=self.parent,
            adapter=self._adapter,
            counted=tuple(
                Counted(
                    site=site, payload=kept[site].payload, document=digest_of(kept[site].document)
                )
                for site in self.counted
            ),
            absent=tuple(
                Refused(site=site, code=self._why(site))
                for site in sorted(self.study.sites)
                if site not in self._payloads
            ),
            result=self.result,
            closed=stamp(now),
        )
        document = record.signed(parts.key)
        parts.audit.append(
            "round_committed",
            study=self.digest,
            round=self.round,
            attempt=self.attempt,
            record=digest_of(document),
            result=record.result,
        )
        parts.store.rounds.commit_record(
            StoredRecord(
                study=self.digest,
                round=self.round,
                attempt=self.attempt,
                parent=self.parent,
                document=document,
                adapter=record.result,
                strategy_state=state,
                committed=now,
            ),
            self.counted,
        )
        return digest_of(document)

    def _why(self, site: str) -> str:
        if site in self._codes:
            return self._codes[site]
        return "no_answer" if site in self.sites else "not_approved"

    def _take_again(self, update: StoredUpdate) -> None:
        """Count an update that an earlier process of this coordinator has kept."""
        found = self._examine(update.site, self._parts.objects.get(update.payload))
        if isinstance(found, str):
            raise DamagedError(f"the kept update of site {update.site!r} is {found} now")
        self._count(update.site, update.payload, found)

    def _count(self, site: str, payload: str, update: Message | None) -> None:
        if update is not None:
            self._state = self._coordinator.count(self._state, update)
        self._payloads[site] = payload

    def _examine(self, site: str, payload: bytes) -> Message | str | None:
        """Return an update that can count, None for metrics that can, or the code of why not."""
        if site in self._payloads:
            return "duplicate"
        if not self.is_metrics:
            update = self._coordinator.check(self._state, payload)
            return "wrong_site" if isinstance(update, Message) and update.site != site else update
        try:
            found = parse_metrics(payload, self.study)
        except ProtocolError:
            return "malformed"
        if found.site != site:
            return "wrong_site"
        return None if found.round == self.study.rounds.count else "wrong_round"

    def _check(self, site: str, said: Update | Refusal, payload: bytes) -> str | None:
        """Return why an answer is not one to this round."""
        if said.site != site:
            return "wrong_site"
        if said.alliance != self.trust.membership.alliance or said.study != self.digest:
            return "wrong_study"
        if said.round != self.round:
            return "wrong_round"
        if self._announcements.get(said.announcement) != said.attempt:
            return "wrong_announcement"
        if site not in self.sites:
            return "not_approved"
        if isinstance(said, Update) and said.payload != digest_of(payload):
            return "wrong_payload"
        return None

    def _refuse(self, site: str, code: str, payload: bytes, *, is_known: bool = True) -> str:
        digest = digest_of(payload)
        if is_known:
            self._codes[site] = code
        self._log_refusal(site, code, digest)
        self._receipt(site, digest, code)
        return code

    def _log_refusal(self, site: str, code: str, digest: str | None) -> None:
        self._parts.audit.append(
            "update_refused",
            study=self.digest,
            round=self.round,
            attempt=self.attempt,
            site=site,
            payload=digest,
            code=code,
        )
        self._keep_refusal(site, code, digest)

    def _keep_refusal(self, site: str, code: str, digest: str | None) -> None:
        self._parts.store.updates.add_refusal(
            StoredRefusal(
                study=self.digest,
                round=self.round,
                attempt=self.attempt,
                site=site,
                code=code,
                payload=digest,
                received=self._parts.clock(),
            )
        )

    def _receipt(self, site: str, payload: str, code: str | None) -> None:
        kept = self._parts.store.updates.receipt(self.digest, self.round, site, payload)
        own = [public_of(self._parts.key)]
        if kept is not None and Receipt.read(kept.document, own).code == code:
            return  # the same was told already
        document = self._signed(site, payload, code)
        self._parts.store.updates.add_receipt(self.digest, self.round, site, payload, document)

    def _signed(self, site: str, payload: str, code: str | None) -> bytes:
        receipt = Receipt(
            alliance=self.trust.membership.alliance,
            study=self.digest,
            round=self.round,
            attempt=self.attempt,
            site=site,
            payload=payload,
            code=code,
            issued=stamp(self._parts.clock()),
        )
        return receipt.signed(self._parts.key)


def _read(document: bytes, keys: Sequence[PublicKey]) -> Update | Refusal:
    """Return what a site says.

    Raises:
        ProtocolError: it is no such document, or not signed by the site.
    """
    if len(document) > MAX_DOCUMENT_BYTES:
        raise WireError(
            f"document has {len(document)} bytes, at most {MAX_DOCUMENT_BYTES} are allowed"
        )
    try:
        return Update.read(document, keys)
    except ProtocolError:
        return Refusal.read(document, keys)
