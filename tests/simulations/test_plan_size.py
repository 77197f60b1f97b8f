"""The numbers that a plan counts are those that a site of the study trains and sends."""

import math

import pytest

from huizhen.protocol.errors import ConfigError, HuizhenError
from huizhen.simulations.experiment import load_experiment, parse_experiment
from huizhen.simulations.plan_size import trained_parameters

LABELS = 'max_tokens = 48\nlabels = ["asthma", "epilepsy", "measles"]'


@pytest.fixture
def count(experiment_file, home):
    """Return the count of an experiment with lines replaced."""
    return lambda *changes, **more: trained_parameters(
        load_experiment(experiment_file(*changes, **more)), home
    )


def test_the_count_by_hand(count):
    # tiny: two layers, 32 wide, keys and values 16 wide; rank 2; a head for three classes
    assert count() == 2 * (2 * 32 + 2 * 16) + 3 * (32 + 1)
    assert count(("rank = 2", "rank = 4")) == 2 * (4 * 32 + 4 * 16) + 3 * (32 + 1)


def test_a_tabular_study_needs_no_base_and_no_record(tmp_path):
    empty = tmp_path / "empty"
    for labels, count in ((["0", "1"], 14), (["0", "1", "2"], 42)):
        features = {f"f{i}": [0, 1] for i in range(13)}
        task = {"kind": "tabular", "label": "disease", "labels": labels, "features": features}
        tables = {
            "study": {"name": "linear"},
            "task": task,
            "strategy": {"name": "fedavg"},
            "simulation": {"data": "no-such.csv", "site": "hospital", "patient": "id"},
        }
        assert trained_parameters(parse_experiment(tables, tmp_path / "x.toml"), empty) == count
    assert not empty.exists()


def test_the_strategy_says_what_is_trained(count, tiny_classifier):
    study = ("[rounds]", '[strategy]\nname = "fedavg"\n[rounds]')
    shapes = tiny_classifier.shapes
    every = sum(math.prod(shape) for shape in shapes.values())
    frozen = sum(math.prod(s) for name, s in shapes.items() if name.endswith(".lora_A"))
    assert frozen > 0
    assert count(study) == every
    assert count() == every - frozen


def test_listed_classes_spare_the_records(count, experiment_file, home):
    path = experiment_file(("max_tokens = 48", LABELS))
    (path.parent / "records.jsonl").unlink()
    assert trained_parameters(load_experiment(path), home) == count()


def test_unlisted_classes_without_records_are_one_line(experiment_file, home):
    path = experiment_file()
    (path.parent / "records.jsonl").unlink()
    with pytest.raises(ConfigError, match="list the labels, or give --parameters") as caught:
        trained_parameters(load_experiment(path), home)
    assert "cannot read" in str(caught.value)


def test_an_instruction_study_reads_no_record(experiment_file, home, tiny_assistant):
    path = experiment_file(
        ('kind = "classification"', 'kind = "instruction"\nanswer = "{disease}"'),
        ('label = "disease"\n', ""),
    )
    (path.parent / "records.jsonl").unlink()
    shapes = tiny_assistant.shapes
    sent = sum(math.prod(s) for name, s in shapes.items() if not name.endswith(".lora_A"))
    assert trained_parameters(load_experiment(path), home) == sent


def test_what_cannot_be_run_cannot_be_counted(count):
    with pytest.raises(HuizhenError, match="did you mean 'fedavg'"):
        count(("[rounds]", '[strategy]\nname = "fedavgg"\n[rounds]'))
    with pytest.raises(HuizhenError, match="target_modules"):
        count(('"v_proj"', '"w_proj"'))
