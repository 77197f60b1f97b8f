"""Who may join and who is in: invitations, the board's membership documents, certificates."""

from dataclasses import asdict, dataclass
from datetime import datetime

from sqlalchemy import Connection, func, insert, select, update

from huizhen.protocol.errors import ProtocolError
from huizhen.server.store_database import Database, DuplicateError, read_all, read_one
from huizhen.server.tables import certificates, invitations, memberships


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredInvitation:
    """A site's right to enrol once."""

    token: str
    # SHA-256 of the one-time token, which is not kept
    site: str
    made: datetime
    expires: datetime
    used: datetime | None = None
    key: str | None = None
    # the public key that enrolled


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMembership:
    """One version of who is in the alliance."""

    version: int
    document: bytes
    received: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCertificate:
    """A TLS certificate that the coordinator's authority issued."""

    serial: str
    site: str
    issued: datetime
    not_after: datetime
    revoked: datetime | None = None


class Members:
    """The part of the store about the alliance's members."""

    def __init__(self, database: Database) -> None:
        """Use the store's database."""
        self._database = database

    def add_invitation(self, invitation: StoredInvitation) -> None:
        """Keep an invitation.

        Raises:
            DuplicateError: there is one with this token.
            StorageError: the store cannot be written.
        """
        with self._database.writing() as connection:
            found = select(invitations.c.token).where(invitations.c.token == invitation.token)
            if connection.execute(found).one_or_none() is not None:
                raise DuplicateError("there is an invitation with this token: draw another")
            connection.execute(insert(invitations).values(asdict(invitation)))

    def check_invitation(self, token: str, site: str, now: datetime, *, key: str) -> None:
        """Refuse what ``use_invitation`` would refuse; nothing is written.

        Raises:
            ProtocolError: there is none for this site, it has expired, or another key used it.
            StorageError: the store cannot be read.
        """
        with self._database.reading() as connection:
            _usable(connection, token, site, now, key)

    def use_invitation(self, token: str, site: str, now: datetime, *, key: str) -> bool:
        """Use an invitation up, and return whether it was unused.

        The key that used it may use it again until it expires, which writes nothing: so an answer
        that was lost on the way needs no new invitation.

        Args:
            token: SHA-256 of the one-time token that arrived.
            site: who says to be invited.
            now: the present time.
            key: the public key that enrols, in hex.

        Raises:
            ProtocolError: there is none for this site, it has expired, or another key used it.
            StorageError: the store cannot be written.
        """
        this = (invitations.c.token == token) & (invitations.c.site == site)
        with self._database.writing() as connection:
            found = _usable(connection, token, site, now, key)
            if found.used is None:
                connection.execute(update(invitations).where(this).values(used=now, key=key))
        return found.used is None

    def invitations(self) -> tuple[StoredInvitation, ...]:
        """Return all invitations, used and unused, as they were made."""
        query = select(invitations).order_by(invitations.c.made, invitations.c.token)
        with self._database.reading() as connection:
            return read_all(connection, StoredInvitation, query)

    def add_membership(self, version: int, document: bytes, now: datetime) -> bool:
        """Keep the next membership document; return whether it was not there.

        Raises:
            DuplicateError: another document has this version.
            ProtocolError: the version is not the one after the last.
            StorageError: the store cannot be written.
        """
        with self._database.writing() as connection:
            same = select(memberships.c.document).where(memberships.c.version == version)
            kept = connection.execute(same).scalar_one_or_none()
            if kept == document:
                return False
            if kept is not None:
                raise DuplicateError(f"another membership has version {version}, it stays")
            last = connection.execute(select(func.max(memberships.c.version))).scalar_one() or 0
            if version != last + 1:
                raise ProtocolError(
                    f"membership has version {version}, the last is {last}: expected {last + 1}"
                )
            values = {"version": version, "document": document, "received": now}
            connection.execute(insert(memberships).values(values))
        return True

    def latest_membership(self) -> StoredMembership | None:
        """Return the last version's document, or None before the first."""
        query = select(memberships).order_by(memberships.c.version.desc())
        with self._database.reading() as connection:
            return read_one(connection, StoredMembership, query)

    def memberships(self, after: int = 0) -> tuple[StoredMembership, ...]:
        """Return the documents of all versions after one, oldest first."""
        query = select(memberships).where(memberships.c.version > after)
        with self._database.reading() as connection:
            return read_all(connection, StoredMembership, query.order_by(memberships.c.version))

    def add_certificate(self, certificate: StoredCertificate) -> None:
        """Keep what was issued, before it is handed out.

        Raises:
            DuplicateError: there is one with this serial number.
            StorageError: the store cannot be written.
        """
        serial = certificate.serial
        with self._database.writing() as connection:
            found = select(certificates.c.serial).where(certificates.c.serial == serial)
            if connection.execute(found).one_or_none() is not None:
                raise DuplicateError(f"there is a certificate with serial number {serial[:40]!r}")
            connection.execute(insert(certificates).values(asdict(certificate)))

    def revoke_certificate(self, serial: str, now: datetime) -> bool:
        """Revoke a certificate for ever; return whether it was not revoked before.

        Raises:
            ProtocolError: there is none with this serial number.
            StorageError: the store cannot be written.
        """
        this = certificates.c.serial == serial
        with self._database.writing() as connection:
            query = select(certificates).where(this)
            found = read_one(connection, StoredCertificate, query)
            if found is None:
                raise ProtocolError(f"no certificate has serial number {serial[:40]!r}")
            if found.revoked is None:
                connection.execute(update(certificates).where(this).values(revoked=now))
        return found.revoked is None

    def certificate(self, serial: str) -> StoredCertificate | None:
        """Return the certificate with a serial number; None: it was not issued here."""
        query = select(certificates).where(certificates.c.serial == serial)
        with self._database.reading() as connection:
            return read_one(connection, StoredCertificate, query)

    def certificates(self, site: str | None = None) -> tuple[StoredCertificate, ...]:
        """Return the certificates of one site or of all, as they were issued."""
        query = select(certificates).order_by(certificates.c.issued, certificates.c.serial)
        if site is not None:
            query = query.where(certificates.c.site == site)
        with self._database.reading() as connection:
            return read_all(connection, StoredCertificate, query)


def _usable(
    connection: Connection, token: str, site: str, now: datetime, key: str
) -> StoredInvitation:
    """Return the invitation that a key may use now."""
    this = (invitations.c.token == token) & (invitations.c.site == site)
    found = read_one(connection, StoredInvitation, select(invitations).where(this))
    if found is None:
        raise ProtocolError(f"no invitation of site {site!r} has this token: ask for one")
    if found.expires <= now:
        raise ProtocolError(f"the invitation of site {site!r} has expired: ask for another")
    if found.used is not None and found.key != key:
        raise ProtocolError(f"the invitation of site {site!r} is used: ask for another")
    return found
