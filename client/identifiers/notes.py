"""Synthetic notes in Chinese and English whose identifiers are known, to measure what is missed.

The same seed gives the same notes. Each has what a hospital would know of its patient, and of its
staff; relatives and doctors from elsewhere can be found only by what stands around them. Noise is
put in as clinicians do: full-width digits, blanks and line breaks inside numbers, missing
punctuation, traditional characters.
"""

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from huizhen.client.identifiers.finding import Kind, Span
from huizhen.client.identifiers.notes_parts import PARTS, value_of

_PEOPLE = PARTS["people"]
_SLOT = re.compile(r"\{(\w+)\}")
_KINDS: dict[str, Kind] = {
    "name": "name", "fam": "name", "rel": "name", "doc": "name", "out": "name", "latin": "name",
    "id": "id", "ssn": "id", "passport": "id", "lic": "id", "phone": "phone", "phone2": "phone",
    "land": "phone", "mrn": "mrn", "acc": "mrn", "ins": "insurance", "bank": "bank",
    "email": "email", "wechat": "account", "qq": "account", "plate": "plate", "ip": "ip",
    "url": "url", "date": "date", "md": "date", "lunar": "date", "age": "age", "addr": "address",
    "zip": "address", "employer": "employer",
}  # fmt: skip
_SPACED = ("phone", "phone2", "id", "bank", "mrn")
_WIDE = {ord("0") + i: ord("０") + i for i in range(10)}


@dataclass(frozen=True, slots=True)
class Planted:
    """An identifier that is in a note."""

    span: Span
    held_out: bool  # its name, or the sentence around it, is of those kept from the detector
    is_known: bool  # the hospital's data or its list of staff has it


@dataclass(frozen=True, slots=True)
class Note:
    """A synthetic note and the right answers."""

    text: str
    planted: tuple[Planted, ...]
    identifiers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    staff: tuple[str, ...] = ()


def notes(count: int, *, seed: int) -> Iterator[Note]:
    """Yield notes with identifiers, two in Chinese for each in English."""
    for i in range(count):
        yield _Writer(random.Random(f"{seed}/{i}"), in_chinese=i % 3 < 2).note()  # noqa: S311


def trap_notes(count: int, *, seed: int) -> Iterator[Note]:
    """Yield notes without any identifier, full of what looks like one."""
    for i in range(count):
        rng = random.Random(f"{seed}/trap/{i}")  # noqa: S311 - no secret
        zh = i % 3 < 2
        parts = PARTS["zh" if zh else "en"]
        lines = rng.sample(parts["traps"], 7) + rng.sample(parts["plain"], 3)
        rng.shuffle(lines)
        yield Note(rng.choice(("\n", "", " ") if zh else ("\n", " ")).join(lines), ())


class _Writer:
    """Writes one note about one invented patient."""

    def __init__(self, rng: random.Random, *, in_chinese: bool) -> None:
        self.rng, self.zh = rng, in_chinese
        self.is_wide = in_chinese and rng.random() < 0.12
        self.is_spaced = rng.random() < 0.1
        self.is_traditional = in_chinese and rng.random() < 0.06
        self.loses_marks = rng.random() < 0.08
        self.rare: set[str] = set()
        self.patient, self.listed = self._person(), [self._person() for _ in range(2)]
        self.fixed = {
            slot: self._value(slot)
            for slot in ("id", "ssn", "phone", "mrn", "ins", "addr", "employer")
        }
        self.out: list[str] = []
        self.length = 0
        self.planted: list[Planted] = []

    def note(self) -> Note:
        rng, zh = self.rng, self.zh
        parts = PARTS["zh" if zh else "en"]
        sentences = rng.choice(list(parts["sentences"].values()))
        held = parts["held_out"]
        lines = [
            (line, False) for line in rng.sample(sentences, min(len(sentences), rng.randint(4, 7)))
        ]
        later = parts["later"]
        lines += [(line, False) for line in rng.sample(later, rng.randint(0, 2))]
        lines += [(line, True) for line in rng.sample(held, rng.randint(0, 2))]
        lines += [(line, False) for line in rng.sample(parts["plain"], 5)]
        rng.shuffle(lines)
        for line, held_out in lines:
            self._line(line, held_out)
            self._add(rng.choice(("\n", "\n", "" if zh else " ", " ")))
        known = {"name": (self.patient,), "id": (self.fixed["id"],) if zh else (self.fixed["ssn"],)}
        known |= {"phone": (self.fixed["phone"],), "mrn": (self.fixed["mrn"],)}
        known |= {"insurance": (self.fixed["ins"],), "address": (self.fixed["addr"],)}
        known |= {"employer": (self.fixed["employer"],)}
        return Note("".join(self.out), tuple(self.planted), known, tuple(self.listed))

    def _line(self, line: str, held_out: bool) -> None:
        at = 0
        for slot in _SLOT.finditer(line):
            self._plain(line[at : slot.start()])
            self._slot(slot[1], held_out)
            at = slot.end()
        self._plain(line[at:])

    def _plain(self, text: str) -> None:
        if self.is_traditional:
            text = "".join(PARTS["traditional"].get(char, char) for char in text)
        if self.loses_marks:
            text = re.sub(r"[。.,，](?=\s|$)", "", text)
        self._add(text)

    def _add(self, text: str) -> None:
        self.out.append(text)
        self.length += len(text)

    def _slot(self, slot: str, held_out: bool) -> None:
        known = {"name": self.patient, "doc": self.rng.choice(self.listed)} | self.fixed
        is_known = slot in known
        if slot != "fam":
            value = known.get(slot) or self._value(slot)
        else:
            value = self.patient[
                : 2 if self.patient.startswith(tuple(_PEOPLE["surnames_compound"])) else 1
            ]
            value = value if self.zh else self.patient.split(" ", 1)[1]
            is_known, held_out = True, held_out or self.patient in self.rare
        shown = value
        if self.is_wide:
            shown = shown.translate(_WIDE)
        elif self.is_spaced and slot in _SPACED and len(value) > 5:
            cut = self.rng.randint(3, len(value) - 3)
            shown = value[:cut] + self.rng.choice((" ", " ", "\n")) + value[cut:]
        elif slot == "name" and self.zh and len(value) == 2 and self.rng.random() < 0.2:
            shown = value[0] + "　" + value[1]
        span = Span(
            self.length, self.length + len(shown), _KINDS[slot], "known" if is_known else "context"
        )
        self.planted.append(Planted(span, held_out or value in self.rare, is_known))
        self._add(shown)

    def _person(self) -> str:
        rng = self.rng
        if not self.zh:
            rare = rng.random() < 0.15
            last = _PEOPLE["latin_held_out" if rare else "latin_last"]
            name = f"{rng.choice(_PEOPLE['latin_first'])} {rng.choice(last)}"
        else:
            draw = rng.random()
            rare = draw < 0.04
            pool = _PEOPLE["surnames_held_out"] if rare else _PEOPLE["surnames"]
            pool = _PEOPLE["surnames_compound"] if draw > 0.97 else pool
            surname = rng.choice(pool)
            name = surname + "".join(
                rng.choice(_PEOPLE["given"]) for _ in range(1 if rng.random() < 0.25 else 2)
            )
        if rare:
            self.rare.add(name)
        return name

    def _value(self, slot: str) -> str:
        if slot in ("rel", "out"):
            return self._person()
        if slot == "latin":
            first, last = (self.rng.choice(_PEOPLE[key]) for key in ("latin_first", "latin_last"))
            return f"{first} {last}"
        return value_of(slot, self.rng, in_chinese=self.zh)
