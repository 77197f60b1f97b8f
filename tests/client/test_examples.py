"""Examples keep their patients apart, alone and pooled."""

import pytest

from huizhen.client.examples import pooled


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
