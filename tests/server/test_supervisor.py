"""The coordinator's process over months: certificates are renewed, logs stay small."""

import contextlib
import ssl
import sys
import threading
import time
from datetime import timedelta

import pytest
from cryptography import x509
from tests.server.test_registry import Clock

from huizhen.server import supervisor
from huizhen.server.authority import SERVER_DAYS
from huizhen.server.founding import found
from huizhen.server.home import Home
from huizhen.server.supervisor import RENEW_BEFORE, Child, up
from huizhen.simulations.live import free_ports

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
CHATTER = """
import sys, time
while True:
    print("x" * 99, flush=True)
    time.sleep(0.001)
"""


def wait_until(is_so):
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def shown(address):
    """Return the end of the certificate that a server shows to new connections."""
    host, _, port = address.rpartition(":")
    pem = ssl.get_server_certificate((host.replace("0.0.0.0", "127.0.0.1"), int(port)))  # noqa: S104
    return x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def running(tmp_path, clock, monkeypatch):
    """A coordinator that looks at its certificate all the time; its parts only sleep."""
    home, stop, ready = Home(tmp_path / "c"), threading.Event(), threading.Event()
    found(
        home, alliance="rare", names=["127.0.0.1"], first_port=free_ports(5), board=[],
        threshold=1, clock_now=clock(),
    )  # fmt: skip
    children: list[Child] = []

    def sleeping(home, link):
        children.extend(
            Child(name, SLEEP, {}, home.run / f"{name}.log") for name in ("superlink", "rounds")
        )
        return children

    monkeypatch.setattr(supervisor, "_children", sleeping)
    monkeypatch.setattr(supervisor, "RENEW_LOOK_SECONDS", 0.0)
    thread = threading.Thread(
        target=lambda: up(home, ready=lambda _: ready.set(), stop=stop, clock=clock)
    )
    thread.start()
    try:
        assert ready.wait(20)
        yield home, children
    finally:
        stop.set()
        thread.join(30)
    assert not thread.is_alive()


def test_after_a_renewal_superlink_is_started_again_and_all_show_the_new_certificate(
    running, clock
):
    home, (superlink, rounds) = running
    before, other = superlink.process, rounds.process
    listen = home.settings().listen
    first = clock.now + timedelta(days=SERVER_DAYS)
    time.sleep(0.5)
    assert superlink.process is before  # a fresh certificate is left alone
    clock.now += timedelta(days=SERVER_DAYS) - RENEW_BEFORE
    wait_until(lambda: superlink.is_up and superlink.process is not before)
    renewed = clock.now + timedelta(days=SERVER_DAYS)
    assert renewed > first
    assert {shown(one) for one in (listen.fleet, listen.service, listen.door)} == {renewed}
    assert rounds.process is other


def test_the_log_of_a_part_that_runs_is_cut_and_the_part_goes_on_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "MAX_LOG_BYTES", 10_000)
    log = tmp_path / "chatter.log"
    child = Child("chatter", [sys.executable, "-c", CHATTER], {}, log)
    with contextlib.ExitStack() as stack:
        stack.callback(child.stop)
        child.keep()
        for _ in range(2):
            wait_until(lambda: log.stat().st_size > 10_000)
            child.keep()
            assert log.stat().st_size < 10_000
        wait_until(lambda: log.stat().st_size > 0)
        assert log.read_bytes()[:5] == b"x" * 5  # it appends: no hole where the old lines were
        assert log.with_suffix(".old").stat().st_size > 10_000
