"""The demonstration: synthetic patients from real disease–phenotype frequencies, four arms."""

import shutil
from functools import cache
from importlib.resources import files
from pathlib import Path

from huizhen.protocol.errors import ConfigError, StorageError
from huizhen.protocol.strict import read_toml
from huizhen.simulations.cohort import cohort_lines
from huizhen.simulations.experiment import Experiment, parse_experiment
from huizhen.simulations.hpo import HPO_NOTICE
from huizhen.storage.files import write_whole

SEED = 2026
COHORT = "cohort.jsonl"


def clear_finished_demo(out: Path) -> None:
    """Remove what a finished demo left in a folder, and nothing else.

    Raises:
        ConfigError: the folder holds something that is not a demo.
        StorageError: a file cannot be read or removed.
    """
    _refuse_other(out)
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
    """Write the demo's patients into the run folder, unless they are there, and return the file.

    Raises:
        ConfigError: the folder holds something that is not a demo.
        StorageError: the folder cannot be written.
    """
    path = out / COHORT
    _refuse_other(out)
    if not path.exists():
        write_whole(path, _patients())
    return path


def demo_experiment(data: Path) -> Experiment:
    """Return the demo's experiment on a cohort file."""
    path = Path(str(files("huizhen.simulations") / "demo.toml"))
    tables = read_toml(path)
    notice = f"Synthetic patients, drawn from real disease–phenotype frequencies. {HPO_NOTICE}"
    tables["simulation"] |= {"data": str(data), "notice": notice}
    return parse_experiment(tables, path)


@cache
def _patients() -> bytes:
    return cohort_lines(seed=SEED)


def _refuse_other(out: Path) -> None:
    """Refuse a folder that is not new or empty and has not the demo's own patients, to the byte."""
    path = out / COHORT
    try:
        is_demo = not out.is_dir() or (
            path.read_bytes() == _patients()
            if path.exists()
            else all(one.name.startswith(f".{COHORT}.") for one in out.iterdir())
        )  # a demo that was killed may have left the beginning of its patients
    except OSError as error:
        raise StorageError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    if not is_demo:
        raise ConfigError(f"{str(out)!r} holds something else than a demo: choose another --out")
