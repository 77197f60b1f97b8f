"""How much of what names somebody is found, and how much else is taken for it.

An identifier counts as found when each of its letters and digits is covered, by whatever kind:
half a number found is a number missed. The gate looks at the lower end of the 95 % interval, so
that too few notes fail it rather than pass it by luck.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

from huizhen.client.identifiers.finding import Kind, Span
from huizhen.client.identifiers.notes import Note

LEAST_RECALL: Mapping[Kind, float] = {"id": 0.995, "phone": 0.995, "mrn": 0.995, "name": 0.98}
LEAST_PRECISION = 0.95
Z_95 = 1.959964

Find = Callable[[Note], Sequence[Span]]


@dataclass(frozen=True, slots=True)
class Share:
    """So many of so many, and what share of all such that leaves possible."""

    hits: int
    of: int

    @property
    def value(self) -> float:
        """The share itself; 1 of nothing."""
        return self.hits / self.of if self.of else 1.0

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval (Wilson, JASA 22 (1927) 209)."""
        if not self.of:
            return 0.0, 1.0
        n, p = self.of, self.value
        middle = (p + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
        half = Z_95 / (1 + Z_95**2 / n) * sqrt(p * (1 - p) / n + Z_95**2 / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a finder achieves on notes whose answers are known."""

    recall: Mapping[Kind, Share]  # without those held out
    held_out: Mapping[Kind, Share]  # names and sentences kept from the detector: what is to expect
    unknown: Mapping[Kind, Share]  # of all, those in neither the hospital's data nor list of staff
    precision: Share  # of what was found in notes with identifiers, what touches one
    untouched: Share  # of the notes without identifiers, those in which nothing was found

    def shortfalls(self) -> tuple[str, ...]:
        """Return what keeps the gate shut; nothing: it is open."""
        low = [
            f"recall of {kind!r} is {self.recall.get(kind, Share(0, 0)).interval()[0]:.4f} at "
            f"the lower end, the gate needs {least}"
            for kind, least in LEAST_RECALL.items()
            if self.recall.get(kind, Share(0, 0)).interval()[0] < least
        ]
        for name, share in (("precision", self.precision), ("untouched", self.untouched)):
            if share.interval()[0] < LEAST_PRECISION:
                low.append(
                    f"share {name!r} is {share.interval()[0]:.4f} at the lower end, the gate "
                    f"needs {LEAST_PRECISION}"
                )
        return tuple(low)


def measure(find: Find, notes: Iterable[Note], traps: Iterable[Note]) -> Measured:
    """Return what a finder achieves.

    Args:
        find: what it finds in a note, in order and disjoint.
        notes: with identifiers.
        traps: without any.
    """
    tallies: tuple[dict[Kind, list[int]], ...] = ({}, {}, {})
    right = found = 0
    for note in notes:
        spans = find(note)
        covered = {i for span in spans for i in range(span.start, span.end)}
        planted = {i for p in note.planted for i in range(p.span.start, p.span.end)}
        found += len(spans)
        right += sum(not planted.isdisjoint(range(s.start, s.end)) for s in spans)
        for p in note.planted:
            letters = (i for i in range(p.span.start, p.span.end) if note.text[i].isalnum())
            hit = covered.issuperset(letters)
            for tally, counts in zip(
                tallies, (not p.held_out, p.held_out, not p.is_known), strict=True
            ):
                if counts:
                    some = tally.setdefault(p.span.kind, [0, 0])
                    some[0] += hit
                    some[1] += 1
    results = [not find(note) for note in traps]
    main, held_out, unknown = (
        {kind: Share(*some) for kind, some in tally.items()} for tally in tallies
    )
    return Measured(main, held_out, unknown, Share(right, found), Share(sum(results), len(results)))
