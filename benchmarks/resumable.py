"""Results of long benchmarks, one line a run: what is there is not done again."""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Done = dict[str, dict[str, Any]]


def options(
    description: str, example: str, out: Path, arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Return the options of a benchmark that goes on: minutes, out, data and home.

    Args:
        description: what it measures.
        example: a command.
        out: the folder of the results, which is made.
        arguments: of the command line; the process's own when None.
    """
    parser = argparse.ArgumentParser(description=description, epilog=f"example: {example}")
    parser.add_argument("--minutes", type=float, default=20.0, help="no run begins after it")
    parser.add_argument("--out", type=Path, default=out, metavar="DIR")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), metavar="DIR")
    parser.add_argument("--home", type=Path, metavar="DIR", help="where base models are cached")
    terms = parser.parse_args(arguments)
    terms.out.mkdir(parents=True, exist_ok=True)
    return terms


def read_results(path: Path, key: Callable[[Mapping[str, Any]], str]) -> Done:
    """Return the results so far by key; a line that was cut by a kill is left out.

    Args:
        path: the file, which need not be there.
        key: what a result is called.
    """
    found: Done = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            one = json.loads(line)
        except ValueError:
            continue
        found[key(one)] = one
    return found


def append(path: Path, result: Mapping[str, Any]) -> None:
    """Add one result, on the disk when this returns."""
    with path.open("a+", encoding="utf-8") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(file.tell() - 1)
            if file.read(1) != "\n":  # after a cut line
                file.write("\n")
        file.write(json.dumps(result) + "\n")
        file.flush()
        os.fsync(file.fileno())
