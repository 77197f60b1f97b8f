"""``make demo-federation``: a real federation on one machine that is killed twice and finishes.

One coordinator and three hospitals of the demo's cohort, each a set of processes of its own, over
TLS on loopback. In the middle the coordinator and one hospital are ended with ``kill -9`` and
started again. The adapter is then compared with the one of the in-process engine: the same study,
the same records, one thread each.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from huizhen.client.governance import SitePolicy, admit
from huizhen.client.local_trainer import LocalTrainer
from huizhen.client.records.rows import read_lines, to_record
from huizhen.client.site import Site
from huizhen.client.site_examples import site_examples
from huizhen.learning.bases import default_home, resolve
from huizhen.learning.first import first_adapter
from huizhen.learning.models import make_model
from huizhen.protocol.statements import digest_of
from huizhen.protocol.strict import read_toml
from huizhen.protocol.study import Study, parse_study
from huizhen.server.rounds import Coordinator
from huizhen.simulations.demo import write_demo_cohort
from huizhen.simulations.live import Live

SITES = ("hospital-a", "hospital-b", "hospital-c")
ROUNDS = 6
KILL_COORDINATOR_AFTER, KILL_SITE_AFTER = 2, 4
_SECONDS = 900.0


@dataclass(frozen=True, slots=True)
class Result:
    """What the demonstration found."""

    study: str
    rounds: int
    adapter: str
    # SHA-256 of the final adapter's bytes, of the federation
    in_process: str
    # and of the in-process engine
    seconds: float
    events: tuple[tuple[float, str], ...]

    @property
    def is_same(self) -> bool:
        """Whether both adapters are equal to the byte."""
        return self.adapter == self.in_process


def run_live_demo(out: Path, home: Path | None, say: Callable[[str], None]) -> Result:
    """Run the demonstration in a folder that must not hold one, and return what it found.

    Args:
        out: for the processes' folders and logs.
        home: where base models are cached; None for the platform's folder.
        say: is told what happens.

    Raises:
        HuizhenError: a part did not do what it should; its log is in the folder.
    """
    begin = time.monotonic()
    events: list[tuple[float, str]] = []

    def tell(text: str) -> None:
        events.append((time.monotonic() - begin, text))
        say(text)

    home = home or default_home()
    records = split_cohort(write_demo_cohort(out / "data"), out / "data")
    text = to_toml(demo_study(records))
    study, first = first_adapter(parse_study(_tables(text, out), "study.toml"), home)
    tell(f"training {ROUNDS} rounds in this process, to compare with")
    expected = in_process(study, first, records, home)
    with Live(out / "federation", bases=home, alliance="Demo") as live:
        live.found()
        tell("coordinator is up: TLS edge, alliance service, Flower on loopback")
        for site in SITES:
            live.add_site(site, records[site], unit="none")
            live.start_site(site)
            tell(f"{site} joined with an invitation; its agent runs")
        digest = live.offer(text)
        tell(f"all three approved study {digest[:12]}; its rounds begin")
        live.wait_for(digest, KILL_COORDINATOR_AFTER, seconds=_SECONDS)
        live.kill("coordinator")
        tell(f"kill -9 of the coordinator, {KILL_COORDINATOR_AFTER} rounds are committed")
        live.start_coordinator()
        tell("coordinator is up again")
        live.wait_for(digest, KILL_SITE_AFTER, seconds=_SECONDS)
        live.kill(SITES[0])
        tell(f"kill -9 of {SITES[0]}, {KILL_SITE_AFTER} rounds are committed")
        live.start_site(SITES[0])
        tell(f"{SITES[0]} runs again")
        live.wait_until_finished(digest, seconds=_SECONDS)
        [found] = [one for one in live.coordinator("status")["studies"] if one["study"] == digest]
        tell(f"study finished: {found['round']} rounds are committed")
    return Result(
        study=digest,
        rounds=found["round"],
        adapter=found["adapter"],
        in_process=expected,
        seconds=time.monotonic() - begin,
        events=tuple(events),
    )


def split_cohort(cohort: Path, folder: Path) -> dict[str, Path]:
    """Write each hospital's training records to a file of its own, as it would hold them."""
    found: dict[str, list[str]] = {site: [] for site in SITES}
    for line in cohort.read_text("utf-8").splitlines():
        record = json.loads(line)
        if record["site"] in found and record["split"] == "train":
            found[record["site"]].append(line)
    places = {}
    for site, lines in found.items():
        places[site] = folder / f"{site}.jsonl"
        places[site].write_text("\n".join(lines) + "\n", "utf-8")
    return places


def demo_study(records: Mapping[str, Path]) -> dict[str, Any]:
    """Return the study's tables: the demo's, for three hospitals and without a unit of privacy."""
    tables = read_toml(Path(str(files("huizhen.simulations") / "demo.toml")))
    del tables["simulation"]
    names: dict[str, str] = {}
    sizes = {}
    for site, place in records.items():
        lines = [json.loads(line) for line in place.read_text("utf-8").splitlines()]
        names |= {one["disease"]: one["label"] for one in lines}
        sizes[site] = {"patients_public": 10 * round(len({one["patient"] for one in lines}) / 10)}
    labels = sorted(names)
    tables["task"] |= {"labels": labels, "label_texts": [names[one] for one in labels]}
    del tables["task"]["label_text"]
    tables["study"] |= {"name": "demo federation", "purpose": "Show what a kill -9 does: nothing."}
    tables["privacy"] = {"unit": "none"}
    tables["rounds"] |= {"count": ROUNDS, "deadline_minutes": 15.0}
    return {**tables, "sites": sizes}


def in_process(study: Study, first: Any, records: Mapping[str, Path], home: Path) -> str:
    """Return the digest of the adapter that the in-process engine ends with, on one thread."""
    from huizhen.learning.model import one_thread

    with one_thread():
        base = None if study.base is None else resolve(study.base.name, home=home)
        model = make_model(study, base)
        encoder = model.encoder()
        sites = []
        for name in study.sites:
            lines = read_lines(records[name].read_bytes(), name)
            found = [to_record(fields, "patient", place) for place, fields in lines]
            train = site_examples(admit(found, SitePolicy(site=name)), encoder, model).train
            sites.append(Site(name, study, LocalTrainer(name, study, train, model, first)))
        coordinator = Coordinator(study, model.shapes)
        state = coordinator.first(first)
        while not coordinator.is_finished(state):
            announcement = coordinator.announcement(state)
            for site in sites:
                envelope, _ = site.answer(announcement, state.round)
                state, _ = coordinator.receive(state, envelope.data)
            state = coordinator.close_round(state)
        return digest_of(coordinator.announcement(state))


def to_toml(tables: Mapping[str, Any]) -> str:
    """Return tables of plain values, and of tables of them, as TOML."""
    lines: list[str] = []
    for name, table in tables.items():
        plain = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
        if plain or not table:
            lines += [
                f"[{name}]",
                *(f"{key} = {_value(value)}" for key, value in plain.items()),
                "",
            ]
        for key, value in table.items():
            if isinstance(value, Mapping):
                lines.append(f"[{name}.{json.dumps(key, ensure_ascii=False)}]")
                lines += [*(f"{inner} = {_value(one)}" for inner, one in value.items()), ""]
    return "\n".join(lines)


def _value(value: Any) -> str:
    """Return a TOML value; its strings, numbers and lists are written as JSON's are."""
    return json.dumps(value, ensure_ascii=False)


def _tables(text: str, out: Path) -> dict[str, Any]:
    place = out / "study.toml"
    place.write_text(text, "utf-8")
    return read_toml(place)
