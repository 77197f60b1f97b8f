"""The lines of a text file in an encoding that is named or found: UTF-8, UTF-16 or GB18030.

UTF-8 is hardly ever met by chance (RFC 3629, section 1), so what is valid UTF-8 is taken for it;
GB18030 accepts nearly anything, so it is believed only where most of the characters are the common
ones of its level 1 (GB/T 2312), as they are in any Chinese text.
"""

import codecs
import io
from collections.abc import Iterator
from typing import BinaryIO

from huizhen.client.records.record import MAX_ENTRY_BYTES
from huizhen.protocol.errors import ConfigError, GovernanceError

AUTO = "auto"
BLOCK_BYTES = 1 << 18
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SEEN = ("gb18030", "utf-16")  # what a file in another encoding than named mostly is


class Lines:
    """The lines of a stream, each with its end, read once and in blocks.

    Attributes:
        name: what the stream is called in errors.
        encoding: the one in use; while only ASCII was read of an ``auto`` stream, ``utf-8``.
    """

    def __init__(self, stream: BinaryIO, name: str, encoding: str = AUTO) -> None:
        """Prepare; nothing is read.

        Args:
            stream: an open file.
            name: what to call it in errors.
            encoding: Python's name of one, or ``auto``.

        Raises:
            ConfigError: there is no such encoding.
        """
        self._stream, self.name, self._number = stream, name, 0
        self._is_decided = encoding != AUTO
        try:
            codec = codecs.lookup("utf-8" if encoding == AUTO else encoding)
            is_text = codec._is_text_encoding
        except (LookupError, ValueError):  # a NUL in a name is a ValueError
            is_text = False
        if not is_text:
            raise ConfigError(f"encoding is {encoding!r}, expected a name such as 'gb18030'")
        self.encoding = codec.name

    def __iter__(self) -> Iterator[str]:
        """Yield the lines; a byte order mark is dropped.

        Raises:
            ConfigError: the bytes are not in the encoding, or in none that can be found.
            GovernanceError: a line is longer than an entry may be.
            OSError: the stream cannot be read.
        """
        decoder, pending = None, ""
        block = self._stream.read(BLOCK_BYTES)
        while True:
            following = self._stream.read(BLOCK_BYTES) if block else b""
            if not self._is_decided and (decoder is None or not block.isascii()):
                self._is_decided = self._decide(block, is_whole=not following)
                decoder = None  # all before was ASCII, the same in each of them
            if decoder is None:
                decoder = codecs.getincrementaldecoder(self.encoding)()
            text = self._decode(decoder, block, is_end=not following)
            if self._number == 0 and not pending:
                text = text.removeprefix("\ufeff")
            pending += text
            end = pending.rfind("\n") + 1
            for line in io.StringIO(pending[:end], newline="\n"):
                self._number += 1
                self._check_size(line)
                yield line
            pending = pending[end:]
            self._check_size(pending, after=1)
            if not following:
                break
            block = following
        if pending:
            yield pending

    def _check_size(self, line: str, *, after: int = 0) -> None:
        if len(line) > MAX_ENTRY_BYTES:
            raise GovernanceError(
                f"{self.name}:{self._number + after}: line has over {MAX_ENTRY_BYTES} bytes: "
                "split it"
            )

    def _decode(self, decoder: codecs.IncrementalDecoder, block: bytes, *, is_end: bool) -> str:
        before = decoder.getstate()[0]
        try:
            return decoder.decode(block, is_end)
        except UnicodeDecodeError as error:
            data = before + block
            line = self._number + 1 + data[: error.start].count(b"\n")
            begin = data.rfind(b"\n", 0, error.start) + 1
            end = data.find(b"\n", error.start)
            shown = data[begin : end if end >= 0 else None]
            raise ConfigError(self._wrong(line, shown)) from error
        except UnicodeError as error:  # such as UTF-16 without a byte order mark
            raise ConfigError(self._wrong(self._number + 1, b"")) from error

    def _wrong(self, number: int, line: bytes) -> str:
        place = f"{self.name}:{number}"
        marked = line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        for guess in ("utf-16",) if marked else _SEEN if line else ():
            if guess != self.encoding and _reads(line[: len(line) & ~1 if marked else None], guess):
                return (
                    f"{place}: line is not {self.encoding}, it looks like {guess}: "
                    f'set encoding = "{guess}"'
                )
        return f"{place}: line is not {self.encoding}: set encoding to the file's own"

    def _decide(self, block: bytes, *, is_whole: bool) -> bool:
        """Choose the encoding from a block; return whether it can be another one later on."""
        for mark, name in _MARKS:
            if self._number == 0 and block.startswith(mark):
                self.encoding = name
                return True
        if self._number == 0 and (wide := _wide(block)):
            self.encoding = wide
            return True
        if block.isascii():
            return False
        if _reads(block, "utf-8", is_whole=is_whole):
            self.encoding = "utf-8"
            return True
        if _is_chinese(block, is_whole=is_whole):
            self.encoding = "gb18030"
            return True
        raise ConfigError(
            f"{self.name} is neither UTF-8 nor UTF-16 nor GB18030: set encoding to the file's own"
        )


def _reads(data: bytes, encoding: str, *, is_whole: bool = True) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)().decode(data, is_whole)
    except UnicodeError:
        return False
    return True


def _wide(block: bytes) -> str:
    """Return which UTF-16 a file without a mark begins in; empty where it is none.

    ASCII in UTF-16 has a zero at every other byte, always on the same side; elsewhere one is rare.
    """
    even, odd = block[::2].count(0), block[1::2].count(0)
    if min(even, odd) or max(even, odd) < len(block) / 100:
        return ""
    name = "utf-16-le" if odd else "utf-16-be"
    if 10 * max(even, odd) < len(block) and _reads(block, "utf-8", is_whole=False):
        return ""
    return name if _reads(block, name, is_whole=False) else ""


def _is_chinese(block: bytes, *, is_whole: bool) -> bool:
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(block, is_whole)
    except UnicodeError:
        return False
    others = [character for character in text[: 1 << 16] if not character.isascii()]
    known = sum(_is_level_1(character) for character in others)
    return 2 * known >= len(others)


def _is_level_1(character: str) -> bool:
    """Tell whether it is one of the 3,755 common characters, or punctuation of the same set."""
    code = character.encode("gb18030")
    return len(code) == 2 and (0xB0 <= code[0] <= 0xD7 or 0xA1 <= code[0] <= 0xA3)
