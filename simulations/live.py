"""A whole federation on one machine, as it is run for real: the programs of ``huizhen`` over TLS.

One coordinator and some sites, each with a folder and processes of its own on loopback ports that
were free. Whatever is done to them is done with the commands that people type, or with ``kill -9``.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from huizhen.protocol.errors import HuizhenError
from huizhen.server.home import Home
from huizhen.server.store import Store

READY_SECONDS = 60.0
_COMMAND = (sys.executable, "-m", "huizhen.cli.main")


class LiveError(HuizhenError):
    """A part of the federation did not do what it should."""


class Live:
    """The federation's processes. ``with`` ends all of them."""

    def __init__(
        self,
        folder: Path,
        *,
        bases: Path,
        alliance: str = "Demo",
        host: str = "127.0.0.1",
        store: str = "",
    ) -> None:
        """Prepare; nothing is started.

        Args:
            folder: for everything; must not exist or be empty.
            bases: the home whose ``bases`` holds the base models.
            alliance: its name.
            host: how sites reach the coordinator, which runs on this machine whatever it is called.
            store: URL of the coordinator's PostgreSQL; empty: its own SQLite file.
        """
        self.folder, self.bases, self.alliance = folder.absolute(), bases.absolute(), alliance
        self.host, self._store = host, store
        self.port = free_ports(5)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.sites: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name in list(self._running):
            self.end(name)

    def found(self) -> None:
        """Make the coordinator's folder and start it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.coordinator(
            "init", "--alliance", self.alliance, "--name", self.host, "--port", str(self.port)
        )
        if self._store:
            settings = self._coordinator_home / "coordinator" / "coordinator.toml"
            edit(settings, {'url = "" ': f'url = "{self._store}" '})
        with contextlib.suppress(FileExistsError):
            (self.folder / "coordinator-home" / "bases").symlink_to(self.bases / "bases")
        self.start_coordinator()

    def start_coordinator(self) -> None:
        """Run ``coordinator up`` and wait until it is."""
        log = self.folder / "coordinator.log"
        before = log.stat().st_size if log.exists() else 0
        self._start("coordinator", "coordinator", "up", "--home", str(self._coordinator_home))
        self._wait(lambda: b"coordinator is up" in log.read_bytes()[before:], "coordinator")

    def add_site(
        self,
        site: str,
        records: Path,
        *,
        unit: str,
        epsilon: float = 8.0,
        min_sites: int = 3,
        network: Mapping[str, str] | None = None,
    ) -> None:
        """Make a site and let it join.

        Args:
            site: its name.
            records: its JSON lines.
            unit: the weakest unit of privacy that its policy allows.
            epsilon: its cap for one study, and the ledger's for all.
            min_sites: the fewest that a round may have, by its policy.
            network: changes of ``site.toml``, each from a piece that is there once.
        """
        self.site(site, "init", "--site", site)
        folder = self.home_of(site) / "site"
        edit(
            folder / "policy.toml",
            {
                "# epsilon = 4.0": f"epsilon = {epsilon}",
                'unit = "patient" ': f'unit = "{unit}" ',
                'data = "records.jsonl"': f"data = {json.dumps(str(records.absolute()))}",
                "max_rounds_per_day = 48": "max_rounds_per_day = 100000",
                "min_sites = 3": f"min_sites = {min_sites}",
            },
        )
        edit(
            folder / "site.toml",
            {
                "threads = 1": f"threads = 1\nbases = {json.dumps(str(self.bases))}",
                **(network or {}),
            },
        )
        invitation = self.folder / f"{site}.invitation"
        self.coordinator("invite", site, "--out", str(invitation))
        self.site(site, "join", str(invitation), "--yes")
        if unit != "none":
            self.site(
                site, "ledger", "create", "--site", site, "--cohort", "all",
                "--epsilon", str(epsilon), "--delta", "1e-4",
            )  # fmt: skip
        self.sites.append(site)

    def start_site(self, site: str, *, before: str = "") -> None:
        """Run a site's agent.

        Args:
            site: its name.
            before: Python that its process runs first: a clock that is wrong, say.
        """
        words = ("site", "run", "--home", str(self.home_of(site)))
        if not before:
            self._start(site, *words)
            return
        program = (
            f"{before}\nimport sys\nfrom huizhen.cli.main import main\nsys.exit(main({words!r}))"
        )
        self._start(site, command=(sys.executable, "-c", program))

    @property
    def addresses_given(self) -> dict[str, str]:
        """Where the coordinator is, as invitations say."""
        names = ("fleet", "service", "door")
        return {name: f"{self.host}:{self.port + number}" for number, name in enumerate(names)}

    def addresses(self, site: str) -> dict[str, str]:
        """Return where a site looks for the coordinator."""
        terms = tomllib.loads((self.home_of(site) / "site" / "site.toml").read_text("utf-8"))
        return dict(terms["coordinator"])

    def set_addresses(self, site: str, addresses: Mapping[str, str]) -> None:
        """Have a site that does not run look elsewhere for the coordinator."""
        before = self.addresses(site)
        changes = {f'"{before[name]}"': f'"{addresses[name]}"' for name in addresses}
        edit(self.home_of(site) / "site" / "site.toml", changes)

    def offer(self, study: str) -> str:
        """Offer a study, have every site approve it, open it, and return its digest."""
        place = self.folder / "study.toml"
        place.write_text(study, "utf-8")
        digest = str(self.coordinator("study", "new", str(place))["study"])
        for site in self.sites:
            self.site(site, "approve", digest, "--cohort", "all", "--epsilon", "8")
        self.coordinator("study", "open", digest)
        return digest

    def round_of(self, study: str) -> tuple[int, str]:
        """Return how many rounds of a study are committed, and its state."""
        with self.store() as store:
            found, last = store.studies.study(study), store.rounds.last_record(study)
        if found is None:
            raise LiveError(f"study {study[:12]} is not known")
        return 0 if last is None else last.round, found.state

    def store(self) -> Store:
        """Return the coordinator's store, open."""
        return Store.open(Home(self._coordinator_home / "coordinator").store_url())

    def wait_for(self, study: str, round: int, *, seconds: float) -> None:
        """Wait until so many rounds are committed, or the study is finished.

        Raises:
            LiveError: they are not in time.
        """
        end = time.monotonic() + seconds
        while True:
            found, state = self.round_of(study)
            if found >= round or state == "finished":
                return
            if time.monotonic() > end:
                raise LiveError(f"round {found} of {round} is committed after {seconds:.0f} s")
            time.sleep(0.2)

    def wait_until_finished(self, study: str, *, seconds: float) -> None:
        """Wait until a study is finished.

        Raises:
            LiveError: it is not in time.
        """
        self._wait(lambda: self.round_of(study)[1] == "finished", "the study", seconds)

    def kill(self, name: str) -> None:
        """End a coordinator or a site with SIGKILL, as a power cut would; its children with it."""
        process = self._running.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def end(self, name: str) -> int:
        """Stop a coordinator or a site as a person would, and return its exit code."""
        process = self._running.pop(name)
        process.terminate()
        try:
            return process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def mend(self) -> None:
        """Have the coordinator and every site run again, whatever was done to them."""
        for name in ("coordinator", *self.sites):
            if name in self._running and self.is_running(name):
                continue
            self._running.pop(name, None)
            if name == "coordinator":
                self.start_coordinator()
            else:
                self.start_site(name)

    def is_running(self, name: str) -> bool:
        """Return whether a coordinator or a site that was started has not ended."""
        return name in self._running and self._running[name].poll() is None

    def forget(self, name: str) -> int:
        """Return the exit code of one that has ended by itself."""
        return self._running.pop(name).wait(10)

    def pid(self, name: str) -> int:
        """Return the process of a coordinator or a site."""
        return self._running[name].pid

    def child(self, part: str) -> int:
        """Return the process of a part of the coordinator, ``superlink`` or ``rounds``."""
        log = (self.folder / "coordinator.log").read_text("utf-8", "replace")
        return int(re.findall(rf"part started: name={part} pid=(\d+)", log)[-1])

    def coordinator(self, *words: str) -> Mapping[str, Any]:
        """Run a command of the coordinator and return what it prints."""
        return self._run("coordinator", *words, home=self._coordinator_home)

    def site(self, site: str, *words: str) -> Mapping[str, Any]:
        """Run a command of a site and return what it prints."""
        return self._run("site", *words, home=self.home_of(site))

    def home_of(self, site: str) -> Path:
        """Return a site's home."""
        return self.folder / f"site-{site}"

    @property
    def _coordinator_home(self) -> Path:
        return self.folder / "coordinator-home"

    def _run(self, *words: str, home: Path) -> Mapping[str, Any]:
        home.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(  # noqa: S603 - our own command
            [*_COMMAND, *words, "--home", str(home), "--json"],
            env=environment(), capture_output=True, timeout=300, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            text = done.stderr.decode("utf-8", "replace").strip().splitlines()
            raise LiveError(f"huizhen {' '.join(words)}: {text[-1] if text else done.returncode}")
        found: Mapping[str, Any] = json.loads(done.stdout)
        return found

    def _start(self, name: str, *words: str, command: Sequence[str] = _COMMAND) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(  # noqa: S603 - our own command
                [*command, *words], env=environment(), stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def _wait(self, is_so: Callable[[], bool], what: str, seconds: float = READY_SECONDS) -> None:
        end = time.monotonic() + seconds
        while not is_so():
            for name, process in self._running.items():
                if process.poll() not in (None, 0):
                    raise LiveError(f"{name} ended with {process.returncode}, look at its log")
            if time.monotonic() > end:
                raise LiveError(f"{what} is not ready after {seconds:.0f} s, look at the logs")
            time.sleep(0.1)


def environment() -> dict[str, str]:
    """Return the environment of every process: no calls to anybody, no proxies."""
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }


def free_ports(count: int) -> int:
    """Return the first of so many neighbouring loopback ports that are free now."""
    for begin in range(20_000 + os.getpid() % 10_000, 60_000, count):
        with contextlib.ExitStack() as held:
            try:
                for port in range(begin, begin + count):
                    one = held.enter_context(socket.socket())
                    one.bind(("127.0.0.1", port))
            except OSError:
                continue
            return begin
    raise LiveError("no neighbouring ports are free")


def edit(path: Path, changes: Mapping[str, str]) -> None:
    """Replace pieces of a settings file, each of which must be there once.

    Raises:
        LiveError: one is not.
    """
    text = path.read_text("utf-8")
    for old, new in changes.items():
        if text.count(old) != 1:
            raise LiveError(f"{path.name} has {old!r} {text.count(old)} times, expected once")
        text = text.replace(old, new)
    path.write_text(text, "utf-8")


@contextlib.contextmanager
def paused(process: int) -> Iterator[None]:
    """Hold a process still."""
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)
