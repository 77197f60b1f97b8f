"""A linear Cox model over numeric fields: who has the event sooner, not when.

Cox 1972 (https://doi.org/10.1111/j.2517-6161.1972.tb00899.x); ties as Breslow 1974. With a record's
scaled features x (``learning/tabular.py``), its risk is w·x; there is no bias, which the partial
likelihood does not see. Of a batch, a record with an event at time t has the loss

    log Σ_j exp(w·x_j) − w·x,     j over the records of the batch followed at least until t

and one without an event has none. So a record's loss depends on the others of its batch: no
clipping of one record's gradient bounds what a patient does, and the task has no unit of privacy.
The larger the batches, the nearer their loss is to that of all the site's records.

    head.weight (1, features)
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from huizhen.learning.tabular import LinearModel, TabularEncoder, number_of
from huizhen.learning.tasks import UNSEEN, Encoded
from huizhen.learning.trainable import Batch
from huizhen.protocol.errors import ConfigError, GovernanceError
from huizhen.protocol.study import Study

_LONGEST = 1e15  # in any unit; times are compared as float32


class SurvivalEncoder(TabularEncoder):
    """Turns the fields of a record into scaled numbers, with the time of follow-up behind them."""

    def encode(self, fields: Mapping[str, Any], where: str) -> Encoded:
        """Return one record; its class says whether the event was seen.

        Raises:
            ConfigError: a field is not there.
            GovernanceError: as ``TabularEncoder``; or the time is no number of 0 or more, or the
                record neither has the event nor has it not.
        """
        found, task = super().encode(fields, where), self.task
        if found.label == UNSEEN:
            raise GovernanceError(
                f"{where}: {task.label!r} is neither {task.labels[0]!r}, followed without the "
                f"event, nor {task.labels[1]!r}, the event: mend the export"
            )
        name = task.time or ""
        if name not in fields:
            raise ConfigError(f"{where}: there is no field {name!r}, [task] time names it")
        time = np.nan if isinstance(fields[name], bool) else number_of(fields[name])
        if not 0 <= time <= _LONGEST:
            raise GovernanceError(f"{where}: {name!r} is not a time of 0 or more: mend the export")
        return replace(found, ids=np.append(found.ids, np.float32(time)))


class CoxModel(LinearModel):
    """The linear model of the log of a hazard."""

    def __init__(self, study: Study) -> None:
        """Make the model of a survival study."""
        super().__init__(study, bias=False)

    def encoder(self) -> SurvivalEncoder:
        """Return what turns a record's fields into features and a time."""
        return SurvivalEncoder(self.study.task)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return each record's part of the negative log partial likelihood, and ones, both (B,).

        They depend on the whole batch, as no other model's do.
        """
        risks, times = self._risks(batch), batch.inputs[:, -1]
        order = torch.argsort(times, descending=True, stable=True)
        later = torch.logcumsumexp(risks[order], dim=0)
        # of equal times, the last one's sum has them all
        last = torch.searchsorted(-times[order], -times[order], right=True) - 1
        losses = torch.zeros_like(risks)
        losses[order] = later[last] - risks[order]
        return losses * (batch.labels == 1), torch.ones(len(losses))

    def _scores(self, batch: Batch) -> Tensor:
        risks = self._risks(batch)
        return torch.stack((torch.zeros_like(risks), risks), dim=1)

    def _risks(self, batch: Batch) -> Tensor:
        scores: Tensor = self.module["head"](batch.inputs[:, :-1])
        return scores.squeeze(1)


def times_of(inputs: Sequence[Tensor]) -> NDArray[np.float32]:
    """Return the times of records as ``SurvivalEncoder`` has read them."""
    return np.array([float(row[-1]) for row in inputs], np.float32)
