"""One study at one hospital while the agent runs: its worker and its ledger, kept warm."""

import hashlib
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from huizhen.client.frames import CohortRecords, Start
from huizhen.client.governance import SitePolicy
from huizhen.client.home import Home, Settings
from huizhen.client.ledger import Ledger
from huizhen.client.outbox import Envelope, Outbox
from huizhen.client.policy import Policy
from huizhen.client.sandbox import Walls
from huizhen.client.site import HELD_OUT, Site
from huizhen.client.situation import LedgerView, Offered
from huizhen.client.worker_trainer import WorkerTrainer
from huizhen.protocol.errors import ConfigError, ReleaseLostError, StorageError
from huizhen.protocol.ledger_entries import Head
from huizhen.protocol.statements import Head as WitnessedHead
from huizhen.protocol.statements import StudyOffer
from huizhen.protocol.study import Study
from huizhen.storage.files import write_whole


def open_ledger(
    home: Home,
    policy: Policy,
    cohort: str,
    witnessed: WitnessedHead | None,
    clock: Callable[[], datetime],
) -> Ledger:
    """Open a cohort's ledger, which must hold what others have seen of it.

    Raises:
        ConfigError: there is none.
        PrivacyError: it is an older copy, or its chain is broken.
        StorageError: it cannot be read.
    """
    seen = None if witnessed is None else Head(witnessed.size, witnessed.root)
    return Ledger.open(policy.ledger_file(home.folder, cohort), witnessed=seen, clock=clock)


def ledger_view(ledger: Ledger, offered: Offered) -> LedgerView | None:
    """Return what a ledger says about a study; None where it has no unit of privacy."""
    if offered.mechanism is None:
        return None
    totals = ledger.totals()
    is_closed = any(one.study == offered.digest and one.is_closed for one in totals.studies)
    would_exceed = not is_closed and ledger.would_exceed(
        offered.digest, offered.mechanism.per_round, offered.study.rounds.count
    )
    return LedgerView.of(totals, offered.digest, would_exceed=would_exceed)


class TrainingSite:
    """The warm parts of one study. ``with`` ends its worker."""

    def __init__(
        self,
        home: Home,
        policy: Policy,
        offer: StudyOffer,
        cohort: str,
        *,
        ledger: Ledger | None,
        walls: Walls,
    ) -> None:
        """Prepare; nothing is started.

        Args:
            home: the site's folder.
            policy: the site's.
            offer: the study.
            cohort: on whose records it trains.
            ledger: of the cohort, which ``close`` lets go of; None without a unit of privacy.
            walls: around the worker.

        Raises:
            ConfigError: a setting is wrong, or a hidden file lies where the worker reads.
        """
        self.study: Study = offer.agreed()
        self.digest, self.cohort = offer.digest, cohort
        self._home, self._policy = home, policy
        self.ledger = ledger
        self._site: Site | None = None
        self._outbox = Outbox(home.folder / "outbox")
        settings = home.settings()
        terms, folder = settings.worker, home.folder
        base = self.study.base
        held_out = settings.records.held_out.get(cohort)
        train = policy.data_file(folder, cohort)
        measure = None if held_out is None else folder / held_out
        self._has_held_out = measure is not None
        self.worker = WorkerTrainer(
            self.study,
            Start(
                site=policy.site,
                home=str(Path(terms.bases or folder.parent).absolute()),
                base=None if base is None else base.name,
                patient=settings.records.patient,
                policy=SitePolicy(
                    site=policy.site,
                    # Compared with the true number; the policy's, with the public one alone.
                    minimum_patients=settings.records.minimum_patients,
                    allowed_fields=settings.records.allowed_fields or None,
                    withheld_fields=settings.records.withheld_fields,
                ),
                memory_mib=terms.memory_mib,
                threads=terms.threads,
                checkpointing=terms.checkpointing,
            ),
            lambda: _records(train, measure),
            log=home.run / f"worker-{self.digest[:12]}.log",
            hidden=[folder, *_files_of_cohorts(policy, settings, folder)],
            walls=walls,
        )

    def may_measure(self) -> bool:
        """Tell whether metrics can leave: from settings and ledger alone, no record is looked at.

        Raises:
            PrivacyError: the ledger was replaced.
            StorageError: it cannot be read.
        """
        ledger, last = self.ledger, self.study.rounds.count
        is_answered = ledger is not None and ledger.answered(self.digest, last) is not None
        return self._has_held_out and is_answered

    def has_answered(self, announcement: bytes, round: int) -> bool:
        """Tell whether the bytes that answer are fixed, so that nothing is trained for them.

        Raises:
            PrivacyError: the ledger was replaced.
            StorageError: it cannot be read.
        """
        if self.ledger is None:
            return self._kept_plain(announcement, round) is not None
        if round > self.study.rounds.count:
            return self.ledger.released(self.digest, HELD_OUT) is not None
        return self.ledger.answered(self.digest, round) is not None

    def join(self) -> Site:
        """Return the site; the first time its worker starts and its rounds are set aside.

        Raises:
            HuizhenError: as ``Site`` says.
        """
        if self._site is None:
            self._site = Site(self._policy.site, self.study, self.worker, ledger=self.ledger)
            if self.ledger is None and (note := self._note()) is not None:
                self._site.kept = self._site.own_of(self._outbox.own(self.digest, note["update"]))
        return self._site

    def answer(self, announcement: bytes, round: int) -> bytes:
        """Return the bytes that answer an announced adapter; asked again, the same.

        Args:
            announcement: the adapter, in the wire format.
            round: 1 is the first; the one past the last asks for metrics.

        Raises:
            HuizhenError: as ``Site`` says.
        """
        if (kept := self._kept_plain(announcement, round)) is not None:
            return kept
        site = self.join()
        if round > self.study.rounds.count:
            return site.release_metrics(announcement)
        envelope, _ = site.answer(announcement, round)
        if self.ledger is None:
            self._keep_plain(envelope, announcement, round, site.own_bytes(site.kept, round))
        return envelope.data

    def close(self) -> None:
        """End the worker and let go of the ledger."""
        self.worker.close()
        if self.ledger is not None:
            self.ledger.shut()

    def _kept_plain(self, announcement: bytes, round: int) -> bytes | None:
        """Return what answered this before, in a study without a ledger to remember it."""
        if self.study.is_private:
            return None
        note = self._note()
        if note is None or (note["round"], note["announcement"]) != (round, _digest(announcement)):
            return None
        try:
            return self._outbox.kept(self.digest, note["update"]).data
        except (ReleaseLostError, StorageError):
            return None  # it is trained again, which costs no privacy here

    def _note(self) -> dict[str, Any] | None:
        """Return what was noted of the last answer in a study without a ledger, if it is there."""
        try:
            note = json.loads((self._outbox.folder / self.digest / "answer.json").read_bytes())
            return {key: note[key] for key in ("round", "announcement", "update")}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _keep_plain(
        self, envelope: Envelope, announcement: bytes, round: int, own: bytes | None
    ) -> None:
        with self._outbox.alone(self.digest):
            if own is not None:
                self._outbox.keep_own(self.digest, envelope, own)
            self._outbox.keep(self.digest, envelope)
            update = _digest(envelope.data)
            note = {"round": round, "announcement": _digest(announcement), "update": update}
            write_whole(
                self._outbox.folder / self.digest / "answer.json", json.dumps(note).encode()
            )
            self._outbox.forget_others(self.digest, update)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _files_of_cohorts(policy: Policy, settings: Settings, folder: Path) -> Iterator[Path]:
    """Give every cohort's files, which may lie outside of the site's folder."""
    for cohort in policy.cohorts:
        yield policy.data_file(folder, cohort)
        yield policy.ledger_file(folder, cohort)
    yield from (folder / name for name in settings.records.held_out.values())


def _records(train: Path, held_out: Path | None) -> CohortRecords:
    """Read a cohort's records for the worker; they are not kept here."""
    try:
        return CohortRecords(
            train=train.read_bytes(), held_out=None if held_out is None else held_out.read_bytes()
        )
    except OSError as error:
        raise ConfigError(f"cannot read records {error.filename!r}: {error.strerror}") from error
