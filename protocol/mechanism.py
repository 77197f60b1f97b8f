"""The mechanism that a study asks of each site: the noise, the same for all, fixed by the study."""

import math
from dataclasses import dataclass
from typing import Self

from huizhen.protocol.accounting import Spend, calibrate, epsilon
from huizhen.protocol.study import Study

_ROUNDING = 1.06  # a size rounded to two digits may stand for up to 5 % more


@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanism:
    """What one round spends at a site, and the δ at which it is counted."""

    per_round: Spend
    delta: float

    @classmethod
    def of(cls, study: Study) -> Self:
        """Return the mechanism that spends the study's ε if every round is run.

        σ is calibrated for the most rounds and, under a batch cap, for the largest site.

        Raises:
            ConfigError: no amount of noise suffices.
            PrivacyError: the configuration cannot be certified.
        """
        terms, steps = study.privacy, study.rounds.local_steps
        bound = None
        if terms.batch_cap is not None:
            bound = max(patients_bound(site.patients_public) for site in study.sites.values())
        sigma = calibrate(
            terms.epsilon,
            terms.delta,
            terms.sampling_rate,
            study.rounds.count * steps,
            batch_cap=terms.batch_cap,
            patients_bound=bound,
        )
        spend = Spend(
            noise_multiplier=sigma,
            sampling_rate=terms.sampling_rate,
            steps=steps,
            batch_cap=terms.batch_cap,
            patients_bound=bound,
        )
        return cls(per_round=spend, delta=terms.delta)

    @property
    def noise_multiplier(self) -> float:
        """The σ of every step."""
        return self.per_round.noise_multiplier

    @property
    def sampling_rate(self) -> float:
        """The q of every step."""
        return self.per_round.sampling_rate

    @property
    def steps_per_round(self) -> int:
        """Steps of one round."""
        return self.per_round.steps

    def epsilon_after(self, rounds: int) -> float:
        """Return the ε that so many rounds spend."""
        return epsilon([self.per_round.times(rounds)], self.delta) if rounds else 0.0


def patients_bound(patients_public: int) -> int:
    """Return how many patients a site of a public, rounded size has at most."""
    return math.ceil(patients_public * _ROUNDING)
