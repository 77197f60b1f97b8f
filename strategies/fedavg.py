"""FedAvg of both LoRA factors, the baseline that others call FedIT, and FedProx on top of it.

McMahan et al. 2017, Algorithm 1; on LoRA factors: Zhang et al. 2024 (https://arxiv.org/abs/2305.05644).
With p_i the sites' shares, B ← Σ p_i B_i and A ← Σ p_i A_i. Not exact: the mean of products
differs from the product of means by Σ p_i (B_i − B̄)(A_i − Ā).

FedProx: Li et al. 2020, Algorithm 2 (https://arxiv.org/abs/1812.06127). Each site adds
μ/2·‖θ − θ_t‖² to its loss, which the coordinator does not see. Under DP the pull is added after the
noise: it depends on no record.
"""

from dataclasses import dataclass

from huizhen.protocol.adapter import Tensors
from huizhen.strategies.base import Averaging, Facts, StrategyState, add


@dataclass(frozen=True, slots=True, kw_only=True)
class FedAvg(Averaging):
    """Every tensor of the adapter is trained and averaged."""

    facts = Facts(linear=True, exact=False, mixed_ranks=False, sees_individual_updates=False)

    def init(self, x: Tensors) -> StrategyState:
        """Return the state before the first round."""
        return StrategyState(x)

    def step(self, state: StrategyState, combined: Tensors, round: int) -> StrategyState:
        """Return the state after adding the mean update."""
        return StrategyState(add(state.x, combined), state.moments)
