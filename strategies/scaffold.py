"""SCAFFOLD: every step of a site is turned by how its own gradients differ from everyone's.

Karimireddy et al. 2020, Algorithm 1, option II (https://arxiv.org/abs/1910.06378). With K local
steps of plain SGD at rate η, control variates c_i at the sites and c at the coordinator:

    a site's step       y ← y − η·(g_i(y) − c_i + c)
    after its K steps   c_i⁺ = c_i − c + (x − y) / (K·η), which is ḡ_i, the mean of its g_i
    the coordinator     x ← x + η_g·mean (y_i − x),     c ← c + mean (c_i⁺ − c_i)

The paper's sites send y_i − x and c_i⁺ − c_i. Here a site sends u_i = −K·η·ḡ_i alone, what its own
gradients come to along the way, and K and η are the study's, known to all:

    c_i⁺ = −u_i / (K·η),     c ← −mean u_i / (K·η),     x ← x + η_g·mean u_i

Where all sites take part this is the paper's: its corrections sum to zero over the sites. A
departure where one is missing: c is the mean of those present, and x moves by their gradients
alone, so that an absence, a lost c_i or a late update leaves no error behind; the paper's c would
keep a difference from the mean of the c_i for ever. Nor can an announced c shift what a site sends:
under DP u_i is the sum of the clipped and noised gradients and of nothing else.

c_i never leaves its site, and is a function of what it has sent.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from huizhen.protocol.adapter import Array, Shapes, Tensors
from huizhen.strategies.base import Averaging, Facts, StrategyState, add, check_fits, zeros

CONTROL = ".control"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaffold(Averaging):
    """FedAvg with control variates."""

    server_learning_rate: float
    # η_g
    travel: Callable[[str, int], float]
    # K·η of a tensor in a round: how far a gradient of 1 moves it
    rounds: int | None = None
    # of the study; None where nobody knows

    sends_gradients = True
    facts = Facts(linear=True, exact=False, mixed_ranks=False, sees_individual_updates=False)

    def init(self, x: Tensors) -> StrategyState:
        """Return the state before the first round; c is 0."""
        return StrategyState(x, {"c": zeros(x)})

    def announces(self, shapes: Shapes, round: int) -> Shapes:
        """Return the adapter and, in rounds where it can differ from 0, c."""
        if not self._tells(round):
            return shapes
        return {**shapes, **{name + CONTROL: shape for name, shape in shapes.items()}}

    def announced(self, state: StrategyState, shapes: Shapes, round: int) -> Tensors:
        """Return the adapter and c."""
        if not self._tells(round):
            return state.x
        c = {name + CONTROL: value for name, value in state.moments["c"].items()}
        return {**state.x, **c}

    def whole(self, first: Tensors, announced: Tensors, round: int) -> Tensors:
        """Return the adapter."""
        return {name: value for name, value in announced.items() if not name.endswith(CONTROL)}

    def keeps(self, shapes: Shapes) -> Shapes:
        """Return c_i."""
        return {name + CONTROL: shape for name, shape in shapes.items()}

    def correction(self, announced: Tensors, kept: Tensors) -> Tensors:
        """Return c − c_i, nothing in the first round; a site that has lost its c_i takes c."""
        return {
            name.removesuffix(CONTROL): value - kept[name]
            for name, value in announced.items()
            if name in kept
        }

    def update_of(self, gradients: Tensors, round: int) -> Tensors:
        """Return u_i."""
        return {
            name: gradient * np.float32(-self.travel(name, round))
            for name, gradient in gradients.items()
        }

    def kept_after(self, update: Tensors, trained: Tensors, round: int) -> Tensors:
        """Return c_i⁺."""
        return {name + CONTROL: self._gradient(name, u, round) for name, u in update.items()}

    def step(self, state: StrategyState, combined: Tensors, round: int) -> StrategyState:
        """Return the state after a step along the mean update, c after it.

        Raises:
            AggregationError: the update does not fit the adapter.
        """
        check_fits(state.x, combined)
        rate = np.float32(self.server_learning_rate)
        c = {name: self._gradient(name, delta, round) for name, delta in combined.items()}
        moved = {name: rate * delta for name, delta in combined.items()}
        return StrategyState(add(state.x, moved), {"c": {**state.moments["c"], **c}})

    def _tells(self, round: int) -> bool:
        """Whether c is announced: not before the first round, nor with the final adapter."""
        return round > 1 and (self.rounds is None or round <= self.rounds)

    def _gradient(self, name: str, delta: Array, round: int) -> Array:
        """Return the mean gradient that makes so large an update."""
        return delta * np.float32(-1 / self.travel(name, round))
