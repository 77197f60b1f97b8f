"""One DP-SGD step over patients.

Abadi et al. 2016, Algorithm 1 (https://arxiv.org/abs/1607.00133), with the unit moved from the
example to the patient: a patient's gradient is the mean over at most K of their records, drawn
anew in each step.

    S   the patients of a step, Poisson-sampled     g_u  gradient of patient u, all trained tensors
    C   max_grad_norm (1 under AUTO-S)              σ    noise_multiplier
    B̄   q · patients_public, the public denominator

    g̃ = ( Σ_{u∈S} clip(g_u) + N(0, σ²C²I) ) / B̄

``clip`` is g · min(1, C/‖g‖), or AUTO-S, g / (‖g‖ + 0.01) (Bu et al. 2023, Algorithm 1), or 0 where
‖g‖ is not finite. Adding or
removing one patient moves the sum by at most C: the denominator, the number of steps and the
learning rate are public. Shape suffix: U patients.

Floating point: clipping aims at 0.999 C, which leaves room for rounding. Norms add up 8,192 squares
at a time in float32 (relative error about 2⁻¹²), the rest in float64. So does the sum: over N
patients its rounding, which depends on all of them, stays under N² · 2⁻⁵² C, for N up to a million.
The noisy sum is rounded to a grid of about σC · 2⁻²⁰ before anything else sees it, so that no
low-order bit of a float tells which sum it came from (Mironov 2012,
https://doi.org/10.1145/2382196.2382264). The rounding inside a base model's own forward pass is
outside this argument.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from huizhen.client.randomness import NoiseSource, choose, poisson_sample
from huizhen.protocol.errors import PrivacyError

AUTO_S_GAMMA = 0.01
_MARGIN = 0.999  # of C, what clipping aims at
_NORM_BLOCK = 8192  # squares added up in float32; longer sums lose more than the margin
_GRID_BITS = 20  # the noise's standard deviation over the grid's step, in powers of two

ClipNorm = float | Literal["auto"]


@dataclass(frozen=True, slots=True)
class PatientBatch:
    """Some patients' gradients, before clipping."""

    gradients: dict[str, Tensor]
    # (U, *shape) of each trained tensor
    losses: list[float]
    # of the records behind them, for the site's own eyes


class PatientGradients(Protocol):
    """Where the gradients of a step come from."""

    @property
    def num_patients(self) -> int:
        """How many patients there are to sample from."""

    def microbatches(self, chosen: NDArray[np.intp]) -> Iterator[PatientBatch]:
        """Yield the gradients of the patients at ``chosen``, each patient exactly once."""


def private_gradient(
    source: PatientGradients,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    sampling_rate: float,
    max_grad_norm: ClipNorm,
    noise_multiplier: float,
    denominator: float,
    noise: NoiseSource,
    batch_cap: int | None = None,
) -> tuple[dict[str, Tensor], float]:
    """Return g̃ of one step and, for the site's own eyes, the mean loss of the sampled records.

    A step without any patient is a step: it adds its noise like every other.

    Args:
        source: the patients' gradients.
        shapes: of the trained tensors, by name.
        sampling_rate: q.
        max_grad_norm: C, or "auto".
        noise_multiplier: σ.
        denominator: B̄ = q · patients_public.
        noise: gives as many normals as there are trained numbers.
        batch_cap: truncated Poisson sampling: the most patients of a step.

    Raises:
        PrivacyError: σ is not positive.
    """
    if not noise_multiplier > 0:
        raise PrivacyError(f"noise multiplier is {noise_multiplier}, expected more than 0")
    chosen = poisson_sample(source.num_patients, sampling_rate)
    if batch_cap is not None:
        chosen = chosen[choose(len(chosen), batch_cap)]
    sums, loss = clipped_sum(source, chosen, shapes, max_grad_norm)
    deviation = noise_multiplier * (1.0 if max_grad_norm == "auto" else max_grad_norm)
    step = 2.0 ** (math.floor(math.log2(deviation)) - _GRID_BITS)
    normals = torch.from_numpy(noise.draw())
    noisy, begin = {}, 0
    for name, total in sums.items():
        own = normals[begin : begin + total.numel()].view(total.shape)
        begin += total.numel()
        released = total.add_(own, alpha=deviation).div_(step).round_().mul_(step)
        noisy[name] = released.div_(denominator).float()
    return noisy, loss


def clipped_sum(
    source: PatientGradients,
    chosen: NDArray[np.intp],
    shapes: Mapping[str, tuple[int, ...]],
    max_grad_norm: ClipNorm,
) -> tuple[dict[str, Tensor], float]:
    """Return Σ clip(g_u) over the chosen patients in float64, zero when there are none.

    Also the mean loss of their records. Must not leave the site: it has no noise yet.
    """
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    losses: list[float] = []
    for batch in source.microbatches(chosen):
        factors = clip_factors(batch.gradients, max_grad_norm).tolist()
        for name, grad_U in batch.gradients.items():
            for factor, grad in zip(factors, grad_U.unbind(), strict=True):
                if factor:
                    sums[name].add_(grad, alpha=factor)  # float64: its rounding couples patients
        losses += batch.losses
    return sums, float(np.mean(losses)) if losses else math.nan


def clip_factors(grads_U: Mapping[str, Tensor], max_grad_norm: ClipNorm) -> Tensor:
    """Return what each patient's gradient is multiplied by so that no norm exceeds C, float64 (U,).

    Where no norm bounds a gradient, because it is not finite or its squares overflow, the factor is
    0 and the patient adds nothing. An error would tell that the patient is there: whoever announces
    the adapter can make one class overflow.
    """
    norms = [
        torch.linalg.vector_norm(part, dim=1).double()
        for grad in grads_U.values()
        for part in torch.split(grad.flatten(1), _NORM_BLOCK, dim=1)
    ]
    norm_U = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    if max_grad_norm == "auto":
        factor_U = _MARGIN / (norm_U + AUTO_S_GAMMA)
    else:
        factor_U = _MARGIN * max_grad_norm / norm_U.clamp(min=_MARGIN * max_grad_norm)
    return torch.where(torch.isfinite(norm_U), factor_U, 0.0)
