"""FFA-LoRA: A is frozen, only B and the head are trained and travel.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024
(https://arxiv.org/abs/2403.12313): with A common and frozen the mean of the products is the
product of the means, and DP noise enters the product once instead of twice. Nobody sends A: its
bytes follow from the seed.

``ffa`` keeps the A that every study starts from (Kaiming, as in Hu et al. 2021). ``ffa_ortho``
departs from the paper: A has orthonormal rows, so that ‖ΔB·A‖_F = ‖ΔB‖_F, clipping and noise act on
the product itself, and distances between updates are distances between products.

Mixed ranks are nested: a site of rank r_i trains the first r_i columns of B on the first r_i rows
of the one A. Where others are 0 in its update the sum of products is still the product of the sum.
"""

from dataclasses import dataclass

from huizhen.protocol.adapter import Array, Shapes, Tensors, in_order
from huizhen.protocol.errors import ConfigError
from huizhen.strategies.base import A, Averaging, Facts, StrategyState, add, check_frozen
from huizhen.strategies.public_random import orthonormal_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Ffa(Averaging):
    """A is frozen as the study's first adapter has it; the rest is trained and averaged."""

    facts = Facts(linear=True, exact=True, mixed_ranks=True, sees_individual_updates=False)

    def init(self, x: Tensors) -> StrategyState:
        """Return the state before the first round."""
        return StrategyState(x)

    def trains(self, shapes: Shapes, round: int) -> frozenset[str]:
        """Return every name but those of A."""
        return frozenset(name for name in shapes if not name.endswith(A))

    def step(self, state: StrategyState, combined: Tensors, round: int) -> StrategyState:
        """Return the state after adding the mean update.

        Raises:
            AggregationError: the update holds an A, or does not fit the adapter.
        """
        check_frozen(combined, (A,))
        return StrategyState(add(state.x, combined), state.moments)


@dataclass(frozen=True, slots=True, kw_only=True)
class FfaOrtho(Ffa):
    """A is frozen with orthonormal rows of the study's seed."""

    seed: int

    def init(self, x: Tensors) -> StrategyState:
        """Return the state before the first round, every A replaced by the seed's.

        Raises:
            ConfigError: the rank is larger than a layer is wide.
        """
        return StrategyState(with_orthonormal_rows(x, self.seed))


def with_orthonormal_rows(x: Tensors, seed: int) -> dict[str, Array]:
    """Return an adapter with every A replaced by orthonormal rows of a public seed.

    Raises:
        ConfigError: the rank is larger than a layer is wide.
    """
    return {
        name: drawn_rows(seed, name, name, value.shape) if name.endswith(A) else value
        for name, value in in_order(x).items()
    }


def drawn_rows(seed: int, label: str, name: str, shape: tuple[int, ...]) -> Array:
    """Return orthonormal rows for the tensor ``name``, other ones for each label.

    Raises:
        ConfigError: the rank is larger than the layer is wide.
    """
    rank, width = shape
    try:
        return orthonormal_rows(seed, label, (rank, width))
    except ValueError as error:
        raise ConfigError(f"[adapter] {error} ({name!r}): lower rank") from error
