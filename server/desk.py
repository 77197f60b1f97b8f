"""All that the coordinator's processes share: opened once, from its folder.

``open_desk`` reads the settings, the keys and the store; the alliance service, the rounds and the
command line work with what it gives.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509

from huizhen.protocol.errors import ConfigError, ProtocolError
from huizhen.protocol.statements import moment
from huizhen.server.authority import Authority
from huizhen.server.home import Home, Settings
from huizhen.server.objects import Objects
from huizhen.server.open_round import Parts
from huizhen.server.registry import Keys, Registry
from huizhen.server.store import Store
from huizhen.server.store_sites import SiteStatus
from huizhen.storage import locks
from huizhen.storage.audit import AuditLog
from huizhen.storage.keys import load_key, load_node_key
from huizhen.storage.witness import WitnessBook

Clock = Callable[[], datetime]


def now() -> datetime:
    """Return the present time."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """The coordinator's open state."""

    home: Home
    settings: Settings
    store: Store
    objects: Objects
    audit: AuditLog
    book: WitnessBook
    # of the sites' logs
    keys: Keys
    registry: Registry
    clock: Clock

    @property
    def alliance(self) -> str:
        """The alliance's name."""
        return self.settings.alliance.name

    @property
    def parts(self) -> Parts:
        """What the rounds need."""
        return Parts(
            store=self.store,
            objects=self.objects,
            audit=self.audit,
            key=self.keys.identity,
            clock=self.clock,
        )

    def report(
        self,
        site: str,
        *,
        version: str,
        codes: Sequence[str],
        time: str,
        studies: Sequence[tuple[str, str]],
    ) -> None:
        """Keep how a site says to be.

        Args:
            site: the member.
            version: of its software.
            codes: of its state and of the troubles that it found.
            time: its clock.
            studies: the digest and a code of each of its studies.

        Raises:
            ProtocolError: a study is unknown.
            StorageError: it cannot be kept.
        """
        present = self.clock()
        try:
            skew = (moment(time) - present).total_seconds()
        except ValueError as error:
            raise ProtocolError(f"time of site {site!r} is {time[:40]!r}, no time") from error
        status = SiteStatus(
            site=site,
            version=_printable(version, 40),
            codes=tuple(
                one for one in (_printable(code, 48) for code in codes[:20]) if one.split() == [one]
            ),
            clock_skew_seconds=skew,
            seen=present,
        )
        self.store.sites.report_status(status)
        for study, code in studies[:100]:
            self.store.sites.report_progress(study, site, _printable(code, 48), present)


def _printable(text: str, length: int) -> str:
    """Return the beginning of a site's text without what would command the terminal that shows it.

    Beside control characters those go that turn the direction of writing.
    """
    return "".join(one for one in text if one.isprintable())[:length]


@contextlib.contextmanager
def open_desk(home: Home, *, clock: Clock = now) -> Iterator[Desk]:
    """Open a coordinator's folder.

    Raises:
        ConfigError: it holds no coordinator, or a setting or key is wrong.
        StorageError: something cannot be read or written.
    """
    settings = home.settings()
    keys = load_keys(home)
    with (
        Store.open(home.store_url()) as store,
        AuditLog.open(home.audit, clock=clock) as audit,
        WitnessBook.open(home.folder / "witnessed.sqlite") as book,
    ):
        registry = Registry(
            store,
            audit,
            keys,
            alliance=settings.alliance.name,
            board=home.board(),
            drafts=home.folder / "board",
            clock=clock,
        )
        yield Desk(
            home=home,
            settings=settings,
            store=store,
            objects=Objects(home.objects),
            audit=audit,
            book=book,
            keys=keys,
            registry=registry,
            clock=clock,
        )


def load_keys(home: Home) -> Keys:
    """Return the coordinator's keys; the board's key only where it lies here.

    Raises:
        ConfigError: a file is missing, or others may read it.
    """
    try:
        certificate = x509.load_pem_x509_certificate(home.authority.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(home.authority)!r} is no certificate: restore it") from error
    board = [load_key(home.key("board"))] if home.key("board").exists() else []
    return Keys(
        identity=load_key(home.key("identity")),
        board=board,
        authority=Authority(certificate, load_node_key(home.key("authority"))),
    )


@contextlib.contextmanager
def alone(home: Home, name: str) -> Iterator[None]:
    """Keep a second process of this kind from starting on the same folder.

    Raises:
        ConfigError: one is running.
        StorageError: the folder cannot be written.
    """
    with locks.alone(home.run / f"{name}.lock", f"{str(home.folder)!r} has a running {name}"):
        yield
