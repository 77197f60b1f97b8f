"""One place knows which model and which encoder a study's kind of task has."""

import dataclasses

import pytest

from huizhen.learning.bases import resolve
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
        model = make_model(study, None if study.base is None else resolve("tiny", home=home))
        kinds[model.kind] = (type(model), type(model.encoder()))
    assert kinds == {
        "classification": (AdaptedModel, TaskEncoder),
        "instruction": (AdaptedModel, TaskEncoder),
        "tabular": (LinearModel, TabularEncoder),
    }


def test_a_text_task_without_a_base_is_refused(make_study, home):
    with pytest.raises(ConfigError, match=r"no \[base\]"):
        make_model(dataclasses.replace(make_study(), base=None), resolve("tiny", home=home))


def test_another_base_than_the_study_was_agreed_on_is_refused(make_study, home):
    base = resolve("tiny", home=home)
    agreed = dict(base.digests)
    make_model(make_study(base={"digests": agreed}), base)
    name = next(iter(agreed))
    for wrong in ({**agreed, name: "0" * 64}, {**agreed, "more.json": "0" * 64}):
        with pytest.raises(ConfigError, match="get the base that the study was agreed on"):
            make_model(make_study(base={"digests": wrong}), base)


def test_one_class_is_no_classification(make_study, home):
    with pytest.raises(ConfigError, match="labels has 1 classes, a classification task needs two"):
        make_model(make_study(task={"labels": ["a"]}), resolve("tiny", home=home))
