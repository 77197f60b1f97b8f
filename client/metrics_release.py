"""What a site may say about an adapter on its own held-out patients, as noised counts.

One record of each held-out patient is drawn at random and scored by itself; the patient falls into
one cell by it, and its loss becomes a whole number from 0 to ``LOSS_STEPS``. Adding or removing a
patient, with all their records, so moves

    the cells   by 1 in one place: L1 sensitivity 1, whatever the number of records
    the loss    by at most LOSS_STEPS

and ``protocol/metrics.py`` states the noise and the ε that follow. Every patient counts the same:
the rates estimate the mean over patients, not over records. No other patient's outcome moves,
because no batch is shared, not even by the frozen layers.

Whether counts are kept back is decided from the *noised* number of patients. A decision by the true
number would say for certain, without any noise, on which side of the minimum it lies: two data sets
that differ in one patient would be told apart. As it is, the decision is computed from what could
have been sent anyway, and costs nothing more. The ε is spent also where counts are kept back.

The budget stands beside that of training, not on top of it, because no held-out patient is a
training patient; this is checked. It also needs that patients are held out by a rule that looks at
each patient alone, such as a date or a keyed hash of the identifier: a rule that counts patients
would let one patient move others.
"""

import math
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from huizhen.client.discrete import discrete_laplace
from huizhen.client.evaluation import answer_loss, classify
from huizhen.client.examples import Examples
from huizhen.client.randomness import choose
from huizhen.learning.metrics import is_same_answer
from huizhen.learning.model import AdaptedModel
from huizhen.learning.trainable import Model
from huizhen.protocol.errors import PrivacyError
from huizhen.protocol.metrics import LOSS_BOUND, LOSS_STEPS, SiteMetrics, budgets, cells_of
from huizhen.protocol.study import Study


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How the adapter does on one held-out patient; it never leaves and is never printed."""

    patient: int
    cell: str
    loss: float | None = None
    # nats per token of the answer

    def __repr__(self) -> str:
        return "Outcome(<masked>)"


def held_out_outcomes(model: Model, examples: Examples) -> list[Outcome]:
    """Return one outcome per patient, with the adapter that is loaded.

    Args:
        model: with the round's adapter loaded.
        examples: the held-out records.
    """
    outcomes = []
    for rows in examples.records_of() if examples.ids else []:
        one = examples.take([int(rows[choose(len(rows), 1)[0]])])
        # what the frozen layers gave beside other records may differ from this in its last bits
        one = replace(one, inputs=tuple(model.prefix(one.ids)))
        if isinstance(model, AdaptedModel) and model.kind == "instruction":
            outcomes.append(_answered(model, one))
        else:
            cell = ranked_cell(classify(model, one)[0], one.labels[0], cells_of(model.study.task))
            outcomes.append(Outcome(patient=one.patients[0], cell=cell))
    return outcomes


def release_metrics(
    study: Study,
    *,
    site: str,
    round: int,
    outcomes: Sequence[Outcome],
    training_patients: Set[int],
) -> SiteMetrics:
    """Return the noised counts that may leave; call it once per study, after charging its ε.

    Args:
        study: what was agreed; ``metrics_epsilon`` is spent whole by this one call.
        site: this site's name.
        round: the round whose adapter was scored.
        outcomes: one per held-out patient.
        training_patients: everyone who was trained on, in the same numbering as the outcomes.

    Raises:
        ConfigError: the study lets no metrics out.
        PrivacyError: a patient is trained on and held out, or has two outcomes, or nobody is said
            to be trained on.
    """
    epsilon_counts, epsilon_loss = budgets(study)
    check_held_out([outcome.patient for outcome in outcomes], training_patients)
    cells, loss = exact_counts(outcomes, cells_of(study.task))
    noise = Fraction(epsilon_counts)
    noised = {name: count + discrete_laplace(noise) for name, count in cells.items()}
    noised_loss = None
    if epsilon_loss:
        noised_loss = loss + discrete_laplace(Fraction(epsilon_loss) / LOSS_STEPS)
    minimum = study.privacy.metrics_minimum
    is_suppressed = sum(noised.values()) < minimum
    return SiteMetrics(
        study=study.digest(),
        site=site,
        round=round,
        epsilon_counts=epsilon_counts,
        epsilon_loss=epsilon_loss,
        minimum=minimum,
        counts=None if is_suppressed else noised,
        loss=None if is_suppressed else noised_loss,
    )


def check_held_out(held_out: Collection[int], training: Collection[int]) -> None:
    """Refuse metrics on patients that were trained on.

    Args:
        held_out: patients' numbers.
        training: everyone who was trained on, in the same numbering.

    Raises:
        PrivacyError: a patient is in both, or nobody is said to be trained on.
    """
    if not training:
        raise PrivacyError("no training patients are given, held-out ones must be compared to them")
    if not set(training).isdisjoint(held_out):
        raise PrivacyError(
            "a held-out patient is also a training patient, the metrics' epsilon would add to that "
            "of training: hold whole patients out, numbered in one go with the others"
        )


def exact_counts(outcomes: Sequence[Outcome], cells: Sequence[str]) -> tuple[dict[str, int], int]:
    """Return the patients of each cell and the summed loss in steps: for the noise alone.

    Raises:
        PrivacyError: a patient has two outcomes, so that the sensitivity would be more than stated.
    """
    if len({outcome.patient for outcome in outcomes}) != len(outcomes):
        raise PrivacyError("a patient has several outcomes, expected one: nothing was sent")
    counts = dict.fromkeys(cells, 0)
    for outcome in outcomes:
        counts[outcome.cell] += 1
    return counts, sum(loss_steps(outcome.loss) for outcome in outcomes)


def loss_steps(loss: float | None) -> int:
    """Return a loss as a whole number from 0 to ``LOSS_STEPS``; what is no number is the worst."""
    if loss is None:
        return 0
    if math.isnan(loss):
        return LOSS_STEPS
    return round(min(max(loss, 0.0), LOSS_BOUND) / LOSS_BOUND * LOSS_STEPS)


def ranked_cell(scores: NDArray[np.float32], label: int, cells: Sequence[str]) -> str:
    """Return where the true class stands among the scores; equal ones in the classes' order.

    Args:
        scores: of each class, shape (classes,).
        label: the true class; a negative one is a class that the study does not list, always wrong.
        cells: from ``cells_of``.
    """
    [places] = np.nonzero(np.argsort(-scores, kind="stable") == label)
    place = int(places[0]) if len(places) else len(scores)
    if place == 0:
        return "top1"
    return "top2_to_3" if place <= 2 and "top2_to_3" in cells else "wrong"


def _answered(model: AdaptedModel, one: Examples) -> Outcome:
    """Return the outcome of a record with an answer."""
    ids, start = one.ids[0].numpy(), one.answer_starts[0]
    expected = model.tokenizer.decode(ids[start:], skip_special_tokens=True)
    [answer] = model.generate([ids[:start]], model.study.task.max_new_tokens)
    loss = answer_loss(model, one)
    return Outcome(
        patient=one.patients[0],
        cell="exact" if is_same_answer(answer, expected) else "wrong",
        loss=loss.total / max(1, loss.tokens),
    )
