"""FFA-LoRA with orthonormal A: only B and the head are trained and travel.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024
(https://arxiv.org/abs/2403.12313): with A common and frozen the mean of the products is the
product of the means, and DP noise enters the product once instead of twice.

Departure: A has orthonormal rows from the study's public seed instead of a Kaiming draw, so that
‖ΔB·A‖_F = ‖ΔB‖_F: clipping and noise act on the product itself. Nobody sends A: its bytes follow
from the seed.
"""

from dataclasses import dataclass

from huizhen.protocol.adapter import Array, Shapes, Tensors, in_order
from huizhen.protocol.errors import AggregationError, ConfigError
from huizhen.strategies.base import Facts, StrategyState, add
from huizhen.strategies.public_random import orthonormal_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class FfaOrtho:
    """A is frozen with orthonormal rows; everything else is trained and averaged."""

    seed: int

    facts = Facts(linear=True, exact=True, mixed_ranks=False, sees_individual_updates=False)

    def init(self, x: Tensors) -> StrategyState:
        """Return the state before the first round, every A replaced by the seed's.

        Raises:
            ConfigError: the rank is larger than a layer is wide.
        """
        return StrategyState(
            {name: self._first(name, value) for name, value in in_order(x).items()}
        )

    def trains(self, shapes: Shapes, round: int) -> frozenset[str]:
        """Return every name but those of A."""
        return frozenset(name for name in shapes if not name.endswith(".lora_A"))

    def step(self, state: StrategyState, combined: Tensors) -> StrategyState:
        """Return the state after adding the mean update.

        Raises:
            AggregationError: the update holds an A, or does not fit the adapter.
        """
        for name in combined:
            if name.endswith(".lora_A"):
                raise AggregationError(f"update holds {name!r}, A is frozen")
        return StrategyState(add(state.x, combined), state.moments)

    def _first(self, name: str, value: Array) -> Array:
        if not name.endswith(".lora_A"):
            return value
        try:
            return orthonormal_rows(self.seed, name, value.shape)
        except ValueError as error:
            raise ConfigError(f"[adapter] {error} ({name!r}): lower rank") from error
