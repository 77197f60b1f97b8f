"""Sites in the actors of Flower's simulation engine: the same results as in one process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.client.processes import descendants, wait_until_gone

from huizhen.protocol import errors
from huizhen.protocol.errors import ConfigError, PrivacyError
from huizhen.simulations import flower_app, flower_engine
from huizhen.simulations.experiment import load_experiment
from huizhen.simulations.flower_engine import FlowerEngine
from huizhen.simulations.runner import run_experiment

LINES = [
    ('site = "hospital"', 'site = "hospital"\narms = ["federated", "federated_dp"]'),
    ("count = 2", "count = 3"),
]
ON_FLOWER = ("[simulation]", '[simulation]\nengine = "flower"')


class Here:
    """Flower's backend in this process: one actor, which answers at once."""

    num_workers = 1

    def __init__(self, config):
        self.config = config

    def build(self, app):
        self.app = app

    def process_message(self, message, context):
        return self.app()(message=message, context=context), context

    def terminate(self):
        self.app = None


@pytest.fixture
def here(monkeypatch):
    raybackend = pytest.importorskip(
        "flwr.server.superlink.fleet.vce.backend.raybackend",
        reason="the extra simulation is not installed",
    )
    monkeypatch.setattr(raybackend, "RayBackend", Here)
    monkeypatch.setattr(FlowerEngine, "_drop_pending", lambda self, ray: None)
    yield
    flower_app._actor.cache_clear()


def adapters(folder):
    return {
        str(place.relative_to(folder)): place.read_bytes()
        for place in folder.rglob("federated/**/*.safetensors")
    }


@pytest.mark.parametrize("strategy", ["ffa_ortho", "scaffold", "svd"])
def test_the_engine_comes_to_the_same_bytes(experiment_file, home, tmp_path, here, strategy):
    lines = [*LINES, ("[rounds]", f'[strategy]\nname = "{strategy}"\n\n[rounds]')]
    if strategy == "scaffold":
        steps = "length = 'steps'\noptimizer = 'sgd'\nmomentum = 0.0"
        lines.append(("local_steps = 2", f"local_steps = 2\n{steps}"))
    found = {}
    for name, changes in (("inprocess", lines), ("flower", [*lines, ON_FLOWER])):
        experiment = load_experiment(experiment_file(*changes))
        document = run_experiment(experiment, tmp_path / name, home=home)
        found[name] = document["arms"], adapters(tmp_path / name)
    (expected, whole), (arms, same) = found["inprocess"], found["flower"]
    assert whole
    assert same == whole
    assert arms["federated"]["metrics"] == expected["federated"]["metrics"]
    assert arms["federated_dp"]["epsilon"] == expected["federated_dp"]["epsilon"]
    losses = [[one["loss"] for one in arm["federated"]["rounds"]] for arm in (arms, expected)]
    assert losses[0] == losses[1]


def test_a_run_may_go_on_with_the_other_engine(experiment_file, home, tmp_path, here, monkeypatch):
    from huizhen.simulations import federation

    own = federation._run_round
    experiment = load_experiment(experiment_file(*LINES))
    whole = run_experiment(experiment, tmp_path / "whole", home=home)

    def stopped(coordinator, state, *rest):
        if state.round == 2:
            raise KeyboardInterrupt
        return own(coordinator, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(federation, "_run_round", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(load_experiment(experiment_file(*LINES)), tmp_path / "run", home=home)
    experiment = load_experiment(experiment_file(*LINES, ON_FLOWER))
    again = run_experiment(experiment, tmp_path / "run", home=home, resume=True)
    assert again["arms"]["federated"]["metrics"] == whole["arms"]["federated"]["metrics"]


def test_what_a_site_meets_in_an_actor_is_raised_as_what_it_is(monkeypatch):
    for kind in (PrivacyError, ConfigError, errors.StorageError):
        error = flower_app.unpack_error({"error": kind.__name__, "text": "so it is"})
        assert type(error) is kind
        assert str(error) == "so it is"
    for name in ("SystemExit", "annotations", "Nothing"):
        assert type(flower_app.unpack_error({"error": name, "text": "t"})) is errors.WireError
    assert flower_app.unpack_error({"update": b""}) is None


def test_what_keeps_a_site_from_training_ends_the_run_as_without_the_engine(
    experiment_file, home, tmp_path, here, monkeypatch
):
    def refuse(*arguments, **named):
        raise PrivacyError("the model cannot be trained privately")

    monkeypatch.setattr(flower_app, "LocalTrainer", refuse)
    experiment = load_experiment(experiment_file(*LINES, ON_FLOWER))
    with pytest.raises(PrivacyError, match="the model cannot be trained privately"):
        run_experiment(experiment, tmp_path / "run", home=home)


def test_an_actor_that_is_killed_is_said_to_be_with_its_site(
    experiment_file, home, tmp_path, here, monkeypatch
):
    def killed(self, message, context):
        raise OSError("the actor died")

    monkeypatch.setattr(Here, "process_message", killed)
    experiment = load_experiment(experiment_file(*LINES, ON_FLOWER))
    with pytest.raises(flower_engine.ActorError, match="at site 'North': the actor died: mend the"):
        run_experiment(experiment, tmp_path / "run", home=home)


def test_resources_that_no_machine_has_are_refused(
    experiment_file, home, tmp_path, monkeypatch, here
):
    def build(self, app):
        raise ValueError("ActorPool is empty")

    monkeypatch.setattr(Here, "build", build)
    lines = [*LINES, ("[simulation]", '[simulation]\nengine = "flower"\ncpus_per_site = 999')]
    with pytest.raises(ConfigError, match="a site needs 999 processors, no machine"):
        run_experiment(load_experiment(experiment_file(*lines)), tmp_path / "run", home=home)


@pytest.mark.parametrize("terms", ["cpus_per_site = 0", "engine = 'spark'"])
def test_terms_that_make_no_sense_are_refused(experiment_file, terms):
    with pytest.raises(ConfigError, match=r"cpus_per_site is|engine"):
        load_experiment(experiment_file(("[simulation]", f"[simulation]\n{terms}")))


def test_another_machines_records_are_refused(experiment_file, home, tmp_path, here, monkeypatch):
    monkeypatch.setattr(flower_engine, "file_digest", lambda path: "00" * 32)
    experiment = load_experiment(experiment_file(*LINES, ON_FLOWER))
    with pytest.raises(ConfigError, match="has other bytes on another machine, or was changed"):
        run_experiment(experiment, tmp_path / "run", home=home)


def test_a_site_of_another_rank_a_share_and_metrics_are_as_without_the_engine(
    experiment_file, home, tmp_path, here
):
    sites = "[sites.North]\npatients_public = 9\nrank = 1\n[sites.South]\npatients_public = 9\n"
    lines = [
        ('site = "hospital"', 'site = "hospital"\narms = ["federated"]\nsweep_patients = [0.6]'),
        ("[simulation]", f"{sites}\n[simulation]\ncheckpointing = true"),
        ("epsilon = 8.0", "epsilon = 8.0\nmetrics_epsilon = 1.0"),
    ]
    found = {}
    for name, changes in (("inprocess", lines), ("flower", [*lines, ON_FLOWER])):
        experiment = load_experiment(experiment_file(*changes))
        document = run_experiment(experiment, tmp_path / name, home=home)
        found[name] = document, adapters(tmp_path / name)
    assert found["flower"][1] == found["inprocess"][1] != {}
    sweeps = [one[0]["sweep_patients"] for one in found.values()]
    assert [len(one) for one in sweeps] == [1, 1]
    assert found["flower"][0]["provenance"]["engine"] == "flower"


def test_values_that_are_not_finite_are_said_to_be_as_without_the_engine(
    experiment_file, home, tmp_path, here
):
    lines = [
        ('site = "hospital"', 'site = "hospital"\narms = ["federated"]'),
        ("learning_rate = 1e-2", "learning_rate = 1e30\noptimizer = 'sgd'"),
    ]
    said: list[str] = []
    for changes in (lines, [*lines, ON_FLOWER]):
        experiment = load_experiment(experiment_file(*changes))
        with pytest.raises(errors.ProtocolError) as caught:
            run_experiment(experiment, tmp_path / str(len(said)), home=home)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert said[0].endswith("nothing was sent, lower the learning rate")


@pytest.mark.slow
def test_on_ray_itself_with_one_base_for_each_actor(experiment_file, home, tmp_path):
    """Two actors of Ray's: the same adapter, to the byte, as in one process of one thread."""
    places = []
    for name, changes in (("inprocess", LINES), ("flower", [*LINES, ON_FLOWER])):
        path = experiment_file(*changes)
        places.append(tmp_path / name)
        command = [sys.executable, "-m", "huizhen.cli.main", "simulate", str(path)]
        options = ["--out", str(places[-1]), "--home", str(home), "--threads", "1", "--json"]
        done = subprocess.run(  # noqa: S603  # our own command
            [*command, *options],
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "federated" in json.loads(done.stdout)["arms"]
    assert adapters(places[0])
    assert adapters(places[1]) == adapters(places[0])


def titles(pids):
    """Return what processes call themselves."""
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def listening(pids):
    """Return the addresses on which processes take connections, as the kernel writes them."""
    own = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for place in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    own.add(str(place.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                found.add(fields[1].rsplit(":", 1)[0])
    return found


LOOPBACK = {
    "0100007F",  # 127.0.0.1
    "0000000000000000FFFF00000100007F",  # the same, in IPv6
    "00000000000000000000000001000000",  # ::1
}


@pytest.mark.slow
def test_ray_listens_on_loopback_alone_and_ctrl_c_ends_all_of_it(experiment_file, home, tmp_path):
    """While two sites train a round that would take hours."""
    path = experiment_file(
        ('site = "hospital"', 'site = "hospital"\narms = ["federated"]'),
        ("local_steps = 2", "local_steps = 2\nlocal_epochs = 100000"),
        ON_FLOWER,
    )
    command = [sys.executable, "-m", "huizhen.cli.main", "simulate", str(path)]
    process = subprocess.Popen(  # noqa: S603  # our own command
        [*command, "--out", str(tmp_path / "run"), "--home", str(home), "--threads", "1"],
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline, everyone = time.monotonic() + 120, set()
        busy: list[str] = []
        while len(busy) < 2 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
            everyone = descendants(process.pid)
            busy = [one for one in titles(everyone).values() if "ClientAppActor.run" in one]
        assert len(busy) == 2
        time.sleep(2)
        found = listening(everyone)
        assert found
        assert found <= LOOPBACK
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "every closed round is saved" in said
    assert wait_until_gone(everyone, 30)
