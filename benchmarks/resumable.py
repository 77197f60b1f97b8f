"""Results of long benchmarks, one line a run: what is there is not done again."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Done = dict[str, dict[str, Any]]


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
