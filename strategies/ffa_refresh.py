"""FFA-LoRA that leaves its first subspace: merge every few rounds, and draw a new A.

With A frozen, ΔW never leaves the r rows that A spans. After every m rounds the product is merged
into the base, W ← W + s·B·A, B becomes 0 and A a new draw of orthonormal rows from the public seed:
still exact and linear, still only B travels up, and the rank that ΔW can have grows by r each time.

Our own combination, not a paper's. The merging is that of ReLoRA (Lialin et al., ICLR 2024,
https://arxiv.org/abs/2307.05695), whose restarts draw A anew as well; the frozen common A is that
of FFA-LoRA. Down goes what every site needs to make the merged product: the B of each merge, d × r;
the A follow from the seed.
"""

from dataclasses import dataclass

import numpy as np

from huizhen.protocol.adapter import Array, Shapes, Tensors
from huizhen.protocol.errors import ConfigError
from huizhen.strategies.base import (
    MERGED_A,
    MERGED_B,
    A,
    Averaging,
    B,
    Facts,
    StrategyState,
    add,
    check_frozen,
    modules,
)
from huizhen.strategies.ffa import drawn_rows, with_orthonormal_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class FfaRefresh(Averaging):
    """A is orthonormal and frozen between merges, ``every`` rounds apart."""

    seed: int
    every: int
    rounds: int | None = None
    # of the study; None where nobody knows

    facts = Facts(linear=True, exact=True, mixed_ranks=True, sees_individual_updates=False)

    def init(self, x: Tensors) -> StrategyState:
        """Return the state before the first round, every A replaced by the seed's.

        Raises:
            ConfigError: the rank is larger than a layer is wide, or more ranks would be merged
                into a layer than it has.
        """
        state = StrategyState(with_orthonormal_rows(x, self.seed))
        merges = 0 if self.rounds is None else self.rounds // self.every
        for module in modules(x):
            (height, rank), (_, width) = x[module + B].shape, x[module + A].shape
            if merges * rank > min(height, width):
                raise ConfigError(
                    f"[strategy] every is {self.every}: {self.rounds} rounds would merge "
                    f"{merges * rank} ranks into layer {module!r}, which is {height} x {width}: "
                    "raise it"
                )
        return state

    def trains(self, shapes: Shapes, round: int) -> frozenset[str]:
        """Return every name but those of A."""
        return frozenset(name for name in shapes if not name.endswith(A))

    def announces(self, shapes: Shapes, round: int) -> Shapes:
        """Return B, the head, and the B of each merge so far side by side."""
        found = dict(Averaging.announces(self, shapes, round))
        merges = (round - 1) // self.every
        for module in modules(shapes) if merges else ():
            height, rank = shapes[module + B]
            found[module + MERGED_B] = (height, merges * rank)
        return found

    def whole(self, first: Tensors, announced: Tensors, round: int) -> Tensors:
        """Return what the model loads: the announced B with the A that the seed gives."""
        merges = (round - 1) // self.every
        found = {**first, **announced}
        for module in modules(first) if merges else ():
            drawn = [self._rows(module, first[module + A].shape, j) for j in range(merges + 1)]
            found[module + A] = drawn[-1]
            found[module + MERGED_A] = np.vstack(drawn[:-1])
        return found

    def step(self, state: StrategyState, combined: Tensors, round: int) -> StrategyState:
        """Return the state after adding the mean update, and merging where it is time.

        Raises:
            AggregationError: the update holds an A, or does not fit the adapter.
        """
        check_frozen(combined, (A,))
        x = add(state.x, combined)
        if round % self.every:
            return StrategyState(x, state.moments)
        for module in modules(x):
            x[module + MERGED_B] = _joined(x.get(module + MERGED_B), x[module + B], axis=1)
            x[module + MERGED_A] = _joined(x.get(module + MERGED_A), x[module + A], axis=0)
            x[module + B] = np.zeros_like(x[module + B])
            x[module + A] = self._rows(module, x[module + A].shape, round // self.every)
        return StrategyState(x, state.moments)

    def _rows(self, module: str, shape: tuple[int, ...], merge: int) -> Array:
        """Return the A that is in use after so many merges."""
        name = module + A
        return drawn_rows(self.seed, f"{name}/{merge}" if merge else name, name, shape)


def _joined(before: Array | None, more: Array, *, axis: int) -> Array:
    return more.copy() if before is None else np.concatenate([before, more], axis=axis)
