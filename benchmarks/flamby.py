"""FLamby's two linear benchmarks beside its published tables: Fed-Heart-Disease, Fed-TCGA-BRCA.

    python -m huizhen.benchmarks.flamby --data ../shared/data [--json]       two minutes

du Terrail et al. 2022 (https://arxiv.org/abs/2210.04620), results of their repository at edacf54d.
A row is the mean over the hospitals' test sets, averaged over the seeds 42 to 46: accuracy of a
logistic regression on 740 patients of four hospitals, C-index of a linear Cox model on 1,088
patients of six regions. Hyper-parameters are those of their files, nothing is searched: rounds of
100 steps in batches of 4 (15 rounds) or 8 (5 rounds); "pooled" and "local i" train with Adam for 50
or 30 passes, "local i" on hospital i alone, tested at all of them.

A row agrees where |ours − published| ≤ 2·√((sd² + sd'²) / 5) + p / 5, with sd and sd' the two
standard deviations over seeds and p what one patient of the smallest test set is of the mean.

Training, averaging and the strategies are the product's own (``LocalTrainer``, ``Coordinator``).
What is FLamby's, and refused by the product: weights by the true number of training records,
features by each hospital's own mean and deviation (heart; by the common ones where it trains on
all) or as they are (TCGA), first weights drawn by PyTorch. Theirs were drawn before the seed was
set: one start for all five seeds, which we cannot know, where ours has another start for each. So
a published sd has no spread of starts in it.
"""

import argparse
import csv
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from huizhen.benchmarks.flamby_data import (
    STANDARDISED,
    Centre,
    read_centres,
    read_pooled,
    read_regions,
)
from huizhen.client.evaluation import classify
from huizhen.client.examples import Examples, pooled
from huizhen.client.local_trainer import LocalTrainer
from huizhen.learning.metrics import concordance_index
from huizhen.learning.models import make_model
from huizhen.learning.survival import times_of
from huizhen.learning.trainable import Model
from huizhen.protocol.adapter import Tensors
from huizhen.protocol.study import Study, parse_study
from huizhen.protocol.wire import Message, encode
from huizhen.server.rounds import Coordinator

SEEDS = (42, 43, 44, 45, 46)
STEPS = 100
_OPT = ("fedadam", "fedyogi", "fedadagrad")
_NAMES = {
    "FedAvg": "fedavg",
    "FedProx": "fedprox",
    "Scaffold": "scaffold",
    "FedAdam": "fedadam",
    "FedYogi": "fedyogi",
    "FedAdagrad": "fedadagrad",
}


@dataclass(frozen=True, slots=True)
class Dataset:
    """One of FLamby's data sets, and how FLamby trains on it."""

    name: str
    # as in FLamby's results
    config: str
    task: Mapping[str, Any]
    read: Callable[[Path, Study], dict[str, Centre]]
    pool: Callable[[Path, Study], Examples]
    # all training records, as FLamby's pooled training has them
    batch_size: int
    rounds: int
    passes: int
    # of pooled and local training
    rate: float
    # likewise, of Adam


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of ours and of theirs."""

    dataset: str
    strategy: str
    ours: float
    published: float
    tolerance: float
    sd: float
    published_sd: float

    @property
    def agrees(self) -> bool:
        """Whether the figures are as near as chance lets them be."""
        return abs(self.ours - self.published) <= self.tolerance


def heart(data: Path) -> Dataset:
    """Return Fed-Heart-Disease."""
    features = ["age", "sex", "trestbps", "chol", "fbs", "thalach", "exang", "oldpeak", "cp_2",
                "cp_3", "cp_4", "restecg_1", "restecg_2"]  # fmt: skip
    task = {
        "kind": "tabular", "label": "disease", "labels": ["0", "1"],
        "features": {name: [-1, 1] for name in features},
    }  # fmt: skip
    return Dataset(
        "fed_heart_disease", "heart_disease", task,
        lambda data, study: read_centres(data, study, STANDARDISED), read_pooled,
        4, 15, 50, 0.001,
    )  # fmt: skip


def tcga(data: Path) -> Dataset:
    """Return Fed-TCGA-BRCA."""
    with (data / "tcga_brca" / "fed_tcga_brca.csv").open(encoding="utf-8", newline="") as file:
        columns = next(csv.reader(file))
    features = columns[columns.index("split") + 1 : columns.index("E")]
    task = {
        "kind": "survival", "label": "E", "labels": ["0.0", "1.0"], "time": "T",
        "features": {name: [-1, 1] for name in features},
    }  # fmt: skip
    return Dataset("fed_tcga_brca", "tcga_brca", task, read_regions, _all_regions, 8, 5, 30, 0.1)


def _all_regions(data: Path, study: Study) -> Examples:
    return pooled([centre.train for centre in read_regions(data, study).values()])


def study_of(dataset: Dataset, strategy: Mapping[str, Any], rounds: Mapping[str, Any]) -> Study:
    """Return the study of one run, without sites."""
    return parse_study(
        {
            "study": {"name": dataset.name},
            "task": dict(dataset.task),
            "privacy": {"unit": "none"},
            "strategy": {"weights": "public", **strategy},
            "rounds": {"batch_size": dataset.batch_size, **rounds},
        },
        dataset.name,
    )


def federated(dataset: Dataset, theirs: Mapping[str, Any], name: str) -> Study:
    """Return the study of one of FLamby's strategies with FLamby's hyper-parameters."""
    own: dict[str, Any] = {"name": name}
    if name == "fedprox":
        own["mu"] = theirs["mu"]
    if name in (*_OPT, "scaffold"):
        own["server_learning_rate"] = theirs["server_learning_rate"]
    if name in _OPT:
        own |= {"beta1": theirs["beta1"], "tau": theirs["tau"]}
        if name != "fedadagrad":
            own["beta2"] = theirs["beta2"]
    rounds = {
        "count": dataset.rounds, "length": "steps", "local_steps": STEPS,
        "learning_rate": theirs["learning_rate"], "optimizer": "sgd", "momentum": 0.0,
        "max_update_norm": 1e12,
    }  # fmt: skip
    return study_of(dataset, own, rounds)


def alone(dataset: Dataset) -> Study:
    """Return the study of pooled or local training: one round of passes with Adam."""
    rounds = {
        "count": 1, "local_epochs": dataset.passes, "learning_rate": dataset.rate,
        "max_update_norm": 1e12,
    }  # fmt: skip
    return study_of(dataset, {"name": "fedavg"}, rounds)


def run(study: Study, sites: Mapping[str, Examples], model: Model, seed: int) -> Tensors:
    """Train a federation to its end and return the weights."""
    study = parse_study(
        {
            **{key: value for key, value in _tables(study).items() if value is not None},
            "study": {"name": study.study.name, "seed": seed},
            "sites": {name: {"patients_public": len(one.ids)} for name, one in sites.items()},
        },
        study.study.name,
    )
    torch.manual_seed(seed)
    drawn = {f"head.{n}": p.detach().numpy() for n, p in _drawn(study).named_parameters()}
    first = {name: drawn[name] for name in model.shapes}
    trainers = {
        name: LocalTrainer(name, study, examples, model, first) for name, examples in sites.items()
    }
    kept: dict[str, Tensors] = {name: {} for name in sites}
    coordinator = Coordinator(study, model.shapes)
    state = coordinator.first(first)
    while not coordinator.is_finished(state):
        announcement, round = coordinator.announcement(state), state.round
        for name, trainer in trainers.items():
            trained = trainer.train(announcement, round, kept[name])
            kept[name] = trained.kept
            message = Message(
                kind="update", study=study.digest(), round=round, site=name, tensors=trained.update
            )
            state, receipt = coordinator.receive(state, encode(message))
            if receipt.refusal is not None:
                raise RuntimeError(f"update of {name} was refused: {receipt.refusal}")
        state = coordinator.close_round(state)
    return state.strategy.x


def _tables(study: Study) -> dict[str, Any]:
    found = {key: value for key, value in study.resolved().items() if key != "format"}
    return {
        key: {k: v for k, v in table.items() if v is not None} if isinstance(table, dict) else table
        for key, table in found.items()
    }


def _drawn(study: Study) -> nn.Linear:
    """Return FLamby's first weights: PyTorch's default."""
    return nn.Linear(len(study.task.features), 1)


def score(model: Model, x: Tensors, centres: Mapping[str, Centre]) -> float:
    """Return the mean over the test sets of the accuracy, or of the C-index."""
    model.load(x)
    found = []
    for centre in centres.values():
        scores, labels = classify(model, centre.test), np.asarray(centre.test.labels)
        if model.kind == "survival":
            index = concordance_index(times_of(centre.test.ids), labels == 1, scores[:, 1])
            found.append(math.nan if index is None else index)
        else:
            found.append(float((scores.argmax(axis=1) == labels).mean()))
    return float(np.mean(found))


def measure(dataset: Dataset, data: Path) -> Iterator[Row]:
    """Yield the rows of a data set as they are measured."""
    folder = data / "flamby_results"
    theirs = json.loads((folder / f"config_{dataset.config}.json").read_text("utf-8"))["strategies"]
    with (folder / "summary.csv").open(encoding="utf-8", newline="") as file:
        published = {row["method"]: row for row in csv.DictReader(file)
                     if row["dataset"] == dataset.name}  # fmt: skip
    base = alone(dataset)
    centres = dataset.read(data, base)
    train = {name: centre.train for name, centre in centres.items()}
    smallest = min(len(centre.test.ids) for centre in centres.values())
    patient = 1 / smallest / len(centres)
    runs: dict[str, tuple[Study, Mapping[str, Examples]]] = {
        "Pooled Training": (base, {"all": dataset.pool(data, base)})
    }
    for i, (name, examples) in enumerate(train.items()):
        runs[f"Local {i}"] = base, {name: examples}
    for method, name in _NAMES.items():
        runs[f"{method}{STEPS}"] = federated(dataset, theirs[method], name), train
    for method, (study, sites) in runs.items():
        model = make_model(study, None)
        found = [score(model, run(study, sites, model, seed), centres) for seed in SEEDS]
        own, sd = statistics.mean(found), statistics.stdev(found)
        mean = float(published[method]["mean_over_clients"])
        their_sd = float(published[method]["sd_over_seeds"])
        tolerance = 2 * math.sqrt((sd**2 + their_sd**2) / len(SEEDS)) + patient / len(SEEDS)
        yield Row(dataset.name, method, own, mean, tolerance, sd, their_sd)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    if not options.json:
        print(f"{'data set':18} {'strategy':16} {'ours':>14} {'published':>14} {'tolerance':>9}")
    for dataset in (heart(options.data), tcga(options.data)):
        for row in measure(dataset, options.data):
            rows.append(row)
            if not options.json:
                print(
                    f"{row.dataset:18} {row.strategy:16} {row.ours:6.4f} ±{row.sd:6.4f} "
                    f"{row.published:6.4f} ±{row.published_sd:6.4f} {row.tolerance:9.4f}"
                    f"{'' if row.agrees else '  MISS'}",
                    flush=True,
                )
    if options.json:
        print(json.dumps({"rows": [asdict(row) | {"agrees": row.agrees} for row in rows]}))
    else:
        print(f"{sum(row.agrees for row in rows)} of {len(rows)} agree")


if __name__ == "__main__":
    main()
