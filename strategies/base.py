"""What a strategy is: a value that says what each site trains and what the updates become.

    the coordinator    init ─► announced ┄┄► … updates … ─► combine ─► step ─► announced ┄┄► …
    a site             whole, what it has kept ─► trains ─► its update, what it keeps

A rule (``mean.py``, ``robust.py``) reduces the updates of a round to one, which ``Averaging.step``
turns into the next adapter; a ``Stacking`` strategy is given each of them, since it needs the
product of each site's factors. Who is asked, deadlines and transport are elsewhere.

Names: a module ``m`` has ``m.lora_A`` (r × k) and ``m.lora_B`` (d × r), ΔW = s·B·A with the study's
one scale s = alpha / rank. What was merged into the base is a pair ``m.merged_B`` (d × R) and
``m.merged_A`` (R × k) beside them, ΔW = s·(B·A + merged_B·merged_A), so that it is exact whatever
the base's own number format, and a release can be exported as one adapter of rank r + R.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from huizhen.protocol.adapter import Array, Shapes, Tensors
from huizhen.protocol.errors import AggregationError, ConfigError

A, B, CORE = ".lora_A", ".lora_B", ".lora_R"
MERGED_A, MERGED_B = ".merged_A", ".merged_B"


@dataclass(frozen=True, slots=True)
class StrategyState:
    """What the coordinator carries from one round to the next."""

    x: Tensors
    # all that a model loads, what was merged too
    moments: Mapping[str, Tensors] = field(default_factory=dict)
    # what a strategy remembers besides, by name


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a user relies on when choosing a strategy."""

    linear: bool
    # works on the sum of the updates alone, so it can run under secure sums
    exact: bool
    # what changes in the product is the mean of what changed in the sites' products
    mixed_ranks: bool
    # sites may train fewer ranks than the study has
    sees_individual_updates: bool


@dataclass(frozen=True, slots=True)
class Given:
    """One site's update in a round."""

    site: str
    share: float
    # w_i / Σw over the sites of the round
    update: Tensors


class Strategy(ABC):
    """One way to average LoRA."""

    facts: Facts
    sends_gradients = False
    # whether a site's update is made of its gradients alone (``update_of``), not of where it came

    @abstractmethod
    def init(self, x: Tensors) -> StrategyState:
        """Return the state before the first round, from the study's first adapter."""

    def trains(self, shapes: Shapes, round: int) -> frozenset[str]:
        """Return the names of the tensors that sites train in a round; all, unless some are frozen.

        Args:
            shapes: of every tensor that a site could train.
            round: 1 is the first.
        """
        return frozenset(shapes)

    def sends(self, shapes: Shapes, round: int) -> frozenset[str]:
        """Return which of the tensors that it trains in a round a site sends."""
        return self.trains(shapes, round)

    def announces(self, shapes: Shapes, round: int) -> Shapes:
        """Return what every site is sent before a round; the rest follows from the study's seed."""
        names = self.trains(shapes, round)
        return {name: shape for name, shape in shapes.items() if name in names}

    def announced(self, state: StrategyState, shapes: Shapes, round: int) -> Tensors:
        """Return the tensors that ``announces`` names, as they are before a round."""
        return {name: state.x[name] for name in self.announces(shapes, round)}

    def whole(self, first: Tensors, announced: Tensors, round: int) -> Tensors:
        """Return all that a model loads in a round, at a site: the coordinator's x, to the bit.

        Args:
            first: x of ``init``, which every party makes from the study alone.
            announced: what was sent for this round.
            round: 1 is the first.
        """
        return {**first, **announced}

    def keeps(self, shapes: Shapes) -> Shapes:
        """Return what a site keeps for itself between rounds; it never leaves, and may be lost."""
        return {}

    def correction(self, announced: Tensors, kept: Tensors) -> Tensors:
        """Return what a site adds to the gradient of each of its steps, after any noise."""
        return {}

    def update_of(self, gradients: Tensors, round: int) -> Tensors:
        """Return the update that a site sends where it is made of gradients.

        Args:
            gradients: the mean over the round's steps, before ``correction`` was added.
            round: 1 is the first.
        """
        raise NotImplementedError

    def kept_after(self, update: Tensors, trained: Tensors, round: int) -> Tensors:
        """Return what ``keeps`` names, at a site after it has trained.

        Args:
            update: what it sends, as it arrives.
            trained: every tensor that it trained, as it is now.
            round: 1 is the first.
        """
        return {}


class Averaging(Strategy):
    """Works on one update, which a rule makes of the sites'."""

    @abstractmethod
    def step(self, state: StrategyState, combined: Tensors, round: int) -> StrategyState:
        """Return the state after a round whose combined update was ``combined``.

        Raises:
            AggregationError: ``combined`` does not fit the adapter.
        """


class Stacking(Strategy):
    """Works on each site's update."""

    @abstractmethod
    def join(self, state: StrategyState, given: Sequence[Given], round: int) -> StrategyState:
        """Return the state after a round in which these updates were counted.

        Raises:
            AggregationError: an update does not fit the adapter.
        """


def check_fits(x: Tensors, update: Tensors) -> None:
    """Refuse an update that is not one of an adapter.

    Raises:
        AggregationError: a tensor of the update is unknown or has another shape.
    """
    for name, delta in update.items():
        if name not in x or x[name].shape != delta.shape:
            found = x[name].shape if name in x else "no such tensor"
            raise AggregationError(f"update of {name!r} is {delta.shape}, the adapter has {found}")


def check_frozen(update: Tensors, ends: tuple[str, ...]) -> None:
    """Refuse an update of what a strategy freezes.

    Raises:
        AggregationError: it holds a tensor whose name has one of these ends.
    """
    for name in update:
        if name.endswith(ends):
            raise AggregationError(f"update holds {name!r}, which is frozen in this round")


def check_ranks(x: Tensors) -> None:
    """Refuse a rank that a layer cannot have.

    Raises:
        ConfigError: the rank is over a layer's height or width.
    """
    for module in modules(x):
        (height, rank), (_, width) = x[module + B].shape, x[module + A].shape
        if rank > min(height, width):
            raise ConfigError(
                f"[adapter] rank is {rank}, layer {module!r} is {height} x {width}: lower rank"
            )


def add(x: Tensors, update: Tensors) -> dict[str, Array]:
    """Return x + update; tensors that have no update stay as they are.

    Raises:
        AggregationError: a tensor of the update is unknown or has another shape.
    """
    check_fits(x, update)
    return {name: value + update[name] if name in update else value for name, value in x.items()}


def zeros(x: Tensors) -> dict[str, Array]:
    """Return a 0 for each number of an adapter."""
    return {name: np.zeros(value.shape, np.float32) for name, value in x.items()}


def modules(names: Sequence[str] | Tensors | Shapes) -> list[str]:
    """Return the adapted modules among the names, in order."""
    return sorted((name.removesuffix(A) for name in names if name.endswith(A)), key=str.encode)


def bytes_of(shapes: Shapes) -> int:
    """Return the bytes of float32 tensors, without what the wire format adds."""
    total = 0
    for shape in shapes.values():
        size = 4
        for extent in shape:
            size *= extent
        total += size
    return total


def pair(tensors: Tensors, module: str) -> tuple[Array, Array]:
    """Return B (d × r) and A (r × k) of a module."""
    return tensors[module + B], tensors[module + A]
