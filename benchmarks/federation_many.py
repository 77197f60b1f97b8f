"""Many real sites on one machine: agents without torch, each with a worker on the base ``tiny``.

Everything is as it is run for real: each site joins by ``huizhen site join``, approves the study by
``huizhen site approve`` and runs as ``huizhen site run``, asking for work once a second while there
is none. The study has no unit of privacy, so training is the cheapest there is.
"""

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from huizhen.benchmarks.federation_light import round_times
from huizhen.benchmarks.federation_values import MIB
from huizhen.benchmarks.federation_watch import Watch
from huizhen.learning.bases import resolve
from huizhen.simulations.live import Live, LiveError

RECORDS = 40
# of each site
WATCH_SECONDS = 5.0
LONGEST_ROUND_SECONDS = 300.0
_WORDS = {"A": ("fever", "cough", "rash"), "B": ("seizure", "ataxia", "tremor")}
_STUDY = """
[study]
name = "many sites"
[base]
name = "tiny"
[adapter]
rank = 4
target_modules = ["q_proj", "v_proj"]
[task]
kind = "classification"
text = "{text}"
label = "label"
labels = ["A", "B"]
max_tokens = 32
[privacy]
unit = "none"
[strategy]
name = "ffa_ortho"
[rounds]
"""


def run_many(folder: Path, *, sites: int, rounds: int) -> dict[str, Any]:
    """Run a study on many real sites and return its figures as JSON values.

    Args:
        folder: for all processes; must not exist or be empty.
        sites: how many; at least three, a site's policy approves no study with fewer.
        rounds: of the study, at least two.

    Returns:
        ``wall``: seconds from the first announcement to the last commit; ``first``: of it, until
        the first commit, in which all workers start; ``seconds``: from commit to commit after that;
        ``memory``: in MiB.

    Raises:
        HuizhenError: a part did not do what it should; its log is in the folder.
    """
    names = [f"site-{number}" for number in range(1, sites + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    resolve("tiny", home=folder / "bases-home")
    begin = time.monotonic()
    with Live(folder / "federation", bases=folder / "bases-home") as live:
        live.found()
        for name in names:
            records = folder / f"{name}.jsonl"
            records.write_text(made_up_records(name), "utf-8")
            live.add_site(name, records, unit="none")
        for name in names:
            live.start_site(name)
        digest = live.offer(study_text(names, rounds))
        prepared = time.monotonic() - begin
        roots = {live.pid(name): ("agents", "workers") for name in names}
        roots[live.pid("coordinator")] = ("coordinator", "coordinator")
        with Watch(roots, seconds=WATCH_SECONDS) as watch:
            _wait(live, digest, rounds * LONGEST_ROUND_SECONDS)
        times = round_times(live, digest, rounds, sites)
    commits = [one.committed for one in times]
    peak = watch.peak
    return {
        "sites": sites,
        "rounds": rounds,
        "prepared": prepared,
        "wall": commits[-1] - times[0].announced,
        "first": commits[0] - times[0].announced,
        "seconds": [after - before for before, after in itertools.pairwise(commits)],
        "memory": {
            "processes": peak.processes,
            "together_mib": peak.together / MIB,
            "upper_bound_mib": peak.bound / MIB,
            "groups_mib": {name: held / MIB for name, held in peak.groups.items()},
            "largest_mib": {name: held / MIB for name, held in peak.single.items()},
        },
    }


def made_up_records(site: str) -> str:
    """Return a site's records as JSON lines, the same at each call."""
    generator = np.random.default_rng(list(site.encode()))
    lines = []
    for number in range(RECORDS):
        label = "AB"[number % 2]
        text = " ".join(generator.choice(_WORDS[label], 3))
        lines.append(json.dumps({"patient": f"{site}-{number}", "text": text, "label": label}))
    return "\n".join(lines) + "\n"


def study_text(sites: Sequence[str], rounds: int) -> str:
    """Return the study as TOML."""
    terms = f"count = {rounds}\nlocal_epochs = 1\nbatch_size = 8\n"
    return _STUDY + terms + "".join(f"[sites.{site}]\npatients_public = 40\n" for site in sites)


def _wait(live: Live, study: str, seconds: float) -> None:
    """Wait for the end of a study, looking seldom: each look opens the store."""
    end = time.monotonic() + seconds
    while live.round_of(study)[1] != "finished":
        for name in live.sites:
            if not live.is_running(name):
                raise LiveError(f"{name} has ended with {live.forget(name)}: look at its log")
        if time.monotonic() > end:
            raise LiveError(f"the study is not finished after {seconds:.0f} s: look at the logs")
        time.sleep(2.0)
