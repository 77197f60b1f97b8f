"""What a hospital's data are like, in counts: made while records pass, small cells left out.

Everything is at the hospital and stays there but for suppressed counts, which a dataset statement
may hold. A count below ``smallest_cell`` is not shown, nor others that would tell it (Hundepool et
al., Statistical Disclosure Control, 2012, section 4.2); what a cell says is shown only where so
many say it, for a rare class or the name of a lab may be somebody's.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from huizhen.client.clean import CleanRecord
from huizhen.client.quality.labs import LAB_SYSTEM
from huizhen.client.records.mapping import is_empty
from huizhen.client.records.record import Record
from huizhen.client.records.times import moment

SAMPLE = 512
MAX_PATIENTS = 1000
# of a lab that are told apart: enough to know that there are enough
# values of one lab that are kept to draw quantiles from
MAX_CLASSES = 200
# of a table; a field with more is no class
FEW = "(few)"
_OWN = ("records of a patient", "sex", "age", "length of text", "language", "year")
# tables whose cells are named here, not by the export
_LENGTHS = (0, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
_PER_PATIENT = (1, 2, 3, 6, 11, 31)
_AGES = (0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90)


@dataclass(frozen=True, slots=True)
class Cell:
    """One line of a table."""

    name: str
    count: int | None
    # None: too small to show


@dataclass(slots=True)
class LabProfile:
    """What is known of one lab."""

    unit: str = ""
    count: int = 0
    patients: set[str] = field(default_factory=set, repr=False)
    sample: list[tuple[int, float]] = field(default_factory=list, repr=False)
    # rank by a keyless hash of the place, value: the lowest ranks are kept, the same each time

    def add(self, patient: str, place: str, value: float) -> None:
        """Take in a value of a patient."""
        self.count += 1
        if len(self.patients) < MAX_PATIENTS:
            self.patients.add(patient)
        rank = int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "big")
        if len(self.sample) < SAMPLE:
            self.sample.append((rank, value))
            if len(self.sample) == SAMPLE:
                self.sample.sort()
        elif rank < self.sample[-1][0]:
            self.sample[-1] = (rank, value)
            self.sample.sort()

    def quantiles(self) -> tuple[float, float, float]:
        """Return the 5th, 50th and 95th percentile of the sample."""
        low, middle, high = np.quantile([value for _, value in self.sample], [0.05, 0.5, 0.95])
        return float(low), float(middle), float(high)


class Profile:
    """Counts records on their way."""

    def __init__(self, *, label: str | None, smallest_cell: int) -> None:
        """Begin with no record.

        Args:
            label: the field whose classes are counted.
            smallest_cell: of patients or records; lower counts are not shown.
        """
        self._label, self.smallest_cell = label, smallest_cell
        self.records = 0
        self._of_patient: Counter[str] = Counter()
        self._held_out: set[str] = set()
        self._tables: dict[str, Counter[str]] = {}
        self._filled: Counter[str] = Counter()
        self._people: dict[str, tuple[str, str]] = {}
        # pseudonym -> sex and band of age, of the first record that says them
        self.labs: dict[str, LabProfile] = {}

    def add(self, record: Record, clean: CleanRecord) -> None:
        """Take in a record that goes on, as it was mended and as it is without names."""
        self.records += 1
        self._of_patient[clean.patient] += 1
        if clean.is_held_out:
            self._held_out.add(clean.patient)
        self._count("kind", record.kind or "?")
        self._count("year", str(moment(record.time).year) if record.time else "")
        self._count("length of text", _band(len(record.text), _LENGTHS))
        self._count("language", _language(record.text))
        sex, age = self._people.get(clean.patient, ("", ""))
        band = "" if clean.age is None else _band(int(clean.age), _AGES)
        self._people[clean.patient] = (sex or clean.sex, age or band)
        if self._label is not None:
            side = "held out" if clean.is_held_out else "training"
            self._count(f"class, {side}", str(clean.fields.get(self._label) or ""))
        for lab in clean.labs:
            if lab.value is not None and lab.system == LAB_SYSTEM:
                known = self.labs.setdefault(lab.code, LabProfile(lab.unit))
                known.add(clean.patient, clean.place, lab.value)
        self._miss(record)

    def tables(self) -> dict[str, list[Cell]]:
        """Return every table, small cells left out; a table of too many classes is not there."""
        sizes = Counter(_band(count, _PER_PATIENT) for count in self._of_patient.values())
        found = {
            "records of a patient": _ordered(sizes, _PER_PATIENT),
            "sex": Counter(sex for sex, _ in self._people.values()),
            "age": _ordered(Counter(age for _, age in self._people.values()), _AGES),
            **self._tables,
        }
        found["length of text"] = _ordered(found.get("length of text", Counter()), _LENGTHS)
        found = {
            name: counts if name in _OWN else self._rare(counts) for name, counts in found.items()
        }
        return {
            name: suppressed(counts, self.smallest_cell)
            for name, counts in found.items()
            if len(counts) <= MAX_CLASSES
        }

    def missing(self) -> dict[str, float]:
        """Return for each field of enough records the share in which it is empty or not there."""
        return {
            name: 1 - self._filled[name] / self.records
            for name in sorted(self._filled)
            if self._filled[name] >= self.smallest_cell
        }

    def _rare(self, counts: Counter[str]) -> Counter[str]:
        """Put what few say into one cell: what it says may be somebody's."""
        kept = Counter({name: n for name, n in counts.items() if n >= self.smallest_cell})
        if few := counts.total() - kept.total():
            kept[FEW] += few
        return kept

    @property
    def patients(self) -> int:
        """How many patients the records belong to."""
        return len(self._of_patient)

    @property
    def held_out(self) -> int:
        """How many of them are held out."""
        return len(self._held_out)

    def _count(self, table: str, name: str) -> None:
        self._tables.setdefault(table, Counter())[name] += 1

    def _miss(self, record: Record) -> None:
        values: dict[str, Any] = {
            "time": record.time, "text": record.text, "encounter": record.encounter,
            **record.fields,
        }  # fmt: skip
        self._filled.update(name for name, value in values.items() if not is_empty(value))


def suppressed(counts: Mapping[str, int], least: int) -> list[Cell]:
    """Return a table without cells that single somebody out.

    A cell of zero stays. Where what is hidden is one cell, or fewer than ``least`` in all, the next
    smallest goes too: the table's total would tell it otherwise.
    """
    small = {name for name, count in counts.items() if 0 < count < least}
    others = [name for name, count in counts.items() if count >= least]
    for name in sorted(others, key=lambda name: (counts[name], name)):
        if not small or (len(small) > 1 and sum(counts[one] for one in small) >= least):
            break
        small.add(name)
    return [Cell(name, None if name in small else count) for name, count in counts.items()]


def _band(number: int, begins: tuple[int, ...]) -> str:
    """Return the name of the band that a number lies in."""
    at = max((i for i, begin in enumerate(begins) if begin <= number), default=0)
    return _bands(begins)[at]


def _bands(begins: tuple[int, ...]) -> list[str]:
    last = f"{begins[-1]}+"
    return [str(a) if b == a + 1 else f"{a}–{b - 1}" for a, b in pairwise(begins)] + [last]


def _ordered(counts: Counter[str], begins: tuple[int, ...]) -> Counter[str]:
    """Return all bands in order, the empty ones too, then what is in none."""
    names: Iterable[str] = _bands(begins)
    rest = [name for name in counts if name not in _bands(begins)]
    return Counter({name: counts.get(name, 0) for name in (*names, *rest)})


def _language(text: str) -> str:
    """Return the script that most letters of a text's beginning are of."""
    head = text[:400]
    han = sum("\u4e00" <= character <= "\u9fff" for character in head)
    latin = sum(character.isascii() and character.isalpha() for character in head)
    if not han and not latin:
        return ""
    return "zh" if 3 * han >= latin else "latin"
