"""One process of a kind on a folder."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from huizhen.protocol.errors import ConfigError, StorageError
from huizhen.storage.files import make_folder


@contextlib.contextmanager
def alone(place: Path, holder: str, *, mode: int = 0o777) -> Iterator[None]:
    """Keep a second process from starting while this one runs.

    Args:
        place: the lock's file; its folder is made.
        holder: whose folder it is and what runs, for the error, such as ``'/srv/x' has ... agent``.
        mode: of the folder, where it is made.

    Raises:
        ConfigError: one is running.
        StorageError: the folder cannot be written.
    """
    try:
        make_folder(place.parent, mode)
        with place.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(f"{holder} already: stop it first") from error
            yield
    except OSError as error:
        raise StorageError(f"cannot write {str(place)!r}: {error.strerror}") from error
