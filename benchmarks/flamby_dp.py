"""FLamby's curve of accuracy against ε on Fed-Heart-Disease, as published and with the true ε.

    python -m huizhen.benchmarks.flamby_dp --data ../shared/data

Five minutes on an idle core; one scaling takes half of it (``--scalings standardised``).

du Terrail et al. 2022 (https://arxiv.org/abs/2210.04620), ``dp_example`` at commit 4dc8c520:
logistic regression on 13 features, four hospitals, FedAvg weighted by their sizes, 15 rounds of 100
steps of SGD at 0.001, per-example clipping at 1.1, δ = 1e-4, seeds 42 to 46; the metric is the
mean of the hospitals' test accuracies. A hospital of n patients samples each with q = 1 / ⌈n / 4⌉.

    nominal ε      what was asked of the accountant: RDP over 15 epochs, ⌊15 / q⌋ steps
    true ε         of the 1,500 steps that run; RDP, and PLD (protocol/accounting.py)
    unamplified ε  of 1,500 steps over shuffled batches, as far as it is proven

FLamby's batches are shuffled where its accountant assumes Poisson sampling (``flamby_accounting``);
this run samples as the accountant assumes. Expected steps are the same either way.

Steps and averaging are the product's own, ``client.dp_sgd.private_gradient`` and
``strategies.fedavg``; ``train_round`` around them would refuse less noise than a study's ε asks
for. What is FLamby's and not the product's, and stays outside every ε here:

- features are standardised by each hospital's own mean and deviation over its training records;
- q, the averaging weights and the denominator ⌊nq⌋ follow from the true n.

The product would refuse all of it: it scales by public ranges and takes public sizes. The column
"public ranges" is the same mechanism with the product's scaling.

Where this run cannot be theirs: FLamby's first weights were drawn before the seed was set, so each
run here draws its own from the same distribution; sampling and noise here are never seeded, so
figures change from run to run by about the spread that is given; clipping here aims at 0.999 of C.
The arm without DP is FLamby's loop, since the product's SGD has momentum without DP.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from huizhen.benchmarks.flamby_accounting import DELTA, ROUNDS, STEPS, Spent, spent
from huizhen.benchmarks.flamby_data import (
    BATCH,
    PUBLIC_RANGES,
    STANDARDISED,
    THEIRS,
    Centre,
    published,
    read_centres,
    write_records,
)
from huizhen.benchmarks.flamby_figure import draw
from huizhen.client.evaluation import classify
from huizhen.client.model_checks import check_model
from huizhen.client.private_steps import StepTerms, private_steps
from huizhen.learning.models import make_model
from huizhen.learning.trainable import Model
from huizhen.protocol.adapter import difference
from huizhen.protocol.study import Study
from huizhen.simulations.experiment import load_experiment
from huizhen.strategies import mean
from huizhen.strategies.fedavg import FedAvg

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = ROOT / "simulations" / "experiments" / "heart_disease.toml"

RATE, CLIP = 1e-3, 1.1
SEEDS = (42, 43, 44, 45, 46)
NOMINAL = (50.0, 10.0, 5.0, 1.0, 0.1)
SCALINGS = (STANDARDISED, PUBLIC_RANGES)
OUTSIDE = (
    "outside every epsilon: standardisation by private means and deviations (not with public "
    "ranges); q, averaging weights and denominators from the true numbers of patients. "
    "FLamby itself shuffles instead of Poisson sampling: only the third epsilon holds for it"
)
MEMORY_MIB = 256

Train = Callable[[int], None]  # one round at one hospital, in the loaded model


def accuracy(
    centres: Mapping[str, Centre], study: Study, noise: Mapping[str, Spent], seed: int
) -> float:
    """Return the mean over hospitals of the test accuracy after a federated run.

    Args:
        centres: the hospitals.
        study: names the features and classes.
        noise: of each hospital; empty for a run without DP.
        seed: of the first weights, and of the order of records without DP.
    """
    model, strategy = make_model(study, None), FedAvg()
    torch.manual_seed(seed)
    first = nn.Linear(len(study.task.features), 1)  # FLamby's start is PyTorch's default
    state = strategy.init({f"head.{n}": p.detach().numpy() for n, p in first.named_parameters()})
    names = frozenset(state.x)
    sizes = {name: centre.train.num_patients for name, centre in centres.items()}
    trainers: dict[str, Train] = {
        name: _private(model, centre, noise[name].sigma) if noise else _plain(model, centre, seed)
        for name, centre in centres.items()
    }
    for round in range(1, ROUNDS + 1):
        total = mean.start()
        for name, train in trainers.items():
            model.load(state.x)
            train(round)
            share = sizes[name] / sum(sizes.values())
            total = mean.add(total, difference(model.read(names), state.x), share)
        state = strategy.step(state, mean.finish(total, 1.0), round)
    model.load(state.x)
    hits = [
        float(np.mean(classify(model, centre.test).argmax(axis=1) == centre.test.labels))
        for centre in centres.values()
    ]
    return float(np.mean(hits))


def _private(model: Model, centre: Centre, sigma: float) -> Train:
    """Return a round of the product's private steps with FLamby's σ, q and denominator."""
    q = centre.sampling_rate
    memory = check_model(model, centre.train, MEMORY_MIB)
    terms = StepTerms(
        sampling_rate=q,
        max_grad_norm=CLIP,
        noise_multiplier=sigma,
        denominator=int(centre.train.num_patients * q),
    )

    def train(round: int) -> None:
        parameters = model.train_only(frozenset(model.shapes))
        optimizer = torch.optim.SGD(parameters.values(), lr=RATE)
        units = centre.train.records_of()
        with private_steps(
            model, parameters, centre.train, units, terms, steps=STEPS, memory=memory
        ) as step:
            for _ in range(STEPS):
                step()
                optimizer.step()
        model.train_only(frozenset())

    return train


def _plain(model: Model, centre: Centre, seed: int) -> Train:
    """Return a round of FLamby's loop: passes over shuffled batches that rounds cut through."""
    generator = np.random.default_rng(seed)

    def batches() -> Iterator[np.ndarray[tuple[int], np.dtype[np.intp]]]:
        while True:
            order = generator.permutation(len(centre.train.ids))
            yield from (order[i : i + BATCH] for i in range(0, len(order), BATCH))

    endless = batches()

    def train(round: int) -> None:
        parameters = model.train_only(frozenset(model.shapes))
        optimizer = torch.optim.SGD(parameters.values(), lr=RATE)
        for _ in range(STEPS):
            optimizer.zero_grad()
            losses, _ = model.losses(centre.train.batch(next(endless)))
            losses.mean().backward()  # type: ignore[no-untyped-call]  # torch's
            optimizer.step()
        model.train_only(frozenset())

    return train


def measure(
    data: Path, scalings: Sequence[str], nominal: Sequence[float], seeds: Sequence[int]
) -> dict[str, Any]:
    """Return all that is printed and drawn: accuracies by series and nominal ε, and what is spent.

    Raises:
        ConfigError: a file is not there.
    """
    study = load_experiment(EXPERIMENT).study
    sites = {scaling: read_centres(data, study, scaling) for scaling in scalings}
    rates = {name: centre.sampling_rate for name, centre in next(iter(sites.values())).items()}
    noise = {e: {name: spent(e, q) for name, q in rates.items()} for e in nominal}
    series = {
        THEIRS: {e: v for e, v in published(data, DELTA).items() if e in (math.inf, *nominal)}
    }
    for scaling, centres in sites.items():
        series[scaling] = {
            e: [accuracy(centres, study, noise.get(e, {}), seed) for seed in seeds]
            for e in (math.inf, *nominal)
        }
    return {
        "accuracy": {
            name: {
                _key(e): {
                    "mean": float(np.mean(values)),
                    "sd": float(np.std(values, ddof=1)),
                    "seeds": values,
                }
                for e, values in found.items()
            }
            for name, found in series.items()
        },
        "epsilon": {
            _key(e): {name: asdict(one) for name, one in own.items()} for e, own in noise.items()
        },
        "outside_every_epsilon": OUTSIDE,
    }


def print_tables(result: Mapping[str, Any]) -> None:
    """Print what each nominal ε truly is, and the accuracies."""
    print("epsilon of the steps that run, by hospital: RDP / PLD / for shuffled batches")
    for e, own in result["epsilon"].items():
        cells = [
            f"{n} {s['rdp_true']:.3g} / {s['pld_true']:.3g} / {s['unamplified']:.3g}"
            for n, s in own.items()
        ]
        print(f"  nominal {e:>4}:  " + "   ".join(cells))
    names = list(result["accuracy"])
    print("mean accuracy of the hospitals, ± standard deviation over seeds")
    print(f"  {'nominal':>8}  {'true (PLD, worst)':>17}  " + "  ".join(f"{n:>15}" for n in names))
    for e in result["accuracy"][names[-1]]:
        own = result["epsilon"].get(e)
        worst = f"{max(s['pld_true'] for s in own.values()):.3g}" if own else "no DP"
        found = [result["accuracy"][name][e] for name in names]
        text = "  ".join(f"{one['mean']:.4f} ± {one['sd']:.4f}" for one in found)
        print(f"  {e:>8}  {worst:>17}  {text}")
    print(result["outside_every_epsilon"])


def main() -> None:
    """Run, print and draw."""
    parser = argparse.ArgumentParser(description="FLamby's DP curve, with the true epsilon.")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--scalings", nargs="+", choices=SCALINGS, default=list(SCALINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--nominal", type=float, nargs="+", default=list(NOMINAL))
    parser.add_argument("--figure", type=Path, help="draw into this PNG")
    parser.add_argument("--records", type=Path, help="write the rows with patient ids and stop")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.records is not None:
        write_records(arguments.data, arguments.records)
        return
    result = measure(arguments.data, arguments.scalings, arguments.nominal, arguments.seeds)
    if arguments.json:
        print(json.dumps(result))
    else:
        print_tables(result)
    if arguments.figure is not None:
        draw(result, arguments.figure)


def _key(epsilon_: float) -> str:
    return "none" if math.isinf(epsilon_) else f"{epsilon_:g}"


if __name__ == "__main__":
    main()
