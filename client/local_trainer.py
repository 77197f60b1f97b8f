"""Training in this very process: for simulations, and inside the worker of a hospital."""

from huizhen.client.examples import Examples
from huizhen.client.metrics_release import check_held_out, held_out_outcomes, release_metrics
from huizhen.client.model_checks import check_model
from huizhen.client.trainer import (
    DEFAULT_MEMORY_MIB,
    Trained,
    TrainerFacts,
    read_announcement,
)
from huizhen.client.training import Protection, train_round, units
from huizhen.learning.trainable import Model
from huizhen.protocol.adapter import Array, Shapes, Tensors, difference, shapes_of
from huizhen.protocol.errors import PrivacyError, ProtocolError, WireError
from huizhen.protocol.mechanism import Mechanism
from huizhen.protocol.study import Study
from huizhen.protocol.wire import max_bytes
from huizhen.strategies.base import Strategy
from huizhen.strategies.catalogue import make_strategy
from huizhen.strategies.ranks import cut


class LocalTrainer:
    """One site's examples and a model, which may be shared: each round loads what it needs."""

    def __init__(
        self,
        name: str,
        study: Study,
        examples: Examples,
        model: Model,
        first: Tensors,
        *,
        held_out: Examples | None = None,
        memory_mib: int = DEFAULT_MEMORY_MIB,
    ) -> None:
        """Check that the study can be trained on these records.

        Args:
            name: the site's name in the study.
            study: what was agreed.
            examples: the site's records.
            model: may be shared with other sites.
            first: the study's first adapter.
            held_out: records that are not trained on, for the metrics that the study lets out.
            memory_mib: bound on what a private step holds at a time, in MiB.

        Raises:
            PrivacyError: the model cannot be trained privately, or a patient is both trained on and
                held out while metrics leave.
            ConfigError: the longest record alone does not fit in the memory, or no amount of noise
                suffices.
        """
        self.name, self.study, self.examples, self.model = name, study, examples, model
        self._strategy: Strategy = make_strategy(study)
        self._adapter: Tensors = self._strategy.init(first).x
        self._held_out: Examples | None = None
        self._protection: Protection | None = None
        if study.is_private:
            if held_out is not None and study.privacy.metrics_epsilon is not None:
                check_held_out(held_out.patients, examples.patients)
                self._held_out = held_out
            model.load(cut(self._adapter, model.shapes))
            memory = check_model(model, examples, memory_mib)
            self._protection = Protection(Mechanism.of(study).noise_multiplier, memory)
        self._facts = TrainerFacts(
            site=name,
            study=study.digest(),
            shapes=model.shapes,
            study_shapes=model.study_shapes,
            num_units=len(units(examples, study)),
            has_held_out=self._held_out is not None,
        )

    @property
    def max_command_bytes(self) -> int:
        """The most that an announcement of this study, which grows, and what is kept can have."""
        last, shapes = self.study.rounds.count, self.model.study_shapes
        announced = (self._strategy.announces(shapes, round) for round in (last, last + 1))
        kept = max_bytes(self.kept_shapes) if self.kept_shapes else 0
        return max(max_bytes(one) for one in announced) + kept

    @property
    def kept_shapes(self) -> Shapes:
        """The tensors that the strategy has a site keep between two rounds."""
        return self._strategy.keeps(self.model.shapes)

    def ready(self) -> TrainerFacts:
        """Return the facts."""
        return self._facts

    def train(self, announcement: bytes, round: int, kept: Tensors) -> Trained:
        """Return the update Δ of a round, what to keep, and a report for the site's own eyes.

        Raises:
            ProtocolError: the announcement is of another study or round, or not what it must be, or
                other tensors were kept than the strategy keeps.
        """
        strategy = self._strategy
        if kept and shapes_of(kept) != dict(self.kept_shapes):
            raise ProtocolError("what was kept is of another adapter: nothing was trained")
        before, told = self._load(announcement, round, kept)
        correction = strategy.correction(told, kept)
        gradients: dict[str, Array] = {}
        names = strategy.trains(self.model.shapes, round)
        report = train_round(
            self.model,
            self.examples,
            self.study,
            site=self.name,
            round=round,
            names=names,
            protection=self._protection,
            correction=correction,
            gradients=gradients if strategy.sends_gradients else None,
        )
        trained = self.model.read(names)
        if strategy.sends_gradients:
            update = strategy.update_of(gradients, round)
        else:
            update = difference(trained, before)
        sent = strategy.sends(self.model.shapes, round)
        update = {name: delta for name, delta in update.items() if name in sent}
        return Trained(update, self._kept_after(update, trained, round), report)

    def _kept_after(self, update: Tensors, trained: Tensors, round: int) -> Tensors:
        """Return what to keep of a round: of the update as the coordinator reads it."""
        if not self.kept_shapes:
            return {}
        travel = self.study.travel(round)
        if self.study.is_private:  # as the outbox does it
            update = travel.cut(update)
        try:
            arrives = travel.arrived(update, self.name)
        except WireError:  # it will not leave either
            return {}
        return self._strategy.kept_after(arrives, trained, round)

    def metrics(self, announcement: bytes) -> bytes:
        """Return noised metrics of the final adapter, drawn anew by each call.

        Raises:
            ProtocolError: as ``train``.
            PrivacyError: there is nothing to measure on, or no metrics may leave.
        """
        if self._held_out is None:
            raise PrivacyError(
                f"site {self.name!r} has no held-out patients in a private study: it has no "
                "metrics to let out"
            )
        self._load(announcement, self.study.rounds.count + 1, {})
        return release_metrics(
            self.study,
            site=self.name,
            round=self.study.rounds.count,
            outcomes=held_out_outcomes(self.model, self._held_out),
            training_patients=set(self.examples.patients),
        ).canonical()

    def _load(self, announcement: bytes, round: int, kept: Tensors) -> tuple[Tensors, Tensors]:
        """Put an announced adapter into the model, with what of it is this site's own.

        Returns:
            What the model holds now, and all that was announced.
        """
        message = read_announcement(
            announcement,
            round,
            study=self.study,
            strategy=self._strategy,
            shapes=self.model.study_shapes,
        )
        whole = self._strategy.whole(self._adapter, message.tensors, round)
        own = cut(whole, self.model.shapes)
        own |= {name: value for name, value in kept.items() if name in own}
        self.model.load(own)
        return own, message.tensors
