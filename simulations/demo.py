"""The demonstration: synthetic patients from real disease–phenotype frequencies, four arms."""

from importlib.resources import files
from pathlib import Path

from huizhen.protocol.errors import StorageError
from huizhen.protocol.strict import read_toml
from huizhen.simulations.cohort import HPO_NOTICE, write_cohort
from huizhen.simulations.experiment import Experiment, parse_experiment

SEED = 2026


def write_demo_cohort(out: Path) -> Path:
    """Write the demo's patients into the run folder and return the file.

    Raises:
        StorageError: the folder cannot be written.
    """
    path = out / "cohort.jsonl"
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
