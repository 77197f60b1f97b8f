"""Every part is killed at every stage, and the study finishes; nothing counts twice.

Each case runs a private study of its own on one real federation (processes, TLS, Flower) and then
asks: are all rounds committed, is each site counted at most once a round, has each ledger charged
at least what was counted, and do all logs hang together? How long each took to recover stands in
docs/reliability.md.
"""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from datetime import timedelta

import pytest
from tests.federation.conftest import SITES, study_text
from tests.federation.fault_proxy import FaultProxy

from huizhen.client.home import Home as SiteHome
from huizhen.client.joining import request_of
from huizhen.client.ledger import Ledger
from huizhen.protocol.audit_checkpoints import key_ids
from huizhen.protocol.statements import Record
from huizhen.server.authority import pem
from huizhen.server.desk import load_keys, now, open_desk
from huizhen.server.home import Home
from huizhen.server.recompute import recompute
from huizhen.server.studies import find, offered
from huizhen.simulations.live import paused
from huizhen.storage.audit import AuditLog

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
SECONDS = 240


@pytest.fixture
def recovery(record_property):
    """Waits after what is done in ``with`` for the next round, and notes how long that took.

    The seconds, from the beginning of ``with``, are shown at the end and stand in
    docs/reliability.md.
    """

    @contextlib.contextmanager
    def measured(live, digest):
        before, _ = live.round_of(digest)
        begin = time.monotonic()
        yield
        live.wait_for(digest, before + 1, seconds=SECONDS)
        record_property("seconds to recover", round(time.monotonic() - begin, 1))

    return measured


@pytest.fixture(autouse=True)
def mended(federation):
    """Leave to the next case what this one found, also when it fails."""
    yield
    for site in SITES:
        (federation.home_of(site) / "site" / "STOP").unlink(missing_ok=True)
        if federation.addresses(site) != federation.addresses_given:
            if federation.is_running(site):
                federation.end(site)
            federation.set_addresses(site, federation.addresses_given)
    federation.mend()


def finish(live, digest):
    """Wait for the end of a study and check everything that must hold then."""
    live.wait_until_finished(digest, seconds=SECONDS)
    counted = dict.fromkeys(SITES, 0)
    with open_desk(Home(live.folder / "coordinator-home" / "coordinator")) as desk:
        stored = desk.store.rounds.records(digest)
        key = desk.registry.trust().coordinator
        chain = [Record.read(one.document, key) for one in stored]
        assert [one.round for one in chain] == list(range(1, len(chain) + 1))
        for one in chain:
            sites = [each.site for each in one.counted]
            assert len(set(sites)) == len(sites)
            assert {*sites, *(each.site for each in one.absent)} == set(SITES)
            for each in one.counted:
                counted[each.site] += 1
                assert desk.objects.has(each.payload)
                receipt = desk.store.updates.receipt(digest, one.round, each.site, each.payload)
                assert receipt is not None  # nothing is dropped in silence
        again = list(recompute(desk, offered(desk, find(desk, digest))))
        assert [one.problem for one in again] == [""] * len(chain)
    for site in SITES:
        folder = live.home_of(site) / "site"
        with Ledger.open(folder / "ledger.sqlite") as ledger:
            totals = ledger.verify()
            [study] = [one for one in totals.studies if one.study == digest]
            assert study.rounds_charged >= counted[site]
        AuditLog.open(folder / "audit.sqlite").shut()
    return chain


def wait(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)


def updates(live, digest, round):
    with live.store() as store:
        return [one.site for one in store.updates.updates(digest, round)]


def code(live, site):
    return json.loads((live.home_of(site) / "site" / "run" / "status.json").read_bytes())["code"]


def kill_part(live, part):
    os.kill(live.child(part), signal.SIGKILL)


def restart(live, name):
    live.kill(name)
    live.start_coordinator() if name == "coordinator" else live.start_site(name)


def test_nothing_is_killed(federation):
    chain = finish(federation, federation.offer(study_text("quiet")))
    assert all(len(one.counted) == 3 for one in chain)


def test_each_log_is_witnessed_by_the_coordinator_and_two_sites(federation):
    """The coordinator's own by two sites; all look at each other every ten seconds."""
    logs = [federation.home_of(site) / "site" / "audit.sqlite" for site in SITES]
    logs.append(federation.folder / "coordinator-home" / "coordinator" / "audit.sqlite")

    def are_witnessed():
        found = []
        for log in logs:
            with AuditLog.open(log) as opened:
                found.append(max(len(set(key_ids(one))) for one in opened.checkpoints()))
        return found == [4, 4, 4, 3]  # with their own

    wait(are_witnessed, 90)


def test_the_coordinator_is_killed_before_it_can_aggregate(federation, recovery):
    with paused(federation.pid("East")):
        digest = federation.offer(study_text("before"))
        wait(lambda: set(updates(federation, digest, 1)) == {"North", "South"})
        recovers = contextlib.ExitStack()
        recovers.enter_context(recovery(federation, digest))
        restart(federation, "coordinator")
    recovers.close()
    chain = finish(federation, digest)
    assert all(len(one.counted) == 3 for one in chain)


def test_the_coordinator_is_killed_while_it_aggregates(federation, recovery):
    """At moments spread over a round: some of them fall between the last update and the commit."""
    digest = federation.offer(study_text("during", rounds=8))
    for number in range(4):
        federation.wait_for(digest, number + 1, seconds=SECONDS)
        time.sleep(0.3 * number)
        with recovery(federation, digest):
            restart(federation, "coordinator")
    finish(federation, digest)


def test_the_coordinator_is_killed_right_after_it_committed(federation, recovery):
    digest = federation.offer(study_text("after"))
    federation.wait_for(digest, 2, seconds=SECONDS)
    with recovery(federation, digest):
        restart(federation, "coordinator")
    finish(federation, digest)


def test_the_rounds_process_is_killed(federation, recovery):
    digest = federation.offer(study_text("rounds"))
    federation.wait_for(digest, 1, seconds=SECONDS)
    with recovery(federation, digest):
        kill_part(federation, "rounds")
    finish(federation, digest)


def test_the_superlink_is_killed(federation, recovery):
    digest = federation.offer(study_text("superlink"))
    federation.wait_for(digest, 1, seconds=SECONDS)
    with recovery(federation, digest):
        kill_part(federation, "superlink")
    finish(federation, digest)


def test_a_site_is_killed_while_it_trains(federation, recovery):
    """It has charged its ledger: the round is trained again under the same charge."""
    digest = federation.offer(study_text("training", steps=400, rounds=2))
    ledger = federation.home_of("North") / "site" / "ledger.sqlite"

    def is_charged():
        with contextlib.suppress(Exception), Ledger.open(ledger) as opened:
            return any(
                one.study == digest and one.rounds_charged for one in opened.totals().studies
            )
        return False

    wait(is_charged)
    with recovery(federation, digest):
        restart(federation, "North")
    chain = finish(federation, digest)
    assert all(len(one.counted) == 3 for one in chain)
    with Ledger.open(ledger) as opened:
        [study] = [one for one in opened.totals().studies if one.study == digest]
        assert study.rounds_charged == 2  # not three


def test_a_site_is_killed_while_it_uploads(federation, recovery):
    """The edge stands still while the update is on its way; the same bytes are sent again."""
    digest = federation.offer(study_text("upload"))
    federation.wait_for(digest, 1, seconds=SECONDS)
    with paused(federation.child("superlink")):
        time.sleep(3)
        restart(federation, "North")
    with recovery(federation, digest):
        pass  # the edge moves again
    finish(federation, digest)


def test_a_site_is_slower_than_the_deadline(federation):
    digest = federation.offer(study_text("slow", quorum=2, minutes=0.2))
    with paused(federation.pid("East")):
        federation.wait_for(digest, 2, seconds=SECONDS)
    chain = finish(federation, digest)
    late = [one for one in chain if "East" not in {each.site for each in one.counted}]
    assert late
    assert {each.code for one in late for each in one.absent} <= {"no_answer", "behind", "late"}


def test_everything_is_killed_and_started_again(federation, recovery):
    digest = federation.offer(study_text("everything"))
    federation.wait_for(digest, 1, seconds=SECONDS)
    for name in ("coordinator", *SITES):
        federation.kill(name)
    with recovery(federation, digest):
        for name in SITES:
            federation.start_site(name)
        time.sleep(2)
        federation.start_coordinator()
    chain = finish(federation, digest)
    assert all(len(one.counted) == 3 for one in chain)


def test_a_site_stops_by_its_kill_file_and_goes_on_when_it_is_taken_away(federation, recovery):
    digest = federation.offer(study_text("stop", quorum=3))
    federation.wait_for(digest, 1, seconds=SECONDS)
    federation.site("South", "stop")
    begin = time.monotonic()
    wait(lambda: not federation.is_running("South"), 10)
    assert time.monotonic() - begin < 5
    assert federation.forget("South") == 75
    before = federation.round_of(digest)[0]
    time.sleep(3)
    assert federation.round_of(digest)[0] <= before + 1  # South's last answer may have been there
    federation.site("South", "stop", "--off")
    with recovery(federation, digest):
        federation.start_site("South")
    finish(federation, digest)


def test_the_network_is_cut_for_a_minute(federation, recovery):
    terms = federation.addresses("South")
    with contextlib.ExitStack() as proxies:
        made = {
            name: proxies.enter_context(FaultProxy(("127.0.0.1", int(address.split(":")[1]))))
            for name, address in terms.items()
        }
        federation.end("South")
        federation.set_addresses(
            "South", {name: f"127.0.0.1:{proxy.port}" for name, proxy in made.items()}
        )
        federation.start_site("South")
        digest = federation.offer(study_text("cut"))
        federation.wait_for(digest, 1, seconds=SECONDS)
        for proxy in made.values():
            proxy.cut()
        before = federation.round_of(digest)[0]
        time.sleep(60)
        assert federation.round_of(digest)[0] <= before + 1  # the quorum is three
        with recovery(federation, digest):
            for proxy in made.values():
                proxy.heal()
        chain = finish(federation, digest)
        federation.end("South")
    assert all(len(one.counted) == 3 for one in chain)


_FAST = """
import datetime, flwr.supercore.date as date, huizhen.cli.site_commands as commands
shift, flower, own = datetime.timedelta(seconds=10), date.now, commands.clock
date.now, commands.clock = (lambda: flower() + shift), (lambda: own() + shift)
"""


def test_a_clock_is_ten_seconds_fast(federation, recovery):
    """Flower does not admit such a node; the others go on, and it does when the clock is right."""
    federation.end("South")
    try:
        federation.start_site("South", before=_FAST)
        wait(lambda: code(federation, "South") == "not_admitted")
        digest = federation.offer(study_text("clock", quorum=2, minutes=0.2))
        federation.wait_for(digest, 1, seconds=SECONDS)
    finally:
        federation.end("South")
    with recovery(federation, digest):
        federation.start_site("South")
    chain = finish(federation, digest)
    assert {"South"} == {each.site for each in chain[0].absent}


def test_a_certificate_has_expired(federation, record_property):
    """As after a month without power; the identity key asks for another one."""
    home = SiteHome(federation.home_of("North") / "site")
    federation.end("North")
    keys = load_keys(Home(federation.folder / "coordinator-home" / "coordinator"))
    old = keys.authority.for_site("North", request_of(home), now() - timedelta(days=30))
    home.certificate.write_bytes(pem(old))
    begin = time.monotonic()
    federation.start_site("North")

    def is_renewed():
        found = home.has_certificate()
        return found is not None and found.not_valid_after_utc > now()

    wait(is_renewed)
    record_property("seconds to recover", round(time.monotonic() - begin, 1))
    finish(federation, federation.offer(study_text("expired")))


needs_mount = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mount") is None,
    reason="a small disk is a tmpfs, which only root may mount",
)


@contextlib.contextmanager
def small_disk(folder, mebibytes):
    """Put a folder on a disk of its own that has little room left."""
    copy = folder.with_name(folder.name + "-copy")
    folder.rename(copy)
    folder.mkdir(mode=0o700)
    shell("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", folder)
    shell("cp", "-a", f"{copy}/.", folder)
    try:
        yield folder
    finally:
        (folder / "filler").unlink(missing_ok=True)
        shell("cp", "-a", f"{folder}/.", copy)
        shell("umount", "-l", folder)  # whoever failed may still be in it
        folder.rmdir()
        copy.rename(folder)


def committed(folder, digest):
    """Return how many rounds are committed, by a reader that needs no room."""
    place = folder / "coordinator" / "store.sqlite"
    with contextlib.closing(sqlite3.connect(f"file:{place}?mode=ro", uri=True)) as database:
        query = "SELECT count(*) FROM records WHERE study = ?"
        return database.execute(query, (digest,)).fetchone()[0]


def shell(*words):
    subprocess.run(words, check=True)  # noqa: S603 - our own words


def fill(folder):
    """Take all room that is left, and return the file that has it."""
    place = folder / "filler"
    with place.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    return place


@needs_mount
def test_the_disk_of_a_site_is_full(federation, recovery):
    """Its log cannot be written, so nothing leaves; with room it goes on."""
    federation.end("East")
    with small_disk(federation.home_of("East"), 24) as folder:
        federation.start_site("East")
        digest = federation.offer(study_text("full", rounds=6))
        federation.wait_for(digest, 1, seconds=SECONDS)
        filler = fill(folder)
        wait(lambda: not federation.is_running("East"))
        assert federation.forget("East") == 7  # StorageError
        stood = federation.round_of(digest)[0]
        time.sleep(5)
        assert federation.round_of(digest)[0] == stood
        with recovery(federation, digest):
            filler.unlink()
            federation.start_site("East")
        finish(federation, digest)
        federation.end("East")


@needs_mount
def test_the_disk_of_the_coordinator_is_full(federation, recovery):
    """No round is committed that is not on the disk; with room it goes on by itself."""
    federation.end("coordinator")
    with small_disk(federation.folder / "coordinator-home", 48) as folder:
        federation.start_coordinator()
        digest = federation.offer(study_text("no room", rounds=6))
        federation.wait_for(digest, 1, seconds=SECONDS)
        filler = fill(folder)
        time.sleep(10)
        stood = committed(folder, digest)
        time.sleep(5)
        assert committed(folder, digest) == stood < 6
        filler.unlink()  # before the store is looked at, which needs room
        with recovery(federation, digest):
            pass
        finish(federation, digest)
        federation.end("coordinator")
