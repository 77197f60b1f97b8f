"""A round of training: public and repeatable without privacy, of fixed length with it."""

import dataclasses
import math

import numpy as np
import pytest

from huizhen.client import training
from huizhen.client.dp_sgd import private_gradient
from huizhen.client.training import learning_rate, train_round
from huizhen.protocol.errors import PrivacyError


@pytest.fixture
def plain(tiny_classifier, with_terms):
    """The model's study with the unit none."""
    return with_terms(tiny_classifier.study, privacy={"unit": "none"})


def train(model, examples, study, *, names=None, round=1, site="A", sigma=None):
    names = frozenset(model.shapes) if names is None else names
    return train_round(
        model, examples, study, site=site, round=round, names=names, noise_multiplier=sigma
    )


def test_a_round_without_privacy_is_bit_identical_when_it_is_repeated(
    tiny_classifier, make_site, rows, randomised, plain
):
    examples = make_site(tiny_classifier, rows)
    found: list[dict[str, np.ndarray]] = []
    for _ in range(2):
        np.random.seed(len(found))  # noqa: NPY002  # must not matter
        randomised(tiny_classifier)
        train(tiny_classifier, examples, plain)
        found.append(tiny_classifier.read(frozenset(tiny_classifier.shapes)))
    for name in found[0]:
        assert found[0][name].tobytes() == found[1][name].tobytes()


def test_another_round_site_or_seed_shuffles_otherwise(
    tiny_classifier, make_site, rows, randomised, plain, with_terms
):
    examples = make_site(tiny_classifier, rows)
    other_seed = with_terms(plain, study={"seed": 1})
    results = set()
    for study, site, round in (
        (plain, "A", 1),
        (plain, "B", 1),
        (plain, "A", 2),
        (other_seed, "A", 1),
    ):
        randomised(tiny_classifier)
        train(tiny_classifier, examples, study, site=site, round=round)
        results.add(tiny_classifier.read(["head.weight"])["head.weight"].tobytes())
    assert len(results) == 4


def test_only_the_named_tensors_change(tiny_classifier, make_site, rows, randomised, plain):
    before = randomised(tiny_classifier)
    names = frozenset(n for n in before if not n.endswith(".lora_A"))
    train(tiny_classifier, make_site(tiny_classifier, rows), plain, names=names)
    after = tiny_classifier.read(frozenset(before))
    assert {name for name in before if (after[name] != before[name]).any()} == names


def test_training_lowers_the_loss(tiny_classifier, make_site, rows, randomised, with_terms):
    examples = make_site(tiny_classifier, rows)
    study = with_terms(tiny_classifier.study, privacy={"unit": "none"}, rounds={"local_epochs": 20})
    randomised(tiny_classifier, scale=0.05)
    losses, _ = tiny_classifier.losses(examples.batch(range(len(rows))))
    report = train(tiny_classifier, examples, study)
    after, _ = tiny_classifier.losses(examples.batch(range(len(rows))))
    assert float(after.mean()) < 0.8 * float(losses.mean())
    assert float(after.mean()) < report.loss < float(losses.mean())


def test_a_report_counts_steps_and_tokens(tiny_classifier, make_site, rows, with_terms):
    study = with_terms(
        tiny_classifier.study,
        privacy={"unit": "none"},
        rounds={"local_epochs": 3, "batch_size": 8},
    )
    examples = make_site(tiny_classifier, rows)
    report = train(tiny_classifier, examples, study)
    assert report.steps == 3 * math.ceil(len(rows) / 8)
    assert report.tokens == 3 * sum(examples.lengths)


@pytest.mark.parametrize("patients", [1, 3, 8])
@pytest.mark.parametrize("rate", [1e-9, 0.5, 1.0])
def test_private_training_takes_the_agreed_steps_whatever_the_data(
    tiny_classifier, make_site, rows, with_terms, monkeypatch, patients, rate
):
    calls = []
    step = private_gradient

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return step(*args, **kwargs)

    monkeypatch.setattr(training, "private_gradient", counted)
    study = with_terms(
        tiny_classifier.study,
        privacy={"sampling_rate": rate, "records_per_patient": 3, "max_grad_norm": 0.5},
        rounds={"local_steps": 5},
    )
    few = [row for row in rows if int(row[0][1:]) < patients]
    report = train(tiny_classifier, make_site(tiny_classifier, few), study, sigma=1.7)
    assert report.steps == len(calls) == 5
    for terms in calls:
        assert terms == {
            "sampling_rate": rate,
            "max_grad_norm": 0.5,
            "noise_multiplier": 1.7,
            "records_per_patient": 3,
            "denominator": rate * 8,  # of the public size, not of the true one
        }


def test_a_private_round_is_never_the_same_twice(tiny_classifier, make_site, rows, randomised):
    examples = make_site(tiny_classifier, rows)
    found = set()
    for _ in range(2):
        randomised(tiny_classifier)
        train(tiny_classifier, examples, tiny_classifier.study, sigma=1.0)
        found.add(tiny_classifier.read(["head.weight"])["head.weight"].tobytes())
    assert len(found) == 2


def test_a_private_round_without_sigma_is_refused(tiny_classifier, make_site, rows):
    with pytest.raises(PrivacyError, match="noise multiplier"):
        train(tiny_classifier, make_site(tiny_classifier, rows), tiny_classifier.study)


def test_nothing_is_left_trainable_after_a_round_even_a_failed_one(
    tiny_classifier, make_site, rows, plain
):
    examples = make_site(tiny_classifier, rows)
    train(tiny_classifier, examples, plain)
    with pytest.raises(PrivacyError):
        train(tiny_classifier, examples, tiny_classifier.study, sigma=0.0)
    for parameter in tiny_classifier.module.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None


def test_an_optimiser_remembers_nothing_of_the_round_before(
    tiny_classifier, make_site, rows, randomised, plain
):
    examples = make_site(tiny_classifier, rows)
    randomised(tiny_classifier, seed=1)
    train(tiny_classifier, examples, plain, round=1)  # whatever was trained before
    randomised(tiny_classifier)
    train(tiny_classifier, examples, plain, round=2)
    after_another = tiny_classifier.read(["head.bias"])["head.bias"]
    randomised(tiny_classifier)
    train(tiny_classifier, examples, plain, round=2)
    assert (tiny_classifier.read(["head.bias"])["head.bias"] == after_another).all()


def test_the_cosine_schedule_falls_from_the_full_rate(plain, with_terms):
    study = with_terms(plain, rounds={"schedule": "cosine", "count": 4})
    expected = [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    assert [learning_rate(0.3, study, t) / 0.3 for t in (1, 2, 3, 4)] == pytest.approx(expected)
    assert learning_rate(0.3, plain, 9) == 0.3


def test_the_head_has_its_own_terms_only_without_privacy(tiny_classifier, plain, with_terms):
    parameters = tiny_classifier.parameters
    own = {"head_learning_rate": 0.5, "head_optimizer": "sgd"}
    for study, rates, kinds in (
        (with_terms(plain, rounds=own), [0.01, 0.5], ["AdamW", "SGD"]),
        (
            with_terms(plain, rounds=own, privacy={"unit": "patient", "learning_rate": 0.07}),
            [0.07, 0.07],
            ["SGD", "SGD"],
        ),
    ):
        optimizers = training._optimizers(parameters, study, 1)
        assert [type(optimizer).__name__ for optimizer in optimizers] == kinds
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        assert [group["lr"] for group in groups] == rates
        assert [len(group["params"]) for group in groups] == [len(parameters) - 2, 2]
        assert not any(group.get("weight_decay") for group in groups)


def test_private_steps_use_no_momentum(tiny_classifier, plain, with_terms):
    private = with_terms(plain, privacy={"unit": "patient"})
    sgd = with_terms(plain, rounds={"optimizer": "sgd"})
    momenta = [
        optimizer.param_groups[0]["momentum"]
        for study in (private, sgd)
        for optimizer in training._optimizers(tiny_classifier.parameters, study, 1)
    ]
    assert momenta == [0.0, 0.0, 0.9, 0.9]


def test_a_batchs_gradient_is_limited_to_the_agreed_norm(
    tiny_classifier, make_site, rows, randomised, with_terms
):
    """One step of SGD moves LoRA and head by the rate times a norm of at most max_norm each."""
    limit = 1e-3
    study = with_terms(
        tiny_classifier.study,
        privacy={"unit": "none"},
        rounds={"optimizer": "sgd", "max_norm": limit, "batch_size": 99, "learning_rate": 1.0},
    )
    before = randomised(tiny_classifier)
    assert train(tiny_classifier, make_site(tiny_classifier, rows), study).steps == 1
    after = tiny_classifier.read(frozenset(before))
    for head in (False, True):
        moved = [after[n] - before[n] for n in before if n.startswith("head.") == head]
        size = math.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in moved))
        assert size == pytest.approx(limit, rel=1e-2)


def test_a_step_moves_against_the_private_gradient(
    tiny_classifier, make_site, rows, randomised, with_terms, monkeypatch
):
    before = randomised(tiny_classifier)

    def ones(model, parameters, *args, **kwargs):
        import torch

        return {name: torch.ones_like(p) for name, p in parameters.items()}, math.nan

    monkeypatch.setattr(training, "private_gradient", ones)
    study = with_terms(
        tiny_classifier.study, privacy={"learning_rate": 0.25}, rounds={"local_steps": 3}
    )
    report = train(tiny_classifier, make_site(tiny_classifier, rows), study, sigma=1.0)
    assert math.isnan(report.loss)
    after = tiny_classifier.read(frozenset(before))
    for name in before:
        assert np.allclose(after[name], before[name] - 0.75, atol=1e-6)


def test_a_report_holds_numbers_alone(tiny_classifier, make_site, rows, plain):
    report = train(tiny_classifier, make_site(tiny_classifier, rows), plain)
    assert all(isinstance(value, int | float) for value in dataclasses.astuple(report))
