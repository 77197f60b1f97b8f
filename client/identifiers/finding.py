"""Where something that names a person stands in a text, and what it is."""

from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

Kind = Literal[
    "name",  # of the patient, of relatives, of staff
    "id",  # resident identity number, passport, permit, social security number
    "phone",
    "mrn",  # any number that a hospital gives: patient, stay, examination, specimen, device
    "insurance",
    "bank",
    "email",
    "account",  # WeChat, QQ
    "plate",
    "ip",
    "url",
    "date",
    "age",  # of 90 and above
    "address",
    "employer",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

Source = Literal["known", "staff", "pattern", "suspect", "context", "model"]
# "suspect": of the right form, but its checksum is wrong; or too long a number for a measurement

_RANK = {"known": 0, "staff": 1, "pattern": 2, "context": 3, "suspect": 4, "model": 5}


class Span(NamedTuple):
    """The characters from ``start`` to before ``end``; it holds no text, so it may be shown."""

    start: int
    end: int
    kind: Kind
    source: Source


def merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Return disjoint spans in order that cover all that the given ones cover.

    Of spans that overlap, the longest says what the whole is; of equally long ones, the source
    that can be trusted most. Nothing that was found is left uncovered.
    """
    kept: list[Span] = []
    widest = 0  # characters of the span that named the last one kept
    for span in sorted(set(spans)):
        if not kept or span.start >= kept[-1].end:
            kept.append(span)
            widest = span.end - span.start
            continue
        last, length = kept[-1], span.end - span.start
        takes_over = (length, -_RANK[span.source]) > (widest, -_RANK[last.source])
        name = span if takes_over else last
        kept[-1] = Span(last.start, max(last.end, span.end), name.kind, name.source)
        widest = max(widest, length)
    return tuple(kept)
