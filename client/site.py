"""A site's side of a study: an announced adapter comes in, a sealed update goes out."""

import hashlib

from huizhen.client.examples import Examples
from huizhen.client.ledger import Ledger
from huizhen.client.metrics_release import check_held_out, held_out_outcomes, release_metrics
from huizhen.client.model_checks import check_model
from huizhen.client.outbox import Envelope, Outbox, send
from huizhen.client.training import Protection, TrainingReport, train_round, units
from huizhen.learning.trainable import Model
from huizhen.protocol.adapter import Tensors, difference
from huizhen.protocol.errors import PrivacyError, ProtocolError, WireError
from huizhen.protocol.mechanism import Mechanism, patients_bound
from huizhen.protocol.metrics import budgets
from huizhen.protocol.study import Study
from huizhen.protocol.wire import Message, decode
from huizhen.strategies.base import Strategy
from huizhen.strategies.catalogue import make_strategy

DEFAULT_MEMORY_MIB = 1024
HELD_OUT = "held_out"  # the name under which metrics are charged


def check_delta(site: str, study: Study, examples: Examples) -> None:
    """Refuse a δ that would let one whole patient out.

    Raises:
        PrivacyError: δ is not below one over the number of the site's units of privacy.
    """
    if study.is_private and study.privacy.delta * len(units(examples, study)) >= 1:
        raise PrivacyError(
            f"[privacy] delta is {study.privacy.delta}, not below one over the "
            f"{study.privacy.unit}s of site {site!r}: lower it"
        )


def _check_ledger(ledger: Ledger, site: str, study: Study, examples: Examples) -> None:
    """Refuse a ledger that is not this site's, or that counts something else."""
    if ledger.site != site:
        raise PrivacyError(f"ledger is of site {ledger.site!r}, site {site!r} needs its own")
    if ledger.unit != study.privacy.unit:
        raise PrivacyError(
            f"ledger of site {site!r} counts by {ledger.unit}, the study by "
            f"{study.privacy.unit}: use a ledger of its unit"
        )
    most = max(len(units(examples, study)), study.sites[site].patients_public)
    if ledger.cap.delta * most >= 1:
        raise PrivacyError(
            f"the cap's delta is {ledger.cap.delta}, not below one over the {study.privacy.unit}s "
            f"of site {site!r}: lower it with 'site ledger cap'"
        )


def _check_size(site: str, study: Study, examples: Examples) -> None:
    """Refuse more patients than a capped step is priced for."""
    bound = patients_bound(study.sites[site].patients_public)
    if study.privacy.batch_cap is not None and len(units(examples, study)) > bound:
        raise PrivacyError(
            f"site {site!r} has more than {bound} {study.privacy.unit}s, for which "
            "[privacy] batch_cap is priced: raise its patients_public"
        )


class Site:
    """One hospital in one study. The model may be shared: each round loads what it needs."""

    def __init__(
        self,
        name: str,
        study: Study,
        examples: Examples,
        model: Model,
        first: Tensors,
        *,
        held_out: Examples | None = None,
        ledger: Ledger | None = None,
        memory_mib: int = DEFAULT_MEMORY_MIB,
    ) -> None:
        """Take part in a study.

        Args:
            name: this site's name in the study.
            study: what was agreed.
            examples: the site's records.
            model: may be shared with other sites.
            first: the study's first adapter.
            held_out: records that are not trained on, for the metrics that the study lets out.
            ledger: of the cohort that the records belong to; a private study needs it. What was
                sent is kept beside it.
            memory_mib: bound on what a private step holds at a time, in MiB.

        Raises:
            ProtocolError: the study does not list this site.
            PrivacyError: δ is not below one over the number of patients, there are more of them
                than the study's public size allows, the model cannot be trained privately, or a
                patient is both trained on and held out while metrics leave.
            BudgetExhaustedError: the ledger's cap does not cover the study's rounds.
        """
        if name not in study.sites:
            raise ProtocolError(f"site {name!r} is not in the study {study.study.name!r}")
        self.name, self.study, self.examples, self.model = name, study, examples, model
        self.digest = study.digest()
        self._ledger: Ledger | None = None
        self._held_out: Examples | None = None
        self.strategy: Strategy = make_strategy(study)
        self.adapter: Tensors = self.strategy.init(first).x
        self.mechanism: Mechanism | None = None
        self._protection: Protection | None = None
        if study.is_private:
            if ledger is None:
                raise PrivacyError(f"site {name!r} joins a private study without its ledger")
            _check_ledger(ledger, name, study, examples)
            check_delta(name, study, examples)
            _check_size(name, study, examples)
            if held_out is not None and study.privacy.metrics_epsilon is not None:
                check_held_out(held_out.patients, examples.patients)
                self._held_out = held_out
            self.mechanism = Mechanism.of(study)
            model.load(self.adapter)
            memory = check_model(model, examples, memory_mib)
            self._protection = Protection(self.mechanism.noise_multiplier, memory)
            ledger.reserve(self.digest, self.mechanism.per_round, study.rounds.count)
            self._ledger, self._outbox = (
                ledger,
                Outbox.beside(ledger.path),
            )
        elif ledger is not None:
            raise PrivacyError(
                f"site {name!r} has a ledger, the study's unit is 'none' and charges nothing: "
                "what it asks for would leave without noise"
            )
        self._last_round = 0

    def answer(self, announcement: bytes, round: int) -> tuple[Envelope, TrainingReport | None]:
        """Return the sealed update for an announced adapter, and a report for the site's own eyes.

        A private round that was answered is answered again with the same bytes, at no cost; there
        is no report then. It stays so after a crash and for a second process on the same ledger.

        Raises:
            ProtocolError: the announcement is of another study or round, or not what it must be.
            PrivacyError: the round is before one that was answered, past the study's last, or
                answers another announcement.
            BudgetExhaustedError: the hospital has lowered its cap since.
            StorageError: the ledger or the update cannot be written, or what answers is lost.
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
        names = self.strategy.trains(self.model.shapes, round)
        message = self._load(announcement, round)
        if ledger is not None:
            self._forget_unnamed(ledger)
            ledger.charge(self.digest, round)  # on the disk before the first gradient
        report = train_round(
            self.model,
            self.examples,
            self.study,
            site=self.name,
            round=round,
            names=names,
            protection=self._protection,
        )
        update = difference(self.model.read(names), message.tensors)
        agreed = {name: shape for name, shape in self.model.shapes.items() if name in names}
        try:
            envelope = send(
                study=self.digest, round=round, site=self.name, update=update, agreed=agreed
            )
        except WireError as error:
            raise ProtocolError(
                f"site {self.name!r}, round {round}: {error}: nothing was sent, "
                "lower the learning rate"
            ) from error
        if ledger is not None:
            with self._outbox.alone(self.digest):
                self._outbox.keep(self.digest, envelope)
                entry = ledger.answer(self.digest, round, announcement, envelope.data)
                self._outbox.forget_others(self.digest, entry.body["update"])
        self._last_round = round
        return envelope, report

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
            StorageError: the ledger or the metrics cannot be written, or what was released is lost.
            BudgetExhaustedError: the ledger's cap for metrics does not cover it.
        """
        epsilon = sum(budgets(self.study))
        if self._held_out is None or self._ledger is None:
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
        self._load(announcement, self.study.rounds.count + 1)
        ledger.charge_metrics(self.digest, HELD_OUT, epsilon)  # before anything is counted
        released = release_metrics(
            self.study,
            site=self.name,
            round=self.study.rounds.count,
            outcomes=held_out_outcomes(self.model, self._held_out),
            training_patients=set(self.examples.patients),
        ).canonical()
        with self._outbox.alone(self.digest):
            self._outbox.keep_metrics(self.digest, released)
            ledger.release_metrics(self.digest, HELD_OUT, announcement, released)
        return released

    def _forget_unnamed(self, ledger: Ledger) -> None:
        """Remove what an earlier try has left: nothing of it is ever sent."""
        with self._outbox.alone(self.digest):
            named = ledger.last_answer(self.digest)
            self._outbox.forget_others(self.digest, None if named is None else named.update)

    def _load(self, announcement: bytes, round: int) -> Message:
        """Put an announced adapter into the model."""
        names = self.strategy.trains(self.model.shapes, round)
        shapes = {name: shape for name, shape in self.model.shapes.items() if name in names}
        message = decode(announcement, shapes=shapes)
        if (message.kind, message.study, message.round) != ("adapter", self.digest, round):
            raise ProtocolError("announcement is of another study or round: nothing was done")
        self.model.load({**self.adapter, **message.tensors})
        return message

    def skip_to(self, round: int) -> None:
        """Take rounds before ``round`` as answered: the coordinator has stored their result."""
        self._last_round = max(self._last_round, round - 1)
