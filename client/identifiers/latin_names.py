"""Names in Latin letters, in context: after Dr., Patient:, "wife", before MD, RN, at a signature.

Eponyms and headings are capitalised too: a word of the list below is never a name by context.
"""

import re
from collections.abc import Iterator

from huizhen.client.identifiers.finding import Span
from huizhen.client.identifiers.folding import ends_of, lines_of, words

_WORD = (
    r"(?:(?:Mc|Mac|O['’]|De|Di|La|Le|Van|D['’])?[A-ZÀ-Þ][a-zà-ÿ\u0100-\u017f]+(?:[-'’][A-Z]?[a-"
    r"zà-ÿ\u0100-\u017f]+)*)"
)
_UPPER = r"[A-Z]{2,}(?:[-'’][A-Z]+)?"
_PARTICLE = r"(?:(?:van|von|de|del|della|der|da|dos|la|le|bin|al|el|ter)[ ]){0,2}"
_NAME = (
    rf"(?:{_WORD},[ ]?{_WORD}(?:[ ][A-Z]\.?)?|{_UPPER},[ ]?(?:{_UPPER}|{_WORD})(?:[ ][A-Z]\.?)?"
    rf"|{_PARTICLE}(?:[A-Z]\.[ ]?){{0,2}}{_WORD}(?:[ ][A-Z]\.?(?=[ ]))?(?:[ "
    rf"]{_PARTICLE}{_WORD}){{0,3}}"
    rf"|(?:[A-Z]\.[ ]?){{0,2}}{_UPPER}(?:[ ][A-Z]\.?(?=[ ]))?(?:[ ]{_UPPER}){{0,2}})"
)
_READ = re.compile(rf"(?P<v>{_NAME})(?![A-Za-z])")
_TITLES = words("latin", "titles")
_AFTER_TITLE = re.compile(r"(?:\.[ \n]?|[ \n])(?=[A-Zdvbla])")
_COLON = words("latin", "colon")
_AFTER_COLON = re.compile(r"\s?[:#]\s{0,3}(?:(?:Dr|DR|Mr|Mrs|Ms)\.? )?")
_BARE = words("latin", "bare")
_AFTER_BARE = re.compile(r",?[ ]{1,2}")
_CLOSING = words("latin", "closing")
_AFTER_CLOSING = re.compile(r",?\s{1,3}")
_CHINESE = words("latin", "chinese")
_AFTER_CHINESE = re.compile(r"[\s:(为是]{0,4}")
_DEGREE = re.compile(
    r" (?:M\.?D|R\.?N|Ph\.?D|D\.?O|N\.?P|PA(?:-C)?|DDS|FRCP|MBBS|LPN|PharmD|FACP|MRCP|CRNA)"
    r"(?![A-Za-z])"
)
_BEFORE_DEGREE = re.compile(
    rf"(?<![A-Za-z])(?:{_WORD}(?:[ ][A-Z]\.?)?(?:[ ]{_PARTICLE}{_WORD}){{1,3}}|(?:[A-Z]\.[ ]?"
    rf"){{1,2}}{_WORD}|{_UPPER}(?: {_UPPER}){{1,2}})$"
)
_FIRST = frozenset(lines_of("first_names.txt"))
_CAPITAL = re.compile(r"[A-Z](?<![A-Za-z-].)[a-z]{2,}")
_FAMILY = re.compile(rf"(?:[ ][A-Z]\.?)?[ ]{_PARTICLE}{_WORD}(?![A-Za-z])")
_AFTER_ANY_COLON = re.compile(
    rf"[ ]{{0,2}}(?P<v>{_WORD}(?:[ ][A-Z]\.?)?[ ]{_PARTICLE}{_WORD})"
    r"(?=[ ]*(?:[,.;(\n]|$|[ ]{2}|[0-9]))"
)
_CAPITALISED = re.compile("[A-ZÀ-Þ][a-zà-ÿ]")
_ALONE = frozenset(("by", "with", "saw", "told", "patient", "from", "to", "for", "pt"))
_NOT_NAMES = frozenset(words("latin", "not_names"))


def latin_names(text: str, low: str) -> Iterator[Span]:
    """Yield the names in Latin letters that their surroundings show.

    Args:
        text: folded.
        low: the same in lower case.
    """
    if not _CAPITALISED.search(text) and not text.isascii():
        return
    for labels, gap in (
        (_TITLES, _AFTER_TITLE),
        (_COLON, _AFTER_COLON),
        (_BARE, _AFTER_BARE),
        (_CLOSING, _AFTER_CLOSING),
    ):
        for word in labels:
            for end in ends_of(low, word):
                after = gap.match(text, end)
                if after and (found := _READ.match(text, after.end())):
                    stop = _stop(found[0], word)
                    if stop and (found.start() > end or labels is _TITLES):
                        yield Span(found.start(), found.start() + stop, "name", "context")
    if not text.isascii():
        for end in ends_of(text, *_CHINESE):
            if (found := _READ.match(text, _AFTER_CHINESE.match(text, end).end())) and (  # type: ignore[union-attr]
                stop := _stop(found[0], "by")
            ):
                yield Span(found.start(), found.start() + stop, "name", "context")
    yield from _by_shape(text)
    for degree in _DEGREE.finditer(text):
        end = degree.start() - (text[degree.start() - 1 : degree.start()] == ",")
        if (found := _BEFORE_DEGREE.search(text, max(0, end - 48), end)) and _stop(found[0], ""):
            yield Span(found.start(), found.end(), "name", "context")


def _by_shape(text: str) -> Iterator[Span]:
    """Yield a common given name with a family name, and two such words after any colon."""
    for match in _CAPITAL.finditer(text):
        if match[0] in _FIRST and (rest := _FAMILY.match(text, match.end())):
            start = match.start()
            if stop := _stop(text[start : rest.end()], ""):
                yield Span(start, start + stop, "name", "context")
    for end in ends_of(text, ": "):
        found = _AFTER_ANY_COLON.match(text, end)
        if found and _stop(found["v"], "") == len(found["v"]):
            yield Span(*found.span("v"), "name", "context")


def _stop(name: str, label: str) -> int:
    """Return where the name ends: before the first word that belongs to no name."""
    words = list(re.finditer(r"[^\s,]+", name))
    kept = 0
    for word in words:
        if word[0] in _NOT_NAMES and not (label in _TITLES and len(words) == 1):
            break
        kept += 1
    if not kept or (label in _ALONE and kept < 2):
        return 0
    return words[kept - 1].end()
