"""FedEx-LoRA: average the factors, and merge what the average misses into the base.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation
Models", ACL 2025 (https://arxiv.org/abs/2410.09432): with B̄ and Ā the mean factors,
W ← W + s·(Σ p_i B_i A_i − B̄Ā), so that nothing of the mean product is lost. The residual is
Σ p_i (B_i − B̄)(A_i − A_N), of rank (N − 1)·r, kept as a pair of factors: what was merged goes down
in every round, so many ranks more each time until the layer is full.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from huizhen.protocol.adapter import Shapes, Tensors
from huizhen.strategies.base import A, B, Facts, Given, Stacking, StrategyState, modules
from huizhen.strategies.products import f32
from huizhen.strategies.stacking import factors, in_turn, merge, merged_shapes, others, rank_after


@dataclass(frozen=True, slots=True, kw_only=True)
class FedEx(Stacking):
    """Both factors are trained and averaged; the residual is merged."""

    ranks: int
    # of all sites but one together

    facts = Facts(linear=False, exact=True, mixed_ranks=False, sees_individual_updates=True)

    def init(self, x: Tensors) -> StrategyState:
        """Return the state before the first round."""
        return StrategyState(x)

    def announces(self, shapes: Shapes, round: int) -> Shapes:
        """Return everything, and what was merged."""
        return {**shapes, **merged_shapes(round - 1, self.ranks, shapes)}

    def join(self, state: StrategyState, given: Sequence[Given], round: int) -> StrategyState:
        """Return the state after a round in which these updates were counted.

        Raises:
            AggregationError: an update does not fit the adapter.
        """
        given = in_turn(given)
        x = others(state.x, given)
        shapes = {name: value.shape for name, value in state.x.items()}
        for module in modules(state.x):
            terms = factors(state.x, given, module)
            mean_B = f32(np.sum([share * left for share, left, _ in terms], axis=0))
            mean_A = f32(np.sum([share * right for share, _, right in terms], axis=0))
            # Σ p_i (B_i − B̄) = 0, so that one site's A may stand for Ā: one rank-r term less.
            residual = [(p, left - mean_B, right - terms[-1][2]) for p, left, right in terms[:-1]]
            rank = rank_after(round, self.ranks, shapes, module)
            if self.ranks:
                x |= merge(state.x, module, residual, rank)
            x[module + B], x[module + A] = mean_B, mean_A
        return StrategyState(x, state.moments)
