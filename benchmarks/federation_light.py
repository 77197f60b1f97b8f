"""A study on the real coordinator with light sites: seconds a round, and memory of each process.

The coordinator is ``huizhen coordinator up`` as it is run for real: edge, alliance service,
SuperLink and rounds process, with its store and its log on the disk. Sites are processes of
``federation_site``. The store keeps whole seconds, so times are those of the rounds process's log,
and of the files in which it keeps what it announces and what it receives.
"""

import itertools
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from huizhen.benchmarks import federation_site
from huizhen.benchmarks.federation_site import approve, enrol, now
from huizhen.benchmarks.federation_values import MIB, between, random_tensors, status_bytes
from huizhen.client.home import Home as SiteHome
from huizhen.protocol.strategy_terms import StrategyTerms
from huizhen.protocol.study import Study
from huizhen.protocol.study_terms import (
    About,
    AdapterTerms,
    BaseTerms,
    PrivacyTerms,
    RoundTerms,
    SiteTerms,
    TaskTerms,
)
from huizhen.server.desk import open_desk
from huizhen.server.home import Home
from huizhen.server.store import Store
from huizhen.server.studies import change, find, offer
from huizhen.simulations.live import Live, LiveError, environment

SETTLE_SECONDS = 3.0
LONGEST_ROUND_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class RoundTimes:
    """When a round's stages were, in seconds since 1970."""

    announced: float
    # the adapter is on the disk, the announcement not yet signed
    first_answer: float
    last_answer: float
    # checked and on the disk
    committed: float


def run_light(folder: Path, *, sites: int, values: int, rounds: int) -> dict[str, Any]:
    """Run a study and return its figures as JSON values.

    Args:
        folder: for all processes; must not exist or be empty.
        sites: how many.
        values: float32 numbers of the adapter, all of which every site sends in each round.
        rounds: of the study, at least three.

    Returns:
        ``seconds``: from commit to commit; ``stages``: medians of a round's parts, in
        seconds; ``memory``: of each process of the coordinator, in MiB, idle and at its peak.

    Raises:
        HuizhenError: a part did not do what it should; its log is in the folder.
    """
    names = [f"site-{number}" for number in range(1, sites + 1)]
    study = light_study(names, rounds)
    with Live(folder, bases=folder, alliance="Benchmark") as live:
        live.found()
        homes = _join_all(live, names)
        with _running(live, homes) as processes:
            time.sleep(SETTLE_SECONDS)
            parts = parts_of(live)
            idle = {name: status_bytes(pid, "VmRSS") for name, pid in parts.items()}
            digest = _open(live, study, values, homes)
            with live.store() as store:
                _wait(store, digest, processes, rounds * LONGEST_ROUND_SECONDS)
            times = round_times(live, digest, rounds, sites)
            peak = {name: status_bytes(pid, "VmHWM") for name, pid in parts_of(live).items()}
            if parts_of(live) != parts:
                raise LiveError("a part of the coordinator was started again: look at its log")
    return {
        "sites": sites,
        "values": values,
        "rounds": rounds,
        "seconds": between([one.committed for one in times]),
        "stages": stages(times),
        "memory": {
            name: {
                "idle_mib": idle[name] / MIB,
                "peak_mib": peak[name] / MIB,
            }
            for name in parts
        },
    }


def light_study(sites: Sequence[str], rounds: int) -> Study:
    """Return a study without a unit of privacy whose whole adapter travels.

    The coordinator takes the tensors' shapes from the first adapter and never opens a base, so the
    study need not name a real one.
    """
    return Study(
        study=About(name="federation benchmark"),
        base=BaseTerms(name="none"),
        adapter=AdapterTerms(target_modules=("layers",), rank=1),
        task=TaskTerms(kind="classification", text="{text}", label="label", labels=("a", "b")),
        privacy=PrivacyTerms(unit="none"),
        strategy=StrategyTerms(name="fedavg"),
        rounds=RoundTerms(count=rounds),
        sites={site: SiteTerms(patients_public=100) for site in sites},
    )


def round_times(live: Live, study: str, rounds: int, sites: int) -> list[RoundTimes]:
    """Return when each round's stages were.

    Raises:
        LiveError: a round was announced twice or lacks a site: its time means something else.
    """
    home, found = _coordinator(live), []
    committed = commit_times((home.run / "rounds.log").read_text("utf-8"), study)
    with live.store() as store:
        for number in range(1, rounds + 1):
            attempts = store.rounds.attempts(study, number)
            updates = store.updates.counted(study, number)
            if len(attempts) != 1 or len(updates) != sites or number not in committed:
                raise LiveError(
                    f"round {number} has {len(attempts)} attempts and {len(updates)} of {sites} "
                    "updates, expected one and all: the run does not count"
                )
            received = [_kept(home, one.payload) for one in updates]
            announced = _kept(home, attempts[0].adapter)
            times = (announced, min(received), max(received), committed[number])
            found.append(RoundTimes(*times))
    return found


def commit_times(log: str, study: str) -> dict[int, float]:
    """Return when the rounds of a study were committed, from the rounds process's log."""
    line = re.compile(
        rf"^(\S+ \S+) INFO \S+ round committed: study={study[:12]} round=(\d+) ", re.MULTILINE
    )
    form = "%Y-%m-%d %H:%M:%S,%f"
    return {
        int(number): datetime.strptime(moment, form).astimezone().timestamp()
        for moment, number in line.findall(log)
    }


def _kept(home: Home, digest: str) -> float:
    """Return when the coordinator put an object last, as it dates the file."""
    return next(home.objects.rglob(digest)).stat().st_mtime


def stages(times: Sequence[RoundTimes]) -> dict[str, float]:
    """Return the median seconds of a round's parts, the first and the last round left out."""
    pairs = list(itertools.pairwise(times[1:]))
    return {
        "to_first_answer": statistics.median(a.first_answer - a.announced for a, _ in pairs),
        "to_last_answer": statistics.median(a.last_answer - a.first_answer for a, _ in pairs),
        "to_next_announcement": statistics.median(b.announced - a.last_answer for a, b in pairs),
    }


def parts_of(live: Live) -> Mapping[str, int]:
    """Return the processes of the coordinator by name."""
    return {
        "rounds": live.child("rounds"),
        "superlink": live.child("superlink"),
        "edge and services": live.pid("coordinator"),
    }


def _coordinator(live: Live) -> Home:
    return Home(live.folder / "coordinator-home" / "coordinator")


def _join_all(live: Live, names: Sequence[str]) -> list[SiteHome]:
    homes = []
    with open_desk(_coordinator(live)) as desk:
        for name in names:
            home = SiteHome(live.home_of(name) / "site")
            enrol(home, name, desk.registry.invite(name, desk.settings.public, days=1))
            homes.append(home)
    return homes


def _open(live: Live, study: Study, values: int, homes: Sequence[SiteHome]) -> str:
    """Offer a study, have every site approve it, open it, and return its digest."""
    with open_desk(_coordinator(live)) as desk:
        digest = offer(desk, study, random_tensors(values), ends=now() + timedelta(days=1)).digest
        for home in homes:
            approve(home, digest)
        change(desk, find(desk, digest), "open")
    return digest


@contextmanager
def _running(live: Live, homes: Sequence[SiteHome]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Give the sites' processes, connected; they are ended at the end of ``with``."""
    with ExitStack() as stack:
        processes = []
        for home in homes:
            log = stack.enter_context((live.folder / f"{home.folder.parent.name}.log").open("ab"))
            process = subprocess.Popen(  # noqa: S603  # our own command
                [sys.executable, "-m", federation_site.__name__, str(home.folder)],
                env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
            stack.callback(_end, process)
            processes.append(process)
        for process in processes:
            said = b"" if process.stdout is None else process.stdout.readline()
            if said.strip() != federation_site.CONNECTED.encode():
                raise LiveError("a site ended before it was connected: look at its log")
        yield processes


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _wait(
    store: Store, study: str, processes: Sequence[subprocess.Popen[bytes]], seconds: float
) -> None:
    end = time.monotonic() + seconds
    while (found := store.studies.study(study)) is None or found.state != "finished":
        if any(process.poll() is not None for process in processes):
            raise LiveError("a site has ended: look at its log")
        if time.monotonic() > end:
            raise LiveError(f"the study is not finished after {seconds:.0f} s: look at the logs")
        time.sleep(0.5)
