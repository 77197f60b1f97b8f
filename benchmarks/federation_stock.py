"""The same exchange with stock Flower 1.41: SuperLink, SuperNodes, FedAvg, a process per message.

The deployment is the one of Flower's documentation: TLS, nodes that are registered by their keys,
the SuperLink starting the ServerApp and each SuperNode its ClientApps (isolation "subprocess"),
polling as it ships. Nothing is tuned. Telemetry, the update check and the installation of an app's
dependencies are off, and everything that Flower writes goes to the folder of the run.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from huizhen.benchmarks import federation_stock_app
from huizhen.benchmarks.federation_values import MIB, between, status_bytes
from huizhen.server.authority import Authority, pem
from huizhen.server.superlink import silent_environment
from huizhen.simulations.live import LiveError, free_ports

Database = Literal["SQLite", "memory"]
DATABASES: tuple[Database, ...] = ("SQLite", "memory")
READY_SECONDS = 60.0
_APP = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "stock"
version = "1.0.0"
description = "Random arrays."
dependencies = []
[tool.flwr.app]
publisher = "huizhen"
[tool.flwr.app.components]
serverapp = "{module}:server"
clientapp = "{module}:client"
[tool.flwr.app.config]
sites = {sites}
rounds = {rounds}
values = {values}
out = {out}
"""
_CONNECTION = """[superlink.alliance]
address = "{address}"
root-certificates = {ca}
"""


def run_stock(
    folder: Path, *, database: Database, sites: int, values: int, rounds: int, seconds: float
) -> dict[str, Any]:
    """Run a study with stock Flower and return its figures as JSON values.

    Args:
        folder: for everything; is made.
        database: where the SuperLink keeps its state.
        sites: SuperNodes.
        values: float32 numbers that go to each site and come back in each round.
        rounds: of FedAvg, at least two.
        seconds: after which the run is given up.

    Returns:
        ``seconds``: between rounds, the first left out; ``memory``: of the ServerApp and the
        SuperLink in MiB, idle and at its peak.

    Raises:
        LiveError: a part did not do what it should; its log is in the folder.
    """
    folder.mkdir(parents=True)
    port = free_ports(1 + sites)
    place = _Place(folder.absolute(), f"127.0.0.1:{port}")
    _write_certificates(place)
    _write_app(place, sites=sites, values=values, rounds=rounds)
    superlink = [
        "flower-superlink", "--host", "127.0.0.1", "--port", str(port),
        "--ssl-ca-certfile", str(place.ca), "--ssl-certfile", str(place.certificate),
        "--ssl-keyfile", str(place.key), "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    if database == "SQLite":
        superlink += ["--database", str(folder.absolute() / "state.sqlite")]
    with _running(place, "superlink", superlink) as link:
        _wait_until_up(place, link)
        idle = status_bytes(link.pid, "VmRSS")
        nodes = [_register(place, number) for number in range(1, sites + 1)]
        with _all_running(place, nodes, port):
            _flwr(place, "run", str(place.app), "alliance", "--stream", seconds=seconds)
        peak = status_bytes(link.pid, "VmHWM")
    try:
        found = json.loads(place.out.read_bytes())
    except FileNotFoundError as error:
        raise LiveError("the ServerApp did not end well, look at run.log") from error
    return {
        "database": database,
        "sites": sites,
        "values": values,
        "rounds": rounds,
        "seconds": between(found["moments"][1:]),
        "memory": {
            "serverapp": {"idle_mib": found["idle"] / MIB, "peak_mib": found["peak"] / MIB},
            "superlink": {"idle_mib": idle / MIB, "peak_mib": peak / MIB},
        },
    }


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a deployment's files are, and where its SuperLink listens."""

    folder: Path
    address: str

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def certificate(self) -> Path:
        return self.folder / "server.pem"

    @property
    def key(self) -> Path:
        return self.folder / "server.key"

    @property
    def app(self) -> Path:
        return self.folder / "app"

    @property
    def out(self) -> Path:
        return self.folder / "out.json"

    def node(self, number: int) -> Path:
        return self.folder / f"node-{number}"

    def environment(self, name: str) -> Mapping[str, str]:
        """Return the environment of a part; Flower starts its own parts by name from PATH."""
        home = self.folder / f"home-{name}"
        home.mkdir(exist_ok=True)
        found = silent_environment(home)
        path = f"{Path(sys.executable).parent}{os.pathsep}{found.get('PATH', os.defpath)}"
        return found | {"PATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def _write_certificates(place: _Place) -> None:
    now = datetime.now(UTC)
    authority = Authority.make("Benchmark", ec.generate_private_key(ec.SECP384R1()), now)
    key = ec.generate_private_key(ec.SECP256R1())
    made = authority.for_server(["127.0.0.1", "localhost"], key.public_key(), now)
    place.ca.write_bytes(pem(authority.certificate))
    place.certificate.write_bytes(pem(made))
    place.key.touch(0o600)
    place.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _write_app(place: _Place, **config: int) -> None:
    place.app.mkdir()
    text = _APP.format(
        module=federation_stock_app.__name__, out=json.dumps(str(place.out)), **config
    )
    (place.app / "pyproject.toml").write_text(text, "utf-8")
    home = Path(place.environment("cli")["FLWR_HOME"])
    text = _CONNECTION.format(address=place.address, ca=json.dumps(str(place.ca)))
    (home / "config.toml").write_text(text, "utf-8")


def _register(place: _Place, number: int) -> Path:
    """Make a node's key, have the SuperLink know it, and return its file."""
    key = ec.generate_private_key(ec.SECP384R1())
    private, public = place.node(number), place.node(number).with_suffix(".pub")
    private.touch(0o600)
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    _flwr(place, "supernode", "register", str(public), "alliance", seconds=READY_SECONDS)
    return private


def _flwr(place: _Place, *words: str, seconds: float) -> None:
    """Run a command of ``flwr``; what it says goes to run.log."""
    with (place.folder / "run.log").open("ab") as log:
        try:
            done = subprocess.run(  # noqa: S603  # Flower's own command
                [str(Path(sys.executable).with_name("flwr")), *words],
                env=place.environment("cli"), cwd=place.folder, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, timeout=seconds, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise LiveError(f"flwr {words[0]} is not done after {seconds:.0f} s") from error
    if done.returncode:
        raise LiveError(f"flwr {words[0]} ended with {done.returncode}, look at run.log")


def _wait_until_up(place: _Place, link: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end and link.poll() is None:
        with suppress(LiveError):
            _flwr(place, "supernode", "ls", "alliance", seconds=READY_SECONDS)
            return
        time.sleep(0.5)
    raise LiveError("SuperLink did not come up, look at superlink.log")


@contextmanager
def _all_running(place: _Place, nodes: Sequence[Path], port: int) -> Iterator[None]:
    """Keep a SuperNode of each key running."""
    if not nodes:
        yield
        return
    key, *later = nodes
    command = [
        "flower-supernode", "--root-certificates", str(place.ca), "--superlink", place.address,
        "--auth-supernode-private-key", str(key), "--host", "127.0.0.1",
        "--port", str(port + len(nodes)),
    ]  # fmt: skip
    with _running(place, key.name, command), _all_running(place, later, port):
        yield


@contextmanager
def _running(place: _Place, name: str, command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Give a part that runs; it and all that it started are ended at the end of ``with``."""
    program = Path(sys.executable).with_name(command[0])
    with (place.folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603  # Flower's own command
            [str(program), *command[1:]], env=place.environment(name), cwd=place.folder,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(15)
        with suppress(ProcessLookupError):  # its children, which it may leave behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
