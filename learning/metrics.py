"""Metrics of classification, of survival and of instruction answers."""

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def classification_metrics(scores: NDArray[np.float32], labels: Sequence[int]) -> dict[str, float]:
    """Return top-1 and top-3 accuracy and macro F1 over the classes that occur.

    Args:
        scores: (records, classes).
        labels: the true classes; a negative one is a class that the study does not list, always an
            error; all of these count as one class.
    """
    truth = np.asarray(labels)
    order = np.argsort(-scores, axis=1, kind="stable")
    hits = order == truth[:, None]
    guess = order[:, 0]
    f1 = []
    for label in np.unique(truth):
        true_positives = np.sum((guess == label) & (truth == label))
        f1.append(2 * true_positives / (np.sum(guess == label) + np.sum(truth == label)))
    return {
        "top1": float(hits[:, 0].mean()),
        "top3": float(hits[:, :3].any(axis=1).mean()),
        "macro_f1": float(np.mean(f1)),
    }


def concordance_index(
    times: NDArray[np.float32], events: NDArray[np.bool_], risks: NDArray[np.float32]
) -> float | None:
    """Return how often, of two records, the one with the event first has the higher risk.

    Harrell et al. 1982. Two records can be compared where one has the event and the other was
    followed for longer, or as long without it; equal risks count a half. None where no two can be.

    Args:
        times: until the event or the end of follow-up, (records,).
        events: whether the event was seen, (records,).
        risks: higher for who is thought to have it sooner, (records,).
    """
    pairs, agreed = 0, 0.0
    for i in np.flatnonzero(events):
        later = (times > times[i]) | ((times == times[i]) & ~events)
        pairs += int(later.sum())
        agreed += float((risks[i] > risks[later]).sum() + 0.5 * (risks[i] == risks[later]).sum())
    return agreed / pairs if pairs else None


def is_same_answer(generated: str, expected: str) -> bool:
    """Whether two answers agree but for case, width, outer space and a final full stop."""
    return _normal(generated) == _normal(expected)


def _normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text).strip().rstrip("。. ").casefold()
