"""What leaves about held-out patients is noised, moves little with each of them, and is theirs."""

import json
import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from huizhen.client import metrics_release
from huizhen.client.evaluation import answer_loss, classify
from huizhen.client.examples import Examples
from huizhen.client.metrics_release import (
    Outcome,
    exact_counts,
    held_out_outcomes,
    loss_steps,
    ranked_cell,
    release_metrics,
)
from huizhen.learning.tabular import LinearModel
from huizhen.learning.tasks import UNSEEN
from huizhen.protocol.errors import ConfigError, PrivacyError
from huizhen.protocol.metrics import LOSS_BOUND, LOSS_STEPS
from huizhen.protocol.study import parse_study

CELLS = ("top1", "top2_to_3", "wrong")
TRAINED = frozenset({90_001, 90_002})


@pytest.fixture(scope="module")
def study(make_study):
    """A classification among five classes, so that top-3 means something."""
    labels = ["a", "b", "c", "d", "e"]
    return make_study(task={"labels": labels}, privacy={"metrics_epsilon": 0.5})


@pytest.fixture(scope="module")
def instruction(make_study):
    return make_study("instruction", privacy={"metrics_epsilon": 1.0})


@pytest.fixture
def fixed_noise(monkeypatch):
    """Let the noise be the given numbers in turn; return the rates that were asked for."""

    def fix(*numbers):
        rates, left = [], list(numbers)

        def draw(rate):
            rates.append(rate)
            return left.pop(0)

        monkeypatch.setattr(metrics_release, "discrete_laplace", draw)
        return rates

    return fix


def outcomes_of(**cells):
    """Return so many patients in each cell."""
    names = [name for name, count in cells.items() for _ in range(count)]
    return [Outcome(patient=i, cell=name) for i, name in enumerate(names)]


def release(study, outcomes, trained=TRAINED, round=2):
    return release_metrics(
        study, site="A", round=round, outcomes=outcomes, training_patients=trained
    )


# Sensitivity: what the noise is made for.

patient_outcomes = st.lists(
    st.tuples(st.sampled_from(CELLS), st.floats(allow_nan=True)), min_size=1, max_size=40
)


@given(patient_outcomes, st.data())
def test_a_patient_moves_the_exact_counts_by_no_more_than_the_stated_sensitivity(drawn, data):
    outcomes = [Outcome(patient=i, cell=c, loss=x) for i, (c, x) in enumerate(drawn)]
    gone = data.draw(st.integers(0, len(outcomes) - 1))
    with_cells, with_loss = exact_counts(outcomes, CELLS)
    cells, loss = exact_counts([o for o in outcomes if o.patient != gone], CELLS)
    assert sum(abs(with_cells[name] - cells[name]) for name in CELLS) == 1
    assert 0 <= with_loss - loss <= LOSS_STEPS


@pytest.mark.parametrize("kind", ["classifier", "assistant"])
def test_a_patient_with_many_records_moves_no_other_patients_outcome(
    kind, request, make_site, rows, randomised, monkeypatch
):
    model = request.getfixturevalue(f"tiny_{kind}")
    randomised(model)
    # the same draws for everyone who stays: here the last record of each
    last = lambda count, most: np.arange(count)[-most:]  # noqa: E731
    monkeypatch.setattr(metrics_release, "choose", last)
    long = [("p9", " ".join(["cough"] * n), "asthma") for n in (1, 9, 3)]
    both = make_site(model, [*rows, *long])
    alone = make_site(model, rows)
    before, after = held_out_outcomes(model, both), held_out_outcomes(model, alone)
    assert len(before) == len(after) + 1 == 9
    for one, other in zip(before, after, strict=False):
        assert (one.patient, one.cell, one.loss) == (other.patient, other.cell, other.loss)


def test_an_outcome_follows_from_the_records_tokens_alone(
    tiny, make_study, loaded, make_site, rows, randomised, monkeypatch
):
    terms = {"layers": 1, "target_modules": ["q_proj", "v_proj"]}
    model = loaded("last layer", tiny, make_study(adapter=terms))
    assert model.has_prefix
    randomised(model)
    monkeypatch.setattr(metrics_release, "choose", lambda count, most: np.arange(most))
    examples = make_site(model, rows)
    # what other records in a batch could do to the outputs of the frozen layers, magnified
    moved = replace(examples, inputs=tuple(0 * x for x in examples.inputs))
    found = [o.cell for o in held_out_outcomes(model, moved)]
    assert found == [o.cell for o in held_out_outcomes(model, examples)]
    assert len(set(found)) == 2


def test_one_record_of_each_patient_is_drawn_at_random(
    tiny_classifier, make_site, monkeypatch, rows
):
    # p7 has four records; each is scored by what its text is, so the drawn one can be told
    seen: Counter[tuple[int, bytes]] = Counter()

    def note(model, one):
        seen[(one.patients[0], one.ids[0].numpy().tobytes())] += 1
        return np.zeros((1, 3), np.float32)

    monkeypatch.setattr(metrics_release, "classify", note)
    examples = make_site(tiny_classifier, rows)
    runs = 400
    for _ in range(runs):
        held_out_outcomes(tiny_classifier, examples)
    assert sum(seen.values()) == 8 * runs
    distinct = {key for key in seen if key[0] == 7}
    ids = [examples.ids[i].numpy().tobytes() for i in examples.records_of()[7]]
    weights = Counter(ids)
    assert {key[1] for key in distinct} == set(ids)
    for text, copies in weights.items():
        low, high = binom.ppf([1e-9, 1 - 1e-9], runs, copies / 4)
        assert low <= seen[(7, text)] <= high


def test_two_outcomes_of_one_patient_are_refused():
    twice = [Outcome(patient=3, cell="top1"), Outcome(patient=3, cell="wrong")]
    with pytest.raises(PrivacyError, match="several outcomes, expected one"):
        exact_counts(twice, CELLS)


@pytest.mark.parametrize(
    ("loss", "steps"),
    [
        (0.0, 0),
        (LOSS_BOUND / 2, LOSS_STEPS // 2),
        (LOSS_BOUND, LOSS_STEPS),
        (LOSS_BOUND + 1e9, LOSS_STEPS),
        (float("inf"), LOSS_STEPS),
        (float("nan"), LOSS_STEPS),
        (-1.0, 0),
        (None, 0),
    ],
)
def test_a_loss_is_clipped_to_the_public_bound(loss, steps):
    assert loss_steps(loss) == steps
    assert isinstance(loss_steps(loss), int)


# The noise.


def test_each_count_gets_the_whole_epsilon_since_a_patient_is_in_one_cell(study, fixed_noise):
    rates = fixed_noise(2, -1, 4)
    found = release(study, outcomes_of(top1=20, top2_to_3=7, wrong=5))
    assert rates == [Fraction(0.5)] * 3
    assert found.counts == {"top1": 22, "top2_to_3": 6, "wrong": 9}
    assert (found.epsilon, found.epsilon_counts, found.epsilon_loss) == (0.5, 0.5, 0.0)
    assert found.loss is None


def test_an_instructions_loss_has_half_of_the_epsilon_and_its_own_sensitivity(
    instruction, fixed_noise
):
    rates = fixed_noise(-1, 3, 250)
    cells = ["exact"] * 12 + ["wrong"] * 6
    outcomes = [Outcome(patient=i, cell=c, loss=1.0 + i) for i, c in enumerate(cells)]
    found = release(instruction, outcomes)
    assert rates == [Fraction(1, 2), Fraction(1, 2), Fraction(1, 2) / LOSS_STEPS]
    assert found.counts == {"exact": 11, "wrong": 9}
    # losses 1, 2, 3, 4 and fourteen times the bound of 5 nats, which is 1000 steps
    assert found.loss == 200 + 400 + 600 + 800 + 14 * 1000 + 250
    assert found.epsilon == 1.0


def test_the_noise_of_two_releases_differs(study):
    outcomes = outcomes_of(top1=4000, top2_to_3=2000, wrong=1000)
    found = {tuple((release(study, outcomes).counts or {}).values()) for _ in range(20)}
    assert len(found) > 10  # 20 equal draws of three cells have a chance below 1e-9


# Suppression.


@pytest.mark.parametrize(
    ("patients", "noise", "is_suppressed"),
    [(3, (3, 3, 1), False), (3, (3, 3, 0), True), (60, (-30, -21, 0), True), (0, (0, 0, 0), True)],
)
def test_eg_4_counts_are_kept_back_by_the_noised_number_alone(
    study, fixed_noise, patients, noise, is_suppressed
):
    fixed_noise(*noise)
    found = release(study, outcomes_of(top1=patients))
    assert found.is_suppressed == is_suppressed
    assert (found.counts is None) == is_suppressed
    assert found.epsilon == 0.5  # spent either way


def test_the_decision_to_keep_back_is_itself_noisy(make_study):
    # With exactly the minimum, and symmetric noise: kept back in just under half of the runs.
    study = make_study(privacy={"metrics_epsilon": 0.5, "metrics_minimum": 10})
    outcomes = outcomes_of(top1=10)
    runs = 300
    kept = sum(release(study, outcomes).is_suppressed for _ in range(runs))
    low, high = binom.ppf([1e-9, 1 - 1e-9], runs, 0.435)  # P(sum of two draws < 0)
    assert low < kept < high


def test_a_suppressed_value_holds_no_count_and_no_loss(instruction, fixed_noise):
    fixed_noise(0, 0, 31)
    found = release(instruction, [Outcome(patient=7, cell="exact", loss=0.7)])
    assert found.readings() == {}
    table = json.loads(found.canonical())
    assert (table["counts"], table["loss"]) == (None, None)
    assert table["standard_errors"] == {}


# Nothing exact leaves.


def test_the_true_numbers_are_neither_in_the_repr_nor_in_the_json(instruction, fixed_noise):
    fixed_noise(100_003, 1_000_003, 5_000_011)
    cells = ["exact"] * 4217 + ["wrong"] * 1301
    outcomes = [Outcome(patient=i, cell=c, loss=0.735) for i, c in enumerate(cells)]
    found = release(instruction, outcomes)
    text = f"{found!r} {found.canonical().decode()} {found.readings()}"
    numbers = set(re.findall(r"\d+", text))
    for true in (4217, 1301, 4217 + 1301, 147 * 5518):
        assert str(true) not in numbers
    assert "104220" in numbers


def test_an_outcome_does_not_print_itself():
    assert repr(Outcome(patient=17, cell="exact", loss=0.25)) == "Outcome(<masked>)"


# Who may be counted.


def test_a_training_patient_among_the_held_out_is_refused(study):
    outcomes = outcomes_of(top1=30)
    with pytest.raises(PrivacyError, match="also a training patient"):
        release(study, outcomes, trained=frozenset({29, 500}))
    assert release(study, outcomes, trained=frozenset({30, 500})).epsilon == 0.5


def test_a_check_against_nobody_is_refused(study):
    with pytest.raises(PrivacyError, match="no training patients are given"):
        release(study, outcomes_of(top1=30), trained=frozenset())


@pytest.mark.parametrize("epsilon", [None, 1e-4, 101.0])
def test_a_study_without_a_usable_budget_lets_nothing_out(study, with_terms, epsilon):
    other = with_terms(study, privacy={"metrics_epsilon": epsilon})
    with pytest.raises(ConfigError, match="metrics_epsilon"):
        release(other, outcomes_of(top1=30))


# What an outcome is.


def test_a_classifiers_cells_are_those_of_its_own_scores(
    tiny_classifier, make_site, rows, randomised, monkeypatch
):
    randomised(tiny_classifier)
    monkeypatch.setattr(metrics_release, "choose", lambda count, most: np.arange(most))
    examples = make_site(tiny_classifier, rows)
    outcomes = held_out_outcomes(tiny_classifier, examples)
    firsts = [int(own[0]) for own in examples.records_of()]
    guesses = classify(tiny_classifier, examples).argmax(axis=1)
    right = [guesses[i] == examples.labels[i] for i in firsts]
    assert [o.cell for o in outcomes] == ["top1" if hit else "wrong" for hit in right]
    assert 0 < sum(right) < 8
    assert [o.patient for o in outcomes] == list(range(8))


@pytest.mark.parametrize(
    ("label", "cell"),
    [(2, "top1"), (0, "top2_to_3"), (4, "top2_to_3"), (1, "wrong"), (3, "wrong"), (-1, "wrong")],
)
def test_the_place_of_the_true_class_is_the_cell(label, cell):
    # order 2, 0, 4, 1 and last what is no number
    scores = np.array([3, 1, 5, np.nan, 2], np.float32)
    assert ranked_cell(scores, label, CELLS) == cell
    among_few = "wrong" if cell == "top2_to_3" else cell
    assert ranked_cell(scores, label, ("top1", "wrong")) == among_few


def test_equal_scores_stand_in_the_classes_order():
    scores = np.zeros(5, np.float32)
    found = [ranked_cell(scores, label, CELLS) for label in range(5)]
    assert found == ["top1", "top2_to_3", "top2_to_3", "wrong", "wrong"]


def test_a_tabular_models_patients_are_ranked_too():
    tables = {
        "study": {"name": "numbers"},
        "task": {
            "kind": "tabular",
            "features": {"age": [0, 99]},
            "label": "ill",
            "labels": ["no", "yes"],
        },
        "strategy": {"name": "fedavg"},
    }
    model = LinearModel(parse_study(tables, "test"))
    model.load({"head.weight": np.array([[2]], np.float32), "head.bias": np.zeros(1, np.float32)})
    values = tuple(torch.tensor([x]) for x in (0.5, -0.5, 0.5, -0.5))
    examples = Examples(
        ids=values,
        inputs=values,
        labels=(1, 0, 0, UNSEEN),
        answer_starts=(0,) * 4,
        patients=(0, 1, 2, 3),
        cut=0,
    )
    cells = [outcome.cell for outcome in held_out_outcomes(model, examples)]
    assert cells == ["top1", "top1", "wrong", "wrong"]


def test_an_assistants_answer_is_compared_with_the_records(
    tiny_assistant, make_site, rows, randomised, monkeypatch
):
    randomised(tiny_assistant)
    examples = make_site(tiny_assistant, rows)
    asked = []

    def generate(prompts, most):
        asked.extend(prompts)
        return ["Asthma."] * len(prompts)

    monkeypatch.setattr(tiny_assistant, "generate", generate)
    monkeypatch.setattr(metrics_release, "choose", lambda count, most: np.arange(most))
    outcomes = held_out_outcomes(tiny_assistant, examples)
    expected = ["exact" if patient % 3 == 0 else "wrong" for patient in range(8)]  # asthma is first
    assert [o.cell for o in outcomes] == expected
    for outcome, own, prompt in zip(outcomes, examples.records_of(), asked, strict=True):
        row = int(own[0])
        assert prompt.tolist() == examples.ids[row][: examples.answer_starts[row]].tolist()
        loss = answer_loss(tiny_assistant, examples.take([row]))
        assert outcome.loss == pytest.approx(loss.total / loss.tokens, rel=1e-5)


def test_a_site_without_held_out_patients_sends_noise_like_any_other(
    tiny_classifier, make_site, rows, study
):
    nobody = make_site(tiny_classifier, rows).take([])
    assert held_out_outcomes(tiny_classifier, nobody) == []
    assert release(study, []).epsilon == 0.5
