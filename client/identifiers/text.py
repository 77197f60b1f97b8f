"""One record's text without what names the patient, relatives or staff.

``Finder`` says where identifiers stand; ``Deidentifier`` puts surrogates, or words in brackets,
in their place. Neither tells what was found: what comes back is the new text and counts.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from huizhen.client.identifiers.addresses import addresses, ages
from huizhen.client.identifiers.dates import dates, year_of
from huizhen.client.identifiers.finding import KINDS, Kind, Span, merged
from huizhen.client.identifiers.folding import fold, has_han, lowered, squeezed
from huizhen.client.identifiers.known import Literal as Wanted
from huizhen.client.identifiers.known import Prepared, Roster, known, literals
from huizhen.client.identifiers.labels import by_label
from huizhen.client.identifiers.latin_names import latin_names
from huizhen.client.identifiers.names import names
from huizhen.client.identifiers.patterns import by_form
from huizhen.client.identifiers.surrogates import Surrogates, tag
from huizhen.protocol.errors import ConfigError

Action = Literal["surrogate", "tag", "keep"]
ATTEMPTS = 8
_USUAL_YEAR = 2024  # a leap year, for a text that names none


class NameModel(Protocol):
    """A model that a hospital supplies; it runs at the hospital."""

    def spans(self, text: str) -> Sequence[Span]:
        """Return where it finds something; positions are those of the text."""
        ...


class Finder:
    """Finds what names somebody, by what is known, by form, by label and by context."""

    def __init__(self, *, staff: Iterable[str] = (), model: NameModel | None = None) -> None:
        self._roster = Roster(staff)
        self._model = model

    def find(
        self, text: str, identifiers: Mapping[str, Iterable[str]] | None = None
    ) -> tuple[Span, ...]:
        """Return disjoint spans in order.

        Args:
            text: of one record.
            identifiers: of its patient, as of a record.
        """
        return self._find(text, literals(identifiers or {}))

    def _find(self, text: str, wanted: Sequence[Wanted]) -> tuple[Span, ...]:
        prepared = Prepared(text)
        found = list(known(prepared, wanted))
        found += self._roster.find(prepared)
        found += _unknown(prepared)
        found += _again(prepared.folded, found)
        if self._model:
            length = len(text)
            found += (s for s in self._model.spans(text) if 0 <= s.start < s.end <= length)
        return merged(found)


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A text without identifiers, and how many of each kind it had."""

    text: str = field(repr=False)
    counts: Mapping[Kind, int]


class Deidentifier:
    """Replaces what a finder finds; the same key and patient give the same text."""

    def __init__(
        self,
        key: bytes,
        *,
        finder: Finder | None = None,
        actions: Mapping[Kind, Action] | None = None,
    ) -> None:
        """Keep how to replace.

        Args:
            key: of the site, at least 32 random bytes; it never leaves.
            finder: as given, or one that knows no staff.
            actions: of the kinds that are not to be replaced by surrogates.

        Raises:
            ConfigError: the key is too short, or an action or kind is not one.
        """
        Surrogates(key, "")
        self._key = key
        self._finder = finder or Finder()
        self._actions = dict(actions or {})
        for kind, action in self._actions.items():
            if kind not in KINDS or action not in ("surrogate", "tag", "keep"):
                raise ConfigError(
                    f"action of {kind!r} is {action!r}, expected a kind of {', '.join(KINDS)} and "
                    "'surrogate', 'tag' or 'keep'"
                )

    def clean(
        self,
        text: str,
        patient: str,
        identifiers: Mapping[str, Iterable[str]] | None = None,
        *,
        time: str = "",
    ) -> Cleaned:
        """Return the text of a record without identifiers.

        Args:
            text: of one record.
            patient: the hospital's own number, by which surrogates stay the same.
            identifiers: as of the record.
            time: of the record; dates without a year are taken to lie in its year.
        """
        wanted = literals(identifiers or {})
        spans = self._finder._find(text, wanted)
        if not spans:
            return Cleaned(text, {})
        surrogates = Surrogates(self._key, patient)
        in_chinese = has_han(text)
        year = int(time[:4]) if time[:4].isdigit() else 0
        year = year or next(filter(None, (_year(text, s) for s in spans)), _USUAL_YEAR)
        secrets = [literal.text for literal in wanted if len(literal.text) > 1]
        parts, at = [], 0
        counts: dict[Kind, int] = {}
        for span in spans:
            raw = text[span.start : span.end]
            year = _year(text, span) or year
            counts[span.kind] = counts.get(span.kind, 0) + 1
            new = self._new(surrogates, span.kind, raw, year, in_chinese, secrets)
            parts += [text[at : span.start], new]
            at = span.end
        parts.append(text[at:])
        return Cleaned("".join(parts), counts)

    def _new(
        self,
        surrogates: Surrogates,
        kind: Kind,
        raw: str,
        year: int,
        in_chinese: bool,
        secrets: Sequence[str],
    ) -> str:
        action = self._actions.get(kind, "surrogate")
        if action == "keep":
            return raw
        if action == "surrogate":
            for attempt in range(ATTEMPTS):
                new = surrogates.of(kind, raw, year=year, in_chinese=in_chinese, attempt=attempt)
                low = squeezed(lowered(fold(new)))
                for secret in secrets:
                    if secret in low:
                        break
                else:
                    if new != raw:
                        return new
        return tag(kind, in_chinese=in_chinese)


def _unknown(prepared: Prepared) -> Iterator[Span]:
    text, low = prepared.folded, prepared.low
    yield from by_form(text)
    yield from by_label(text, low)
    yield from dates(text)
    yield from addresses(text, low)
    yield from ages(text, low)
    if has_han(text):
        yield from names(text)
    yield from latin_names(text, low)


def _again(text: str, found: Iterable[Span]) -> Iterator[Span]:
    """Yield where a name that context showed once stands without context."""
    shown = {text[s.start : s.end] for s in found if s.kind == "name" and s.source == "context"}
    for name in shown:
        if len(name) < (3 if has_han(name) else 8):
            continue
        begin = text.find(name)
        while begin >= 0:
            yield Span(begin, begin + len(name), "name", "context")
            begin = text.find(name, begin + len(name))


def _year(text: str, span: Span) -> int | None:
    return year_of(fold(text[span.start : span.end])) if span.kind == "date" else None
