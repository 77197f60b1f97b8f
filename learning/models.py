"""The model of a study, whatever its kind: for callers that need not know which one it is."""

from pathlib import Path

from huizhen.learning.bases import resolve
from huizhen.learning.model import AdaptedModel
from huizhen.learning.tabular import LinearModel
from huizhen.learning.trainable import Model
from huizhen.protocol.errors import ConfigError
from huizhen.protocol.study import Study


def make_model(study: Study, home: Path | None) -> Model:
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
        return LinearModel(study)
    if study.base is None:
        raise ConfigError("study has no [base]: add the section")
    return AdaptedModel(resolve(study.base.name, home=home), study)
