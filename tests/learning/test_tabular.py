"""Numbers scaled by public ranges, and a linear model that is logistic regression itself."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from huizhen.client.per_record import per_record_gradients
from huizhen.learning.model import pad
from huizhen.learning.models import make_model
from huizhen.learning.tabular import LinearModel, TabularEncoder, feature_names
from huizhen.learning.tasks import UNSEEN, fields_read
from huizhen.protocol.errors import ConfigError, GovernanceError
from huizhen.protocol.study import parse_study

# "é" sorts after "z" by code point: the order is that of UTF-8, not of a language.
TASK = {
    "kind": "tabular",
    "features": {"sex": [0, 1], "age": [20, 70], "été": [-1.5, 2.5], "zinc": [0, 8]},
    "label": "sick",
    "labels": ["no", "yes"],
}
RECORD = {"age": 45, "sex": 1, "zinc": 2, "été": -1.5, "sick": "yes", "name": "SECRET"}


def study(**terms):
    return parse_study(
        {
            "study": {"name": "tabular"},
            "task": {**TASK, **terms},
            "strategy": {"name": "fedavg"},
        },
        "s",
    )


def encode(record, **terms):
    return TabularEncoder(study(**terms).task).encode(record, "a.csv:7")


def batch(rows, labels):
    rows = [torch.tensor(row, dtype=torch.float32) for row in rows]
    return pad(rows, labels, [0] * len(rows), rows)


def test_features_are_scaled_by_their_public_ranges_in_the_order_of_their_names():
    encoded = encode(RECORD)
    assert feature_names(study().task) == ("age", "sex", "zinc", "été")
    # (45 - 20) / 50 = 1/2; (2 - 0) / 8 = 1/4
    assert encoded.ids.tolist() == [0.0, 1.0, -0.5, -1.0]
    assert encoded.ids.dtype == np.float32
    assert (encoded.label, encoded.answer_start, encoded.was_cut) == (1, 0, False)
    assert fields_read(study().task) == ("age", "sex", "zinc", "été", "sick")


@given(st.floats(-1e300, 1e300), st.floats(-1e300, 1e300))
def test_a_feature_stays_in_its_range_and_keeps_its_order(one, other):
    lower, upper = (encode({**RECORD, "age": value}).ids[0] for value in sorted([one, other]))
    assert -1 <= lower <= upper <= 1


@pytest.mark.parametrize(("age", "scaled"), [(19.9, -1.0), (1e308, 1.0), ("-3", -1.0)])
def test_a_value_outside_is_moved_to_the_edge_and_marked(age, scaled):
    encoded = encode({**RECORD, "age": age})
    assert encoded.ids[0] == scaled
    assert encoded.was_cut


@pytest.mark.parametrize(
    ("value", "scaled"), [("0.25", -0.5), (" 1 ", 1.0), (True, 1.0), (False, -1.0), (0, -1.0)]
)
def test_numbers_of_csv_and_json_are_read_alike(value, scaled):
    encoded = encode({**RECORD, "sex": value})
    assert encoded.ids[1] == scaled
    assert not encoded.was_cut


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_missing_value_is_refused_or_stands_in_the_middle_as_the_study_says(value):
    with pytest.raises(GovernanceError, match=r"^a\.csv:7: 'age' is missing, .* 'refuse'"):
        encode({**RECORD, "age": value})
    encoded = encode({**RECORD, "age": value}, missing="middle")
    assert encoded.ids.tolist() == [0.0, 1.0, -0.5, -1.0]
    assert not encoded.was_cut


@pytest.mark.parametrize("value", ["SECRET", "nan", "inf", math.nan, -math.inf, [1], {}, 10**400])
@pytest.mark.parametrize("missing", ["refuse", "middle"])
def test_what_is_no_finite_number_is_refused_and_never_shown(value, missing):
    with pytest.raises(GovernanceError, match=r"^a\.csv:7: 'age' is not a finite") as caught:
        encode({**RECORD, "age": value}, missing=missing)
    assert str(value) not in str(caught.value).replace("finite", "")


def test_a_field_that_is_not_there_and_an_empty_label_are_refused_with_their_place():
    for missing in ("refuse", "middle"):
        with pytest.raises(ConfigError, match=r"^a\.csv:7: there is no field 'zinc'"):
            encode({k: v for k, v in RECORD.items() if k != "zinc"}, missing=missing)
    with pytest.raises(GovernanceError, match=r"^a\.csv:7: 'sick' is empty"):
        encode({**RECORD, "sick": " "}, missing="middle")


def test_classes_are_numbered_as_listed_and_others_are_marked():
    labels = [encode({**RECORD, "sick": sick}).label for sick in ("no", "yes", "perhaps")]
    assert labels == [0, 1, UNSEEN]


def test_the_first_model_is_zero_for_every_seed():
    model = LinearModel(study())
    assert model.shapes == {"head.bias": (1,), "head.weight": (1, 4)}
    for seed in (0, 7):
        assert not any(value.any() for value in model.first_tensors(seed).values())
    assert not any(value.any() for value in model.read(frozenset(model.shapes)).values())
    assert model.logits(batch([[1, 2, 3, 4]], [0])).tolist() == [[0.0, 0.0]]


# w = (1/2, -1, 0, 2), b = 1/4, x = (1, 1, -1, 1/2): z = 1/2 - 1 + 1 + 1/4 = 3/4.
def test_two_classes_are_logistic_regression_by_hand():
    model = LinearModel(study())
    weight = np.array([[0.5, -1, 0, 2]], np.float32)
    model.load({"head.weight": weight, "head.bias": np.array([0.25], np.float32)})
    one = batch([[1, 1, -1, 0.5]] * 2, [0, 1])
    assert model.logits(one).tolist() == [[0.0, 0.75]] * 2
    losses, terms = model.losses(one)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(z)) for z in (0.75, -0.75)])
    assert terms.tolist() == [1, 1]


@pytest.mark.parametrize("labels", [["no", "yes"], ["no", "yes", "perhaps"]])
def test_each_records_gradient_is_the_error_times_the_features(labels):
    model = LinearModel(study(labels=labels))
    generator = np.random.default_rng(3)
    tensors = {n: generator.normal(size=s).astype(np.float32) for n, s in model.shapes.items()}
    model.load(tensors)
    x = generator.normal(size=(5, 4)).astype(np.float32)
    y = np.array([0, 1, 1, 0, len(labels) - 1])
    parameters = model.train_only(frozenset(model.shapes))
    with per_record_gradients(model.module, parameters) as recorder:
        losses, _ = model.losses(batch(x.tolist(), y.tolist()))
        losses.sum().backward()
        found = recorder.take(5)
    z = x @ tensors["head.weight"].T + tensors["head.bias"]
    if len(labels) == 2:
        z = np.concatenate([np.zeros((5, 1)), z], axis=1)
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    error = (p - np.eye(len(labels))[y])[:, -tensors["head.bias"].size :]
    assert found["head.bias"].numpy() == pytest.approx(error, abs=1e-6)
    expected = error[:, :, None] * x[:, None, :]
    assert found["head.weight"].numpy() == pytest.approx(expected, abs=1e-6)


def test_what_is_loaded_is_read_and_only_what_is_named_is_trained():
    model = LinearModel(study(labels=["a", "b", "c"]))
    tensors = {"head.weight": np.arange(12, dtype=np.float32).reshape(3, 4)}
    model.load(tensors)
    found = model.read(["head.weight"])
    assert np.array_equal(found["head.weight"], tensors["head.weight"])
    assert model.train_only(frozenset(["head.bias"])).keys() == {"head.bias"}
    losses, _ = model.losses(batch([[1, 0, 0, 0]], [2]))
    losses.sum().backward()
    assert model.parameters["head.bias"].grad is not None
    assert model.parameters["head.weight"].grad is None
    tensors["head.weight"][:] = -1
    found["head.weight"][:] = -2
    assert model.read(["head.weight"])["head.weight"].max() == 11  # neither side shares memory


def test_fewer_than_two_classes_are_refused():
    for labels in ([], ["yes"]):
        with pytest.raises(ConfigError, match=f"labels has {len(labels)} classes"):
            make_model(dataclasses.replace(study(), task=study(labels=labels).task), None)


def test_smoothing_pulls_the_target_towards_the_middle():
    model = LinearModel(study(label_smoothing=0.2))
    model.load({"head.bias": np.array([2.0], np.float32)})
    losses, _ = model.losses(batch([[0, 0, 0, 0]], [1]))
    expected = 0.9 * math.log1p(math.exp(-2)) + 0.1 * math.log1p(math.exp(2))
    assert losses.tolist() == pytest.approx([expected])
