"""A site's side of a study: an announced adapter comes in, a sealed update goes out."""

from dataclasses import dataclass

from huizhen.client.examples import Examples
from huizhen.client.outbox import Envelope, send
from huizhen.client.training import TrainingReport, train_round, units
from huizhen.learning.model import AdaptedModel
from huizhen.protocol.accounting import calibrate, epsilon
from huizhen.protocol.adapter import Tensors, difference
from huizhen.protocol.errors import PrivacyError, ProtocolError, WireError
from huizhen.protocol.study import Study
from huizhen.protocol.wire import decode
from huizhen.strategies.base import Strategy
from huizhen.strategies.catalogue import make_strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanism:
    """The noise a study asks of each site, fixed before the first round."""

    noise_multiplier: float
    sampling_rate: float
    steps_per_round: int
    delta: float

    @classmethod
    def of(cls, study: Study) -> "Mechanism":
        """Return the mechanism that spends the study's ε if every round is run."""
        terms = study.privacy
        steps = study.rounds.count * study.rounds.local_steps
        sigma = calibrate(terms.epsilon, terms.delta, terms.sampling_rate, steps)
        return cls(
            noise_multiplier=sigma,
            sampling_rate=terms.sampling_rate,
            steps_per_round=study.rounds.local_steps,
            delta=terms.delta,
        )

    def epsilon_after(self, rounds: int) -> float:
        """Return the ε that so many rounds spend."""
        if rounds == 0:
            return 0.0
        steps = rounds * self.steps_per_round
        return epsilon(self.noise_multiplier, self.sampling_rate, steps, self.delta)


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


class Site:
    """One hospital in one study. The model may be shared: each round loads what it needs."""

    def __init__(
        self, name: str, study: Study, examples: Examples, model: AdaptedModel, first: Tensors
    ) -> None:
        """Take part in a study.

        Raises:
            ProtocolError: the study does not list this site.
            PrivacyError: δ is not below one over the number of patients, or one step would need
                more noise than can be had.
        """
        if name not in study.sites:
            raise ProtocolError(f"site {name!r} is not in the study {study.study.name!r}")
        self.name, self.study, self.examples, self.model = name, study, examples, model
        self.digest = study.digest()
        self.strategy: Strategy = make_strategy(study)
        self.adapter: Tensors = self.strategy.init(first).x
        self.mechanism: Mechanism | None = None
        if study.is_private:
            check_delta(name, study, examples)
            self.mechanism = Mechanism.of(study)
        self._last_round = 0

    def answer(self, announcement: bytes, round: int) -> tuple[Envelope, TrainingReport]:
        """Return the sealed update for an announced adapter, and a report for the site's own eyes.

        Raises:
            ProtocolError: the announcement is of another study or round, or not what it must be.
            PrivacyError: the round has been answered before, or is past the study's last.
        """
        if round <= self._last_round or round > self.study.rounds.count:
            raise PrivacyError(
                f"round {round} is asked, the last answered is {self._last_round} of "
                f"{self.study.rounds.count}: each round is paid for once"
            )
        names = self.strategy.trains(self.model.shapes, round)
        shapes = {name: shape for name, shape in self.model.shapes.items() if name in names}
        message = decode(announcement, shapes=shapes)
        if (message.kind, message.study, message.round) != ("adapter", self.digest, round):
            raise ProtocolError("announcement is of another study or round: nothing was trained")
        self.model.load({**self.adapter, **message.tensors})
        report = train_round(
            self.model,
            self.examples,
            self.study,
            site=self.name,
            round=round,
            names=names,
            noise_multiplier=self.mechanism.noise_multiplier if self.mechanism else None,
        )
        update = difference(self.model.read(names), message.tensors)
        try:
            envelope = send(
                study=self.digest, round=round, site=self.name, update=update, agreed=names
            )
        except WireError as error:
            raise ProtocolError(
                f"site {self.name!r}, round {round}: {error}: nothing was sent, "
                "lower the learning rate"
            ) from error
        self._last_round = round
        return envelope, report

    def skip_to(self, round: int) -> None:
        """Take rounds before ``round`` as answered: the coordinator has stored their result."""
        self._last_round = max(self._last_round, round - 1)
