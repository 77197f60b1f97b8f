"""A study at the coordinator before and between its rounds: offered, opened, paused, closed."""

from datetime import datetime

from huizhen.protocol.adapter import Tensors, shapes_of
from huizhen.protocol.documents import claimed, public_of
from huizhen.protocol.errors import ConfigError, ProtocolError, StorageError, WireError
from huizhen.protocol.statements import StudyOffer, stamp
from huizhen.protocol.strategy_terms import PERSONAL
from huizhen.protocol.study import Study
from huizhen.server.desk import Desk
from huizhen.server.registry import WaitingForBoardError
from huizhen.server.rounds import Coordinator
from huizhen.server.store_studies import State, StoredStudy, check_move
from huizhen.storage.files import write_whole
from huizhen.strategies.catalogue import make_strategy
from huizhen.strategies.stored import encode_state

_EVENTS: dict[tuple[State, State], str] = {
    ("proposed", "open"): "study_opened",
    ("paused", "open"): "study_resumed",
    ("open", "paused"): "study_paused",
}


def offer(desk: Desk, study: Study, first: Tensors, *, ends: datetime) -> StudyOffer:
    """Offer a study to its sites, and return the offer; again is free.

    Args:
        desk: the coordinator's state.
        study: with the base's digests and the labels filled in.
        first: the adapter that the first round starts from.
        ends: after which no site answers any more.

    Raises:
        ConfigError: the study cannot be run: its strategy, its quorum, a site that is no member.
        WaitingForBoardError: enough of the board have yet to sign the draft.
        StorageError: it cannot be kept.
    """
    if study.strategy.name in PERSONAL:
        raise ConfigError(
            f"[strategy] name is {study.strategy.name!r}, which leaves a part of the model at each "
            "hospital and no release for all: it can be simulated, set another name"
        )
    trust = desk.registry.trust()
    members = {member.site for member in trust.active}
    if unknown := sorted(study.sites.keys() - members):
        raise ConfigError(
            f"[sites.{unknown[0]}] is no member of the alliance, members are "
            f"{', '.join(sorted(members)) or 'none'}: invite it, or mend the name"
        )
    state = make_strategy(study).init(first)
    coordinator = Coordinator(study, shapes_of(state.x))
    made = StudyOffer(
        alliance=desk.alliance,
        study=study.resolved(),
        digest=study.digest(),
        adapter=desk.objects.put(coordinator.announcement(coordinator.first(first))),
        state=desk.objects.put(encode_state(state)),
        issued=stamp(desk.clock()),
        ends=stamp(ends),
    )
    if (kept := desk.store.studies.study(made.digest)) is not None:
        return trust.offer(kept.document)
    board = trust.membership.board
    own = [key for key in desk.keys.board if public_of(key).raw.hex() in board.keys]
    document = made.signed(*(own or [desk.keys.identity]))
    if len(own) < board.threshold:
        place = desk.home.folder / "board" / f"study-{made.digest[:12]}.json"
        write_whole(place, document)
        raise WaitingForBoardError(
            f"study {made.digest[:12]} waits for {board.threshold - len(own)} of the board to sign "
            f"{place.name}"
        )
    desk.store.studies.propose(made.digest, study.study.name, document, desk.clock())
    return made


def accept(desk: Desk, document: bytes) -> StudyOffer:
    """Offer a study that the board has signed elsewhere, and return the offer; again is free.

    Raises:
        ProtocolError: too few of the board have signed, or it is no offer of this alliance.
        StorageError: what its rounds start from is not here.
    """
    trust = desk.registry.trust()
    made = trust.offer(document)
    if made.alliance != desk.alliance:
        raise ProtocolError(f"study is of alliance {made.alliance!r}, not {desk.alliance!r}")
    study = made.agreed()
    for digest in (made.adapter, made.state):
        desk.objects.get(digest)
    desk.store.studies.propose(made.digest, study.study.name, document, desk.clock())
    draft = desk.home.folder / "board" / f"study-{made.digest[:12]}.json"
    draft.unlink(missing_ok=True)
    return made


def find(desk: Desk, begin: str) -> StoredStudy:
    """Return the one study whose digest or name begins so.

    Raises:
        ConfigError: none does, or several.
    """
    found = [
        one
        for one in desk.store.studies.studies()
        if one.digest.startswith(begin) or one.name == begin
    ]
    if len(found) != 1:
        known = ", ".join(f"{one.digest[:12]} {one.name!r}" for one in desk.store.studies.studies())
        raise ConfigError(
            f"{len(found)} studies are called {begin!r}, expected one of: {known or 'none yet'}"
        )
    return found[0]


def change(desk: Desk, study: StoredStudy, state: State) -> bool:
    """Open, pause or close a study; return whether it was in another state.

    Raises:
        ConfigError: there is no way from its state to this one.
        StorageError: it cannot be kept.
    """
    if study.state == state:
        return False
    check_move(study, state)
    event = _EVENTS.get((study.state, state), "study_closed" if state == "closed" else None)
    if event is not None:
        desk.audit.append(event, study=study.digest)
    return desk.store.studies.change_state(study.digest, state, desk.clock())


def sweep(desk: Desk) -> int:
    """Remove the objects that a killed process left a day ago or earlier; return how many.

    What a row, an offer or a draft that waits for the board names, stays.

    Raises:
        StorageError: something cannot be read or removed, or a draft is none: nothing was removed.
    """
    documents = [one.document for one in desk.store.studies.studies()]
    drafts = (desk.home.folder / "board").glob("study-*.json")
    try:
        said = [claimed(one) for one in (*documents, *(draft.read_bytes() for draft in drafts))]
        named = {one[part] for one in said for part in ("adapter", "state")}
    except (OSError, WireError, KeyError) as error:
        raise StorageError(
            f"a study's draft in {str(desk.home.folder / 'board')!r} is none: {error}"
        ) from error
    return desk.objects.sweep(desk.store.object_digests() | named)


def offered(desk: Desk, study: StoredStudy) -> StudyOffer:
    """Return a study's offer, its signatures checked."""
    trust = desk.registry.trust()
    return trust.offer(study.document)
