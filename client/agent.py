"""The hospital's agent: asks for work, decides, has it trained behind walls, signs its answers.

One thread works through the coordinator's messages one by one; a second keeps the site's standing
with the alliance (certificate, membership, records, receipts); a third watches the kill file and
the pause, and ends everything that trains or sends within a second. The base model stays loaded in
the worker. No code of the coordinator's is ever fetched, and no text leaves: answers are tensors
and signed statements, refusals are codes.
"""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from importlib.metadata import version

from cryptography.hazmat.primitives.hashes import SHA256

from huizhen.client.alliance import AllianceError
from huizhen.client.answering import Answering
from huizhen.client.flower import Fleet, FleetError, Request, connect
from huizhen.client.home import Home
from huizhen.client.joining import needs_renewal, renew
from huizhen.client.sandbox import probe
from huizhen.client.standing import Standing, open_book
from huizhen.protocol.errors import HuizhenError, StorageError
from huizhen.protocol.statements import stamp
from huizhen.storage import locks
from huizhen.storage.audit import AuditLog
from huizhen.storage.files import write_whole
from huizhen.storage.keys import load_key, load_node_key

BUSY_SECONDS = 10.0
# after a message, the next one is asked for at once
BUSY_POLL_SECONDS = 0.05
REPORT_SECONDS = 10.0
WATCH_SECONDS = 0.1
STOP_SECONDS = 0.6
# after the kill file appears, until a half-sent update is cut off the hard way
LONGEST_PAUSE_SECONDS = 20.0
ENDED = {"stopped": 75, "revoked": 76}
# exit codes: the kill file is there, the site is out of the alliance; see deploy/systemd

logger = logging.getLogger(__name__)


class Agent:
    """A running site."""

    def __init__(self, home: Home, *, clock: Callable[[], datetime]) -> None:
        """Read what the folder holds.

        Raises:
            ConfigError: it is no site that has joined, or a setting or key is wrong.
            AuditError: the log is broken.
            StorageError: something cannot be read.
        """
        self.home, self._clock = home, clock
        self._settings = home.settings()
        self.policy = home.policy()
        self._audit = AuditLog.open(home.audit, clock=clock)
        self._identity = load_key(home.key("identity"))
        self._book = open_book(home)
        self._standing = Standing(home, self._audit, self._identity, self._book, clock=clock)
        self.walls = probe()
        self._answering = Answering(
            home, self._audit, self._identity, self._standing, walls=self.walls, clock=clock
        )
        self._stop = threading.Event()
        self._fleet: Fleet | None = None
        self._is_sending = False
        self.code = "starting"
        self.ended: str | None = None
        # why the agent must not be started again by itself, see ENDED

    def run(self, stop: threading.Event) -> None:
        """Work until told to stop, or the kill file appears.

        Raises:
            StorageError: the log or the ledger cannot be written: nothing may leave.
        """
        self._stop = stop
        if self.policy.is_stopped(self.home.folder):
            self.code = self.ended = "stopped"
            self._audit.shut()
            self._book.shut()
            self._note()
            return
        self._audit.append("work_resumed", code="started")
        self._answering.log_policy(self.policy)
        threads = [
            threading.Thread(target=self._watch, name="watch", daemon=True),
            threading.Thread(target=self._stand, name="standing", daemon=True),
        ]
        for thread in threads:
            thread.start()
        pause = 0.5
        try:
            while not stop.is_set():
                try:
                    self._work()
                    pause = 0.5
                except FleetError as error:
                    self._say(error.trouble)
                    logger.warning("no connection: trouble=%s %s", error.trouble, error)
                    stop.wait(pause)
                    pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        finally:
            stop.set()
            self._answering.close()
            for thread in threads:
                thread.join(2 * REPORT_SECONDS if thread.name == "watch" else 1.0)
            self._audit.shut()
            self._book.shut()
            self._note()

    def _work(self) -> None:
        """Be connected and answer messages, until the connection breaks."""
        terms = self._settings
        with connect(
            terms.coordinator.fleet,
            ca=self.home.authority,
            key=load_node_key(self.home.key("node")),
            last_node=self._last_node(),
        ) as fleet:
            self._fleet = fleet
            self._keep_node(fleet.node)
            self._say("idle")
            busy_until = 0.0
            try:
                while not self._stop.is_set():
                    request = fleet.receive()
                    if request is not None:
                        self._handle(fleet, request)
                        busy_until = time.monotonic() + BUSY_SECONDS
                        continue
                    is_busy = time.monotonic() < busy_until
                    self._stop.wait(BUSY_POLL_SECONDS if is_busy else terms.network.poll_seconds)
            finally:
                self._fleet = None

    def _handle(self, fleet: Fleet, request: Request) -> None:
        self._say("working")
        answer = self._answering.answer(request.document, request.payload)
        if answer is None or self._stop.is_set():
            self._say("idle")
            return
        self._say("sending")
        self._is_sending = True
        try:
            fleet.reply(request, answer.document, answer.payload)
        except FleetError as error:
            if error.trouble not in ("run_over", "lost"):
                raise
            logger.info("answer not taken, it is kept: trouble=%s", error.trouble)
        finally:
            self._is_sending = False
        self._say("idle")

    def _watch(self) -> None:
        """Look for the kill file and the pause."""
        was_paused = self.home.paused.exists()
        while not self._stop.wait(WATCH_SECONDS):
            is_paused = self.home.paused.exists()
            if is_paused != was_paused:
                was_paused = is_paused
                self._audit.append("work_paused" if is_paused else "work_resumed", code="command")
            if self.policy.is_stopped(self.home.folder):
                self._cut()
                return

    def _cut(self) -> None:
        """The kill file is there: end training and sending within a second."""
        self.code = self.ended = "stopped"
        self._stop.set()
        self._answering.stop()
        if (fleet := self._fleet) is not None:
            fleet.abort()
        try:
            self._audit.append("work_stopped", code="kill_file")
        except HuizhenError:
            logger.exception("the stop could not be logged")
        end = time.monotonic() + STOP_SECONDS
        while self._is_sending and time.monotonic() < end:
            time.sleep(0.01)
        if self._is_sending:
            os._exit(ENDED["stopped"])  # nothing else ends a write to a socket for certain

    def _stand(self) -> None:
        """Keep the site's standing with the alliance, whatever fails."""
        while not self._stop.is_set():
            try:
                if needs_renewal(self.home, self._clock()):
                    self._renew()
                self._standing.refresh(version=version("huizhen"), codes=[self.code])
            except AllianceError as error:
                logger.info("alliance service: code=%s", error.code)
                if error.code == "revoked":
                    self._leave()
                    return
            except StorageError:
                logger.exception("standing cannot be kept")
            except HuizhenError as error:
                logger.warning("alliance service: %s", error)
            with contextlib.suppress(StorageError):
                self._note()
            self._stop.wait(REPORT_SECONDS)

    def _say(self, code: str) -> None:
        """Set what ``site status`` shows; an end stays."""
        if self.ended is None:
            self.code = code

    def _renew(self) -> None:
        until = renew(self.home, self._clock)
        found = self.home.has_certificate()
        if found is not None:
            fingerprint = found.fingerprint(SHA256()).hex()
            self._audit.append("certificate_renewed", fingerprint=fingerprint, until=stamp(until))

    def _leave(self) -> None:
        """This site is out of the alliance: there is nothing left to do."""
        logger.error("this site is revoked: the agent ends")
        self.code = self.ended = "revoked"
        self._stop.set()
        self._answering.stop()

    def _note(self) -> None:
        """Leave what ``site status`` shows."""
        note = {"time": self._clock().isoformat(), "pid": os.getpid(), "code": self.code}
        write_whole(self.home.run / "status.json", json.dumps(note).encode())

    def _last_node(self) -> int | None:
        try:
            return int((self.home.run / "node").read_text("ascii"))
        except (OSError, ValueError):
            return None

    def _keep_node(self, node: int) -> None:
        write_whole(self.home.run / "node", str(node).encode())


@contextlib.contextmanager
def alone(home: Home) -> Iterator[None]:
    """Keep a second agent from starting on the same folder.

    Raises:
        ConfigError: one is running.
        StorageError: the folder cannot be written.
    """
    holder = f"{str(home.folder)!r} has a running agent"
    with locks.alone(home.run / "agent.lock", holder, mode=0o700):
        yield
