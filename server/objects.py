"""Files named by the SHA-256 of what they hold: updates, adapters and strategy states.

A row of the store names an object, so an object is on the disk before its row (temp → fsync →
rename) and goes only after it. An object without a row is what a killed process left: ``sweep``
removes it once it is old. Several processes and threads may use one folder.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Container, Iterator
from pathlib import Path

from huizhen.protocol.errors import DamagedError, StorageError
from huizhen.storage.files import make_folder, sync, write_whole

SWEEP_SECONDS = 86_400
# younger ones may belong to a row that another process is about to write
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Objects:
    """The coordinator's folder of objects."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Use a folder, which is made for its owner alone when something is put in it.

        Args:
            folder: of the objects and nothing else.
            clock: gives the present time in seconds since 1970, as files are dated.
        """
        self.folder, self._clock = folder, clock

    def put(self, data: bytes) -> str:
        """Keep bytes and return their digest; they are on the disk when this returns.

        Putting the same again writes nothing, unless the disk has changed them since.

        Raises:
            StorageError: the disk is full or read-only.
        """
        digest = hashlib.sha256(data).hexdigest()
        place = self._place(digest)
        with self._locked(fcntl.LOCK_SH):
            if not self._holds(place, digest):
                write_whole(place, data)
            now = self._clock()
            os.utime(place, (now, now))  # young again: no sweep takes it before its row is there
            # Who renamed it may have died before its name was on the disk.
            for folder in (place.parent, place.parent.parent, self.folder):
                sync(folder)
        return digest

    def get(self, digest: str) -> bytes:
        """Return the bytes of a digest.

        Raises:
            DamagedError: they are missing, or are not what was put.
            StorageError: they cannot be read.
            ValueError: it is no digest.
        """
        place = self._place(digest)
        try:
            data = place.read_bytes()
        except FileNotFoundError as error:
            raise DamagedError(
                f"object {digest[:12]} is missing from {str(self.folder)!r}: restore a backup"
            ) from error
        except OSError as error:
            raise StorageError(f"cannot read {str(place)!r}: {error.strerror or error}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise DamagedError(
                f"object {digest[:12]} in {str(self.folder)!r} was changed: restore a backup"
            )
        return data

    def has(self, digest: str) -> bool:
        """Return whether there is a file of that digest; ``get`` says whether it is whole.

        Raises:
            ValueError: it is no digest.
        """
        return self._place(digest).is_file()

    def sweep(self, keep: Container[str], *, older_than_seconds: float = SWEEP_SECONDS) -> int:
        """Remove the objects that are not to be kept, and drafts; return how many files went.

        Args:
            keep: the digests that rows name, read before this is called.
            older_than_seconds: what was put later stays in any case.

        Raises:
            StorageError: the folder cannot be read or written.
        """
        removed = 0
        if not self.folder.is_dir():
            return removed
        with self._locked(fcntl.LOCK_EX):
            before = self._clock() - older_than_seconds
            for place in self.folder.glob("??/??/*"):
                if place.name not in keep and place.stat().st_mtime < before:
                    place.unlink(missing_ok=True)
                    removed += 1
        return removed

    def _place(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"digest is {digest[:80]!r}, expected 64 hex digits")
        return self.folder / digest[:2] / digest[2:4] / digest

    def _holds(self, place: Path, digest: str) -> bool:
        """Return whether the file is there and whole."""
        try:
            return hashlib.sha256(place.read_bytes()).hexdigest() == digest
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        """Keep a sweep and a put apart: between a look at a file's age and its end is no put."""
        try:
            make_folder(self.folder, mode=0o700)
            with (self.folder / ".lock").open("w") as lock:
                fcntl.flock(lock, kind)
                yield
        except OSError as error:
            raise StorageError(
                f"cannot write {str(self.folder)!r}: {error.strerror or error}"
            ) from error
