"""What many processes hold together, from ``/proc``: the sum of their proportional set sizes.

A page that several processes share counts for each of them in part (``smaps_rollup``, proc(5)), so
the sum is what the machine holds. The sum of the processes' own peaks counts shared pages once per
process and peaks as if they fell together: it is an upper bound.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from huizhen.benchmarks.federation_values import status_bytes


def children() -> dict[int, list[int]]:
    """Return the processes of this machine by the process that started them."""
    found: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name stands in brackets and may itself hold spaces and brackets.
            parent = int(place.read_text("utf-8", "replace").rpartition(")")[2].split()[1])
        except (OSError, IndexError):  # it has ended
            continue
        found.setdefault(parent, []).append(int(place.parent.name))
    return found


def below(process: int, tree: Mapping[int, list[int]]) -> list[int]:
    """Return all processes that a process, and those that it started, have started."""
    own = tree.get(process, [])
    return own + [each for one in own for each in below(one, tree)]


def proportional_bytes(process: int) -> int:
    """Return a process's proportional set size; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text("ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


@dataclass(slots=True)
class Peak:
    """The largest found so far, in bytes."""

    together: int = 0
    # of all processes at one moment
    groups: dict[str, int] = field(default_factory=dict)
    # of each group at that moment
    single: dict[str, int] = field(default_factory=dict)
    # of the largest process of each group, at any moment
    bound: int = 0
    # the sum of the resident peaks of all processes there now
    processes: int = 0


class Watch:
    """Looks at processes in a thread of its own, until the end of ``with``."""

    def __init__(self, roots: Mapping[int, tuple[str, str]], *, seconds: float) -> None:
        """Prepare.

        Args:
            roots: processes, each with the name of its own group and that of what it starts.
            seconds: between two looks, which are not free: with 60 processes some tens of
                milliseconds of one core.
        """
        self._roots, self._seconds = roots, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.peak = Peak()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def look(self) -> None:
        """Take what is there now into the peak."""
        tree, sums, peak = children(), dict[str, int](), self.peak
        bound = count = 0
        for root, (own, started) in self._roots.items():
            for process in (root, *below(root, tree)):
                group = own if process == root else started
                held = proportional_bytes(process)
                sums[group] = sums.get(group, 0) + held
                peak.single[group] = max(peak.single.get(group, 0), held)
                bound += _peak_bytes(process)
                count += held > 0
        if sum(sums.values()) > peak.together:
            peak.together, peak.groups = sum(sums.values()), sums
        peak.bound, peak.processes = max(peak.bound, bound), max(peak.processes, count)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.look()
            self._stop.wait(self._seconds)
        self.look()


def _peak_bytes(process: int) -> int:
    try:
        return status_bytes(process, "VmHWM")
    except (OSError, StopIteration):  # it has ended
        return 0
