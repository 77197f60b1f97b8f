"""FedSVD: FFA-LoRA whose two factors are turned to singular vectors after each round.

Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", NeurIPS
2025 (https://arxiv.org/abs/2505.12805): sites train B with A common; then UΣVᵀ = B̄A, B ← U·Σ, A ←
Vᵀ. The product does not change, so the round is exact, and the rows of A stay orthonormal.

What it does not do: the new A spans the same r rows as the first one, since the row space of B̄A
lies in that of A. Under plain SGD with isotropic noise it walks the path of ``ffa_ortho`` in
another basis (tests/strategies/test_identities.py); with Adam, which is not rotation-invariant, it
may differ.

With A's rows orthonormal the decomposition of B̄ alone gives all: B̄ = UΣWᵀ, A ← WᵀA, where the
r × r rotation W is whole even if B̄ has lost rank.
"""

from dataclasses import dataclass

import numpy as np

from huizhen.protocol.adapter import Shapes, Tensors
from huizhen.strategies.base import (
    A,
    Averaging,
    B,
    Facts,
    StrategyState,
    add,
    check_frozen,
    check_ranks,
    modules,
)
from huizhen.strategies.ffa import with_orthonormal_rows
from huizhen.strategies.products import f32


@dataclass(frozen=True, slots=True, kw_only=True)
class FedSvd(Averaging):
    """B is trained; A is turned with it, and is announced."""

    seed: int

    facts = Facts(linear=True, exact=True, mixed_ranks=False, sees_individual_updates=False)

    def init(self, x: Tensors) -> StrategyState:
        """Return the state before the first round, every A with orthonormal rows of the seed.

        Raises:
            ConfigError: the rank is larger than a layer.
        """
        check_ranks(x)
        return StrategyState(with_orthonormal_rows(x, self.seed))

    def trains(self, shapes: Shapes, round: int) -> frozenset[str]:
        """Return every name but those of A."""
        return frozenset(name for name in shapes if not name.endswith(A))

    def announces(self, shapes: Shapes, round: int) -> Shapes:
        """Return everything: A is turned by the coordinator."""
        return shapes

    def step(self, state: StrategyState, combined: Tensors, round: int) -> StrategyState:
        """Return the state after adding the mean update and turning the factors.

        Raises:
            AggregationError: the update holds an A, or does not fit the adapter.
        """
        check_frozen(combined, (A,))
        x = add(state.x, combined)
        for module in modules(x):
            left = x[module + B].astype(np.float64)
            vectors, values, turn = np.linalg.svd(left, full_matrices=False)
            x[module + B] = f32(vectors * values)
            x[module + A] = f32(_orthonormal(turn @ x[module + A].astype(np.float64)))
        return StrategyState(x, state.moments)


def _orthonormal(
    rows: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return nearly orthonormal rows without the rounding that many turns would add up.

    One step of Newton's iteration for the polar factor, whose error is the square of the one
    before.
    """
    found: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = (
        1.5 * rows - 0.5 * (rows @ rows.T) @ rows
    )
    return found
