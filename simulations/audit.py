"""Does the private step keep its promise? Canaries, neighbouring data, the draws and the noise.

1. Canaries. m patients of our own (``canaries.py``), each in the data by a fair secret coin, go
   through the site's sampling, clipping, noise and division beside the real patients. The auditor
   knows the real patients and sees every noisy gradient that the steps release, scores each canary
   by Σ_t ⟨g̃_t, u_i⟩, says "in" of the highest r/2 and "out" of the lowest; ``one_run.py`` turns
   the right guesses into a bound on ε. Nothing is assumed of the step.
2. Neighbouring data. Leaving out one real patient may move the clipped sum by C at most. Canaries
   do not pass through the model, so a loss that couples patients shows here only.
3. Draws. Who took part in each step is held against Poisson sampling; canaries cannot tell it from
   batches of a fixed size, which promise less (Lebeda et al., https://arxiv.org/abs/2405.20769).
4. Noise. What the steps release must vary from step to step as much as the noise alone would.

Assumed by 1: the coins are fair, independent and unknown to the auditor, and r is fixed before
anything is seen. The adapter stays where it is: optimiser, strategy and rounds only compute from
what was released, so they cannot add to ε; 4 relies on it.

A claim that is refuted is false, but for the stated rate of false alarms. A claim that is *not* is
not proved: the bound lies under the true ε, by much when m or the steps are few, and 2 to 4 find
only the errors they look for. Not seen at all: what leaves by other ways (metrics, times, errors),
low-order bits of floats, a random generator that can be guessed, terms of the study that were
chosen by looking at the data, and coupling among patients other than those of 2.

The audit is itself a run on these patients: its results stay where the records are.

    m canaries    r guesses    q sampling_rate    T steps    σ noise_multiplier    C max_grad_norm
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, binomtest, chi2
from torch import Tensor

from huizhen.client.dp_sgd import ClipNorm, PatientGradients, clipped_sum, private_gradient
from huizhen.client.randomness import NoiseSource
from huizhen.protocol.errors import ConfigError, PrivacyError
from huizhen.simulations.canaries import Canaries, Indices, WithCanaries
from huizhen.simulations.one_run import (
    CONFIDENCE,
    ceiling,
    epsilon_lower,
    p_value,
    planned_guesses,
)

_COMPARED = 12  # patients that the neighbouring-data check adds up, besides those it leaves out


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What is promised of a number of private steps, and the terms that the promise rests on."""

    epsilon: float
    delta: float
    noise_multiplier: float
    sampling_rate: float
    steps: int
    max_grad_norm: ClipNorm
    denominator: float
    # q · patients_public

    @property
    def clip(self) -> float:
        """C, which is 1 under AUTO-S."""
        return 1.0 if self.max_grad_norm == "auto" else self.max_grad_norm

    @property
    def separation(self) -> float:
        """The distance of the mean scores of canaries in and out, in their standard deviations."""
        q = self.sampling_rate
        return q * math.sqrt(self.steps / (self.noise_multiplier**2 + q * (1 - q)))

    @property
    def unseen(self) -> float:
        """The share of the canaries in the data that no step draws."""
        return (1 - self.sampling_rate) ** self.steps

    def guesses(self, canaries: int) -> int:
        """Return how many guesses to make of so many canaries; nothing has been seen yet."""
        return planned_guesses(
            canaries,
            self.delta,
            claim=self.epsilon,
            separation=self.separation,
            unseen=self.unseen,
        )

    def ceiling(self, canaries: int, guesses: int, confidence: float = CONFIDENCE) -> float:
        """Return the most that such an audit can show: the bound if there were no noise."""
        return ceiling(canaries, guesses, self.delta, unseen=self.unseen, confidence=confidence)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """What the steps released about each canary, and the secrets that the guesses are held to."""

    scores: NDArray[np.float64]
    # (m,) sums over the steps, in units of C: about qT for a canary that was in, 0 for the others
    spread: float
    # Σ_i Σ_t (x_it - mean_t x_it)² of the steps' scores x, in units of C²
    included: NDArray[np.bool_]
    # (m,)
    sizes: tuple[int, ...]
    # (T,) patients and canaries of each step
    counts: tuple[int, ...]
    # steps of each patient and canary in the data


def transcribe(
    source: PatientGradients,
    canaries: Canaries,
    claim: Claim,
    watch: Callable[[int], None] = lambda done: None,
) -> Transcript:
    """Run the private steps on a site's patients and canaries.

    The auditor knows the real patients, so what they add to the scores on average is taken off.

    Args:
        source: the real patients; may have none.
        canaries: m of them, with the shapes of the trained tensors.
        claim: the terms of the steps.
        watch: is told how many steps are done, 0 after one pass over the real patients.
    """
    # from the operating system: the sampler under audit must not make the coins
    coins = np.unpackbits(np.frombuffer(os.urandom(canaries.count), np.uint8))[: canaries.count]
    everyone = WithCanaries(source, canaries, np.flatnonzero(coins))
    scores, squares = np.zeros(canaries.count), 0.0
    real = np.arange(source.num_patients)
    known, _ = clipped_sum(source, real, canaries.shapes, claim.max_grad_norm)
    expected = canaries.scores(known) * (claim.sampling_rate / claim.clip)
    watch(0)
    size = sum(math.prod(shape) for shape in canaries.shapes.values())
    with NoiseSource(size, claim.steps) as noise:
        for done in range(1, claim.steps + 1):
            released, _ = private_gradient(
                everyone,
                canaries.shapes,
                sampling_rate=claim.sampling_rate,
                max_grad_norm=claim.max_grad_norm,
                noise_multiplier=claim.noise_multiplier,
                denominator=claim.denominator,
                noise=noise,
            )
            own = canaries.scores(released) * (claim.denominator / claim.clip) - expected
            scores += own
            squares += float((own**2).sum())
            watch(done)
    return Transcript(
        scores=scores,
        spread=max(0.0, squares - float((scores**2).sum()) / claim.steps),
        included=coins.astype(np.bool_),
        sizes=tuple(everyone.sizes),
        counts=tuple(everyone.counts.tolist()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What the guesses show."""

    guesses: int
    right: int
    epsilon_lower: float
    ceiling: float
    # the bound if there were no noise at all
    p_value: float
    # of the claim: how likely so many right guesses are, at most, if it is true
    confidence: float


def judge(
    transcript: Transcript, claim: Claim, guesses: int, *, confidence: float = CONFIDENCE
) -> Bound:
    """Return the bound from guessing the highest scores as in and the lowest as out.

    Args:
        transcript: of the steps.
        claim: of the steps.
        guesses: r, fixed before the transcript was seen (``Claim.guesses``).
        confidence: of the bound; 1 - confidence is the most that a true claim can fail with.

    Raises:
        ConfigError: ``guesses`` is odd, or over the number of canaries.
    """
    m = len(transcript.scores)
    if guesses % 2 or not 0 <= guesses <= m:
        raise ConfigError(f"{guesses} guesses, expected an even number up to {m}")
    order = np.argsort(transcript.scores, kind="stable")
    said_out, said_in = order[: guesses // 2], order[m - guesses // 2 :]
    right = int(transcript.included[said_in].sum() + (~transcript.included[said_out]).sum())
    return Bound(
        guesses=guesses,
        right=right,
        epsilon_lower=epsilon_lower(m, guesses, right, claim.delta, confidence=confidence),
        ceiling=claim.ceiling(m, guesses, confidence),
        p_value=p_value(m, guesses, right, claim.epsilon, claim.delta),
        confidence=confidence,
    )


def draws_p_value(transcript: Transcript, sampling_rate: float) -> float:
    """Return how likely such draws are, at most, if each patient is drawn with q on its own.

    Three exact tests, their least p-value times three: the number of draws in all is
    Binomial(nT, q); all steps have one size with probability Σ_k P[Binomial(n, q) = k]^T; all
    patients take part in as many steps with probability Σ_k P[Binomial(T, q) = k]^n. Batches of a
    fixed size and passes over a shuffled list fail the second or the third.
    """
    n, steps, q = len(transcript.counts), len(transcript.sizes), sampling_rate
    found = [float(binomtest(sum(transcript.sizes), n * steps, q).pvalue)] if n else [1.0]
    for values, trials in ((transcript.sizes, n), (transcript.counts, steps)):
        if len(set(values)) == 1:
            shares = binom.pmf(np.arange(trials + 1), trials, q)
            found.append(float((shares ** len(values)).sum()))
    return min(1.0, 3 * min(found))


def noise_p_value(transcript: Transcript, claim: Claim) -> float:
    """Return how likely so little variation is, at most, if the noise is what is claimed.

    The noise alone gives a spread of σ² χ² with m(T - 1) degrees of freedom, the directions being
    orthogonal; patients who come and go can only add to it, as they do not depend on the noise.
    """
    freedom = len(transcript.scores) * (claim.steps - 1)
    if freedom == 0:
        return 1.0
    return float(chi2.cdf(transcript.spread / claim.noise_multiplier**2, freedom))


def neighbours(patients: Sequence[Indices], lengths: Sequence[int]) -> tuple[Indices, list[int]]:
    """Return patients to compare, and those of them to leave out: the odd ones first.

    The longest and the shortest record, the most records: where patients are coupled, these move
    the others most.
    """
    longest = np.asarray([max(lengths[row] for row in rows) for rows in patients])
    by_length = np.argsort(longest, kind="stable").tolist()
    by_records = np.argsort([len(rows) for rows in patients], kind="stable").tolist()
    middle = by_length[len(by_length) // 2]
    left_out = list(dict.fromkeys([by_length[-1], by_length[0], by_records[-1], middle]))
    spread = [by_length[i] for i in np.linspace(0, len(by_length) - 1, _COMPARED).astype(int)]
    compared = np.asarray(sorted({*left_out, *spread}), dtype=np.intp)
    return compared, left_out


def sensitivity(
    source: PatientGradients,
    shapes: Mapping[str, tuple[int, ...]],
    max_grad_norm: ClipNorm,
    patients: Indices,
    left_out: Sequence[int],
) -> list[float]:
    """Return how far leaving out each patient moves the clipped sum, in units of C.

    Over 1, the noise is too small for the claim.

    Args:
        source: patients whose gradients do not change from call to call: every patient's records
            must all be used.
        shapes: of the trained tensors, by name.
        max_grad_norm: C, or "auto".
        patients: the data of the comparison; must hold all of ``left_out``.
        left_out: the patients that leave, one at a time.

    Raises:
        PrivacyError: the same patients give two different sums, so that nothing can be compared.
    """
    clip = 1.0 if max_grad_norm == "auto" else max_grad_norm
    whole, _ = clipped_sum(source, patients, shapes, max_grad_norm)
    again, _ = clipped_sum(source, patients, shapes, max_grad_norm)
    if not _distance(whole, again) <= 1e-6 * clip:
        raise PrivacyError(
            "the same patients give two different clipped sums, expected one: "
            "let each patient's gradient use all their records"
        )
    moved = []
    for patient in left_out:
        others, _ = clipped_sum(source, patients[patients != patient], shapes, max_grad_norm)
        moved.append(_distance(whole, others) / clip)
    return moved


def _distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float((first[n] - second[n]).square().sum()) for n in first))
