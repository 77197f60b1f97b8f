"""What passes between a site's agent and its worker over a pipe: frames of JSON and raw bytes.

    magic (4 bytes) · header length (uint32, little-endian) · header · payloads

The header is one JSON object, at most 1 MiB; its key ``sizes`` gives the payloads' lengths, whose
sum the reader bounds before it reads any. Nothing in a frame is ever run. A payload may hold
records, so that no frame shows its payloads.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from huizhen.client.governance import SitePolicy
from huizhen.client.trainer import DEFAULT_MEMORY_MIB
from huizhen.protocol.errors import WireError

MAGIC = b"HZF1"
MAX_HEADER_BYTES = 1 << 20
MAX_PAYLOADS = 4
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Frame:
    """One command, or one answer."""

    header: Mapping[str, Any]
    payloads: tuple[bytes, ...] = ()

    def __repr__(self) -> str:
        return f"Frame({len(self.payloads)} payloads, <masked>)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a worker is told first, beside the study's canonical bytes and the records."""

    site: str
    home: str
    # the folder whose ``bases`` holds the base models
    base: str | None
    # the base's name or its absolute folder; null for a study without one
    patient: str
    # the field that names the patient
    policy: SitePolicy
    memory_mib: int = DEFAULT_MEMORY_MIB
    # bound on what a private step holds at a time
    threads: int = 1
    # of torch
    checkpointing: bool = False
    # run each adapted layer again in the backward pass, to save memory

    def __post_init__(self) -> None:
        if not Path(self.home).is_absolute():
            raise ValueError(f"home is {self.home!r}, expected an absolute folder")
        if min(self.memory_mib, self.threads) < 1:
            raise ValueError("memory_mib and threads must be 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class CohortRecords:
    """The records of a cohort, as JSON, one a line, in UTF-8; their content never shows."""

    train: bytes = field(repr=False)
    held_out: bytes | None = field(default=None, repr=False)
    # never trained on; None where the site measures nothing


def write_frame(stream: IO[bytes], frame: Frame) -> None:
    """Write a frame and flush it.

    Raises:
        WireError: the header is over its limit, or no JSON.
        OSError: the other side is gone.
    """
    try:
        header = json.dumps(
            {**frame.header, "sizes": [len(one) for one in frame.payloads]}, allow_nan=False
        ).encode()
    except (TypeError, ValueError) as error:
        raise WireError("frame header is no JSON") from error
    if len(header) > MAX_HEADER_BYTES:
        raise WireError(
            f"frame header has {len(header)} bytes, at most {MAX_HEADER_BYTES} are allowed"
        )
    stream.write(MAGIC + len(header).to_bytes(4, "little") + header)
    for payload in frame.payloads:
        stream.write(payload)
    stream.flush()


def read_frame(stream: IO[bytes], *, max_bytes: int) -> Frame | None:
    """Return the next frame; None at the end of the stream.

    Args:
        stream: from the other side.
        max_bytes: what all payloads together may have.

    Raises:
        WireError: the bytes are no frame, or are more than allowed; the stream is of no use then.
    """
    begin = stream.read(8)
    if not begin:
        return None
    length = int.from_bytes(begin[4:8], "little")
    if len(begin) < 8 or begin[:4] != MAGIC or length > MAX_HEADER_BYTES:
        raise WireError(f"stream has {begin[:4]!r} and a header of {length} bytes, no frame")
    header = _header(_read(stream, length))
    sizes = header.pop("sizes", None)
    if not isinstance(sizes, list) or not all(type(one) is int and one >= 0 for one in sizes):
        raise WireError("frame has no sizes of its payloads")
    if len(sizes) > MAX_PAYLOADS or sum(sizes) > max_bytes:
        raise WireError(f"frame's payloads are over {MAX_PAYLOADS} or over {max_bytes} bytes")
    return Frame(header, tuple(_read(stream, one) for one in sizes))


def _header(data: bytes) -> dict[str, Any]:
    try:
        header = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WireError("frame header is no JSON") from error
    if not isinstance(header, dict):
        raise WireError("frame header is no JSON object")
    return header


def _read(stream: IO[bytes], size: int) -> bytes:
    """Return exactly ``size`` bytes; memory is taken as they come, not as they are announced."""
    found = bytearray()
    while len(found) < size:
        part = stream.read(min(_CHUNK, size - len(found)))
        if not part:
            raise WireError(f"stream ends after {len(found)} of {size} bytes")
        found += part
    return bytes(found)
