"""Sites in the actors of Flower's simulation engine: the same results as in one process."""

import json
import os
import subprocess
import sys

import pytest

from huizhen.protocol import errors
from huizhen.protocol.errors import ConfigError, PrivacyError
from huizhen.simulations import flower_app, flower_engine
from huizhen.simulations.experiment import load_experiment
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
    yield
    flower_app._actor.cache_clear()
    flower_app._trainer_of.cache_clear()


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
    with pytest.raises(flower_engine.ActorError, match="at site 'North': the actor died: if it"):
        run_experiment(experiment, tmp_path / "run", home=home)


def test_resources_that_no_machine_has_are_refused(
    experiment_file, home, tmp_path, monkeypatch, here
):
    def build(self, app):
        raise ValueError("ActorPool is empty")

    monkeypatch.setattr(Here, "build", build)
    lines = [*LINES, ("[simulation]", '[simulation]\nengine = "flower"\ncpus_per_site = 999')]
    with pytest.raises(ConfigError, match="a site needs 999 processors and 0 GPUs, no machine"):
        run_experiment(load_experiment(experiment_file(*lines)), tmp_path / "run", home=home)


@pytest.mark.parametrize("terms", ["cpus_per_site = 0", "gpus_per_site = -1", "engine = 'spark'"])
def test_terms_that_make_no_sense_are_refused(experiment_file, terms):
    with pytest.raises(ConfigError, match=r"cpus_per_site is|engine"):
        load_experiment(experiment_file(("[simulation]", f"[simulation]\n{terms}")))


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
