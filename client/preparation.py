"""From a hospital's export to the records that training may use, in two passes over it.

The first pass looks at everything together: who a patient is, what contradicts what, which records
say the same, which lines all of them have, who is held out. The second goes over the same records
again, mends, sets apart or leaves out what the rules say, and de-identifies the rest. So no record
is ever held longer than it is looked at, and no copy with names stays: texts that are compared lie
in a file without a name. That both passes saw the same is checked.

Each thing that was changed or left out is told to ``note``; nothing is dropped in silence.
"""

import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields
from datetime import date
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any

from huizhen.client.clean import CleanRecord
from huizhen.client.data_key import DataKey, Pseudonyms
from huizhen.client.data_profile import Profile
from huizhen.client.data_terms import Data
from huizhen.client.deidentify import Person, RecordDeidentifier
from huizhen.client.gate import AdmittedRecord, Gate, Reason, check_ground, read_excluded
from huizhen.client.quality.demographics import Demographics
from huizhen.client.quality.duplicates import Cluster, Duplicates
from huizhen.client.quality.lab_table import LabTable
from huizhen.client.quality.labs import check_labs
from huizhen.client.quality.problems import Code, Problem
from huizhen.client.quality.texts import Templates, check_text
from huizhen.client.records.export import Part, parts, read_part
from huizhen.client.records.record import Entry, Finding, Image, Lab, Record, Unreadable
from huizhen.client.splits import draw
from huizhen.protocol.errors import ConfigError, GovernanceError
from huizhen.storage.files import make_folder

MAX_IDENTIFIERS = 200
# of one kind and patient, to be found in texts; more are no names of one person
_IDENTITY = (Code.TWO_SEXES, Code.TWO_BIRTHS, Code.TWO_DEATHS)
# one number may be two people: none of its records is trustworthy

CHANGED = "the export was changed while it was read: let nobody write to it, and begin again"
Note = Callable[[Problem | Unreadable | tuple[Reason, str]], None]


class Fate(IntEnum):
    """What the first pass has decided about an entry."""

    GOES_ON = 0
    UNREADABLE = 1
    WITHHELD = 2
    SET_APART = 3
    LEFT_OUT = 4
    LIKE_TRAINING = 5


@dataclass(slots=True)
class Seen:
    """What the first pass has learned; of the records themselves only a byte each."""

    fates: bytearray = field(default_factory=bytearray)
    people: dict[str, Person] = field(default_factory=dict, repr=False)
    strata: dict[str, str] = field(default_factory=dict, repr=False)
    # pseudonym -> class, of patients with a record that goes on
    templates: Templates = field(default_factory=Templates)
    checksum: int = 0
    part: int = 0
    # the number of the file or query that is read, from 1
    counts: Counter[str] = field(default_factory=Counter)
    # of problems, as the first pass ended


class Preparation:
    """One export on its way; ``look`` once, then ``records`` as often as wanted."""

    def __init__(
        self,
        data: Data,
        folder: Path,
        *,
        key: DataKey,
        today: date,
        table: LabTable,
        before: Mapping[str, bool] | None = None,
        work: Path | None = None,
        note: Note = lambda _: None,
    ) -> None:
        """Prepare; nothing is read but lists of names.

        Args:
            data: what the export is.
            folder: which data.toml lies in.
            key: of the site.
            today: after which nothing can have happened, and no reference may have ended before.
            table: the alliance's table of labs.
            before: pseudonym -> held out, of an earlier snapshot.
            work: a folder of the site, for texts that are compared: files without a name, which are
                gone when the process is; the machine's own for such files when None.
            note: is told of each thing that was changed or left out.

        Raises:
            ConfigError: a file is missing.
            GovernanceError: the ethics committee's reference has ended.
        """
        check_ground(data.governance, today)
        self._data, self._folder, self._key, self._today = data, folder, key, today
        self._table, self._before, self._note = table, dict(before or {}), note
        self._pseudonyms, self._work = Pseudonyms(key), work
        excluded = data.governance.excluded
        named = frozenset[str]() if excluded is None else read_excluded(folder / excluded)
        self._gate = Gate(data.governance, named, self._pseudonyms)
        self.parts: Sequence[Part] = parts(data.sources, folder)
        self.counts: Counter[str] = Counter()
        self.replaced: Counter[str] = Counter()
        self.sides: dict[str, bool] = {}
        self.encodings: dict[str, str] = {}
        self.profile = self._new_profile()
        self._seen = Seen()

    def look(self) -> None:
        """Go over all records together.

        Raises:
            ConfigError: a source is not what data.toml says.
            GovernanceError: a problem that the rules refuse, or too few patients are left.
            StorageError: the disk for what is compared is full.
        """
        seen = self._seen = Seen()
        rules = self._data.quality
        doubtful: set[str] = set()
        owners: array[int] = array("Q")
        numbers = {}
        people = Demographics(self._today, rules)
        if self._work is not None:
            make_folder(self._work, 0o700)
        with Duplicates(self._work) as duplicates:
            for number, entry in enumerate(self._entries(seen)):
                fate = self._first_look(entry)
                seen.fates.append(fate)
                if isinstance(entry, Unreadable):
                    continue
                self._person(entry)
                if fate != Fate.GOES_ON:
                    continue
                record, _ = check_text(entry, rules)
                for problem in people.add(record):
                    self._told(problem)
                    if problem.action == "quarantine":
                        seen.fates[number] = Fate.SET_APART
                        if problem.code in _IDENTITY:
                            doubtful.add(record.patient)
                seen.templates.add(record.text)
                numbers[len(duplicates)] = number
                duplicates.add(record)
                owners.append(self._goes_on(record, number))
            found = list(duplicates.find(rules))
        self._settle(found, numbers, owners, doubtful)

    def records(self) -> Iterator[CleanRecord]:
        """Yield what may be used, in the order of the export.

        Raises:
            ConfigError: as ``look``.
            GovernanceError: as ``look``, or the export is not what was looked at.
        """
        seen, again = self._seen, Seen()
        self.counts = Counter(seen.counts)
        staff, self.profile = self._staff(), self._new_profile()
        cleaner = RecordDeidentifier(self._data.identifiers, self._key, seen.people, staff)
        self.replaced = cleaner.counts
        number = -1
        trained = set()
        for number, entry in enumerate(self._entries(again)):
            if number >= len(seen.fates):
                break
            admitted = self._second_look(entry, Fate(seen.fates[number]))
            if admitted is not None:
                self.counts["records"] += 1
                clean = cleaner.clean(admitted, place=self._plain(entry.place, again.part))
                if not clean.is_held_out:
                    trained.add(clean.patient)
                self.profile.add(admitted.record, clean)
                yield clean
        if number + 1 != len(seen.fates) or again.checksum != seen.checksum:
            raise GovernanceError(CHANGED)
        self._check_enough(len(trained))

    def _new_profile(self) -> Profile:
        terms = self._data
        return Profile(label=terms.split.label, smallest_cell=terms.governance.smallest_cell)

    def _entries(self, seen: Seen) -> Iterator[Entry]:
        for seen.part, part in enumerate(self.parts, 1):
            entries = read_part(part, self._folder, partial(self.encodings.__setitem__, part.name))
            with closing(entries):  # type: ignore[type-var]  # a generator
                for entry in entries:
                    seen.checksum = zlib.crc32(_mark(entry), seen.checksum)
                    yield entry

    def _first_look(self, entry: Entry) -> Fate:
        if isinstance(entry, Unreadable):
            self._data.quality.settle(Code.UNREADABLE, entry.place)
            return Fate.UNREADABLE
        admitted = self._gate.admit(entry)
        return Fate.GOES_ON if isinstance(admitted, AdmittedRecord) else Fate.WITHHELD

    def _person(self, record: Record) -> None:
        """Take in what a record says of its patient, whatever becomes of the record."""
        person = self._seen.people.setdefault(record.patient, Person())
        person.birth, person.sex = person.birth or record.birth, person.sex or record.sex
        numbers = tuple(number for number in (record.patient, record.encounter) if number)
        for kind, values in (*record.identifiers.items(), ("mrn", numbers)):
            known = person.identifiers.setdefault(kind, set())
            if len(known) < MAX_IDENTIFIERS:
                known.update(values)

    def _goes_on(self, record: Record, number: int) -> int:
        """Note whose class a record is; return a number of its patient."""
        pseudonym = self._pseudonyms.patient(record.patient)
        if self._seen.fates[number] == Fate.GOES_ON:
            label = self._data.split.label
            value = "" if label is None else str(record.fields.get(label) or "")
            self._seen.strata[pseudonym] = self._seen.strata.get(pseudonym) or value
        return int(pseudonym[:16], 16)

    def _settle(
        self,
        clusters: Sequence[Cluster],
        numbers: Mapping[int, int],
        owners: "array[int]",
        doubtful: set[str],
    ) -> None:
        """Decide about duplicates and doubtful patients, and draw who is held out."""
        seen = self._seen
        for cluster in clusters:
            first = numbers[cluster.numbers[0]]
            for member, problem in zip(cluster.numbers[1:], cluster.problems, strict=True):
                self._told(problem)
                # A copy of what was set apart is not left out: it would be lost with it.
                if problem.action == "quarantine" or (
                    problem.action == "fix" and seen.fates[first] == Fate.GOES_ON
                ):
                    is_left = problem.action == "fix"
                    seen.fates[numbers[member]] = Fate.LEFT_OUT if is_left else Fate.SET_APART
        for patient in doubtful:
            seen.strata.pop(self._pseudonyms.patient(patient), None)
        label = self._data.split.label
        if label is not None and seen.strata and not any(seen.strata.values()):
            raise ConfigError(
                f"[split] label is {label!r}, no record has that field: name one of "
                "[sources.fields]"
            )
        drawn = draw(
            seen.strata,
            self._data.split.held_out,
            before=self._before,
            key=self._key.derived("split"),
        )
        self.sides = {**self._before, **drawn}
        for patient, person in seen.people.items():
            person.is_held_out = drawn.get(self._pseudonyms.patient(patient), False)
            person.is_doubtful = patient in doubtful
        sides = {int(pseudonym[:16], 16): held for pseudonym, held in drawn.items()}
        for cluster in clusters:  # what was trained on must not be measured on
            going = [m for m in cluster.numbers if seen.fates[numbers[m]] == Fate.GOES_ON]
            held = [sides.get(owners[member], False) for member in going]
            for member, is_held_out in zip(going, held, strict=True):
                if is_held_out and not all(held):
                    seen.fates[numbers[member]] = Fate.LIKE_TRAINING
        self._check_enough(len(drawn) - sum(drawn.values()))
        seen.counts = Counter(self.counts)

    def _check_enough(self, trained: int) -> None:
        least = self._data.governance.minimum_patients
        if trained < least:
            raise GovernanceError(
                f"{trained} patients are left to train on, [governance] minimum_patients is "
                f"{least}: add patients, or mend what was left out"
            )

    def _second_look(self, entry: Entry, fate: Fate) -> AdmittedRecord | None:
        """Return the record as it goes on, or None; say why."""
        if isinstance(entry, Unreadable):
            self.counts["unreadable"] += 1
            self._note(entry)
            return None
        admitted = self._gate.admit(entry)
        if isinstance(admitted, Reason):
            self.counts[admitted] += 1
            self._note((admitted, entry.place))
            return None
        person = self._seen.people.get(entry.patient)
        if person is None or fate in (Fate.UNREADABLE, Fate.WITHHELD):
            raise GovernanceError(CHANGED)
        if fate == Fate.LIKE_TRAINING:
            self._note((Reason.LIKE_TRAINING, entry.place))
        elif person.is_doubtful and fate == Fate.GOES_ON:
            self._note((Reason.DOUBTFUL, entry.place))
        if fate != Fate.GOES_ON or person.is_doubtful:
            self.counts["left out" if fate == Fate.LEFT_OUT else "set apart"] += 1
            return None
        rules = self._data.quality
        record, problems = check_text(entry, rules)
        record, more = check_labs(record, self._table, rules)
        problems = [*problems, *more, *self._seen.templates.check(record, rules)]
        for problem in problems:
            self._told(problem)
        if any(problem.action == "quarantine" for problem in problems):
            self.counts["set apart"] += 1
            return None
        return AdmittedRecord(record, admitted.ground)

    def _plain(self, place: str, part: int) -> str:
        """Return a place without the file's name, which may be a patient's."""
        return f"{part}{place.removeprefix(self.parts[part - 1].name)}"

    def _told(self, problem: Problem) -> None:
        self.counts[f"{problem.code} {problem.action}"] += 1
        self._note(problem)

    def _staff(self) -> tuple[str, ...]:
        name = self._data.identifiers.staff
        if name is None:
            return ()
        try:
            lines = (self._folder / name).read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read {name!r}, expected names in UTF-8, one a line"
            ) from error
        return tuple(line.strip() for line in lines if line.strip())


def _mark(entry: Entry) -> bytes:
    """Return bytes that change when anything of an entry does."""
    if isinstance(entry, Unreadable):
        return entry.place.encode()
    parts: list[Any] = [getattr(entry, name) for name in _NAMES[Record]]
    for one in (*entry.findings, *entry.labs, *entry.images):
        parts += [getattr(one, name) for name in _NAMES[type(one)]]
    return repr(parts).encode("utf-8", "surrogatepass")


_MASKED = ("findings", "labs", "images")
# whose repr says nothing
_NAMES: Mapping[type, tuple[str, ...]] = {
    cls: tuple(one.name for one in fields(cls) if one.name not in _MASKED)
    for cls in (Record, Finding, Lab, Image)
}
