"""A hospital's folder: its settings, its policy, its keys, and what it holds of each study.

site.toml            how the program runs here, for people to edit
policy.toml          what the hospital allows; see docs/policy.md
keys/                identity, node, tls: private keys, 0600, made here
alliance/            what the invitation pinned, the certificate, all memberships
studies/DIGEST/      the offer, this site's approval, how far the study has come
audit.sqlite         the log
run/                 locks, logs of the workers, what ``status`` shows; disposable
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cryptography import x509

from huizhen.client.policy import Policy, load_policy
from huizhen.protocol.chain import Chain
from huizhen.protocol.errors import ConfigError, GovernanceError, StorageError
from huizhen.protocol.invitation import Pins
from huizhen.protocol.statements import StudyOffer
from huizhen.protocol.strict import build_sections, read_toml
from huizhen.protocol.trust import Trust
from huizhen.storage.files import sync, write_whole

SETTINGS, POLICY = "site.toml", "policy.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorTerms:
    """``[coordinator]``: where it is, as the invitation says; host and port."""

    fleet: str = ""
    service: str = ""
    door: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkTerms:
    """``[network]``: the way out."""

    proxy: str = ""
    # http://host:port of a CONNECT proxy; empty: none, whatever the environment says
    chunk_kib: int = 5120
    # of an update; 512 for lines under half a megabit per second
    poll_seconds: float = 1.0
    # how often to ask for work while there is none

    def __post_init__(self) -> None:
        if self.proxy and not self.proxy.startswith("http://"):
            raise ValueError(f"proxy is {self.proxy!r}, expected http://HOST:PORT")
        if not 64 <= self.chunk_kib <= 10_240:
            raise ValueError(f"chunk_kib is {self.chunk_kib}, expected 64 to 10240")
        if not 0.05 <= self.poll_seconds <= 60:
            raise ValueError(f"poll_seconds is {self.poll_seconds}, expected 0.05 to 60")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerTerms:
    """``[worker]``: the process that trains."""

    threads: int = 1
    memory_mib: int = 1024
    # bound on what a private step holds at a time
    checkpointing: bool = False
    bases: str = ""
    # the folder whose ``bases`` holds the base models; empty: the home of huizhen

    def __post_init__(self) -> None:
        if min(self.threads, self.memory_mib) < 1:
            raise ValueError("threads and memory_mib must be 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordTerms:
    """``[records]``: how this hospital's records are read."""

    patient: str = "patient"
    # the field that names the patient
    minimum_patients: int = 2
    allowed_fields: tuple[str, ...] = ()
    # what a task may read; empty: any but the withheld ones
    withheld_fields: tuple[str, ...] = ()
    held_out: dict[str, str] = field(default_factory=dict)
    # cohort -> file of records that are never trained on, for metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything in site.toml."""

    coordinator: CoordinatorTerms = field(default_factory=CoordinatorTerms)
    network: NetworkTerms = field(default_factory=NetworkTerms)
    worker: WorkerTerms = field(default_factory=WorkerTerms)
    records: RecordTerms = field(default_factory=RecordTerms)


_SECTIONS: dict[str, type] = {
    "coordinator": CoordinatorTerms,
    "network": NetworkTerms,
    "worker": WorkerTerms,
    "records": RecordTerms,
}


def parse_settings(tables: Mapping[str, Any], where: str) -> Settings:
    """Make settings from parsed TOML.

    Raises:
        ConfigError: naming the file, the section, the key and what was expected.
    """
    return Settings(**build_sections(_SECTIONS, tables, where))


@dataclass(frozen=True, slots=True)
class Home:
    """Where things lie in a site's folder, and what they say."""

    folder: Path

    def settings(self) -> Settings:
        """Return the settings.

        Raises:
            ConfigError: there is no site here, or a setting is wrong.
        """
        place = self.folder / SETTINGS
        if not place.exists():
            raise ConfigError(f"{str(self.folder)!r} holds no site: run 'huizhen site init'")
        return parse_settings(read_toml(place), str(place))

    def policy(self) -> Policy:
        """Return the policy.

        Raises:
            ConfigError: it is missing or wrong.
        """
        return load_policy(self.folder / POLICY)

    def key(self, name: str) -> Path:
        """Return the file of a private key: identity, node or tls."""
        return self.folder / "keys" / f"{name}.pem"

    @property
    def audit(self) -> Path:
        """The audit log."""
        return self.folder / "audit.sqlite"

    @property
    def run(self) -> Path:
        """Locks, logs and status of the running processes."""
        return self.folder / "run"

    @property
    def paused(self) -> Path:
        """A file whose presence pauses the site."""
        return self.folder / "PAUSED"

    @property
    def authority(self) -> Path:
        """The alliance's certificate authority, PEM."""
        return self.folder / "alliance" / "authority.pem"

    @property
    def certificate(self) -> Path:
        """This site's certificate, PEM."""
        return self.folder / "alliance" / "certificate.pem"

    def pins(self) -> Pins:
        """Return what the invitation pinned.

        Raises:
            ConfigError: the site has not joined.
        """
        place = self.folder / "alliance" / "pins.json"
        try:
            return Pins.model_validate_json(place.read_bytes())
        except FileNotFoundError as error:
            raise ConfigError(
                f"{str(self.folder)!r} has joined no alliance: run 'huizhen site join INVITATION'"
            ) from error
        except (OSError, ValueError) as error:
            raise StorageError(f"{str(place)!r} is damaged: restore it") from error

    def keep_pins(self, pins: Pins) -> None:
        """Keep what an invitation pins."""
        write_whole(self.folder / "alliance" / "pins.json", pins.model_dump_json().encode())
        write_whole(self.authority, pins.authority.encode())

    def memberships(self) -> list[Path]:
        """Return the files of the accepted memberships, oldest first."""
        found = (self.folder / "alliance").glob("membership-*.json")
        return sorted(found, key=lambda path: int(path.stem.partition("-")[2]))

    def keep_membership(self, version: int, document: bytes) -> None:
        """Keep an accepted membership."""
        write_whole(self.folder / "alliance" / f"membership-{version:06d}.json", document)

    def last_receipt(self) -> int:
        """Return the number of the last receipt that was taken; 0 before the first."""
        data = _read(self.folder / "alliance" / "receipts")
        return int(data) if data is not None and data.isdigit() else 0

    def keep_last_receipt(self, number: int) -> None:
        """Keep the number of a receipt that was taken."""
        write_whole(self.folder / "alliance" / "receipts", str(number).encode())

    def has_certificate(self) -> x509.Certificate | None:
        """Return this site's certificate, None where there is none."""
        try:
            return x509.load_pem_x509_certificate(self.certificate.read_bytes())
        except (OSError, ValueError):
            return None

    def study(self, digest: str) -> "StudyFolder":
        """Return what this site holds of a study."""
        return StudyFolder(self.folder / "studies" / digest, digest)

    def studies(self) -> list["StudyFolder"]:
        """Return what this site holds of each study."""
        found = sorted((self.folder / "studies").glob("*"))
        return [self.study(one.name) for one in found if (one / "offer.json").exists()]


@dataclass(frozen=True, slots=True)
class StudyFolder:
    """One study at one site."""

    folder: Path
    digest: str

    def offer_bytes(self) -> bytes | None:
        """Return the offer's document, None where it is not known here."""
        return _read(self.folder / "offer.json")

    def offer(self, trust: Trust) -> StudyOffer:
        """Return the offer.

        Raises:
            GovernanceError: it is not known here.
            ProtocolError: the board has not signed it.
        """
        data = self.offer_bytes()
        if data is None:
            raise GovernanceError(f"study {self.digest[:12]} is not known here: 'site studies'")
        return trust.offer(data)

    def keep_offer(self, document: bytes) -> None:
        """Keep an offer that was verified."""
        write_whole(self.folder / "offer.json", document)

    def approval(self) -> bytes | None:
        """Return this site's approval, None where there is none or it was withdrawn."""
        return _read(self.folder / "approval.json")

    def keep_approval(self, document: bytes) -> None:
        """Keep an approval, whole or still without some signatures."""
        write_whole(self.folder / "approval.json", document)

    def withdraw(self) -> None:
        """Forget the approval; no power cut brings it back.

        Raises:
            StorageError: the disk is read-only or damaged.
        """
        place = self.folder / "approval.json"
        try:
            place.unlink()
            sync(self.folder)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"cannot remove {str(place)!r}: {error.strerror}") from error

    def chain(self, first: Chain) -> Chain:
        """Return how far the study has come, ``first`` where nothing was accepted yet.

        Raises:
            StorageError: the file is damaged.
        """
        data = _read(self.folder / "chain.json")
        if data is None:
            return first
        try:
            values = json.loads(data)
            return Chain(**{one.name: values[one.name] for one in fields(Chain)})
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{str(self.folder / 'chain.json')!r} is damaged") from error

    def keep_chain(self, chain: Chain) -> None:
        """Keep how far the study has come."""
        write_whole(self.folder / "chain.json", json.dumps(chain.to_json()).encode())

    def keep_record(self, round: int, document: bytes) -> None:
        """Keep an accepted record."""
        write_whole(self.folder / f"record-{round:06d}.json", document)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"cannot read {str(path)!r}: {error.strerror}") from error
