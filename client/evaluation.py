"""Scores of an adapter on records that were not trained on."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from huizhen.client.examples import Examples
from huizhen.learning.batching import sorted_batches
from huizhen.learning.trainable import Model

_TOKENS = 4096  # padded tokens in a batch


def classify(model: Model, examples: Examples) -> NDArray[np.float32]:
    """Return each record's class scores, (records, labels), with the loaded adapter."""
    labels = len(model.study.task.labels)
    scores = np.zeros((len(examples.ids), labels), dtype=np.float32)
    for indices in sorted_batches(examples.lengths, _TOKENS):
        batch = examples.batch(indices)
        with model.timed():
            scores[indices] = model.logits(batch).numpy()
    return scores


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Loss over the tokens of the answers, kept as a sum so that sites can be joined."""

    total: float
    tokens: int


@torch.no_grad()
def answer_loss(model: Model, examples: Examples) -> TokenLoss:
    """Return the loss over the tokens of all answers, with the adapter that is loaded."""
    total, tokens = 0.0, 0
    for indices in sorted_batches(examples.lengths, _TOKENS):
        batch = examples.batch(indices)
        with model.timed():
            losses, counts = model.losses(batch)
        total += float((losses * counts).sum())
        tokens += int(counts.sum())
    return TokenLoss(total, tokens)
