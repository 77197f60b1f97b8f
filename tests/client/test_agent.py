"""The whole agent when it is told to end: by its kill file, by a signal, by a disk that is full.

Folder, log, alliance service and decisions are the real ones. What carries messages and what trains
is made here, so that a test says how long each takes. Where a process must end by force, the agent
runs in a process of its own.
"""

import contextlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from tests.federation.lying_coordinator import (
    SITES,
    LyingTrainer,
    approve,
    copy,
    join,
    lying_coordinator,
    make_study,
)

from huizhen.client import agent, training_site
from huizhen.client.flower import FleetError, Request
from huizhen.client.standing import Standing
from huizhen.client.trainer import Code, TrainerError
from huizhen.protocol.errors import StorageError
from huizhen.server.desk import now
from huizhen.storage.audit import AuditLog

SECONDS = 20
SITE_STOPPED = 75


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory):
    with lying_coordinator(tmp_path_factory.mktemp("alliance")) as made:
        yield made


@pytest.fixture(scope="module")
def joined(coordinator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sites")
    return {site: join(coordinator, folder, site) for site in SITES}["North"]


@pytest.fixture(scope="module")
def asked(coordinator, joined):
    """The announcement of a study's first round, which North has approved."""
    offered = coordinator.offer(make_study())
    approve(joined, offered)
    return coordinator.open(offered)


@pytest.fixture
def home(joined, asked, tmp_path):
    """North's folder; each test has its own."""
    place = type(joined)(tmp_path / "site")
    copy(joined.folder, place.folder)
    return place


class SlowFleet:
    """A connection that brings one announcement, and takes the answer as slowly as a test says."""

    node = 7

    def __init__(self, asked):
        self.requests = [Request(asked.document, asked.adapter, 1, None)]
        self.is_sending, self.may_arrive = threading.Event(), threading.Event()
        self.is_aborted = False
        self.arrived = []

    @contextlib.contextmanager
    def connect(self, *_, **__):
        yield self

    def receive(self):
        return self.requests.pop() if self.requests else None

    def reply(self, request, document, payload=b""):
        self.is_sending.set()
        assert self.may_arrive.wait(SECONDS)
        if self.is_aborted:
            raise FleetError("unreachable", "the connection was cut here")
        self.arrived.append(payload)

    def abort(self):
        self.is_aborted = True
        self.may_arrive.set()


class SlowTrainer(LyingTrainer):
    """Trains until it is stopped, if a test says so."""

    is_slow = False
    is_training, is_stopped = threading.Event(), threading.Event()

    def train(self, announcement, round, kept):
        if self.is_slow:
            self.is_training.set()
            assert self.is_stopped.wait(SECONDS)
            raise TrainerError(Code.STOPPED)
        return super().train(announcement, round, kept)

    def stop(self):
        self.is_stopped.set()


@pytest.fixture
def fleet(asked, monkeypatch):
    made = SlowFleet(asked)
    monkeypatch.setattr(agent, "connect", made.connect)
    return made


@pytest.fixture
def trainer(monkeypatch):
    for name in ("is_training", "is_stopped"):
        monkeypatch.setattr(SlowTrainer, name, threading.Event())
    monkeypatch.setattr(
        training_site,
        "WorkerTrainer",
        lambda study, start, *_, **__: SlowTrainer(study, start.site),
    )
    return SlowTrainer


class Running:
    """An agent at work in a thread."""

    def __init__(self, home):
        self.agent, self.stop = agent.Agent(home, clock=now), threading.Event()
        self.error = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        try:
            self.agent.run(self.stop)
        except Exception as error:  # noqa: BLE001  # the test looks at it
            self.error = error

    def has_ended(self, seconds=SECONDS):
        self._thread.join(seconds)
        return not self._thread.is_alive()


@pytest.fixture
def run(home, fleet, trainer, monkeypatch):
    """Start the agent on the folder; at the end of a test it is not running any more."""
    with contextlib.ExitStack() as stack:

        def start():
            made = Running(home)
            stack.callback(made.has_ended)
            stack.callback(made.stop.set)
            stack.callback(fleet.may_arrive.set)
            return made

        monkeypatch.setattr(agent, "STOP_SECONDS", SECONDS)  # no test of these ends by force
        yield start


def events(home):
    with AuditLog.open(home.audit) as log:
        return [one.event for one in log.entries()]


def stop_file(home, file):
    """Have the policy name another kill file."""
    place = home.folder / "policy.toml"
    text = place.read_text()
    assert 'file = "STOP"' in text
    place.write_text(text.replace('file = "STOP"', f'file = "{file}"'))


# The kill file.


def test_eg_6_the_kill_file_cuts_off_what_is_being_sent(run, fleet, home):
    running = run()
    assert fleet.is_sending.wait(SECONDS)
    (home.folder / "STOP").touch()
    assert running.has_ended()
    assert running.agent.ended == "stopped"
    assert fleet.arrived == []
    assert events(home)[-1] == "work_stopped"


def test_eg_6_the_kill_file_is_seen_after_a_signal_too(run, fleet, home):
    running = run()
    assert fleet.is_sending.wait(SECONDS)
    running.stop.set()
    assert not running.has_ended(0.5)
    (home.folder / "STOP").touch()
    assert running.has_ended()
    assert running.agent.ended == "stopped"
    assert fleet.arrived == []


@pytest.mark.parametrize("file", ["HALT", "STOP"])
def test_eg_6_the_kill_file_of_the_present_policy_counts_and_stop_always(run, fleet, home, file):
    running = run()
    assert fleet.is_sending.wait(SECONDS)
    stop_file(home, "HALT")
    (home.folder / file).touch()
    assert running.has_ended()
    assert running.agent.ended == "stopped"
    assert fleet.arrived == []


def test_eg_6_a_policy_that_cannot_be_used_leaves_the_kill_file_of_the_one_before(run, fleet, home):
    stop_file(home, "HALT")
    running = run()
    assert fleet.is_sending.wait(SECONDS)
    (home.folder / "policy.toml").write_text("no policy")
    assert not running.has_ended(0.5)
    (home.folder / "HALT").touch()
    assert running.has_ended()
    assert running.agent.ended == "stopped"


@pytest.mark.parametrize("file", ["HALT", "STOP"])
def test_eg_6_an_agent_does_not_begin_while_a_kill_file_is_there(run, fleet, home, file):
    stop_file(home, "HALT")
    (home.folder / file).touch()
    running = run()
    assert running.has_ended()
    assert running.agent.ended == "stopped"
    assert fleet.requests
    assert "work_resumed" not in events(home)


def test_eg_6_a_full_disk_does_not_change_how_a_stopped_agent_ends(run, fleet, home, monkeypatch):
    """Another code than 75 would have systemd start it again."""
    running = run()
    assert fleet.is_sending.wait(SECONDS)

    def full(*_, **__):
        raise StorageError("disk is full")

    monkeypatch.setattr(AuditLog, "append", full)
    monkeypatch.setattr(agent, "write_whole", full)
    (home.folder / "STOP").touch()
    assert running.has_ended()
    assert (running.agent.ended, running.error) == ("stopped", None)


_AGENT = """
import contextlib, datetime, pathlib, signal, sys, threading, time
from huizhen.client import agent
from huizhen.client.home import Home
from huizhen.storage.audit import AuditLog

stop, append, hung = threading.Event(), AuditLog.append, sys.argv[2]
signal.signal(signal.SIGTERM, lambda *_: stop.set())

class Fleet:
    node = 7

    @contextlib.contextmanager
    def connect(self, *_, **__):
        yield self

    def receive(self):
        print("at work", flush=True)
        time.sleep(60 if hung == "connection" else 0.1)

    def abort(self):
        pass

def hang(self, event, /, **facts):
    if event == "work_stopped" and hung == "disk":
        time.sleep(60)
    return append(self, event, **facts)

agent.connect, AuditLog.append = Fleet().connect, hang
home = Home(pathlib.Path(sys.argv[1]))
made = agent.Agent(home, clock=lambda: datetime.datetime.now(datetime.UTC))
made.run(stop)
sys.exit(agent.ENDED.get(made.ended or "", 0))
"""


@pytest.mark.parametrize(
    ("hung", "is_signalled"),
    [("connection", False), ("connection", True), ("disk", False)],
    ids=["connection", "connection, after a signal", "disk"],
)
def test_eg_6_whatever_hangs_the_process_is_gone_after_a_second(home, hung, is_signalled):
    line = [sys.executable, "-c", _AGENT, str(home.folder), hung]
    process = subprocess.Popen(line, stdout=subprocess.PIPE)  # noqa: S603  # our own command
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"at work\n"
        if is_signalled:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert process.poll() is None
        (home.folder / "STOP").touch()
        begin = time.monotonic()
        assert process.wait(SECONDS) == SITE_STOPPED
        assert time.monotonic() - begin < 1
    finally:
        process.kill()
        process.communicate()


# A signal.


def test_a_signal_ends_training_and_nothing_is_sent(run, fleet, trainer, home, monkeypatch):
    monkeypatch.setattr(trainer, "is_slow", True)
    running = run()
    assert trainer.is_training.wait(SECONDS)
    running.stop.set()
    assert running.has_ended(5)
    assert (running.agent.ended, running.error) == (None, None)
    assert not fleet.is_sending.is_set()
    assert "training_ended" in events(home)


def test_a_signal_lets_what_is_being_sent_arrive(run, fleet, home):
    running = run()
    assert fleet.is_sending.wait(SECONDS)
    running.stop.set()
    assert not running.has_ended(0.5)
    fleet.may_arrive.set()
    assert running.has_ended()
    assert not fleet.is_aborted
    assert len(fleet.arrived) == 1
    assert (running.agent.ended, running.error) == (None, None)


# AU-5: without a log nothing leaves.


def refuse(monkeypatch, *refused):
    """Have the log take no entry of these events."""
    append = AuditLog.append

    def full(self, event, /, **facts):
        if event in refused:
            raise StorageError("disk is full")
        return append(self, event, **facts)

    monkeypatch.setattr(AuditLog, "append", full)


def test_au_5_a_pause_that_cannot_be_logged_ends_the_agent(run, fleet, home, monkeypatch):
    fleet.requests.clear()
    running = run()
    refuse(monkeypatch, "work_paused")
    (home.folder / "PAUSED").touch()
    assert running.has_ended()
    assert isinstance(running.error, StorageError)
    assert running.error.exit_code == 7


def test_eg_6_a_pause_that_cannot_be_logged_does_not_end_the_watch(run, fleet, home, monkeypatch):
    running = run()
    assert fleet.is_sending.wait(SECONDS)
    refuse(monkeypatch, "work_paused")
    (home.folder / "PAUSED").touch()
    assert running.stop.wait(SECONDS)
    (home.folder / "STOP").touch()
    assert running.has_ended()
    assert running.agent.ended == "stopped"
    assert fleet.arrived == []


def test_au_5_an_agent_that_cannot_log_its_standing_ends(run, fleet, monkeypatch):
    def refresh(self, **_):
        raise StorageError("disk is full")

    monkeypatch.setattr(Standing, "refresh", refresh)
    fleet.requests.clear()
    running = run()
    assert running.has_ended()
    assert isinstance(running.error, StorageError)


def test_an_error_that_nobody_foresaw_does_not_end_the_reports(run, fleet, monkeypatch, caplog):
    reports = []

    def refresh(self, **_):
        reports.append(time.monotonic())
        if len(reports) > 1:
            running.stop.set()
        raise KeyError("unforeseen")

    monkeypatch.setattr(Standing, "refresh", refresh)
    monkeypatch.setattr(agent, "REPORT_SECONDS", 0.1)
    fleet.requests.clear()
    running = run()
    assert running.has_ended()
    assert len(reports) > 1
    assert "KeyError" in caplog.text
    assert running.error is None
