"""Texts that were read in the wrong encoding, are empty, or say what every other text says.

Mojibake is undone only where one way back exists: the wrong reading is taken back byte for byte,
the right one must succeed on all of a text (or of a line), and must give what people write. Three
wrong readings are known:

    UTF-8 read as GBK        "文本" becomes "鏂囨湰"
    UTF-8 read as Windows    "é" becomes "Ã©", "文" becomes "æ–‡"
    GBK read as Latin 1      "文本" becomes "ÎÄ±¾"

U+FFFD, "锟斤拷" (U+FFFD twice in UTF-8, read as GBK) and halves of surrogates are lost for good.

Template text is found by the lossy counting of Manku and Motwani (VLDB 2002) over lines: no line
of a larger share than asked is missed, and memory does not grow with the records.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from huizhen.client.quality.problems import DEFAULT_RULES, Code, Problem, Rules
from huizhen.client.records.record import Record

_LOST = ("\ufffd", "锟斤", "烫烫烫", "屯屯屯")
# the last two are memory that was never written, read as GBK
_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2028\u2029\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
)
# also what is invisible, and what turns the direction of a text
_COMMON = (
    "的一是不了有人在中大为上个时要出以会可也后年生能下过对部同体面方多其心好样进无气如力水高长治疗诊断病患者"
    "入院主诉现史检查温脉搏呼吸血压发热咳嗽腹痛胸闷行手术药物验结果阴阳性正常明显未见左右双肺，。、：；（）"
)
# frequent in Chinese records, to know their wrong readings by; what else occurs does not matter
_GBK_MARKS = "".join(sorted({c.encode()[:2].decode("gbk", "ignore") for c in _COMMON}))
_AS_GBK = re.compile(f"[{_GBK_MARKS}]")
_AS_WINDOWS = re.compile("[\u00c2-\u00f4][\u0080-\u00bf\u0152-\u02dc\u2013-\u2122]")
_AS_LATIN = re.compile("[\u00a1-\u00fe]{4,}")
_ANY_MARK = re.compile(f"[\u00c0-\u00d6\u00d8-\u00f6{_GBK_MARKS}]")
# without one of these, which a single pass shows, none of the three is worth a look
_UNWRITTEN = re.compile(
    "[^\x00-\u024f\u0370-\u03ff\u2000-\u2bff\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
    "\U00020000-\U0003ffff]"
)
# neither Latin, Greek, hanzi nor signs: two bytes of GBK may be a letter of Armenian in UTF-8
_MARK_SHARE = 0.15
# of the characters beyond ASCII; text that was read wrongly has over twice that, other text none
_NO_TEXTS = frozenset(
    {
        "",
        "无",
        "空",
        "-",
        "--",
        "/",
        "n/a",
        "na",
        "nan",
        "null",
        "none",
        "nil",
        "test",
        "测试",
        "见附件",
        "同上",
        "略",
    }
)
_TEXT_KINDS = frozenset({"note", "report"})
_MIN_LINE = 6
# characters; shorter lines are headings


def check_text(record: Record, rules: Rules | None = None) -> tuple[Record, list[Problem]]:
    """Return the record with its texts mended, and what was wrong with them.

    Its text and those of its fields that are texts are looked at.

    Raises:
        GovernanceError: a problem that the rules refuse.
    """
    rules = rules or DEFAULT_RULES
    problems: list[Problem] = []
    text = _checked(record.text, "text", record.place, rules, problems)
    fields: dict[str, Any] = {}
    for name, value in record.fields.items():
        if isinstance(value, str) and value:
            mended = _checked(value, name[:80], record.place, rules, problems)
            if mended is not value:
                fields[name] = mended
    if record.kind in _TEXT_KINDS and text.strip().casefold() in _NO_TEXTS:
        problems.append(rules.settle(Code.MISSING_TEXT, record.place, "text"))
    if text is not record.text or fields:
        changed: Mapping[str, Any] = {**record.fields, **fields} if fields else record.fields
        record = replace(record, text=text, fields=changed)
    return record, problems


def undo_mojibake(text: str) -> str:
    """Return the text in its right reading, line by line where need be; the same where it is."""
    if text.isascii() or not _ANY_MARK.search(text):
        return text
    readings = [
        reading
        for marks, reading in (
            (_AS_GBK, ("gbk", "utf-8")),
            (_AS_WINDOWS, ("windows", "utf-8")),
            (_AS_LATIN, ("latin-1", "gb18030")),
        )
        if marks.search(text)
    ]
    if not readings:
        return text
    whole = _read_again(text, readings)
    if whole is not None:
        return whole
    if "\n" not in text:
        return text
    lines = text.split("\n")
    again = [line if line.isascii() else _read_again(line, readings) or line for line in lines]
    return text if again == lines else "\n".join(again)


class Templates:
    """Counts lines over all records first, then says how much of a text they are."""

    def __init__(self, share: float = 0.05, capacity: int = 1 << 18) -> None:
        """Begin with no record.

        Args:
            share: of the records that must have a line before it is template.
            capacity: lines remembered at one time; what bounds the memory.
        """
        if not 0 < share <= 1 or capacity < 1:
            raise ValueError(f"need 0 < share <= 1 and capacity > 0, got {share} and {capacity}")
        self._share, self._capacity = share, capacity
        self._counts: dict[int, int] = {}
        self._missed, self._records = 0, 0

    def add(self, text: str) -> None:
        """Count the lines of a record's text, each once."""
        self._records += 1
        counts = self._counts
        for line in {hash(line) for line in _lines(text)}:
            counts[line] = counts.get(line, 0) + 1
        while len(counts) > self._capacity:
            self._missed += 1
            self._counts = counts = {line: n - 1 for line, n in counts.items() if n > 1}

    @property
    def is_exact(self) -> bool:
        """Whether no line had to be forgotten."""
        return not self._missed

    def ratio(self, text: str) -> float:
        """Return the share of a text's characters that lies in template lines.

        A line that was forgotten now and then counts as if it never was, so none is missed; at
        worst lines are called template that fall short of the share by what ``capacity`` cost.
        """
        least = max(2, self._share * self._records) - self._missed
        lines = _lines(text)
        template = sum(len(line) for line in lines if self._counts.get(hash(line), 0) >= least)
        return template / (sum(map(len, lines)) or 1)

    def check(
        self, record: Record, rules: Rules | None = None, limit: float = 0.8
    ) -> list[Problem]:
        """Return that a record's text is template, where it is.

        Args:
            record: one of those that were counted.
            rules: what becomes of it.
            limit: the ratio from which a text says nothing of its patient.

        Raises:
            GovernanceError: the rules refuse it.
        """
        if record.text and self.ratio(record.text) >= limit:
            return [(rules or DEFAULT_RULES).settle(Code.TEMPLATE_TEXT, record.place, "text")]
        return []


def _checked(text: str, name: str, place: str, rules: Rules, problems: list[Problem]) -> str:
    """Return a text as the rules leave it, and note what was wrong."""
    if not text:
        return text
    again = undo_mojibake(text)
    if again is not text:
        problems.append(rules.settle(Code.MOJIBAKE, place, name))
        if problems[-1].action != "fix":
            return text  # its control characters are halves of what was there
        text = again
    if not text.isascii() and _is_lost(text):
        problems.append(rules.settle(Code.LOST_CHARACTERS, place, name))
    if _has_control(text):
        problems.append(rules.settle(Code.CONTROL_CHARACTERS, place, name))
        if problems[-1].action == "fix":  # one of them may have hidden the rest
            return _checked(_CONTROL.sub("", text), name, place, rules, problems)
    return text


def _read_again(text: str, readings: list[tuple[str, str]]) -> str | None:
    """Return the one right reading of a text that was read wrongly; None for none or several."""
    found = set()
    for wrong, right in readings:
        try:
            again = _bytes(text, wrong).decode(right)
        except UnicodeError:
            continue
        if again != text and _is_written(again):
            found.add(again)
    return found.pop() if len(found) == 1 else None


def _bytes(text: str, encoding: str) -> bytes:
    """Return the bytes of a text as Windows reads them: byte 80 is the euro sign in its GBK.

    What its Latin alphabet, Windows-1252, leaves out is read as Latin 1.
    """
    if encoding == "gbk":
        return b"\x80".join(part.encode("gb18030") for part in text.split("€"))
    if encoding == "latin-1":
        return text.encode(encoding)
    try:
        return text.encode("cp1252")
    except UnicodeEncodeError:
        return b"".join(
            c.encode("latin-1") if "\x80" <= c <= "\x9f" else c.encode("cp1252") for c in text
        )


def _is_lost(text: str) -> bool:
    """Return whether characters of a text are beyond recovery."""
    if any(mark in text for mark in _LOST):
        return True
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return True
    marks = len(_AS_GBK.findall(text)) if _ANY_MARK.search(text) else 0
    is_marked = marks > 2 and marks > _MARK_SHARE * sum(not c.isascii() for c in text)
    return is_marked and _frequent(text) < 0.5  # names have some of the marks


def _has_control(text: str) -> bool:
    plain = text.replace("\n", "").replace("\u3000", "").replace("\t", "").replace("\r", "")
    return not plain.isprintable() and bool(_CONTROL.search(text))


def _is_written(text: str) -> bool:
    """Return whether people write so: known scripts, nothing invisible, mostly frequent hanzi."""
    is_odd = _CONTROL.search(text) or _UNWRITTEN.search(text)
    return not is_odd and not _is_lost(text) and _frequent(text) >= 0.7


def _frequent(text: str) -> float:
    """Return the share of frequent ones among a text's hanzi; 1 where it has none.

    Those of GB 2312's first level lie at B0A1 to D7F9 and are nine in ten of any Chinese text.
    """
    data = [c.encode("gbk", "ignore") for c in text if "\u4e00" <= c <= "\u9fff"]
    return sum(b"\xb0\xa1" <= c <= b"\xd7\xf9" for c in data) / len(data) if data else 1.0


def _lines(text: str) -> list[str]:
    """Return the lines and sentences of a text that are long enough to say something."""
    parts = text.replace("。", "\n").replace("；", "\n").split("\n")
    return [line for line in map(str.strip, parts) if len(line) >= _MIN_LINE]
