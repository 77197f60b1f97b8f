"""What a strategy is: a value that says what each site trains and what the updates become.

A combining rule (``strategies/mean.py``) reduces the updates of a round to one; ``step`` turns
that one into the next adapter. Who is asked, deadlines and transport are elsewhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from huizhen.protocol.adapter import Shapes, Tensors
from huizhen.protocol.errors import AggregationError


@dataclass(frozen=True, slots=True)
class StrategyState:
    """What the coordinator carries from one round to the next."""

    x: Tensors
    # the adapter, every tensor of it
    moments: Mapping[str, Tensors] = field(default_factory=dict)
    # what a strategy remembers besides, by name


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a user relies on when choosing a strategy."""

    linear: bool
    # works on the sum of the updates alone, so it can run under secure sums
    exact: bool
    # the aggregated product is the mean of the sites' products
    mixed_ranks: bool
    sees_individual_updates: bool


class Strategy(Protocol):
    """One way to average LoRA."""

    @property
    def facts(self) -> Facts:
        """What the strategy guarantees."""

    def init(self, x: Tensors) -> StrategyState:
        """Return the state before the first round, from the study's first adapter."""

    def trains(self, shapes: Shapes, round: int) -> frozenset[str]:
        """Return the names of the tensors that sites train, and send, in a round."""

    def step(self, state: StrategyState, combined: Tensors) -> StrategyState:
        """Return the state after a round whose combined update was ``combined``.

        Raises:
            AggregationError: ``combined`` does not fit the adapter.
        """


def add(x: Tensors, update: Tensors) -> Tensors:
    """Return x + update; tensors that have no update stay as they are.

    Raises:
        AggregationError: a tensor of the update is unknown or has another shape.
    """
    for name, delta in update.items():
        if name not in x or x[name].shape != delta.shape:
            found = x[name].shape if name in x else "no such tensor"
            raise AggregationError(f"update of {name!r} is {delta.shape}, the adapter has {found}")
    return {name: value + update[name] if name in update else value for name, value in x.items()}
