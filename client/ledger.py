"""The site's privacy ledger on disk: a SQLite file that only grows, charged before any gradient.

What is charged is on the disk before ``charge`` returns (write-ahead log, synchronous FULL), and a
charge is made before the first gradient of its round. So a crash at any moment leaves a ledger that
says at least what was spent. Checking and appending are one transaction that excludes every other
writer: two processes at once cannot overdraw. ``protocol/ledger.py`` has the rules.

The file guards itself against accidents: triggers refuse to change or delete an entry, and the
whole chain is read again when it is opened. Against a restored copy or a rewritten chain it needs a
witness: somebody else who keeps its ``head()``. An open ledger is for one thread.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from huizhen.client.ledger_file import check, connect, create, identity, read, storage
from huizhen.protocol.accounting import Spend
from huizhen.protocol.errors import PrivacyError
from huizhen.protocol.ledger import Account, check_witnessed, replay
from huizhen.protocol.ledger_entries import (
    Answered,
    Body,
    Cap,
    CapChanged,
    Charged,
    Closed,
    Entry,
    Head,
    MetricsCharged,
    MetricsReleased,
    Opened,
    Reserved,
    Unit,
    make_entry,
)
from huizhen.protocol.ledger_statement import Totals, export, totals

Clock = Callable[[], datetime]


def _now() -> datetime:
    return datetime.now(UTC)


class Ledger:
    """One cohort's ledger, open. ``with`` lets go of the file at the end."""

    def __init__(self, path: Path, *, clock: Clock, threads: bool = False) -> None:
        """Open the file and read nothing; ``create`` and ``open`` are for everybody else."""
        self.path, self._clock, self._identity = path, clock, identity(path)
        self._database = connect(path, threads=threads)
        self._account: Account

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        site: str,
        cohort: str,
        cap: Cap,
        unit: Unit = "patient",
        clock: Clock = _now,
        threads: bool = False,
    ) -> "Ledger":
        """Make a cohort's ledger and open it.

        Args:
            path: the file, which must not exist; its folder is made for its owner alone.
            site: the hospital's name.
            cohort: the name of a set of patients.
            cap: what the hospital lets all studies on them spend.
            unit: of privacy, for all studies that will be booked here.
            clock: gives the present time, with a zone.
            threads: whether several threads use it, one at a time.

        Raises:
            ConfigError: the file exists, or others may enter its folder.
            PrivacyError: a name has other characters than allowed.
            StorageError: it cannot be written.
        """
        first = make_entry(Opened(site=site, cohort=cohort, unit=unit, cap=cap), clock(), None)
        create(path, first)
        return cls.open(path, clock=clock, threads=threads)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        witnessed: Head | None = None,
        clock: Clock = _now,
        threads: bool = False,
    ) -> "Ledger":
        """Open a ledger after reading its whole chain.

        Args:
            path: the file.
            witnessed: an entry that somebody else has seen, which the ledger must hold.
            clock: gives the present time, with a zone.
            threads: whether several threads use it, one at a time.

        Raises:
            ConfigError: there is no ledger, a newer version wrote it, or others may read it.
            PrivacyError: the chain is broken, or this is an older copy; names the first bad entry.
            StorageError: the file is damaged or cannot be read.
        """
        ledger = cls(path, clock=clock, threads=threads)
        try:
            check(ledger._database, path)
            ledger._account = replay(read(ledger._database, path, 1))
            if witnessed is not None:
                check_witnessed(ledger._account, witnessed)
        except BaseException:
            ledger.shut()
            raise
        return ledger

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shut()

    @property
    def unit(self) -> Unit:
        """What one spend is about; a study of another unit must not be booked here."""
        return self._account.unit

    @property
    def site(self) -> str:
        """The hospital whose ledger it is."""
        return self._account.site

    @property
    def cap(self) -> Cap:
        """What the hospital lets all studies spend now."""
        self._refresh()
        return self._account.cap

    def shut(self) -> None:
        """Let go of the file."""
        self._database.close()

    def reserve(self, study_digest: str, spend_per_round: Spend, rounds: int) -> Entry:
        """Set aside what a study may spend at most, and return the entry; asking again is free.

        Args:
            study_digest: of the study that the hospital approved.
            spend_per_round: the mechanism of one round, for one unit of privacy.
            rounds: the most that the site will take part in.

        Raises:
            BudgetExhaustedError: the cap does not cover it beside all that is charged or reserved.
            PrivacyError: the study is closed or has reserved other terms, or the clock went back.
            StorageError: the file cannot be written, or another process holds it.
        """
        return self._append(Reserved(study=study_digest, spend=spend_per_round, rounds=rounds))

    def would_exceed(self, study_digest: str, spend_per_round: Spend, rounds: int) -> bool:
        """Return whether ``reserve`` would pass the cap; nothing is written.

        Raises:
            PrivacyError: the study is closed or has reserved other terms.
        """
        asked = Reserved(study=study_digest, spend=spend_per_round, rounds=rounds)
        self._refresh()
        return self._account.written(asked) is None and self._account.exceeds(asked)

    def charge(self, study_digest: str, round: int) -> Entry:
        """Pay for a round and return the entry; it is on the disk when this returns.

        Call it before the first gradient. The latest charged round may be charged again for a retry
        after a crash, which writes nothing, until it is answered: train it with fresh noise.

        Raises:
            BudgetExhaustedError: all reserved rounds are charged, or the cap was lowered.
            PrivacyError: nothing is reserved, the study is closed, the round is answered or before
                one that is charged, or the clock went back.
            StorageError: the file cannot be written, or another process holds it.
        """
        return self._append(Charged(study=study_digest, round=round))

    def answer(self, study_digest: str, round: int, announcement: bytes, update: bytes) -> Entry:
        """State what answers a charged round, before it leaves; no other update will.

        Args:
            study_digest: of the study.
            round: the one charged last.
            announcement: the bytes that asked.
            update: the bytes that answer, kept on the disk already.

        Raises:
            PrivacyError: the round is answered, or not the last one charged, or the study is
                closed.
            StorageError: the file cannot be written, or another process holds it.
        """
        return self._append(
            Answered(
                study=study_digest,
                round=round,
                announcement=hashlib.sha256(announcement).hexdigest(),
                update=hashlib.sha256(update).hexdigest(),
            )
        )

    def answered(self, study_digest: str, round: int) -> Answered | None:
        """Return what answers a round; None if nothing has been allowed to leave for it."""
        self._refresh()
        study = self._account.studies.get(study_digest)
        return None if study is None else study.answers.get(round)

    def charge_metrics(self, study_digest: str, name: str, epsilon: float) -> Entry:
        """Pay for one release of noised counts and return the entry, before the noise is drawn.

        A study pays once for a name: keep what was drawn, and send the same bytes again.

        Raises:
            BudgetExhaustedError: the cap's ``metrics_epsilon`` does not cover it.
            ReleaseLostError: the name is charged already.
            PrivacyError: nothing is reserved, the study is closed, or the clock went back.
            StorageError: the file cannot be written, or another process holds it.
        """
        return self._append(MetricsCharged(study=study_digest, name=name, epsilon=epsilon))

    def release_metrics(
        self, study_digest: str, name: str, announcement: bytes, metrics: bytes
    ) -> Entry:
        """State which bytes the charged metrics are, before they leave; no others will.

        Raises:
            PrivacyError: the metrics were not charged, or left already, or the study is closed.
            StorageError: the file cannot be written, or another process holds it.
        """
        return self._append(
            MetricsReleased(
                study=study_digest,
                name=name,
                announcement=hashlib.sha256(announcement).hexdigest(),
                metrics=hashlib.sha256(metrics).hexdigest(),
            )
        )

    def released(self, study_digest: str, name: str) -> MetricsReleased | None:
        """Return what left as metrics of a name; None if nothing may leave yet."""
        self._refresh()
        study = self._account.studies.get(study_digest)
        return None if study is None else study.releases.get(name)

    def last_answer(self, study_digest: str) -> Answered | None:
        """Return what answers the latest answered round of a study."""
        self._refresh()
        study = self._account.studies.get(study_digest)
        return None if study is None else next(reversed(study.answers.values()), None)

    def close(self, study_digest: str) -> Entry:
        """End a study and return the entry: what it reserved and did not charge is free again.

        Raises:
            PrivacyError: nothing is reserved for it, or the clock went back.
            StorageError: the file cannot be written, or another process holds it.
        """
        return self._append(Closed(study=study_digest))

    def change_cap(self, cap: Cap) -> Entry:
        """Put another cap in force from now on and return the entry; nothing spent is undone.

        Raises:
            PrivacyError: the clock went back.
            StorageError: the file cannot be written, or another process holds it.
        """
        return self._append(CapChanged(cap=cap))

    def head(self) -> Head:
        """Return the last entry, for a witness to keep."""
        self._refresh()
        return self._account.head

    def totals(self) -> Totals:
        """Return what is spent, reserved and left.

        Raises:
            PrivacyError: the accountant cannot certify an ε.
        """
        self._refresh()
        return totals(self._account)

    def export(self) -> dict[str, Any]:
        """Return the ledger as JSON values for ``protocol.ledger_statement.verify_export``.

        Raises:
            PrivacyError: the accountant cannot certify an ε.
        """
        self._refresh()
        return export(self._account)

    def verify(self) -> Totals:
        """Read everything again, price each reservation and charge, and return the totals.

        Raises:
            PrivacyError: naming the first entry that is wrong or passed the cap of its time.
        """
        return totals(replay(read(self._database, self.path, 1), priced=True))

    def _append(self, body: Body) -> Entry:
        # Pricing may take seconds and is cached: done here, others need not wait for it below.
        if (before := self._decide(body)) is not None:
            return before
        with self._alone():
            if (before := self._decide(body)) is not None:
                return before
            entry = self._account.follow(body, self._clock())
            self._execute("INSERT INTO entries VALUES (?, ?)", entry.sequence, entry.canonical())
            self._execute("COMMIT")
        return self._account.append(entry.to_json())

    def _decide(self, body: Body) -> Entry | None:
        """Return the entry that already says ``body``; None where a new one may; else raise."""
        self._refresh()
        before = self._account.written(body)
        if before is None:
            self._account.check_budget(body)
        return before

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep every other writer out until COMMIT, or until an error takes all back."""
        self._execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            if self._database.in_transaction:
                self._execute("ROLLBACK")

    def _refresh(self) -> None:
        """Take in what other processes have appended."""
        last = self._account.entries[-1]
        values = list(read(self._database, self.path, last.sequence))
        if identity(self.path) != self._identity or values[:1] != [last.to_json()]:
            raise PrivacyError(
                f"{str(self.path)!r} is no longer the ledger that was opened: it was replaced, "
                "open it again with the witnessed head"
            )
        for value in values[1:]:
            self._account.append(value)

    def _execute(self, statement: str, *values: Any) -> list[Any]:
        with storage(self.path):
            return self._database.execute(statement, values).fetchall()
