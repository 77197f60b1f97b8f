"""An answer from its parts: the same as Flower's, within a bound, whatever the parts claim."""

import contextlib
import json
import os
import time
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Array
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable.inflatable_object import (
    add_header_to_object_body,
    get_all_nested_objects,
    get_object_body,
)
from tests.federation.loopback import flower

from huizhen.protocol.errors import StorageError
from huizhen.server.coming import Coming

MIB = 1 << 20


def parts_of(payload: bytes) -> tuple[str, dict[str, bytes]]:
    """Return the parts of a message's content, as a node sends them, and which is its root."""
    content = flower.pack(b"document", payload)
    parts = {name: one.deflate() for name, one in get_all_nested_objects(content).items()}
    return content.object_id, parts


def unpacked(content):
    message: Any = SimpleNamespace(content=content)
    return flower.unpack(message)


@pytest.fixture
def coming(tmp_path):
    """Makes answers of parts; their files are closed in the end."""
    with contextlib.ExitStack() as stack:

        def make(root: str, parts: dict[str, bytes]) -> Coming:
            made = Coming("m", root, parts, tmp_path)
            stack.callback(made.close)
            while made.missing:
                made.keep(parts[made.missing[-1]])
            return made

        yield make


@pytest.mark.parametrize("payload", [b"", b"x", os.urandom(12 * MIB), bytes(12 * MIB)])
def test_the_parts_make_the_message_that_was_sent(coming, tmp_path, payload):
    """Zeros: parts that are the same are sent once and stand in many places."""
    root, parts = parts_of(payload)
    made = coming(root, parts)
    assert made.size == sum(len(one) for one in parts.values())
    assert unpacked(made.message_of(12 * MIB)) == (b"document", payload)
    assert list(tmp_path.iterdir()) == []  # the file has no name


@pytest.mark.parametrize(
    ("payload", "times", "problem"),
    [(bytes(MIB), 40, "arrays have over"), (bytes(MIB), 1_000_000, "over 48 chunks"),
     (b"", 8_000_000, "over 48 chunks")],
    ids=["beyond the limit", "a terabyte", "of empty chunks"],
)  # fmt: skip
def test_up_4_parts_that_claim_to_be_repeated_are_refused_before_they_cost(
    coming, payload, times, problem
):
    """They would fill the memory; empty ones would take minutes."""
    root, parts = parts_of(payload or b"x")
    (array,) = [name for name, one in parts.items() if one.startswith(b"Array ")]
    said: dict[str, Any] = json.loads(get_object_body(parts[array], Array))
    said["arraychunk_ids"] = [0] * times
    head = parts[array].split(b"\x00")[0].rsplit(b" ", 1)[0]
    body = json.dumps(said).encode()
    parts[array] = head + b" %d\x00" % len(body) + body
    begin = time.monotonic()
    with pytest.raises(ValueError, match=problem):
        coming(root, parts).message_of(2 * MIB)
    assert time.monotonic() - begin < 5


def test_a_part_that_is_missing_or_none_is_told(coming):
    root, parts = parts_of(b"x")
    with pytest.raises(KeyError):
        coming(root, {}).message_of(MIB)
    for name in parts:
        with pytest.raises((KeyError, ValueError, TypeError, AttributeError)):
            coming(root, parts | {name: b"junk"}).message_of(MIB)


def test_a_chunk_is_no_array(coming):
    chunk = ArrayChunk(memoryview(b"x"))
    with pytest.raises((KeyError, ValueError, TypeError, AttributeError)):
        unpacked(coming("c", {"c": chunk.deflate()}).message_of(MIB))
    assert add_header_to_object_body(b"x", chunk).endswith(b"\x00x")


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(StorageError, match="none"):
        Coming("m", "r", [], tmp_path / "none")


def test_a_full_disk_is_named(tmp_path):
    """/dev/full takes nothing."""
    made = Coming("m", "r", ["r"], tmp_path)
    made.close()
    made._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115, PTH123
    with pytest.raises(StorageError, match="No space left"):
        made.keep(b"x")
    made.close()
