"""Fed-SB: only an r × r matrix between two frozen factors is trained and travels.

Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in
(Private) Federated LoRA Fine-Tuning", 2025 (https://arxiv.org/abs/2502.15436): ΔW = s·B·R·A with B
and A common, so that the mean of R is the mean of the products, in r² numbers for each layer, and
DP noise enters r² numbers only.

Departure: the paper takes B and A from the first singular vectors of one step of full fine-tuning
on the data, which would have to be charged to the ledger. Here both are orthonormal draws from the
public seed, with R = 0: ‖ΔR‖_F is the norm of the product, and nothing is known of the task.
"""

from dataclasses import dataclass

import numpy as np

from huizhen.protocol.adapter import Shapes, Tensors
from huizhen.strategies.base import (
    CORE,
    A,
    Averaging,
    B,
    Facts,
    StrategyState,
    add,
    check_frozen,
    modules,
)
from huizhen.strategies.ffa import drawn_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class FedSb(Averaging):
    """R and the head are trained; both factors are frozen."""

    seed: int

    facts = Facts(linear=True, exact=True, mixed_ranks=False, sees_individual_updates=False)

    def init(self, x: Tensors) -> StrategyState:
        """Return the state before the first round: R = 0 between orthonormal factors.

        Raises:
            ConfigError: the rank is larger than a layer is wide.
        """
        found = dict(x)
        for module in modules(x):
            rank, width = x[module + A].shape
            height = x[module + B].shape[0]
            found[module + A] = drawn_rows(self.seed, module + A, module + A, (rank, width))
            columns = drawn_rows(self.seed, module + B, module + B, (rank, height))
            found[module + B] = np.ascontiguousarray(columns.T)
            found[module + CORE] = np.zeros((rank, rank), np.float32)
        return StrategyState(found)

    def trains(self, shapes: Shapes, round: int) -> frozenset[str]:
        """Return R and the head."""
        return frozenset(name for name in shapes if not name.endswith((A, B)))

    def step(self, state: StrategyState, combined: Tensors, round: int) -> StrategyState:
        """Return the state after adding the mean update.

        Raises:
            AggregationError: the update holds a factor, or does not fit the adapter.
        """
        check_frozen(combined, (A, B))
        return StrategyState(add(state.x, combined), state.moments)
