"""Peak memory of a simulation with many sites over that with one, on the same patients.

    python -m huizhen.benchmarks.many_sites --data
    ../shared/data/rare_disease_fed6/rare_disease_fed6.jsonl

Each count of sites runs one federated round in a process of its own; the figure is its peak
resident memory. One frozen base serves all sites, so the ratio should stay near one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

EXPERIMENT = """
[study]
name = "many sites"
[base]
name = "minilm"
[adapter]
layers = 2
target_modules = ["query", "key", "value", "dense"]
[task]
kind = "classification"
text = "{{observed_labels}}"
label = "disease"
max_tokens = 96
[privacy]
unit = "none"
[rounds]
count = 1
[simulation]
data = {data}
partition = {{kind = "dirichlet", alpha = 10.0, sites = {sites}}}
patient = "id"
arms = ["federated"]
minimum_patients = 1
"""

_RUN = """
import sys
from pathlib import Path
from huizhen.simulations.experiment import load_experiment
from huizhen.simulations.provenance import peak_memory_mib
from huizhen.simulations.runner import run_experiment
folder = Path(sys.argv[1])
run_experiment(load_experiment(folder / "experiment.toml"), folder / "run")
print(peak_memory_mib())
"""


def peak(data: Path, sites: int) -> float:
    """Return the peak memory, in MiB, of one federated round over so many sites."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = EXPERIMENT.format(data=json.dumps(str(data)), sites=sites)
        (folder / "experiment.toml").write_text(text, encoding="utf-8")
        command = [sys.executable, "-c", _RUN, str(folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603  # ours
    return float(done.stdout.split()[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Peak memory with many sites and with one.")
    parser.add_argument("--data", type=Path, required=True, help="rare_disease_fed6.jsonl")
    parser.add_argument("--sites", type=int, nargs="+", default=[1, 6, 50])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [{"sites": n, "peak_mib": round(peak(arguments.data, n))} for n in arguments.sites]
    for row in rows:
        row["ratio"] = round(row["peak_mib"] / rows[0]["peak_mib"], 3)
    if arguments.json:
        print(json.dumps({"rows": rows}))
        return
    for row in rows:
        print(f"{row['sites']:4d} sites  {row['peak_mib']:6d} MiB  {row['ratio']:.2f} x one site")


if __name__ == "__main__":
    main()
