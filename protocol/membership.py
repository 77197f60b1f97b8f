"""What a privacy guarantee leaves to the best attacker who asks whether one patient took part.

The attacker sees everything that left the hospital, and knows all other patients and every record
of the one in question. They call the patient in or out; of patients who were out they call the
share α in. What share of those who were in can they then recognise?

    TPR <= min( δ + e^ε·α,  1 - e^-ε·(1 - δ - α) )

(Wasserman and Zhou 2010, Theorem 2.4; Kairouz, Oh and Viswanath 2015, Theorem 2.1). That is all
that one pair (ε, δ) says, of whatever mechanism. A given mechanism has an ε for every δ; the least
of the bounds of several pairs holds too, and is near the exact trade-off of that mechanism (Dong,
Roth and Su 2022, Proposition 2.12).

    α  false positive rate                     TPR  true positive rate
"""

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from huizhen.protocol.accounting import Spend, epsilon
from huizhen.protocol.errors import PrivacyError

FALSE_POSITIVE_RATES = (
    0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9,
    1.0,
)  # fmt: skip
_DELTAS = (
    1e-4, 1e-3, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45,
    0.5, 0.6, 0.7, 0.8, 0.9,
)  # fmt: skip
# beside the study's own: where the bounds at the rates above are the tightest


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackBound:
    """The most that an attacker recognises at one false positive rate."""

    false_positive_rate: float
    by_epsilon: float
    # true positive rate that (ε, δ) alone allows any mechanism
    by_mechanism: float
    # that this mechanism allows

    def __post_init__(self) -> None:
        guess, some, any_ = self.false_positive_rate, self.by_mechanism, self.by_epsilon
        if not 0 <= guess <= some <= any_ <= 1:
            raise ValueError(
                f"rates are {guess}, {some} and {any_}, expected 0 to 1 and none below the last"
            )


def true_positive_bound(false_positive_rate: float, pairs: Iterable[tuple[float, float]]) -> float:
    """Return the highest true positive rate that every pair (ε, δ) allows; at least the rate.

    Args:
        false_positive_rate: α, 0 to 1.
        pairs: guarantees that all hold for the same release.
    """
    alpha, bound = false_positive_rate, 1.0
    for spent, delta in pairs:
        often = delta + math.exp(min(spent, 700.0)) * alpha
        seldom = 1 - math.exp(-spent) * (1 - delta - alpha)
        bound = min(bound, often, seldom)
    return max(alpha, bound)


def attack_bounds(spends: Sequence[Spend], delta: float) -> tuple[AttackBound, ...]:
    """Return the bounds at ``FALSE_POSITIVE_RATES`` for all that the spends release together.

    Args:
        spends: what was spent on the patient.
        delta: the δ at which its ε is stated.

    Raises:
        PrivacyError: the ε at ``delta`` cannot be certified.
    """
    own = (epsilon(spends, delta), delta)
    pairs = [own]
    for other in _DELTAS:
        with contextlib.suppress(PrivacyError):  # a pair less is a looser bound, not a wrong one
            pairs.append((epsilon(spends, other), other))
    return tuple(
        AttackBound(
            false_positive_rate=alpha,
            by_epsilon=true_positive_bound(alpha, [own]),
            by_mechanism=true_positive_bound(alpha, pairs),
        )
        for alpha in FALSE_POSITIVE_RATES
    )
