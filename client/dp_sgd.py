"""One DP-SGD step over patients.

Abadi et al. 2016, Algorithm 1 (https://arxiv.org/abs/1607.00133), with the unit moved from the
example to the patient: a patient's gradient is the mean over at most K of their records, drawn
anew in each step.

    S   the patients of a step, Poisson-sampled     g_u  gradient of patient u, all trained tensors
    C   max_grad_norm (1 under AUTO-S)              σ    noise_multiplier
    B̄   q · patients_public, the public denominator

    g̃ = ( Σ_{u∈S} clip(g_u) + N(0, σ²C²I) ) / B̄

``clip`` is g · min(1, C/‖g‖), or AUTO-S, g / (‖g‖ + 0.01) (Bu et al. 2023, Algorithm 1). Adding or
removing one patient moves the sum by at most C: the denominator, the number of steps and the
learning rate are public. Shape suffixes: R records, U patients.

Departure: per-record gradients come from Opacus' hooks; its sampler, noise and accountant are not
    used.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from huizhen.client.examples import Examples
from huizhen.client.randomness import choose, normals, poisson_sample
from huizhen.learning.batching import sorted_batches
from huizhen.learning.model import AdaptedModel
from huizhen.protocol.errors import PrivacyError

AUTO_S_GAMMA = 0.01
_MICROBATCH_TOKENS = 2048  # bounds memory; the sum over microbatches does not depend on it


@contextmanager
def per_record_gradients(
    model: AdaptedModel, parameters: Mapping[str, nn.Parameter]
) -> Iterator[None]:
    """Let every backward pass leave per-record gradients, (R, *shape), in ``grad_sample``.

    Raises:
        PrivacyError: a trained module is of a kind whose records cannot be told apart.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # full backward hooks on inputs without gradient
        from opacus.grad_sample import GradSampleModule

        try:
            hooked = GradSampleModule(model.module, loss_reduction="sum")
        except NotImplementedError as error:
            raise PrivacyError(f"per-patient gradients are not possible here: {error}") from error
        trained = [
            module
            for module in model.module.modules()
            if any(p is q for p in module.parameters(recurse=False) for q in parameters.values())
        ]
        for module in trained:
            module.train()  # linear layers behave alike in both modes; the hooks ask for this one
        try:
            yield
        finally:
            hooked.to_standard_module()
            for module in trained:
                module.eval()


def private_gradient(
    model: AdaptedModel,
    parameters: Mapping[str, nn.Parameter],
    examples: Examples,
    records_of: Sequence[NDArray[np.intp]],
    *,
    sampling_rate: float,
    max_grad_norm: float | Literal["auto"],
    noise_multiplier: float,
    records_per_patient: int,
    denominator: float,
) -> tuple[dict[str, Tensor], float]:
    """Return g̃ of one step and, for the site's own eyes, the mean loss of the sampled records.

    Must run inside ``per_record_gradients``.

    Args:
        model: with the adapter loaded.
        parameters: the trained tensors by name.
        examples: the site's records.
        records_of: the records of each patient.
        sampling_rate: q.
        max_grad_norm: C, or "auto".
        noise_multiplier: σ.
        records_per_patient: K.
        denominator: B̄ = q · patients_public.

    Raises:
        PrivacyError: σ is not positive, or a gradient is not finite so that no norm bounds it.
    """
    if not noise_multiplier > 0:
        raise PrivacyError(f"noise multiplier is {noise_multiplier}, expected more than 0")
    chosen = poisson_sample(len(records_of), sampling_rate)
    own = [records_of[u][choose(len(records_of[u]), records_per_patient)] for u in chosen]
    sums, loss = _clipped_sum(model, parameters, examples, own, max_grad_norm)
    bound = 1.0 if max_grad_norm == "auto" else max_grad_norm
    noisy = {}
    for name, total in sums.items():
        noise = noise_multiplier * bound * normals(total.numel())
        noisy[name] = (
            (total.double() + torch.from_numpy(noise).view(total.shape)) / denominator
        ).float()
    return noisy, loss


def _clipped_sum(
    model: AdaptedModel,
    parameters: Mapping[str, nn.Parameter],
    examples: Examples,
    own: Sequence[NDArray[np.intp]],
    max_grad_norm: float | Literal["auto"],
) -> tuple[dict[str, Tensor], float]:
    """Return Σ clip(g_u) over the sampled patients, zero when there are none, and the mean loss."""
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    losses: list[float] = []
    lengths = [sum(len(examples.ids[i]) for i in records) for records in own]
    for patients in sorted_batches(lengths, _MICROBATCH_TOKENS):
        rows = np.concatenate([own[u] for u in patients])
        counts = [len(own[u]) for u in patients]
        patient_R = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        weight_R = 1 / torch.tensor(counts, dtype=torch.float32)[patient_R]
        with model.timed():
            loss_R, _ = model.losses(examples.batch(rows))
            loss_R.sum().backward()  # type: ignore[no-untyped-call]  # torch's
        losses += loss_R.detach().tolist()
        grads_U = _per_patient(parameters, patient_R, weight_R, len(counts))
        factor_U = clip_factors(grads_U, max_grad_norm)
        for name, grad_U in grads_U.items():
            sums[name] += torch.einsum("u,u...->...", factor_U, grad_U)
    return sums, float(np.mean(losses)) if losses else float("nan")


def _per_patient(
    parameters: Mapping[str, nn.Parameter], patient_R: Tensor, weight_R: Tensor, patients: int
) -> dict[str, Tensor]:
    """Return each patient's mean gradient, (U, *shape), and clear the per-record ones."""
    grads_U = {}
    for name, parameter in parameters.items():
        grad_R = getattr(parameter, "grad_sample", None)
        if grad_R is None or len(grad_R) != len(patient_R):
            raise PrivacyError(f"tensor {name!r} has no gradient per record: it cannot be trained")
        shaped = weight_R.view(-1, *[1] * (grad_R.dim() - 1)) * grad_R
        total = torch.zeros(patients, *grad_R.shape[1:])
        grads_U[name] = total.index_add_(0, patient_R, shaped)
        parameter.grad_sample = None  # type: ignore[attr-defined]
        parameter.grad = None
    return grads_U


def clip_factors(grads_U: Mapping[str, Tensor], max_grad_norm: float | Literal["auto"]) -> Tensor:
    """Return what each patient's gradient is multiplied by, shape (U,), so that no norm exceeds C.

    Raises:
        PrivacyError: a gradient is not finite.
    """
    squares = [grad.double().flatten(1).pow(2).sum(dim=1) for grad in grads_U.values()]
    norm_U = torch.stack(squares).sum(dim=0).sqrt()
    if not torch.isfinite(norm_U).all():
        raise PrivacyError("a patient's gradient is not finite, no norm bounds it: lower the rate")
    if max_grad_norm == "auto":
        return (1 / (norm_U + AUTO_S_GAMMA)).float()
    return (max_grad_norm / norm_U.clamp(min=max_grad_norm)).float()
