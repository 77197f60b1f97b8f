"""A cohort's data at the hospital: checked, fixed as a snapshot, and told about.

What lies in a cohort's folder:

snapshots/           the records (client/snapshot.py)
splits.sealed        who is held out, of all snapshots so far
problems.jsonl       each thing that was changed or left out, with its place and reason
report.html          the counts for people, one page (client/data_report.py)
lock                 one process at a time
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import IO, Any

import orjson

from huizhen.client.clean import CleanRecord
from huizhen.client.data_key import DataKey
from huizhen.client.data_terms import Data
from huizhen.client.gate import Reason
from huizhen.client.identifiers.finding import Span
from huizhen.client.identifiers.notes import Note, notes, trap_notes
from huizhen.client.identifiers.recall import Measured, measure
from huizhen.client.identifiers.text import Finder
from huizhen.client.preparation import Preparation
from huizhen.client.quality.lab_table import LabTable
from huizhen.client.quality.problems import Code, Problem
from huizhen.client.records.record import Unreadable
from huizhen.client.snapshot import Manifest, Snapshots
from huizhen.protocol.errors import DamagedError, GovernanceError, StorageError
from huizhen.storage.files import make_folder
from huizhen.storage.locks import alone
from huizhen.storage.sealed import SealedWriter, read_sealed

GATE_NOTES, GATE_TRAPS, GATE_SEED = 6000, 1000, 1
Watch = Callable[[str, int], None]
# a step, and how many records or notes of it are done
Take = Callable[[Iterator[CleanRecord], Preparation], Manifest | None]
# what is done with the records


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an export."""

    preparation: Preparation
    measured: Measured | None
    # None where nothing is replaced
    manifest: Manifest | None
    # None where it was only checked


class DataDesk:
    """One cohort's data."""

    def __init__(
        self,
        data: Data,
        source: Path,
        folder: Path,
        *,
        cohort: str,
        key: DataKey,
        table: LabTable,
        watch: Watch = lambda *_: None,
    ) -> None:
        """Prepare; nothing is read.

        Args:
            data: what the export is.
            source: which folder data.toml lies in.
            folder: of this cohort alone, at the site.
            cohort: its name.
            key: of the site.
            table: the alliance's table of labs.
            watch: is told how far it is.
        """
        self._data, self._source, self._folder = data, source, folder
        self._key, self._table, self._watch = key, table, watch
        self._purpose = b"huizhen splits " + cohort.encode()
        self.snapshots = Snapshots(folder / "snapshots", key.derived("snapshot"), cohort=cohort)

    def check(self, today: date) -> Outcome:
        """Go over the export and say what would become of it; no snapshot is made.

        Raises:
            ConfigError: a source is not what data.toml says.
            GovernanceError: the export may not be used, or a rule refuses it.
            StorageError: the disk is full or read-only.
        """
        return self._go(today, _drain)

    def snapshot(self, today: date) -> Outcome:
        """Do the same, and make the snapshot that studies train on from now on.

        Raises:
            HuizhenError: as ``check``; the gate of de-identification is shut.
        """
        return self._go(today, self._write)

    @property
    def made_by(self) -> Mapping[str, str]:
        """Digests of what the records are made by."""
        return {"data.toml": self._data.digest(), "labs": self._table.digest}

    def _go(self, today: date, take: Take) -> Outcome:
        with alone(self._folder / "lock", f"{str(self._folder)!r} is worked on", mode=0o700):
            return self._alone(today, take)

    def _alone(self, today: date, take: Take) -> Outcome:
        told = _Told(self._folder / "problems.jsonl")
        preparation = Preparation(
            self._data,
            self._source,
            key=self._key,
            today=today,
            table=self._table,
            before=self._splits(),
            work=self._folder,
            note=told.add,
        )
        measured = self._measured()
        with told:
            self._watch("reading", 0)
            preparation.look()
            manifest = take(self._watched(preparation.records()), preparation)
        return Outcome(preparation, measured, manifest)

    def _write(self, records: Iterator[CleanRecord], preparation: Preparation) -> Manifest:
        """Write the snapshot; the sides first, for once it is used they must be known."""
        self._keep_splits(preparation.sides)
        return self.snapshots.write(records, self.made_by)

    def _watched(self, records: Iterator[CleanRecord]) -> Iterator[CleanRecord]:
        for number, record in enumerate(records, 1):
            if number % 1000 == 0:
                self._watch("cleaning", number)
            yield record

    def _measured(self) -> Measured | None:
        """Measure how much of what names somebody is found, and refuse if it is too little.

        Raises:
            GovernanceError: it is.
        """
        if self._data.identifiers.method == "none":
            return None
        self._watch("measuring de-identification", 0)
        found = gate()
        if short := found.shortfalls():
            raise GovernanceError(
                f"de-identification is not good enough, nothing was read: {'; '.join(short)}"
            )
        return found

    def _splits(self) -> dict[str, bool]:
        path = self._folder / "splits.sealed"
        if not path.exists():
            return {}
        data = b"".join(read_sealed(path, self._key.derived("splits"), purpose=self._purpose))
        try:
            return dict(json.loads(data))
        except (ValueError, TypeError) as error:
            raise DamagedError(f"{str(path)!r} is damaged: restore it") from error

    def _keep_splits(self, sides: Mapping[str, bool]) -> None:
        key = self._key.derived("splits")
        path = self._folder / "splits.sealed"
        with SealedWriter(path, key, purpose=self._purpose) as file:
            file.write(json.dumps(dict(sorted(sides.items()))).encode())


def _drain(records: Iterator[CleanRecord], _: Preparation) -> None:
    for record in records:
        record.canonical()  # what cannot be written is found by a check too


class _Told:
    """The list of everything that was changed or left out; whole or as it was before."""

    def __init__(self, path: Path) -> None:
        self._path, self._draft = path, path.with_name(f".{path.name}.{os.getpid()}")
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "_Told":
        with self._writing():
            make_folder(self._path.parent, 0o700)
            handle = os.open(self._draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            self._file = os.fdopen(handle, "wb")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if self._file is not None and kind is None:
                with self._writing():
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._draft.replace(self._path)
        finally:
            self._draft.unlink(missing_ok=True)
            if self._file is not None:
                with self._writing():
                    self._file.close()

    def add(self, told: Problem | Unreadable | tuple[Reason, str]) -> None:
        """Add one line."""
        if self._file is not None:
            with self._writing():
                self._file.write(orjson.dumps(_line(told)) + b"\n")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"cannot write {str(self._path)!r}: {error.strerror}") from error


def _line(told: Problem | Unreadable | tuple[Reason, str]) -> dict[str, Any]:
    found: tuple[str, str, str, str]
    match told:
        case Unreadable():
            found = (told.place, Code.UNREADABLE, told.problem, "quarantine")
        case Problem():
            found = (told.place, told.code, told.subject, told.action)
        case reason, place:
            found = (place, reason, "", "withheld")
    return dict(zip(("place", "code", "about", "action"), found, strict=True))


def gate() -> Measured:
    """Measure the finder on the synthetic notes that the gate is defined by."""

    def find(note: Note) -> tuple[Span, ...]:
        return Finder(staff=note.staff).find(note.text, note.identifiers)

    return measure(find, notes(GATE_NOTES, seed=GATE_SEED), trap_notes(GATE_TRAPS, seed=GATE_SEED))
