"""``huizhen coordinator up``: everything that a coordinator needs, as one foreground process.

    this process        the edge, the alliance service, health and metrics
    superlink           Flower, on loopback, its state in memory
    rounds              server/conductor.py

Children that die are started again, with a growing pause; they die with this process, however it
ends. SIGTERM and Ctrl-C stop everything in order. What was running is in the store, so that
starting again is all that a crash asks of anybody.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import IO

import grpc
import uvicorn
from cryptography import x509
from starlette.applications import Starlette

from huizhen.protocol.errors import StorageError
from huizhen.server.alliance import make_servers
from huizhen.server.authority import pem
from huizhen.server.desk import Clock, Desk, alone, now, open_desk
from huizhen.server.edge import make_edge
from huizhen.server.home import Home, Settings
from huizhen.server.status import make_status
from huizhen.server.superlink import Link, silent_environment, superlink_command
from huizhen.storage.files import make_folder, write_whole
from huizhen.storage.keys import load_tls_key, make_tls_key

STOP_SECONDS = 10.0
LONGEST_PAUSE_SECONDS = 15.0
RENEW_BEFORE = timedelta(days=30)
RENEW_LOOK_SECONDS = 3600.0
MAX_LOG_BYTES = 16 << 20
_PR_SET_PDEATHSIG = 1

logger = logging.getLogger(__name__)


def link_of(home: Home, settings: Settings) -> Link:
    """Return where the SuperLink is."""
    return Link(settings.listen.superlink, home.authority, home.secret, home.run)


@dataclass(slots=True)
class Child:
    """A process that is kept alive."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    pause: float = 0.5
    begun: float = 0.0
    again: float = field(default=0.0)

    @property
    def is_up(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None

    def keep(self) -> None:
        """Start it if it does not run and its pause is over; call from the main thread alone.

        The kernel ends a child with the thread that started it.
        """
        if self.is_up:
            if time.monotonic() - self.begun > 60:
                self.pause = 0.5
            with contextlib.suppress(OSError):  # it runs on beside a log that cannot be cut
                _cut_log(self.log)
            return
        if self.process is not None:
            logger.warning("part ended: name=%s status=%s", self.name, self.process.returncode)
            self.process = None
            self.again = time.monotonic() + self.pause
            self.pause = min(2 * self.pause, LONGEST_PAUSE_SECONDS)
        if time.monotonic() < self.again:
            return
        with _open_log(self.log) as log:
            self.process = subprocess.Popen(  # noqa: S603 - our own command
                self.command,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process, which stops them in order
                preexec_fn=die_with_parent,
            )
        self.begun = time.monotonic()
        logger.info("part started: name=%s pid=%s", self.name, self.process.pid)

    def stop(self) -> None:
        """Ask it to end, and end it."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _open_log(place: Path) -> IO[bytes]:
    """Return a log to append to; on a full disk, nothing is kept but the part starts."""
    try:
        _cut_log(place)
        return place.open("ab")
    except OSError as error:
        logger.warning("no log of a part: file=%s %s", place.name, error.strerror)
        return Path(os.devnull).open("ab")


def _cut_log(place: Path) -> None:
    """Put a log that has grown too large aside and empty it, also while a part appends to it.

    Strangers make SuperLink write a line for each request, so that no log waits for a restart.
    """
    if not place.exists() or place.stat().st_size <= MAX_LOG_BYTES:
        return
    with contextlib.suppress(OSError):  # on a full disk the old lines go
        shutil.copyfile(place, place.with_suffix(".old"))
    os.truncate(place, 0)


def die_with_parent() -> None:
    """Have the kernel end this process when its parent does."""
    with contextlib.suppress(OSError):  # elsewhere than on Linux a child outlives a killed parent
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def up(
    home: Home,
    *,
    ready: Callable[[Mapping[str, str]], None] = lambda _: None,
    stop: threading.Event | None = None,
    clock: Clock = now,
) -> None:
    """Run a coordinator until SIGTERM or Ctrl-C.

    Args:
        home: its folder.
        ready: is called with the addresses once everything answers.
        stop: ends it too, where no signal can.
        clock: gives the present time.

    Raises:
        ConfigError: there is no coordinator in the folder, or it runs already.
        StorageError: a port is taken, or a file cannot be written.
    """
    stop = stop or threading.Event()
    with alone(home, "coordinator"), open_desk(home, clock=clock) as desk, _signals(stop):
        desk.registry.found()
        link = prepare(desk)
        listen = desk.settings.listen
        superlink, _ = children = _children(home, link)
        for server in (servers := _services(desk)):
            server.start()
        edge = _serve(make_edge(listen.superlink, home.authority), listen.fleet, home)
        status = _serve(
            make_status(desk, lambda: {child.name: child.is_up for child in children}),
            listen.status,
            None,
        )
        try:
            is_told = False
            while not stop.is_set():
                for child in children:
                    child.keep()
                if not is_told and all(child.is_up for child in children):
                    is_told = True
                    ready({name: getattr(listen, name) for name in ("fleet", "service", "status")})
                if _renew(desk, edge):
                    superlink.stop()  # it reads its certificate once, at its start
                stop.wait(0.2)
        finally:
            for child in reversed(children):
                child.stop()
            for server in servers:
                server.stop(grace=2).wait()
            edge.shut()
            status.shut()


def prepare(desk: Desk) -> Link:
    """Make what the running parts need: the server's certificate, and Flower's secret."""
    home = desk.home
    make_folder(home.flower, mode=0o700)
    make_folder(home.run)
    if not home.secret.exists():
        write_whole(home.secret, secrets.token_bytes(32))
        home.secret.chmod(0o600)
    if not home.key("server").exists():
        make_tls_key(home.key("server"))
    if _needs_certificate(desk):
        issue_certificate(desk)
    return link_of(home, desk.settings)


def issue_certificate(desk: Desk) -> None:
    """Sign a certificate for the public names, and for loopback, where Flower listens."""
    names = [*desk.settings.public.names, "127.0.0.1", "localhost"]
    key = load_tls_key(desk.home.key("server"))
    made = desk.keys.authority.for_server(
        list(dict.fromkeys(names)), key.public_key(), desk.clock()
    )
    write_whole(desk.home.certificate, pem(made))


def _needs_certificate(desk: Desk) -> bool:
    try:
        found = x509.load_pem_x509_certificate(desk.home.certificate.read_bytes())
    except (OSError, ValueError):
        return True
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    listed = {str(one.value) for one in names}
    is_of_key = found.public_key() == load_tls_key(desk.home.key("server")).public_key()
    is_fresh = found.not_valid_after_utc - desk.clock() > RENEW_BEFORE
    return not (is_of_key and is_fresh and set(desk.settings.public.names) <= listed)


def _renew(desk: Desk, edge: "_Served") -> bool:
    """Once an hour, sign a new certificate if it is time; return whether it was.

    New connections to the edge and to the alliance service get it.
    """
    if time.monotonic() - edge.looked < RENEW_LOOK_SECONDS:
        return False
    edge.looked = time.monotonic()
    if not _needs_certificate(desk):
        return False
    issue_certificate(desk)
    edge.reload(desk.home)
    logger.info("server certificate renewed")
    return True


def _children(home: Home, link: Link) -> list[Child]:
    command, environment = superlink_command(
        link, certificate=home.certificate, key=home.key("server"), home=home.flower
    )
    rounds = [sys.executable, "-m", "huizhen.server.conduct", str(home.folder)]
    own = silent_environment(home.flower) | {
        name: value for name, value in os.environ.items() if name.startswith(("HUIZHEN_", "PYTHON"))
    }
    # Freed adapters go back to the system at once; by default glibc keeps blocks up to 32 MiB.
    own["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    return [
        Child("superlink", command, environment, home.run / "superlink.log"),
        Child("rounds", rounds, own, home.run / "rounds.log"),
    ]


def _services(desk: Desk) -> list[grpc.Server]:
    home, listen = desk.home, desk.settings.listen
    return make_servers(
        desk,
        door=listen.door,
        service=listen.service,
        key=home.key("server").read_bytes(),
        certificate=home.certificate,
        authority=home.authority.read_bytes(),
    )


class _Served:
    """An ASGI application on a port, in a thread of its own."""

    def __init__(self, app: Starlette, address: str, home: Home | None) -> None:
        host, _, port = address.rpartition(":")
        config = uvicorn.Config(
            app,
            host=host.strip("[]"),
            port=int(port),
            ssl_certfile=None if home is None else str(home.certificate),
            ssl_keyfile=None if home is None else str(home.key("server")),
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=30,
            h11_max_incomplete_event_size=32 << 10,
            limit_concurrency=512,
        )
        self.looked = time.monotonic()
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._server.serve()), name=address, daemon=True
        )
        self._thread.start()
        end = time.monotonic() + STOP_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > end:
                raise StorageError(f"cannot listen on {address}: it is taken or not here")
            time.sleep(0.01)

    def reload(self, home: Home) -> None:
        """Give new connections the certificate that lies there now."""
        if (context := self._server.config.ssl) is not None:
            context.load_cert_chain(home.certificate, home.key("server"))

    def shut(self) -> None:
        """Stop listening."""
        self._server.should_exit = True
        self._thread.join(STOP_SECONDS)


def _serve(app: Starlette, address: str, home: Home | None) -> _Served:
    return _Served(app, address, home)


@contextlib.contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """Let SIGTERM and Ctrl-C set the event, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
