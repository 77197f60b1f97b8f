"""What a doctor command finds: one line each, and what to do where it is not well."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from huizhen.protocol.errors import HuizhenError

LEAST_FREE_BYTES = 1 << 30
State: TypeAlias = Literal["ok", "warning", "failure"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    text: str
    # what was found
    todo: str = ""
    # what to do; empty where it is well


Check: TypeAlias = Callable[[], Finding]


def run_checks(
    checks: Mapping[str, Check], todos: Mapping[str, str] | None = None
) -> Iterator[Finding]:
    """Give each check's finding; what a check raises is its finding.

    Args:
        checks: by name.
        todos: what to do where the check of a name raises; for one that is not there, what the
            error's own text says.
    """
    for name, check in checks.items():
        todo = (todos or {}).get(name, "mend what this line names")
        try:
            yield check()
        except HuizhenError as error:
            yield Finding(name, "failure", str(error), todo)
        except OSError as error:
            yield Finding(name, "failure", f"{error.strerror or error}", todo)


def disk(folder: Path) -> Finding:
    """Look at the room on a folder's disk."""
    free = shutil.disk_usage(folder).free
    text = f"{free / (1 << 30):.1f} GiB are free at {folder}"
    if free < LEAST_FREE_BYTES:
        return Finding("disk", "failure", text, "make room: at 0 nothing is answered any more")
    return Finding("disk", "ok", text)
