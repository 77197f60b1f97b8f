"""What FLamby's private steps cost: as counted, as run under Poisson sampling, and as shuffled.

FLamby calibrates σ for ⌊15 / q⌋ steps, 15 epochs, and runs 1,500 steps at every hospital. Its loop
does not use the Poisson loader that Opacus returns: it goes on over shuffled batches of four
(``fed_avg.py``, ``training_dataloaders_with_memory``). For those no amplification by sampling is
proven (Chua et al. 2024, https://arxiv.org/abs/2403.17673): a record is in one batch of a pass, so
that ⌈1500 q⌉ Gaussian steps without sampling bound what it costs, where the neighbour has the
record's gradients set to zero.
"""

import math
import warnings
from dataclasses import dataclass

from opacus.accountants import RDPAccountant
from opacus.accountants.utils import get_noise_multiplier

from huizhen.protocol.accounting import Spend, epsilon

ROUNDS, STEPS, DELTA = 15, 100, 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What one hospital's noise is, and what it costs."""

    sigma: float
    steps_counted: int
    rdp_counted: float
    rdp_true: float
    pld_true: float
    unamplified: float


def spent(nominal: float, q: float) -> Spent:
    """Return σ as FLamby calibrates it for a nominal ε, and the ε of what runs with it."""
    counted, true = int(ROUNDS / q), ROUNDS * STEPS
    with warnings.catch_warnings():
        # its orders end at 63, a little too high an ε under strong noise: FLamby's accountant
        warnings.filterwarnings("ignore", "Optimal order is the largest alpha")
        sigma = get_noise_multiplier(
            target_epsilon=nominal, target_delta=DELTA, sample_rate=q, epochs=ROUNDS
        )
        rdp = [_rdp(sigma, q, steps) for steps in (counted, true)]
    return Spent(
        sigma=sigma,
        steps_counted=counted,
        rdp_counted=rdp[0],
        rdp_true=rdp[1],
        pld_true=epsilon([Spend(noise_multiplier=sigma, sampling_rate=q, steps=true)], DELTA),
        unamplified=epsilon(
            [Spend(noise_multiplier=sigma, sampling_rate=1.0, steps=math.ceil(true * q))], DELTA
        ),
    )


def _rdp(sigma: float, q: float, steps: int) -> float:
    accountant = RDPAccountant()
    accountant.history = [(sigma, q, steps)]
    return float(accountant.get_epsilon(DELTA))
