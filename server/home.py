"""The coordinator's folder: its settings, its keys, and where everything else lies.

coordinator.toml     settings, for people to edit
keys/                authority, identity, board, server: private keys, 0600
store.sqlite         unless the settings name a PostgreSQL
objects/             adapters and updates, by digest
audit.sqlite         the log
flower/, run/        what the running processes write; disposable
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huizhen.protocol.errors import ConfigError
from huizhen.protocol.statements import Board
from huizhen.protocol.strict import build_sections, read_toml

SETTINGS = "coordinator.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class AllianceTerms:
    """``[alliance]``: its name, and the board that decides."""

    name: str
    board: tuple[str, ...]
    # Ed25519 public keys in hex
    threshold: int = 1
    # so many of them must sign

    def __post_init__(self) -> None:
        if not 1 <= self.threshold <= len(self.board):
            raise ValueError(f"threshold is {self.threshold}, the board has {len(self.board)} keys")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenTerms:
    """``[listen]``: where the processes of this machine listen, host and port."""

    fleet: str = "0.0.0.0:8443"
    # Flower's Fleet paths over TLS, and nothing else
    service: str = "0.0.0.0:8444"
    # the alliance service, mutual TLS
    door: str = "0.0.0.0:8445"
    # enrolment and renewal, TLS that proves the coordinator alone
    superlink: str = "127.0.0.1:8000"
    # Flower's own port: anybody who reaches it commands the alliance
    status: str = "127.0.0.1:9400"
    # health and Prometheus metrics, without TLS

    def __post_init__(self) -> None:
        for name in self.__slots__:
            host, _, port = getattr(self, name).rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected HOST:PORT")
        for name in ("superlink", "status"):
            if not getattr(self, name).startswith(("127.0.0.1:", "localhost:", "[::1]:")):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a loopback address")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicTerms:
    """``[public]``: how sites reach the coordinator."""

    names: tuple[str, ...]
    # host names and addresses that the certificate carries
    fleet: str
    service: str
    door: str

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("names is empty, expected the coordinator's host names")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreTerms:
    """``[store]``: the database."""

    url: str = ""
    # postgresql://user@host/name?passfile=/path; empty: store.sqlite in this folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything in coordinator.toml."""

    alliance: AllianceTerms
    listen: ListenTerms = field(default_factory=ListenTerms)
    public: PublicTerms
    store: StoreTerms = field(default_factory=StoreTerms)


_SECTIONS = {
    "alliance": AllianceTerms,
    "listen": ListenTerms,
    "public": PublicTerms,
    "store": StoreTerms,
}


def parse_settings(tables: Mapping[str, Any], where: str) -> Settings:
    """Make settings from parsed TOML.

    Raises:
        ConfigError: naming the file, the section, the key and what was expected.
    """
    found = build_sections(_SECTIONS, tables, where)
    for name in ("alliance", "public"):
        if name not in found:
            raise ConfigError(f"{where} has no [{name}]: add the section")
    return Settings(**found)


@dataclass(frozen=True, slots=True)
class Home:
    """Where things lie in a coordinator's folder."""

    folder: Path

    @property
    def settings_file(self) -> Path:
        """The settings."""
        return self.folder / SETTINGS

    def settings(self) -> Settings:
        """Return the settings.

        Raises:
            ConfigError: there is no coordinator here, or a setting is wrong.
        """
        if not self.settings_file.exists():
            raise ConfigError(
                f"{str(self.folder)!r} holds no coordinator: run 'huizhen coordinator init'"
            )
        return parse_settings(read_toml(self.settings_file), str(self.settings_file))

    def key(self, name: str) -> Path:
        """Return the file of a private key: authority, identity, board or server."""
        return self.folder / "keys" / f"{name}.pem"

    @property
    def secret(self) -> Path:
        """The secret that claims Flower's tasks."""
        return self.folder / "keys" / "superexec.secret"

    @property
    def authority(self) -> Path:
        """The authority's certificate, PEM."""
        return self.folder / "authority.pem"

    @property
    def certificate(self) -> Path:
        """The server's certificate, PEM."""
        return self.folder / "server.pem"

    @property
    def audit(self) -> Path:
        """The audit log."""
        return self.folder / "audit.sqlite"

    @property
    def objects(self) -> Path:
        """Adapters and updates by digest."""
        return self.folder / "objects"

    @property
    def flower(self) -> Path:
        """What Flower writes."""
        return self.folder / "flower"

    @property
    def run(self) -> Path:
        """Locks and logs of the running processes."""
        return self.folder / "run"

    def store_url(self) -> str:
        """Return the database's URL."""
        return self.settings().store.url or f"sqlite:///{(self.folder / 'store.sqlite').absolute()}"

    def board(self) -> Board:
        """Return the board that the settings name."""
        terms = self.settings().alliance
        return Board(keys=terms.board, threshold=terms.threshold)
