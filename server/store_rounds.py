"""The chain of committed rounds, the attempts at the next one, and who works on them.

A record names the one before it, the first names the study: whoever commits does so on the last
record or not at all, in one transaction. What is committed never changes. An attempt number is
never used twice in a round.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, delete, func, insert, select, update

from huizhen.protocol.errors import ProtocolError
from huizhen.protocol.statements import digest_of
from huizhen.server.store_database import Database, DuplicateError, read_all, read_one
from huizhen.server.store_studies import need_study
from huizhen.server.tables import attempts, counted, leases, records, updates


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAttempt:
    """One announcement of a round."""

    study: str
    round: int
    attempt: int
    announcement: bytes
    adapter: str
    # digest of the object that is announced
    opened: datetime
    deadline: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRecord:
    """A committed round."""

    study: str
    round: int
    attempt: int
    parent: str
    # digest of the record before; the study's before the first
    document: bytes
    adapter: str
    # digest of the object that the round gave
    strategy_state: str
    # digest of the object from which the next round goes on
    committed: datetime

    @property
    def digest(self) -> str:
        """The SHA-256 of the document, by which the next record names this one."""
        return digest_of(self.document)


class Rounds:
    """The part of the store about the rounds of studies."""

    def __init__(self, database: Database) -> None:
        """Use the store's database."""
        self._database = database

    def open_attempt(self, attempt: StoredAttempt) -> bool:
        """Keep an announcement before it is sent; return whether it was not there.

        Raises:
            DuplicateError: the attempt was announced in other words.
            ProtocolError: the study is not open, the round is not the next one, or a later attempt
                was made.
            StorageError: the store cannot be written.
        """
        with self._database.writing() as connection:
            study = need_study(connection, attempt.study)
            this = (attempts.c.study == attempt.study) & (attempts.c.round == attempt.round)
            same = select(attempts.c.announcement).where(
                this, attempts.c.attempt == attempt.attempt
            )
            kept = connection.execute(same).scalar_one_or_none()
            if kept == attempt.announcement:
                return False
            name = f"attempt {attempt.attempt} of round {attempt.round}"
            if kept is not None:
                raise DuplicateError(f"{name} was announced in other words, they stay")
            if study.state != "open":
                raise ProtocolError(f"study {study.name!r} is {study.state}: open it first")
            expected = last_round(connection, attempt.study) + 1
            if attempt.round != expected:
                raise ProtocolError(f"{name} was announced, round {expected} is the next")
            highest = select(func.max(attempts.c.attempt)).where(this)
            last = connection.execute(highest).scalar_one() or 0
            if attempt.attempt <= last:
                raise ProtocolError(f"{name} was announced, the last was {last}: number it higher")
            connection.execute(insert(attempts).values(asdict(attempt)))
        return True

    def attempts(self, study: str, round: int) -> tuple[StoredAttempt, ...]:
        """Return the attempts at a round, oldest first."""
        query = select(attempts).where(attempts.c.study == study, attempts.c.round == round)
        with self._database.reading() as connection:
            return read_all(connection, StoredAttempt, query.order_by(attempts.c.attempt))

    def last_attempt(self, study: str) -> StoredAttempt | None:
        """Return the latest attempt at the latest round that was announced, or None."""
        order = (attempts.c.round.desc(), attempts.c.attempt.desc())
        query = select(attempts).where(attempts.c.study == study).order_by(*order)
        with self._database.reading() as connection:
            return read_one(connection, StoredAttempt, query)

    def commit_record(self, record: StoredRecord, counted_sites: Collection[str]) -> bool:
        """Commit a round for ever; return whether it was not committed.

        Its objects must be on the disk already: the row is what makes the round.

        Args:
            record: the round.
            counted_sites: whose updates of the round are in its result.

        Raises:
            DuplicateError: the round is committed in other words.
            ProtocolError: it does not follow the last record, the study is over or its round was
                not announced, or a counted site's update is not kept.
            StorageError: the store cannot be written.
        """
        with self._database.writing() as connection:
            kept = _record(connection, record.study, record.round)
            if kept is not None:
                if kept.document != record.document:
                    raise DuplicateError(
                        f"round {record.round} is committed as record {kept.digest[:12]}, it stays"
                    )
                return False
            _check_follows(connection, record)
            _check_kept(connection, record, counted_sites)
            values = asdict(record) | {"digest": record.digest}
            connection.execute(insert(records).values(values))
            key = {"study": record.study, "round": record.round}
            if counted_sites:
                rows = [{**key, "site": site} for site in sorted(set(counted_sites))]
                connection.execute(insert(counted), rows)
        return True

    def last_record(self, study: str) -> StoredRecord | None:
        """Return the last committed round, or None before the first."""
        with self._database.reading() as connection:
            return _record(connection, study, last_round(connection, study))

    def records(self, study: str, after: int = 0) -> tuple[StoredRecord, ...]:
        """Return the committed rounds after one, oldest first."""
        query = _RECORDS.where(records.c.study == study, records.c.round > after)
        with self._database.reading() as connection:
            return read_all(connection, StoredRecord, query.order_by(records.c.round))

    def lease(self, study: str, owner: str, seconds: float, now: datetime) -> bool:
        """Take or renew the right to work on a study; False: another owner has it.

        Args:
            study: the study's digest.
            owner: names one process, no other has the same.
            seconds: until it runs out, so that a dead owner keeps nobody waiting for ever.
            now: the present time.

        Raises:
            ProtocolError: there is no such study.
            StorageError: the store cannot be written.
        """
        this, until = leases.c.study == study, now + timedelta(seconds=seconds)
        with self._database.writing() as connection:
            need_study(connection, study)
            query = select(leases.c.owner, leases.c.until).where(this)
            found = connection.execute(query).one_or_none()
            if found is None:
                values = {"study": study, "owner": owner, "until": until}
                connection.execute(insert(leases).values(values))
                return True
            if found.owner != owner and found.until > now:
                return False
            connection.execute(update(leases).where(this).values(owner=owner, until=until))
        return True

    def release_lease(self, study: str, owner: str) -> bool:
        """Give the right to work on a study back; return whether the owner had it.

        Raises:
            StorageError: the store cannot be written.
        """
        this = (leases.c.study == study) & (leases.c.owner == owner)
        with self._database.writing() as connection:
            return connection.execute(delete(leases).where(this)).rowcount == 1


_RECORDS = select(*(column for column in records.c if column.name != "digest"))


def last_round(connection: Connection, study: str) -> int:
    """Return the number of the last committed round inside a transaction; 0 before the first."""
    query = select(func.max(records.c.round)).where(records.c.study == study)
    return connection.execute(query).scalar_one() or 0


def _record(connection: Connection, study: str, round: int) -> StoredRecord | None:
    query = _RECORDS.where(records.c.study == study, records.c.round == round)
    return read_one(connection, StoredRecord, query)


def _check_follows(connection: Connection, record: StoredRecord) -> None:
    study = need_study(connection, record.study)
    if study.state not in ("open", "paused"):
        raise ProtocolError(f"study {study.name!r} is {study.state}, no round can be committed")
    last = _record(connection, record.study, last_round(connection, record.study))
    number, parent = (1, record.study) if last is None else (last.round + 1, last.digest)
    if (record.round, record.parent) != (number, parent):
        raise ProtocolError(
            f"record is of round {record.round} and follows {record.parent[:12]}, expected round "
            f"{number} after {parent[:12]}"
        )


def _check_kept(connection: Connection, record: StoredRecord, sites: Collection[str]) -> None:
    announced = select(attempts.c.attempt).where(
        attempts.c.study == record.study,
        attempts.c.round == record.round,
        attempts.c.attempt == record.attempt,
    )
    if connection.execute(announced).one_or_none() is None:
        raise ProtocolError(f"attempt {record.attempt} of round {record.round} was not announced")
    here = select(updates.c.site).where(
        updates.c.study == record.study, updates.c.round == record.round
    )
    if missing := sorted(set(sites) - set(connection.execute(here).scalars())):
        raise ProtocolError(
            f"round {record.round} counts an update of {missing[0]!r}, which is not kept"
        )
