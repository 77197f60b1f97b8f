"""One hospital of six lies: what is left of the model under each combining rule.

    python -m huizhen.benchmarks.robustness --data ../shared/data --minutes 20     it goes on

The published cases of rare_disease_fed6, six groups of publications, ``ffa_ortho`` without DP and
with equal weights, ten rounds with a quorum of five; the last round's macro F1 on all test records.
The lying hospital is the third, whichever that is.

    none         it is honest
    sign flip    it sends −Δ
    x 100        it sends 100 Δ
    NaN          it sends what is no number
    label flip   it trains on the next class's label for each record
    slow drift   it adds, in every round, the same direction with the length of its own update

Each rule runs with the norm bound at its default; the mean once more with a bound of twice the
median length of an honest update in the first round: the one defence that three hospitals have.
``centred_clipping`` has that median for its radius. Both are measured on a run without a liar,
which an alliance could do on public data; under DP they follow from the noise.
"""

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from huizhen.benchmarks.resumable import append, options, read_results
from huizhen.client.examples import Examples
from huizhen.client.local_trainer import LocalTrainer
from huizhen.protocol.adapter import Tensors
from huizhen.protocol.strategy_terms import StrategyTerms
from huizhen.protocol.study import Study
from huizhen.protocol.wire import Message, encode
from huizhen.server.rounds import Coordinator
from huizhen.server.validation import update_norm
from huizhen.simulations.experiment import load_experiment
from huizhen.simulations.partition import read_sites
from huizhen.simulations.prepare import Prepared, complete_study, prepare
from huizhen.simulations.results import TestRecords

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = ROOT / "simulations" / "experiments" / "rare_disease_fed6.toml"
FOLDER = ROOT / "simulations" / "experiments" / "robustness"
RULES = (
    "mean", "mean, norm bound", "median", "trimmed_mean", "geometric_median", "multi_krum",
    "centred_clipping",
)  # fmt: skip
ATTACKS = ("none", "sign flip", "x 100", "NaN", "label flip", "slow drift")
SEEDS = (1, 2, 3)
ROUNDS, LIAR = 10, 2


@dataclass(frozen=True, slots=True)
class Unit:
    """One run."""

    rule: str
    attack: str
    seed: int

    @property
    def key(self) -> str:
        """Its name among the results."""
        return json.dumps([self.rule, self.attack, self.seed])


def key_of(result: Mapping[str, Any]) -> str:
    """Return the name of a result."""
    return Unit(result["rule"], result["attack"], result["seed"]).key


def study_of(study: Study, unit: Unit, honest_norm: float | None) -> Study:
    """Return the study of a run.

    Args:
        study: the experiment's.
        unit: which rule.
        honest_norm: median length of an honest update; None while it is being measured.
    """
    combine = unit.rule.split(",")[0]
    needs: dict[str, Any] = {}
    if combine in ("trimmed_mean", "multi_krum"):
        needs = {"byzantine": 1}
    if combine == "centred_clipping":
        needs = {"clip_radius": honest_norm}
    bound = study.rounds.max_update_norm
    if unit.rule == "mean, norm bound" and honest_norm is not None:
        bound = 2 * honest_norm
    return replace(
        study,
        study=replace(study.study, seed=unit.seed),
        strategy=StrategyTerms(name="ffa_ortho", combine=combine, **needs),  # type: ignore[arg-type]
        privacy=replace(study.privacy, unit="none"),
        rounds=replace(study.rounds, count=ROUNDS, quorum=5, max_update_norm=bound),
    )


def lie(attack: str, update: Tensors, drift: Tensors) -> Tensors:
    """Return what the lying hospital sends in place of its update."""
    if attack == "sign flip":
        return {name: -value for name, value in update.items()}
    if attack == "x 100":
        return {name: np.float32(100) * value for name, value in update.items()}
    if attack == "slow drift":
        scale = np.float32(update_norm(update) / update_norm(drift))
        return {name: value + scale * drift[name] for name, value in update.items()}
    return update


def flipped(examples: Examples, classes: int) -> Examples:
    """Return the records with the next class's label."""
    labels = tuple((label + 1) % classes for label in examples.labels)
    return replace(examples, labels=labels)


class Bench:
    """The six hospitals, read once."""

    def __init__(self, data: Path, home: Path | None) -> None:
        """Read the records and compute what the frozen layers give."""
        experiment = load_experiment(EXPERIMENT)
        place = data / "rare_disease_fed6" / "rare_disease_fed6.jsonl"
        experiment = replace(experiment, simulation=replace(experiment.simulation, data=str(place)))
        sites = read_sites(experiment.simulation, experiment.study.task.label)
        study = complete_study(experiment, sites, home)
        self._prepared: Prepared = prepare(
            experiment, study, sites, home=home, say=lambda text: None
        )

    def run(self, unit: Unit, honest_norm: float | None) -> dict[str, Any]:
        """Return the last round's metrics, what was refused, and honest lengths in round 1."""
        prepared, begin = self._prepared, time.perf_counter()
        model, study = prepared.model, study_of(prepared.study, unit, honest_norm)
        first, names = model.first_tensors(unit.seed), list(study.sites)
        trainers = {}
        for i, (name, examples) in enumerate(prepared.train.items()):
            if i == LIAR and unit.attack == "label flip":
                examples = flipped(examples, len(study.task.labels))
            trainers[name] = LocalTrainer(name, study, examples, model, first)
        coordinator = Coordinator(study, model.shapes)
        state = coordinator.first(first)
        rng = np.random.default_rng(unit.seed)
        trained = coordinator.sent_shapes(state)
        drift = {n: rng.standard_normal(s, np.float32) for n, s in trained.items()}
        refused, norms = 0, []
        while not coordinator.is_finished(state):
            announcement = coordinator.announcement(state)
            for name, trainer in trainers.items():
                update = trainer.train(announcement, state.round, {}).update
                if state.round == 1 and name != names[LIAR]:
                    norms.append(update_norm(update))
                data = self._sent(unit, study, state.round, name, update, drift, names)
                state, receipt = coordinator.receive(state, data)
                refused += receipt.refusal is not None
            state = coordinator.close_round(state)
        x = state.strategy.x
        metrics = TestRecords(model, prepared.test).metrics(lambda site: model.load(x))["metrics"]
        return {
            "rule": unit.rule,
            "attack": unit.attack,
            "seed": unit.seed,
            "metrics": metrics,
            "refused": refused,
            "honest_norm": statistics.median(norms),
            "seconds": round(time.perf_counter() - begin, 1),
        }

    def _sent(
        self,
        unit: Unit,
        study: Study,
        round: int,
        name: str,
        update: Tensors,
        drift: Tensors,
        names: Sequence[str],
    ) -> bytes:
        """Return the bytes that a hospital sends; NaN is put in where the wire would refuse it."""
        is_liar = name == names[LIAR]
        tensors = lie(unit.attack, update, drift) if is_liar else update
        digest = study.digest()
        data = encode(Message(kind="update", study=digest, round=round, site=name, tensors=tensors))
        if is_liar and unit.attack == "NaN":
            data = data[:-4] + np.float32(np.nan).tobytes()
        return data


def units() -> list[Unit]:
    """Return all runs; the honest mean, which the others' bounds come from, is first."""
    return [Unit(rule, attack, seed) for seed in SEEDS for rule in RULES for attack in ATTACKS]


def table(done: Mapping[str, Mapping[str, Any]], metric: str = "macro_f1") -> list[list[str]]:
    """Return rule by attack: mean over the seeds with its deviation."""
    rows = [["rule", *ATTACKS]]
    for rule in RULES:
        row = [rule]
        for attack in ATTACKS:
            keys = (Unit(rule, attack, seed).key for seed in SEEDS)
            found = [done[key]["metrics"][metric] for key in keys if key in done]
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            row.append(f"{statistics.fmean(found):.3f} ± {spread:.3f}" if found else "-")
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Do as many runs as fit into the time, and print the table."""
    terms = options(
        "One hospital of six lies.",
        "python -m huizhen.benchmarks.robustness --data ../shared/data",
        FOLDER,
        arguments,
    )
    path, begin = terms.out / "results.jsonl", time.monotonic()
    done, bench = read_results(path, key_of), None
    for unit in units():
        if unit.key in done or time.monotonic() - begin > 60 * terms.minutes:
            continue
        bench = bench or Bench(terms.data, terms.home)
        reference = done.get(Unit("mean", "none", unit.seed).key)
        result = bench.run(unit, None if reference is None else reference["honest_norm"])
        append(path, result)
        done[unit.key] = result
        print(
            f"{len(done)}/{len(units())} {unit.key} {result['metrics']['macro_f1']:.3f}", flush=True
        )
    for row in table(done):
        print("| " + " | ".join(row) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
