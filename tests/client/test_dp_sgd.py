"""One private step against loops that take one record at a time, and against the definition of DP.

Statistical bounds hold with a false-alarm rate of 1e-9.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from huizhen.client import dp_sgd
from huizhen.client.dp_sgd import clip_factors, per_record_gradients, private_gradient
from huizhen.client.training import units
from huizhen.learning.model import AdaptedModel
from huizhen.protocol.errors import PrivacyError

MODELS = ["tiny_classifier", "tiny_assistant", "minilm_classifier"]
EVERYTHING = 10**6  # a clipping norm that clips nothing


@pytest.fixture(params=MODELS)
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def examples(model, make_site, rows):
    return make_site(model, rows)


@pytest.fixture
def no_noise(monkeypatch):
    monkeypatch.setattr(dp_sgd, "normals", np.zeros)


def names_of(model, factors):
    return frozenset(n for n in model.shapes if factors == "both" or not n.endswith(".lora_A"))


def step(model, examples, names, *, records_of=None, **terms):
    """Return a step's gradient, and its mean loss, with every patient sampled by default."""
    settings = {
        "sampling_rate": 1.0,
        "max_grad_norm": 1.0,
        "noise_multiplier": 1.0,
        "records_per_patient": 99,
        "denominator": 1.0,
    }
    parameters = model.train_only(names)
    try:
        with per_record_gradients(model, parameters):
            return private_gradient(
                model,
                parameters,
                examples,
                examples.records_of() if records_of is None else records_of,
                **(settings | terms),
            )
    finally:
        model.train_only(frozenset())


def gradient_of_record(model, examples, names, i):
    """Return the slow twin's gradient: a batch of one record and plain autograd."""
    parameters = model.train_only(names)
    model.losses(examples.batch([i]))[0].sum().backward()
    found = {name: p.grad.detach().double().clone() for name, p in parameters.items()}
    model.train_only(frozenset())
    return found


def gradient_of_patient(model, examples, names, records):
    each = [gradient_of_record(model, examples, names, i) for i in records]
    return {name: sum(one[name] for one in each) / len(each) for name in each[0]}


def norm(tensors):
    return float(torch.sqrt(sum(value.double().pow(2).sum() for value in tensors.values())))


def distance(found, expected):
    """Return the relative distance of two gradients, over all tensors together."""
    assert found.keys() == expected.keys()
    return norm({n: found[n].double() - expected[n].double() for n in found}) / norm(expected)


@pytest.mark.parametrize("factors", ["both", "B only"])
@pytest.mark.parametrize("name", ["tiny_classifier", "tiny_assistant"])
def test_per_record_gradients_equal_those_of_each_record_alone(
    request, name, make_site, rows, randomised, factors
):
    model = request.getfixturevalue(name)
    randomised(model, scale=0.1)
    compare_with_loop(model, make_site(model, rows), factors, relative=2e-6)  # float32


@pytest.mark.parametrize("factors", ["both", "B only"])
def test_per_record_gradients_of_an_encoder_equal_those_of_each_record_alone(
    minilm, make_study, make_site, rows, randomised, factors
):
    terms = {"layers": 1, "target_modules": ["query", "key", "value", "dense"]}
    model = AdaptedModel(minilm, make_study(adapter=terms))
    randomised(model)
    examples = make_site(model, rows)
    model.module.double()
    exact = replace(examples, inputs=tuple(row.double() for row in examples.inputs))
    compare_with_loop(model, exact, factors, relative=1e-9)


def compare_with_loop(model, examples, factors, *, relative):
    names = names_of(model, factors)
    parameters = model.train_only(names)
    chosen = [0, 3, 5, 9, 14]
    with per_record_gradients(model, parameters):
        model.losses(examples.batch(chosen))[0].sum().backward()
        found = {name: p.grad_sample.clone() for name, p in parameters.items()}
    for row, i in enumerate(chosen):
        alone = gradient_of_record(model, examples, names, i)
        assert distance({name: found[name][row] for name in found}, alone) < relative


@pytest.mark.parametrize("factors", ["both", "B only"])
def test_a_step_sums_the_means_over_each_patients_records(
    model, examples, randomised, no_noise, factors
):
    randomised(model, scale=0.1)
    names = names_of(model, factors)
    found, _ = step(model, examples, names, max_grad_norm=EVERYTHING, denominator=3.2)
    expected = {name: torch.zeros(model.shapes[name]).double() for name in sorted(names)}
    for records in examples.records_of():
        for name, value in gradient_of_patient(model, examples, names, records).items():
            expected[name] += value / 3.2
    assert distance(found, expected) < 1e-4


@pytest.mark.parametrize("clipping", [0.37, "auto"])
def test_each_patient_enters_with_the_clipped_gradient(
    tiny_classifier, make_site, rows, randomised, no_noise, clipping
):
    model, names = tiny_classifier, names_of(tiny_classifier, "both")
    examples = make_site(model, rows)
    randomised(model)
    for records in examples.records_of():
        found, _ = step(model, examples, names, records_of=[records], max_grad_norm=clipping)
        whole = gradient_of_patient(model, examples, names, records)
        size = norm(whole)
        factor = 1 / (size + 0.01) if clipping == "auto" else min(1, clipping / size)
        assert distance(found, {name: factor * value for name, value in whole.items()}) < 1e-5


def test_the_size_of_a_microbatch_does_not_change_the_step(
    tiny_classifier, make_site, rows, randomised, no_noise, monkeypatch
):
    model, names = tiny_classifier, names_of(tiny_classifier, "both")
    examples = make_site(model, rows)
    randomised(model)
    whole, loss = step(model, examples, names)
    monkeypatch.setattr(dp_sgd, "_MICROBATCH_TOKENS", 1)
    split, loss_split = step(model, examples, names)
    assert distance(split, whole) < 1e-5
    assert loss == pytest.approx(loss_split, rel=1e-5)


def test_at_most_k_records_make_a_patients_gradient(
    tiny_classifier, make_site, randomised, no_noise
):
    model, names = tiny_classifier, names_of(tiny_classifier, "both")
    texts = ("cough", "fever and rash", "seizure", "ataxia, tremor")
    examples = make_site(model, [("p", text, "measles") for text in texts])
    randomised(model)
    (records,) = examples.records_of()
    single = [gradient_of_record(model, examples, names, i) for i in records]
    seen = set()
    for _ in range(40):  # each record stays out of all draws with (3/4)⁴⁰ < 1.1e-5
        found, _ = step(
            model,
            examples,
            names,
            records_of=[records],
            records_per_patient=1,
            max_grad_norm=EVERYTHING,
        )
        seen.add(int(np.argmin([distance(found, one) for one in single])))
        assert min(distance(found, one) for one in single) < 1e-5
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("clipping", [0.5, 3.0, "auto"])
def test_clip_factors_bound_every_norm_by_c(seed, clipping):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-6, 6, 40)
    gradients = {
        "a": torch.randn(40, 3, 5, generator=generator) * scales[:, None, None],
        "b": torch.randn(40, 7, generator=generator) * scales[:, None],
    }
    factors = clip_factors(gradients, clipping)
    whole = torch.cat([g.flatten(1) for g in gradients.values()], dim=1).double()
    norms = (factors.double()[:, None] * whole).norm(dim=1)
    bound = 1.0 if clipping == "auto" else clipping
    assert norms.max() <= bound * (1 + 1e-6)
    before = whole.norm(dim=1)
    if clipping != "auto":
        assert (factors[before < bound * 0.999] == 1).all()
        assert norms[before > bound].min() > bound * (1 - 1e-5)  # and clipped no further
    else:
        assert torch.allclose(norms, before / (before + 0.01), rtol=1e-5)


@pytest.mark.parametrize("clipping", [1.0, "auto"])
def test_a_zero_gradient_stays_zero(clipping):
    gradients = {"a": torch.zeros(2, 3)}
    factors = clip_factors(gradients, clipping)
    assert torch.isfinite(factors).all()
    assert not (factors[:, None] * gradients["a"]).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("clipping", [1.0, "auto"])
def test_a_gradient_that_is_not_finite_is_refused(value, clipping):
    gradients = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 4)}
    gradients["b"][1, 2] = value
    with pytest.raises(PrivacyError, match="not finite"):
        clip_factors(gradients, clipping)


def test_a_step_with_a_weight_that_is_not_finite_is_refused(tiny_classifier, make_site, rows):
    model = tiny_classifier
    examples = make_site(model, rows)
    model.load({name: np.zeros(shape, np.float32) for name, shape in model.shapes.items()})
    broken = np.full(model.shapes["head.weight"], np.inf, np.float32)
    model.load({"head.weight": broken})
    with pytest.raises(PrivacyError, match="not finite"):
        step(model, examples, names_of(model, "B only"))


LONG = "seizure tremor ataxia " * 40


@pytest.mark.parametrize("clipping", [0.25, "auto"])
@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("others", [1, 99], ids=["to one", "to eight"])
def test_adding_one_patient_moves_the_sum_by_at_most_c(
    model, make_site, rows, randomised, no_noise, clipping, scale, others
):
    """Neighbouring data: a patient with four records, one of them very long, comes or goes."""
    randomised(model, scale=scale)
    names = names_of(model, "both")
    odd = [("new", text, "measles") for text in (LONG, "x", "fever rash", LONG[:60])]
    larger = make_site(model, [*rows[:others], *odd])
    smaller = make_site(model, rows[:others])
    bound = 1.0 if clipping == "auto" else clipping
    denominator = 6.4  # public: the same with and without the patient
    terms = {"max_grad_norm": clipping, "denominator": denominator}
    joined, _ = step(model, larger, names, **terms)
    without, _ = step(model, smaller, names, **terms)
    moved = denominator * norm({n: joined[n] - without[n] for n in names})
    assert moved <= bound * (1 + 1e-4)
    assert moved > 0.1 * bound  # and the patient counts


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


@pytest.mark.parametrize(("clipping", "bound"), [(0.7, 0.7), ("auto", 1.0)])
@pytest.mark.parametrize("denominator", [1.0, 25.0])
def test_the_noise_has_the_variance_that_was_calibrated(
    minilm_classifier, make_site, rows, clipping, bound, denominator
):
    """Σz²/(σC/B̄)² ~ χ²_n. A right σ fails once in 10⁹; with n > 10,000 one wrong by 10 % fails."""
    model, sigma = minilm_classifier, 1.3
    examples = make_site(model, rows[:1])
    noise, loss = step(
        model,
        examples,
        names_of(model, "both"),
        records_of=[],
        noise_multiplier=sigma,
        max_grad_norm=clipping,
        denominator=denominator,
    )
    assert np.isnan(loss)
    z = np.concatenate([value.double().numpy().ravel() for value in noise.values()])
    z *= denominator / (sigma * bound)
    assert len(z) > 10_000
    low, high = chi2.ppf([5e-10, 1 - 5e-10], len(z))
    assert low < (z**2).sum() < high


def test_every_trained_tensor_gets_noise_even_if_nobody_was_sampled(
    tiny_classifier, make_site, rows
):
    model = tiny_classifier
    examples = make_site(model, rows)
    names = names_of(model, "both")
    noise, _ = step(model, examples, names, sampling_rate=1e-12)
    assert noise.keys() == names
    for name, value in noise.items():
        assert value.shape == model.shapes[name]
        assert value.ne(0).all()


def test_the_noise_is_added_to_a_full_batch_too(tiny_classifier, make_site, rows, randomised):
    model, sigma = tiny_classifier, 50.0
    randomised(model)
    names = names_of(model, "both")
    noisy, _ = step(model, make_site(model, rows), names, noise_multiplier=sigma)
    # eight patients' clipped gradients are nothing beside noise of this size
    z = np.concatenate([value.double().numpy().ravel() for value in noisy.values()]) / sigma
    low, high = chi2.ppf([5e-10, 1 - 5e-10], len(z))
    assert low * 0.9 < (z**2).sum() < high * 1.1


def test_the_noise_of_a_second_call_is_another(tiny_classifier, make_site, rows):
    examples = make_site(tiny_classifier, rows)
    names = names_of(tiny_classifier, "both")
    torch.manual_seed(3)
    first, _ = step(tiny_classifier, examples, names, records_of=[])
    torch.manual_seed(3)
    second, _ = step(tiny_classifier, examples, names, records_of=[])
    for name in names:
        assert not np.isin(first[name].numpy(), second[name].numpy()).any()


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_a_step_without_noise_is_refused(tiny_classifier, make_site, rows, sigma):
    examples = make_site(tiny_classifier, rows)
    with pytest.raises(PrivacyError, match="noise multiplier"):
        step(tiny_classifier, examples, names_of(tiny_classifier, "both"), noise_multiplier=sigma)


def test_a_tensor_without_gradients_per_record_is_refused(tiny_classifier, make_site, rows):
    model = tiny_classifier
    examples = make_site(model, rows)
    parameters = dict(model.train_only(names_of(model, "both")))
    with per_record_gradients(model, parameters):
        parameters["stray"] = torch.nn.Parameter(torch.zeros(3))
        with pytest.raises(PrivacyError, match="'stray' has no gradient per record"):
            private_gradient(
                model,
                parameters,
                examples,
                examples.records_of(),
                sampling_rate=1.0,
                max_grad_norm=1.0,
                noise_multiplier=1.0,
                records_per_patient=4,
                denominator=1.0,
            )
    model.train_only(frozenset())


def test_the_model_is_as_before_when_a_step_is_over(tiny_classifier, make_site, rows):
    model = tiny_classifier
    examples = make_site(model, rows)
    before = model.logits(examples.batch(range(4)))
    step(model, examples, names_of(model, "both"))
    assert torch.equal(model.logits(examples.batch(range(4))), before)
    assert not any(module.training for module in model.module.modules())
    assert not any(getattr(m, "activations", None) for m in model.module.modules())
