"""A round of training: public and repeatable without privacy, of fixed length with it."""

import contextlib
import dataclasses
import math
import threading

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import nn

from huizhen.client import private_steps, training
from huizhen.client.dp_sgd import private_gradient
from huizhen.client.model_checks import Memory
from huizhen.client.patient_gradients import ModelGradients
from huizhen.client.randomness import NoiseSource
from huizhen.client.training import Protection, train_round, units
from huizhen.client.turn import Turn
from huizhen.protocol.errors import PrivacyError
from huizhen.protocol.mechanism import Mechanism
from huizhen.protocol.strategy_terms import StrategyTerms

MEMORY = Memory(limit=1 << 30, per_token=1e4)


@pytest.fixture
def plain(tiny_classifier, with_terms):
    """The model's study with the unit none."""
    return with_terms(tiny_classifier.study, privacy={"unit": "none"})


def train(model, examples, study, *, names=None, round=1, site="A", sigma=None):
    names = frozenset(model.shapes) if names is None else names
    protection = None if sigma is None else Protection(sigma, MEMORY)
    return train_round(
        model, examples, study, site=site, round=round, names=names, protection=protection
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


def test_a_report_counts_steps(tiny_classifier, make_site, rows, with_terms):
    study = with_terms(
        tiny_classifier.study,
        privacy={"unit": "none"},
        rounds={"local_epochs": 3, "batch_size": 8},
    )
    examples = make_site(tiny_classifier, rows)
    report = train(tiny_classifier, examples, study)
    assert report.steps == 3 * math.ceil(len(rows) / 8)


@pytest.mark.parametrize("patients", [1, 3, 8])
@pytest.mark.parametrize("rate", [0.01, 0.5, 1.0])
def test_private_training_takes_the_agreed_steps_whatever_the_data(
    tiny_classifier, make_site, rows, with_terms, monkeypatch, patients, rate
):
    calls, sources = [], []
    step = private_gradient

    def counted(source, shapes, *, noise, **kwargs):
        calls.append((source.num_patients, noise, kwargs))
        return step(source, shapes, noise=noise, **kwargs)

    def noted(*args, **kwargs):
        sources.append(kwargs)
        return ModelGradients(*args, **kwargs)

    monkeypatch.setattr(private_steps, "private_gradient", counted)
    monkeypatch.setattr(private_steps, "ModelGradients", noted)
    study = with_terms(
        tiny_classifier.study,
        privacy={
            "sampling_rate": rate,
            "records_per_patient": 3,
            "max_grad_norm": 0.5,
            "batch_cap": 20,
        },
        rounds={"local_steps": 5},
    )
    few = [row for row in rows if int(row[0][1:]) < patients]
    report = train(tiny_classifier, make_site(tiny_classifier, few), study, sigma=1.7)
    assert report.steps == len(calls) == 5
    assert sources == [{"records_per_patient": 3, "memory": MEMORY}]
    for own, _, terms in calls:
        assert own == patients
        assert terms == {
            "sampling_rate": rate,
            "max_grad_norm": 0.5,
            "noise_multiplier": 1.7,
            "denominator": rate * 8,  # of the public size, not of the true one
            "batch_cap": 20,
        }
    (noise,) = {noise for _, noise, _ in calls}
    with pytest.raises(IndexError):
        noise.draw()  # as many draws as steps


@pytest.mark.parametrize("unit", ["patient", "record"])
@pytest.mark.parametrize("clipping", [0.3, "auto"])
def test_a_private_round_is_the_slow_twins_but_for_its_noise(
    tiny_classifier, make_site, rows, randomised, with_terms, monkeypatch, unit, clipping
):
    """Without noise and with everyone sampled, against one record after the other."""
    draw = NoiseSource.draw
    monkeypatch.setattr(NoiseSource, "draw", lambda self: np.zeros_like(draw(self)))
    model, names = tiny_classifier, sorted(tiny_classifier.shapes)
    before = randomised(model)
    examples = make_site(model, rows)
    study = with_terms(
        model.study,
        privacy={
            "unit": unit,
            "sampling_rate": 1.0,
            "max_grad_norm": clipping,
            "learning_rate": 0.7,
        },
        rounds={"local_steps": 1},
    )
    parameters = model.train_only(frozenset(names))
    total = torch.zeros(sum(p.numel() for p in parameters.values()), dtype=torch.float64)
    for records in [[i] for i in range(len(rows))] if unit == "record" else examples.records_of():
        each = []
        for i in records:
            loss = model.losses(examples.batch([i]))[0].sum()
            grads = torch.autograd.grad(loss, list(parameters.values()))
            each.append(torch.cat([grad.double().flatten() for grad in grads]))
        own = torch.stack(each).mean(0)
        bound = own.norm() + 0.01 if clipping == "auto" else max(own.norm() / clipping, 0.999)
        total += 0.999 * own / bound
    report = train(model, examples, study, sigma=1.7)
    after = model.read(frozenset(names))
    moved = np.concatenate([(after[n] - before[n]).astype(np.float64).ravel() for n in parameters])
    expected = -0.7 * total.numpy() / 8
    assert np.linalg.norm(moved - expected) < 1e-5 * np.linalg.norm(expected)  # the grid's
    assert report.steps == 1


def test_one_unit_is_one_record_where_the_study_says_so(
    tiny_classifier, make_site, rows, with_terms
):
    examples = make_site(tiny_classifier, rows)
    by_record = with_terms(tiny_classifier.study, privacy={"unit": "record"})
    by_patient = with_terms(tiny_classifier.study, privacy={"unit": "patient"})
    assert [u.tolist() for u in units(examples, by_record)] == [[i] for i in range(len(rows))]
    assert len(units(examples, by_patient)) == 8
    assert sorted(i for u in units(examples, by_patient) for i in u) == list(range(len(rows)))
    for own in units(examples, by_patient):
        assert len({rows[i][0] for i in own}) == 1


def test_a_private_round_is_never_the_same_twice(
    tiny_classifier, make_site, rows, randomised, with_terms, monkeypatch
):
    """With all records of everyone in the step only the noise is left to chance."""
    model, examples = tiny_classifier, make_site(tiny_classifier, rows)
    most = max(map(len, examples.records_of()))
    study = with_terms(
        model.study,
        privacy={"sampling_rate": 1.0, "records_per_patient": most, "learning_rate": 0.7},
        rounds={"local_steps": 1},
    )
    sigma = Mechanism.of(study).noise_multiplier

    def trained():
        randomised(model)
        train(model, examples, study, sigma=sigma)
        after = model.read(frozenset(model.shapes))
        return np.concatenate([value.astype(np.float64).ravel() for value in after.values()])

    first, second = trained(), trained()
    draw = NoiseSource.draw
    monkeypatch.setattr(NoiseSource, "draw", lambda self: np.zeros_like(draw(self)))
    silent = trained()
    assert (trained() == silent).all()
    assert (first != second).mean() > 0.99
    # (x - silent) · 8 / (0.7 · σ · C) is standard normal: Σz² ~ χ²_n, off once in 10⁹ runs.
    low, high = chi2.ppf([5e-10, 1 - 5e-10], len(silent))
    for found in (first, second):
        assert low < (((found - silent) * 8 / (0.7 * sigma)) ** 2).sum() < high


def test_a_private_round_without_protection_is_refused(tiny_classifier, make_site, rows):
    with pytest.raises(PrivacyError, match="training needs its noise multiplier"):
        train(tiny_classifier, make_site(tiny_classifier, rows), tiny_classifier.study)


def test_a_private_round_with_less_noise_than_the_study_asks_is_refused(
    tiny_classifier, make_site, rows, randomised
):
    before = randomised(tiny_classifier)
    study, examples = tiny_classifier.study, make_site(tiny_classifier, rows)
    sigma = Mechanism.of(study).noise_multiplier
    with pytest.raises(PrivacyError, match=f"the study's is {sigma}: nothing was trained"):
        train(tiny_classifier, examples, study, sigma=sigma * 0.999)
    after = tiny_classifier.read(frozenset(before))
    assert all((after[name] == before[name]).all() for name in before)
    train(tiny_classifier, examples, study, sigma=sigma)


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
    assert not any(thread.name.startswith("noise") for thread in threading.enumerate())


def test_the_model_is_as_before_when_a_private_round_is_over(tiny_classifier, make_site, rows):
    model = tiny_classifier
    examples = make_site(model, rows)
    before = model.read(frozenset(model.shapes))
    logits = model.logits(examples.batch(range(4)))
    train(model, examples, model.study, sigma=1.0)
    model.load(before)
    assert torch.equal(model.logits(examples.batch(range(4))), logits)
    assert not any(module.training for module in model.module.modules())
    linears = [m for m in model.module.modules() if type(m) is torch.nn.Linear]
    assert not any("forward" in vars(linear) for linear in linears)


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
    terms = {"learning_rate": 0.3, "head_learning_rate": None}
    study = with_terms(plain, rounds={"schedule": "cosine", "count": 4, **terms})
    expected = [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    for head in (False, True):
        found = [study.learning_rate(t, head=head) / 0.3 for t in (1, 2, 3, 4)]
        assert found == pytest.approx(expected)
    assert with_terms(plain, rounds=terms).learning_rate(9, head=False) == 0.3


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

    def ones(source, shapes, **kwargs):
        return {name: torch.ones(shape) for name, shape in shapes.items()}, math.nan

    monkeypatch.setattr(private_steps, "private_gradient", ones)
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


@pytest.mark.parametrize("scale", [1e-9, 0.3, 1.0, 7.0, 1e9])
def test_the_limit_of_the_norm_is_torchs_own_to_the_bit(scale):
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(shape, generator=generator) for shape in ((4, 7), (9,), (1, 1))]
    found, expected = ([nn.Parameter(t.clone()) for t in tensors] for _ in range(2))
    for parameters in (found, expected):
        for parameter in parameters:
            parameter.grad = scale * parameter.detach() / 6.1
    training._limit(torch.optim.SGD(found, lr=1), 1.0)
    nn.utils.clip_grad_norm_(expected, 1.0)
    for one, other in zip(found, expected, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_fedprox_adds_its_pull_to_the_gradient_of_each_step(
    tiny_classifier, make_site, rows, randomised, plain, with_terms, monkeypatch
):
    """One step of SGD: θ_t − η(g + μ·0); from the second on the pull is μ(θ − θ_t)."""
    terms = {"optimizer": "sgd", "learning_rate": 0.1, "batch_size": 5, "max_norm": None}
    study = with_terms(plain, rounds=terms)
    pulled = dataclasses.replace(study, strategy=StrategyTerms(name="fedprox", mu=0.5))
    examples, pulls = make_site(tiny_classifier, rows), []
    own = Turn.__call__

    def watched(turn):
        name = "head.weight"
        before = turn.parameters[name].grad.clone()
        own(turn)
        away = turn.parameters[name].detach() - (turn.start[name] if turn.mu else 0)
        pulls.append((turn.mu, away.clone(), turn.parameters[name].grad - before))

    monkeypatch.setattr(Turn, "__call__", watched)
    for one in (study, pulled):
        randomised(tiny_classifier)
        train(tiny_classifier, examples, one)
    steps = len(pulls) // 2
    assert steps > 2
    for mu, _, added in pulls[:steps]:
        assert not mu
        assert not added.any()
    assert not pulls[steps][1].any()
    for mu, away, added in pulls[steps:]:
        assert mu == 0.5
        assert torch.allclose(added, 0.5 * away, rtol=1e-4, atol=1e-6)
    assert pulls[-1][2].abs().max() > 1e-4


def test_a_strong_pull_keeps_the_model_where_it_was(
    tiny_classifier, make_site, rows, randomised, plain, with_terms
):
    terms = {"optimizer": "sgd", "learning_rate": 0.02, "local_epochs": 4}
    study, moved = with_terms(plain, rounds=terms), []
    for mu in (0.0, 5.0):
        before = randomised(tiny_classifier)
        one = dataclasses.replace(study, strategy=StrategyTerms(name="fedprox", mu=mu))
        train(tiny_classifier, make_site(tiny_classifier, rows), one)
        after = tiny_classifier.read(frozenset(before))
        moved.append(math.sqrt(sum(float(((after[n] - before[n]) ** 2).sum()) for n in before)))
    assert moved[1] < 0.5 * moved[0]


def test_under_privacy_the_pull_is_added_after_the_noise_and_reads_no_record(
    tiny_classifier, make_site, rows, randomised, with_terms, monkeypatch
):
    study = dataclasses.replace(
        tiny_classifier.study, strategy=StrategyTerms(name="fedprox", mu=0.5)
    )
    order = []
    own_steps, own_turn = private_steps.private_steps, Turn.__call__

    @contextlib.contextmanager
    def steps(*args, **kwargs):
        with own_steps(*args, **kwargs) as step:

            def watched():
                order.append("noise")
                return step()

            yield watched

    def pull(turn):
        order.append("pull")
        assert turn.start.keys() == turn.parameters.keys()
        own_turn(turn)

    monkeypatch.setattr(training, "private_steps", steps)
    monkeypatch.setattr(Turn, "__call__", pull)
    randomised(tiny_classifier)
    train(
        tiny_classifier, make_site(tiny_classifier, rows), study,
        sigma=Mechanism.of(study).noise_multiplier,
    )  # fmt: skip
    assert order == ["noise", "pull"] * study.rounds.local_steps
