"""The linear Cox model: its loss by hand and against slow twins, its records, and the C-index."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from huizhen.learning.metrics import concordance_index
from huizhen.learning.models import make_model
from huizhen.learning.trainable import Batch
from huizhen.protocol.errors import ConfigError, GovernanceError
from huizhen.protocol.study import parse_study


def tables(**task):
    return {
        "study": {"name": "s"},
        "task": {
            "kind": "survival",
            "label": "died",
            "labels": ["0", "1"],
            "time": "days",
            "features": {"age": [0, 100], "grade": [0, 2]},
            **task,
        },
        "privacy": {"unit": "none"},
        "strategy": {"name": "fedavg"},
    }


@pytest.fixture
def model():
    return make_model(parse_study(tables(), "study.toml"), None)


def batch(rows, times, events):
    inputs = torch.tensor([[*row, time] for row, time in zip(rows, times, strict=True)])
    labels = torch.tensor([int(event) for event in events])
    none = torch.zeros(len(rows), 0)
    return Batch(inputs.float(), none, labels, torch.zeros(len(rows), dtype=torch.long), none)


def slow_losses(risks, times, events):
    """Each record's part, by the definition."""
    found = []
    for risk, time, event in zip(risks, times, events, strict=True):
        at_risk = [r for r, t in zip(risks, times, strict=True) if t >= time]
        found.append(math.log(sum(math.exp(r) for r in at_risk)) - risk if event else 0.0)
    return found


# Risks 0, 1, 2 at times 1, 2, 3; events at 1 and 2: log(1 + e + e²) - 0 and log(e + e²) - 1.
def test_the_loss_by_hand(model):
    model.load({"head.weight": np.array([[1.0, 0.0]], np.float32)})
    losses, terms = model.losses(batch([(0, 5), (1, 5), (2, 5)], [1, 2, 3], [1, 1, 0]))
    assert losses.tolist() == pytest.approx([2.4076059, 1.3132617, 0], rel=1e-5)
    assert terms.tolist() == [1, 1, 1]


def test_equal_times_are_all_at_risk_whatever_their_order(model):
    """Breslow: both events at time 1 have all three records at risk."""
    model.load({"head.weight": np.array([[1.0, 0.0]], np.float32)})
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        rows, times, events = [(0, 0), (1, 0), (2, 0)], [1, 1, 2], [1, 1, 0]
        given_ = [[one[i] for i in order] for one in (rows, times, events)]
        losses, _ = model.losses(batch(*given_))
        expected = {0: 2.4076059, 1: 1.4076059, 2: 0}
        assert losses.tolist() == pytest.approx([expected[i] for i in order], rel=1e-5)


records = st.lists(
    st.tuples(
        st.floats(-1, 1, width=32), st.floats(-1, 1, width=32), st.integers(0, 5), st.booleans()
    ),
    min_size=1,
    max_size=12,
)


@given(records)
def test_the_loss_agrees_with_a_slow_twin(records):
    model = make_model(parse_study(tables(), "study.toml"), None)
    weight = np.array([[1.5, -0.5]], np.float32)
    model.load({"head.weight": weight})
    rows, times, events = ([r[:2] for r in records], [r[2] for r in records],
                           [r[3] for r in records])  # fmt: skip
    losses, _ = model.losses(batch(rows, times, events))
    risks = [float(np.dot(weight[0], row)) for row in rows]
    assert losses.tolist() == pytest.approx(slow_losses(risks, times, events), rel=1e-4, abs=1e-5)


def test_a_batch_without_an_event_has_a_gradient_of_zero(model):
    parameters = model.train_only(frozenset({"head.weight"}))
    losses, _ = model.losses(batch([(0, 5), (1, 5)], [1, 2], [0, 0]))
    losses.mean().backward()
    assert not parameters["head.weight"].grad.any()


def test_the_score_of_the_event_is_the_risk_and_there_is_no_bias(model):
    assert dict(model.shapes) == {"head.weight": (1, 2)}
    model.load({"head.weight": np.array([[1.0, 2.0]], np.float32)})
    assert model.logits(batch([(0.5, 0.25)], [9], [1])).tolist() == [[0, 1]]


def test_a_record_is_read_as_its_features_and_its_time(model):
    one = model.encoder().encode({"age": 75, "grade": 1, "days": "30.5", "died": 1}, "x:1")
    assert one.ids.tolist() == [0.5, 0.0, 30.5]
    assert (one.label, one.was_cut) == (1, False)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"days": -1}, "'days' is not a time of 0 or more"),
        ({"days": "soon"}, "'days' is not a time"),
        ({"days": None}, "'days' is not a time"),
        ({"days": float("nan")}, "'days' is not a time"),
        ({"days": float("inf")}, "'days' is not a time"),
        ({"days": 1e300}, "'days' is not a time"),
        ({"days": True}, "'days' is not a time"),
        ({"died": 2}, "'died' is neither '0', followed without the event, nor '1'"),
        ({"died": ""}, "'died' is empty"),
        ({"age": None}, "'age' is missing"),
    ],
)
def test_a_record_that_is_none_is_refused_by_its_place(model, fields, said):
    good = {"age": 75, "grade": 1, "days": 30, "died": 1}
    with pytest.raises(GovernanceError, match=f"x:1: {said}"):
        model.encoder().encode({**good, **fields}, "x:1")


def test_a_record_without_the_field_of_the_time_is_refused(model):
    with pytest.raises(ConfigError, match="there is no field 'days'"):
        model.encoder().encode({"age": 75, "grade": 1, "died": 1}, "x:1")


def test_batches_of_one_record_are_refused():
    with pytest.raises(ConfigError, match="batch_size is 1, of one record alone nobody was"):
        parse_study({**tables(), "rounds": {"batch_size": 1}}, "study.toml")


@pytest.mark.parametrize("unit", ["patient", "record"])
def test_no_unit_of_privacy_can_hold(unit):
    with pytest.raises(ConfigError, match=f"depends on who else is in its batch: unit '{unit}'"):
        parse_study({**tables(), "privacy": {"unit": unit}}, "study.toml")


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"time": ""}, "has no 'time', a survival task needs the field with the time"),
        ({"label": ""}, "has no 'label', a survival task needs the field that says"),
        ({"features": {}}, "has no 'features'"),
        ({"labels": ["0", "1", "2"]}, "labels has 3 values, a survival task needs two in this"),
        ({"labels": []}, "labels has 0 values, a survival task needs two in this order: followed"),
        ({"label_smoothing": 0.1}, "label_smoothing has no meaning for kind 'survival'"),
        ({"text": "{age}"}, "text has no meaning for kind 'survival'"),
        ({"kind": "tabular"}, "time has no meaning for kind 'tabular'"),
    ],
)
def test_terms_that_make_no_sense_are_refused(task, said):
    with pytest.raises(ConfigError, match=said):
        parse_study(tables(**task), "study.toml")


# Times 1, 2, 3; the first two with the event. Comparable: (1,2), (1,3), (2,3).
def test_the_c_index_by_hand():
    times, events = np.array([1, 2, 3], np.float32), np.array([True, True, False])
    for risks, expected in (
        ([3, 2, 1], 1.0),
        ([1, 2, 3], 0.0),
        ([2, 3, 1], 2 / 3),
        ([1, 1, 1], 0.5),
        ([2, 1, 1], 2.5 / 3),
    ):
        assert concordance_index(times, events, np.array(risks, np.float32)) == pytest.approx(
            expected
        )


def test_at_one_time_a_record_with_the_event_comes_before_one_without():
    times = np.array([1, 1, 1], np.float32)
    events = np.array([True, True, False])  # the two events cannot be compared
    assert concordance_index(times, events, np.array([3, 1, 2], np.float32)) == 0.5


def test_without_two_records_to_compare_there_is_no_c_index():
    for times, events in (([1, 2], [False, False]), ([2, 1], [True, False]), ([], [])):
        found = concordance_index(
            np.array(times, np.float32), np.array(events, bool), np.zeros(len(times), np.float32)
        )
        assert found is None


@given(records)
def test_the_c_index_agrees_with_a_slow_twin(records):
    times = np.array([r[2] for r in records], np.float32)
    events = np.array([r[3] for r in records])
    risks = np.array([round(float(r[0]), 1) for r in records], np.float32)
    agreed, pairs = 0.0, 0
    for i in range(len(records)):
        for j in range(len(records)):
            longer = times[j] > times[i] or (times[j] == times[i] and not events[j])
            if i != j and events[i] and longer:
                pairs += 1
                agreed += 1.0 if risks[i] > risks[j] else 0.5 if risks[i] == risks[j] else 0.0
    found = concordance_index(times, events, risks)
    assert found is None if not pairs else found == pytest.approx(agreed / pairs)
