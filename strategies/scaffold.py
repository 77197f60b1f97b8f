"""SCAFFOLD: every step of a site is turned by how its own gradients differ from everyone's.

Karimireddy et al. 2020, Algorithm 1, option II (https://arxiv.org/abs/1910.06378). With K local
steps of plain SGD at rate η, control variates c_i at the sites and c at the coordinator:

    a site's step       y ← y − η·(g_i(y) − c_i + c)
    after its K steps   c_i⁺ = c_i − c + (x − y) / (K·η) = c_i − c − Δ_i / (K·η)
    the coordinator     x ← x + η_g·mean Δ_i,     c ← c + mean (c_i⁺ − c_i) = −mean Δ_i / (K·η)

The right-hand forms hold where all sites take part, and only public numbers are in them: K and η
are the study's. So a site sends its update and nothing else, where the paper sends Δc_i too; the
coordinator sends x and c. A departure where a site is missing in a round: c is then the mean of
those present, so that their corrections sum to zero; the paper keeps the absent site's old c_i in
it.

c_i never leaves its site. Under DP it is a function of the site's noised updates alone, so the
correction, added after the noise, costs no privacy.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from huizhen.protocol.adapter import Array, Shapes, Tensors
from huizhen.strategies.base import Averaging, Facts, StrategyState, add, check_fits

CONTROL = ".control"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaffold(Averaging):
    """FedAvg with control variates."""

    server_learning_rate: float
    # η_g
    travel: Callable[[str, int], float]
    # K·η of a tensor in a round: how far a gradient of 1 moves it

    facts = Facts(linear=True, exact=False, mixed_ranks=False, sees_individual_updates=False)

    def init(self, x: Tensors) -> StrategyState:
        """Return the state before the first round; c is 0."""
        return StrategyState(x, {"c": _zeros(x)})

    def trains(self, shapes: Shapes, round: int) -> frozenset[str]:
        """Return all names."""
        return frozenset(shapes)

    def announces(self, shapes: Shapes, round: int) -> Shapes:
        """Return the adapter and, once it can differ from 0, c."""
        own = {name + CONTROL: shape for name, shape in shapes.items()} if round > 1 else {}
        return {**shapes, **own}

    def announced(self, state: StrategyState, shapes: Shapes, round: int) -> Tensors:
        """Return the adapter and c."""
        c = {name + CONTROL: value for name, value in state.moments["c"].items()}
        return {**state.x, **c} if round > 1 else state.x

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

    def kept_after(
        self, update: Tensors, trained: Tensors, correction: Tensors, round: int
    ) -> Tensors:
        """Return c_i⁺."""
        return {
            name + CONTROL: self._gradient(name, delta, round) - correction.get(name, np.float32(0))
            for name, delta in update.items()
        }

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

    def _gradient(self, name: str, delta: Array, round: int) -> Array:
        """Return the mean gradient that makes so large an update."""
        return delta * np.float32(-1 / self.travel(name, round))


def _zeros(x: Tensors) -> dict[str, Array]:
    return {name: np.zeros(value.shape, np.float32) for name, value in x.items()}
