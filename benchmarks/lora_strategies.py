"""Ways to average LoRA under equal tuning: one grid of learning rates for all of them.

    python -m huizhen.benchmarks.lora_strategies --minutes 20      as often as it takes: it goes on

Every method trains the same layers on the same patients for the same number of passes, Fed-SB r × r
numbers of each. The head starts from the names of the diseases; without DP it has a rate of its
own, the same for all methods, under DP that of the grid. Each method's learning rate is the best of
one common grid on the *tuning* cohort, whose patients are made up and are nobody else's here; then
it runs with that rate on other cohorts, three seeds each, without DP and at ε = 8; the four best at
ε = 8 also at ε = 3 and 1, each tuned anew. On the published cases of rare_disease_fed6 it runs
without DP at the rate that was tuned on made-up patients. What is compared is the last round.

    tuning      1,000 made-up patients to train on at each of four hospitals, 64 diseases
    generated   2,000 others, as many diseases; hospitals differ by Dirichlet(0.3)
    fed6        1,947 published cases of 51 diseases in six groups of publications

Results are lines of ``results.jsonl``, one a run, written whole and synced: a run that was killed
is done again, one that is there is not.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from huizhen.benchmarks.resumable import Done, append, options, read_results
from huizhen.learning.bases import resolve
from huizhen.learning.model import AdaptedModel
from huizhen.protocol.errors import HuizhenError
from huizhen.protocol.strategy_terms import StrategyTerms
from huizhen.protocol.strict import read_toml
from huizhen.protocol.study import Study
from huizhen.simulations.cohort import write_cohort
from huizhen.simulations.engine import InProcess, Work
from huizhen.simulations.experiment import Experiment, parse_experiment
from huizhen.simulations.federation import Watcher, run
from huizhen.simulations.partition import read_sites
from huizhen.simulations.prepare import Prepared, complete_study, prepare
from huizhen.simulations.results import TestRecords
from huizhen.simulations.run_folder import RunFolder

FOLDER = Path(__file__).resolve().parents[1] / "simulations" / "experiments" / "lora_strategies"
METHODS = (
    "fedavg", "ffa", "ffa_ortho", "ffa_refresh", "rolora", "fedsvd", "svd", "fedex", "flora",
    "fed_sb",
)  # fmt: skip
EPSILONS = (None, 8.0)
SMALL_EPSILONS = (3.0, 1.0)
BEST = 4
RATES: Mapping[bool, tuple[float, ...]] = {
    False: (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),  # AdamW
    True: (0.3, 1.0, 3.0, 10.0, 30.0),  # SGD on clipped gradients
}
TUNING_SEED, SEEDS = 100, (1, 2, 3)
PATIENTS: Mapping[str, int] = {"tuning": 1000, "generated": 2000}
# to train on, at each hospital
HOSPITALS, DISEASES, TEST_SHARE = 4, 64, 0.2
METRIC = "macro_f1"


@dataclass(frozen=True, slots=True)
class Unit:
    """One run."""

    task: str
    # "tuning", "generated" or "fed6"
    method: str
    epsilon: float | None
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """Its name among the results."""
        return json.dumps([self.task, self.method, self.epsilon, self.rate, self.seed])


def plan(done: Done, *, fed6: bool) -> Iterator[Unit]:
    """Give the runs in order; those that depend on results come once these are there.

    Args:
        done: the results so far, by key.
        fed6: whether its records are at hand.
    """
    yield from _stage(done, METHODS, EPSILONS)
    if fed6:
        for method in METHODS:
            rate = best_rate(done, method, None)
            if rate is not None:
                yield from (Unit("fed6", method, None, rate, seed) for seed in SEEDS)
    best = best_methods(done, 8.0)
    if len(best) == BEST:
        yield from _stage(done, best, SMALL_EPSILONS)


def _stage(done: Done, methods: Sequence[str], epsilons: Sequence[float | None]) -> Iterator[Unit]:
    for epsilon in epsilons:
        for method in methods:
            for rate in RATES[epsilon is not None]:
                yield Unit("tuning", method, epsilon, rate, TUNING_SEED)
    for seed in SEEDS:  # the outer one: a cohort is read once
        for epsilon in epsilons:
            for method in methods:
                best = best_rate(done, method, epsilon)
                if best is not None:
                    yield Unit("generated", method, epsilon, best, seed)


def best_rate(done: Done, method: str, epsilon: float | None) -> float | None:
    """Return the rate with the best figure on the tuning cohort; None until all are there."""
    found: dict[float, float] = {}
    for rate in RATES[epsilon is not None]:
        one = done.get(Unit("tuning", method, epsilon, rate, TUNING_SEED).key)
        if one is None:
            return None
        found[rate] = one["metrics"][METRIC]
    return max(found, key=lambda rate: found[rate])


def best_methods(done: Done, epsilon: float) -> list[str]:
    """Return the best methods on made-up patients at an ε; none until all are there."""
    found: dict[str, float] = {}
    for method in METHODS:
        values = values_of(done, "generated", method, epsilon)
        if len(values) < len(SEEDS):
            return []
        found[method] = sum(values) / len(values)
    return sorted(found, key=lambda method: -found[method])[:BEST]


def values_of(done: Done, task: str, method: str, epsilon: float | None) -> list[float]:
    """Return the figure of each seed at the tuned rate."""
    rate = best_rate(done, method, epsilon)
    if rate is None:
        return []
    keys = (Unit(task, method, epsilon, rate, seed).key for seed in SEEDS)
    return [done[key]["metrics"][METRIC] for key in keys if key in done]


class Bench:
    """The cohorts as examples, each read once: what the frozen layers give is cached with them."""

    def __init__(self, home: Path | None, data: Path, scratch: Path) -> None:
        """Prepare; nothing is loaded."""
        self._home, self._data, self._scratch = home, data, scratch
        self._cohort: tuple[str, int] | None = None
        self._prepared: Prepared | None = None
        self._models: dict[bool, AdaptedModel] = {}

    def run(self, unit: Unit) -> dict[str, Any]:
        """Return the metrics of one run, with the time that it took."""
        prepared = self._ready(unit)
        study = study_of(prepared.study, unit)
        model = self._model(prepared, study)
        begin, cpu = time.perf_counter(), time.process_time()
        test = TestRecords(model, prepared.test)
        with (
            tempfile.TemporaryDirectory(dir=self._scratch) as folder,
            RunFolder(Path(folder), {"unit": unit.key}, resume=False) as kept,
        ):
            history = run(
                Work("run", study, prepared.train),
                model,
                kept,
                test.metrics,
                engine=InProcess(prepared.experiment.simulation),
                evaluate_every=study.rounds.count,
                watcher=Watcher(),
            ).history
        last = history[-1]
        return {
            **asdict(unit),
            "metrics": last["metrics"],
            "bytes_up": sum(entry["bytes_up"] for entry in history),
            "bytes_down": sum(entry["bytes_down"] for entry in history),
            "seconds": round(time.perf_counter() - begin, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
        }

    def _ready(self, unit: Unit) -> Prepared:
        which = (unit.task, 0 if unit.task == "fed6" else unit.seed)
        if self._cohort != which or self._prepared is None:
            experiment = self._experiment(unit)
            sites = read_sites(experiment.simulation, experiment.study.task.label)
            study = complete_study(experiment, sites, self._home)
            self._prepared = prepare(
                experiment, study, sites, home=self._home, say=lambda text: None
            )
            self._cohort, self._models = which, {}
        return self._prepared

    def _model(self, prepared: Prepared, study: Study) -> AdaptedModel:
        """Return the model of a study: Fed-SB has a core that the others have not."""
        has_core = study.strategy.name == "fed_sb"
        if has_core not in self._models:
            base = resolve("minilm", home=self._home)
            self._models[has_core] = AdaptedModel(base, study)
        return self._models[has_core]

    def _experiment(self, unit: Unit) -> Experiment:
        tables = read_toml(Path(str(files("huizhen.simulations") / "demo.toml")))
        if unit.task == "fed6":
            tables = read_toml(FOLDER.parent / "rare_disease_fed6.toml")
            tables["simulation"]["data"] = str(
                self._data / "rare_disease_fed6" / "rare_disease_fed6.jsonl"
            )
        else:
            path = self._scratch / f"cohort-{unit.seed}.jsonl"
            if not path.exists():
                write_cohort(
                    path,
                    seed=unit.seed,
                    sites=HOSPITALS,
                    diseases=DISEASES,
                    patients=round(HOSPITALS * PATIENTS[unit.task] / (1 - TEST_SHARE)),
                    size_ratio=1.0,
                    test_share=TEST_SHARE,
                )
            tables["simulation"]["data"] = str(path)
        tables["simulation"] |= {"arms": ["federated"], "seeds": [1], "sweep_epsilon": []}
        tables["simulation"].pop("sweep_patients", None)
        return parse_experiment(tables, FOLDER / f"{unit.task}.toml")


def study_of(study: Study, unit: Unit) -> Study:
    """Return the study of a run: five passes over the records, whatever the privacy."""
    strategy = StrategyTerms(name=unit.method, every=2 if unit.method == "ffa_refresh" else None)
    study = replace(study, study=replace(study.study, seed=unit.seed))
    if unit.epsilon is None:
        rounds = replace(
            study.rounds, count=5, local_epochs=1, batch_size=16, learning_rate=unit.rate
        )
        privacy = replace(study.privacy, unit="none")
        return replace(study, rounds=rounds, privacy=privacy, strategy=strategy)
    privacy = replace(
        study.privacy,
        unit="patient",
        epsilon=unit.epsilon,
        delta=1e-4,
        sampling_rate=0.125,
        learning_rate=unit.rate,
        optimizer="sgd",
    )
    # ten rounds of four steps that take each patient with 1/8: five passes in expectation
    rounds = replace(study.rounds, count=10, local_steps=4)
    return replace(study, rounds=rounds, privacy=privacy, strategy=strategy)


def key_of(result: Mapping[str, Any]) -> str:
    """Return the name of a result."""
    return Unit(*(result[name] for name in ("task", "method", "epsilon", "rate", "seed"))).key


def main(arguments: Sequence[str] | None = None) -> int:
    """Do as many runs as fit into the time."""
    terms = options(
        "Ways to average LoRA under equal tuning.",
        "python -m huizhen.benchmarks.lora_strategies --minutes 20",
        FOLDER,
        arguments,
    )
    path, begin = terms.out / "results.jsonl", time.monotonic()
    has_fed6 = (terms.data / "rare_disease_fed6").is_dir()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(terms.home, terms.data, Path(scratch))
        while True:
            done = read_results(path, key_of)
            units = list(plan(done, fed6=has_fed6))
            left = [unit for unit in units if unit.key not in done]
            if not left or time.monotonic() - begin > 60 * terms.minutes:
                break
            try:
                result = bench.run(left[0])
            except HuizhenError as error:  # a rate that is too high makes what no one counts
                result = {**asdict(left[0]), "metrics": {METRIC: 0.0}, "error": str(error)}
                result |= {"seconds": 0.0, "cpu_seconds": 0.0}
            append(path, result)
            print(
                f"{len(units) - len(left) + 1}/{len(units)} {left[0].key} "
                f"{METRIC} {result['metrics'][METRIC]:.3f} in {result['seconds']:.0f} s",
                flush=True,
            )
    hours = sum(one["cpu_seconds"] for one in done.values()) / 3600
    print(f"{len(done)} of {len(units)} runs known so far are done, {hours:.1f} CPU-hours")
    return 0


if __name__ == "__main__":
    sys.exit(main())
