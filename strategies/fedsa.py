"""FedSA-LoRA: A is averaged, B and the head stay with the hospital that trained them.

Guo et al. 2025 (https://arxiv.org/abs/2410.01463): what A learns is common, what B learns is of the
one site. Each site trains both factors and sends A alone; there is no one model at the end but one
for each site, and each is measured on its own records. As its authors' configuration has it, the
head is the site's too.

No differential privacy: the gradient of A depends on B, which has seen the site's records without
noise, so that no clipping of A's gradient bounds what one record does (``PERSONAL`` in
``protocol/strategy_terms.py``: such a study is refused).
"""

from dataclasses import dataclass

from huizhen.protocol.adapter import Shapes, Tensors
from huizhen.strategies.base import A, Averaging, Facts, StrategyState, add, check_frozen


@dataclass(frozen=True, slots=True, kw_only=True)
class FedSa(Averaging):
    """A is shared, all else is personal."""

    facts = Facts(linear=True, exact=False, mixed_ranks=False, sees_individual_updates=False)

    def init(self, x: Tensors) -> StrategyState:
        """Return the state before the first round."""
        return StrategyState(x)

    def sends(self, shapes: Shapes, round: int) -> frozenset[str]:
        """Return the names of all A."""
        return frozenset(name for name in shapes if name.endswith(A))

    def announces(self, shapes: Shapes, round: int) -> Shapes:
        """Return all A; the first B and head follow from the study."""
        return {name: shape for name, shape in shapes.items() if name.endswith(A)}

    def keeps(self, shapes: Shapes) -> Shapes:
        """Return all but A."""
        return {name: shape for name, shape in shapes.items() if not name.endswith(A)}

    def kept_after(self, update: Tensors, trained: Tensors, round: int) -> Tensors:
        """Return B and head as the site has trained them."""
        return {name: value for name, value in trained.items() if not name.endswith(A)}

    def step(self, state: StrategyState, combined: Tensors, round: int) -> StrategyState:
        """Return the state after adding the mean update of A.

        Raises:
            AggregationError: the update does not fit the adapter, or holds more than A.
        """
        check_frozen(combined, tuple(name for name in state.x if not name.endswith(A)))
        return StrategyState(add(state.x, combined), state.moments)
