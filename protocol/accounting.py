"""What a patient's privacy costs: (ε, δ) of DP-SGD steps, by privacy loss distributions.

Mechanism: the subsampled Gaussian of Abadi et al. 2016 with Poisson sampling. Neighbouring: one
patient, with all their records, is present or absent; exchanging one patient for another is not
what is claimed and costs about twice as much.

    σ  noise_multiplier, the noise's standard deviation over the clipping norm
    q  sampling_rate                          T  steps

ε comes from the privacy loss distribution (PLD; Koskela et al. 2020; Doroshenko et al. 2022) as
implemented by ``dp_accounting`` with pessimistic rounding, and is compared with Rényi accounting
(Mironov et al. 2019), an independent upper bound: a PLD above it was discretised too coarsely.

A cap on the patients of a step is priced in ``truncated_poisson.py``.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting import rdp
from numpy.typing import NDArray
from scipy.optimize import brentq

from huizhen.protocol.errors import BudgetExhaustedError, ConfigError, PrivacyError
from huizhen.protocol.truncated_poisson import chance_of_full, step_loss, step_renyi

ACCOUNTANT = "PLD (dp-accounting), add-or-remove-one, checked against RDP"
_MAX_STEPS = 1_000_000  # the convolution's memory grows with them
_MIN_SIGMA, _MAX_SIGMA = 0.2, 1e4  # of what calibrate looks for
_ORDERS = [*range(2, 65), 80, 128, 256, 512]  # whole Rényi orders have a closed form
_REFINEMENTS = (1, 1 / 4, 1 / 16)  # of the discretised privacy loss; finer only when needed
_BEYOND = 10.0  # of log(ε / target): what a trial without a price counts as
_FFT_ERROR = 1e-15  # of δ and per step: ten times what the convolution was seen to be off by


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """Equal steps of DP-SGD on the same patients, an entry of a ledger.

    Raises:
        PrivacyError: a value has no price, such as noise of 0 or a cap without a bound.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int
    batch_cap: int | None = None
    # at most so many patients in a step; needs patients_bound
    patients_bound: int | None = None
    # public, known to hold before anyone counts: never made from the true number of patients

    def __post_init__(self) -> None:
        if not 0.1 <= self.noise_multiplier <= 1e6:
            raise PrivacyError(f"noise_multiplier is {self.noise_multiplier}, expected 0.1 to 1e6")
        if not 1e-6 <= self.sampling_rate <= 1:
            raise PrivacyError(f"sampling_rate is {self.sampling_rate}, expected 1e-6 to 1")
        for name in ("steps", "batch_cap", "patients_bound"):
            value = getattr(self, name)
            if (name == "steps" or value is not None) and (type(value) is not int or value < 1):
                raise PrivacyError(f"{name} is {value!r}, expected a whole number from 1")
        if (self.batch_cap is None) != (self.patients_bound is None):
            raise PrivacyError(
                f"batch_cap is {self.batch_cap} and patients_bound {self.patients_bound}, "
                "expected both or neither: a capped step has no price without a bound"
            )

    def times(self, count: int) -> "Spend":
        """Return ``count`` such spends as one, as of so many rounds."""
        return dataclasses.replace(self, steps=self.steps * count)


def merge(spends: Iterable[Spend]) -> tuple[Spend, ...]:
    """Return the spends with equal mechanisms added up, in an order of their own."""
    steps: dict[Spend, int] = {}
    for spend in spends:
        one = dataclasses.replace(spend, steps=1)
        steps[one] = steps.get(one, 0) + spend.steps
    merged = (one.times(count) for one, count in steps.items())
    return tuple(sorted(merged, key=lambda s: [v or 0 for v in dataclasses.astuple(s)]))


def to_event(spend: Spend) -> dp_accounting.DpEvent:
    """Return a spend as an event of ``dp_accounting``; ``from_event`` is the way back."""
    step: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(spend.noise_multiplier)
    if spend.batch_cap is not None:
        step = dp_accounting.TruncatedSubsampledGaussianDpEvent(
            dataset_size=spend.patients_bound,
            sampling_probability=spend.sampling_rate,
            truncated_batch_size=spend.batch_cap,
            noise_multiplier=spend.noise_multiplier,
        )
    elif spend.sampling_rate < 1:
        step = dp_accounting.PoissonSampledDpEvent(spend.sampling_rate, step)
    return dp_accounting.SelfComposedDpEvent(step, spend.steps)


def from_event(event: dp_accounting.DpEvent) -> tuple[Spend, ...]:
    """Return what an event spends, equal mechanisms added up.

    For what other accountants exchange. A ledger holds ``Spend``, which can say nothing without a
    price.

    Raises:
        PrivacyError: the event is, or holds, something other than compositions of Gaussian steps
            with or without Poisson or truncated Poisson sampling.
    """
    match event:
        case dp_accounting.NoOpDpEvent():
            return ()
        case dp_accounting.ComposedDpEvent(events):
            return merge(spend for part in events for spend in from_event(part))
        case dp_accounting.SelfComposedDpEvent(part, count):
            return tuple(spend.times(count) for spend in from_event(part))
        case dp_accounting.GaussianDpEvent(sigma):
            return (Spend(noise_multiplier=sigma, sampling_rate=1.0, steps=1),)
        case dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma)):
            return (Spend(noise_multiplier=sigma, sampling_rate=rate, steps=1),)
        case dp_accounting.TruncatedSubsampledGaussianDpEvent(bound, rate, cap, sigma):
            free = Spend(noise_multiplier=sigma, sampling_rate=rate, steps=1)
            return (dataclasses.replace(free, batch_cap=cap, patients_bound=bound),)
        case _:
            pass
    inner = f" of {type(event.event).__name__}" if hasattr(event, "event") else ""
    raise PrivacyError(
        f"event {type(event).__name__}{inner} has no price here, expected Gaussian steps with or "
        "without Poisson sampling"
    )


def epsilon(spends: Sequence[Spend], delta: float) -> float:
    """Return the ε that the spends together cost each patient at ``delta``.

    They may be of several studies. What a study asks may depend on what came out before it, its
    noise, rate and steps may not.

    Raises:
        PrivacyError: no discretisation gives a value within the Rényi bound, or δ is so small
            that rounding errors of the arithmetic would count.
    """
    return _certified(merge(spends), float(delta))


def calibrate(
    target_epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    *,
    batch_cap: int | None = None,
    patients_bound: int | None = None,
    already: Sequence[Spend] = (),
) -> float:
    """Return a σ that keeps within a budget, at most 0.1 % above the least that does.

    Args:
        target_epsilon: what ``already`` and the new steps may cost together.
        delta: at this δ.
        sampling_rate: q of the new steps.
        steps: the most that can be run, whether or not they will be.
        batch_cap: B, with ``patients_bound``, as in ``Spend``.
        patients_bound: N.
        already: what the same patients have spent before.

    Raises:
        BudgetExhaustedError: ``already`` leaves nothing.
        ConfigError: no σ up to 10,000 suffices.
        PrivacyError: as ``epsilon`` and ``Spend``.
    """
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ConfigError(f"epsilon is {target_epsilon}, expected more than 0")
    quietest = Spend(
        noise_multiplier=_MAX_SIGMA,
        sampling_rate=float(sampling_rate),
        steps=steps,
        batch_cap=batch_cap,
        patients_bound=patients_bound,
    )
    return _calibrated(float(target_epsilon), float(delta), quietest, merge(already))


@functools.lru_cache(maxsize=1024)
def _calibrated(target: float, delta: float, quietest: Spend, already: tuple[Spend, ...]) -> float:
    def together(sigma: float) -> tuple[Spend, ...]:
        return (*already, dataclasses.replace(quietest, noise_multiplier=sigma))

    def excess(log_sigma: float) -> float:
        try:
            spent = _certified(together(math.exp(log_sigma)), delta)  # 0 where δ alone covers it
        except PrivacyError:  # so little noise that no grid holds the loss: over any target
            return _BEYOND
        return math.log(max(spent, 1e-12 * target) / target)

    before = _certified(already, delta)
    if before >= target:
        raise BudgetExhaustedError(
            f"epsilon is {before:.4g} already, {target:g} is allowed: no further step fits"
        )
    if _certified(together(_MAX_SIGMA), delta) > target:
        raise ConfigError(
            f"no noise up to {_MAX_SIGMA:g} gives epsilon {target:g} in {quietest.steps} steps: "
            "raise epsilon or lower [rounds] count"
        )
    # Rényi accounting is cheap and never below the PLD: its σ is enough, and the least is near.
    high = _MIN_SIGMA
    while high < _MAX_SIGMA and renyi_epsilon(together(high), delta) > target:
        high = min(1.2 * high, _MAX_SIGMA)
    low = max(high / 1.5, _MIN_SIGMA)
    while low > _MIN_SIGMA and excess(math.log(low)) <= 0:
        low, high = max(low / 1.5, _MIN_SIGMA), low
    sigma = low
    if low < high and excess(math.log(low)) > 0:
        sigma = math.exp(brentq(excess, math.log(low), math.log(high), xtol=3e-4))
    sigma = math.ceil(sigma * 1e4) / 1e4
    while _certified(merge(together(sigma)), delta) > target:  # as epsilon will price it
        sigma = math.ceil(sigma * (1 + 2e-4) * 1e4) / 1e4
    return sigma


@functools.lru_cache(maxsize=4096)
def _certified(spends: tuple[Spend, ...], delta: float) -> float:
    if not 0 < delta < 1:
        raise PrivacyError(f"delta is {delta}, expected between 0 and 1")
    if not spends:
        return 0.0
    convolved = sum(_convolutions(spend) for spend in spends)
    if convolved > _MAX_STEPS:
        raise PrivacyError(f"steps are {convolved}, at most {_MAX_STEPS} can be priced")
    if _FFT_ERROR * convolved > delta / 100:
        raise PrivacyError(
            f"delta is {delta:g}, too small for the arithmetic of {convolved} steps, "
            f"expected at least {100 * _FFT_ERROR * convolved:.1g}: raise delta"
        )
    upper = renyi_epsilon(spends, delta)
    for finer in _REFINEMENTS:
        loss = _composed(spends, _width(spends, upper) * finer)
        with np.errstate(over="ignore"):  # an ε that large is inf, and refused below
            spent = float(loss.get_epsilon_for_delta(delta - _FFT_ERROR * convolved))
        if spent <= upper:
            return spent
    raise PrivacyError(
        f"epsilon by PLD is {spent:.4g}, over the Rényi bound {upper:.4g}: "
        "this configuration cannot be certified"
    )


def _width(spends: Sequence[Spend], upper: float) -> float:
    """Return the grid's width: 1/32 of the standard deviation of a step's privacy loss, or less.

    Discretising by connected dots adds about width²/6 to each step's variance, here 0.02 % of it.
    """
    steps = sum(_convolutions(spend) for spend in spends)
    variance = widest = 0.0
    for spend in spends:
        precision = spend.noise_multiplier**-2
        if _convolutions(spend) < spend.steps:
            variance += spend.steps * precision
        else:
            chi = math.expm1(precision) * spend.sampling_rate**2
            variance += spend.steps * min(chi, 1 + precision)
        largest = (0.5 + 10 * spend.noise_multiplier) * precision
        largest = 16 * largest if _full(spend) else largest
        widest = max(widest, math.log1p(spend.sampling_rate * math.expm1(min(largest, 700))))
    width = min(math.sqrt(variance / steps) / 32, max(1e-2, upper / 1e4))
    width = max(width, widest / 2e5, upper / 1e6, 1e-8) * max(1, steps / 3e5)  # bounds memory
    return 2.0 ** math.floor(math.log2(width))  # few widths, so that trials of σ share PLDs


def _convolutions(spend: Spend) -> int:
    """Return how often the loss is convolved: Gaussian steps without sampling are one Gaussian."""
    return 1 if spend.sampling_rate == 1 and spend.batch_cap is None else spend.steps


@functools.lru_cache(maxsize=32)
def _composed(spends: tuple[Spend, ...], width: float) -> Any:
    """Return the PLD of all spends; all but the last are kept for the next trial of the last."""
    last = _loss(spends[-1], width)
    return last if len(spends) == 1 else _composed(spends[:-1], width).compose(last)


def _loss(spend: Spend, width: float) -> Any:
    """Return the PLD of a spend, rounded up to multiples of ``width``."""
    sigma, count = spend.noise_multiplier, _convolutions(spend)
    if count < spend.steps:
        sigma /= math.sqrt(spend.steps)
    loss = step_loss(sigma, spend.sampling_rate, _full(spend), width)
    return loss.self_compose(count) if count > 1 else loss


def _full(spend: Spend) -> float:
    if spend.batch_cap is None or spend.patients_bound is None:
        return 0.0
    return chance_of_full(spend.sampling_rate, spend.batch_cap, spend.patients_bound)


def renyi_epsilon(spends: Sequence[Spend], delta: float) -> float:
    """Return ε by Rényi accounting, an upper bound that shares nothing with the PLD."""
    divergences = sum(s.steps * _renyi(dataclasses.replace(s, steps=1)) for s in spends)
    return float(rdp.compute_epsilon(_ORDERS, divergences, delta)[0])


@functools.lru_cache(maxsize=256)
def _renyi(step: Spend) -> NDArray[np.float64]:
    return step_renyi(step.noise_multiplier, step.sampling_rate, _full(step), _ORDERS)
