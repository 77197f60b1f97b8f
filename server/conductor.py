"""Runs the rounds of all open studies over one Flower run; a process of its own.

    announce ─► push to sites that are online ─► pull as answers come ─► close

The process holds nothing that the store does not: it may be killed at any moment and started
again, with a new Flower run. A site that does not answer, refuses or breaks is asked again after a
pause, until the round closes: when all have answered, or with its quorum at the deadline. A site
that refuses, or is away for a minute, is not waited for once the quorum is there.
"""

import gc
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from huizhen.protocol.documents import PublicKey, public_of
from huizhen.protocol.errors import AggregationError, ConfigError, DamagedError, ProtocolError
from huizhen.protocol.statements import Approval, Release, StudyOffer, digest_of, moment, stamp
from huizhen.protocol.study import Study
from huizhen.protocol.trust import Trust
from huizhen.server.flower import NoReply, Reply, Run, connect
from huizhen.server.open_round import OpenRound, Parts
from huizhen.server.store_rounds import StoredRecord
from huizhen.server.superlink import Control, Link, RunLostError

POLL_SECONDS = 0.05
IDLE_POLL_SECONDS = 0.5
LEASE_SECONDS = 30.0
_LOOK_SECONDS = 1.0
_RESTART_SECONDS = 3.0
# after which it is looked up, now and then, whether a site was started anew
_ABSENT_SECONDS = 60.0
# offline so long, a site does not hold a round that has its quorum
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 300.0
_MARGIN_SECONDS = 600.0
# that Flower keeps a message past the deadline, so that a late answer is told that it was late

_TROUBLES = (ProtocolError, ConfigError, AggregationError, DamagedError, ValueError)
# what is wrong with one study; a disk that is full is wrong with all

logger = logging.getLogger(__name__)


_NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(slots=True)
class _Asked:
    """What a site was asked in this attempt."""

    message: str | None = None
    # Flower's name of the message that it has not answered
    at: float = 0.0
    # when it was asked, on the monotonic clock
    since: datetime = _NEVER
    # and on SuperLink's, which is this machine's
    again: float = 0.0
    # not before this moment, on the monotonic clock
    pause: float = FIRST_PAUSE_SECONDS


@dataclass(frozen=True, slots=True)
class _Late:
    """A message that was not answered when nobody waited for it any more."""

    round: OpenRound | None
    # None: it is only taken off SuperLink, which would keep it until the run ends
    max_bytes: int
    site: str
    message: str
    until: float


@dataclass(slots=True)
class _Work:
    """An open round and how its sites are asked."""

    round: OpenRound
    asked: dict[str, _Asked] = field(default_factory=dict)
    earlier: list[tuple[str, str]] = field(default_factory=list)
    # site and message of attempts before this one: an answer to them counts as well

    def outstanding(self) -> list[tuple[str, str]]:
        """Return the site and the name of each message that is not answered."""
        asked = [(site, one.message) for site, one in self.asked.items() if one.message]
        return [*asked, *self.earlier]


class Conductor:
    """The rounds of all open studies."""

    def __init__(
        self,
        parts: Parts,
        trust: Callable[[], Trust],
        keys_at: Callable[[str, datetime], list[PublicKey]],
        *,
        owner: str,
    ) -> None:
        """Prepare.

        Args:
            parts: the store, the objects, the log, the key and the clock.
            trust: gives the newest membership.
            keys_at: gives the keys of a site for what was received at a time.
            owner: in leases; the same after a restart, so that it need not wait for its own.
        """
        self._parts, self._trust, self._keys_at = parts, trust, keys_at
        self._owner = owner
        self._works: dict[str, _Work] = {}
        self._looked = -_LOOK_SECONDS
        self._online: set[int] = set()
        self._late: list[_Late] = []
        self._troubled: dict[str, float] = {}
        # studies that rest, until a moment on the monotonic clock
        self._nodes: dict[str, int] = {}
        # Flower's number of each active member, by site
        self._seen: dict[str, float] = {}
        # when each was online last, on the monotonic clock; from the first look at the latest
        self._late_again = self._anew_again = 0.0
        self._admitted = 0
        # the version of the membership whose nodes the SuperLink admits

    def run(self, link: Link, stop: threading.Event) -> None:
        """Run rounds until told to stop; a lost Flower run is replaced by another.

        Raises:
            HuizhenError: what only people can mend: a full disk, a damaged store.
        """
        pause = FIRST_PAUSE_SECONDS
        while not stop.is_set():
            try:
                with connect(link) as run:
                    gc.collect()
                    gc.freeze()  # what is loaded stays: the many small collections skip it
                    logger.info("flower run: number=%s", run.number)
                    pause = FIRST_PAUSE_SECONDS
                    self._forget_run()
                    while not stop.is_set():
                        is_busy = self.step(run, Control(link))
                        stop.wait(POLL_SECONDS if is_busy else IDLE_POLL_SECONDS)
            except RunLostError as error:
                logger.warning("flower run lost, another follows: reason=%s", error)
                stop.wait(pause)
                pause = min(2 * pause, 15.0)
        for study in self._works:
            self._parts.store.rounds.release_lease(study, self._owner)

    def step(self, run: Run, control: Control) -> bool:
        """Do what can be done now; return whether there is more to do soon.

        Raises:
            RunLostError: the Flower run is over.
        """
        self._look(run, control)
        for study, work in list(self._works.items()):
            try:
                self._advance(study, work, run)
            except RunLostError:
                raise
            except _TROUBLES as error:
                self._trouble(study, error)
        self._collect_late(run)
        return self._must_look or any(
            one.message for work in self._works.values() for one in work.asked.values()
        )

    @property
    def _must_look(self) -> bool:
        return time.monotonic() - self._looked >= _LOOK_SECONDS

    def _look(self, run: Run, control: Control) -> None:
        """See now and then which studies are open, who may answer, and who is there."""
        if not self._must_look:
            return
        trust = self._trust()
        self._admit(trust, control)
        self._online, self._looked = run.online(), time.monotonic()
        for site, node in self._nodes.items():
            if node in self._online or site not in self._seen:
                self._seen[site] = self._looked
        self._ask_anew(control)
        store, now = self._parts.store, self._parts.clock()
        held = set()
        for stored in store.studies.studies():
            if stored.state != "open":
                continue
            if not store.rounds.lease(stored.digest, self._owner, LEASE_SECONDS, now):
                continue
            held.add(stored.digest)
            if time.monotonic() < self._troubled.get(stored.digest, 0.0):
                continue
            try:
                offer = trust.offer(stored.document)
                self._take_up(offer, trust, now)
            except RunLostError:
                raise
            except _TROUBLES as error:
                self._trouble(stored.digest, error)
        for study in set(self._works) - held:  # paused, closed, or led by another process
            self._drop(study)

    def _trouble(self, study: str, error: Exception) -> None:
        """Leave a study alone for a while: one study's trouble is not the others'."""
        logger.error("study rests for a while: study=%s %s", study[:12], error)
        self._troubled[study] = time.monotonic() + LONGEST_PAUSE_SECONDS
        self._drop(study)

    def _drop(self, study: str) -> None:
        """Let go of an open round; it is made anew from the store."""
        if (work := self._works.pop(study, None)) is not None:
            self._part_with(work, None)

    def _part_with(self, work: _Work, closed: OpenRound | None) -> None:
        """Go on taking the answers that are still to come, for as long as Flower keeps them."""
        until = time.monotonic() + _MARGIN_SECONDS
        self._late += [
            _Late(closed, work.round.max_bytes, site, message, until)
            for site, message in work.outstanding()
        ]

    def _take_up(self, offer: StudyOffer, trust: Trust, now: datetime) -> None:
        """Open the next round of a study, or tell its open one who may answer now."""
        sites = self._may_answer(trust, offer, now)
        work = self._works.get(offer.digest)
        if work is not None:
            work.round.trust, work.round.sites = trust, sites
            return
        study = offer.agreed()
        last = self._parts.store.rounds.last_record(offer.digest)
        if last is not None and last.round >= study.last_round:
            self._finish(offer, last)
        elif last is not None and self._is_trained(study, last) and not sites:
            self._finish(offer, last)  # nobody is left to measure what was trained
        elif len(sites) >= (1 if self._is_trained(study, last) else study.quorum):
            self._works[offer.digest] = _Work(OpenRound(self._parts, offer, trust, sites))

    def _admit(self, trust: Trust, control: Control) -> None:
        """Let the members' nodes into the SuperLink, and shut out those who are no longer."""
        if self._admitted == trust.membership.version:
            return
        nodes = {}
        for member in trust.active:
            try:
                nodes[member.site] = control.admit(member.node_key.encode())
            except RunLostError:
                raise
            except ProtocolError as error:  # it cannot be asked, the others can
                logger.error("node is not admitted: site=%s %s", member.site, error)
        known = control.nodes()
        for key in known.keys() - {one.node_key.encode() for one in trust.active}:
            control.expel(known[key])
        self._nodes = nodes
        self._admitted = trust.membership.version

    @staticmethod
    def _is_trained(study: Study, last: StoredRecord | None) -> bool:
        """Whether only the metrics are left, which need no quorum."""
        return last is not None and last.round >= study.rounds.count

    def _may_answer(self, trust: Trust, offer: StudyOffer, now: datetime) -> tuple[str, ...]:
        """Return the study's sites whose approval stands."""
        found = []
        for site, consent in self._parts.store.studies.standing(offer.digest).items():
            if consent.kind != "approval" or site not in offer.study["sites"]:
                continue
            try:
                approval = Approval.read(consent.document, self._keys_at(site, consent.received))
                trust.member(site)
            except ProtocolError:
                continue
            if approval.study == offer.digest and now < moment(approval.expires):
                found.append(site)
        return tuple(sorted(found))

    def _advance(self, study: str, work: _Work, run: Run) -> None:
        """Ask, take what came, and close the round when it can be."""
        self._ask(work, run)
        self._collect(work, run)
        open_round = work.round
        if not open_round.sites:  # every approval has ended: it waits for one
            self._drop(study)
            return
        if not open_round.is_due and (self._awaited(open_round) or not open_round.has_quorum):
            return
        if not open_round.has_quorum:
            if open_round.is_due:
                logger.warning(
                    "round has no quorum, it is announced again: study=%s round=%s counted=%s",
                    study[:12], open_round.round, len(open_round.counted),
                )  # fmt: skip
                open_round.announce()
                work.earlier = work.outstanding()
                work.asked.clear()
            return
        record = open_round.close()
        self._part_with(work, open_round)
        logger.info(
            "round committed: study=%s round=%s counted=%s record=%s",
            study[:12], open_round.round, len(open_round.counted), record[:12],
        )  # fmt: skip
        del self._works[study]
        self._looked = -_LOOK_SECONDS  # what comes next is looked up at once

    def _awaited(self, open_round: OpenRound) -> list[str]:
        """Return the sites for which a round that has its quorum is held open.

        One that says no, or has been away for a minute, does not cost the others the time to the
        deadline. Metrics are taken once, so all are waited for.
        """
        if open_round.is_metrics:
            return list(open_round.missing)
        now = time.monotonic()
        return [
            site
            for site in open_round.missing
            if site not in open_round.declined and now - self._seen.get(site, now) < _ABSENT_SECONDS
        ]

    def _ask(self, work: _Work, run: Run) -> None:
        now, open_round = time.monotonic(), work.round
        due: dict[int, str] = {}
        for site in open_round.missing:
            asked = work.asked.setdefault(site, _Asked())
            node = self._nodes.get(site, 0)
            if asked.message is None and node in self._online and now >= asked.again:
                due[node] = site
        if not due:
            return
        left = max(0.0, (open_round.deadline - self._parts.clock()).total_seconds())
        names = run.push(
            list(due),
            open_round.document,
            open_round.adapter,
            seconds=left + _MARGIN_SECONDS,
        )
        for node, name in names.items():
            asked = work.asked[due[node]]
            asked.message, asked.at, asked.since = name, now, datetime.now(UTC)

    def _collect(self, work: _Work, run: Run) -> None:
        answer: Reply | NoReply | None = None
        for site, asked in work.asked.items():
            answer = None  # let go before the next one is fetched
            if asked.message is None:
                continue
            answer = run.pull(asked.message, max_bytes=work.round.max_bytes)
            if answer is None:
                continue
            asked.message = None
            code = None
            if isinstance(answer, Reply):
                code = work.round.receive(site, answer.document, answer.payload)
                if code is None:
                    continue
            elif isinstance(answer, NoReply):
                code = answer.code
                if code != "no_answer":
                    work.round.unusable(site, code)
            logger.info("site does not count: site=%s code=%s", site, code)
            asked.again = time.monotonic() + asked.pause
            asked.pause = min(2 * asked.pause, LONGEST_PAUSE_SECONDS)
        for one in list(work.earlier):
            site, message = one
            answer = run.pull(message, max_bytes=work.round.max_bytes)
            if answer is not None:
                work.earlier.remove(one)
            if isinstance(answer, Reply):
                work.round.receive(site, answer.document, answer.payload)

    def _ask_anew(self, control: Control) -> None:
        """Ask again whose process has started since: it knows nothing of what the last one did.

        One that is killed, or loses its line, leaves a message unanswered or half an answer at
        SuperLink, and Flower tells nobody.
        """
        now = time.monotonic()
        waiting = [
            (work, site, asked)
            for work in self._works.values()
            for site, asked in work.asked.items()
            if asked.message and now - asked.at > _RESTART_SECONDS
        ]
        if not waiting or now < self._anew_again:
            return
        self._anew_again = now + _RESTART_SECONDS
        came = control.activations()
        for work, site, asked in waiting:
            if came.get(self._nodes.get(site, 0), asked.since) > asked.since:
                logger.info("site was started anew and is asked again: site=%s", site)
                work.earlier.append((site, str(asked.message)))
                asked.message = None

    def _collect_late(self, run: Run) -> None:
        """Tell sites that were too late that they were: nothing is dropped in silence."""
        now = time.monotonic()
        if now < self._late_again:
            return
        self._late_again = now + _LOOK_SECONDS
        for late in list(self._late):
            answer = run.pull(late.message, max_bytes=late.max_bytes)
            if answer is None and now > late.until:
                run.forget(late.message)
            if answer is not None or now > late.until:
                self._late.remove(late)
            if isinstance(answer, Reply) and late.round is not None:
                late.round.receive_late(late.site, answer.document, answer.payload)

    def _finish(self, offer: StudyOffer, last: StoredRecord) -> None:
        """Release what the last round gave."""
        parts, now = self._parts, self._parts.clock()
        made = parts.store.studies.releases(offer.digest)
        if any(
            Release.read(one.document, [public_of(parts.key)]).record == last.digest for one in made
        ):
            parts.store.studies.change_state(offer.digest, "finished", now)
            return
        release = Release(
            alliance=offer.alliance,
            study=offer.digest,
            record=last.digest,
            adapter=last.adapter,
            certificate=None,
            issued=stamp(now),
        )
        document = release.signed(parts.key)
        parts.audit.append(
            "release_made", study=offer.digest, release=digest_of(document), adapter=last.adapter
        )
        parts.store.studies.add_release(offer.digest, document, now)
        parts.audit.append("study_finished", study=offer.digest)
        parts.store.studies.change_state(offer.digest, "finished", now)

    def _forget_run(self) -> None:
        """A new run knows nothing of the last one's messages; a new SuperLink, of no node."""
        for work in self._works.values():
            work.asked.clear()
            work.earlier.clear()
        self._late.clear()
        self._admitted, self._looked = 0, -_LOOK_SECONDS
