"""The secret that a hospital's records are replaced and sealed by; it never leaves the site.

One file of 32 random bytes. What is made with it, pseudonyms, surrogates, splits, sealed files,
each has a key of its own (RFC 5869), so that none tells anything of another. Whoever loses the file
loses the snapshots, which can be made anew, and the link between old pseudonyms and new ones.
"""

import hmac
import os
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from huizhen.protocol.errors import ConfigError, StorageError
from huizhen.storage.append_only import check_private
from huizhen.storage.files import make_folder, sync

KEY_BYTES = 32
_PSEUDONYM_BYTES = 16


@dataclass(frozen=True, slots=True)
class DataKey:
    """A site's secret, and the keys made of it."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise ConfigError(f"data key has {len(self.secret)} bytes, expected {KEY_BYTES}")

    def derived(self, purpose: str) -> bytes:
        """Return the 32-byte key for one purpose."""
        info = f"huizhen data key 1: {purpose}".encode()
        return HKDFExpand(SHA256(), KEY_BYTES, info).derive(self.secret)


class Pseudonyms:
    """Keyed hashes of a hospital's numbers: the same for the same number, and nobody's guess."""

    def __init__(self, key: DataKey) -> None:
        """Use a site's secret."""
        self._patients, self._encounters = key.derived("patient"), key.derived("encounter")

    def patient(self, number: str) -> str:
        """Return a patient's pseudonym, 32 hex digits."""
        return _hashed(self._patients, number)

    def encounter(self, patient: str, number: str) -> str:
        """Return the pseudonym of a patient's encounter; empty where there is none."""
        return _hashed(self._encounters, f"{patient}\0{number}") if number else ""


def load_data_key(path: Path) -> DataKey:
    """Return the secret in a file; the first time it is made.

    Raises:
        ConfigError: others may read it, or it is none.
        StorageError: it cannot be read or written.
    """
    try:
        if not path.exists():
            _make(path)
        check_private(path, 0o600)
        return DataKey(path.read_bytes())
    except OSError as error:
        raise StorageError(f"cannot use {str(path)!r}: {error.strerror or error}") from error


def _make(path: Path) -> None:
    """Write a new secret whole, and never over another one."""
    make_folder(path.parent, 0o700)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(os.urandom(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        path.hardlink_to(draft)
    except FileExistsError:
        return  # another process was first
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)


def _hashed(key: bytes, text: str) -> str:
    return hmac.digest(key, text.encode(), "sha256")[:_PSEUDONYM_BYTES].hex()
