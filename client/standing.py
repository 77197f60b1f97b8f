"""A site's standing with the alliance: membership, offers, records, receipts, and being heard of.

Whatever the coordinator hands over is verified before it is kept, and each acceptance or refusal is
in the log before it has an effect.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from huizhen.client.alliance import Alliance, AllianceError, Offered, open_alliance
from huizhen.client.approvals import is_in_force
from huizhen.client.home import Home, StudyFolder
from huizhen.protocol.audit_checkpoints import COORDINATOR, claimed_checkpoint, same_statement
from huizhen.protocol.chain import Chain, ChainError
from huizhen.protocol.documents import PublicKey, public_key, public_of
from huizhen.protocol.errors import (
    ForkError,
    HuizhenError,
    PrivacyError,
    ProtocolError,
    StorageError,
)
from huizhen.protocol.statements import (
    Announcement,
    Head,
    Receipt,
    StudyOffer,
    Update,
    Withdrawal,
    digest_of,
    stamp,
)
from huizhen.protocol.trust import Trust, TrustError
from huizhen.storage.audit import AuditLog
from huizhen.storage.files import write_whole
from huizhen.storage.keys import load_key
from huizhen.storage.witness import WitnessBook

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def open_standing(home: Home, clock: Callable[[], datetime]) -> Iterator["Standing"]:
    """Give the standing of a site whose agent may be running beside.

    Raises:
        ConfigError: the site has not joined.
    """
    with AuditLog.open(home.audit, clock=clock) as audit, open_book(home) as book:
        yield Standing(home, audit, load_key(home.key("identity")), book, clock=clock)


def open_book(home: Home) -> WitnessBook:
    """Open the book of what this site has seen of others' logs, made if it is not there.

    Raises:
        StorageError: it cannot be written or read.
    """
    return WitnessBook.open(home.folder / "witnessed.sqlite")


class Standing:
    """What this site believes, moved forward by what the alliance service says."""

    def __init__(
        self,
        home: Home,
        audit: AuditLog,
        identity: Ed25519PrivateKey,
        book: WitnessBook,
        *,
        clock: Callable[[], datetime],
    ) -> None:
        """Read what was accepted before.

        Raises:
            ConfigError: the site has not joined.
            ProtocolError: what is kept here does not hang together.
        """
        self._home, self._audit, self._identity, self._clock = home, audit, identity, clock
        self._lock = threading.RLock()
        self._taking = threading.Lock()
        # around asking and keeping; whoever has _lock must not wait for it
        self.site = home.policy().site
        pins = home.pins()
        self.alliance = pins.alliance
        first, *later = [path.read_bytes() for path in home.memberships()]
        now = clock()
        self._trust = Trust.begin(first, alliance=pins.alliance, board=pins.board, now=now)
        for document in later:
            self._trust = self._trust.follow(document, now=now)
        self._shown = 0
        self._refused: set[tuple[str, ...]] = set()
        self._book = book

    @property
    def trust(self) -> Trust:
        """The newest membership that was accepted."""
        with self._lock:
            return self._trust

    def refresh(self, *, version: str, codes: Sequence[str]) -> None:
        """Report, say what could not be said before, and take what has changed.

        What fails of one offer, study or log is in the program's log, and all others go on.

        Raises:
            AllianceError: the coordinator cannot be reached, or this site is revoked.
        """
        with self._open() as alliance:
            witness: Sequence[str] = ()
            with _going_on("report"):
                studies = [(digest, "approved") for digest in self._approved()]
                notice = alliance.report(
                    version=version, codes=codes, time=stamp(self._clock()), studies=studies
                )
                witness = notice.witness
                if notice.membership > self.trust.membership.version:
                    self._follow(alliance)
            with _going_on("offers"):
                self._take_offers(alliance)
            for folder in self._home.studies():
                with _going_on(f"withdrawal {folder.digest[:12]}"):
                    self._tell_withdrawal(alliance, folder)
                with _going_on(f"records {folder.digest[:12]}"):
                    if folder.approval() is not None:
                        self._take_records(alliance, folder.digest)
            with _going_on("receipts"):
                self._take_receipts(alliance)
            with _going_on("own log"):
                self._show_log(alliance)
            for log in witness:
                with _going_on(f"log {log!r}"):
                    self._witness(alliance, log)

    def follow(self, version: int) -> None:
        """Fetch memberships up to a version that somebody has named.

        Raises:
            AllianceError: the coordinator cannot be reached, or refuses.
            TrustError: what came does not follow.
        """
        if version > self.trust.membership.version:
            with self._open() as alliance:
                self._follow(alliance)

    def offers(self) -> list[tuple[StudyOffer, Offered]]:
        """Return the studies that name this site, verified and kept.

        An offer that is refused, or that this version cannot read, is in the program's log alone.

        Raises:
            AllianceError: the coordinator cannot be reached, or refuses.
        """
        with self._open() as alliance:
            return self._take_offers(alliance)

    def submit(self, document: bytes) -> None:
        """Hand in an approval, a withdrawal or a rotation."""
        with self._open() as alliance:
            alliance.submit(document)

    def approve(
        self, folder: StudyFolder, document: bytes, *, cohort: str, epsilon_cap: float | None
    ) -> None:
        """Put a signed approval in force here, and hand it in.

        Raises:
            AllianceError: the coordinator cannot be reached, or refuses.
        """
        self.tell_withdrawal(folder)  # it comes first: told later, it would end this consent
        self._audit.append(
            "approval_given", study=folder.digest, cohort=cohort, epsilon_cap=epsilon_cap
        )
        folder.keep_approval(document)
        self.submit(document)

    def withdraw(self, folder: StudyFolder) -> None:
        """End this site's consent here; ``tell_withdrawal`` or the next ``refresh`` says so.

        Raises:
            StorageError: it cannot be written down.
        """
        self._audit.append("approval_withdrawn", study=folder.digest)
        folder.withdraw()
        said = Withdrawal(
            alliance=self.alliance,
            study=folder.digest,
            site=self.site,
            issued=stamp(self._clock()),
        )
        write_whole(_withdrawal(folder), said.signed(self._identity))

    def tell_withdrawal(self, folder: StudyFolder) -> None:
        """Hand in the withdrawal that is kept of a study, if there is one.

        Raises:
            AllianceError: the coordinator cannot be reached, or refuses; it stays kept.
        """
        if _withdrawal(folder).exists():
            with self._open() as alliance:
                self._tell_withdrawal(alliance, folder)

    def rotated(self, document: bytes, *, old: str, new: str) -> None:
        """Hand in the change of the identity key, and take the membership that has it."""
        self._audit.append("key_rotated", old=old, new=new)
        with self._open() as alliance:
            for folder in self._home.studies():  # the old key has signed them
                self._tell_withdrawal(alliance, folder)
            alliance.submit(document)
            self._follow(alliance)

    def catch_up(self, study: str) -> Chain:
        """Fetch the records that are missing here, and return how far the study has come.

        Raises:
            AllianceError: the coordinator cannot be reached, or refuses.
            ChainError: a record does not follow.
        """
        with self._open() as alliance:
            return self._take_records(alliance, study)

    def chain(self, study: str) -> Chain:
        """Return how far a study has come here.

        Raises:
            GovernanceError: the study is not known here.
        """
        folder = self._home.study(study)
        offer = folder.offer(self.trust)
        return folder.chain(Chain(alliance=self.alliance, study=study, result=offer.adapter))

    def accept(self, study: str, document: bytes, payload: bytes) -> Announcement:
        """Return an announcement that follows what was accepted of a study, and remember it.

        Records come in on another thread: nothing of them is lost between looking and keeping.

        Raises:
            ChainError: it does not follow.
        """
        with self._lock:
            after, asked = self.chain(study).check(
                document, payload, self._trust.coordinator, site=self.site, now=self._clock()
            )
            self.keep_chain(after)
        return asked

    def keep_chain(self, chain: Chain) -> None:
        """Keep how far a study has come."""
        with self._lock:
            self._home.study(chain.study).keep_chain(chain)

    def witnessed_ledger(self, cohort: str) -> Head | None:
        """Return the furthest head of a cohort's ledger that this site has signed in an update.

        The coordinator gives back the last update of each study, and cannot make one up. So a
        ledger that was restored from a backup is found out before it is charged, also by a study
        that spent nothing since. Which cohort a study is of, this site's log says.

        Raises:
            AllianceError: the coordinator cannot be reached, or refuses.
            PrivacyError: this site has signed an update of a study that its log does not know.
        """
        with self._open() as alliance:
            documents = alliance.last_updates()
        approved: dict[str, set[str]] = {}
        for entry in self._audit.entries():
            if entry.event == "approval_given":
                approved.setdefault(entry.facts["study"], set()).add(entry.facts["cohort"])
        last: Head | None = None
        for document in documents:
            update = Update.read(document, self.own_keys())
            if update.ledger is None:
                continue
            if update.study not in approved:
                raise PrivacyError(
                    f"this site has answered study {update.study[:12]}, which its log does not "
                    "know: the folder is an older copy, its ledger may lack what was spent"
                )
            is_ours = approved[update.study] == {cohort}  # approved for two, it tells of neither
            if is_ours and (last is None or update.ledger.size > last.size):
                last = update.ledger
        return last

    def own_keys(self) -> list[PublicKey]:
        """Return the keys that this site signs with, and those that it did before."""
        members = self.trust.membership.members
        former = [old for one in members if one.site == self.site for old in one.former]
        return [
            public_of(self._identity),
            *(public_key(bytes.fromhex(old.identity)) for old in former),
        ]

    @contextlib.contextmanager
    def _open(self) -> Iterator[Alliance]:
        terms = self._home.settings().coordinator
        with open_alliance(
            terms.service,
            ca=self._home.authority.read_bytes(),
            key=self._home.key("tls"),
            certificate=self._home.certificate,
        ) as alliance:
            yield alliance

    def _approved(self) -> list[str]:
        """Return the studies whose rounds people here have agreed to answer."""
        try:
            policy = self._home.policy()
        except HuizhenError:  # no round is answered before it can be read again
            return []
        keys, now = self.own_keys(), self._clock()
        return [
            one.digest
            for one in self._home.studies()
            if is_in_force(one.approval(), policy, keys, now)
        ]

    def _tell_withdrawal(self, alliance: Alliance, folder: StudyFolder) -> None:
        place = _withdrawal(folder)
        try:
            document = place.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"cannot read {str(place)!r}: {error.strerror}") from error
        alliance.submit(document)  # told twice is told once
        try:
            place.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot remove {str(place)!r}: {error.strerror}") from error

    def _follow(self, alliance: Alliance) -> None:
        with self._taking:
            for document in alliance.memberships(self.trust.membership.version):
                self._take_membership(document)

    def _take_membership(self, document: bytes) -> None:
        with self._lock:
            try:
                after = self._trust.follow(document, now=self._clock())
            except TrustError as error:
                self._note_refusal(
                    "membership_refused", document=digest_of(document), code=error.code
                )
                raise
            if after is self._trust:
                return
            number = after.membership.version
            self._audit.append("membership_accepted", version=number, document=digest_of(document))
            self._home.keep_membership(number, document)
            self._trust = after

    def _take_offers(self, alliance: Alliance) -> list[tuple[StudyOffer, Offered]]:
        found = []
        with self._taking:
            for offered in alliance.studies():
                with _going_on(f"offer {digest_of(offered.document)[:12]}"):
                    found.append((self._take_offer(offered.document), offered))
        return found

    def _take_offer(self, document: bytes) -> StudyOffer:
        offer = self.trust.offer(document)
        offer.agreed()
        if offer.alliance != self.alliance:
            raise ProtocolError("a study of another alliance is offered")
        folder = self._home.study(offer.digest)
        held = folder.offer_bytes()
        if held is None:
            self._audit.append("study_offered", study=offer.digest)
            folder.keep_offer(document)
        elif held != document:
            raise ProtocolError(f"study {offer.digest[:12]} is offered in other words now")
        return offer

    def _take_records(self, alliance: Alliance, study: str) -> Chain:
        with self._taking:
            chain = self.chain(study)
            for document in alliance.records(study, chain.round):
                chain = self._take_record(study, document)
        return chain

    def _take_record(self, study: str, document: bytes) -> Chain:
        with self._lock:
            chain = self.chain(study)
            try:
                after = chain.accept_record(document, self._trust.coordinator)
            except ChainError as error:
                self._note_refusal("record_refused", record=digest_of(document), code=error.code)
                raise
            if after != chain:
                self._audit.append(
                    "record_accepted", study=study, round=after.round, record=after.record
                )
                self._home.study(study).keep_record(after.round, document)
                self.keep_chain(after)
        return after

    def _take_receipts(self, alliance: Alliance) -> None:
        for number, document in alliance.receipts("", self._home.last_receipt()):
            receipt = Receipt.read(document, self.trust.coordinator)
            if receipt.site != self.site:
                raise ProtocolError("a receipt of another site came")
            self._audit.append(
                "receipt_received",
                study=receipt.study,
                round=receipt.round,
                payload=receipt.payload,
                code=receipt.code,
            )
            self._home.keep_last_receipt(number)

    def _show_log(self, alliance: Alliance) -> None:
        """Have the own log's head countersigned, and take what the other witnesses have signed."""
        held = self._audit.witnessed()
        if held is None or held.head.size < self._audit.head().size:
            checkpoint = self._audit.checkpoint(self._identity)
            proof = [] if held is None else self._audit.proof(held.head.size)
            document = alliance.witness(checkpoint, proof)
            seen = self._audit.countersigned(document, self.trust.coordinator)
            if not same_statement(seen, checkpoint):  # it had seen more than is remembered here
                proof = self._audit.proof(claimed_checkpoint(seen).size)
                document = alliance.witness(checkpoint, proof)
                self._audit.countersigned(document, self.trust.coordinator)
        others = [
            key
            for member in self.trust.active
            if member.site != self.site
            for key in self.trust.keys(member.site)
        ]
        for document, _ in alliance.heads(self.site, self._shown):
            with contextlib.suppress(ProtocolError):  # no other site has signed it yet
                self._audit.countersigned(document, others)
                self._shown = max(self._shown, claimed_checkpoint(document).size - 1)

    def _witness(self, alliance: Alliance, log: str) -> None:
        """Countersign how another party's log went on."""
        trust = self.trust
        owner = trust.coordinator if log == COORDINATOR else trust.keys(log)
        last = self._book.last(log)
        after = 0 if last is None else claimed_checkpoint(last).size
        for checkpoint, proof in alliance.heads(log, after):
            try:
                seen = self._book.see(
                    checkpoint,
                    proof,
                    alliance=self.alliance,
                    log=log,
                    owner=owner,
                    key=self._identity,
                )
            except ForkError:
                self._note_refusal("witness_refused", log=log, code="fork")
                raise
            if seen.outcome == "signed":
                alliance.countersigned(seen.document)

    def _note_refusal(self, event: str, **facts: Any) -> None:
        """Put a refusal into the log, once while this runs: it comes again at each refresh."""
        refusal = (event, *facts.values())
        if refusal not in self._refused:
            self._audit.append(event, **facts)
            self._refused.add(refusal)


@contextlib.contextmanager
def _going_on(what: str) -> Iterator[None]:
    """Let the rest be done although one thing fails, unless all else would fail as well."""
    try:
        yield
    except HuizhenError as error:
        if isinstance(error, AllianceError) and error.code in ("unreachable", "revoked"):
            raise
        logger.warning("not taken: what=%s %s", what, error)


def _withdrawal(folder: StudyFolder) -> Path:
    """Where a withdrawal is kept until the coordinator has taken it."""
    return folder.folder / "withdrawal.json"
