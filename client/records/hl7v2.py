"""HL7 v2 messages, one or many in a file, as a text or framed (MLLP, batches FHS/BHS/BTS/FTS).

A segment ends at CR, LF or CRLF. A line that begins like no segment belongs to the one before: a
raw line break in a text. Charsets are those of MSH-18; a message that declares none, or ASCII, is
taken as ``encoding``.

A place is ``file:line`` of a message and ``file:line:segment`` within one.
"""

import re
from collections.abc import Iterator
from typing import BinaryIO, Final

from huizhen.client.records.hl7_records import read_message
from huizhen.client.records.hl7_syntax import Segment, Syntax, UnfitError
from huizhen.client.records.record import MAX_ENTRY_BYTES, Entry, Unreadable
from huizhen.protocol.errors import ConfigError, GovernanceError

_BLOCK_BYTES: Final = 1 << 18
_MAX_LINES: Final = 50_000
_FRAME: Final = b"\x0b\x1c"  # MLLP, release 1: start and end of a block
_SIGN: Final = rb"[!-/:-@\[-`{-~]"  # what ASCII prints that is no letter, digit or space
_MESSAGE: Final = re.compile(rb"MSH" + _SIGN + _SIGN)
_BATCH: Final = re.compile(rb"(?:FHS|BHS|BTS|FTS)(?:" + _SIGN + rb"|$)")
_SIGNS: Final = re.compile(_SIGN.decode() + "{1,5}")
_SEGMENT: Final = re.compile(rb"[A-Z][A-Z0-9]{2}")
_COUNT: Final = re.compile(rb"BTS" + _SIGN + rb"(\d{1,9})(?!\d)")
# HL7 table 0211, and how it is misspelt
_CHARSETS: Final[dict[str, str]] = {
    **{f"8859/{n}": f"iso8859-{n}" for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 15)},
    **dict.fromkeys(("UNICODE UTF-8", "UTF-8", "UTF8", "UNICODE"), "utf-8"),
    **dict.fromkeys(("GB 18030-2000", "GB18030", "GB 18030", "GBK", "GB2312"), "gb18030"),
    **dict.fromkeys(("BIG-5", "BIG5"), "big5"),
    **dict.fromkeys(("KS X 1001",), "euc_kr"),
}
_UNDECLARED: Final = ("", "ASCII", "ISO IR6", "ISO IR14")
_Lines = list[tuple[int, bytearray]]


def read_hl7v2(stream: BinaryIO, name: str, *, encoding: str = "utf-8") -> Iterator[Entry]:
    """Yield the entries of a file of HL7 v2 messages.

    A segment whose type is not read is an ``Unreadable`` where it is first met in the file.

    Args:
        stream: an open file.
        name: of the file, for places.
        encoding: of the messages that declare none, by Python's name.

    Raises:
        ConfigError: the file is not HL7 v2, or there is no such encoding.
        GovernanceError: a message is too large.
    """
    try:
        b"MSH".decode(encoding)  # of no bytes, any name would do
    except (LookupError, ValueError) as error:
        raise ConfigError(f"encoding is {encoding!r}, expected a name such as 'gb18030'") from error
    reported: set[str] = set()
    in_batch = 0
    for lines in _messages(stream, name):
        number, head = lines[0]
        if not _BATCH.match(head):
            in_batch += 1
            yield from _entries(lines, name, encoding, reported)
        elif head.startswith(b"BHS"):
            in_batch = 0
        elif (count := _COUNT.match(head)) and int(count[1]) != in_batch:
            yield Unreadable(
                f"{name}:{number}:BTS",
                f"batch has {in_batch} messages, its trailer says {int(count[1])}: export it again",
            )


def _entries(lines: _Lines, name: str, encoding: str, reported: set[str]) -> Iterator[Entry]:
    place = f"{name}:{lines[0][0]}"
    try:
        syntax = _syntax(lines[0][1], encoding)
        segments = []
        for number, line in lines:
            text = line.decode(syntax.encoding)
            segments.append(Segment(text, f"{name}:{number}:{text[:3]}", syntax))
    except UnicodeError:
        problem = (
            f"message is not {syntax.encoding!r}: declare its charset in MSH-18, or set encoding"
        )
        yield Unreadable(place, problem)
        return
    except UnfitError as error:
        yield Unreadable(place, str(error))
        return
    yield from read_message(segments, place, reported)


def _syntax(head: bytearray, encoding: str) -> Syntax:
    """Return the signs and the encoding that a message's first segment declares."""
    text = head.decode("latin-1")
    sign = text[3]
    fields = text.split(sign, 19)
    signs = fields[1]
    if len({sign, *signs}) <= len(signs) or not _SIGNS.fullmatch(signs):
        raise UnfitError("MSH-2 declares no four different signs, expected ^~\\&: mend the export")
    declared = fields[17] if len(fields) > 17 else ""
    if len(signs) > 1:
        declared = declared.partition(signs[1])[0]
    declared = declared.strip().upper()
    if declared not in _UNDECLARED and declared not in _CHARSETS:
        raise UnfitError(
            "MSH-18 is no charset that is read, expected 'UNICODE UTF-8': export again"
        )
    signs = signs.ljust(4, "\0")  # a sign that is not declared stands nowhere
    return Syntax(
        sign,
        signs[0],
        signs[1],
        "" if signs[2] == "\0" else signs[2],
        signs[3],
        _CHARSETS.get(declared, encoding),
    )


def _messages(stream: BinaryIO, name: str) -> Iterator[_Lines]:
    """Yield the segments of each message with their lines; a batch's header or trailer alone."""
    message: _Lines = []
    size = count = 0
    for number, line in _lines(stream, name):
        is_start = _MESSAGE.match(line) is not None
        if is_start or _BATCH.match(line):
            if message:
                yield message
            message, size, count = [(number, bytearray(line))], len(line), 1
            if not is_start:
                yield message
                message = []
            continue
        if not message:
            if size:  # between a batch's trailer and the next message
                raise GovernanceError(
                    f"{name}:{number}: line belongs to no message, expected MSH: mend the export"
                )
            raise ConfigError(
                f"{name}:{number}: file does not begin with MSH, FHS or BHS, "
                "expected HL7 v2 in UTF-8, GB 18030 or Latin: check its kind and encoding"
            )
        size += len(line) + 1
        count += 1
        if size > MAX_ENTRY_BYTES or count > _MAX_LINES:
            raise GovernanceError(
                f"{name}:{message[0][0]}: message has over {MAX_ENTRY_BYTES} bytes "
                f"or {_MAX_LINES} lines, which is not read: split it"
            )
        sign = message[0][1][3:4]
        if _SEGMENT.match(line) and line[3:4] in (b"", sign):
            message.append((number, bytearray(line)))
        else:
            message[-1][1].extend(b"\n" + line)
    if message:
        yield message
    elif not size:
        raise ConfigError(f"{name}: file is empty, expected HL7 v2 messages: export it again")


def _lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that hold something, without their ends and frames, counted from 1."""
    pieces: list[bytes] = []
    number, size, after_cr, is_first = 1, 0, False, True
    while block := stream.read(_BLOCK_BYTES):
        if is_first:
            block, is_first = block.removeprefix(b"\xef\xbb\xbf"), False
        if after_cr and block.startswith(b"\n"):
            block = block[1:]
        after_cr = block.endswith(b"\r")
        *whole, last = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        if not any(whole) and not any(pieces):  # a gigabyte of empty lines takes seconds
            number += len(whole)
            whole = []
        for line in whole:
            if pieces:
                line = b"".join((*pieces, line))
                pieces, size = [], 0
            if line := line.strip(_FRAME):
                yield number, line
            number += 1
        pieces.append(last)
        size += len(last)
        if size > MAX_ENTRY_BYTES:
            raise GovernanceError(
                f"{name}:{number}: line has over {MAX_ENTRY_BYTES} bytes: split the message"
            )
    if line := b"".join(pieces).strip(_FRAME):
        yield number, line
