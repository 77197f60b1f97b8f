"""A lower bound on ε from one run: how much better than an (ε, δ)-private run the guesses were.

Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run", Theorem 5.2
(https://arxiv.org/abs/2305.08846). Each of m canaries is in the data with probability 1/2,
independently. An auditor who sees only what the run released says of r canaries whether they were
in, of the others nothing, and is right v times. If the run is (ε, δ)-private, then with
q = e^ε / (1 + e^ε), the accuracy of randomised response, and X ~ Binomial(r, q)

    P[v or more right] ≤ P[X ≥ v] + 2mδ · max_{1 ≤ i ≤ v} P[v - i ≤ X < v] / i

The right side is a p-value for "the run is (ε, δ)-private"; the bound is the least ε that it does
not reject. Nothing is assumed of the run; r must not depend on the coins.

    m  canaries        r  guesses        v  right guesses

Many canaries show no more than about ln(0.025 / δ) at 95 %: a run that reveals each patient with
probability δ is (0, δ)-private, and so many right guesses could be its work.
"""

from typing import Final

import numpy as np
from scipy.stats import binom, norm

from huizhen.protocol.errors import ConfigError

CONFIDENCE: Final = 0.95
REACH: Final = 1.25  # an audit is of use if its ceiling is over so many times the claim
_WIDTH = 1e-6  # of the interval in which the bound is known to lie; its lower end is given
_SHARES = (1, 2, 4, 8, 16)  # one guess for so many canaries


def p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Return how likely v or more of r guesses are right if the run is (ε, δ)-private, at most.

    Args:
        m: canaries.
        r: guesses.
        v: right guesses.
        epsilon: ε of the claim.
        delta: δ of the claim.

    Raises:
        ConfigError: not 0 ≤ v ≤ r ≤ m, or ε or δ is no privacy parameter.
    """
    if not 0 <= v <= r <= m:
        raise ConfigError(
            f"{v} of {r} guesses on {m} canaries are right, expected 0 <= right <= guesses <= "
            "canaries"
        )
    if not (0 <= epsilon < np.inf and 0 <= delta <= 1):
        raise ConfigError(f"epsilon is {epsilon} and delta {delta}, expected 0 or more and 0 to 1")
    if v == 0:
        return 1.0
    q = 1 / (1 + np.exp(-epsilon))
    i = np.arange(1, v + 1)
    below = np.cumsum(binom.pmf(v - i, r, q))
    return float(min(1.0, binom.sf(v - 1, r, q) + 2 * m * delta * (below / i).max()))


def epsilon_lower(m: int, r: int, v: int, delta: float, *, confidence: float = CONFIDENCE) -> float:
    """Return the ε that the run exceeds, or equals, with the given confidence; 0 if none.

    If the run is (ε, δ)-private, the result is over ε with probability 1 - ``confidence`` at most.

    Raises:
        ConfigError: as ``p_value``, or the confidence is not between 0.5 and 1.
    """
    if not 0.5 <= confidence < 1:
        raise ConfigError(f"confidence is {confidence}, expected at least 0.5 and under 1")
    level = 1 - confidence
    if p_value(m, r, v, 0.0, delta) >= level:
        return 0.0
    # Where the p-value is under 1/2 it grows with ε, so it crosses the level once: for
    # c = 2mδ/i the term (1 - c) P[X ≥ v] + c P[X ≥ v - i] falls only if c > 1 and the binomial's
    # mode is v - i or more, and then P[X ≥ v - i] ≥ 1/2 already.
    low, high = 0.0, 1.0
    while p_value(m, r, v, high, delta) < level:
        low, high = high, 2 * high
    while high - low > _WIDTH:
        middle = (low + high) / 2
        if p_value(m, r, v, middle, delta) < level:
            low = middle
        else:
            high = middle
    return low


def ceiling(
    m: int, r: int, delta: float, *, unseen: float = 0.0, confidence: float = CONFIDENCE
) -> float:
    """Return the most that such an audit can show: the bound of a run that adds no noise at all.

    Args:
        m: canaries.
        r: guesses, half of them "in" and half "out".
        delta: δ of the claim.
        unseen: share of the canaries in the data that no step draws; nothing can tell them from
            those that are not in the data.
        confidence: of the bound.

    Raises:
        ConfigError: as ``epsilon_lower``.
    """
    half, seen = r / 2, m / 2 * (1 - unseen)
    sure = min(half, seen)
    right = sure + ((half - sure) * unseen + half) / (1 + unseen)
    return epsilon_lower(m, r, min(r, round(right)), delta, confidence=confidence)


def planned_guesses(
    m: int, delta: float, *, claim: float, separation: float, unseen: float = 0.0
) -> int:
    """Return how many guesses to make, from public values alone, before anything is seen.

    Of the numbers whose ceiling is well over the claim, the one whose expected bound is highest if
    the claim is true; where none is, the one with the highest ceiling. Always even.

    Args:
        m: canaries, at least 2.
        delta: δ of the claim.
        claim: ε of the claim.
        separation: how far the mean scores of canaries in and out lie apart, in their standard
            deviations.
        unseen: as for ``ceiling``.

    Raises:
        ConfigError: fewer than two canaries.
    """
    if m < 2:
        raise ConfigError(f"{m} canaries, expected at least 2")
    choices = sorted({max(2, m // share // 2 * 2) for share in _SHARES}, reverse=True)
    reach = {r: ceiling(m, r, delta, unseen=unseen) for r in choices}
    useful = [r for r in choices if reach[r] > REACH * claim]
    if not useful:
        return max(choices, key=lambda r: reach[r])
    return max(useful, key=lambda r: epsilon_lower(m, r, _expected_right(m, r, separation), delta))


def _expected_right(m: int, r: int, separation: float) -> int:
    """Return how many of the r most extreme of m normal scores are guessed right on average."""
    share = r / (2 * m)
    low, high = -10.0, 10.0 + separation
    for _ in range(60):
        middle = (low + high) / 2
        upper = (norm.sf(middle) + norm.sf(middle - separation)) / 2
        low, high = (middle, high) if upper > share else (low, middle)
    return int(r * min(1.0, norm.sf(low - separation) / 2 / share))
