"""What is remembered of OMOP's tables while others are read: concepts, persons, their deaths."""

from array import array
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from huizhen.client.records.omop_values import Cells, RowError, text, time, whole
from huizhen.client.records.record import Sex

_SEPARATOR = "\x1f"
_SYSTEMS = {
    "snomed": "snomed", "loinc": "loinc", "rxnorm": "rxnorm", "ucum": "ucum", "hpo": "hpo",
    "atc": "atc", "icd10": "icd-10", "icd10cn": "icd-10-cn", "icd10cm": "icd-10-cm",
    "icd10pcs": "icd-10-pcs", "icd9cm": "icd-9-cm", "icd9proc": "icd-9-cm",
    "icd9proccn": "icd-9-cm-3-cn",
}  # fmt: skip
# of OHDSI's vocabulary_id, in lower case; others are taken as they are
_SEXES: dict[str, Sex] = {"": "", "female": "female", "male": "male", "other": "other"}


class Concept(NamedTuple):
    """What a concept's number stands for."""

    code: str
    system: str
    name: str


def concept_of(cells: Cells) -> tuple[int, Concept]:
    """Return a row of CONCEPT.

    Raises:
        RowError: it has no number.
    """
    if not text(cells, "concept_id"):
        raise RowError("concept has no concept_id, every one needs it: mend the vocabulary")
    vocabulary = text(cells, "vocabulary_id").lower()
    system = _SYSTEMS.get(vocabulary, vocabulary)
    named = Concept(text(cells, "concept_code"), system, text(cells, "concept_name"))
    return whole(cells, "concept_id"), named


class Person(NamedTuple):
    """What every record says of its person."""

    sex: Sex
    birth: str
    death: str
    identifiers: dict[str, tuple[str, ...]]


class Register:
    """Short texts by number, packed: what Python needs for an entry would be thrice as much.

    All are added before the first is asked for.
    """

    def __init__(self) -> None:
        self._keys, self._ends, self._texts = array("q"), array("q", [0]), bytearray()
        self._seen: set[int] | None = None
        # of keys that do not come in their order
        self._places: array[int] | None = None

    def add(self, key: int, text: str) -> bool:
        """Add a text; return whether its number is new, the first is kept."""
        if self._seen is None and self._keys and key <= self._keys[-1]:
            self._seen = set(self._keys)
        if self._seen is not None:
            if key in self._seen:
                return False
            self._seen.add(key)
        self._keys.append(key)
        self._texts += text.encode()
        self._ends.append(len(self._texts))
        return True

    def get(self, key: int) -> str | None:
        """Return the text of a number."""
        if self._places is None:
            order = np.argsort(np.frombuffer(self._keys, np.int64)) if self._keys else ()
            self._places = array("q", order)
            self._keys = array("q", (self._keys[place] for place in self._places))
            self._seen = None
        at = bisect_left(self._keys, key)
        if at == len(self._keys) or self._keys[at] != key:
            return None
        place = self._places[at]
        return self._texts[self._ends[place] : self._ends[place + 1]].decode()


@dataclass(slots=True)
class Memory:
    """A few dozen bytes of each person and address, and the concepts that are referred to."""

    concepts: dict[int, Concept] = field(default_factory=dict)
    deaths: dict[int, str] = field(default_factory=dict)
    addresses: Register = field(default_factory=Register)
    persons: Register = field(default_factory=Register)
    last: tuple[int, Person] | None = None

    def add_location(self, cells: Cells) -> None:
        """Remember a row of LOCATION."""
        parts = (text(cells, column) for column in ("address_1", "address_2", "zip"))
        if not self.addresses.add(whole(cells, "location_id"), _SEPARATOR.join(parts)):
            raise RowError("location_id is that of an earlier row, expected one row a location")

    def add_death(self, cells: Cells) -> None:
        """Remember a row of DEATH; of several of a person the first."""
        self.deaths.setdefault(person_id(cells), time(cells, "death"))

    def add_person(self, cells: Cells, sex: Sex, birth: str) -> None:
        """Remember a row of PERSON, after all of the others."""
        key, location = person_id(cells), whole(cells, "location_id")
        mrn = text(cells, "person_source_value").replace(_SEPARATOR, " ")
        address = self.addresses.get(location) or ""
        packed = _SEPARATOR.join((sex, birth, self.deaths.get(key, ""), mrn, address))
        if not self.persons.add(key, packed):
            raise RowError("person_id is that of an earlier row, expected one row a person")
        self.last = key, _unpacked(packed)

    def person(self, key: int) -> Person:
        """Return a person.

        Raises:
            RowError: there is none of this number.
        """
        if self.last is not None and self.last[0] == key:
            return self.last[1]
        packed = self.persons.get(key)
        if packed is None:
            raise RowError(
                "person_id is of no row of PERSON that can be read: add the person, or remove this"
            )
        person = _unpacked(packed)
        self.last = key, person
        return person

    def coded(self, cells: Cells, stem: str) -> Concept:
        """Return what a row is about: the standard concept, or the best there is in its place.

        Raises:
            RowError: there is neither a concept nor the source's own code.
        """
        standard = whole(cells, f"{stem}_concept_id")
        if standard and (found := self.concepts.get(standard)):
            return found
        source, own = whole(cells, f"{stem}_source_concept_id"), text(cells, f"{stem}_source_value")
        if source and (found := self.concepts.get(source)):
            return found
        if standard or source:
            return Concept(str(standard or source), "omop", own)
        if not own:
            raise RowError(f"row has no {stem}_concept_id and no {stem}_source_value: fill one")
        return Concept(own, "", "")

    def name(self, cells: Cells, column: str) -> str:
        """Return the name of a concept; empty for none."""
        key = whole(cells, column)
        found = self.concepts.get(key) if key else None
        return found.name if found else f"omop:{key}" if key else ""

    def unit(self, cells: Cells) -> str:
        """Return the code of a unit, in UCUM where the concept is known; else the source's."""
        key = whole(cells, "unit_concept_id")
        found = self.concepts.get(key) if key else None
        return (found.code if found else "") or text(cells, "unit_source_value")


def person_id(cells: Cells) -> int:
    """Return whose a row is.

    Raises:
        RowError: nobody's.
    """
    key = whole(cells, "person_id")
    if not key:
        raise RowError("row has no person_id, every one needs it: fill it")
    return key


def _unpacked(packed: str) -> Person:
    sex, birth, death, mrn, *address = packed.split(_SEPARATOR)
    names = {"mrn": (mrn,) if mrn else (), "address": tuple(part for part in address if part)}
    return Person(_SEXES[sex], birth, death, {kind: own for kind, own in names.items() if own})
