"""FLoRA: stack the sites' factors, merge the product into the base, start from a new adapter.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", NeurIPS 2024 (https://arxiv.org/abs/2409.05976): [p_1 B_1 … p_N B_N] times [A_1; …;
A_N] is the mean of the products, exactly, and ranks may differ. Optimisers start anew in each round
anyway; the adapter does too, which other papers find harmful.

What was merged goes down in every round, Σ r_i ranks more each time until the layer is full. The A
of each round is drawn from the public seed, B is 0: neither is sent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from huizhen.protocol.adapter import Array, Shapes, Tensors, in_order
from huizhen.strategies.base import A, B, Facts, Given, Stacking, StrategyState, modules
from huizhen.strategies.public_random import uniform
from huizhen.strategies.stacking import factors, in_turn, merge, merged_shapes, others, rank_after


@dataclass(frozen=True, slots=True, kw_only=True)
class FLora(Stacking):
    """Both factors are trained; their products are merged in full."""

    seed: int
    ranks: int
    # of all sites together

    facts = Facts(linear=False, exact=True, mixed_ranks=True, sees_individual_updates=True)

    def init(self, x: Tensors) -> StrategyState:
        """Return the state before the first round, with B = 0."""
        return StrategyState(self._anew(in_order(x), 1))

    def announces(self, shapes: Shapes, round: int) -> Shapes:
        """Return the head and what was merged."""
        head = {name: shape for name, shape in shapes.items() if not name.endswith((A, B))}
        return {**head, **merged_shapes(round - 1, self.ranks, shapes)}

    def whole(self, first: Tensors, announced: Tensors, round: int) -> Tensors:
        """Return what the model loads: the round's new adapter beside what was merged."""
        return {**self._anew(first, round), **announced}

    def join(self, state: StrategyState, given: Sequence[Given], round: int) -> StrategyState:
        """Return the state after a round in which these updates were counted.

        Raises:
            AggregationError: an update does not fit the adapter.
        """
        given = in_turn(given)
        x = others(state.x, given)
        shapes = {name: value.shape for name, value in state.x.items()}
        for module in modules(state.x):
            rank = rank_after(round, self.ranks, shapes, module)
            x |= merge(state.x, module, factors(state.x, given, module), rank)
        anew = self._anew(state.x, round + 1)
        return StrategyState(
            {**x, **{name: anew[name] for name in anew if name.endswith((A, B))}}, state.moments
        )

    def _anew(self, x: Tensors, round: int) -> dict[str, Array]:
        """Return x with the first adapter of a round: A as in Hu et al. 2021, B = 0."""
        found = dict(x)
        for module in modules(x):
            name, shape = module + A, x[module + A].shape
            if round > 1:
                found[name] = uniform(self.seed, f"{name}/{round}", shape, 1 / math.sqrt(shape[1]))
            found[module + B] = np.zeros_like(x[module + B])
        return found
