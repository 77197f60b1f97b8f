"""Files that only the holder of a key can read, and that nobody changes or cuts unseen.

AES-256-GCM in frames of 1 MiB by the STREAM construction (Hoang, Reyhanitabar, Rogaway, Vizár,
"Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance", CRYPTO 2015, section 7):

    file   = "HZS1" · salt (32 bytes) · frame 0 · frame 1 · … · last frame
    frame i = AES-256-GCM(k, nonce = i (11 bytes, big-endian) · last (1 byte), data, AAD = purpose)
    k      = HKDF-SHA256(key, salt, info = "huizhen sealed file 1")

The salt is new for every file, so no key is used with one nonce twice. ``last`` is 1 in the last
frame alone: a file that was cut or had frames added, moved or repeated does not open. The AAD holds
what the file is for, so that no file stands for another.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from huizhen.protocol.errors import DamagedError, StorageError
from huizhen.storage.files import make_folder, sync

MAGIC = b"HZS1"
KEY_BYTES = 32
FRAME_BYTES = 1 << 20
_SALT_BYTES, _TAG_BYTES = 32, 16
_INFO = b"huizhen sealed file 1"


class SealedWriter:
    """Writes one sealed file; ``with`` moves it to its place whole, or leaves nothing there."""

    def __init__(self, path: Path, key: bytes, *, purpose: bytes) -> None:
        """Prepare.

        Args:
            path: where it is to lie; its folder is made if needed.
            key: 32 bytes.
            purpose: what the file is; whoever opens it must say the same.
        """
        self._path, self._purpose = path, purpose
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}")
        self._salt = os.urandom(_SALT_BYTES)
        self._cipher, self._number = _cipher(key, self._salt), 0
        self._pending = bytearray()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "SealedWriter":
        """Open a file beside the place.

        Raises:
            StorageError: the disk is full or read-only.
        """
        self._do(self._open)
        return self

    def write(self, data: bytes) -> int:
        """Add bytes; return how many.

        Raises:
            StorageError: the disk is full or read-only.
        """
        self._pending += data
        while len(self._pending) > FRAME_BYTES:  # one byte more, for this is not the last frame
            self._frame(bytes(self._pending[:FRAME_BYTES]), is_last=False)
            del self._pending[:FRAME_BYTES]
        return len(data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the file and move it to its place; after an error there is none.

        Raises:
            StorageError: the disk is full or read-only.
        """
        try:
            if kind is None:
                self._frame(bytes(self._pending), is_last=True)
                self._do(self._finish)
        finally:
            if self._file is not None:
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _open(self) -> None:
        make_folder(self._path.parent, 0o700)
        handle = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._file = os.fdopen(handle, "wb")
        self._file.write(MAGIC + self._salt)

    def _frame(self, data: bytes, *, is_last: bool) -> None:
        nonce = _nonce(self._number, is_last=is_last)
        sealed = self._cipher.encrypt(nonce, data, self._purpose)
        self._number += 1
        self._do(lambda: self._opened().write(sealed))

    def _finish(self) -> None:
        self._opened().flush()
        os.fsync(self._opened().fileno())
        self._opened().close()
        self._temporary.replace(self._path)
        sync(self._path.parent)

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            raise StorageError(f"{str(self._path)!r} is not open: use 'with'")
        return self._file

    def _do(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            raise StorageError(
                f"cannot write {str(self._path)!r}: {error.strerror or error}"
            ) from error


def read_sealed(path: Path, key: bytes, *, purpose: bytes) -> Iterator[bytes]:
    """Yield what a sealed file holds, frame by frame; each is authentic when it is yielded.

    That nothing is missing at the end is known only once the iterator has ended.

    Args:
        path: the file.
        key: that it was sealed with.
        purpose: that it was sealed for.

    Raises:
        DamagedError: it is no sealed file, is cut or was changed, or the key or purpose is another.
        StorageError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(len(MAGIC) + _SALT_BYTES)
            if len(head) < len(MAGIC) + _SALT_BYTES or not head.startswith(MAGIC):
                raise DamagedError(f"{str(path)!r} is no sealed file: restore it or make it anew")
            cipher, number = _cipher(key, head[len(MAGIC) :]), 0
            frame = file.read(FRAME_BYTES + _TAG_BYTES)
            while True:
                following = file.read(FRAME_BYTES + _TAG_BYTES)
                nonce = _nonce(number, is_last=not following)
                yield _opened(cipher, nonce, frame, purpose, path)
                if not following:
                    return
                frame, number = following, number + 1
    except OSError as error:
        raise StorageError(f"cannot read {str(path)!r}: {error.strerror or error}") from error


def _opened(cipher: AESGCM, nonce: bytes, frame: bytes, purpose: bytes, path: Path) -> bytes:
    try:
        return cipher.decrypt(nonce, frame, purpose)
    except InvalidTag as error:
        raise DamagedError(
            f"{str(path)!r} was changed, is cut, or was sealed with another key: restore it or "
            "make it anew"
        ) from error


def _cipher(key: bytes, salt: bytes) -> AESGCM:
    if len(key) != KEY_BYTES:
        raise ValueError(f"key has {len(key)} bytes, expected {KEY_BYTES}")
    return AESGCM(HKDF(SHA256(), KEY_BYTES, salt, _INFO).derive(key))


def _nonce(number: int, *, is_last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([is_last])
