"""The demonstration: synthetic patients from real disease–phenotype frequencies, four arms."""

import shutil
from importlib.resources import files
from pathlib import Path

from huizhen.protocol.errors import ConfigError, StorageError
from huizhen.protocol.strict import read_toml
from huizhen.simulations.cohort import write_cohort
from huizhen.simulations.experiment import Experiment, parse_experiment
from huizhen.simulations.hpo import HPO_NOTICE

SEED = 2026
COHORT = "cohort.jsonl"


def clear_finished_demo(out: Path) -> None:
    """Remove what a finished demo left in a folder, and nothing else.

    Raises:
        ConfigError: the folder holds something that is not a demo.
        StorageError: a file cannot be removed.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / COHORT).exists():
        raise ConfigError(f"{str(out)!r} holds something else than a demo: choose another --out")
    if not (out / "results.json").exists():
        return
    try:
        for place in (out / name for name in ("state", "ledgers", "federated", "federated_dp")):
            if place.is_dir():
                shutil.rmtree(place)
        for name in ("run.json", "results.json", "privacy.json", "privacy.html", "report.html"):
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot clear {str(out)!r}: {error.strerror or error}") from error


def write_demo_cohort(out: Path) -> Path:
    """Write the demo's patients into the run folder and return the file.

    Raises:
        StorageError: the folder cannot be written.
    """
    path = out / COHORT
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_cohort(path, seed=SEED)
    except OSError as error:
        raise StorageError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    return path


def demo_experiment(data: Path) -> Experiment:
    """Return the demo's experiment on a cohort file."""
    path = Path(str(files("huizhen.simulations") / "demo.toml"))
    tables = read_toml(path)
    notice = f"Synthetic patients, drawn from real disease–phenotype frequencies. {HPO_NOTICE}"
    tables["simulation"] |= {"data": str(data), "notice": notice}
    return parse_experiment(tables, path)
