"""Patients' gradients from microbatches against a loop that takes one record at a time.

A record's gradient is float32 and depends on how its batch is padded and cut up; measured, two ways
to the same gradient differ by 3e-7 of its norm, and 2e-6 is asked for.
"""

import contextlib
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from huizhen.client.dp_sgd import clipped_sum
from huizhen.client.examples import Examples
from huizhen.client.model_checks import Memory, check_model
from huizhen.client.patient_gradients import ModelGradients
from huizhen.client.per_record import Recorder, per_record_gradients

MODELS = ["tiny_classifier", "tiny_assistant", "minilm_classifier"]
FLOAT32 = 2e-6
PER_TOKEN = 100.0  # bytes; what a padded token takes where a test sets it


@pytest.fixture(params=MODELS)
def model(request, randomised):
    model = request.getfixturevalue(request.param)
    randomised(model, scale=0.1)
    return model


@pytest.fixture
def examples(model, make_site, rows):
    return make_site(model, rows)


def names_of(model, factors):
    return frozenset(n for n in model.shapes if factors == "both" or not n.endswith(".lora_A"))


@contextlib.contextmanager
def source_of(model, examples, *, names=None, most=99, memory=None):
    """Open the patients of ``examples`` with all their records, in memory without end."""
    parameters = model.train_only(frozenset(model.shapes) if names is None else names)
    try:
        with per_record_gradients(model.module, parameters) as recorder:
            yield ModelGradients(
                model,
                parameters,
                examples,
                examples.records_of(),
                recorder,
                records_per_patient=most,
                memory=memory or Memory(1 << 40, PER_TOKEN),
            )
    finally:
        model.train_only(frozenset())


def microbatches(model, examples, chosen, *, limit=1 << 40, **terms):
    """Return the batches of the chosen patients in the order in which they come."""
    with source_of(model, examples, memory=Memory(limit, PER_TOKEN), **terms) as source:
        return list(source.microbatches(np.asarray(chosen, dtype=np.intp)))


def rows_of(batches):
    """Return each patient's gradient as one float64 vector, in the order of the batches."""
    return [
        torch.cat([grad[u].double().flatten() for grad in batch.gradients.values()])
        for batch in batches
        for u in range(len(next(iter(batch.gradients.values()))))
    ]


def gradient_of_record(model, examples, names, i):
    """Return the slow twin's gradient: a batch of one record and plain autograd."""
    parameters = model.train_only(names)
    model.losses(examples.batch([i]))[0].sum().backward()
    found = torch.cat([p.grad.detach().double().flatten() for p in parameters.values()])
    model.train_only(frozenset())
    return found


def by_length(examples):
    """Return the patients in the order of the source: by their longest record."""
    records_of, lengths = examples.records_of(), np.asarray(examples.lengths)
    return sorted(range(len(records_of)), key=lambda u: lengths[records_of[u]].max())


def expected_rows(model, examples, names):
    each = [gradient_of_record(model, examples, names, i) for i in range(len(examples.ids))]
    records_of = examples.records_of()
    return [torch.stack([each[i] for i in records_of[u]]).mean(0) for u in by_length(examples)]


def farthest(found, expected):
    """Return the greatest distance of two patients' gradients, relative to the norm."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("factors", ["both", "B only"])
def test_a_patients_gradient_is_the_mean_over_their_records(model, examples, factors):
    names = names_of(model, factors)
    expected = expected_rows(model, examples, names)
    batches = microbatches(model, examples, range(8), names=names)
    assert len(batches) == 1
    assert list(batches[0].gradients) == [name for name in model.shapes if name in names]
    assert farthest(rows_of(batches), expected) < FLOAT32


def test_checkpointing_changes_no_gradient(model, examples, monkeypatch):
    expected = rows_of(microbatches(model, examples, range(8)))
    monkeypatch.setattr(model, "checkpointing", True)
    assert farthest(rows_of(microbatches(model, examples, range(8))), expected) < FLOAT32


def test_each_record_is_a_unit_where_the_study_says_so(model, examples):
    alone = replace(examples, patients=tuple(range(len(examples.ids))))
    names = names_of(model, "both")
    expected = expected_rows(model, alone, names)
    assert farthest(rows_of(microbatches(model, alone, range(20))), expected) < FLOAT32


def test_the_chosen_patients_come_once_each_and_no_other(tiny_classifier, make_site, rows):
    model, names = tiny_classifier, names_of(tiny_classifier, "both")
    examples = make_site(model, rows)
    expected = dict(zip(by_length(examples), expected_rows(model, examples, names), strict=True))
    for chosen in ([6], [2, 5], [7, 0, 3, 4]):
        order = [u for u in by_length(examples) if u in chosen]
        found = rows_of(microbatches(model, examples, chosen))
        assert farthest(found, [expected[u] for u in order]) < FLOAT32
    assert microbatches(model, examples, []) == []


def passes(monkeypatch):
    """Return a list that grows by the number of records of each backward pass."""
    sizes: list[int] = []
    take = Recorder.take

    def counted(recorder, records):
        sizes.append(records)
        return take(recorder, records)

    monkeypatch.setattr(Recorder, "take", counted)
    return sizes


def least_memory(model, examples):
    """Return what ``check_model`` asks for: one record, its gradient, and the patient's sum."""
    numbers = sum(parameter.numel() for parameter in model.parameters.values())
    return int(max(examples.lengths) * PER_TOKEN) + 2 * 4 * numbers


@pytest.mark.parametrize("times", [1, 1.7, 4, 1000])
def test_the_memory_bounds_each_pass_and_changes_no_gradient(model, examples, monkeypatch, times):
    expected = rows_of(microbatches(model, examples, range(8)))
    sizes = passes(monkeypatch)
    drawn: list[list[int]] = []
    batch = Examples.batch

    def noted(self, rows):
        drawn.append(list(rows))
        return batch(self, rows)

    monkeypatch.setattr(Examples, "batch", noted)
    limit = int(times * least_memory(model, examples))
    batches = microbatches(model, examples, range(8), limit=limit)
    assert farthest(rows_of(batches), expected) < FLOAT32
    assert sizes == [len(own) for own in drawn]
    assert sorted(i for own in drawn for i in own) == list(range(len(examples.ids)))
    numbers = sum(parameter.numel() for parameter in model.parameters.values())
    for own in drawn:
        padded = len(own) * max(examples.lengths[i] for i in own)
        assert padded * PER_TOKEN + len(own) * 4 * numbers <= limit
    assert (len(drawn) == 1) == (times == 1000)


def test_a_patient_who_does_not_fit_is_taken_record_by_record(
    tiny_classifier, make_site, rows, randomised, monkeypatch
):
    model = tiny_classifier
    randomised(model)
    examples = make_site(model, rows)
    (whole,) = microbatches(model, examples, [3])  # p3 has four records
    sizes = passes(monkeypatch)
    (apart,) = microbatches(model, examples, [3], limit=least_memory(model, examples))
    assert sizes == [1, 1, 1, 1]
    assert farthest(rows_of([apart]), rows_of([whole])) < FLOAT32
    assert apart.losses == pytest.approx(whole.losses, rel=1e-5)


LONG = "seizure tremor ataxia " * 40


def sum_of_records(model, examples, clipping):
    """Return the clipped sum over all patients, in the memory that a site would plan."""
    memory = check_model(model, examples, 8)
    with source_of(model, examples, memory=memory) as source:
        sums, _ = clipped_sum(source, np.arange(source.num_patients), model.shapes, clipping)
    return torch.cat([total.flatten() for total in sums.values()])


@pytest.mark.parametrize("clipping", [0.25, "auto"])
@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("others", [1, 99], ids=["to one", "to eight"])
def test_a_patient_of_extreme_records_moves_the_sum_by_at_most_c(
    model, make_site, rows, randomised, clipping, scale, others
):
    """Neighbouring data: a patient with four records, one of them very long, comes or goes."""
    randomised(model, scale=scale)
    odd = [("new", text, "measles") for text in (LONG, "x", "fever rash", LONG[:60])]
    joined = sum_of_records(model, make_site(model, [*rows[:others], *odd]), clipping)
    without = sum_of_records(model, make_site(model, rows[:others]), clipping)
    bound = 1.0 if clipping == "auto" else clipping
    assert 0.1 * bound < float((joined - without).norm()) <= bound


def test_the_losses_are_those_of_the_records(model, examples):
    with torch.no_grad():
        alone = [float(model.losses(examples.batch([i]))[0]) for i in range(len(examples.ids))]
    batches = microbatches(model, examples, range(8))
    found = [loss for batch in batches for loss in batch.losses]
    assert sorted(found) == pytest.approx(sorted(alone), rel=1e-5)


@pytest.mark.parametrize("most", [1, 2])
def test_at_most_k_records_drawn_anew_make_a_patients_gradient(
    tiny_classifier, make_site, randomised, most
):
    """Each of four records, or of six pairs, is missed by 200 draws with less than 1e-14."""
    model, names = tiny_classifier, names_of(tiny_classifier, "both")
    texts = ("cough", "fever and rash", "seizure", "ataxia, tremor")
    examples = make_site(model, [("p", text, "measles") for text in texts])
    randomised(model)
    single = [gradient_of_record(model, examples, names, i) for i in range(4)]
    groups = list(itertools.combinations(range(4), most))
    means = [torch.stack([single[i] for i in group]).mean(0) for group in groups]
    seen = set()
    for _ in range(200):
        (found,) = rows_of(microbatches(model, examples, [0], most=most))
        far = [float((found - mean).norm() / mean.norm()) for mean in means]
        assert min(far) < FLOAT32
        seen.add(groups[int(np.argmin(far))])
    assert seen == set(groups)
