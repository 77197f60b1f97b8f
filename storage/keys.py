"""Private keys in files: made where they are used, for their owner alone, and never printed.

A key is PKCS #8 in PEM (RFC 5958, RFC 7468), not encrypted: what guards it is the file's mode, 0600
in a folder of 0700. A file is whole or absent, and no key is ever written over another.

    identity  Ed25519  signs a party's documents
    node      P-384    Flower's, for its message signatures
    tls       P-256    of a certificate
"""

import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import TypeAlias

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from huizhen.protocol.errors import ConfigError, StorageError
from huizhen.storage.append_only import check_private
from huizhen.storage.files import make_folder, sync

PrivateKey: TypeAlias = Ed25519PrivateKey | ec.EllipticCurvePrivateKey
_MAX_BYTES = 10_000


def make_key(path: Path) -> Ed25519PrivateKey:
    """Make a party's identity key, or a person's, and return it.

    Raises:
        ConfigError: the file exists, or others may enter its folder.
        StorageError: it cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    _write(path, key)
    return key


def load_key(path: Path) -> Ed25519PrivateKey:
    """Return an identity key, or a person's.

    Raises:
        ConfigError: there is none, it is of another kind, or others may read it; names the chmod.
    """
    key = _read(path)
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{str(path)!r} is not an Ed25519 key: name the identity key")
    return key


def make_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Make the key with which a site's Flower node authenticates, P-384, and return it.

    Raises:
        ConfigError: the file exists, or others may enter its folder.
        StorageError: it cannot be written.
    """
    return _make_on(path, ec.SECP384R1())


def load_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return a Flower node's key.

    Raises:
        ConfigError: there is none, it is of another kind, or others may read it; names the chmod.
    """
    return _load_on(path, ec.SECP384R1())


def make_tls_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Make the key of a TLS certificate, P-256, and return it.

    Raises:
        ConfigError: the file exists, or others may enter its folder.
        StorageError: it cannot be written.
    """
    return _make_on(path, ec.SECP256R1())


def load_tls_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the key of a TLS certificate.

    Raises:
        ConfigError: there is none, it is of another kind, or others may read it; names the chmod.
    """
    return _load_on(path, ec.SECP256R1())


def fingerprint(key: Ed25519PublicKey | ec.EllipticCurvePublicKey) -> str:
    """Return the SHA-256 of a public key's SubjectPublicKeyInfo (RFC 5280 §4.1) in hex."""
    return hashlib.sha256(
        key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    ).hexdigest()


def _make_on(path: Path, curve: ec.EllipticCurve) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(curve)
    _write(path, key)
    return key


def _load_on(path: Path, curve: ec.EllipticCurve) -> ec.EllipticCurvePrivateKey:
    key = _read(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != curve.name:
        raise ConfigError(f"{str(path)!r} is not a key on {curve.name}: name another file")
    return key


def _write(path: Path, key: PrivateKey) -> None:
    """Write a key beside its place, sync it and link it there, which fails if a file is there."""
    data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        make_folder(path.parent, mode=0o700)
        check_private(path.parent, 0o700)
        number, name = tempfile.mkstemp(prefix=".key-", dir=path.parent)  # O_EXCL, mode 0600
        draft = Path(name)
        try:
            with os.fdopen(number, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            path.hardlink_to(draft)
        except FileExistsError as error:
            raise ConfigError(f"{str(path)!r} exists: a key is never written over") from error
        finally:
            draft.unlink()
        sync(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def _read(path: Path) -> object:
    """Return the key in a file; the file that is checked is the one that is read."""
    try:
        check_private(path.parent, 0o700)
        with path.open("rb") as file:
            found = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if found & ~0o600:
                raise ConfigError(
                    f"{str(path)!r} is open to others than its owner (mode {found:o}): make a new "
                    f"key if anybody may have read it, else chmod 600 {str(path)!r}"
                )
            data = file.read(_MAX_BYTES)
    except FileNotFoundError as error:
        raise ConfigError(f"no key at {str(path)!r}: name the file of one") from error
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}") from error
    try:
        return load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # The cause is not kept: no message may come near the bytes of a key.
        raise ConfigError(
            f"{str(path)!r} holds no private key, expected PKCS #8 in PEM without a password"
        ) from None
