"""A linear model over numeric fields, for risk scores: every weight is trained and travels.

Features are scaled by the public ranges of the study, never by statistics of the records: a mean
or a deviation of private values is itself a release. x is moved into its range, then

    x' = 2 · (x - least) / (greatest - least) - 1        so that [least, greatest] becomes [-1, 1]

The middle of a range is 0, where a feature says nothing; a yes-or-no field with range [0, 1] is -1
or 1. Columns of ``head.weight`` follow the features' names, sorted by their UTF-8.

Two classes have one logit, that of the second class: this is logistic regression itself, and half
the numbers that noise must cover; the same step of SGD on a softmax over two logits moves their
difference twice as far. K > 2 classes have K logits.

    head.weight (1 or K, features)      head.bias (1 or K,)
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # torch's own name for it

from huizhen.learning.tasks import Encoded, class_of
from huizhen.learning.trainable import Batch, Model
from huizhen.protocol.errors import ConfigError, GovernanceError
from huizhen.protocol.study import Study
from huizhen.protocol.study_terms import TaskTerms


def feature_names(task: TaskTerms) -> tuple[str, ...]:
    """Return the features in the order of the model's columns."""
    return tuple(sorted(task.features))  # by code point, which is the order of UTF-8


class TabularEncoder:
    """Turns the fields of a record into scaled numbers."""

    def __init__(self, task: TaskTerms) -> None:
        """Prepare for one study's task."""
        self.task = task
        self._index = {label: i for i, label in enumerate(task.labels)}

    def encode(self, fields: Mapping[str, Any], where: str) -> Encoded:
        """Return one record; ``was_cut`` says that a value lay outside its range.

        Args:
            fields: the record's fields, de-identified.
            where: the record's place in its file, for errors.

        Raises:
            ConfigError: a feature's field is not there.
            GovernanceError: a value is missing and the study refuses that, or is no finite number;
                or the label is empty.
        """
        scaled, moved = [], False
        for name in feature_names(self.task):
            least, greatest = self.task.features[name]
            value = self._number(name, fields, where)
            if value is None:
                scaled.append(0.0)
                continue
            inside = min(max(value, least), greatest)
            moved = moved or inside != value
            scaled.append(2 * ((inside - least) / (greatest - least)) - 1)
        number = class_of(fields, self.task.label or "", self._index, where)
        return Encoded(np.asarray(scaled, np.float32), number, 0, moved)

    def _number(self, name: str, fields: Mapping[str, Any], where: str) -> float | None:
        """Return a field as a number; None where it is missing and the middle stands in."""
        if name not in fields:
            raise ConfigError(f"{where}: there is no field {name!r}, [task] features names it")
        value = fields[name]
        if value is None or (isinstance(value, str) and not value.strip()):
            if self.task.missing == "middle":
                return None
            raise GovernanceError(
                f"{where}: {name!r} is missing, [task] missing is 'refuse': "
                "fill it, remove the record or set missing = 'middle'"
            )
        number = number_of(value)
        if not math.isfinite(number):
            raise GovernanceError(
                f"{where}: {name!r} is not a finite number, a feature must be: mend the export"
            )
        return number


def number_of(value: Any) -> float:
    """Return a field as a number, not a number where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


class LinearModel(Model):
    """What ``AdaptedModel`` is to a text, for numbers: one linear layer and nothing frozen."""

    def __init__(self, study: Study, *, bias: bool = True) -> None:
        """Make the model of a tabular study.

        Raises:
            ConfigError: the study lists fewer than two classes.
        """
        task = study.task
        self._is_binary = len(task.labels) == 2
        outputs = 1 if self._is_binary else len(task.labels)
        head = nn.Linear(len(task.features), outputs, bias=bias)
        named = {f"head.{name}": one for name, one in head.named_parameters()}
        super().__init__(study, nn.ModuleDict({"head": head}), named)
        self.load(self.first_tensors(study.study.seed))

    @property
    def adapted_layers(self) -> int:
        """The one layer there is."""
        return 1

    def encoder(self) -> TabularEncoder:
        """Return what turns a record's fields into features."""
        return TabularEncoder(self.study.task)

    def first_tensors(self, seed: int) -> dict[str, NDArray[Any]]:
        """Return zeros for any seed: the loss is convex, and no start is better than none."""
        return {name: np.zeros(shape, np.float32) for name, shape in self.shapes.items()}

    def prefix(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """Return the features as they are: no layer lies below."""
        return list(ids)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return each record's cross-entropy (B,), and its number of terms, which is 1 (B,)."""
        losses = F.cross_entropy(
            self._scores(batch),
            batch.labels,
            reduction="none",
            label_smoothing=self.study.task.label_smoothing,
        )
        return losses, torch.ones(len(losses))

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Return the class scores of each record, (B, labels); of two classes the first has 0."""
        return self._scores(batch)

    def _scores(self, batch: Batch) -> Tensor:
        scores: Tensor = self.module["head"](batch.inputs)
        return F.pad(scores, (1, 0)) if self._is_binary else scores
