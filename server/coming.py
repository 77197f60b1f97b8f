"""An answer on its way from SuperLink: its parts in a file as they come, its payload at the end.

Flower puts an answer together from parts that are all in memory, three copies of each. Here a part
goes to a file that has no name, and one at a time comes back: so that any number of answers may be
under way while the memory of one payload is taken.
"""

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flwr.app import Array
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from huizhen.protocol.errors import StorageError

SMALLEST_CHUNK = 64 << 10
# bytes, of a site with the slowest link


class Coming:
    """An answer that a node has announced."""

    def __init__(self, message: str, root: str, parts: Iterable[str], folder: Path) -> None:
        """Begin with no part.

        Args:
            message: Flower's name of the answer.
            root: digest of the part that names the others.
            parts: digests of all.
            folder: for the file.

        Raises:
            StorageError: the file cannot be made.
        """
        self.message, self._root = message, root
        self.missing = list(dict.fromkeys(parts))
        self.since = time.monotonic()
        self.size = 0
        # bytes of the parts that have come
        self._at: dict[str, tuple[int, int]] = {}
        with _told(folder):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - see close
        self._folder = folder

    def keep(self, content: bytes) -> None:
        """Keep the last of the missing parts.

        Raises:
            StorageError: it cannot be written.
        """
        with _told(self._folder):
            self._file.seek(self.size)
            left = memoryview(content)
            while left:
                left = left[self._file.write(left) or 0 :]
        self._at[self.missing.pop()] = (self.size, len(content))
        self.size += len(content)

    def message_of(self, max_bytes: int) -> Any:
        """Return Flower's message that the parts make.

        Args:
            max_bytes: of its arrays together: a few parts can claim to be repeated for ever.

        Raises:
            KeyError, ValueError, TypeError, AttributeError, RecursionError: they make none.
            StorageError: they cannot be read back.
        """
        known: dict[str, bytes] = {}
        arrays: dict[str, Any] = {}
        todo = [self._root]
        while todo:
            part = todo.pop()
            if part in known or part in arrays:
                continue
            content = self._content(part)
            kind, children, _ = get_object_head_values_from_object_content(content)
            if kind == "Array":
                arrays[part] = self._array(content, children, max_bytes)
                max_bytes -= len(arrays[part].data)
            else:
                known[part] = content
                todo += children
        return inflate_object_from_contents(self._root, known, objects=arrays)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _content(self, part: str) -> bytes:
        at, size = self._at[part]
        with _told(self._folder):
            self._file.seek(at)
            found = self._file.read(size)
        if len(found) != size:
            raise StorageError(f"a file in {str(self._folder)!r} is shorter than what was written")
        return found

    def _array(self, content: bytes, chunks: list[str], max_bytes: int) -> Array:
        said, data = json.loads(get_object_body(content, Array)), io.BytesIO()
        most = 16 + max_bytes // SMALLEST_CHUNK  # an empty one costs time as well
        if len(said["arraychunk_ids"]) > most:
            raise ValueError(f"array has over {most} chunks")
        for number in said["arraychunk_ids"]:
            data.write(get_object_body(self._content(chunks[number]), ArrayChunk))
            if data.tell() > max_bytes:
                raise ValueError(f"arrays have over {max_bytes} bytes")
        form = {name: said[name] for name in ("dtype", "stype")}
        return Array(**form, shape=tuple(said["shape"]), data=data.getvalue())


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Say where reading or writing failed."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot keep an answer in {str(folder)!r}: {error.strerror or error}"
        ) from error
