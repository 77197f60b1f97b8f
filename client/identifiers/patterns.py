"""Identifiers that show by their form.

Python's ``re`` knows no word boundary between a Chinese character and a digit: look-arounds stand
in its place. A wrong checksum does not spare a number, it makes it a suspect: a mistyped
identity number still leads to its owner. Numbers may hold single blanks, dashes or line breaks.

Texts are folded before they come here (``folding.py``).
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from huizhen.client.identifiers.finding import Kind, Source, Span

_LONG = re.compile(r"[0-9](?<![0-9A-Za-z_.].)(?:[ \n-]{0,2}[0-9]){7,}+[Xx*]?")
_GROUPS = re.compile(r"[0-9]+[Xx]?")
_UNIT = re.compile(r" ?(?:iu|u/|copies|拷贝|cps|cfu|/l|/u|/m|个|ml|ng|pg|%|\.[0-9]|[*×x]10)", re.I)
_MOBILE = re.compile(r"(?:0{0,2}86)?1[3-9][0-9]{9}")
_ID_18 = re.compile(
    r"[1-9][0-9]{5}(?:18|19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])[0-9]{3}[0-9Xx]"
)
_ID_15 = re.compile(r"[1-8][0-9]{7}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])[0-9]{3}")
_STAMP = re.compile(
    r"(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])(?:[01][0-9]|2[0-3])[0-5][0-9]{3}"
)
_GROUPED: dict[tuple[int, ...], Kind] = {
    (3, 2, 4): "id",  # United States social security number
    (3, 3, 4): "phone",
    (1, 3, 3, 4): "phone",
    (3, 4, 4): "phone",
    (4, 4, 4, 4): "bank",
    (4, 4, 4, 4, 2): "bank",
    (4, 4, 4, 4, 3): "bank",
    (6, 13): "bank",
}


class _Form(NamedTuple):
    kind: Kind
    regex: re.Pattern[str]
    hints: str  # one of these characters is in every match; none: the text is searched anyway


def _form(kind: Kind, regex: str, hints: str = "") -> _Form:
    return _Form(kind, re.compile(regex), hints)


_PLATE = "京津沪渝冀豫云辽黑湘皖鲁新苏浙赣鄂桂甘晋蒙陕吉闽贵粤青藏川宁琼"
_FORMS = (
    _form(
        "email",
        r"(?<![A-Za-z0-9_.%+-])[A-Za-z0-9_.%+-]++ ?@ ?[A-Za-z0-9-]++(?: ?\.[A-Za-z0-9-]+)++",
        "@",
    ),
    _form("url", r"(?:https?://|www\.)[^\s<>\"'，。；、）)】]+", ":w"),
    _form("ip", r"[0-9](?<![0-9.].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![0-9]|\.[0-9])", "."),
    _form(
        "ip",
        r"[0-9A-Fa-f](?<![0-9A-Fa-f:].)[0-9A-Fa-f][:-](?:[0-9A-Fa-f]{2}[:-]){4}[0-9A-Fa-f]{2}(?![0-9A-Fa-f:])",
        ":",
    ),
    _form(
        "ip",
        r"[0-9A-Fa-f](?<![0-9A-Fa-f:].)[0-9A-Fa-f]{0,3}:(?:[0-9A-Fa-f]{1,4}:){6}[0-9A-Fa-f]{1,4}",
        ":",
    ),
    _form("mrn", r"[0-2](?<![0-9.].)(?:\.[0-9]{1,40}){5,}+", "."),  # an object identifier
    _form(
        "phone",
        r"[0(](?<![0-9A-Za-z.].)(?:(?<=\()0)?[1-9][0-9]{1,2}\)?[ -]{0,2}[2-9][0-9]{2,3}[ -]?[0-"
        r"9]{4}"
        r"(?![0-9])(?: ?(?:转|-|分机|ext\.?) ?[0-9]{1,6})?",
    ),
    _form("phone", r"\( ?[2-9](?:[ \n]?[0-9]){2} ?\)(?:[ \n.-]{0,2}[0-9]){7}(?![0-9])", ")"),
    _form(
        "phone",
        r"[2-9](?<![0-9.].)(?:[ \n]?[0-9]){2}[ \n]?\.(?:[ \n]?[0-9]){3}[ \n]?\.(?:[ \n]?[0-9]"
        r"){4}(?![0-9])",
        ".",
    ),
    _form("phone", r"\+[1-9][0-9]{0,2}(?:[ .()-]{0,2}[0-9]){6,13}(?![0-9])", "+"),
    _form("phone", r"[1-9][0-9]{2}(?<![0-9]...)[*Xx×]{3,6}[0-9]{2,4}(?![0-9])", "*xX×"),
    _form("id", r"[1-9](?:[0-9]{2,9}[*Xx×]{6,12}|[0-9]{5,9}[*Xx×]{4,5})[0-9]{0,4}[0-9Xx*]", "*xX×"),
    _form("id", r"[A-Z](?<![A-Za-z0-9].)[A-Z]?[0-9]{6}\([0-9A]\)", "("),  # Hong Kong
    _form("id", r"[A-Z](?<![A-Za-z0-9].)[12][0-9]{8}(?![0-9A-Za-z])"),  # Taiwan
    _form("id", r"[EGPSDHMC](?<![A-Za-z0-9:].)[A-Z]? ?[0-9]{8}(?:[0-9]{2})?(?![0-9A-Za-z])"),
    _form("id", r"[南北沈兰成济广海空政参后装军武](?:字)第? ?[0-9]{5,9}号?", "字"),
    _form("mrn", r"[A-Z](?<![A-Za-z0-9:_].)[A-Z]{0,4}-?[0-9](?:-?[0-9]){6,18}(?![0-9A-Za-z])"),
    _form(
        "plate",
        rf"[{_PLATE}][A-HJ-NP-Z][·. -]?(?=[A-HJ-NP-Z]*[0-9])(?:[A-HJ-NP-Z0-9] ?){{4,5}}"
        r"[A-HJ-NP-Z0-9挂学警港澳](?![A-Za-z0-9])",
        _PLATE,
    ),
    _form("plate", r"[A-HJ-NP-Z](?<=[\u4e00-\u9fff].)[·-][A-HJ-NP-Z0-9]{5,6}(?![A-Za-z0-9])", "·"),
)
_NOT_HOSPITALS = re.compile(
    r"(?:NCT|HP|ENS[A-Z]*|NM|NP|NC|CHEMBL|CID|GO|MIM|PMC|DB|RS|COVID)-?[0-9]"
)


def by_form(text: str) -> Iterator[Span]:
    """Yield what shows by its form alone.

    Args:
        text: folded.
    """
    letters = set(text)
    if letters.isdisjoint("0123456789@/"):
        return
    yield from _long_numbers(text)
    for kind, regex, hints in _FORMS:
        if hints and letters.isdisjoint(hints):
            continue
        for match in regex.finditer(text):
            found = match[0]
            if kind == "ip" and found.count(".") == 3 and not _is_address(found):
                continue
            if kind in ("mrn", "id") and _NOT_HOSPITALS.match(found):
                continue
            yield Span(match.start(), match.end(), kind, "pattern")


def has_right_checksum(number: str) -> bool:
    """Tell whether an 18-digit resident identity number ends as it must (GB 11643-1999, 4.2)."""
    return number[-1:].upper() == check_character(number[:17])


def check_character(seventeen: str) -> str:
    """Return the last character that belongs to the first 17 (ISO 7064, MOD 11-2)."""
    remainder = sum(int(d) * (1 << (17 - i)) for i, d in enumerate(seventeen)) % 11
    return "10X98765432"[remainder]


def passes_luhn(digits: str) -> bool:
    """Tell whether a card number ends as it must (ISO/IEC 7812-1, Annex B)."""
    doubled = (int(d) * (1 + i % 2) for i, d in enumerate(reversed(digits)))
    return sum(n - 9 if n > 9 else n for n in doubled) % 10 == 0


def _is_address(found: str) -> bool:
    octets = [int(octet) for octet in found.split(".")]
    return max(octets) < 256 and max(octets) >= 30  # 3.2.1.4 is a section


def _long_numbers(text: str) -> Iterator[Span]:
    for match in _LONG.finditer(text):
        start, end = match.span()
        if end - start < 9:
            continue
        compact = re.sub(r"[ \n-]", "", match[0])
        groups = [(start + g.start(), start + g.end()) for g in _GROUPS.finditer(match[0])]
        dashed = [sum(map(str.isalnum, part)) for part in match[0].split("-")]
        if whole := _whole(compact, [b - a for a, b in groups], dashed):
            yield Span(start, end, *whole)
            continue
        for a, b in groups:
            number = text[a:b]
            if b - a >= 9 and not (_UNIT.match(text, b) and b - a < 15):
                kind, source = _whole(number, [b - a], [b - a]) or ("mrn", "suspect")
                yield Span(a, b, kind, source)
        yield from _neighbours(text, groups)


def _neighbours(text: str, groups: list[tuple[int, int]]) -> Iterator[Span]:
    """Yield a mobile number that stands, in parts, beside other numbers."""
    for i in range(len(groups) - 1):
        for width in (2, 3):
            some = groups[i : i + width]
            number = "".join(text[a:b] for a, b in some)
            if len(some) == width and len(number) == 11 and _MOBILE.fullmatch(number):
                yield Span(some[0][0], some[-1][1], "phone", "pattern")


def _whole(number: str, sizes: list[int], dashed: list[int]) -> tuple[Kind, Source] | None:
    """Return what a number is.

    Args:
        number: its digits.
        sizes: of the parts that it is written in.
        dashed: of the parts between dashes; blanks are noise more often than dashes are.
    """
    in_few_parts = len(sizes) <= 3 or max(sizes) == 1
    if _ID_18.fullmatch(number) and (in_few_parts or len(sizes) <= 5):
        return "id", "pattern" if has_right_checksum(number) else "suspect"
    if _ID_15.fullmatch(number) and in_few_parts:
        return "id", "pattern"
    if _MOBILE.fullmatch(number) and (in_few_parts or (sizes[0] in (2, 4) and len(sizes) == 4)):
        return "phone", "pattern"
    if kind := _GROUPED.get(tuple(sizes)) or _GROUPED.get(tuple(dashed)):
        return kind, "pattern"
    if len(sizes) == 1 and _STAMP.fullmatch(number):
        return "date", "pattern"
    if len(sizes) <= 2 and 16 <= len(number) <= 19 and number.isdigit():
        return ("bank", "pattern") if passes_luhn(number) else ("mrn", "suspect")
    return None
