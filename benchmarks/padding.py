"""Tokens per second of a training pass with batches by length and with batches in random order.

    python -m huizhen.benchmarks.padding --data
    ../shared/data/rare_disease_fed6/rare_disease_fed6.jsonl

Both ways train the same records with the same model in turns in one process; the medians of the
passes are compared. Tokens are real ones, padding left out.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from huizhen.client.examples import Examples
from huizhen.learning.batching import shuffled_batches
from huizhen.learning.trainable import Model
from huizhen.simulations.experiment import parse_experiment
from huizhen.simulations.partition import read_sites
from huizhen.simulations.prepare import complete_study, prepare


def tables(data: Path, layers: int) -> dict[str, object]:
    """Return the experiment that is timed."""
    return {
        "study": {"name": "padding"},
        "base": {"name": "minilm"},
        "adapter": {"layers": layers, "target_modules": ["query", "key", "value", "dense"]},
        "task": {
            "kind": "classification",
            "text": "{observed_labels}",
            "label": "disease",
            "max_tokens": 512,
        },
        "privacy": {"unit": "none"},
        "simulation": {
            "data": str(data),
            "partition": {"kind": "dirichlet", "alpha": 1.0, "sites": 1},
            "patient": "id",
            "arms": ["pooled"],
        },
    }


def seconds(model: Model, examples: Examples, batches: list[np.ndarray]) -> float:
    """Return how long one pass over the batches takes, forward and backward."""
    names = frozenset(model.shapes)
    model.train_only(names)
    begin = time.perf_counter()
    for indices in batches:
        losses, _ = model.losses(examples.batch(indices))
        losses.mean().backward()  # type: ignore[no-untyped-call]  # torch's
    return time.perf_counter() - begin


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What batches by length save.")
    parser.add_argument("--data", type=Path, required=True, help="rare_disease_fed6.jsonl")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        experiment = parse_experiment(
            tables(arguments.data, arguments.layers), Path(name) / "x.toml"
        )
        sites = read_sites(experiment.simulation, "disease")
        study = complete_study(experiment, sites, None)
        prepared = prepare(experiment, study, sites, home=None, say=lambda _: None)
    examples = next(iter(prepared.train.values()))
    tokens = sum(examples.lengths)
    taken: dict[str, list[float]] = {"by length": [], "random": []}
    for repeat in range(arguments.repeats):
        generator = np.random.default_rng(repeat)
        order = generator.permutation(len(examples.ids))
        size = arguments.batch_size
        ways = {
            "by length": shuffled_batches(examples.lengths, size, generator),
            "random": [order[i : i + size] for i in range(0, len(order), size)],
        }
        for way, batches in ways.items():
            taken[way].append(seconds(prepared.model, examples, batches))
    rows = [
        {"batches": way, "tokens_per_second": round(tokens / statistics.median(times))}
        for way, times in taken.items()
    ]
    ratio = statistics.median(taken["random"]) / statistics.median(taken["by length"])
    result = {"rows": rows, "speedup": round(ratio, 2), "threads": torch.get_num_threads()}
    if arguments.json:
        print(json.dumps(result))
        return
    for row in rows:
        print(f"{row['batches']:10s} {row['tokens_per_second']:7d} tokens/s")
    print(f"batches by length are {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
