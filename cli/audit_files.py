"""The files that ``huizhen audit`` reads and writes."""

import argparse
import os
from pathlib import Path


def party_file(arguments: argparse.Namespace, given: Path | None, name: str) -> Path:
    """Return a file of the one party that has its home here.

    Raises:
        ConfigError: both parties have one.
    """
    from huizhen.learning.bases import default_home
    from huizhen.protocol.errors import ConfigError

    if given is not None:
        return given
    home = arguments.home or default_home()
    places = [home / party / name for party in ("site", "coordinator")]
    there = [place for place in places if place.exists()]
    if len(there) > 1:
        raise ConfigError(f"{' and '.join(map(repr, map(str, there)))} exist: name one of them")
    return Path((there or places)[0])


def write_new(path: Path, data: bytes) -> None:
    """Write a file that must not exist.

    Raises:
        ConfigError: it exists.
        StorageError: it cannot be written.
    """
    from huizhen.protocol.errors import ConfigError, StorageError

    try:
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as error:
        raise ConfigError(f"{str(path)!r} exists: choose another --out") from error
    except OSError as error:
        raise StorageError(f"cannot write {str(path)!r}: {error.strerror}") from error


def read_file(path: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        ConfigError: it cannot be read.
    """
    from huizhen.protocol.errors import ConfigError

    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}") from error
