"""GA4GH phenopackets, versions 1 and 2, as JSON: phenotypes, diseases, measurements, treatments.

https://phenopacket-schema.readthedocs.io, ISO 4454:2022. Names are those of protobuf's JSON, or of
the schema with underscores. What is genomic is never read, only counted: no text of it leaves.

Fields of a record: ``schema`` (its version) and ``genomic_interpretations`` (how many were there;
of version 1, genes and variants); where there are any, ``age`` (at the last encounter, ISO 8601, or
``begin/end``), ``age_years``, ``onset_years`` and ``onset_classes`` (by the code of the finding,
the latter a term such as HP:0003577), ``not_read`` (of which part how many said nothing or are not
read) and ``times_not_read``. A phenopacket's own id may name the patient, and is an identifier.
"""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO, Final

import orjson

from huizhen.client.records.phenopacket_parts import Packet
from huizhen.client.records.record import MAX_ENTRY_BYTES, Entry, Unreadable
from huizhen.protocol.errors import ConfigError, GovernanceError

MAX_PARTS: Final = 400_000
# values of one entry: in memory each takes far more than its bytes
BLOCK_BYTES: Final = 1 << 18
_BLANK: Final = b" \t\r\n"
_OF_SEVERAL: Final = ("members", "proband")  # a cohort, a family


def read_phenopackets(stream: BinaryIO, name: str) -> Iterator[Entry]:
    """Yield a record for each phenopacket.

    A file holds one JSON document (a phenopacket, a list of them, a cohort or a family), or one
    phenopacket a line. A place is the file and the line; in a document, and the number within it.

    Args:
        stream: an open file.
        name: of the file.

    Raises:
        ConfigError: the file holds no JSON objects.
        GovernanceError: the document, or a line of it, is beyond the bounds or is not JSON.
        OSError: the stream cannot be read.
    """
    line, number = b"", 0
    while not line.strip(_BLANK):
        line, number = _line(stream, name, number)
        if not line:
            return
    line = line.removeprefix(b"\xef\xbb\xbf")
    if not line.lstrip(_BLANK).startswith((b"{", b"[")):
        raise ConfigError(f"{name}:{number} does not begin as JSON does, expected '{{' or '['")
    if not _is_entry(line.strip(_BLANK), f"{name}:{number}"):
        yield from _document(line + _rest(stream, name, len(line)), name, number)
        return
    while line:
        place = f"{name}:{number}"
        if line.strip(_BLANK):
            try:
                yield _entry(_parse(line, place), place)
            except GovernanceError as error:
                yield Unreadable(place, str(error).removeprefix(f"{place}: "))
        line, number = _line(stream, name, number)


def _line(stream: BinaryIO, name: str, number: int) -> tuple[bytes, int]:
    line = stream.readline(MAX_ENTRY_BYTES + 1)
    if len(line) > MAX_ENTRY_BYTES:
        raise GovernanceError(
            f"{name}:{number + 1}: line has over {MAX_ENTRY_BYTES} bytes: split it"
        )
    return line, number + 1


def _rest(stream: BinaryIO, name: str, size: int) -> bytes:
    blocks = []
    while block := stream.read(BLOCK_BYTES):
        blocks.append(block)
        size += len(block)
        if size > MAX_ENTRY_BYTES:
            raise GovernanceError(
                f"{name} has over {MAX_ENTRY_BYTES} bytes, which only a file of lines may: "
                "write one phenopacket a line"
            )
    return b"".join(blocks)


def _is_entry(line: bytes, place: str) -> bool:
    """Tell whether the first line is one of many, not a document or a part of one."""
    if not (line.startswith(b"{") and line.endswith(b"}")):
        return False
    _check_parts(line, place)
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return True
    return not any(key in value for key in _OF_SEVERAL)


def _document(data: bytes, name: str, number: int) -> Iterator[Entry]:
    place = f"{name}:{number}"
    value = _parse(data, place)
    if isinstance(value, dict):
        family = [value["proband"]] if "proband" in value else []
        several = value.get("members", [*family, *_list(value.get("relatives"))])
        packets = _list(several) or [value]
    else:
        packets = _list(value)
    for position, packet in enumerate(packets, 1):
        here = place if len(packets) == 1 else f"{place}, phenopacket {position}"
        try:
            yield _entry(packet, here)
        except GovernanceError as error:
            yield Unreadable(here, str(error).removeprefix(f"{here}: "))


def _entry(value: Any, place: str) -> Entry:
    if not isinstance(value, dict):
        return Unreadable(place, "entry is no JSON object, expected a phenopacket: mend the export")
    return Packet(value, place).record()


def _parse(data: bytes, place: str) -> Any:
    """Return the value of a JSON text within the bounds.

    orjson is strict where the standard library is not: no NaN, no half of a surrogate pair, at
    most 1,024 levels. Only the latter can refuse a name that is given twice.
    """
    _check_parts(data, place)
    try:
        orjson.loads(data)
        return json.loads(data, object_pairs_hook=_once)
    except _TwiceError as error:
        raise GovernanceError(f"{place}: object has a name twice: mend the export") from error
    except (ValueError, RecursionError):  # its text may quote the entry
        raise GovernanceError(f"{place}: entry is not JSON: mend the export") from None


def _check_parts(data: bytes, place: str) -> None:
    parts = data.count(b",") + data.count(b"[") + data.count(b"{")
    if parts > MAX_PARTS:
        raise GovernanceError(
            f"{place}: entry has about {parts} values, at most {MAX_PARTS} are read: split it"
        )


class _TwiceError(ValueError):
    """A JSON object has a name twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _TwiceError
    return fields


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
