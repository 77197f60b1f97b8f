"""What the noise costs: the time to draw it, and how long a private step waits for it.

    OMP_NUM_THREADS=1 taskset -c 0 python -m huizhen.benchmarks.noise [--json]

Normals are those of ``client/randomness.py``, drawn on one thread; the time is the median of the
repeats. The step is that of ``dp_step`` on its Llama with LoRA on all linear layers, 409,600
trained numbers, on one torch thread. Noise is drawn on a thread of its own while the step computes
gradients, and the step waits for it only where it is not ready: the wait is the time inside
``NoiseSource.draw`` over the step's. Where both threads share one core, as under ``taskset``, the
work of drawing is in the step's time all the same; the second share says how much that can be.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from numpy.typing import NDArray

from huizhen.benchmarks.dp_step import load, method, write_base
from huizhen.client.examples import Examples
from huizhen.client.randomness import NoiseSource, normals
from huizhen.learning.model import AdaptedModel

COUNT = 4_000_000
MODEL, TARGETS = "llama 25M 4x128", "all linear"


def seconds_to_draw(count: int, repeats: int) -> float:
    """Return the median time of drawing so many normals."""
    normals(count)  # the first one is not timed
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        normals(count)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def step_and_wait(model: AdaptedModel, examples: Examples, steps: int) -> tuple[float, float]:
    """Return the mean seconds of a private step, and those of them that it waits for noise."""
    plain, waits = NoiseSource.draw, []

    def timed(source: NoiseSource) -> NDArray[Any]:
        begin = time.perf_counter()
        drawn = plain(source)
        waits.append(time.perf_counter() - begin)
        return drawn

    taken = []
    with (
        patch.object(NoiseSource, "draw", timed),
        method("huizhen", model, examples, steps + 1) as step,
    ):
        for _ in range(steps + 1):
            begin = time.perf_counter()
            step()
            taken.append(time.perf_counter() - begin)
    # the first one is not timed
    return statistics.fmean(taken[1:]), statistics.fmean(waits[1:])


def measure(
    model: AdaptedModel, examples: Examples, *, count: int, repeats: int, steps: int
) -> dict[str, Any]:
    """Return all figures as JSON values, times in seconds.

    Args:
        model: whose step is timed.
        examples: one batch of records.
        count: normals to draw.
        repeats: draws, of which the median counts.
        steps: private steps, of which the mean counts.
    """
    size = sum(parameter.numel() for parameter in model.parameters.values())
    step, wait = step_and_wait(model, examples, steps)
    return {
        "normals": {"count": count, "repeats": repeats, "seconds": seconds_to_draw(count, repeats)},
        "step": {
            "numbers": size,
            "steps": steps,
            "seconds": step,
            "wait_share": wait / step,
            "drawing_share": seconds_to_draw(size, repeats) / step,
        },
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description="What the noise of private training costs.",
        epilog="example: OMP_NUM_THREADS=1 taskset -c 0 python -m huizhen.benchmarks.noise --json",
    )
    parser.add_argument("--repeats", type=int, default=7, help="draws (default 7)")
    parser.add_argument("--steps", type=int, default=20, help="private steps (default 20)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_base(MODEL, Path(folder))
        model, examples = load(MODEL, TARGETS, Path(folder))
        found = measure(
            model, examples, count=COUNT, repeats=arguments.repeats, steps=arguments.steps
        )
    if arguments.json:
        print(json.dumps(found))
        return
    drawn, step = found["normals"], found["step"]
    print(f"{drawn['count']:,} normals take {drawn['seconds']:.3f} s on one thread")
    print(
        f"a private step with {step['numbers']:,} numbers takes {step['seconds']:.3f} s: "
        f"{step['wait_share']:.1%} of it waits for noise, and drawing it alone would take "
        f"{step['drawing_share']:.1%} as long"
    )


if __name__ == "__main__":
    main()
