"""Files that are whole or absent, also after a power cut."""

import os
import threading
from pathlib import Path

from huizhen.protocol.errors import StorageError


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside its place, sync it and move it there; its folder is made if needed.

    A reader sees the old bytes or the new, and no kill leaves a part of them.

    Raises:
        StorageError: the disk is full or read-only.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        make_folder(path.parent)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make a folder and those above it, on the disk when this returns.

    Args:
        path: the folder; nothing happens if it exists.
        mode: of it alone, less the process's mask.

    Raises:
        OSError: the disk is full or read-only.
    """
    missing = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    for made in missing:
        sync(made.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
