"""What sites sent in a round and what they were told: updates, refusals, receipts.

A site is counted at most once per round whatever it sends: its first update stays, the same one
again changes nothing, another one is refused. Once a round is committed no update is added to it.
Refusals and receipts are bounded, so that nobody fills the disk.
"""

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Select, func, insert, select

from huizhen.protocol.errors import ProtocolError
from huizhen.protocol.statements import digest_of
from huizhen.server.rounds import MAX_REFUSED
from huizhen.server.store_database import Database, DuplicateError, read_all, read_one
from huizhen.server.store_rounds import last_round
from huizhen.server.store_studies import need_study
from huizhen.server.tables import attempts, counted, receipts, refusals, updates

MAX_RECEIPTS = 100
# per site and round


class LateError(ProtocolError):
    """The round is committed, nothing can be added to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredUpdate:
    """A valid update; its payload is an object."""

    study: str
    round: int
    site: str
    attempt: int
    payload: str
    document: bytes
    received: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRefusal:
    """Something that was not counted, and why."""

    study: str
    round: int
    attempt: int
    site: str | None
    # None: nobody knows who sent it
    code: str
    payload: str | None
    # digest of what came; None: nothing came
    received: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredReceipt:
    """What a site was told about a payload."""

    number: int
    # in the order of writing, over all sites
    study: str
    round: int
    site: str
    payload: str
    document: bytes


class Updates:
    """The part of the store about what sites sent."""

    def __init__(self, database: Database) -> None:
        """Use the store's database."""
        self._database = database

    def add_update(self, update: StoredUpdate, receipt: bytes) -> bool:
        """Keep a valid update, whose payload is on the disk; return whether it was not there.

        The receipt is kept with it or neither is: a coordinator that is killed between the two
        would count the update and never tell the site. It is kept whatever the site was told
        before, above ``MAX_RECEIPTS`` too.

        Args:
            update: what a site sent.
            receipt: signed, tells that it counts.

        Raises:
            DuplicateError: the site has sent another payload in this round, which stays.
            LateError: the round is committed.
            ProtocolError: its attempt was not announced.
            StorageError: the store cannot be written.
        """
        with self._database.writing() as connection:
            kept = _update(connection, update.study, update.round, update.site)
            if kept is not None:
                if kept.payload != update.payload:
                    raise DuplicateError(
                        f"site {update.site!r} sent update {kept.payload[:12]} in round "
                        f"{update.round}, another one is not counted"
                    )
                return False
            if update.round <= last_round(connection, update.study):
                raise LateError(f"round {update.round} is committed, the update came too late")
            announced = select(attempts.c.attempt).where(
                attempts.c.study == update.study,
                attempts.c.round == update.round,
                attempts.c.attempt == update.attempt,
            )
            if connection.execute(announced).one_or_none() is None:
                raise ProtocolError(
                    f"attempt {update.attempt} of round {update.round} was not announced"
                )
            connection.execute(insert(updates).values(asdict(update)))
            _keep_receipt(
                connection, update.study, update.round, update.site, update.payload, receipt
            )
        return True

    def last_update(self, study: str, site: str) -> StoredUpdate | None:
        """Return a site's update of the latest round that it took part in, or None."""
        this = (updates.c.study == study) & (updates.c.site == site)
        query = select(updates).where(this).order_by(updates.c.round.desc())
        with self._database.reading() as connection:
            return read_one(connection, StoredUpdate, query)

    def updates(self, study: str, round: int) -> tuple[StoredUpdate, ...]:
        """Return the updates of a round, sorted by site."""
        return self._by_site(_of_round(study, round))

    def counted(self, study: str, round: int) -> tuple[StoredUpdate, ...]:
        """Return the updates that are in a committed round's result, sorted by site."""
        same = ("study", "round", "site")
        joined = [updates.c[name] == counted.c[name] for name in same]
        return self._by_site(_of_round(study, round).where(*joined))

    def add_refusal(self, refusal: StoredRefusal) -> bool:
        """Keep a refusal; False: the round has ``MAX_REFUSED`` of them, and this one is dropped.

        Raises:
            ProtocolError: there is no such study, or the round is neither committed nor the next.
            StorageError: the store cannot be written.
        """
        with self._database.writing() as connection:
            self._check_round(connection, refusal.study, refusal.round)
            kept = (refusals.c.study == refusal.study) & (refusals.c.round == refusal.round)
            number = connection.execute(select(func.count(refusals.c.number)).where(kept))
            if number.scalar_one() >= MAX_REFUSED:
                return False
            connection.execute(insert(refusals).values(asdict(refusal)))
        return True

    def refusals(self, study: str, round: int) -> tuple[StoredRefusal, ...]:
        """Return the refusals of a round, oldest first."""
        these = (refusals.c.study == study) & (refusals.c.round == round)
        plain = select(*(column for column in refusals.c if column.name != "number"))
        with self._database.reading() as connection:
            query = plain.where(these).order_by(refusals.c.number)
            return read_all(connection, StoredRefusal, query)

    def add_receipt(self, study: str, round: int, site: str, payload: str, document: bytes) -> bool:
        """Keep what a site is told about a payload, before it is told.

        A payload that was refused in one attempt may be counted in a later one: the last receipt
        is what holds.

        Returns:
            Whether it is new and kept; False also where the site has ``MAX_RECEIPTS`` in the round.

        Raises:
            ProtocolError: there is no such study, or the round is neither committed nor the next.
            StorageError: the store cannot be written.
        """
        these = (
            (receipts.c.study == study) & (receipts.c.round == round) & (receipts.c.site == site)
        )
        with self._database.writing() as connection:
            self._check_round(connection, study, round)
            found = connection.execute(select(receipts.c.digest).where(these)).scalars().all()
            if digest_of(document) in found or len(found) >= MAX_RECEIPTS:
                return False
            _keep_receipt(connection, study, round, site, payload, document)
        return True

    def receipt(self, study: str, round: int, site: str, payload: str) -> StoredReceipt | None:
        """Return the last receipt for a payload, or None."""
        query = _RECEIPTS.where(
            receipts.c.study == study,
            receipts.c.round == round,
            receipts.c.site == site,
            receipts.c.payload == payload,
        )
        with self._database.reading() as connection:
            return read_one(connection, StoredReceipt, query.order_by(receipts.c.number.desc()))

    def receipts(self, site: str, after: int = 0, limit: int = 100) -> tuple[StoredReceipt, ...]:
        """Return at most ``limit`` of a site's receipts with numbers above ``after``, in order."""
        query = _RECEIPTS.where(receipts.c.site == site, receipts.c.number > after)
        with self._database.reading() as connection:
            return read_all(
                connection, StoredReceipt, query.order_by(receipts.c.number).limit(limit)
            )

    def _by_site(self, query: Select[Any]) -> tuple[StoredUpdate, ...]:
        with self._database.reading() as connection:
            found = read_all(connection, StoredUpdate, query)
        # Here, because databases order text as their locale does.
        return tuple(sorted(found, key=lambda one: one.site.encode()))

    def _check_round(self, connection: Connection, study: str, round: int) -> None:
        need_study(connection, study)
        last = last_round(connection, study)
        if not 1 <= round <= last + 1:
            raise ProtocolError(f"round is {round}, the next is {last + 1}")


_RECEIPTS = select(*(column for column in receipts.c if column.name != "digest"))


def _keep_receipt(
    connection: Connection, study: str, round: int, site: str, payload: str, document: bytes
) -> None:
    values = {
        "study": study,
        "round": round,
        "site": site,
        "payload": payload,
        "document": document,
        "digest": digest_of(document),
    }
    connection.execute(insert(receipts).values(values))


def _of_round(study: str, round: int) -> Select[Any]:
    return select(updates).where(updates.c.study == study, updates.c.round == round)


def _update(connection: Connection, study: str, round: int, site: str) -> StoredUpdate | None:
    query = _of_round(study, round).where(updates.c.site == site)
    return read_one(connection, StoredUpdate, query)
