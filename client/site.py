"""A site's side of a study: an announced adapter comes in, a sealed update goes out.

What is charged, answered and kept is decided here, without torch; who trains is a ``Trainer``.
"""

import hashlib

from huizhen.client.ledger import Ledger
from huizhen.client.outbox import Envelope, Outbox, send
from huizhen.client.trainer import Trainer, TrainingReport, kept_bytes, read_announcement
from huizhen.protocol.adapter import Tensors
from huizhen.protocol.errors import PrivacyError, ProtocolError, WireError
from huizhen.protocol.mechanism import Mechanism, patients_bound
from huizhen.protocol.metrics import budgets, parse_metrics
from huizhen.protocol.study import Study
from huizhen.protocol.wire import decode
from huizhen.strategies.base import Strategy
from huizhen.strategies.catalogue import make_strategy

HELD_OUT = "held_out"  # the name under which metrics are charged


def check_delta(site: str, study: Study, num_units: int) -> None:
    """Refuse a δ that would let one whole patient out.

    Args:
        site: its name.
        study: what was agreed.
        num_units: the site's units of privacy, the true number.

    Raises:
        PrivacyError: δ is not below one over ``num_units``.
    """
    if study.is_private and study.privacy.delta * num_units >= 1:
        raise PrivacyError(
            f"[privacy] delta is {study.privacy.delta}, not below one over the "
            f"{study.privacy.unit}s of site {site!r}: lower it"
        )


def _check_ledger(ledger: Ledger, site: str, study: Study, num_units: int) -> None:
    """Refuse a ledger that is not this site's, or that counts something else."""
    if ledger.site != site:
        raise PrivacyError(f"ledger is of site {ledger.site!r}, site {site!r} needs its own")
    if ledger.unit != study.privacy.unit:
        raise PrivacyError(
            f"ledger of site {site!r} counts by {ledger.unit}, the study by "
            f"{study.privacy.unit}: use a ledger of its unit"
        )
    most = max(num_units, study.sites[site].patients_public)
    if ledger.cap.delta * most >= 1:
        raise PrivacyError(
            f"the cap's delta is {ledger.cap.delta}, not below one over the {study.privacy.unit}s "
            f"of site {site!r}: lower it with 'site ledger cap'"
        )


def _check_size(site: str, study: Study, num_units: int) -> None:
    """Refuse more patients than a capped step is priced for."""
    bound = patients_bound(study.sites[site].patients_public)
    if study.privacy.batch_cap is not None and num_units > bound:
        raise PrivacyError(
            f"site {site!r} has more than {bound} {study.privacy.unit}s, for which "
            "[privacy] batch_cap is priced: raise its patients_public"
        )


def diverged(site: str, round: int, error: WireError) -> ProtocolError:
    """Return what is said of an update that cannot be written."""
    return ProtocolError(
        f"site {site!r}, round {round}: {error}: nothing was sent, lower the learning rate"
    )


class Site:
    """One hospital in one study."""

    def __init__(
        self, name: str, study: Study, trainer: Trainer, *, ledger: Ledger | None = None
    ) -> None:
        """Take part in a study.

        Args:
            name: this site's name in the study.
            study: what was agreed.
            trainer: holds the site's records; made for this site and this study.
            ledger: of the cohort that the records belong to; a private study needs it. What was
                sent is kept beside it.

        Raises:
            ProtocolError: the study does not list this site.
            PrivacyError: δ is not below one over the number of patients, there are more of them
                than the study's public size allows, or the trainer is of another site or study.
            BudgetExhaustedError: the ledger's cap does not cover the study's rounds.
            HuizhenError: the trainer cannot train.
        """
        if name not in study.sites:
            raise ProtocolError(f"site {name!r} is not in the study {study.study.name!r}")
        if study.is_private and ledger is None:
            raise PrivacyError(f"site {name!r} joins a private study without its ledger")
        if not study.is_private and ledger is not None:
            raise PrivacyError(
                f"site {name!r} has a ledger, the study's unit is 'none' and charges nothing: "
                "what it asks for would leave without noise"
            )
        self.name, self.study, self.trainer = name, study, trainer
        self.digest = study.digest()
        self.strategy: Strategy = make_strategy(study)
        self.mechanism: Mechanism | None = None
        self._ledger = ledger
        self._facts = facts = trainer.ready()
        if (facts.site, facts.study) != (name, self.digest):
            raise PrivacyError(
                f"the trainer of site {name!r} was made for another site or study: it would not "
                "train as this study asks"
            )
        if ledger is not None:
            _check_ledger(ledger, name, study, facts.num_units)
            check_delta(name, study, facts.num_units)
            _check_size(name, study, facts.num_units)
            self.mechanism = Mechanism.of(study)
            ledger.reserve(self.digest, self.mechanism.per_round, study.rounds.count)
            self._outbox = Outbox.beside(ledger.path)
        self._keeps = self.strategy.keeps(facts.shapes)
        self._last_round = 0
        self.kept: Tensors = {}
        # without a ledger: what the strategy keeps here between rounds; else it is in the outbox

    def answer(self, announcement: bytes, round: int) -> tuple[Envelope, TrainingReport | None]:
        """Return the sealed update for an announced adapter, and a report for the site's own eyes.

        A private round that was answered is answered again with the same bytes, at no cost; there
        is no report then. It stays so after a crash and for a second process on the same ledger.

        Raises:
            ProtocolError: the announcement is of another study or round, or not what it must be.
            PrivacyError: the round is before one that was answered, past the study's last, or
                answers another announcement.
            BudgetExhaustedError: the hospital has lowered its cap since.
            ReleaseLostError: what answered, and was paid for, is lost.
            StorageError: the ledger or the update cannot be written.
            TrainerError: the process that trains could not, or was stopped.
        """
        if round > self.study.rounds.count:
            raise PrivacyError(f"round {round} is asked, the study has {self.study.rounds.count}")
        ledger = self._ledger
        if ledger is not None and (given := ledger.answered(self.digest, round)) is not None:
            if hashlib.sha256(announcement).hexdigest() != given.announcement:
                raise PrivacyError(
                    f"round {round} answers another announcement: each round is paid for once"
                )
            return self._outbox.kept(self.digest, given.update), None
        if round <= self._last_round:
            raise PrivacyError(
                f"round {round} is asked, the last answered is {self._last_round}: "
                "a study does not go back"
            )
        self._check_announcement(announcement, round)
        self._still_ready()  # a round that cannot be trained must not be paid for
        if ledger is not None:
            self._forget_unnamed(ledger)
            ledger.charge(self.digest, round)  # on the disk before the first gradient
        trained = self.trainer.train(announcement, round, self._kept_before())
        names = self.strategy.sends(self._facts.shapes, round)
        agreed = {name: shape for name, shape in self._facts.shapes.items() if name in names}
        try:
            envelope = send(
                study=self.digest,
                round=round,
                site=self.name,
                update=trained.update,
                agreed=agreed,
                travel=self.study.travel(round),
                saturate=self.study.is_private,
            )
        except WireError as error:
            raise diverged(self.name, round, error) from error
        if ledger is not None:
            with self._outbox.alone(self.digest):
                if (own := self.own_bytes(trained.kept, round)) is not None:
                    self._outbox.keep_own(self.digest, envelope, own)
                self._outbox.keep(self.digest, envelope)
                entry = ledger.answer(self.digest, round, announcement, envelope.data)
                self._outbox.forget_others(self.digest, entry.body["update"])
        self._last_round, self.kept = round, trained.kept
        return envelope, trained.report

    def own_bytes(self, kept: Tensors, round: int) -> bytes | None:
        """Return what is kept between rounds as bytes for this site's own disk, None for nothing.

        What cannot be kept is not: every strategy goes on without it.
        """
        if not kept:
            return None
        try:
            return kept_bytes(kept, study=self.digest, site=self.name, round=round)
        except WireError:  # a value is not finite
            return None

    def own_of(self, data: bytes | None) -> Tensors:
        """Return what ``own_bytes`` wrote; nothing where it is lost or another's.

        Every strategy goes on without it: what is kept makes training better, not right.
        """
        if data is None or not self._keeps:
            return {}
        try:
            message = decode(data, shapes=self._keeps)
        except WireError:
            return {}
        found = (message.kind, message.study, message.site)
        return message.tensors if found == ("kept", self.digest, self.name) else {}

    def _kept_before(self) -> Tensors:
        """Return what the last answered round has kept."""
        if self._ledger is None or not self._keeps:
            return self.kept
        named = self._ledger.last_answer(self.digest)
        return {} if named is None else self.own_of(self._outbox.own(self.digest, named.update))

    def release_metrics(self, announcement: bytes) -> bytes:
        """Return the noised metrics of the final adapter; asked again, the same bytes.

        Args:
            announcement: of the round after the last.

        Raises:
            ConfigError: the study lets no metrics out.
            ProtocolError: the announcement is of another study or round, or not what it must be.
            PrivacyError: the study is not private, nothing was held out here, the last round is not
                answered, or the metrics are of another announcement.
            ReleaseLostError: a release that was charged before a crash is lost: its ε is spent.
            StorageError: the ledger or the metrics cannot be written.
            BudgetExhaustedError: the ledger's cap for metrics does not cover it.
            TrainerError: the process that measures could not, or was stopped.
        """
        epsilon = sum(budgets(self.study))
        if self._ledger is None or not self._facts.has_held_out:
            raise PrivacyError(
                f"site {self.name!r} has no held-out patients in a private study: it has no "
                "metrics to let out"
            )
        ledger = self._ledger
        if (given := ledger.released(self.digest, HELD_OUT)) is not None:
            if hashlib.sha256(announcement).hexdigest() != given.announcement:
                raise PrivacyError("metrics are of another announcement: they leave once")
            return self._outbox.kept_metrics(self.digest, given.metrics)
        if ledger.answered(self.digest, self.study.rounds.count) is None:
            raise PrivacyError(
                f"site {self.name!r} has not answered the last round: metrics leave after it"
            )
        self._check_announcement(announcement, self.study.rounds.count + 1)
        self._still_ready()
        ledger.charge_metrics(self.digest, HELD_OUT, epsilon)  # before anything is counted
        released = self.trainer.metrics(announcement)
        self._check_metrics(released)
        with self._outbox.alone(self.digest):
            self._outbox.keep_metrics(self.digest, released)
            ledger.release_metrics(self.digest, HELD_OUT, announcement, released)
        return released

    def _forget_unnamed(self, ledger: Ledger) -> None:
        """Remove what an earlier try has left: nothing of it is ever sent."""
        with self._outbox.alone(self.digest):
            named = ledger.last_answer(self.digest)
            self._outbox.forget_others(self.digest, None if named is None else named.update)

    def _still_ready(self) -> None:
        """Make sure that the trainer can train, and on what it had when the site joined."""
        if self.trainer.ready() != self._facts:
            raise PrivacyError(
                f"the trainer of site {self.name!r} has other records or another base than when "
                "the site joined: join again"
            )

    def _check_announcement(self, announcement: bytes, round: int) -> None:
        read_announcement(
            announcement,
            round,
            study=self.study,
            strategy=self.strategy,
            shapes=self._facts.study_shapes,
        )

    def _check_metrics(self, released: bytes) -> None:
        """Refuse what is not this site's noised counts, and nothing beside them."""
        found = parse_metrics(released, self.study)
        if (found.site, found.round) != (self.name, self.study.rounds.count):
            raise ProtocolError("metrics are of another site or round: nothing was sent")

    def skip_to(self, round: int) -> None:
        """Take rounds before ``round`` as answered: the coordinator has stored their result."""
        self._last_round = max(self._last_round, round - 1)
