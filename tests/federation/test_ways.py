"""Other ways to set a federation up: hospitals behind a CONNECT proxy, and a PostgreSQL."""

import contextlib
import os
import re
import signal
from pathlib import Path

import pytest
from tests.federation.conftest import SITES, records, study_text
from tests.federation.fault_proxy import ConnectProxy
from tests.federation.test_kill_matrix import SECONDS, finish, restart, updates, wait
from tests.server.conftest import postgresql

from huizhen.simulations.live import Live, paused

__all__ = ["postgresql"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
HOST = "coordinator.invalid"  # RFC 6761: no name server knows it


@contextlib.contextmanager
def started(folder, home, *, network=None, **options):
    """Give a coordinator and three sites that run."""
    with Live(folder, bases=home, **options) as live:
        live.found()
        for site in SITES:
            place = folder / f"{site}.jsonl"
            place.write_text(records(site), "utf-8")
            live.add_site(site, place, unit="patient", epsilon=1e6, min_sites=2, network=network)
            live.start_site(site)
        yield live


def listening(process):
    """Return the sockets on which a process waits for connections, by inode."""
    held = set()
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):
            held |= set(re.findall(r"socket:\[(\d+)\]", str(descriptor.readlink())))
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/{process}/net/{name}").read_text("ascii").splitlines()[1:]
    ]
    return {line[9] for line in lines if line[3] == "0A" and line[9] in held}


def test_everything_goes_through_the_proxy_in_small_chunks(tmp_path, home):
    """Enrolment, the alliance service and Flower; the sites have no other way to this name."""
    with ConnectProxy({HOST: "127.0.0.1"}, delay=0.02) as proxy:
        network = {
            'proxy = "" ': f'proxy = "http://127.0.0.1:{proxy.port}" ',
            "chunk_kib = 5120 ": "chunk_kib = 64 ",
        }
        with started(tmp_path / "live", home, network=network, host=HOST) as live:
            chain = finish(live, live.offer(study_text("proxy", rounds=2)))
            assert all(len(one.counted) == 3 for one in chain)
            assert proxy.asked == set(live.addresses_given.values())
            assert listening(live.pid("North")) == set()  # a firewall need let nothing in
            assert listening(live.pid("coordinator"))  # whose ports are found this way
            found = live.site("North", "doctor")
            assert {"proxy", "tls fleet", "tls service"} <= {
                one["name"] for one in found["findings"] if one["state"] == "ok"
            }


@pytest.fixture(scope="module")
def on_postgresql(tmp_path_factory, home, postgresql):
    """A federation whose coordinator keeps its store in a PostgreSQL."""
    folder = tmp_path_factory.mktemp("postgresql")
    store = postgresql.url(postgresql.new())
    with started(folder, home, store=store) as live:
        yield live


def test_on_postgresql_the_coordinator_is_killed_before_it_can_aggregate(on_postgresql):
    live = on_postgresql
    with paused(live.pid("East")):
        digest = live.offer(study_text("before"))
        wait(lambda: set(updates(live, digest, 1)) == {"North", "South"})
        restart(live, "coordinator")
    chain = finish(live, digest)
    assert all(len(one.counted) == 3 for one in chain)


def test_on_postgresql_the_rounds_process_is_killed_while_it_aggregates(on_postgresql):
    live = on_postgresql
    digest = live.offer(study_text("during"))
    for number in range(3):
        live.wait_for(digest, number + 1, seconds=SECONDS)
        os.kill(live.child("rounds"), signal.SIGKILL)
    finish(live, digest)


def test_the_postgresql_itself_is_killed(on_postgresql, postgresql):
    """It comes back from its own log; the coordinator does without it until then."""
    live = on_postgresql
    digest = live.offer(study_text("database"))
    live.wait_for(digest, 1, seconds=SECONDS)
    postgresql.kill()
    postgresql.run()
    live.mend()
    finish(live, digest)
