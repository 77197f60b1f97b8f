"""FlexLoRA: the mean of the products, cut to the adapter's rank by its singular values.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024 (https://arxiv.org/abs/2402.11505). Sites may train fewer ranks: each gets
the leading part, and the rest counts for it as it was. The error of a round is the tail of the
singular values, √(Σ_{j>r} σ_j²), the least that any adapter of this rank can have; where the sites'
products together have rank r or less there is none.

Departure: B = U_r·Σ_r and A = V_rᵀ come from QR factorisations of the stacked factors (Wang et
al.'s stacking, products.py); the d × k mean is never formed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from huizhen.protocol.adapter import Tensors
from huizhen.strategies.base import (
    A,
    B,
    Facts,
    Given,
    Stacking,
    StrategyState,
    check_ranks,
    modules,
    pair,
)
from huizhen.strategies.products import f32, stack, svd
from huizhen.strategies.stacking import factors, in_turn, others


@dataclass(frozen=True, slots=True, kw_only=True)
class Svd(Stacking):
    """Both factors are trained; the best rank-r approximation of the mean product goes on."""

    facts = Facts(linear=False, exact=False, mixed_ranks=True, sees_individual_updates=True)

    def init(self, x: Tensors) -> StrategyState:
        """Return the state before the first round.

        Raises:
            ConfigError: the rank is larger than a layer.
        """
        check_ranks(x)
        return StrategyState(x)

    def join(self, state: StrategyState, given: Sequence[Given], round: int) -> StrategyState:
        """Return the state after a round in which these updates were counted.

        Raises:
            AggregationError: an update does not fit the adapter.
        """
        given = in_turn(given)
        x = others(state.x, given)
        for module in modules(state.x):
            left, right = pair(state.x, module)
            terms = factors(state.x, given, module)
            # What a site of lower rank was not sent has not changed there.
            held = [(p, left[:, b.shape[1] :], right[b.shape[1] :]) for p, b, _ in terms]
            # At weight 0: where all products have low rank, A's own rows fill what is left open.
            terms += [*held, (0.0, left, right)]
            vectors, values, rows = svd(*stack(terms), left.shape[1])
            x[module + B], x[module + A] = f32(vectors * values), f32(rows)
        return StrategyState(x, state.moments)
