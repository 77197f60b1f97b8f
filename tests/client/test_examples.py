"""Examples keep their patients apart, alone and pooled."""

import pytest

from huizhen.client.evaluation import classify
from huizhen.client.examples import make_examples, pooled
from huizhen.client.governance import SitePolicy, admit
from huizhen.client.records.record import Record
from huizhen.client.selection import select
from huizhen.learning.models import make_model
from huizhen.learning.tasks import fields_read
from huizhen.protocol.study import parse_study


def test_each_patient_has_the_own_records(tiny_classifier, make_site, rows):
    examples = make_site(tiny_classifier, rows)
    assert examples.num_patients == 8
    own = examples.records_of()
    assert [len(records) for records in own] == [1, 2, 3, 4, 1, 2, 3, 4]
    for patient, records in enumerate(own):
        assert {rows[i][0] for i in records} == {f"p{patient}"}


def test_pooling_keeps_the_patients_of_two_sites_apart(tiny_classifier, make_site, rows):
    first = make_site(tiny_classifier, rows)
    second = make_site(tiny_classifier, rows[:3])  # the same ids, other people
    both = pooled([first, second])
    assert both.num_patients == first.num_patients + second.num_patients
    assert len(both.ids) == len(rows) + 3
    assert [len(r) for r in both.records_of()][8:] == [len(r) for r in second.records_of()]
    assert pooled([first]).patients == first.patients


def test_records_of_unknown_classes_are_left_out_of_training(tiny_classifier, make_site, rows):
    examples = make_site(tiny_classifier, [*rows, ("q", "odd", "plague")])
    assert examples.labels[-1] == -1
    known = examples.with_known_labels()
    assert len(known.labels) == len(rows)
    assert min(known.labels) >= 0
    assert known.num_patients == 8
    assert len(known.inputs) == len(known.answer_starts) == len(known.ids) == len(rows)


@pytest.mark.parametrize("indices", [[0], [3, 1, 7]])
def test_a_batch_is_padded_on_the_right(tiny_classifier, make_site, rows, indices):
    examples = make_site(tiny_classifier, rows)
    batch = examples.batch(indices)
    for row, i in enumerate(indices):
        length = len(examples.ids[i])
        assert batch.inputs[row, :length].tolist() == examples.ids[i].tolist()
        assert not batch.inputs[row, length:].any()
        assert batch.mask[row].sum() == length
        assert batch.mask[row, :length].all()
        assert batch.labels[row] == examples.labels[i]


@pytest.fixture
def tabular_site(make_site):
    """Return a linear model and a site's records of two numbers, by the way of a hospital."""
    features = {"age": [20, 70], "sex": [0, 1]}
    task = {"kind": "tabular", "features": features, "label": "sick", "labels": ["no", "yes"]}
    tables = {"study": {"name": "t"}, "task": task, "strategy": {"name": "fedavg"}}
    model = make_model(parse_study(tables, "s"), None)
    rows = [(20, 1, "no"), (45, 0, "yes"), (99, 1, "yes"), (70, 0, "yes")]
    records = [
        Record(f"p{i // 2}", {"id": f"p{i // 2}", "age": age, "sex": sex, "sick": sick}, f"r:{i}")
        for i, (age, sex, sick) in enumerate(rows)
    ]
    admitted = admit(records, SitePolicy(site="A"))
    clean = select(admitted, fields_read(model.study.task))
    return model, make_examples(clean, model.encoder(), model)


def test_numbers_keep_their_patients_and_are_never_padded(tabular_site):
    _, examples = tabular_site
    assert examples.num_patients == 2
    assert [rows.tolist() for rows in examples.records_of()] == [[0, 1], [2, 3]]
    assert examples.lengths == [2, 2, 2, 2]
    assert examples.cut == 1  # 99 lies outside
    batch = examples.batch([3, 0])
    assert batch.inputs.tolist() == [[1, -1], [-1, 1]]
    assert batch.mask.tolist() == [[1, 1], [1, 1]]
    assert batch.labels.tolist() == [1, 0]


def test_numbers_of_two_sites_are_pooled(tabular_site):
    _, examples = tabular_site
    both = pooled([examples, examples.take([0])])
    assert both.num_patients == 3
    assert both.batch([4, 1]).inputs.tolist() == [[-1, 1], [0, -1]]


def test_scores_of_a_linear_model_are_those_of_each_record_alone(tabular_site, randomised):
    model, examples = tabular_site
    randomised(model)
    scores = classify(model, examples)
    assert scores.shape == (4, 2)
    assert len({float(score) for score in scores[:, 1]}) == 4
    for i in range(4):
        assert scores[i] == pytest.approx(model.logits(examples.batch([i]))[0].numpy(), abs=1e-6)
