"""The audit finds what is broken, each time by its own check, and leaves the true step alone.

Wrong alarms: every check here is held to a level of 1e-6. For the canaries that level is Steinke et
al.'s theorem (confidence 1 - 1e-6), for draws and noise an exact p-value, for neighbouring data no
chance is involved. A sabotage replaces one piece of the step and touches nothing of the audit.
"""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from huizhen.client import dp_sgd, randomness
from huizhen.client.dp_sgd import PatientBatch
from huizhen.client.model_checks import check_model
from huizhen.client.patient_gradients import ModelGradients
from huizhen.client.per_record import per_record_gradients
from huizhen.protocol.accounting import Spend, calibrate, epsilon
from huizhen.protocol.errors import ConfigError, PrivacyError
from huizhen.simulations import audit
from huizhen.simulations.audit import (
    Claim,
    draws_p_value,
    judge,
    neighbours,
    noise_p_value,
    sensitivity,
    transcribe,
)
from huizhen.simulations.canaries import CANARY_NORM, Canaries
from huizhen.simulations.one_run import epsilon_lower, p_value

LEVEL = 1e-6
SHAPES = {"a": (40, 30), "b": (7, 13, 9), "head": (5,)}
CANARIES = 1024


class Hospital:
    """Real patients whose gradients lie, with chance, around a common direction."""

    def __init__(self, patients, size=1.5):
        generator = np.random.default_rng(5)
        self.rows = {}
        for name, shape in SHAPES.items():
            common = generator.standard_normal(shape)
            own = generator.standard_normal((patients, *shape))
            rows = size * (common + own) / np.sqrt(sum(map(np.prod, SHAPES.values())))
            self.rows[name] = torch.from_numpy(rows.astype(np.float32))
        self.num_patients = patients

    def microbatches(self, chosen):
        for part in np.array_split(chosen, 3):
            if len(part):
                yield PatientBatch({n: g[part] for n, g in self.rows.items()}, [1.0] * len(part))


def make_claim(target, *, steps=20, sampling_rate=0.5, max_grad_norm=0.7):
    delta = 1e-9  # the p-value of the canaries never falls below about 2δ (1 + e^ε)
    sigma = calibrate(target, delta, sampling_rate, steps)
    spend = Spend(noise_multiplier=sigma, sampling_rate=sampling_rate, steps=steps)
    return Claim(
        epsilon=epsilon([spend], delta),
        delta=delta,
        noise_multiplier=sigma,
        sampling_rate=sampling_rate,
        steps=steps,
        max_grad_norm=max_grad_norm,
        denominator=sampling_rate * 60,
    )


def run(claim, patients=50, count=CANARIES):
    planted = Canaries(count, SHAPES, claim.clip)
    return transcribe(Hospital(patients), planted, claim)


def is_alarm(transcript, claim):
    guesses = claim.guesses(len(transcript.scores))
    bound = judge(transcript, claim, guesses, confidence=1 - LEVEL)
    assert (bound.epsilon_lower > claim.epsilon) == (bound.p_value < LEVEL)
    return bound.epsilon_lower > claim.epsilon


@pytest.fixture(scope="module")
def one():
    return make_claim(1.0)


@pytest.fixture
def no_noise(monkeypatch):
    monkeypatch.setattr(randomness, "normals", np.zeros)


@pytest.mark.parametrize("max_grad_norm", [0.7, "auto"])
@pytest.mark.parametrize("target", [1.0, 3.0])
def test_the_true_step_is_not_refuted(target, max_grad_norm):
    claim = make_claim(target, max_grad_norm=max_grad_norm)
    transcript = run(claim)
    assert not is_alarm(transcript, claim)
    assert draws_p_value(transcript, claim.sampling_rate) >= LEVEL
    assert noise_p_value(transcript, claim) >= LEVEL


def test_the_bound_of_the_true_step_is_no_empty_one():
    """At ε = 3 the planned guesses are right often enough to show something, 95 times of 100."""
    claim = make_claim(3.0)
    transcript = run(claim)
    assert not is_alarm(transcript, claim)
    # The in and out scores are normal but for the draws, whose variance is at most qT.
    inside, outside = (
        transcript.scores[transcript.included],
        transcript.scores[~transcript.included],
    )
    gap = inside.mean() - outside.mean()
    variance = claim.steps * (claim.noise_multiplier**2 + 1) * (1 / len(inside) + 1 / len(outside))
    expected = 0.999 * claim.sampling_rate * claim.steps  # the margin below C
    assert abs(gap - expected) < norm.isf(LEVEL / 2) * np.sqrt(variance)
    assert gap > 0


@pytest.mark.parametrize("max_grad_norm", [0.7, "auto"])
def test_without_noise_each_canary_scores_the_steps_that_drew_it(no_noise, max_grad_norm):
    claim = make_claim(1.0, max_grad_norm=max_grad_norm)
    transcript = run(claim, patients=0, count=200)
    expected = np.zeros(200)
    expected[transcript.included] = transcript.counts
    margin = 0.999 if max_grad_norm == 0.7 else 0.999 * CANARY_NORM / (CANARY_NORM + 0.01)
    assert transcript.scores == pytest.approx(margin * expected, abs=1e-4)
    assert sum(transcript.sizes) == sum(transcript.counts)
    assert 50 < transcript.included.sum() < 150  # a fair coin stays inside but once in 10¹²


def test_the_real_patients_are_in_the_steps_and_taken_off_the_scores(no_noise, one):
    few, many = run(one, patients=0), run(one, patients=400)
    assert len(many.counts) - many.included.sum() == 400
    gaps = []
    for transcript in (few, many):
        outside = transcript.scores[~transcript.included]
        gaps.append(np.abs(outside).max())
    assert gaps[0] < 1e-4
    # 400 patients of norm C along one direction add 4000 C in 20 steps, up to 400 C to a canary
    assert 0.01 < gaps[1] < 10


# Sabotages. The first four lift the bound over the claim.


def test_a_step_without_noise_is_refuted(no_noise, one):
    transcript = run(one)
    assert is_alarm(transcript, one)
    assert noise_p_value(transcript, one) < LEVEL


def test_a_step_that_does_not_clip_is_refuted(monkeypatch, one):
    monkeypatch.setattr(
        dp_sgd, "clip_factors", lambda gradients, _: torch.ones(len(gradients["head"]))
    )
    assert is_alarm(run(one), one)


def test_records_clipped_one_by_one_and_sold_as_patients_are_refuted(one):
    """A patient of 16 records then contributes up to 16 C: 2.8 deviations between the scores.

    About 508 of the 512 planned guesses are then right, 421 are enough.
    """

    class OneRowPerRecord(Canaries):
        def batches(self, which):
            for batch in super().batches(which):
                rows = {n: g.repeat_interleave(16, dim=0) for n, g in batch.gradients.items()}
                yield PatientBatch(rows, batch.losses)

    transcript = transcribe(Hospital(50), OneRowPerRecord(CANARIES, SHAPES, one.clip), one)
    assert is_alarm(transcript, one)


def test_noise_that_is_divided_twice_is_refuted(monkeypatch, one):
    true = randomness.normals
    monkeypatch.setattr(randomness, "normals", lambda count: true(count) / one.denominator)
    transcript = run(one)
    assert is_alarm(transcript, one)
    assert noise_p_value(transcript, one) < LEVEL


# These are too small, or of another kind, for canaries; another check finds each.


def test_noise_that_is_a_tenth_too_small_is_found(monkeypatch, one):
    true = randomness.normals
    monkeypatch.setattr(randomness, "normals", lambda count: 0.9 * true(count))
    transcript = run(one)
    assert not is_alarm(transcript, one)
    assert noise_p_value(transcript, one) < LEVEL


def test_noise_that_is_the_same_in_every_step_is_found(monkeypatch, one):
    replayed: dict[int, np.ndarray] = {}
    true = randomness.normals
    monkeypatch.setattr(
        randomness, "normals", lambda count: replayed.setdefault(count, true(count))
    )
    assert noise_p_value(run(one), one) < LEVEL


def fixed_size(count, rate):
    return randomness.choose(count, round(rate * count))


class Shuffled:
    """Passes over a shuffled list, batch after batch."""

    def __init__(self):
        self.left = np.empty(0, np.intp)

    def __call__(self, count, rate):
        batch = round(rate * count)
        if len(self.left) < batch:
            self.left = np.concatenate([self.left, randomness.choose(count, count)])
        drawn, self.left = self.left[:batch], self.left[batch:]
        return np.unique(drawn)


@pytest.mark.parametrize("sampler", [fixed_size, Shuffled()], ids=["fixed size", "shuffled"])
def test_batches_that_are_no_poisson_samples_are_found(monkeypatch, one, sampler):
    monkeypatch.setattr(dp_sgd, "poisson_sample", sampler)
    transcript = run(one)
    assert draws_p_value(transcript, one.sampling_rate) < LEVEL


def test_a_sampling_rate_over_the_claimed_one_is_found(monkeypatch, one):
    monkeypatch.setattr(
        dp_sgd, "poisson_sample", lambda count, rate: randomness.poisson_sample(count, 1.1 * rate)
    )
    transcript = run(one)
    assert not is_alarm(transcript, one)
    assert draws_p_value(transcript, one.sampling_rate) < LEVEL


def test_where_everyone_takes_part_equal_batches_are_no_alarm():
    claim = make_claim(3.0, sampling_rate=1.0, steps=4)
    transcript = run(claim)
    assert len(set(transcript.sizes)) == 1
    assert draws_p_value(transcript, 1.0) == 1.0


def test_one_step_says_nothing_of_the_noise_and_fails_nobody():
    claim = make_claim(1.0, steps=1)
    assert noise_p_value(run(claim), claim) == 1.0


# Neighbouring data, on real gradients of real records.

SHORT = [
    (f"p{i}", f"{symptom} since {i}", "flu") for i, symptom in enumerate(["rash", "cough"] * 6)
]
LONG = ("long", "fever", "measles and an infection of the lungs")


@pytest.fixture
def ward(tiny_assistant, make_site, randomised):
    """A model with twelve patients whose answers are short and one whose answer is long."""
    randomised(tiny_assistant, scale=0.1)
    examples = make_site(tiny_assistant, [*SHORT, LONG])
    memory = check_model(tiny_assistant, examples, 512)
    parameters = tiny_assistant.train_only(frozenset(tiny_assistant.shapes))
    with per_record_gradients(tiny_assistant.module, parameters) as recorder:

        def source(patients=None, most=99, kind=ModelGradients):
            return kind(
                tiny_assistant,
                parameters,
                examples,
                patients or examples.records_of(),
                recorder,
                records_per_patient=most,
                memory=memory,
            )

        yield source
    tiny_assistant.train_only(frozenset())


def couple(monkeypatch, model):
    """Let every record's loss be its sum over the *mean* number of answer tokens in the batch."""
    true = model.losses

    def losses(batch):
        means, counts = true(batch)
        return means * counts / counts.float().mean(), counts

    monkeypatch.setattr(model, "losses", losses)


def everyone(source):
    return np.arange(source.num_patients)


@pytest.mark.parametrize("clipping", [0.05, 1.0, 4.0, "auto"])
def test_leaving_out_a_patient_moves_the_true_sum_by_c_at_most(ward, tiny_assistant, clipping):
    source = ward()
    moved = sensitivity(source, tiny_assistant.shapes, clipping, everyone(source), range(13))
    assert max(moved) <= 1
    assert min(moved) > 0.01


# These gradients have norms of 1 to 3. A C far below cuts all alike, coupled or not; with one far
# above, the noise covers the coupling too.
@pytest.mark.parametrize("clipping", [3.0, 6.0])
def test_a_loss_averaged_over_the_batch_is_found_by_neighbouring_data_only(
    ward, tiny_assistant, monkeypatch, clipping
):
    couple(monkeypatch, tiny_assistant)
    source, shapes = ward(), tiny_assistant.shapes
    claim = make_claim(1.0, max_grad_norm=clipping)
    transcript = transcribe(source, Canaries(400, shapes, claim.clip), claim)
    assert not is_alarm(transcript, claim)  # canaries do not pass through the loss
    patients, left_out = neighbours([np.asarray([i]) for i in range(13)], [9] * 12 + [99])
    assert 12 in left_out
    assert max(sensitivity(source, shapes, clipping, patients, left_out)) > 1.2


def test_records_as_units_sold_as_patients_are_found_by_neighbouring_data(ward, tiny_assistant):
    class Sold(ModelGradients):
        """Four patients of three records each, whose records are clipped one by one."""

        @property
        def num_patients(self):
            return 4

        def microbatches(self, chosen):
            rows = np.concatenate([[3 * u, 3 * u + 1, 3 * u + 2] for u in chosen])
            yield from super().microbatches(rows)

    records = [np.asarray([i]) for i in range(12)]
    whole = [np.arange(3 * u, 3 * u + 3) for u in range(4)]
    shapes = tiny_assistant.shapes
    for kind, patients, bound in ((Sold, records, 3), (ModelGradients, whole, 1)):
        source = ward(patients, kind=kind)
        moved = sensitivity(source, shapes, 0.05, np.arange(4), range(4))
        assert 0.5 * bound < max(moved) <= bound


def test_a_patient_whose_gradient_changes_between_calls_cannot_be_compared(ward, tiny_assistant):
    source = ward([np.arange(13)], most=1)

    def compare_often():
        for _ in range(40):  # both sums take the same of thirteen records with (1/13)⁴⁰
            sensitivity(source, tiny_assistant.shapes, 1.0, np.arange(1), [0])

    with pytest.raises(PrivacyError, match="two different clipped sums"):
        compare_often()


def test_the_odd_patients_are_left_out():
    patients = [np.asarray([0]), np.asarray([1, 2]), np.asarray([3]), np.asarray([4, 5, 6])]
    compared, left_out = neighbours(patients, [50, 5, 9, 2, 20, 30, 8])
    assert left_out[:3] == [0, 2, 3]  # longest, shortest, most records
    assert set(left_out) <= set(compared.tolist())
    many, few = neighbours([np.asarray([i]) for i in range(500)], list(range(500)))
    assert 12 <= len(many) <= 16
    assert few[:2] == [499, 0]


# Guesses.


def test_the_bound_counts_what_is_right_of_the_extremes_only(one):
    """Of forty, twelve on each side are spoken of; one on each side is wrong."""
    included = np.arange(40) >= 20
    included[[3, 35]] = [True, False]
    transcript = audit.Transcript(
        scores=np.arange(40.0), spread=1.0, included=included, sizes=(20,), counts=(1,) * 20
    )
    for confidence in (0.95, 0.9999):
        bound = judge(transcript, one, 24, confidence=confidence)
        assert (bound.guesses, bound.right) == (24, 22)
        expected = epsilon_lower(40, 24, 22, one.delta, confidence=confidence)
        assert 0 < bound.epsilon_lower == expected < bound.ceiling
        assert bound.confidence == confidence
    assert bound.p_value == p_value(40, 24, 22, one.epsilon, one.delta)


@pytest.mark.parametrize("guesses", [3, -2, 2000])
def test_a_number_of_guesses_that_cannot_be_made_is_refused(one, guesses):
    transcript = run(one, patients=0, count=16)
    with pytest.raises(ConfigError, match="expected an even number"):
        judge(transcript, one, guesses)
