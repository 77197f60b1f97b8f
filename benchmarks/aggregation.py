"""What averaging costs: the mean of 50 sites of 40 million numbers, and the SVD of one layer.

    OMP_NUM_THREADS=1 taskset -c 0 python -m huizhen.benchmarks.aggregation [--json] [--out FILE]

mean   Each site's update is read from a file, hashed, checked and added, as a coordinator does it,
       one after another; the parts are timed apart. The traffic of adding is 20 bytes a number: an
       update's 4, and the sum's 8 both ways. The machine's own bandwidth is measured beside it, on
       one thread and with arrays of the same size: the better of a copy (16 bytes an int64) and of
       adding one int64 array to another (24 bytes). Memory is the process's greatest resident size
       less what it had before the first update, over the bytes of one adapter.
svd    FlexLoRA's step (strategies/products.py) for one layer: sites of rank 8, 4096 x 4096.
rules  The rules that bear liars, for 10 sites of 2 million numbers, against the mean.

Medians over the repeats; the update is the same for every site, which no part of it knows.
"""

import argparse
import hashlib
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from huizhen.protocol.adapter import Tensors
from huizhen.protocol.wire import Message, encode
from huizhen.server.validation import check_update
from huizhen.strategies import mean
from huizhen.strategies.base import Given
from huizhen.strategies.products import stack, svd
from huizhen.strategies.robust import (
    centred_clipping,
    geometric_median,
    median,
    multi_krum,
    trimmed_mean,
)

SITES, NUMBERS, TENSORS = 50, 40_000_000, 10
WIDTH, RANK = 4096, 8
STUDY = "0" * 64


class Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        """Begin with no part."""
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is inside."""
        begin = time.perf_counter()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - begin)


def update_of(numbers: int, tensors: int, seed: int = 0) -> Tensors:
    """Return an update of so many numbers in equal tensors."""
    rng = np.random.default_rng(seed)
    each = numbers // tensors
    return {
        f"l.{i}.lora_B": (1e-3 * rng.standard_normal((each // 8, 8), np.float32)).astype("<f4")
        for i in range(tensors)
    }


def bandwidth(numbers: int, repeats: int) -> float:
    """Return the machine's bandwidth on one thread, in bytes a second."""
    one, other = np.ones(numbers, np.int64), np.ones(numbers, np.int64)
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        np.copyto(one, other)
        middle = time.perf_counter()
        np.add(one, other, out=one)
        end = time.perf_counter()
        found.append(max(16 * numbers / (middle - begin), 24 * numbers / (end - middle)))
    return statistics.median(found)


def average(path: Path, sites: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the seconds of each part for one site, and the greatest memory, of a whole round."""
    clock, seen, total = Clock(), [], mean.start()
    before = _resident()
    for i in range(sites):
        with clock.part("read"):
            data = path.read_bytes()
        with clock.part("hash"):
            hashlib.sha256(data).hexdigest()
        with clock.part("check"):
            found = check_update(
                data, shapes=shapes, study=STUDY, round=1, sites=["s"], seen=[], max_norm=1e9
            )
            if isinstance(found, str) or not mean.fits(found.tensors):
                raise AssertionError(found)
        with clock.part("add"):
            total = mean.add(total, found.tensors, 1 / sites)
        seen.append(i)
        del data, found
    with clock.part("finish"):
        mean.finish(total, 1.0)
    peak = _greatest_resident()
    medians = {name: statistics.median(taken) for name, taken in clock.seconds.items()}
    return {"seconds": medians, "bytes": peak - before}


def measure_mean(sites: int, numbers: int, repeats: int) -> dict[str, Any]:
    """Return what the mean takes, beside the machine's bandwidth before and after it."""
    update = update_of(numbers, TENSORS)
    shapes = {name: value.shape for name, value in update.items()}
    size = sum(value.nbytes for value in update.values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "update"
        message = Message(kind="update", study=STUDY, round=1, site="s", tensors=update)
        path.write_bytes(encode(message))
        del update, message
        around = [bandwidth(numbers, 3)]
        runs = []
        for _ in range(repeats):  # each in a process of its own, whose memory begins small
            with get_context("spawn").Pool(1) as pool:
                runs.append(pool.apply(average, (path, sites, shapes)))
            around.append(bandwidth(numbers, 3))
    seconds = {
        name: statistics.median(run["seconds"][name] for run in runs) for name in runs[0]["seconds"]
    }
    machine = statistics.median(around)
    added = 20 * numbers / seconds["add"]
    return {
        "sites": sites,
        "numbers": numbers,
        "seconds": seconds,
        "bytes_a_second": added,
        "machine_bytes_a_second": machine,
        "share_of_bandwidth": added / machine,
        "adapters_of_memory": max(run["bytes"] for run in runs) / size,
    }


def measure_svd(sites: int, width: int, rank: int, repeats: int) -> dict[str, Any]:
    """Return the seconds of one layer's decomposition."""
    rng = np.random.default_rng(1)
    terms = [
        (
            1 / sites,
            rng.standard_normal((width, rank), np.float32),
            rng.standard_normal((rank, width), np.float32),
        )
        for _ in range(sites)
    ]

    def once() -> None:
        svd(*stack(terms), rank)

    return {"sites": sites, "width": width, "rank": rank, "seconds": _median(once, repeats)}


def measure_rules(sites: int, numbers: int, repeats: int) -> dict[str, Any]:
    """Return the seconds of each rule, the mean's among them."""
    given = [Given(f"s{i:02}", 1 / sites, update_of(numbers, 4, seed=i)) for i in range(sites)]

    def plain() -> None:
        total = mean.start()
        for one in given:
            total = mean.add(total, one.update, one.share)
        mean.finish(total, 1.0)

    rules: dict[str, Callable[[], object]] = {
        "mean": plain,
        "median": lambda: median(given),
        "trimmed_mean": lambda: trimmed_mean(given, 1),
        "geometric_median": lambda: geometric_median(given),
        "multi_krum": lambda: multi_krum(given, 1),
        "centred_clipping": lambda: centred_clipping(given, 1.0),
    }
    taken = {name: _median(rule, repeats) for name, rule in rules.items()}
    return {"sites": sites, "numbers": numbers, "seconds": taken}


def _median(once: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        once()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])  # the first one is not timed


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _greatest_resident() -> int:
    """Return what this program has held at most; getrusage counts its parent before it too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def show(found: dict[str, Any]) -> None:
    """Print the figures."""
    if (one := found.get("mean")) is not None:
        parts = ", ".join(f"{name} {taken:.3f} s" for name, taken in one["seconds"].items())
        print(f"mean of {one['sites']} sites x {one['numbers']:,} numbers, for one site: {parts}")
        print(
            f"  adding moves {one['bytes_a_second'] / 1e9:.1f} GB/s, the machine "
            f"{one['machine_bytes_a_second'] / 1e9:.1f}: {one['share_of_bandwidth']:.2f} of it"
        )
        print(f"  memory: {one['adapters_of_memory']:.2f} adapters")
    if (one := found.get("svd")) is not None:
        print(
            f"svd of {one['sites']} sites x rank {one['rank']} on {one['width']} x {one['width']}: "
            f"{one['seconds']:.2f} s a layer"
        )
    if (one := found.get("rules")) is not None:
        for name, taken in one["seconds"].items():
            print(f"{name:17} {taken:.3f} s for {one['sites']} sites x {one['numbers']:,} numbers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(
        description="What averaging costs.",
        epilog="example: OMP_NUM_THREADS=1 python -m huizhen.benchmarks.aggregation svd --json",
    )
    parser.add_argument("parts", nargs="*", choices=["mean", "svd", "rules", []], default=[])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sites", type=int, default=SITES)
    parser.add_argument("--numbers", type=int, default=NUMBERS, help="of one update")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the figures as JSON")
    terms = parser.parse_args(arguments)
    parts, found = terms.parts or ["mean", "svd", "rules"], {}
    if "mean" in parts:
        found["mean"] = measure_mean(terms.sites, terms.numbers, terms.repeats)
    if "svd" in parts:
        found["svd"] = measure_svd(terms.sites, WIDTH, RANK, terms.repeats)
    if "rules" in parts:
        found["rules"] = measure_rules(10, min(terms.numbers, 2_000_000), terms.repeats)
    text = json.dumps(found, indent=1)
    if terms.out is not None:
        terms.out.write_text(text + "\n", encoding="utf-8")
    if terms.json:
        print(text)
    else:
        show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
