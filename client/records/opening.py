"""A file of an export, open, unpacked where it is gzipped; what is wrong with it is named."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from huizhen.protocol.errors import ConfigError


@contextmanager
def opened(path: Path, name: str) -> Iterator[BinaryIO]:
    """Give a file's bytes; those of what is packed where its name ends in ``.gz``.

    Args:
        path: the file.
        name: what to call it in errors.

    Raises:
        ConfigError: it is missing, cannot be read, or is no gzip or a damaged one.
    """
    if "\0" in str(path):  # no name of a file
        raise ConfigError(f"cannot read {str(path)!r}: a path has no NUL")
    try:
        with path.open("rb") as raw:
            if not path.name.lower().endswith(".gz"):
                yield raw
                return
            with gzip.open(raw) as stream:
                yield cast(BinaryIO, stream)
    except gzip.BadGzipFile as error:
        raise ConfigError(f"{name} ends in .gz but is not gzip: unpack or rename it") from error
    except (EOFError, zlib.error) as error:
        raise ConfigError(f"{name} is cut short or damaged: copy it again") from error
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
