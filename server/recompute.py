"""Every committed round computed again from what was signed: nobody must believe the coordinator.

Goes from the offer alone: its first adapter and state, then round by round the record, the updates
that it names by digest, each signed by its site, and the public rule of the study's strategy. The
result must have the digest that the record states (property CO-2 of docs/threat-model.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from huizhen.protocol.adapter import shapes_of
from huizhen.protocol.errors import HuizhenError, ProtocolError
from huizhen.protocol.statements import Record, StudyOffer, Update, digest_of
from huizhen.server.desk import Desk
from huizhen.server.rounds import Coordinator, RoundState
from huizhen.strategies.stored import decode_state


@dataclass(frozen=True, slots=True)
class Recomputed:
    """What came of one committed round."""

    round: int
    counted: tuple[str, ...]
    adapter: str
    # digest that the record states
    problem: str = ""
    # why it does not follow; empty: it does


def recompute(desk: Desk, offer: StudyOffer) -> Iterator[Recomputed]:
    """Give each committed round of a study in order; after one with a problem none follows.

    Raises:
        StorageError: the study's first state cannot be read.
        ProtocolError: the offer is not one that can be run.
    """
    first = decode_state(desk.objects.get(offer.state))
    coordinator = Coordinator(offer.agreed(), shapes_of(first.x))
    state, parent = RoundState(round=1, strategy=first), offer.digest
    for stored in desk.store.rounds.records(offer.digest):
        found = Recomputed(stored.round, (), stored.adapter)
        try:
            record = Record.read(stored.document, desk.registry.trust().coordinator)
            found = replace(found, counted=tuple(one.site for one in record.counted))
            state = _follow(desk, coordinator, state, record, parent)
        except HuizhenError as error:
            yield replace(found, problem=str(error))
            return
        parent = digest_of(stored.document)
        yield found


def _follow(
    desk: Desk, coordinator: Coordinator, state: RoundState, record: Record, parent: str
) -> RoundState:
    """Return the state after a round, computed from its updates.

    Raises:
        ProtocolError: the record, or what it counts, is not what must be.
        StorageError: an update is missing or was changed.
    """
    _expect("round", record.round, state.round)
    _expect("study", record.study, coordinator.digest)
    _expect("parent", record.parent, parent)
    _expect("announced adapter", record.adapter, digest_of(coordinator.announcement(state)))
    updates = {
        digest_of(one.document): one
        for one in desk.store.updates.counted(coordinator.digest, record.round)
    }
    is_metrics = record.round > coordinator.study.rounds.count
    for counted in record.counted:
        kept = updates.get(counted.document)
        if kept is None:
            raise ProtocolError(f"the signed update of site {counted.site!r} is not kept")
        keys = desk.registry.keys_at(counted.site, kept.received)
        said = Update.read(kept.document, keys)
        named = (said.site, said.study, said.round, said.payload)
        _expect("update", named, (counted.site, record.study, record.round, counted.payload))
        payload = desk.objects.get(said.payload)
        if is_metrics:
            continue
        state, receipt = coordinator.receive(state, payload)
        if receipt.refusal is not None:
            raise ProtocolError(f"update of site {counted.site!r} is {receipt.refusal}")
        _expect("site of an update", receipt.site, counted.site)
    after = replace(state, round=state.round + 1) if is_metrics else coordinator.close_round(state)
    result = record.adapter if is_metrics else digest_of(coordinator.announcement(after))
    _expect("result", record.result, result)
    return after


def _expect(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise ProtocolError(f"{what} is {_short(found)}, computed again it is {_short(expected)}")


def _short(value: object) -> str:
    return str(value)[:120]
