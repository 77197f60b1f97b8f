"""The wire format of adapters and updates (docs/adr/0005): bytes that never run.

    magic (4 bytes) · header length (uint32, little-endian) · header · safetensors

The header is RFC 8785 JSON: what it is, study digest, round, site, dtype and the shape of every
tensor. All tensors are float32, though the numbers of an update may travel otherwise, as its study
says (``protocol/travel.py``). There is exactly one encoding of a message: ``decode`` refuses any
other bytes, so a digest of the bytes is a digest of the message. Sizes are checked before anything
is parsed.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import rfc8785

from huizhen.protocol.adapter import Shapes, Tensors, in_order, shapes_of
from huizhen.protocol.errors import WireError
from huizhen.protocol.travel import PLAIN, Stored, Travel

MAGIC = b"HZM1"
MAX_HEADER_BYTES = 1 << 20
MAX_ROUND = 1_000_000
MAX_DECLARED = 1 << 40
# that a header may say, of one tensor and of all; far more than any message holds
_FRAMING_PER_TENSOR = 512  # the safetensors entry of a tensor, its name apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """An adapter that the coordinator announces, an update that a site sends, or what it keeps."""

    kind: Literal["adapter", "update", "kept"]
    # kept: a site's own, from round to round; it stays at the site and is never sent
    study: str
    # the study's digest, SHA-256 in hex
    round: int
    # 1 is the first
    site: str
    # whose update it is; empty for an adapter, which goes to all
    tensors: Tensors


def encode(message: Message, travel: Travel = PLAIN) -> bytes:
    """Return the one encoding of a message.

    Args:
        message: the tensors, with what they are.
        travel: how its numbers do.

    Raises:
        WireError: a value is not finite, or the message breaks the format's limits.
    """
    if not 1 <= message.round <= MAX_ROUND:
        raise WireError(f"round is {message.round}, expected 1 to {MAX_ROUND}")
    if message.kind == "adapter" and message.site:
        raise WireError("adapter names a site, only an update has one")
    try:
        tensors = in_order(message.tensors)
    except UnicodeEncodeError as error:
        raise WireError("header holds text that is not Unicode") from error
    header = _header_of(message, shapes_of(tensors), travel.dtype)
    _check_finite(tensors)
    stored = tensors if travel.is_plain else travel.stored(tensors, message.site)
    if len(header) > MAX_HEADER_BYTES:
        raise WireError(f"header has {len(header)} bytes, at most {MAX_HEADER_BYTES} are allowed")
    return b"".join((MAGIC, len(header).to_bytes(4, "little"), header, *safetensors(stored)))


def safetensors(tensors: Mapping[str, Stored]) -> list[bytes | memoryview]:
    """Return the one safetensors encoding of tensors in parts; no value is copied.

    The format's own writer holds three copies of what it writes.
    """
    names = sorted(tensors, key=str.encode)
    layout = {
        n: (tensors[n].dtype.str, _NAMES[tensors[n].dtype.str], tensors[n].shape) for n in names
    }
    parts = [np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data for name in names]
    return [_framing(layout), *parts]


_NAMES = {"<f4": "F32", "<f2": "F16", "|i1": "I8"}
Layout = Mapping[str, tuple[str, str, tuple[int, ...]]]
"""NumPy's type, safetensors' name of it and the shape of each stored array."""


def _framing(layout: Layout) -> bytes:
    """Return the safetensors header of arrays; names in the order of their UTF-8."""
    entries: dict[str, Any] = {}
    at = 0
    for name in sorted(layout, key=str.encode):
        kind, dtype, shape = layout[name]
        end = at + np.dtype(kind).itemsize * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def max_bytes(shapes: Shapes) -> int:
    """Return an upper bound on the size of a message with these tensors."""
    values = sum(math.prod(shape) for shape in shapes.values())
    names = sum(len(name.encode()) for name in shapes)
    return 8 + MAX_HEADER_BYTES + 4 * values + 8 * names + _FRAMING_PER_TENSOR * (len(shapes) + 1)


def declared_values(data: bytes, *, without: str | None = None) -> int:
    """Return how many numbers a message says that it holds, from its header alone.

    Args:
        data: what arrived.
        without: the end of names whose tensors are not counted.

    Raises:
        WireError: the bytes do not begin as a message does, or no message holds so many numbers.
    """
    length = int.from_bytes(data[4:8], "little")
    if data[:4] != MAGIC or length > MAX_HEADER_BYTES or 8 + length > len(data):
        raise WireError("bytes do not begin as a message does")
    values = 0
    for name, shape in _header(data[8 : 8 + length])["tensors"].items():
        values += 0 if without is not None and name.endswith(without) else _declared_size(shape)
        if values > MAX_DECLARED:
            raise WireError(f"header names more than {MAX_DECLARED} numbers")
    return values


def declared_site(data: bytes) -> str:
    """Return the site that an update says it is of, from its header alone; nothing else is checked.

    Raises:
        WireError: the bytes do not begin as a message does.
    """
    length = int.from_bytes(data[4:8], "little")
    if data[:4] != MAGIC or length > MAX_HEADER_BYTES or 8 + length > len(data):
        raise WireError("bytes do not begin as a message does")
    return str(_header(data[8 : 8 + length])["site"])


def _declared_size(shape: Any) -> int:
    """Return how many numbers a tensor of an unchecked shape holds; an int of JSON has no bound."""
    if not isinstance(shape, list):
        raise WireError("header has a shape that is none, expected a list of sizes")
    values = 1
    for size in shape:
        if type(size) is not int or not 0 <= size <= MAX_DECLARED:
            raise WireError(f"header has a size that is none, expected 0 to {MAX_DECLARED}")
        values *= size
        if values > MAX_DECLARED:
            raise WireError(f"header has a shape of more than {MAX_DECLARED} numbers")
    return values


def decode(data: bytes, *, shapes: Shapes, travel: Travel = PLAIN, copy: bool = True) -> Message:
    """Return the message in ``data``.

    Args:
        data: what arrived, from anyone.
        shapes: exactly the tensors that are expected.
        travel: how their numbers were agreed to travel.
        copy: False: where they travel as they are, the tensors are read-only views of ``data``, and
            not aligned.

    Raises:
        WireError: the bytes are not the one encoding of a message with exactly these tensors, all
            values finite.
    """
    limit = max_bytes(shapes)
    if len(data) > limit:
        raise WireError(f"message has {len(data)} bytes, at most {limit} are allowed")
    if data[:4] != MAGIC:
        raise WireError(f"message begins with {data[:4]!r}, expected {MAGIC!r}")
    length = int.from_bytes(data[4:8], "little")
    if len(data) < 8 or length > MAX_HEADER_BYTES or 8 + length > len(data):
        raise WireError(f"header claims {length} bytes, the message has {len(data)}")
    header = _header(data[8 : 8 + length])
    expected = {name: list(shape) for name, shape in shapes.items()}
    if header["dtype"] != travel.dtype:
        raise WireError(f"header has dtype {header['dtype'][:20]!r}, expected {travel.dtype!r}")
    if header["tensors"] != expected:
        raise WireError(_tensor_difference(header["tensors"], expected))
    message = Message(
        kind=header["kind"],
        study=header["study"],
        round=header["round"],
        site=header["site"],
        tensors={},
    )
    if data[8 : 8 + length] != _header_of(message, shapes, travel.dtype):
        raise WireError("header is not in its one canonical encoding")
    stored = _views(data, 8 + length, travel.layout(shapes))
    _check_finite({n: array for n, array in stored.items() if array.dtype.kind == "f"})
    if not travel.is_plain:
        return replace(message, tensors=travel.tensors(stored, shapes))
    if copy:
        stored = {name: array.copy() for name, array in stored.items()}
    return replace(message, tensors=stored)


def _views(data: bytes, at: int, layout: Layout) -> dict[str, Any]:
    """Return the arrays of a payload as views of it."""
    framing, found = _framing(layout), {}
    sizes = {n: np.dtype(kind).itemsize * math.prod(s) for n, (kind, _, s) in layout.items()}
    if data[at : at + len(framing)] != framing or len(data) != at + len(framing) + sum(
        sizes.values()
    ):
        raise WireError(
            "payload is not the one safetensors encoding of the tensors that its header names"
        )
    at += len(framing)
    for name in sorted(layout, key=str.encode):
        kind, _, shape = layout[name]
        found[name] = np.frombuffer(data, kind, math.prod(shape), at).reshape(shape)
        at += sizes[name]
    return found


def _check_finite(tensors: Mapping[str, Any]) -> None:
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise WireError(f"tensor {name!r} holds a value that is not finite, expected none")


def _header_of(message: Message, shapes: Shapes, dtype: str) -> bytes:
    try:
        return rfc8785.dumps(
            {
                "dtype": dtype,
                "kind": message.kind,
                "round": message.round,
                "site": message.site,
                "study": message.study,
                "tensors": {name: list(shape) for name, shape in shapes.items()},
            }
        )
    except (rfc8785.CanonicalizationError, UnicodeEncodeError) as error:
        raise WireError("header holds text that is not Unicode") from error


def _header(data: bytes) -> dict[str, Any]:
    try:
        header = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WireError("header is not JSON") from error
    types = {"dtype": str, "kind": str, "round": int, "site": str, "study": str, "tensors": dict}
    if not isinstance(header, dict) or header.keys() != types.keys():
        raise WireError(f"header has other keys than {sorted(types)}")
    for key, kind in types.items():
        if type(header[key]) is not kind:
            raise WireError(f"header {key} is not of type {kind.__name__}")
    if header["kind"] not in ("adapter", "update", "kept"):
        raise WireError("header names an unknown kind")
    if header["kind"] == "adapter" and header["site"]:
        raise WireError("adapter names a site, only an update has one")
    if not 1 <= header["round"] <= MAX_ROUND:
        raise WireError(f"header round is {header['round']}, expected 1 to {MAX_ROUND}")
    return header


def _tensor_difference(found: Mapping[str, Any], expected: Mapping[str, list[int]]) -> str:
    for name in expected:
        if name not in found:
            return f"tensor {name!r} is missing"
        if found[name] != expected[name]:
            return f"tensor {name!r} has shape {str(found[name])[:60]}, expected {expected[name]}"
    extra = next(name for name in found if name not in expected)
    return f"tensor {extra[:100]!r} is not part of the study"
