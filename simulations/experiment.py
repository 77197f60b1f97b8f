"""An experiment file: a study as both parties would sign it, and how its sites are made up."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huizhen.learning.tasks import fields_read
from huizhen.protocol.errors import ConfigError
from huizhen.protocol.strict import build, check_keys, read_toml
from huizhen.protocol.study import SECTIONS, Study, parse_study

Arm = Literal["local", "pooled", "federated", "federated_dp"]
ARMS: tuple[Arm, ...] = ("local", "pooled", "federated", "federated_dp")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitTerms:
    """``split = {by = "pmid", test = 0.3}``: whole groups go to training or to test."""

    by: str
    # the field whose equal values stay together
    test: float = 0.3
    # the share of the groups that is held out
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.test < 1:
            raise ValueError(f"test is {self.test}, expected between 0 and 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionTerms:
    """``partition = {kind = "dirichlet", alpha = 0.3, sites = 6}``: sites are made up."""

    kind: Literal["dirichlet"]
    alpha: float
    # the smaller, the more the classes differ between sites (Hsu et al. 2019)
    sites: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0) or not 1 <= self.sites <= 10_000:
            raise ValueError(
                f"alpha is {self.alpha} and sites {self.sites}, expected over 0 and 1 to 10000"
            )
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class BinTerms:
    """``site = {field = "year", below = [2005, 2010]}``: sites by ranges of a number."""

    field: str
    below: tuple[float, ...]
    # rising limits; n of them make n + 1 sites, and "unknown" for what is not a number

    def __post_init__(self) -> None:
        rising = list(self.below) == sorted(set(self.below))
        if not (self.below and rising and all(map(math.isfinite, self.below))):
            raise ValueError(f"below is {self.below}, expected rising numbers")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationTerms:
    """``[simulation]``: no part of the study's digest."""

    data: str
    # JSONL or CSV, .gz too; relative to the working directory
    encoding: str = "auto"
    # of the text: one of Python's names, or auto: UTF-8, UTF-16 or GB18030, whichever it is
    site: str | BinTerms | None = None
    # the field that names the site, or a number whose ranges are the sites
    partition: PartitionTerms | None = None
    # or how records are dealt to made-up sites
    patient: str
    # the field that names the patient
    split: str | SplitTerms = "split"
    # a field with train and test, or how to draw them
    arms: tuple[Arm, ...] = ARMS
    seeds: tuple[int, ...] = (1,)
    engine: Literal["inprocess", "flower"] = "inprocess"
    # flower: the federated arms' sites train side by side in the actors of Flower's engine, on Ray
    cpus_per_site: float = 1.0
    # flower: processors of an actor; so many whole ones are the threads that a site trains with
    minimum_patients: int = 2
    # what every made-up site's policy demands of its own training data
    allowed_fields: tuple[str, ...] | None = None
    # what every made-up site's policy lets a task read; any but the patient's id when absent
    evaluate_every: int = 1
    # rounds between two looks at the test records; the last round is always looked at
    sweep_epsilon: tuple[float, ...] = ()
    # further runs of federated_dp with the first seed: utility against epsilon
    sweep_patients: tuple[float, ...] = ()
    # further runs of federated_dp with the first seed on so large a share of each site's patients
    ancestors: str | None = None
    # a field with HPO terms: the baseline reads their ancestors too
    generate: int = 4
    # instruction: so many answers of each arm stand in the report
    exact_match_records: int = 40
    # instruction: at most so many test records are answered to measure the exact match
    memory_mib: int = 1024
    # bound on what a private step holds at a time, for each site
    checkpointing: bool = False
    # run each adapted layer again in the backward pass, to save memory
    synthetic: bool = False
    # the records are of made-up patients: the report says so
    notice: str = ""
    # printed where results are shown

    @property
    def site_threads(self) -> int | None:
        """The threads that a site trains with, where they are not this process's."""
        return max(1, int(self.cpus_per_site)) if self.engine == "flower" else None

    def __post_init__(self) -> None:
        if (self.site is None) == (self.partition is None):
            raise ValueError("needs either 'site' or 'partition'")
        if not self.arms or not self.seeds:
            raise ValueError("needs at least one arm and one seed")
        if len(set(self.arms)) < len(self.arms) or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("repeats an arm or a seed")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds is {self.seeds}, expected 0 or more")
        if min(self.minimum_patients, self.evaluate_every) < 1 or self.generate < 0:
            raise ValueError("needs minimum_patients and evaluate_every of at least 1")
        if not 0.01 <= self.cpus_per_site <= 10_000:
            raise ValueError(f"cpus_per_site is {self.cpus_per_site}, expected 0.01 to 10000")
        if self.memory_mib < 1:
            raise ValueError(f"memory_mib is {self.memory_mib}, expected 1 or more")
        if self.exact_match_records < 1:
            raise ValueError(
                f"exact_match_records is {self.exact_match_records}, expected 1 or more"
            )
        if any(not (math.isfinite(value) and value > 0) for value in self.sweep_epsilon):
            raise ValueError(f"sweep_epsilon is {self.sweep_epsilon}, expected numbers over 0")
        if any(not 0 < share < 1 for share in self.sweep_patients):
            raise ValueError(f"sweep_patients is {self.sweep_patients}, expected between 0 and 1")
        for sweep in (self.sweep_epsilon, self.sweep_patients):
            if len(set(sweep)) < len(sweep):
                raise ValueError("repeats a value of a sweep")


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A parsed experiment file."""

    study: Study
    # as the file gives it: labels, base digests and site sizes are filled in when it runs
    simulation: SimulationTerms
    path: Path
    sections: Mapping[str, Any] = field(default_factory=dict)


def load_experiment(path: Path) -> Experiment:
    """Return the experiment in a TOML file.

    Raises:
        ConfigError: naming the file, the section, the key and what was expected.
    """
    return parse_experiment(read_toml(path), path)


def parse_experiment(tables: Mapping[str, Any], path: Path) -> Experiment:
    """Return the experiment in parsed tables; ``path`` is for errors."""
    where = path.name
    check_keys(tables, [*SECTIONS, "simulation"], where)
    if not isinstance(tables.get("simulation"), Mapping):
        raise ConfigError(f"{where} has no [simulation]: add the section")
    study = parse_study({k: v for k, v in tables.items() if k != "simulation"}, where)
    fields_read(study.task)
    terms = build(SimulationTerms, tables["simulation"], f"{where} [simulation]")
    wants_dp = "federated_dp" in terms.arms or terms.sweep_epsilon or terms.sweep_patients
    if wants_dp and not study.is_private:
        raise ConfigError(
            f"{where} [privacy] unit is 'none', the arm federated_dp needs 'patient' or 'record'"
        )
    return Experiment(study=study, simulation=terms, path=path, sections=dict(tables))
