"""Examples: de-identified records as the model reads them, grouped by patient."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from huizhen.client.selection import Selected, SelectedRecord
from huizhen.learning.model import pad
from huizhen.learning.tasks import UNSEEN, Encoder
from huizhen.learning.trainable import Batch, Model


@dataclass(frozen=True, slots=True)
class Examples:
    """One site's records for one study; the lists run over records."""

    ids: tuple[Tensor, ...]
    # token ids, (T_i,) each; of a tabular task the scaled features, (features,)
    inputs: tuple[Tensor, ...]
    # what the trained layers read: outputs of the frozen ones, (T_i, H) each, or the ids
    labels: tuple[int, ...]
    answer_starts: tuple[int, ...]
    patients: tuple[int, ...]
    # whose record it is; equal numbers are one patient, within one site
    cut: int
    # records whose text was longer than max_tokens, or with a feature outside its range

    @property
    def num_patients(self) -> int:
        """How many patients the records belong to."""
        return len(set(self.patients))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each record; of a tabular task its features."""
        return [len(row) for row in self.ids]

    def records_of(self) -> list[np.ndarray[tuple[int], np.dtype[np.intp]]]:
        """Return the records of each patient."""
        order = np.argsort(self.patients, kind="stable")
        _, begins = np.unique(np.asarray(self.patients)[order], return_index=True)
        return np.split(order, begins[1:])

    def batch(self, indices: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.intp]]) -> Batch:
        """Return the records at ``indices`` as one padded batch."""
        starts = [self.answer_starts[i] for i in indices]
        return pad(
            [self.inputs[i] for i in indices],
            [self.labels[i] for i in indices],
            starts,
            [self.ids[i] for i in indices] if any(starts) else [],
        )

    def with_known_labels(self) -> "Examples":
        """Return the records whose class the study knows; patients keep their numbers."""
        return self.take([i for i, label in enumerate(self.labels) if label != UNSEEN])

    def take(self, rows: Sequence[int]) -> "Examples":
        """Return the records at ``rows``; patients keep their numbers."""
        return replace(
            self,
            ids=tuple(self.ids[i] for i in rows),
            inputs=tuple(self.inputs[i] for i in rows),
            labels=tuple(self.labels[i] for i in rows),
            answer_starts=tuple(self.answer_starts[i] for i in rows),
            patients=tuple(self.patients[i] for i in rows),
        )


def make_examples(data: Selected, encoder: Encoder, model: Model) -> Examples:
    """Return the records to train on as the model reads them, its frozen layers' outputs with them.

    Raises:
        ConfigError: a record lacks a field of the task.
        GovernanceError: a text, label or answer is empty, or a feature is no number.
    """
    return _read(data.records, encoder, model)


def make_held_out(data: Selected, encoder: Encoder, model: Model) -> Examples:
    """Return the held-out records in the same way; they share no batch with those to train on.

    Raises:
        ConfigError: as ``make_examples``.
        GovernanceError: as ``make_examples``.
    """
    return _read(data.held_out, encoder, model)


def _read(records: Sequence[SelectedRecord], encoder: Encoder, model: Model) -> Examples:
    encoded = [encoder.encode(record.fields, record.place) for record in records]
    ids = tuple(torch.from_numpy(one.ids) for one in encoded)
    return Examples(
        ids=ids,
        inputs=tuple(model.prefix(ids)),
        labels=tuple(one.label for one in encoded),
        answer_starts=tuple(one.answer_start for one in encoded),
        patients=tuple(record.patient for record in records),
        cut=sum(one.was_cut for one in encoded),
    )


def pooled(parts: Sequence[Examples]) -> Examples:
    """Return the records of several sites as those of one, patients kept apart.

    Only a simulation may do this: it is what a federation exists to avoid.
    """
    offsets = np.cumsum([0, *(max(part.patients, default=-1) + 1 for part in parts)])
    return Examples(
        ids=tuple(row for part in parts for row in part.ids),
        inputs=tuple(row for part in parts for row in part.inputs),
        labels=tuple(label for part in parts for label in part.labels),
        answer_starts=tuple(start for part in parts for start in part.answer_starts),
        patients=tuple(
            int(offset) + patient
            for part, offset in zip(parts, offsets, strict=False)
            for patient in part.patients
        ),
        cut=sum(part.cut for part in parts),
    )
