"""How a site answers one message: verify, decide, train, sign; each step is logged before the next.

    document ─► trust ─► chain ─► decide ─► worker ─► outbox ─► signed Update
                   └──────┴─────────┴──────────┴───► signed Refusal with a code

What cannot be verified gets no answer at all: whoever sent it is not the coordinator.

A code that leaves depends on no record. So whatever goes wrong from the moment on that the records
are touched, and whatever is wrong with this machine, leaves as ``cannot_train``; which of them it
was, the agent's log says, and the audit log where something was trained.
"""

import contextlib
import logging
import threading
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from huizhen.client.alliance import AllianceError
from huizhen.client.approvals import read_approval
from huizhen.client.decision import decide
from huizhen.client.home import Home
from huizhen.client.ledger import Ledger
from huizhen.client.policy import Policy
from huizhen.client.sandbox import Walls
from huizhen.client.situation import Offered, Refused, SignedApproval, Situation
from huizhen.client.standing import Standing
from huizhen.client.trainer import TrainerError
from huizhen.client.training_site import TrainingSite, ledger_view, open_ledger
from huizhen.protocol.chain import ChainError
from huizhen.protocol.documents import claimed
from huizhen.protocol.errors import (
    BudgetExhaustedError,
    ConfigError,
    GovernanceError,
    HuizhenError,
    PrivacyError,
    ProtocolError,
    ReleaseLostError,
    StorageError,
)
from huizhen.protocol.statements import (
    Announcement,
    Head,
    Refusal,
    StudyOffer,
    Update,
    digest_of,
    moment,
)
from huizhen.protocol.wire import declared_values
from huizhen.storage.audit import AuditLog
from huizhen.strategies.scaffold import CONTROL

MAX_DOCUMENT_BYTES = 1 << 20
CANNOT_TRAIN = "cannot_train"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """What leaves."""

    document: bytes
    payload: bytes = b""


class _RefusalError(HuizhenError):
    """This site does not answer; ``code`` may leave, the text may not."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Answering:
    """Answers the coordinator's messages, one at a time."""

    def __init__(
        self,
        home: Home,
        audit: AuditLog,
        identity: Ed25519PrivateKey,
        standing: Standing,
        *,
        walls: Walls,
        clock: Callable[[], datetime],
    ) -> None:
        """Prepare; no worker is started."""
        self._home, self._audit, self._identity = home, audit, identity
        self._standing, self._walls, self._clock = standing, walls, clock
        self._site: TrainingSite | None = None
        self._warm_for: tuple[str, str, str] | None = None
        # study, policy and cohort of the site that is kept
        self._is_stopped = threading.Event()
        entries = audit.entries()
        self._begun = [
            (moment(one.time), str(one.facts["study"]), int(one.facts["round"]))
            for one in entries
            if one.event == "training_started"
        ]
        policies = [one.facts["policy"] for one in entries if one.event == "policy_changed"]
        self._logged_policy = policies[-1] if policies else None

    def log_policy(self, policy: Policy) -> None:
        """Have the log name the policy that is in force before it decides anything.

        Raises:
            StorageError: the log cannot be written.
        """
        if (digest := policy.digest()) != self._logged_policy:
            self._audit.append("policy_changed", policy=digest)
            self._logged_policy = digest

    def answer(self, document: bytes, payload: bytes) -> Answer | None:
        """Return the answer to a message; None where it deserves none.

        Raises:
            StorageError: the log or the ledger cannot be written: nothing may leave.
        """
        asked: Announcement | None = None
        try:
            asked = self._verify(document, payload)
            site = self._decided(asked, payload)
            data = self._train(asked, document, site, payload)
            self._look_again(asked)
            return self._update(asked, document, site, data)
        except StorageError:
            raise
        except _RefusalError as refusal:
            if asked is not None:
                logger.warning("refused: code=%s %s", refusal.code, refusal)
                return self._refuse(asked, document, refusal.code)
            logger.warning("not verified: code=%s %s", refusal.code, refusal)
            if refusal.code != "alliance_unreachable":
                return None
            return self._refuse_unverified(document, refusal.code)  # it will be asked again
        except ChainError as error:
            logger.warning("refused: code=%s %s", error.code, error)
            return self._refuse_unverified(document, error.code)
        except Exception as error:  # noqa: BLE001  # one message must not end the agent
            logger.error("failed: %s", _said(error))
            return None if asked is None else self._refuse(asked, document, "failed")

    def stop(self) -> None:
        """End what trains, from any thread; nothing is answered any more."""
        self._is_stopped.set()
        if (site := self._site) is not None:
            site.worker.stop()

    def close(self) -> None:
        """End the worker."""
        if self._site is not None:
            self._site.close()
            self._site = None

    def _verify(self, document: bytes, payload: bytes) -> Announcement:
        """Return an announcement that is the coordinator's and follows what was accepted.

        Raises:
            _RefusalError: it is not the coordinator's.
            ChainError: it does not follow.
        """
        if len(document) > MAX_DOCUMENT_BYTES:
            raise _RefusalError("malformed", f"document has {len(document)} bytes")
        standing = self._standing
        try:
            body = claimed(document)
            study, version = str(body.get("study")), body.get("membership")
            if isinstance(version, int) and version > standing.trust.membership.version:
                standing.follow(version)
            asked = Announcement.read(document, standing.trust.coordinator)
            try:
                chain = standing.chain(study)
            except GovernanceError:
                standing.offers()
                chain = standing.chain(study)
            if chain.round + 1 < asked.round or chain.parent != asked.parent:
                with contextlib.suppress(AllianceError, ChainError):
                    standing.catch_up(study)
        except AllianceError as error:
            raise _RefusalError("alliance_unreachable", str(error)) from error
        except ChainError:
            raise
        except (ProtocolError, GovernanceError) as error:
            self._audit.append(
                "announcement_refused",
                study=None,
                round=None,
                attempt=None,
                announcement=digest_of(document),
                code="not_verified",
            )
            raise _RefusalError("not_verified", str(error)) from error
        # Kept before it is answered: an older attempt is refused from now on.
        return standing.accept(study, document, payload)

    def _train(
        self, asked: Announcement, document: bytes, site: TrainingSite, payload: bytes
    ) -> bytes:
        """Return the bytes that answer, paid for and in the log.

        Raises:
            _RefusalError: the ledger or the worker says no.
            StorageError: the log or the ledger cannot be written.
        """
        name = {"study": asked.study, "round": asked.round, "attempt": asked.attempt}
        self._audit.append("announcement_accepted", **name, announcement=digest_of(document))
        trains = not site.has_answered(payload, asked.round)
        if trains:
            self._audit.append("training_started", **name)
            self._begun.append((self._clock(), asked.study, asked.round))
        try:
            if trains:
                with self._booked("ledger_reserved", site.ledger, study=asked.study):
                    site.join()
            booked = {"study": asked.study, "round": asked.round}
            with self._booked("ledger_charged", site.ledger, **booked):
                data = site.answer(payload, asked.round)
        except StorageError:
            raise
        except Exception as error:  # of whatever kind, it may be of a record
            if trains:
                self._audit.append("training_ended", **name, code=_code_of(error))
            raise _refusal(error, _TOLD_OF_TRAINING) from error
        if trains:
            self._audit.append("training_ended", **name, code=None)
        return data

    @contextlib.contextmanager
    def _booked(self, event: str, ledger: Ledger | None, **facts: Any) -> Iterator[None]:
        """Log where the ledger has come if it went on meanwhile, however that ended."""
        if ledger is None:
            yield
            return
        before = _head(ledger)
        try:
            yield
        finally:
            if (after := _head(ledger)) != before:
                self._audit.append(event, **facts, ledger=after)

    def _look_again(self, asked: Announcement) -> None:
        """Refuse to let out what people have paused or withdrawn while it was trained.

        The bytes stay in the outbox, paid for.

        Raises:
            _RefusalError: they have.
        """
        if self._home.paused.exists():
            raise _RefusalError("paused", "the site was paused meanwhile: resume it to go on")
        if self._home.study(asked.study).approval() is None:
            raise _RefusalError("not_approved", "the approval was withdrawn meanwhile")

    def _decided(self, asked: Announcement, payload: bytes) -> TrainingSite:
        """Return what trains the study, if policy, approval and ledger allow this round.

        Raises:
            _RefusalError: they do not.
        """
        home = self._home
        try:
            policy = home.policy()
            self.log_policy(policy)
            offer = home.study(asked.study).offer(self._standing.trust)
            offered, approval = Offered.of(offer), self._approval(policy, asked.study)
            site = self._warm(policy, offer, approval)
            situation = Situation(
                now=self._clock(),
                is_stopped=policy.is_stopped(home.folder) or self._is_stopped.is_set(),
                is_paused=home.paused.exists(),
                walls=self._walls.level,
                rounds_today=self._rounds_today(policy, asked),
                parameters=declared_values(payload, without=CONTROL),
            )
            ledger = None if site is None else site.ledger
            view = None if ledger is None else ledger_view(ledger, offered)
            decision = decide(policy, offered, approval, view, asked, situation)
            is_metrics = asked.round > offered.study.rounds.count
            keeps_back = is_metrics and site is not None and not site.may_measure()
        except AllianceError as error:
            raise _RefusalError("alliance_unreachable", str(error)) from error
        except StorageError:
            raise
        except HuizhenError as error:
            raise _refusal(error, _TOLD_OF_DECISION) from error
        if isinstance(decision, Refused):
            raise _RefusalError(decision.code, decision.line)
        if keeps_back:
            raise _RefusalError(
                "metrics_not_allowed",
                "metrics are asked, site.toml names no [records] held_out file of the cohort, or "
                "the last round is not answered here",
            )
        if site is None:
            raise _RefusalError("cohort_unknown", "the approval's cohort is not in policy.toml")
        return site

    def _update(
        self, asked: Announcement, document: bytes, site: TrainingSite, data: bytes
    ) -> Answer:
        ledger = site.ledger
        update = Update(
            alliance=asked.alliance,
            study=asked.study,
            round=asked.round,
            attempt=asked.attempt,
            site=self._standing.site,
            announcement=digest_of(document),
            payload=digest_of(data),
            ledger=None if ledger is None else _head(ledger),
        )
        is_metrics = asked.round > site.study.rounds.count
        self._audit.append(
            "metrics_sent" if is_metrics else "update_sent",
            study=asked.study,
            round=asked.round,
            attempt=asked.attempt,
            payload=update.payload,
            bytes=len(data),
        )
        return Answer(update.signed(self._identity), data)

    def _refuse(self, asked: Announcement, document: bytes, code: str) -> Answer:
        self._audit.append(
            "announcement_refused",
            study=asked.study,
            round=asked.round,
            attempt=asked.attempt,
            announcement=digest_of(document),
            code=code,
        )
        refusal = Refusal(
            alliance=asked.alliance,
            study=asked.study,
            round=asked.round,
            attempt=asked.attempt,
            site=self._standing.site,
            announcement=digest_of(document),
            code=code,
        )
        return Answer(refusal.signed(self._identity))

    def _refuse_unverified(self, document: bytes, code: str) -> Answer | None:
        """Say why an announcement of the coordinator's does not follow here."""
        try:
            asked = Announcement.read(document, self._standing.trust.coordinator)
        except ProtocolError:
            return None
        return self._refuse(asked, document, code)

    def _approval(self, policy: Policy, study: str) -> SignedApproval | None:
        data = self._home.study(study).approval()
        if data is None:
            return None
        own, *former = self._standing.own_keys()
        for key in former:  # a consent from before the identity key was replaced still stands
            with contextlib.suppress(ProtocolError):
                signed = read_approval(data, policy, key)
                if signed.is_signed_by_site:
                    return signed
        return read_approval(data, policy, own)

    def _warm(
        self, policy: Policy, offer: StudyOffer, approval: SignedApproval | None
    ) -> TrainingSite | None:
        """Return the study's site, kept from the last round where it can be."""
        if approval is None or approval.approval.cohort not in policy.cohorts:
            return None
        cohort, key = approval.approval.cohort, (offer.digest, policy.digest())
        if self._site is not None and self._warm_for == (*key, cohort):
            return self._site
        self.close()
        ledger = None
        place = policy.ledger_file(self._home.folder, cohort)
        if offer.agreed().is_private and place.exists():  # without one, the decision says so
            seen = self._standing.witnessed_ledger(cohort)
            ledger = open_ledger(self._home, policy, cohort, seen, self._clock)
        self._site = TrainingSite(
            self._home, policy, offer, cohort, ledger=ledger, walls=self._walls
        )
        self._warm_for = (*key, cohort)
        return self._site

    def _rounds_today(self, policy: Policy, asked: Announcement) -> int:
        """Return how many rounds began today, this one apart."""
        begin = policy.schedule.day_begins(self._clock())
        today = {(study, round) for time, study, round in self._begun if time >= begin}
        return len(today - {(asked.study, asked.round)})


_CODES: dict[type[HuizhenError], str] = {
    BudgetExhaustedError: "ledger_would_pass",
    ReleaseLostError: "release_lost",
    PrivacyError: "privacy",
    ConfigError: "site_misconfigured",
    ProtocolError: "not_verified",
    GovernanceError: "not_verified",
}


_TOLD_OF_DECISION = frozenset({"ledger_would_pass", "privacy", "not_verified"})
_TOLD_OF_TRAINING = frozenset({"ledger_would_pass", "release_lost"})
# what the ledger, the outbox and the documents alone decide


def _refusal(error: Exception, told: Collection[str]) -> _RefusalError:
    """Return the refusal that an error makes; a code that is not ``told`` stays at the site."""
    code = _code_of(error)
    return _RefusalError(code if code in told else CANNOT_TRAIN, f"exact={code} {_said(error)}")


def _said(error: Exception) -> str:
    """Return what a log may say: our own errors show no record, of others only type and place."""
    if isinstance(error, HuizhenError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    places = " < ".join(f"{Path(one.filename).name}:{one.lineno}" for one in reversed(frames))
    return f"type={type(error).__name__} at={places}"


def _code_of(error: Exception) -> str:
    """Return the code of an error, for the site's own logs."""
    if isinstance(error, TrainerError):
        return error.code.value
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), "failed")


def _head(ledger: Ledger) -> Head:
    found = ledger.head()
    return Head(size=found.sequence, root=found.digest)
