"""How fast a hospital's notes are read, checked and de-identified, and in how much memory.

    python -m huizhen.benchmarks.data [--megabytes 20] [--whole 1000] [--json] [--out FILE]

The notes are made up (client/identifiers/notes.py, two in Chinese for each in English, about 1 kB
each), one a line of JSON with their patient and what is known of them. Rates are bytes of the file
over seconds of processor time, medians of the repeats, on one core:

json, polars    the file read by the standard library and by polars alone, for comparison
read            by this project, to records
check           and texts, results and demographics checked
de-identify     and identifiers replaced
near            and near duplicates looked for: both passes of a preparation, all of it

``--whole`` makes a file of so many megabytes and takes it all the way to a snapshot in a process of
its own, whose greatest resident memory is measured.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl

from huizhen.client.data_key import DataKey
from huizhen.client.data_terms import Data, parse_data
from huizhen.client.deidentify import Person, RecordDeidentifier
from huizhen.client.gate import AdmittedRecord
from huizhen.client.identifiers.notes import notes
from huizhen.client.preparation import Preparation
from huizhen.client.quality.demographics import Demographics
from huizhen.client.quality.lab_table import shipped_table
from huizhen.client.quality.labs import check_labs
from huizhen.client.quality.texts import check_text
from huizhen.client.records.export import parts, read_part
from huizhen.client.records.record import Record
from huizhen.client.snapshot import Snapshots

TODAY, KEY = date(2026, 1, 1), DataKey(bytes(32))
NAMED = ("name", "id", "phone", "mrn")
DISTINCT = 20_000
# notes that are made; a larger file holds them again, under other patients and with a number each


def terms() -> Data:
    """Return what the file is."""
    source = {
        "path": "notes.jsonl", "kind": "note", "text": ["note"], "time": "time", "fields": {},
        "identifiers": {name: name for name in NAMED},
    }  # fmt: skip
    return parse_data(
        {
            "data": {"name": "benchmark"},
            "governance": {"purpose": "speed", "basis": "made_up", "minimum_patients": 2},
            "sources": [source],
        },
        "benchmark",
    )


def write_notes(path: Path, megabytes: float) -> int:
    """Write notes as JSON lines until the file is so large; return how many."""
    made = []
    for note in notes(DISTINCT, seed=7):
        known = {name: next(iter(note.identifiers.get(name, ())), "") for name in NAMED}
        made.append({**known, "note": note.text})
        if sum(len(one["note"]) for one in made[-1:]) * len(made) > 2e6 * megabytes:
            break
    number, size = 0, 0
    with path.open("w", encoding="utf-8") as file:
        while size < 1e6 * megabytes:
            one = made[number % len(made)]
            text = f"{one['note']}\n{number:x}"
            fields = {"patient": f"p{number // 3}", "time": "2023-05-06", **one, "note": text}
            line = json.dumps(fields, ensure_ascii=False) + "\n"
            file.write(line)
            number, size = number + 1, size + len(line.encode())
    return number


def rates(folder: Path, repeats: int) -> dict[str, float]:
    """Return MB of the file a second of processor time, by how much is done."""
    path = folder / "notes.jsonl"
    size = path.stat().st_size / 1e6
    steps: dict[str, Callable[[], Any]] = {
        "json": lambda: [json.loads(line) for line in path.open("rb")],
        "polars": lambda: pl.read_ndjson(path),
        "read": lambda: _drain(folder, lambda record: record),
        "check": lambda: _drain(folder, _checked()),
        "de-identify": lambda: _drain(folder, _cleaned(folder)),
        "near": lambda: _prepare(folder),
    }
    found = {}
    for name, step in steps.items():
        seconds = []
        for _ in range(repeats):
            begin = time.process_time()
            step()
            seconds.append(time.process_time() - begin)
        found[name] = size / statistics.median(seconds)
    return found


def whole(folder: Path) -> dict[str, float]:
    """Take the file to a snapshot; return seconds and the greatest resident memory in MiB."""
    begin = time.perf_counter()
    prepared = _look(folder)
    Snapshots(folder / "all", KEY.derived("snapshot"), cohort="all").write(prepared.records(), {})
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "megabytes": (folder / "notes.jsonl").stat().st_size / 1e6,
        "seconds": time.perf_counter() - begin,
        "mebibytes": memory,
    }


def _drain(folder: Path, use: Callable[[Record], Any]) -> None:
    for part in parts(terms().sources, folder):
        for entry in read_part(part, folder):
            if isinstance(entry, Record):
                use(entry)


def _checked() -> Callable[[Record], Record]:
    people, table = Demographics(TODAY), shipped_table()

    def check(record: Record) -> Record:
        record, _ = check_text(record)
        record, _ = check_labs(record, table)
        people.add(record)
        return record

    return check


def _cleaned(folder: Path) -> Callable[[Record], Any]:
    data, check = terms(), _checked()
    people: dict[str, Person] = {}
    cleaner = RecordDeidentifier(data.identifiers, KEY, people, ())

    def clean(record: Record) -> Any:
        known = {kind: set(values) for kind, values in record.identifiers.items()}
        people[record.patient] = Person(identifiers=known)
        admitted = AdmittedRecord(check(record), data.governance)
        return cleaner.clean(admitted, place=record.place)

    return clean


def _look(folder: Path) -> Preparation:
    prepared = Preparation(terms(), folder, key=KEY, today=TODAY, table=shipped_table())
    prepared.look()
    return prepared


def _prepare(folder: Path) -> None:
    for _ in _look(folder).records():
        pass


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=20.0, help="of the file for the rates")
    parser.add_argument("--whole", type=float, default=0.0, help="of the file for the memory")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.add_argument("--out", type=Path, help="write it here too")
    parser.add_argument("--only-whole", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_whole is not None:
        print(json.dumps(whole(args.only_whole)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = write_notes(folder / "notes.jsonl", args.megabytes)
        found: dict[str, Any] = {"notes": count, "rates": rates(folder, args.repeats)}
    if args.whole:
        with tempfile.TemporaryDirectory() as name:
            write_notes(Path(name) / "notes.jsonl", args.whole)
            line = [sys.executable, "-m", "huizhen.benchmarks.data", "--only-whole", name]
            done = subprocess.run(line, check=True, capture_output=True, text=True)  # noqa: S603 - our own code
            found["whole"] = json.loads(done.stdout)
    text = json.dumps(found, indent=1)
    if args.out is not None:
        args.out.write_text(text + "\n", "utf-8")
    print(text if args.json else _table(found))
    return 0


def _table(found: dict[str, Any]) -> str:
    lines = [f"{name:12} {rate:8.1f} MB/s" for name, rate in found["rates"].items()]
    if "whole" in found:
        one = found["whole"]
        lines.append(
            f"{one['megabytes']:.0f} MB to a snapshot: {one['seconds']:.0f} s, "
            f"{one['mebibytes']:.0f} MiB"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
