"""Runs an experiment: every arm, every seed, and the results that people read.

Each arm is its own study on the same sites. ``local`` and ``pooled`` are federations of one: each
site by itself, and one site that holds everything.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huizhen.client.examples import pooled
from huizhen.learning.export import export_adapter
from huizhen.protocol.adapter import Shapes
from huizhen.protocol.certificate import Certificate
from huizhen.protocol.mechanism import Mechanism
from huizhen.protocol.study import Study
from huizhen.protocol.study_terms import SiteTerms
from huizhen.server.certificate import issue, page
from huizhen.server.rounds import Coordinator
from huizhen.simulations.engine import Engine, InProcess, Work
from huizhen.simulations.experiment import Experiment
from huizhen.simulations.federation import Trained, Watcher, open_ledger, run
from huizhen.simulations.flower_engine import FlowerEngine
from huizhen.simulations.partition import read_sites
from huizhen.simulations.prepare import (
    Prepared,
    complete_study,
    prepare,
    round_two_digits,
    subset,
)
from huizhen.simulations.provenance import environment, file_digest
from huizhen.simulations.results import Results, TestRecords
from huizhen.simulations.run_folder import RunFolder, safe_name

POOLED = "pooled"


class Observer(Watcher):
    """Is told of a whole run's progress; this one stays silent."""

    def say(self, text: str) -> None:
        """What is being done before the first round."""

    def planned(self, works: list[Work]) -> None:
        """All that will be run."""


def run_experiment(
    experiment: Experiment,
    out: Path,
    *,
    resume: bool = False,
    home: Path | None = None,
    observer: Observer | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Run an experiment into a folder and return what ``results.json`` holds.

    Args:
        experiment: the parsed file.
        out: the run folder.
        resume: go on with what the folder holds.
        home: where base models are cached.
        observer: is told of progress.
        command: what the user typed, for the report.

    Raises:
        HuizhenError: anything that the user must change; what was done so far stays in the folder.
    """
    observer = observer or Observer()
    sites = read_sites(experiment.simulation, experiment.study.task.label)
    study = complete_study(experiment, sites, home)
    with RunFolder(out, _identity(experiment, study), resume=resume) as folder:
        prepared = prepare(experiment, study, sites, home=home, say=observer.say)
        works = list(plan(prepared))
        check_plan(works, prepared.model.shapes)
        observer.planned(works)
        results = Results(prepared, TestRecords(prepared.model, prepared.test))
        every = experiment.simulation.evaluate_every
        exported = [f"{arm}-{_first_seed(experiment)}" for arm in ("federated", "federated_dp")]
        with contextlib.ExitStack() as running:
            here = InProcess(experiment.simulation)
            elsewhere: Engine = here
            if experiment.simulation.engine == "flower":
                observer.say("starting Ray")
                elsewhere = running.enter_context(FlowerEngine(experiment, study, home))
            for work in works:
                is_local = work.unit.startswith("local")
                is_alone = is_local or work.unit.startswith("pooled")
                trained = run(
                    work,
                    prepared.model,
                    folder,
                    results.test.metrics,
                    engine=here if is_alone else elsewhere,
                    evaluate_every=work.study.rounds.count if is_local else every,
                    watcher=observer,
                )
                results.add(work, trained)
                if work.unit in exported:
                    _export(prepared, work, trained, folder)
        certificate = _certificate(works, folder)
        document = results.document(command=command, certificate=certificate)
        folder.write_json("results.json", document)
        if certificate is not None:
            folder.write("privacy.json", certificate.canonical())
            folder.write("privacy.html", page(certificate).encode())
        return document


def plan(prepared: Prepared) -> Iterator[Work]:
    """Yield every unit of work, in the order in which they are run."""
    terms = prepared.experiment.simulation
    everything = pooled(list(prepared.train.values()))
    for seed in terms.seeds:
        for arm in terms.arms:
            study = arm_study(prepared.study, seed, private=arm == "federated_dp")
            if arm == "local":
                for name, examples in prepared.train.items():
                    alone = _by_itself(study, name, study.sites[name])
                    yield Work(f"local-{seed}-{safe_name(name)}", alone, {name: examples})
            elif arm == "pooled":
                size = SiteTerms(patients_public=round_two_digits(everything.num_patients))
                joined = _by_itself(study, POOLED, size)
                yield Work(f"pooled-{seed}", joined, {POOLED: everything})
            else:
                held_out = prepared.test if study.is_private else {}
                yield Work(f"{arm}-{seed}", study, prepared.train, held_out)
    private = arm_study(prepared.study, terms.seeds[0], private=True)
    for value in terms.sweep_epsilon:
        other = replace(private, privacy=replace(private.privacy, epsilon=value))
        yield Work(f"sweep_epsilon-{value!r}", other, prepared.train)
    for share in terms.sweep_patients:
        fewer = {n: subset(e, share, terms.seeds[0]) for n, e in prepared.train.items()}
        sizes = {
            name: replace(
                prepared.study.sites[name],
                patients_public=round_two_digits(examples.num_patients),
            )
            for name, examples in fewer.items()
        }
        private_of_fewer = replace(private, sites=sizes)
        yield Work(f"sweep_patients-{share!r}", private_of_fewer, fewer, share=share)


def _by_itself(study: Study, name: str, site: SiteTerms) -> Study:
    """Return the study of one site that trains alone."""
    return replace(
        study,
        sites={name: site},
        rounds=replace(study.rounds, quorum=None),
        strategy=study.strategy.alone(),
    )


def arm_study(study: Study, seed: int, *, private: bool) -> Study:
    """Return the study of one arm: the file's, with the seed, and unit ``none`` unless private.

    Weights by the variance of the noise are those by size where there is no noise.
    """
    study = replace(study, study=replace(study.study, seed=seed))
    if private:
        return study
    strategy = study.strategy
    if strategy.weights == "inverse_variance":
        strategy = replace(strategy, weights="public")
    return replace(study, privacy=replace(study.privacy, unit="none"), strategy=strategy)


def check_plan(works: list[Work], shapes: Shapes) -> None:
    """Refuse before the first round what would be refused in the middle of the run.

    Raises:
        HuizhenError: a quorum, strategy or ε that cannot be; ``prepare`` has refused a wrong δ.
    """
    for work in works:
        Coordinator(work.study, shapes)
        if work.study.is_private:
            Mechanism.of(work.study)


def _certificate(works: list[Work], folder: RunFolder) -> Certificate | None:
    """Return the certificate of the first private study that was run, by its sites' ledgers."""
    work = next((work for work in works if work.study.is_private), None)
    if work is None:
        return None
    states = []
    for site in work.sites:
        with open_ledger(folder, work, site) as ledger:
            states.append(ledger.totals())
    today = datetime.now(UTC).date().isoformat()
    return issue(work.study, issued=today, ledgers=states, simulated=True)


def _export(prepared: Prepared, work: Work, trained: Trained, folder: RunFolder) -> None:
    """Write the adapter, or that of each site where they differ."""
    arm = work.unit.split("-")[0]
    promise = "It was trained without differential privacy: it may reveal its patients."
    if work.study.is_private:
        terms = work.study.privacy
        promise = f"Per {terms.unit} and site: ε = {terms.epsilon:g}, δ = {terms.delta:g}."
    adapters = {f"{arm}/{safe_name(site)}": trained.of(site) for site in trained.own}
    for place, adapter in (adapters or {arm: trained.x}).items():

        def write(name: str, data: bytes, place: str = place) -> None:
            folder.write(f"{place}/{name}", data)

        export_adapter(prepared.model, work.study, adapter, write, promise=promise)


def _first_seed(experiment: Experiment) -> int:
    return experiment.simulation.seeds[0]


def _identity(experiment: Experiment, study: Study) -> dict[str, Any]:
    """Return everything that changes the results; the run digest is over it."""
    return {
        "study": study.digest(),
        "simulation": _plain(asdict(experiment.simulation)),
        "data": file_digest(Path(experiment.simulation.data)),
        "environment": environment(experiment.simulation.site_threads),
    }


_SAME = ("data", "engine", "cpus_per_site")
# what changes no result: the data's place, for its bytes count, and where sites train; with how
# many threads they do is in the environment


def _plain(value: Any) -> Any:
    """Return terms as JSON has them, without what changes no result."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if key not in _SAME}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
