"""Texts made comparable character by character, so that a position in one is one in the other.

Full-width forms become ASCII, odd blanks and dashes plain ones, and traditional characters that
occur in names, addresses and labels simplified ones.
"""

import re
import tomllib
from collections.abc import Iterator
from importlib.resources import files


def lines_of(name: str) -> tuple[str, ...]:
    """Return the words of one of this folder's lists; a line with ``#`` first is a comment."""
    text = (files("huizhen.client.identifiers") / name).read_text("utf-8")
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return tuple(word for line in lines for word in line.split())


def words(table: str, name: str) -> tuple[str, ...]:
    """Return one of the lists of ``words.toml``."""
    return tuple(_WORDS[table][name])


_WORDS = tomllib.loads((files("huizhen.client.identifiers") / "words.toml").read_text("utf-8"))
_PAIRS = "".join(lines_of("traditional.txt"))
_FOLDED = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_FOLDED |= dict.fromkeys([0x3000, 0xA0, *range(0x2000, 0x200D), 0x202F, 0xFEFF], 0x20)
_FOLDED |= dict.fromkeys([*range(0x2010, 0x2016), 0x2212], 0x2D)
_FOLDED |= {ord(a): ord(b) for a, b in zip(_PAIRS[::2], _PAIRS[1::2], strict=True)}
_HAN = re.compile("[一-鿿㐀-䶿𠀀-𯨟]")
_WIDE = {code - 0xFEE0: code for code in range(0xFF10, 0xFF1A)}
_MARKS = frozenset(" \t\n\r\x0b\x0c-·•.,'")
_DROPPED = dict.fromkeys(map(ord, _MARKS))


def fold(text: str) -> str:
    """Return the text in simplified, half-width characters, as long as before."""
    return text if text.isascii() else text.translate(_FOLDED)


def lowered(text: str) -> str:
    """Return the text in lower case, as long as before (``İ`` alone would become two)."""
    low = text.lower()
    if len(low) == len(text):
        return low
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def squeezed(text: str) -> str:
    """Return the text without what may stand inside a written name or number."""
    return text if text.isalnum() else text.translate(_DROPPED)


def kept_positions(text: str) -> list[int]:
    """Return where each character of the squeezed text stood."""
    return [i for i, char in enumerate(text) if char not in _MARKS]


def as_wide_as(text: str, model: str) -> str:
    """Return the text with full-width digits where the model's digits are."""
    return text.translate(_WIDE) if any("０" <= char <= "９" for char in model) else text


def is_han(char: str) -> bool:
    """Tell whether it is a Chinese character."""
    return "一" <= char <= "鿿" or "㐀" <= char <= "䶿" or "𠀀" <= char <= "𯨟"


def has_han(text: str) -> bool:
    """Tell whether the text has a Chinese character."""
    return not text.isascii() and _HAN.search(text) is not None


def ends_of(text: str, *labels: str) -> Iterator[int]:
    """Yield where each occurrence of each label ends: a search that costs next to nothing.

    A label in Latin letters does not begin inside a word.
    """
    for label in labels:
        if label not in text:
            continue
        begin = text.find(label)
        while begin >= 0:
            end = begin + len(label)
            before = text[begin - 1 : begin]
            if not (label[0].isascii() and before.isascii() and before.isalpha()):
                yield end
            begin = text.find(label, end)
