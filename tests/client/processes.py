"""What runs below a process, as the kernel tells it."""

import time
from pathlib import Path


def descendants(pid):
    """Return a process and all below it that live."""
    parents = {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                fields = (place / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(place.name)] = int(fields[1])
    found = {pid} & parents.keys()
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def wait_until_gone(pids, seconds):
    """Wait until no process of these lives; return whether that came to be."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(descendants(pid) for pid in pids):
            return True
        time.sleep(0.01)
    return False
