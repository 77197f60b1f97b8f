"""FLamby's tables: what is read of their files, and a federation of theirs in our code."""

import json
from pathlib import Path

import numpy as np
import pytest

from huizhen.benchmarks import flamby
from huizhen.benchmarks.flamby import Row, alone, federated, heart, run, tcga
from huizhen.learning.models import make_model

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not (DATA / "flamby_results").is_dir(), reason="FLamby's data and tables are not here"
)
SIZES = {
    "fed_heart_disease": [(199, 104), (172, 89), (30, 16), (85, 45)],
    "fed_tcga_brca": [(248, 63), (156, 40), (164, 42), (129, 33), (129, 33), (40, 11)],
}
both = pytest.mark.parametrize("make", [heart, tcga], ids=["heart", "tcga"])


def theirs(dataset):
    path = DATA / "flamby_results" / f"config_{dataset.config}.json"
    return json.loads(path.read_text("utf-8"))["strategies"]


@both
def test_the_hospitals_are_flambys(make):
    dataset = make(DATA)
    study = alone(dataset)
    centres = dataset.read(DATA, study)
    found = [(len(one.train.ids), len(one.test.ids)) for one in centres.values()]
    assert found == SIZES[dataset.name]
    assert len(dataset.pool(DATA, study).ids) == sum(train for train, _ in found)


@both
def test_each_strategy_has_flambys_hyper_parameters(make):
    dataset = make(DATA)
    config = theirs(dataset)
    for method, name in flamby._NAMES.items():
        study, said = federated(dataset, config[method], name), config[method]
        assert study.rounds.learning_rate == said["learning_rate"]
        assert (study.rounds.local_steps, study.rounds.momentum) == (100, 0)
        for ours, key in (("mu", "mu"), ("beta1", "beta1"), ("tau", "tau")):
            if getattr(study.strategy, ours) is not None:
                assert getattr(study.strategy, ours) == said[key]
        assert study.strategy.server_learning_rate == said.get("server_learning_rate")
    with_second = federated(dataset, config["FedAdam"], "fedadam").strategy
    assert with_second.beta2 == config["FedAdam"]["beta2"]


def test_features_of_regions_are_as_they_are_with_the_time_behind():
    dataset = tcga(DATA)
    train = dataset.read(DATA, alone(dataset))["0"].train
    rows = np.array([row.tolist() for row in train.ids])
    assert rows.shape == (248, 40)
    assert rows[:, 0].max() > 60  # age, in years
    assert rows[:, -1].max() > 1000  # days
    assert set(train.labels) == {0, 1}


def test_adam_at_the_coordinator_ranks_patients_as_published():
    """One seed of the row that FLamby has most firmly: C-index .815 ± .026."""
    dataset = tcga(DATA)
    study = federated(dataset, theirs(dataset)["FedAdam"], "fedadam")
    centres = dataset.read(DATA, study)
    model = make_model(study, None)
    x = run(study, {name: one.train for name, one in centres.items()}, model, 42)
    assert flamby.score(model, x, centres) == pytest.approx(0.815, abs=0.08)


@pytest.mark.parametrize(
    ("ours", "agrees"), [(0.6, True), (0.4, True), (0.61, False), (float("nan"), False)]
)
def test_a_row_agrees_within_its_tolerance_alone(ours, agrees):
    assert Row("d", "s", ours, 0.5, 0.1000001, 0.0, 0.0).agrees == agrees
