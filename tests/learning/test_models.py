"""One place knows which model and which encoder a study's kind of task has."""

import dataclasses

import pytest

from huizhen.learning.model import AdaptedModel
from huizhen.learning.models import make_model
from huizhen.learning.tabular import LinearModel, TabularEncoder
from huizhen.learning.tasks import TaskEncoder
from huizhen.protocol.errors import ConfigError
from huizhen.protocol.study import parse_study

TABULAR = {
    "study": {"name": "tabular"},
    "task": {"kind": "tabular", "features": {"age": [0, 99]}, "label": "x", "labels": ["0", "1"]},
    "strategy": {"name": "fedavg"},
}


def test_each_kind_of_task_has_its_model_and_its_encoder(make_study, home):
    kinds = {}
    for study in (make_study(), make_study("instruction"), parse_study(TABULAR, "s")):
        model = make_model(study, home)
        kinds[model.kind] = (type(model), type(model.encoder()))
    assert kinds == {
        "classification": (AdaptedModel, TaskEncoder),
        "instruction": (AdaptedModel, TaskEncoder),
        "tabular": (LinearModel, TabularEncoder),
    }


def test_a_text_task_without_a_base_is_refused(make_study, home):
    with pytest.raises(ConfigError, match=r"no \[base\]"):
        make_model(dataclasses.replace(make_study(), base=None), home)
