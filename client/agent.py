"""The hospital's agent: asks for work, decides, has it trained behind walls, signs its answers.

One thread works through the coordinator's messages one by one; a second keeps the site's standing
with the alliance (certificate, membership, records, receipts); a third watches the kill file until
the very end, waits for nothing else, and ends everything that trains or sends within a second; a
fourth logs the pause. The base model stays loaded in the worker. No code of the coordinator's is
ever fetched, and no text leaves: answers are tensors and signed statements, refusals are codes.
"""

import contextlib
import dataclasses
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256

from huizhen.client.alliance import AllianceError
from huizhen.client.answering import Answering
from huizhen.client.flower import Fleet, FleetError, Request, connect
from huizhen.client.home import POLICY, Home
from huizhen.client.joining import needs_renewal, renew
from huizhen.client.policy_terms import StopRule
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
# after the kill file is seen, until an agent that has not ended is ended the hard way
JOIN_SECONDS = 1.0
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
        self._was_paused = home.paused.exists()
        self._policy_seen = _state(home.folder / POLICY)
        self.policy = home.policy()
        self._audit = AuditLog.open(home.audit, clock=clock)
        self._identity = load_key(home.key("identity"))
        self._book = open_book(home)
        self._standing = Standing(home, self._audit, self._identity, self._book, clock=clock)
        self.walls = probe()
        self._answering = Answering(
            home, self._audit, self._identity, self._standing, walls=self.walls, clock=clock
        )
        self._stop, self._done = threading.Event(), threading.Event()
        # no further work is to begin; nothing can leave any more
        self._fleet: Fleet | None = None
        self._cutting: list[threading.Thread] = []
        self._failure: HuizhenError | None = None
        # what another thread than the one that works has ended the agent for
        self.code = "starting"
        self.ended: str | None = None
        # why the agent must not be started again by itself, see ENDED

    def run(self, stop: threading.Event) -> None:
        """Work until told to stop, or the kill file appears.

        Told to stop, it ends what trains and lets what is being sent arrive; the kill file cuts
        that off too, and ends the process with its code of ``ENDED`` if nothing else does.

        Raises:
            StorageError: the log or the ledger cannot be written: nothing may leave.
            AuditError: the log is no longer the one that was opened.
        """
        self._stop = stop
        if self._is_stopped():
            self.code = self.ended = "stopped"
            self._shut()
            return
        self._audit.append("work_resumed", code="started")
        self._answering.log_policy(self.policy)
        _begin(self._watch)
        threads = [_begin(self._log_pauses), _begin(self._stand)]
        try:
            self._keep_working()
        except Exception:
            if self.ended is None:
                raise
            logger.exception("failed while it ended: code=%s", self.ended)
        finally:
            stop.set()
            try:
                self._answering.close()
                for thread in (*threads, *self._cutting):
                    thread.join(JOIN_SECONDS)
                self._shut()
            finally:
                self._done.set()
        if self._failure is not None and self.ended is None:
            raise self._failure

    def _keep_working(self) -> None:
        """Connect again and again, until told to stop."""
        pause = 0.5
        while not self._stop.is_set():
            try:
                self._work()
                pause = 0.5
            except FleetError as error:
                self._say(error.trouble)
                logger.warning("no connection: trouble=%s %s", error.trouble, error)
                self._stop.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

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
        try:
            fleet.reply(request, answer.document, answer.payload)
        except FleetError as error:
            if error.trouble not in ("run_over", "lost"):
                raise
            logger.info("answer not taken, it is kept: trouble=%s", error.trouble)
        self._say("idle")

    def _watch(self) -> None:
        """Look for the kill file until nothing can leave any more."""
        is_ending = False
        while not self._done.wait(WATCH_SECONDS):
            if self._is_stopped():
                self._cut()
                return
            if self._stop.is_set() and not is_ending:
                is_ending = True
                _begin(self._answering.stop)  # it may wait for a worker that is being started

    def _is_stopped(self) -> bool:
        """Tell whether the policy's kill file is there, or the one that every site has."""
        place = self.home.folder / POLICY
        if (state := _state(place)) != self._policy_seen:
            self._policy_seen = state
            try:
                self.policy = self.home.policy()
            except Exception:  # whatever is wrong with it, the old one holds
                logger.exception("the policy cannot be used, its kill file is the one before")
        plain = dataclasses.replace(self.policy, stop=StopRule())
        return any(one.is_stopped(self.home.folder) for one in (self.policy, plain))

    def _cut(self) -> None:
        """The kill file is there: end training and sending within a second."""
        self.code = self.ended = "stopped"
        # Each may wait for a disk or a lock; the countdown does not.
        steps = (self._log_stop, self._answering.stop, self._abort)
        self._cutting = [_begin(step) for step in steps]
        self._stop.set()
        if not self._done.wait(STOP_SECONDS):
            os._exit(ENDED["stopped"])  # nothing else ends a write to a socket for certain

    def _log_stop(self) -> None:
        logger.warning("the kill file is there: the agent ends")
        try:
            self._audit.append("work_stopped", code="kill_file")
        except HuizhenError:
            logger.exception("the stop could not be logged")

    def _abort(self) -> None:
        if (fleet := self._fleet) is not None:
            fleet.abort()

    def _log_pauses(self) -> None:
        """Log when the pause begins and ends."""
        while not self._stop.wait(WATCH_SECONDS):
            is_paused = self.home.paused.exists()
            if is_paused == self._was_paused:
                continue
            self._was_paused = is_paused
            try:
                self._audit.append("work_paused" if is_paused else "work_resumed", code="command")
            except HuizhenError as error:
                self._fail(error)
                return

    def _fail(self, error: HuizhenError) -> None:
        """End the agent with this error, as if told to stop: nothing more may leave."""
        logger.error("the agent ends: %s", error, exc_info=error)
        if not self._stop.is_set():  # else it may be of a file that is shut
            self._failure = error
        self._stop.set()

    def _stand(self) -> None:
        """Keep the site's standing with the alliance, whatever fails."""
        while not self._stop.is_set():
            for step in (self._renew, self._report):  # one that fails does not keep the other
                try:
                    step()
                except AllianceError as error:
                    logger.info("alliance service: code=%s", error.code)
                    if error.code == "revoked":
                        self._leave()
                        return
                except StorageError as error:
                    self._fail(error)
                    return
                except HuizhenError as error:
                    logger.warning("alliance service: %s", error)
                except Exception:  # this site must not fall silent unseen
                    logger.exception("standing cannot be kept")
            with contextlib.suppress(StorageError):
                self._note()
            self._stop.wait(REPORT_SECONDS)

    def _say(self, code: str) -> None:
        """Set what ``site status`` shows; an end stays."""
        if self.ended is None:
            self.code = code

    def _report(self) -> None:
        self._standing.refresh(version=version("huizhen"), codes=[self.code])

    def _renew(self) -> None:
        """Renew the certificate, if it is time."""
        if not needs_renewal(self.home, self._clock()):
            return
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

    def _shut(self) -> None:
        """Let go of the files and leave the last note."""
        self._audit.shut()
        self._book.shut()
        with contextlib.suppress(StorageError):  # it says less than the exit code
            self._note()

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


def _begin(target: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def _state(path: Path) -> tuple[int, int, int] | None:
    """Return what differs once a file has changed, None where it cannot be looked at."""
    try:
        found = path.stat()
    except OSError:
        return None
    # not mtime, which stays as it is when others lose the right to change the file
    return found.st_ctime_ns, found.st_size, found.st_ino


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
