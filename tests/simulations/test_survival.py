"""A federation of three made-up hospitals that learns who has the event sooner."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from huizhen.protocol.errors import ConfigError
from huizhen.simulations.experiment import load_experiment
from huizhen.simulations.runner import run_experiment

EXPERIMENT = """
[study]
name = "time to event"
[task]
kind = "survival"
label = "died"
labels = ["0", "1"]
time = "days"
[task.features]
age = [0, 100]
noise = [-3, 3]
[privacy]
unit = "none"
[strategy]
name = "fedavg"
[rounds]
count = 8
local_epochs = 2
batch_size = 32
learning_rate = 0.3
optimizer = "sgd"
momentum = 0.0
[simulation]
data = "DATA"
site = "hospital"
patient = "id"
split = "split"
arms = ["local", "pooled", "federated"]
"""


def patients(died=None, hospitals=3, count=60):
    """Older patients die sooner: a hazard that doubles every ten years."""
    rng = np.random.default_rng(3)
    rows = []
    for i in range(hospitals * count):
        age, noise = rng.uniform(20, 90), rng.normal()
        time = rng.exponential(1000 * 2 ** (-(age - 50) / 10))
        end = rng.uniform(100, 3000)
        rows.append(
            {"id": i, "hospital": "ABC"[i % hospitals], "split": "test" if i % 5 == 0 else "train",
             "age": age, "noise": noise, "days": min(time, end),
             "died": int(time < end) if died is None else died}
        )  # fmt: skip
    return rows


@pytest.fixture
def experiment(tmp_path):
    def write(rows, *changes):
        data = tmp_path / "records.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        text = EXPERIMENT.replace("DATA", str(data))
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "experiment.toml"
        path.write_text(text, "utf-8")
        return load_experiment(path)

    return write


def test_the_federation_ranks_patients_by_their_risk(experiment, tmp_path):
    found = run_experiment(experiment(patients()), tmp_path / "run")
    arms = found["arms"]
    for arm in ("pooled", "federated"):
        assert arms[arm]["metrics"].keys() == {"c_index"}
        assert arms[arm]["metrics"]["c_index"] > 0.7
    assert arms["federated"]["rounds"][-1]["loss"] < arms["federated"]["rounds"][0]["loss"]
    folder = tmp_path / "run" / "federated"
    weight = load_file(folder / "model.safetensors")["head.weight"]
    assert weight.shape == (1, 2)
    assert weight[0, 0] > 5 * abs(weight[0, 1])  # age, then noise
    about = json.loads((folder / "features.json").read_text("utf-8"))
    assert (about["label"], about["time"]) == ("died", "days")
    assert "hazard = " in (folder / "README.md").read_text("utf-8")


def test_a_test_set_in_which_nobody_can_be_compared_is_refused_before_anything_is_trained(
    experiment, tmp_path
):
    rows = [row | {"died": 0} if row["split"] == "test" else row for row in patients()]
    with pytest.raises(ConfigError, match="no two test records can be compared"):
        run_experiment(experiment(rows), tmp_path / "run")
    assert not list((tmp_path / "run" / "state").iterdir())


def test_scaffold_trains_it_too(experiment, tmp_path):
    terms = ('name = "fedavg"', 'name = "scaffold"'), ("count = 8", "count = 8\nlength = 'steps'")
    found = run_experiment(experiment(patients(), *terms), tmp_path / "run")
    assert found["arms"]["federated"]["metrics"]["c_index"] > 0.7
