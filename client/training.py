"""A site's training in one round: plain epochs, or a fixed number of private steps."""

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from huizhen.client.examples import Examples
from huizhen.client.model_checks import Memory
from huizhen.client.private_steps import StepTerms, private_steps
from huizhen.client.trainer import TrainingReport
from huizhen.client.turn import Turn
from huizhen.learning.batching import shuffled_batches
from huizhen.learning.trainable import Model
from huizhen.protocol.adapter import Array, Tensors, is_head
from huizhen.protocol.errors import PrivacyError
from huizhen.protocol.mechanism import Mechanism
from huizhen.protocol.study import Study


@dataclass(frozen=True, slots=True)
class Protection:
    """What a private round needs beside the study."""

    noise_multiplier: float
    # σ
    memory: Memory


def train_round(
    model: Model,
    examples: Examples,
    study: Study,
    *,
    site: str,
    round: int,
    names: frozenset[str],
    protection: Protection | None,
    correction: Tensors | None = None,
    gradients: dict[str, Array] | None = None,
) -> TrainingReport:
    """Train the loaded adapter in place for one round.

    Args:
        model: with this round's adapter loaded.
        examples: the site's records.
        study: what was agreed.
        site: this site's name in the study.
        round: 1 is the first.
        names: the tensors to train.
        protection: None exactly where the study's unit is ``none``.
        correction: what is added to the gradient of each step, after any noise; by tensor.
        gradients: is filled with the mean gradient over the steps, before anything was added.

    Raises:
        PrivacyError: the study is private and there is no protection, or less noise than it asks
            for.
    """
    begin = time.perf_counter()
    parameters = model.train_only(names)
    turn = Turn.of(parameters, study, correction or {}, sums=gradients is not None)
    try:
        if study.is_private:
            if protection is None:
                raise PrivacyError("study is private, training needs its noise multiplier")
            if protection.noise_multiplier < (least := Mechanism.of(study).noise_multiplier):
                raise PrivacyError(
                    f"noise multiplier is {protection.noise_multiplier}, the study's is {least}: "
                    "nothing was trained"
                )
            loss, steps = _private(model, turn, examples, study, site, round, protection)
        else:
            loss, steps = _plain(model, turn, examples, study, site, round)
        if gradients is not None:
            gradients |= {n: (total / steps).numpy() for n, total in (turn.sums or {}).items()}
    finally:
        model.train_only(frozenset())
    return TrainingReport(loss, steps, time.perf_counter() - begin)


def _plain(
    model: Model, turn: Turn, examples: Examples, study: Study, site: str, round: int
) -> tuple[float, int]:
    optimizers = _optimizers(turn.parameters, study, round)
    total, steps, seen = 0.0, 0, 0
    for indices in _batches(examples, study, site, round):
        batch = examples.batch(indices)
        with model.timed():
            losses, _ = model.losses(batch)
            losses.mean().backward()  # type: ignore[no-untyped-call]  # torch's
        turn()
        for optimizer in optimizers:
            _limit(optimizer, study.rounds.max_norm)
            optimizer.step()
        for parameter in turn.parameters.values():
            parameter.grad = None
        total += float(losses.detach().sum())
        seen += len(losses)
        steps += 1
    return total / seen, steps


def _batches(
    examples: Examples, study: Study, site: str, round: int
) -> Iterator[np.ndarray[tuple[int], np.dtype[np.intp]]]:
    """Yield the records of each step of a round without privacy.

    Passes begin anew in each round; steps go on in the pass where the round before ended.
    """
    terms, seed = study.rounds, study.study.seed
    if terms.length == "epochs":
        for epoch in range(terms.local_epochs):
            generator = _generator(seed, site, round, epoch)
            yield from shuffled_batches(examples.lengths, terms.batch_size, generator)
        return
    step, last = (round - 1) * terms.local_steps, round * terms.local_steps
    per_pass = math.ceil(len(examples.lengths) / terms.batch_size)
    while step < last:
        number, at = divmod(step, per_pass)
        generator = _generator(seed, site, 0, number)  # of the pass, whichever rounds it is in
        batches = shuffled_batches(examples.lengths, terms.batch_size, generator)
        batches = batches[at : at + last - step]
        yield from batches
        step += len(batches)


def _private(
    model: Model,
    turn: Turn,
    examples: Examples,
    study: Study,
    site: str,
    round: int,
    protection: Protection,
) -> tuple[float, int]:
    terms, optimizers, losses = study.privacy, _optimizers(turn.parameters, study, round), []
    step_terms = StepTerms(
        sampling_rate=terms.sampling_rate,
        max_grad_norm=terms.max_grad_norm,
        noise_multiplier=protection.noise_multiplier,
        denominator=terms.sampling_rate * study.sites[site].patients_public,
        records_per_patient=terms.records_per_patient,
        batch_cap=terms.batch_cap,
    )
    steps = study.rounds.local_steps
    with private_steps(
        model,
        turn.parameters,
        examples,
        units(examples, study),
        step_terms,
        steps=steps,
        memory=protection.memory,
    ) as step:
        for _ in range(steps):
            losses.append(step())
            turn()  # after the noise
            for optimizer in optimizers:
                optimizer.step()
    seen = [loss for loss in losses if not math.isnan(loss)]
    return (float(np.mean(seen)) if seen else math.nan), len(losses)


def units(examples: Examples, study: Study) -> list[np.ndarray[tuple[int], np.dtype[np.intp]]]:
    """Return the records of each unit of privacy: a patient's together, or each alone."""
    if study.privacy.unit == "record":
        return [np.asarray([i], dtype=np.intp) for i in range(len(examples.ids))]
    return examples.records_of()


def _optimizers(
    parameters: Mapping[str, nn.Parameter], study: Study, round: int
) -> list[torch.optim.Optimizer]:
    """Return fresh optimisers for LoRA and head: none of their memory outlives a round."""
    made: list[torch.optim.Optimizer] = []
    for head in (False, True):
        own = [parameter for name, parameter in parameters.items() if is_head(name) == head]
        if not own:
            continue
        rate = study.learning_rate(round, head=head)
        optimizer: torch.optim.Optimizer
        if study.optimizer_of(head=head) == "adamw":
            optimizer = torch.optim.AdamW(own, lr=rate, weight_decay=0.0, fused=True)
        else:
            momentum = 0.0 if study.is_private else study.rounds.momentum
            optimizer = torch.optim.SGD(own, lr=rate, momentum=momentum, fused=True)
        made.append(optimizer)
    return made


def _limit(optimizer: torch.optim.Optimizer, max_norm: float | None) -> None:
    """Scale an optimiser's gradients down to a norm of at most ``max_norm``.

    As ``nn.utils.clip_grad_norm_``, to the bit, at a third of its time for a handful of tensors.
    """
    if max_norm is None:
        return
    own = [p.grad for group in optimizer.param_groups for p in group["params"]]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in own]))
    share = max_norm / (norm + 1e-6)
    if share < 1:
        for gradient in own:
            gradient.mul_(share)


def _generator(seed: int, site: str, round: int, epoch: int) -> np.random.Generator:
    """Return the shuffling of one pass: public, and the same whenever the round is run again."""
    words = hashlib.sha256(f"{seed}/{site}/{round}/{epoch}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(words[:16], "little")))
