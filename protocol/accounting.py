"""What a sequence of DP-SGD steps costs: (ε, δ) by privacy loss distributions.

Mechanism: the subsampled Gaussian of Abadi et al. 2016 with Poisson sampling, neighbouring by
adding or removing one unit. ε comes from the privacy loss distribution (Koskela et al. 2020;
Doroshenko et al. 2022) as implemented by ``dp_accounting`` with pessimistic rounding, and is
compared with Rényi accounting (Mironov et al. 2019), an independent upper bound: a PLD that
exceeds it was discretised too coarsely.

    σ  noise_multiplier, the noise's standard deviation over the clipping norm
    q  sampling_rate                          T  steps
"""

import functools
import math

import dp_accounting
from dp_accounting import pld, rdp
from scipy.optimize import brentq

from huizhen.protocol.errors import ConfigError, PrivacyError

ACCOUNTANT = "PLD (dp-accounting), add-or-remove-one, checked against RDP"
_INTERVALS = (1e-4, 1e-5)  # of the discretised privacy loss; the finer is used when needed
_MIN_SIGMA, _MAX_SIGMA = 0.2, 1e4


_ORDERS = [*range(2, 65), 80, 128, 256, 512]  # whole Rényi orders have a closed form


@functools.lru_cache(maxsize=1024)
def epsilon(noise_multiplier: float, sampling_rate: float, steps: int, delta: float) -> float:
    """Return the ε that ``steps`` steps spend at ``delta``.

    Raises:
        PrivacyError: no discretisation gives a value within the Rényi bound.
    """
    event = _event(noise_multiplier, sampling_rate, steps)
    upper = _renyi_bound(noise_multiplier, sampling_rate, steps, delta)
    for interval in _INTERVALS:
        accountant = pld.PLDAccountant(value_discretization_interval=interval * max(1, upper / 20))
        spent = float(accountant.compose(event).get_epsilon(delta))
        if spent <= upper:
            return spent
    raise PrivacyError(
        f"epsilon by PLD is {spent:.4g}, over the Rényi bound {upper:.4g}: "
        "this configuration cannot be certified"
    )


@functools.lru_cache(maxsize=1024)
def calibrate(target_epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """Return a σ whose ``steps`` steps spend at most ``target_epsilon``, within 0.1 % of the least.

    Raises:
        ConfigError: no σ up to 10,000 suffices.
    """
    if _renyi_bound(_MAX_SIGMA, sampling_rate, steps, delta) > target_epsilon:
        raise ConfigError(
            f"no noise up to {_MAX_SIGMA:g} gives epsilon {target_epsilon} in {steps} steps: "
            "raise epsilon or lower [rounds] count"
        )
    # Rényi accounting is cheap and never below the PLD: its σ is enough, and the least is near.
    high = _MIN_SIGMA
    while _renyi_bound(high, sampling_rate, steps, delta) > target_epsilon:
        high *= 1.1

    def excess(sigma: float) -> float:
        spent = epsilon(sigma, sampling_rate, steps, delta)  # 0 where delta alone covers it
        return math.log(max(spent, 1e-12 * target_epsilon) / target_epsilon)

    low = max(_MIN_SIGMA, high / 2)
    sigma = low if excess(low) <= 0 else brentq(excess, low, high, xtol=3e-4 * high)
    while excess(sigma) > 0:
        sigma *= 1 + 2e-4
    return math.ceil(sigma * 1e4) / 1e4


def _renyi_bound(sigma: float, sampling_rate: float, steps: int, delta: float) -> float:
    accountant = rdp.RdpAccountant(_ORDERS).compose(_event(sigma, sampling_rate, steps))
    return float(accountant.get_epsilon(delta))


def _event(noise_multiplier: float, sampling_rate: float, steps: int) -> dp_accounting.DpEvent:
    step: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(noise_multiplier)
    if sampling_rate < 1:
        step = dp_accounting.PoissonSampledDpEvent(sampling_rate, step)
    return dp_accounting.SelfComposedDpEvent(step, steps)
