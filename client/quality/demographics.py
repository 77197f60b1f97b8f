"""Whether what is said of a patient over many records can all be true.

Records are fed one by one, in any order. Of a patient remain 40 bytes: a keyed hash of the number,
the range of days that birth and death may lie in, the first and last day on which something
happened, the sexes seen and what was reported. They lie in an open-addressing table (Knuth, TAOCP
vol. 3, 6.4, Algorithm L) whose load stays between 3/8 and 3/4: 53 to 107 bytes a patient, in
memory, for each encounter 21 to 43. A problem is told at the record that shows it: earlier records
of the patient are known by ``is_contradictory`` once all were fed.
"""

import calendar
import hashlib
import secrets
import struct
from collections.abc import Iterator
from datetime import date

from huizhen.client.quality.problems import DEFAULT_RULES, Code, Problem, Rules
from huizhen.client.records.record import Record
from huizhen.client.records.times import day

MAX_AGE = 120
# years; the oldest person on record lived 122, and a hospital has her once
DAYS_AFTER_DEATH = 30
# reports and post-mortem findings are written later
DAYS_AHEAD = 1
# of the clock here, for offsets and clocks that are wrong
_FIRST, _LAST = 1, date.max.toordinal()
_PATIENT = struct.Struct("<QiiiiiiBxHI")
_ENCOUNTER = struct.Struct("<QQ")
_SEXES = {"female": 1, "male": 2, "other": 4}
_TOLD = {
    code: 1 << bit
    for bit, code in enumerate(
        (
            Code.TWO_SEXES,
            Code.TWO_BIRTHS,
            Code.TWO_DEATHS,
            Code.BEFORE_BIRTH,
            Code.AFTER_DEATH,
            Code.TOO_OLD,
            Code.IN_FUTURE,
            Code.BAD_TIME,
            Code.ENCOUNTER_OF_TWO,
        )
    )
}


def days(time: str) -> tuple[int, int]:
    """Return the first and the last day, as ordinals, that a time in the one form may lie on.

    Raises:
        ValueError: it is not in the one form.
    """
    try:
        first = day(time)
    except OverflowError as error:
        raise ValueError("has a year that no calendar has") from error
    parts = len(time[:10].split("-"))
    if parts == 1:
        last = date(first.year, 12, 31)
    elif parts == 2:
        last = first.replace(day=calendar.monthrange(first.year, first.month)[1])
    else:
        last = first
    return first.toordinal(), last.toordinal()


class _Table:
    """Rows of one size by a hash that is never 0; it doubles at three quarters."""

    def __init__(self, row: struct.Struct) -> None:
        self._row, self._slots, self.count = row, 1 << 10, 0
        self._bytes = bytearray(self._slots * row.size)

    def find(self, key: int) -> int:
        """Return where the row of a key is, or belongs."""
        size, mask = self._row.size, self._slots - 1
        slot = key & mask
        while True:
            at = slot * size
            found = int.from_bytes(self._bytes[at : at + 8], "little")
            if found in (key, 0):
                return at
            slot = (slot + 1) & mask

    def read(self, at: int) -> tuple[int, ...]:
        """Return a row; its first field is 0 where there is none."""
        return self._row.unpack_from(self._bytes, at)

    def write(self, at: int, *values: int) -> None:
        """Keep a row, whose first value is its key."""
        is_new = not any(self._bytes[at : at + 8])
        self._row.pack_into(self._bytes, at, *values)
        if is_new:
            self.count += 1
            if self.count * 4 > self._slots * 3:
                self._grow()

    def _grow(self) -> None:
        old, self._slots = self._bytes, self._slots * 2
        self._bytes = bytearray(self._slots * self._row.size)
        for values in self._row.iter_unpack(old):
            if values[0]:
                self._row.pack_into(self._bytes, self.find(values[0]), *values)


class Demographics:
    """Every patient's and encounter's facts, as the records so far tell them."""

    def __init__(self, now: date, rules: Rules | None = None) -> None:
        """Begin with no patient.

        Args:
            now: the day after which nothing can have happened.
            rules: what becomes of each problem.
        """
        self._today, self._rules = now.toordinal(), rules or DEFAULT_RULES
        self._key = secrets.token_bytes(16)  # so that nobody can make two numbers meet
        self._patients, self._encounters = _Table(_PATIENT), _Table(_ENCOUNTER)

    def __len__(self) -> int:
        """Return the number of patients."""
        return self._patients.count

    def add(self, record: Record) -> list[Problem]:
        """Take in a record; return what it contradicts, each of a patient's own facts once.

        Raises:
            GovernanceError: a problem that the rules refuse.
        """
        key = self._hash(record.patient)
        at = self._patients.find(key)
        state = _State(self._patients.read(at))
        found = dict.fromkeys(self._contradictions(record, state, key))
        for code, _ in found:
            state.told |= _TOLD[code]
        self._patients.write(at, key, *state.values())
        return [self._rules.settle(code, record.place, subject) for code, subject in found]

    def is_contradictory(self, patient: str) -> bool:
        """Return whether anything was wrong with any record of a patient."""
        row = self._patients.read(self._patients.find(self._hash(patient)))
        return bool(row[0] and row[8])

    def _contradictions(
        self, record: Record, state: "_State", key: int
    ) -> Iterator[tuple[Code, str]]:
        """Yield what is wrong, and of which field, while the state takes the record in."""
        sexes = state.sexes | _SEXES.get(record.sex, 0)
        if sexes != state.sexes:
            state.sexes = sexes
            if sexes & (sexes - 1):
                yield Code.TWO_SEXES, "sex"
        events: list[tuple[int, int]] = []
        for name, time in _times(record):
            try:
                first, last = days(time)
            except ValueError:
                yield Code.BAD_TIME, name
                continue
            if first > self._today + DAYS_AHEAD:
                yield Code.IN_FUTURE, name
            if name == "birth":
                if not state.narrow_birth(first, last):
                    yield Code.TWO_BIRTHS, name
            elif name == "death":
                if not state.narrow_death(first, last):
                    yield Code.TWO_DEATHS, name
            else:
                events.append((first, last))
        yield from state.order(events, has_dates=bool(record.birth or record.death))
        if record.encounter and self._is_of_another(record.encounter, key):
            yield Code.ENCOUNTER_OF_TWO, "encounter"

    def _is_of_another(self, encounter: str, patient: int) -> bool:
        key = self._hash(encounter)
        at = self._encounters.find(key)
        found, owner = self._encounters.read(at)
        if not found:
            self._encounters.write(at, key, patient)
        if not found or owner == patient:
            return False
        at = self._patients.find(owner)
        state = _State(self._patients.read(at))
        state.told |= _TOLD[Code.ENCOUNTER_OF_TWO]
        self._patients.write(at, owner, *state.values())
        return True

    def _hash(self, text: str) -> int:
        digest = hashlib.blake2b(
            text.encode("utf-8", "surrogatepass"), digest_size=8, key=self._key
        )
        return int.from_bytes(digest.digest(), "little") or 1


class _State:
    """One patient's facts, unpacked."""

    __slots__ = ("birth", "death", "first", "last", "sexes", "told")

    def __init__(self, row: tuple[int, ...]) -> None:
        if row[0]:
            _, *edges, self.sexes, self.told, _ = row
            self.birth, self.death = (edges[0], edges[1]), (edges[2], edges[3])
            self.first, self.last = edges[4], edges[5]
        else:
            self.birth = self.death = (_FIRST, _LAST)
            self.first, self.last = _LAST, _FIRST
            self.sexes = self.told = 0

    def values(self) -> tuple[int, ...]:
        """Return the row without its key."""
        return *self.birth, *self.death, self.first, self.last, self.sexes, self.told, 0

    def narrow_birth(self, first: int, last: int) -> bool:
        """Take in another birth; return whether both can be true: 1960 and 1960-05 can."""
        low, high = max(self.birth[0], first), min(self.birth[1], last)
        if low <= high:
            self.birth = low, high
        return low <= high

    def narrow_death(self, first: int, last: int) -> bool:
        """Take in another death."""
        low, high = max(self.death[0], first), min(self.death[1], last)
        if low <= high:
            self.death = low, high
        return low <= high

    def order(
        self, events: list[tuple[int, int]], *, has_dates: bool
    ) -> Iterator[tuple[Code, str]]:
        """Yield what lies surely in the wrong order, and take the events in.

        With a birth or death the events of earlier records count again: they came unsuspected.
        """
        first = min((last for _, last in events), default=_LAST)
        last = max((first for first, _ in events), default=_FIRST)
        self.first, self.last = min(self.first, first), max(self.last, last)
        if has_dates and not self.told & _TOLD[Code.BEFORE_BIRTH]:
            first = self.first
        if has_dates and not self.told & _TOLD[Code.AFTER_DEATH]:
            last = self.last
        is_dead = self.death != (_FIRST, _LAST)
        if first < self.birth[0] or self.death[1] < self.birth[0]:
            yield Code.BEFORE_BIRTH, "birth"
        if is_dead and last > self.death[1] + DAYS_AFTER_DEATH:
            yield Code.AFTER_DEATH, "death"
        end = max(last, self.death[0] if is_dead else _FIRST)
        if self.birth[1] != _LAST and end - self.birth[1] > MAX_AGE * 365.25:
            yield Code.TOO_OLD, "birth"


def _times(record: Record) -> Iterator[tuple[str, str]]:
    """Yield the name and text of each time of a record."""
    if record.birth:
        yield "birth", record.birth
    if record.death:
        yield "death", record.death
    seen = {""}
    for name, time in (
        ("time", record.time),
        *(("finding", finding.time) for finding in record.findings),
        *(("lab", lab.time) for lab in record.labs),
    ):
        if time not in seen:
            seen.add(time)
            yield name, time
