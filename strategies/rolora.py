"""RoLoRA: the factors take turns.

Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", NeurIPS
2025 (https://arxiv.org/abs/2502.01755): in odd rounds sites train B with A common, in even rounds A
with B common, so that the mean of the products is the product of the means in each round. The head
is trained in every round.

Both factors are announced, so that a site that missed a round, or was started anew, needs nothing
of its own. While B = 0 the gradient of A is 0 and under DP its rounds would be noise alone:
``warm_rounds`` train B before the turns begin.
"""

from dataclasses import dataclass

from huizhen.protocol.adapter import Shapes, Tensors
from huizhen.strategies.base import A, Averaging, B, Facts, StrategyState, add, check_frozen


@dataclass(frozen=True, slots=True, kw_only=True)
class RoLora(Averaging):
    """B in odd rounds, A in even ones, after ``warm_rounds`` of B alone."""

    warm_rounds: int

    facts = Facts(linear=True, exact=True, mixed_ranks=False, sees_individual_updates=False)

    def init(self, x: Tensors) -> StrategyState:
        """Return the state before the first round."""
        return StrategyState(x)

    def trains(self, shapes: Shapes, round: int) -> frozenset[str]:
        """Return the head and one of the factors."""
        return frozenset(name for name in shapes if not name.endswith(self._frozen(round)))

    def announces(self, shapes: Shapes, round: int) -> Shapes:
        """Return everything."""
        return shapes

    def step(self, state: StrategyState, combined: Tensors, round: int) -> StrategyState:
        """Return the state after adding the mean update.

        Raises:
            AggregationError: the update holds the factor whose turn it is not, or does not fit.
        """
        check_frozen(combined, (self._frozen(round),))
        return StrategyState(add(state.x, combined), state.moments)

    def _frozen(self, round: int) -> str:
        turn = round - self.warm_rounds
        return A if turn < 1 or turn % 2 else B
