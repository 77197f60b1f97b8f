"""Numbers and accounts that show by the label before them: 住院号, MRN, 电话, 微信, Policy number.

Texts are folded, and in lower case beside, before they come here (``folding.py``).
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from huizhen.client.identifiers.finding import Kind, Span
from huizhen.client.identifiers.folding import ends_of, words

_GAP = (
    r"(?:[\s:：#=()（）\[\]/_]|号码|号|码|为|是|编|no\.?|nos|num(?:ber)?|is|id\b|手机|座机|家庭"
    r"|本人|家属){0,8}+"
)
_NUMBER = re.compile(
    _GAP + r"(?P<v>(?:[a-z]{1,6}[ -]?)?[0-9](?:[ \n/-]{0,2}[0-9]|[a-z](?![a-z]{2})|[*]){2,24})"
)
_PHONE = re.compile(
    _GAP + r"(?P<v>[+(]?[0-9](?:[ \n().-]{0,2}[0-9*]){2,16}(?: ?(?:转|ext\.?|x) ?[0-9]{1,6})?)"
)
_ACCOUNT = re.compile(_GAP + r"(?P<v>[a-z][a-z0-9_-]{4,24}|[0-9](?:[ -]?[0-9]){4,12})")
_LICENCE = re.compile(
    _GAP + r"(?P<v>[a-z]{0,4}-?[0-9a-z]{0,12}[0-9](?:[ \n-]?[0-9]|[a-z*](?![a-z]{2})){0,24})"
)
_CUT = re.compile(
    r"[ \n](?:(?:19|20)[0-9]{2}[-/ ][0-9]{1,2}[-/ ]|[0-9]{1,3}(?= ?(?:床|岁|年|月|日|天|次|/|%|"
    r"\.[0-9]|y|:))|[a-z]$)"
)


class _Labels(NamedTuple):
    kind: Kind
    value: re.Pattern[str]
    least: int  # letters and digits
    words: tuple[str, ...]


_LABELS = (
    _Labels("mrn", _NUMBER, 3, words("labels", "hospital")),
    _Labels("insurance", _NUMBER, 5, words("labels", "insurance")),
    _Labels("phone", _PHONE, 3, words("labels", "extension")),
    _Labels("phone", _PHONE, 5, words("labels", "phone")),
    _Labels("id", _LICENCE, 5, words("labels", "id")),
    _Labels("bank", _NUMBER, 8, words("labels", "bank")),
    _Labels("account", _ACCOUNT, 5, words("labels", "account")),
)
_ZIP = re.compile(r"(?:[\s:编码号])*(?P<v>[0-9]{6})(?![0-9])")
_GLUED = re.compile(r"[a-z]")


def by_label(text: str, low: str) -> Iterator[Span]:
    """Yield what shows by its label.

    Args:
        text: folded.
        low: the same in lower case.
    """
    for kind, value, least, labels in _LABELS:
        for end in ends_of(low, *labels):
            found = value.match(low, end)
            if found and (span := _value(low, found, kind, least)):
                yield span
    for end in ends_of(low, "邮编", "邮政编码"):
        if found := _ZIP.match(low, end):
            yield Span(*found.span("v"), "address", "context")


def _value(low: str, found: re.Match[str], kind: Kind, least: int) -> Span | None:
    start, end = found.span("v")
    if found.start() == start and _GLUED.match(low, start) and low[start - 1].isascii():
        return None  # "chartered", "extra": the label was the beginning of a word
    if cut := _CUT.search(low, start, end + 3):
        end = min(end, cut.start())
    value = low[start:end]
    if sum(map(str.isalnum, value)) < least or not (kind == "account" or _has_digit(value)):
        return None
    return Span(start, end, kind, "context")


def _has_digit(value: str) -> bool:
    return any("0" <= char <= "9" for char in value)
