"""Rounds as a state machine without I/O: announce, receive in any order, close.

    open_round ─► receive … receive ─► close_round ─► open_round …

``Coordinator`` is a value made from the study; ``RoundState`` is all that has to be stored to go
on after a crash. Neither knows sockets, files or clocks: who calls ``close_round`` decides about
deadlines.
"""

import math
from dataclasses import dataclass, field, replace

from huizhen.protocol.adapter import Shapes, Tensors
from huizhen.protocol.errors import AggregationError, WireError
from huizhen.protocol.study import Study
from huizhen.protocol.wire import Message, declared_site, encode
from huizhen.server.validation import Refusal, check_update
from huizhen.strategies import mean
from huizhen.strategies.base import (
    MERGED_A,
    MERGED_B,
    Averaging,
    Given,
    Stacking,
    Strategy,
    StrategyState,
)
from huizhen.strategies.catalogue import make_strategy, site_shares
from huizhen.strategies.ranks import at_rank, padded
from huizhen.strategies.robust import rule_of

Combined = Tensors | tuple[Given, ...]
"""What a round's updates come to: one update, or each of them where the strategy needs that."""

MAX_REFUSED = 1000  # codes that are kept: whoever floods the coordinator fills no memory


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundState:
    """The open round: nothing received yet, or some updates already in the sum."""

    round: int
    # 1-based; count + 1 when the study is finished
    strategy: StrategyState
    accumulator: mean.Accumulator = field(default_factory=mean.start)
    # the sum so far, where the strategy and its rule work on the sum alone
    given: tuple[Given, ...] = ()
    # else the updates so far, each with its site's share of the whole study
    counted: tuple[str, ...] = ()
    refused: tuple[Refusal, ...] = ()


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a sender is told: counted, or refused and why."""

    site: str | None
    # the sender of an update that was read; None where it was refused before
    refusal: Refusal | None


class Coordinator:
    """The coordinator's mathematics for one study."""

    def __init__(self, study: Study, shapes: Shapes) -> None:
        """Prepare for adapters with these tensors, those of ``Strategy.init``.

        Raises:
            AggregationError: the study has no sites, or a quorum larger than their number.
        """
        if not 1 <= study.quorum <= len(study.sites):
            raise AggregationError(
                f"[rounds] quorum is {study.quorum}, the study has {len(study.sites)} sites"
            )
        self.study = study
        self.digest = study.digest()
        self.shapes = {n: s for n, s in shapes.items() if not n.endswith((MERGED_A, MERGED_B))}
        self.strategy: Strategy = make_strategy(study)
        self.shares = site_shares(study)
        terms = study.strategy
        self._rule = (
            rule_of(terms.combine, terms.byzantine, terms.clip_radius)
            if terms.combine != "mean"
            else None
        )
        self._sums = self._rule is None and isinstance(self.strategy, Averaging)

    def first(self, x: Tensors) -> RoundState:
        """Return the state before the first round, from the study's first adapter."""
        return RoundState(round=1, strategy=self.strategy.init(x))

    def is_finished(self, state: RoundState) -> bool:
        """Whether the study's last round is closed."""
        return state.round > self.study.rounds.count

    def sent_shapes(self, state: RoundState) -> Shapes:
        """Return the tensors that sites send in the open round."""
        names = self.strategy.sends(self.shapes, state.round)
        return {name: shape for name, shape in self.shapes.items() if name in names}

    def announcement(self, state: RoundState) -> bytes:
        """Return the bytes that every site gets: the adapter as it now is.

        What follows from the study's seed is not sent.
        """
        tensors = self.strategy.announced(state.strategy, self.shapes, state.round)
        return encode(
            Message(kind="adapter", study=self.digest, round=state.round, site="", tensors=tensors)
        )

    def check(self, state: RoundState, data: bytes) -> Message | Refusal:
        """Return the update in ``data``, or why it cannot count in the open round."""
        update = check_update(
            data,
            shapes=self._shapes_of_sender(state, data),
            study=self.digest,
            round=state.round,
            sites=self.study.sites,
            seen=state.counted,
            max_norm=self.study.rounds.max_update_norm,
            travel=self.study.travel(state.round),
        )
        if isinstance(update, Message) and not mean.fits(update.tensors):
            return "malformed"
        return update

    def _shapes_of_sender(self, state: RoundState, data: bytes) -> Shapes:
        """Return the tensors that the site trains which an update says it is of."""
        shapes = self.sent_shapes(state)
        try:
            site = self.study.sites.get(declared_site(data))
        except WireError:  # is refused for it later
            return shapes
        return shapes if site is None or site.rank is None else at_rank(shapes, site.rank)

    def count(self, state: RoundState, update: Message) -> RoundState:
        """Return the state with a checked update counted.

        A sum is the largest thing that a coordinator holds, so the new state takes it over: the
        given one is not used again.
        """
        share, tensors = self.shares[update.site], update.tensors
        counted = (*state.counted, update.site)
        if isinstance(self.strategy, Averaging):
            tensors = padded(tensors, self.shapes)
        if not self._sums:
            given = (*state.given, Given(update.site, share, tensors))
            return replace(state, given=given, counted=counted)
        total = mean.add(state.accumulator, tensors, share)
        return replace(state, accumulator=total, counted=counted)

    def receive(self, state: RoundState, data: bytes) -> tuple[RoundState, Receipt]:
        """Return the state with one more update in the sum, or the same state and why not."""
        update = self.check(state, data)
        if isinstance(update, Message):
            return self.count(state, update), Receipt(update.site, None)
        return replace(state, refused=(*state.refused, update)[-MAX_REFUSED:]), Receipt(
            None, update
        )

    def close_round(self, state: RoundState) -> RoundState:
        """Return the next round's state.

        Raises:
            AggregationError: fewer sites than the quorum were counted.
        """
        return self.step(state, self.combine(state))

    def combine(self, state: RoundState) -> Combined:
        """Return what the round's updates come to.

        Raises:
            AggregationError: fewer sites than the quorum were counted, or too few for the rule.
        """
        if len(state.counted) < self.study.quorum:
            missing = [site for site in self.study.sites if site not in state.counted]
            raise AggregationError(
                f"round {state.round} has {len(state.counted)} of {len(self.study.sites)} updates, "
                f"the quorum is {self.study.quorum}: missing {', '.join(missing)}"
            )
        # Rounded once, whatever the order in which the study lists its sites.
        share = math.fsum(share for site, share in self.shares.items() if site in state.counted)
        if self._sums:
            return mean.finish(state.accumulator, share)
        given = tuple(replace(one, share=one.share / share) for one in state.given)
        return given if self._rule is None else self._rule(given)

    def step(self, state: RoundState, combined: Combined) -> RoundState:
        """Return the next round's state from what ``combine`` gave for this one."""
        strategy, round = self.strategy, state.round
        if isinstance(strategy, Averaging) and not isinstance(combined, tuple):
            after = strategy.step(state.strategy, combined, round)
        elif isinstance(strategy, Stacking) and isinstance(combined, tuple):
            after = strategy.join(state.strategy, combined, round)
        else:
            raise TypeError(f"{type(strategy).__name__} does not work on a {type(combined)}")
        return RoundState(round=round + 1, strategy=after)
