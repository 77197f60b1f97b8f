"""What the doctor finds where something is wrong: each check can fail, and says what to do."""

import shutil
import sqlite3
from collections import namedtuple
from datetime import timedelta

import pytest
from tests.federation.lying_coordinator import (
    SITES,
    approve,
    copy,
    join,
    lying_coordinator,
    make_study,
)

from huizhen.client import doctor
from huizhen.client.home import Home
from huizhen.client.sandbox import Walls
from huizhen.learning.bases import resolve
from huizhen.server.desk import now
from huizhen.simulations.live import edit, free_ports


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """A coordinator that runs, and North, which has joined it and approved a study on ``tiny``."""
    with lying_coordinator(tmp_path_factory.mktemp("alliance")) as coordinator:
        homes = {name: join(coordinator, tmp_path_factory.mktemp("sites"), name) for name in SITES}
        approve(homes["North"], coordinator.offer(make_study()))
        yield homes["North"]


@pytest.fixture
def home(joined, tmp_path):
    """North's folder, with records and the base."""
    place = Home(tmp_path / "home" / "site")
    copy(joined.folder, place.folder)
    for name in ("records.jsonl", "other.jsonl"):
        (place.folder / name).touch()
    resolve("tiny", home=place.folder.parent)
    return place


@pytest.fixture(autouse=True)
def _walls(monkeypatch):
    monkeypatch.setattr(doctor, "probe", lambda: Walls("full", "walls for a test"))


def found(home, name, clock=now):
    [one] = [one for one in doctor.examine(home, clock) if one.name == name]
    return one


def failure(home, name, clock=now):
    one = found(home, name, clock)
    assert (one.state, bool(one.todo)) == ("failure", True), one
    return f"{one.text} → {one.todo}"


def aim(home, service):
    """Have the settings name another place of the service."""
    terms = home.settings().coordinator
    edit(home.folder / "site.toml", {f'service = "{terms.service}"': f'service = "{service}"'})


def test_where_all_is_well_no_check_fails(home):
    edit(
        home.folder / "policy.toml",
        {'data = "other.jsonl"': 'unit = "none"\ndata = "other.jsonl"'},
    )
    terms = home.settings().coordinator  # the fixture has no Flower: its address is the service's
    edit(home.folder / "site.toml", {terms.fleet: terms.service})
    states = {one.name: (one.state, one.todo) for one in doctor.examine(home, now)}
    assert set(states.values()) == {("ok", "")}, states
    assert {"keys", "bases", "dns service", "tls service", "tls fleet", "clock"} <= states.keys()


def test_a_key_that_others_may_read(home):
    home.key("tls").chmod(0o644)
    assert "chmod 600" in failure(home, "keys")


def test_a_policy_that_is_wrong(home):
    edit(home.folder / "policy.toml", {"max_rounds_per_day": "max_rounds_per_week"})
    said = failure(home, "policy")
    assert "did you mean 'max_rounds_per_day'" in said
    assert said.endswith("→ mend policy.toml, or restore it")


def test_records_that_are_missing(home):
    (home.folder / "other.jsonl").unlink()
    assert "other.jsonl' is not there → export the records" in failure(home, "policy")


def test_walls_that_are_weaker_than_the_policy_wants(home, monkeypatch):
    monkeypatch.setattr(doctor, "probe", lambda: Walls("network", "half a wall"))
    assert "policy.toml requires 'full' → install bubblewrap" in failure(home, "sandbox")


def test_a_disk_that_is_full(home, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, (1 << 30) - 1))
    assert "1.0 GiB are free" in failure(home, "disk")


def test_a_log_that_was_changed(home):
    with sqlite3.connect(home.audit) as database:
        [(name,)] = database.execute("SELECT name FROM sqlite_master WHERE name = 'entries'")
        for (trigger,) in database.execute(
            "SELECT name FROM sqlite_master WHERE type = 'trigger'"
        ).fetchall():
            database.execute(f"DROP TRIGGER {trigger}")
        database.execute(f"DELETE FROM {name} WHERE rowid = 2")  # noqa: S608
    assert "look who changed the log" in failure(home, "audit")


def test_a_ledger_that_is_missing(home):
    assert "huizhen site ledger create" in failure(home, "ledgers")


def test_a_base_that_is_missing_is_named_and_not_fetched(home):
    place = home.folder.parent / "bases"
    shutil.rmtree(place)
    assert "'tiny' of study" in (said := failure(home, "bases"))
    assert said.endswith("is not here → huizhen models fetch tiny")
    assert not place.exists()


def test_a_base_that_was_changed(home):
    for file in (home.folder.parent / "bases" / "tiny").glob("*.safetensors"):
        file.write_bytes(file.read_bytes() + b"x")
    assert "huizhen models fetch the base again" in failure(home, "bases")


def test_a_name_without_an_address(home):
    aim(home, "coordinator.invalid:8444")
    assert "'coordinator.invalid' has no address" in failure(home, "dns service")


def test_a_port_where_nobody_listens(home):
    port = free_ports(1)
    aim(home, f"127.0.0.1:{port}")
    assert f"127.0.0.1:{port} cannot be reached" in failure(home, "tls service")
    assert "connection to the service" in failure(home, "clock")


def test_a_server_of_another_authority(home, tmp_path_factory):
    with lying_coordinator(tmp_path_factory.mktemp("another")) as other:
        home.authority.write_bytes(other.desk.home.authority.read_bytes())
        assert "does not prove to be the coordinator" in failure(home, "tls service")


def test_an_authority_that_is_lost(home):
    home.authority.unlink()
    assert "join anew" in failure(home, "tls service")


def test_a_proxy_where_nobody_listens(home):
    edit(home.folder / "site.toml", {'proxy = "" ': f'proxy = "http://127.0.0.1:{free_ports(1)}" '})
    assert "mend [network] proxy" in failure(home, "proxy")


def test_a_certificate_that_is_missing_or_over(home):
    assert found(home, "certificate", lambda: now() + timedelta(days=8)).state == "warning"
    home.certificate.unlink()
    assert "huizhen site join INVITATION" in failure(home, "certificate")


@pytest.mark.parametrize("seconds", [30, -300])
def test_a_clock_that_is_wrong(home, seconds):
    said = failure(home, "clock", lambda: now() + timedelta(seconds=seconds))
    assert "start a time service" in said
