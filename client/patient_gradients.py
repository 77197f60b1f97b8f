"""Patients' gradients from a model and a site's records, in microbatches that fit in memory.

A patient's gradient is the mean over their records of a step. Records are weighted before the one
backward pass; where a patient has several, their rows are added up (a segment sum) before any norm
is taken. Shape suffixes: R records, U patients.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from huizhen.client.dp_sgd import PatientBatch
from huizhen.client.examples import Examples
from huizhen.client.model_checks import Memory
from huizhen.client.per_record import Recorder
from huizhen.client.randomness import choose
from huizhen.learning.trainable import Model

Rows = NDArray[np.intp]


class ModelGradients:
    """A site's patients as ``private_gradient`` asks for them."""

    def __init__(
        self,
        model: Model,
        parameters: Mapping[str, nn.Parameter],
        examples: Examples,
        records_of: Sequence[Rows],
        recorder: Recorder,
        *,
        records_per_patient: int,
        memory: Memory,
    ) -> None:
        """Take the gradients of the loaded adapter.

        Args:
            model: with the adapter loaded, inside ``per_record_gradients``.
            parameters: the trained tensors by name.
            examples: the site's records.
            records_of: the records of each patient.
            recorder: what ``per_record_gradients`` gave.
            records_per_patient: K.
            memory: bounds a microbatch.
        """
        self._model, self._parameters, self._examples = model, parameters, examples
        self._records_of, self._recorder = records_of, recorder
        self._most = records_per_patient
        self._memory = memory
        self._row_bytes = 4 * sum(parameter.numel() for parameter in parameters.values())
        self._lengths = np.asarray(examples.lengths)

    @property
    def num_patients(self) -> int:
        """How many patients there are to sample from."""
        return len(self._records_of)

    def microbatches(self, chosen: Rows) -> Iterator[PatientBatch]:
        """Yield the mean gradients of the patients at ``chosen``, by length of their records."""
        own = [self._records_of[u] for u in chosen]
        own = [rows[choose(len(rows), self._most)] for rows in own]
        own.sort(key=lambda rows: int(self._lengths[rows].max()))
        current: list[Rows] = []
        for rows in own:
            if current and self._bytes([*current, rows]) > self._memory.limit:
                yield self._batch(current)
                current = []
            current.append(rows)
        if current:
            yield self._batch(current)

    def _bytes(self, patients: Sequence[Rows]) -> float:
        """Return an upper estimate of what these patients take in one backward pass."""
        rows = np.concatenate(patients)
        gradients = len(rows) + (len(patients) if len(rows) > len(patients) else 0)
        padded = len(rows) * int(self._lengths[rows].max())
        return gradients * self._row_bytes + padded * self._memory.per_token

    def _batch(self, patients: Sequence[Rows]) -> PatientBatch:
        if self._bytes(patients) > self._memory.limit and len(patients[0]) > 1:
            return self._one_by_one(patients[0])
        counts = torch.tensor([len(rows) for rows in patients])
        rows = np.concatenate(patients)
        patient_R = torch.repeat_interleave(torch.arange(len(counts)), counts)
        grads_R, losses = self._per_record(rows, 1 / counts[patient_R])
        if len(rows) == len(patients):
            return PatientBatch(grads_R, losses)
        grads_U = {
            name: torch.zeros(len(counts), *grad.shape[1:]).index_add_(0, patient_R, grad)
            for name, grad in grads_R.items()
        }
        return PatientBatch(grads_U, losses)

    def _one_by_one(self, rows: Rows) -> PatientBatch:
        """Return one patient whose records together do not fit in the memory."""
        total: dict[str, Tensor] = {}
        losses: list[float] = []
        for row in rows:
            grads, loss = self._per_record(np.asarray([row]), torch.tensor([1 / len(rows)]))
            total = {name: total[name] + grad if total else grad for name, grad in grads.items()}
            losses += loss
        return PatientBatch(total, losses)

    def _per_record(self, rows: Rows, weight_R: Tensor) -> tuple[dict[str, Tensor], list[float]]:
        """Return the weighted gradient of each record, (R, *shape), and the losses."""
        with self._model.timed():
            loss_R, _ = self._model.losses(self._examples.batch(rows))
            (loss_R * weight_R).sum().backward()  # type: ignore[no-untyped-call]  # torch's
        return self._recorder.take(len(rows)), loss_R.detach().tolist()
