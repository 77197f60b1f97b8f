"""The model of a study, whatever its kind: for callers that need not know which one it is."""

from pathlib import Path
from typing import TypeAlias, cast

from huizhen.learning.bases import resolve
from huizhen.learning.model import AdaptedModel
from huizhen.learning.tabular import LinearModel, TabularEncoder
from huizhen.learning.tasks import Encoder, TaskEncoder
from huizhen.protocol.errors import ConfigError
from huizhen.protocol.study import Study

Model: TypeAlias = AdaptedModel | LinearModel


def make_model(study: Study, home: Path | None) -> AdaptedModel:
    """Return the model that a study trains, with the study's first adapter or zeros in it.

    Args:
        study: with its labels filled in.
        home: where base models are cached; None for the platform's folder.

    Raises:
        ConfigError: the base cannot be had, the adapter does not fit it, or there are fewer than
            two classes.
        StorageError: a file of the cache is not what it was.
    """
    if study.task.kind == "tabular":
        # client/ and federation.py annotate AdaptedModel and use what both have
        return cast(AdaptedModel, LinearModel(study))
    if study.base is None:
        raise ConfigError("study has no [base]: add the section")
    return AdaptedModel(resolve(study.base.name, home=home), study)


def make_encoder(model: Model) -> Encoder:
    """Return what turns a record's fields into what the model reads."""
    if isinstance(model, LinearModel):
        return TabularEncoder(model.study.task)
    return TaskEncoder(model.study.task, model.tokenizer)
