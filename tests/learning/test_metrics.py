"""Metrics against hand-worked values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import f1_score

from huizhen.learning.metrics import classification_metrics, is_same_answer


def test_metrics_by_hand():
    # guesses 0, 1, 1, 0 for 0, 1, 2, 3: F1 is 2/3, 2/3, 0, 0; the 3 is ranked fourth
    scores = np.array([[9, 1, 0, 0], [0, 9, 1, 0], [0, 9, 8, 1], [9, 8, 7, 1]], np.float32)
    found = classification_metrics(scores, [0, 1, 2, 3])
    assert found == {"top1": 0.5, "top3": 0.75, "macro_f1": pytest.approx(1 / 3)}


def test_a_class_that_nobody_trained_is_always_an_error():
    scores = np.eye(3, dtype=np.float32)
    found = classification_metrics(scores, [0, 1, -1])
    assert found["top1"] == found["top3"] == pytest.approx(2 / 3)
    # a record of class 2 that is guessed as 2 costs nothing, one of the unknown class a third
    assert found["macro_f1"] == pytest.approx(2 / 3)


def test_fewer_than_three_classes_are_no_trouble():
    found = classification_metrics(np.array([[1, 0], [1, 0]], np.float32), [0, 1])
    assert found["top1"] == 0.5
    assert found["top3"] == 1.0


@given(
    arrays(np.float32, (12, 4), elements=st.floats(-5, 5, width=32), unique=True),
    arrays(np.int64, 12, elements=st.integers(0, 3)),
)
def test_macro_f1_is_scikit_learns_over_the_classes_that_occur(scores, labels):
    found = classification_metrics(scores, labels.tolist())
    expected = f1_score(
        labels, scores.argmax(1), labels=np.unique(labels), average="macro", zero_division=0
    )
    assert found["macro_f1"] == pytest.approx(expected)
    assert found["top1"] == pytest.approx((scores.argmax(1) == labels).mean())
    assert found["top1"] <= found["top3"]


@pytest.mark.parametrize(
    ("generated", "expected"),
    [("Yes.", "yes"), (" no ", "No"), ("ｙｅｓ", "yes"), ("是。", "是"), ("maybe. ", "maybe")],
)
def test_answers_agree_but_for_case_width_space_and_a_final_full_stop(generated, expected):
    assert is_same_answer(generated, expected)


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ("yes", "no"),
        ("", "yes"),
        ("yes it is", "yes"),
        (".5", "5"),
        ("不是", "是"),
        ("y es", "yes"),
    ],
)
def test_other_answers_do_not_agree(generated, expected):
    assert not is_same_answer(generated, expected)
