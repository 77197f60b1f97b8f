"""The values of a DICOM data set, read one at a time without surprise.

Values that are not what the standard allows are left out and their keywords noted, so that quality
rules can decide; a value is converted only when it is asked for and short enough.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag
from pydicom.valuerep import PersonName

from huizhen.client.records.times import iso

MAX_VALUE_BYTES = 64 << 10
# of names, codes and numbers, whose parts are objects each; the standard allows far less
MAX_TEXT_BYTES = 1 << 20
_TEXT_KINDS = frozenset({"LT", "ST", "UT"})
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]")
_GB2312 = "\x1b$)A"
# the escape to GB 2312 (PS3.5 annex K), which pydicom 3.0 leaves in what it decodes
_TIME = re.compile(r"(\d{2}):?(\d{2})(?::?(\d{2})(?:\.\d{1,6})?)?")


@dataclass(slots=True)
class Header:
    """A data set, or an item of one of its sequences."""

    dataset: Dataset
    unreadable: set[str] = field(default_factory=set)
    # keywords of values that are not what the standard allows; items share their data set's

    def values(self, keyword: str) -> list[Any]:
        """Return an element's values, without empty ones."""
        tag = BaseTag(tag_for_keyword(keyword) or 0)
        if tag not in self.dataset:
            return []
        raw = self.dataset.get_item(tag)
        limit = MAX_TEXT_BYTES if raw.VR in _TEXT_KINDS else MAX_VALUE_BYTES
        if isinstance(raw.value, bytes) and len(raw.value) > limit:
            self.unreadable.add(keyword)
            return []
        try:
            value = self.dataset[tag].value
        except Exception:  # noqa: BLE001 - a value that is not of its kind raises what it likes
            self.unreadable.add(keyword)
            return []
        several = value if hasattr(value, "insert") else [value]
        return [one for one in several if one is not None and one != "" and one != b""]

    def texts(self, keyword: str) -> tuple[str, ...]:
        """Return an element's values as texts."""
        found = []
        for value in self.values(keyword):
            if isinstance(value, bytes):
                self.unreadable.add(keyword)
            elif text := _unescaped(value).replace("\r\n", "\n").strip("\0").strip():
                found.append(text)
        return tuple(found)

    def text(self, keyword: str) -> str:
        """Return an element's first value as text."""
        return next(iter(self.texts(keyword)), "")

    def numbers(self, keyword: str) -> list[float]:
        """Return an element's values as numbers, in their order; empty unless all are numbers."""
        try:
            found = [float(value) for value in self.values(keyword)]
        except (TypeError, ValueError, OverflowError):
            found = [math.nan]
        if all(map(math.isfinite, found)):
            return found
        self.unreadable.add(keyword)
        return []

    def number(self, keyword: str) -> int | float | None:
        """Return an element's first value as a number, a whole one as ``int``."""
        for value in self.numbers(keyword):
            return int(value) if value.is_integer() else value
        return None

    def names(self, keyword: str) -> tuple[str, ...]:
        """Return the forms of persons' names: alphabetic, ideographic and phonetic.

        PS3.5 6.2.1: groups are divided by ``=``, within them family and given name by ``^``.
        Ideographs are joined without a space, as texts write them.
        """
        found: dict[str, None] = {}
        for value in self.values(keyword):
            groups = value.components if isinstance(value, PersonName) else str(value).split("=")
            for group in map(_unescaped, groups):
                parts = [part.strip("\0 ") for part in group.split("^")]
                joined = ("" if _CJK.search(group) else " ").join(part for part in parts if part)
                if joined:
                    found[joined] = None
        return tuple(found)

    def items(self, keyword: str) -> "list[Header]":
        """Return the items of a sequence."""
        items = [one for one in self.values(keyword) if isinstance(one, Dataset)]
        return [Header(item, self.unreadable) for item in items]

    def time(self, date_keyword: str, time_keyword: str = "") -> str:
        """Return a date, with its time of day where there is one, in the form of ``times.py``.

        Args:
            date_keyword: of an element with a date, or with date and time together.
            time_keyword: of the element with the time of day.
        """
        date = self.text(date_keyword)
        if found := re.fullmatch(r"(\d{14})\.\d{1,6}([+-]\d{4})?", date):
            date = found[1] + (found[2] or "")
        try:
            written = iso(date)
        except ValueError:
            self.unreadable.add(date_keyword)
            return ""
        clock = self.text(time_keyword) if written and time_keyword else ""
        if not clock or "T" in written:
            return written
        zone = self.text("TimezoneOffsetFromUTC")
        zone = zone if re.fullmatch(r"[+-]\d{4}", zone) else ""
        try:
            hour, minute, second = _TIME.fullmatch(clock).groups("00")  # type: ignore[union-attr]
            return iso(f"{written.replace('-', '')}{hour}{minute}{second}{zone}")
        except (AttributeError, ValueError):
            self.unreadable.add(time_keyword)
            return written


def _unescaped(value: Any) -> str:
    return str(value).replace(_GB2312, "")
