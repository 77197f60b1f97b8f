"""How many numbers an experiment trains, which is what a plan's noise must cover."""

import math
from dataclasses import replace
from pathlib import Path

from huizhen.learning.bases import resolve
from huizhen.learning.models import make_model
from huizhen.protocol.errors import ConfigError, StorageError
from huizhen.protocol.study import Study
from huizhen.simulations.experiment import Experiment
from huizhen.simulations.partition import read_sites
from huizhen.simulations.prepare import complete_study
from huizhen.strategies.catalogue import make_strategy


def trained_parameters(experiment: Experiment, home: Path | None) -> int:
    """Return how many numbers each site trains and sends in a round.

    Loads the base, which a tabular study has not. The classes come from ``[task]`` labels, or from
    the records where the file lists none, as they do when the experiment is run.

    Args:
        experiment: the parsed file.
        home: where base models are cached; None for the platform's folder.

    Raises:
        HuizhenError: the base, the adapter or the strategy cannot be had, or the classes are not
            listed and the records cannot be read.
    """
    study = _with_classes(experiment, home)
    base = None if study.base is None else resolve(study.base.name, home=home)
    shapes = make_model(study, base).shapes
    return sum(math.prod(shapes[name]) for name in make_strategy(study).sends(shapes, 1))


def _with_classes(experiment: Experiment, home: Path | None) -> Study:
    study = experiment.study
    if study.task.kind == "instruction" or study.task.labels:
        return study
    try:
        sites = read_sites(experiment.simulation, study.task.label)
    except (ConfigError, StorageError) as error:
        raise ConfigError(
            f"{error} ([task] labels is empty, so the classes are counted in the records): "
            "list the labels, or give --parameters"
        ) from error
    found = complete_study(experiment, sites, home).task.labels
    return replace(study, task=replace(study.task, labels=found))
