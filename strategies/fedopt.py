"""Optimisers at the coordinator: the mean update is taken for a gradient.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, Algorithm 2 (https://arxiv.org/abs/2003.00295),
without bias correction and, a departure, from v = 0: with Δ the mean update,
m ← β₁m + (1 − β₁)Δ and, by coordinate,

    fedadagrad   v ← v + Δ²
    fedyogi      v ← v − (1 − β₂)Δ² sign(v − Δ²)
    fedadam      v ← β₂v + (1 − β₂)Δ²
                 x ← x + η·m / (√v + τ)

and FedAvgM of Hsu et al. 2019 (https://arxiv.org/abs/1909.06335): m ← βm + Δ, x ← x + η·m.
What was not trained in a round is left alone, its moments too. As post-processing of the sum they
cost no privacy. Not exact, as ``fedavg``.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from huizhen.protocol.adapter import Array, Tensors
from huizhen.strategies.base import Averaging, Facts, StrategyState, add, check_fits, zeros

Values = NDArray[np.float64]

_FACTS = Facts(linear=True, exact=False, mixed_ranks=False, sees_individual_updates=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class FedAvgM(Averaging):
    """Momentum at the coordinator."""

    server_learning_rate: float
    beta1: float

    facts = _FACTS

    def init(self, x: Tensors) -> StrategyState:
        """Return the state before the first round; the momentum is 0."""
        return StrategyState(x, {"m": zeros(x)})

    def step(self, state: StrategyState, combined: Tensors, round: int) -> StrategyState:
        """Return the state after a step along the momentum."""
        check_fits(state.x, combined)
        momentum = {
            name: _f32(self.beta1 * state.moments["m"][name] + delta.astype(np.float64))
            for name, delta in combined.items()
        }
        steps = {name: _f32(self.server_learning_rate * m) for name, m in momentum.items()}
        return StrategyState(add(state.x, steps), {"m": {**state.moments["m"], **momentum}})


class _FedOpt(Averaging):
    """What the three adaptive ones share: all but the second moment."""

    server_learning_rate: float
    beta1: float
    tau: float

    facts = _FACTS

    def init(self, x: Tensors) -> StrategyState:
        """Return the state before the first round; both moments are 0."""
        return StrategyState(x, {"m": zeros(x), "v": zeros(x)})

    def step(self, state: StrategyState, combined: Tensors, round: int) -> StrategyState:
        """Return the state after one step of the optimiser.

        Raises:
            AggregationError: the update does not fit the adapter.
        """
        check_fits(state.x, combined)
        first, second, steps = {}, {}, {}
        for name, delta in combined.items():
            gradient = delta.astype(np.float64)
            m = self.beta1 * state.moments["m"][name] + (1 - self.beta1) * gradient
            v = self._second(state.moments["v"][name].astype(np.float64), gradient**2)
            first[name], second[name] = _f32(m), _f32(v)
            steps[name] = _f32(self.server_learning_rate * m / (np.sqrt(v) + self.tau))
        moments = {
            "m": {**state.moments["m"], **first},
            "v": {**state.moments["v"], **second},
        }
        return StrategyState(add(state.x, steps), moments)

    @abstractmethod
    def _second(self, v: Values, squared: Values) -> Values:
        """Return the second moment after an update whose squares are given."""


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(_FedOpt):
    """Adagrad at the coordinator."""

    server_learning_rate: float
    beta1: float
    tau: float

    def _second(self, v: Values, squared: Values) -> Values:
        return v + squared


@dataclass(frozen=True, kw_only=True)
class FedYogi(_FedOpt):
    """Yogi at the coordinator."""

    server_learning_rate: float
    beta1: float
    beta2: float
    tau: float

    def _second(self, v: Values, squared: Values) -> Values:
        return v - (1 - self.beta2) * squared * np.sign(v - squared)


@dataclass(frozen=True, kw_only=True)
class FedAdam(_FedOpt):
    """Adam at the coordinator."""

    server_learning_rate: float
    beta1: float
    beta2: float
    tau: float

    def _second(self, v: Values, squared: Values) -> Values:
        return self.beta2 * v + (1 - self.beta2) * squared


def _f32(values: NDArray[Any]) -> Array:
    return values.astype(np.float32)
