"""A result and its reference range as laboratories write them: "<0.01", "3.5-5.0"."""

import math
import re
from functools import lru_cache
from typing import Final

from huizhen.client.records.record import Comparator

_NUMBER: Final = r"(?:\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})(?:[eE][+-]?\d{1,3})?"
_RESULT: Final = re.compile(rf"(?P<sign><=|>=|=<|=>|[<>≤≥])?\s?(?P<number>-?{_NUMBER})")
_RANGE: Final = re.compile(
    rf"(?P<low>-?{_NUMBER})\s?(?:[-~–—−_至]|to)\s?(?P<high>-?{_NUMBER})", re.IGNORECASE
)
_HALF_WIDTH: Final = str.maketrans("０１２３４５６７８９．＜＞－～＝", "0123456789.<>-~=")
_SIGNS: Final[dict[str, Comparator]] = {
    "<": "<",
    "<=": "<=",
    "=<": "<=",
    "≤": "<=",
    ">": ">",
    ">=": ">=",
    "=>": ">=",
    "≥": ">=",
}


def number_of(text: str) -> tuple[float | None, Comparator]:
    """Return the number that a result is, and how the true value compares with it.

    Nothing is guessed: "+1" and "1+" are grades, "1,200" and "1:128" are no plain numbers.
    """
    if not text or len(text) > 80 or not (found := _RESULT.fullmatch(_plain(text))):
        return None, ""
    value = float(found["number"])
    return (value, _SIGNS.get(found["sign"], "")) if math.isfinite(value) else (None, "")


def range_of(text: str) -> tuple[float | None, float | None]:
    """Return the low and high end of a reference range; None for an end it does not have."""
    return _ends(text) if 0 < len(text) <= 80 else (None, None)


@lru_cache(maxsize=4096)
def _ends(text: str) -> tuple[float | None, float | None]:
    plain = _plain(text)
    if found := _RANGE.fullmatch(plain):
        low, high = float(found["low"]), float(found["high"])
        if low > high and "--" in plain:  # a long dash, not a sign: 3.5--5.0
            high = -high
        return (low, high) if -math.inf < low <= high < math.inf else (None, None)
    value, sign = number_of(plain)
    return (value if sign in (">", ">=") else None, value if sign in ("<", "<=") else None)


def _plain(text: str) -> str:
    if not text.isascii():
        text = text.translate(_HALF_WIDTH)
    return " ".join(text.split())
