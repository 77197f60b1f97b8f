"""Rounds as a state machine without I/O: announce, receive in any order, close.

    open_round ─► receive … receive ─► close_round ─► open_round …

``Coordinator`` is a value made from the study; ``RoundState`` is all that has to be stored to go
on after a crash. Neither knows sockets, files or clocks: who calls ``close_round`` decides about
deadlines.
"""

import math
from dataclasses import dataclass, field, replace

from huizhen.protocol.adapter import Shapes, Tensors
from huizhen.protocol.errors import AggregationError
from huizhen.protocol.study import Study
from huizhen.protocol.wire import Message, encode
from huizhen.server.validation import Refusal, check_update
from huizhen.strategies import mean
from huizhen.strategies.base import Strategy, StrategyState
from huizhen.strategies.catalogue import make_strategy, site_shares

MAX_REFUSED = 1000  # codes that are kept: whoever floods the coordinator fills no memory


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundState:
    """The open round: nothing received yet, or some updates already in the sum."""

    round: int
    # 1-based; count + 1 when the study is finished
    strategy: StrategyState
    accumulator: mean.Accumulator = field(default_factory=mean.start)
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
        """Prepare for adapters with these tensors.

        Raises:
            ConfigError: the study names an unknown strategy.
            AggregationError: the study has no sites, or a quorum larger than their number.
        """
        if not 1 <= study.quorum <= len(study.sites):
            raise AggregationError(
                f"[rounds] quorum is {study.quorum}, the study has {len(study.sites)} sites"
            )
        self.study = study
        self.digest = study.digest()
        self.shapes = dict(shapes)
        self.strategy: Strategy = make_strategy(study)
        self.shares = site_shares(study)

    def first(self, x: Tensors) -> RoundState:
        """Return the state before the first round, from the study's first adapter."""
        return RoundState(round=1, strategy=self.strategy.init(x))

    def is_finished(self, state: RoundState) -> bool:
        """Whether the study's last round is closed."""
        return state.round > self.study.rounds.count

    def trained_shapes(self, state: RoundState) -> Shapes:
        """Return the tensors that sites train, and send, in the open round."""
        names = self.strategy.trains(self.shapes, state.round)
        return {name: shape for name, shape in self.shapes.items() if name in names}

    def announcement(self, state: RoundState) -> bytes:
        """Return the bytes that every site gets: what it trains, as it now is.

        Tensors that no site trains follow from the study's seed and are not sent.
        """
        tensors = {name: state.strategy.x[name] for name in self.trained_shapes(state)}
        return encode(
            Message(kind="adapter", study=self.digest, round=state.round, site="", tensors=tensors)
        )

    def check(self, state: RoundState, data: bytes) -> Message | Refusal:
        """Return the update in ``data``, or why it cannot count in the open round."""
        update = check_update(
            data,
            shapes=self.trained_shapes(state),
            study=self.digest,
            round=state.round,
            sites=self.study.sites,
            seen=state.counted,
            max_norm=self.study.rounds.max_update_norm,
        )
        if isinstance(update, Message) and not mean.fits(update.tensors):
            return "malformed"
        return update

    def count(self, state: RoundState, update: Message) -> RoundState:
        """Return the state with a checked update in the sum.

        The sum is the largest thing that a coordinator holds, so the new state takes it over: the
        given one is not used again.
        """
        total = mean.add(state.accumulator, update.tensors, self.shares[update.site])
        return replace(state, accumulator=total, counted=(*state.counted, update.site))

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

    def combine(self, state: RoundState) -> Tensors:
        """Return the mean of the updates that were counted.

        Raises:
            AggregationError: fewer sites than the quorum were counted.
        """
        if len(state.counted) < self.study.quorum:
            missing = [site for site in self.study.sites if site not in state.counted]
            raise AggregationError(
                f"round {state.round} has {len(state.counted)} of {len(self.study.sites)} updates, "
                f"the quorum is {self.study.quorum}: missing {', '.join(missing)}"
            )
        # Rounded once, whatever the order in which the study lists its sites.
        share = math.fsum(share for site, share in self.shares.items() if site in state.counted)
        return mean.finish(state.accumulator, share)

    def step(self, state: RoundState, combined: Tensors) -> RoundState:
        """Return the next round's state from the mean update of this one."""
        return RoundState(
            round=state.round + 1, strategy=self.strategy.step(state.strategy, combined)
        )
