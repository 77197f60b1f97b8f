"""What an audit's numbers say of the claim, and what would make them say more."""

from dataclasses import replace
from typing import Final

from huizhen.protocol.accounting import Spend, epsilon
from huizhen.simulations.audit import Bound, Claim
from huizhen.simulations.one_run import REACH

REFUTED: Final = "refuted"
LEVEL: Final = 1e-6  # right draws, and right noise, fail so rarely at most
_MOST_CANARIES = 1 << 14  # that are ever advised

MEANING: Final = (
    "Not refuted is not proved: the bound lies under the true epsilon, and only errors that lift "
    "it over the claim are found. Refuted means that the claim is false: a true one is refuted by "
    "chance about five times in a hundred at most."
)


def spent_by(sigma: float, sampling_rate: float, steps: int, delta: float) -> float:
    """Return the ε that so many private steps spend, without a cap on the batch."""
    spend = Spend(noise_multiplier=sigma, sampling_rate=sampling_rate, steps=steps)
    return epsilon([spend], delta)


def reasons_against(
    claim: Claim, bound: Bound, *, moved: float, draws: float, noise: float
) -> list[str]:
    """Return why the claim is false; empty if nothing speaks against it.

    Args:
        claim: of the steps.
        bound: what the canaries show.
        moved: the most that leaving out one patient moved the clipped sum, in units of C.
        draws: p-value of the draws.
        noise: p-value of the noise.
    """
    reasons = []
    if bound.epsilon_lower > claim.epsilon:
        reasons.append(
            f"the canaries show epsilon {bound.epsilon_lower:.2f} or more, "
            f"the claim is {claim.epsilon:.2f}"
        )
    if not moved <= 1:
        reasons.append(f"leaving out one patient moved the clipped sum by {moved:.3f} C, over C")
    if not draws >= LEVEL:
        reasons.append(
            "the patients of the steps were not drawn by Poisson sampling with rate "
            f"{claim.sampling_rate:g} (p = {draws:.1e})"
        )
    if not noise >= LEVEL:
        reasons.append(
            f"what was released varies less than noise of {claim.noise_multiplier:g} C would let "
            f"it (p = {noise:.1e})"
        )
    return reasons


def advice(claim: Claim, canaries: int, most: int) -> str | None:
    """Return what would bring a claim within reach that so many canaries cannot refute.

    Args:
        claim: of the steps.
        canaries: m.
        most: how many canaries there is room for.

    Returns:
        Options of the command; None if nothing does it, as where ε is over ln(0.025 / δ).
    """

    def in_reach(terms: Claim, count: int) -> bool:
        return terms.ceiling(count, terms.guesses(count)) > REACH * terms.epsilon

    options = []
    more, most = canaries, min(most, _MOST_CANARIES)
    while more < most and not in_reach(claim, more):
        more = min(2 * more, most)
    if in_reach(claim, more):
        options.append(f"--canaries {more}")
    fewer = claim
    while fewer.steps > 1 and not in_reach(fewer, canaries):
        steps = fewer.steps // 2
        spent = spent_by(claim.noise_multiplier, claim.sampling_rate, steps, claim.delta)
        fewer = replace(fewer, steps=steps, epsilon=spent)
    if in_reach(fewer, canaries):
        options.append(f"--steps {fewer.steps}, which claim {fewer.epsilon:.2f}")
    return " or ".join(options) or None
