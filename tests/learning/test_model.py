"""One base for all adapters: the cached prefix changes nothing, swapping leaves no trace."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from huizhen.learning import model as module
from huizhen.learning.bases import load_model
from huizhen.learning.lora import lora_layers
from huizhen.learning.model import AdaptedModel, pad
from huizhen.learning.models import make_model
from huizhen.protocol.errors import ConfigError
from huizhen.strategies.base import MERGED_A, MERGED_B, A, B, modules
from huizhen.strategies.ranks import cut

ENCODER = {"target_modules": ["query", "key", "value", "dense"]}


def whole(model, examples, indices):
    """Return the records at ``indices`` as a batch of token ids, with no layer computed before."""
    ids = [examples.ids[i] for i in indices]
    labels = [examples.labels[i] for i in indices]
    return pad(ids, labels, [examples.answer_starts[i] for i in indices], ids)


@pytest.mark.parametrize("name", ["encoder", "classifier", "assistant"])
def test_the_cached_prefix_gives_what_the_whole_model_gives(
    request, name, make_study, make_site, rows, randomised, tiny
):
    base = request.getfixturevalue("minilm") if name == "encoder" else tiny
    terms = (ENCODER if name == "encoder" else {}) | {"layers": 1}
    kind = "instruction" if name == "assistant" else "classification"
    model = AdaptedModel(base, make_study(kind, adapter=terms))
    randomised(model, scale=0.1)
    examples = make_site(model, rows)
    indices = list(range(len(rows)))
    assert model.has_prefix
    assert examples.inputs[0].shape == (len(examples.ids[0]), model.hidden_size)
    results = []
    for batch in (examples.batch(indices), whole(model, examples, indices)):
        parameters = model.train_only(frozenset(model.shapes))
        losses, counts = model.losses(batch)
        losses.sum().backward()
        gradients = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
        assert gradients.keys() == parameters.keys()
        results.append((losses.detach(), counts, gradients))
        model.train_only(frozenset())
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    assert torch.equal(results[0][1], results[1][1])
    for tensor in model.shapes:
        gap = (results[0][2][tensor] - results[1][2][tensor]).norm()
        assert gap <= 1e-3 * results[1][2][tensor].norm() + 1e-6, tensor
    adapted = {tensor.split("layers.")[-1][0] for tensor in model.shapes if "layers." in tensor}
    assert adapted == (set() if name == "encoder" else {"1"})


def test_the_prefix_does_not_depend_on_the_adapter(minilm_classifier, make_site, rows, randomised):
    before = make_site(minilm_classifier, rows).inputs
    randomised(minilm_classifier)
    after = make_site(minilm_classifier, rows).inputs
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_without_a_limit_every_layer_is_adapted(tiny_classifier, make_site, rows):
    assert not tiny_classifier.has_prefix
    layers = {name.split(".")[1] for name in tiny_classifier.shapes if "layers." in name}
    assert layers == {"0", "1"}
    examples = make_site(tiny_classifier, rows)
    assert all(a is b for a, b in zip(examples.inputs, examples.ids, strict=True))


@pytest.mark.parametrize("name", ["tiny_classifier", "minilm_classifier"])
def test_padding_does_not_change_a_records_scores(request, name, make_site, rows, randomised):
    model = request.getfixturevalue(name)
    randomised(model, scale=0.1)
    examples = make_site(model, [*rows, ("q", "fever " * 30, "measles")])
    together = model.logits(examples.batch(range(len(examples.ids))))
    for i in range(len(examples.ids)):
        alone = model.logits(examples.batch([i]))[0]
        assert torch.allclose(together[i], alone, rtol=1e-5, atol=1e-5)


def test_padding_does_not_change_an_answers_loss(tiny_assistant, make_site, rows, randomised):
    randomised(tiny_assistant)
    examples = make_site(tiny_assistant, [*rows, ("q", "fever " * 9, "measles")])
    together, counts = tiny_assistant.losses(examples.batch(range(len(examples.ids))))
    for i in range(len(examples.ids)):
        alone, count = tiny_assistant.losses(examples.batch([i]))
        assert torch.allclose(together[i], alone[0], rtol=1e-5, atol=1e-5)
        assert counts[i] == count[0]


def test_the_loss_covers_the_answers_tokens_alone(tiny_assistant, make_site, rows, randomised):
    randomised(tiny_assistant)
    examples = make_site(tiny_assistant, rows[:3])
    batch = examples.batch([0, 1, 2])
    losses, counts = tiny_assistant.losses(batch)
    with torch.no_grad():
        for row, i in enumerate(range(3)):
            ids, start = examples.ids[i], examples.answer_starts[i]
            logits = tiny_assistant._network(input_ids=ids[None]).logits[0].log_softmax(-1)
            terms = [-float(logits[t - 1, ids[t]]) for t in range(start, len(ids))]
            assert float(losses[row]) == pytest.approx(np.mean(terms), rel=1e-5)
            assert counts[row] == len(terms) == len(rows[i][2]) + 1
    # other targets before the answer change nothing, in it they do
    for place, same in ((2, True), (int(batch.answer_starts[0]), False)):
        targets = batch.targets.clone()
        targets[0, place] = (targets[0, place] + 1) % 250
        other, _ = tiny_assistant.losses(dataclasses.replace(batch, targets=targets))
        assert bool(torch.equal(other, losses)) is same


@pytest.mark.parametrize("name", ["tiny_classifier", "minilm_classifier"])
def test_loading_two_adapters_in_turn_leaves_no_trace(request, name, make_site, rows, randomised):
    model = request.getfixturevalue(name)
    batch = make_site(model, rows).batch(range(4))
    first = randomised(model, seed=1)
    scores = model.logits(batch)
    randomised(model, seed=2)
    assert not torch.allclose(model.logits(batch), scores, atol=1e-3)
    model.load(first)
    assert torch.equal(model.logits(batch), scores)
    for tensor, value in model.read(frozenset(first)).items():
        assert (value == first[tensor]).all()


def test_what_was_read_does_not_change_with_the_model(tiny_classifier, randomised):
    tensors = randomised(tiny_classifier)
    copies = tiny_classifier.read(["head.bias"])
    assert list(copies) == ["head.bias"]
    randomised(tiny_classifier, seed=9)
    assert (copies["head.bias"] == tensors["head.bias"]).all()


def test_names_are_paths_of_the_base_sorted_by_their_bytes(tiny_classifier, tiny_assistant):
    names = list(tiny_classifier.shapes)
    assert names == sorted(names, key=str.encode)
    assert names[0] == "head.bias"
    assert "layers.0.self_attn.q_proj.lora_A" in names
    assert "model.layers.0.self_attn.q_proj.lora_A" in tiny_assistant.shapes
    assert not any(name.startswith("head.") for name in tiny_assistant.shapes)


def test_only_the_named_tensors_get_gradients(tiny_classifier):
    wanted = frozenset({"head.bias", "layers.0.self_attn.q_proj.lora_B"})
    assert set(tiny_classifier.train_only(wanted)) == wanted
    open_ones = [p for p in tiny_classifier.module.parameters() if p.requires_grad]
    assert len(open_ones) == 2
    tiny_classifier.train_only(frozenset())
    assert not any(p.requires_grad for p in tiny_classifier.module.parameters())


def test_the_first_adapter_follows_from_the_seed(tiny, make_study, tiny_classifier):
    first = tiny_classifier.first_tensors(3)
    again = AdaptedModel(tiny, make_study()).first_tensors(3)
    other = tiny_classifier.first_tensors(4)
    for name, value in first.items():
        assert value.tobytes() == again[name].tobytes()
        assert value.dtype == np.float32
        if name.endswith(".lora_A"):
            assert (value != other[name]).any()
            assert np.abs(value).max() <= tiny_classifier.shapes[name][1] ** -0.5
        else:
            assert not value.any()


def test_the_first_head_comes_from_the_labels_texts(tiny, make_study):
    texts = ["short of breath", "seizures and tremor", "fever and rash"]
    model = AdaptedModel(tiny, make_study(task={"label_texts": texts, "head": "normalised"}))
    head = model.first_tensors(3)["head.weight"]
    model.load({name: np.ones(shape, np.float32) for name, shape in model.shapes.items()})
    assert model.first_tensors(3)["head.weight"].tobytes() == head.tobytes()
    assert np.allclose(head.mean(axis=0), 0, atol=1e-6)
    model.load(model.first_tensors(3))
    ids = [torch.tensor(model.tokenizer(text)["input_ids"]) for text in texts]
    scores = model.logits(pad(ids, [0] * 3, [0] * 3, ids))
    assert scores.argmax(dim=1).tolist() == [0, 1, 2]


def test_the_first_head_is_the_same_whatever_the_number_of_threads(tiny, make_study):
    """A coordinator and a simulation on one machine start from the same bytes."""
    texts = ["short of breath " * 20, "seizures and tremor " * 20, "fever and rash " * 20]
    study, found = make_study(task={"label_texts": texts}), set()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        try:
            found.add(AdaptedModel(tiny, study).first_tensors(3)["head.weight"].tobytes())
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    assert len(found) == 1


def test_a_normalised_head_sees_a_vector_of_the_agreed_length(tiny, make_study, make_site, rows):
    model = AdaptedModel(tiny, make_study(task={"head": "normalised", "head_scale": 7.0}))
    model.load(model.first_tensors(0))
    seen = []
    hook = model.module["head"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.logits(make_site(model, rows).batch([0, 1]))
    hook.remove()
    assert seen[0].norm(dim=1).tolist() == pytest.approx([7.0, 7.0], rel=1e-5)


def test_an_encoder_is_pooled_over_its_tokens_and_a_causal_model_at_its_last(
    tiny_classifier, minilm_classifier
):
    assert tiny_classifier.is_causal
    assert not minilm_classifier.is_causal
    hidden = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert tiny_classifier._pool(hidden, mask).tolist() == [[2, 3], [10, 11]]
    assert minilm_classifier._pool(hidden, mask).tolist() == [[1, 2], [8, 9]]


def test_an_assistant_answers_each_prompt_the_same_way_twice(tiny_assistant):
    prompts = [np.array(ids) for ids in ([40, 41], [50, 51, 52])]
    answers = tiny_assistant.generate(prompts, 5)
    assert len(answers) == 2
    assert answers == tiny_assistant.generate(prompts, 5)


@pytest.mark.parametrize(
    ("terms", "problem"),
    [
        ({"target_modules": ["query"]}, "names 'query', the base has .*q_proj"),
        ({"target_modules": ["q_proj", "proj"]}, "names 'proj'"),
        ({"rank": 17}, "rank is 17, a 'v_proj' layer is only 16 wide"),
        ({"layers": 3}, "layers is 3, the base has 2"),
    ],
)
def test_an_adapter_that_does_not_fit_the_base_is_refused(tiny, make_study, terms, problem):
    with pytest.raises(ConfigError, match=rf"^\[adapter\] .*{problem}"):
        AdaptedModel(tiny, make_study(adapter=terms))


def test_the_largest_rank_and_all_layers_fit(tiny, make_study):
    model = AdaptedModel(tiny, make_study(adapter={"rank": 16, "layers": 2}))
    assert model.shapes["layers.0.self_attn.v_proj.lora_A"] == (16, 32)
    assert not model.has_prefix


def test_modules_that_get_no_gradient_are_refused(minilm, make_study, monkeypatch):
    """A pooler stands beside the path from the tokens to the loss."""
    _, tokenizer = load_model(minilm, causal_lm=False)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    with_pooler = BertModel(config, add_pooling_layer=True).requires_grad_(False).eval()
    monkeypatch.setattr(module, "load_model", lambda base, **_: (with_pooler, tokenizer))
    with pytest.raises(ConfigError, match=r"reach 'pooler.dense', which gets no gradient"):
        AdaptedModel(minilm, make_study(adapter={"target_modules": ["query", "dense"]}))


def test_the_base_itself_never_changes(tiny_classifier, make_site, rows, randomised):
    frozen = {
        name: value.clone()
        for name, value in tiny_classifier.module.state_dict().items()
        if "lora_" not in name and not name.startswith("head.")
    }
    assert len(frozen) > 15
    randomised(tiny_classifier)
    parameters = tiny_classifier.train_only(frozenset(tiny_classifier.shapes))
    optimizer = torch.optim.AdamW(tiny_classifier.module.parameters(), lr=0.1)
    tiny_classifier.losses(make_site(tiny_classifier, rows).batch([0, 1]))[0].sum().backward()
    optimizer.step()
    tiny_classifier.train_only(frozenset())
    assert parameters
    for name, value in tiny_classifier.module.state_dict().items():
        if name in frozen:
            assert torch.equal(value, frozen[name]), name


# algorithms.md §1.6, identity 10.
@pytest.mark.parametrize("name", ["tiny_classifier", "minilm_classifier"])
def test_what_was_merged_counts_as_an_adapter_of_more_ranks(
    request, name, tiny, minilm, make_study, make_site, rows, randomised
):
    model = request.getfixturevalue(name)
    x = randomised(model, scale=0.1)
    examples = make_site(model, rows)
    rng, wide, study = np.random.default_rng(3), {}, model.study
    terms = dataclasses.replace(study.adapter, rank=study.adapter.rank + 3)
    terms = dataclasses.replace(terms, alpha=study.adapter.alpha / study.adapter.rank * terms.rank)
    merged = dict(x)
    for layer in modules(x):
        left, right = x[layer + B], x[layer + A]
        more_left = (0.1 * rng.standard_normal((left.shape[0], 3))).astype(np.float32)
        more_right = (0.1 * rng.standard_normal((3, right.shape[1]))).astype(np.float32)
        merged |= {layer + MERGED_B: more_left, layer + MERGED_A: more_right}
        wide[layer + B] = np.hstack([left, more_left])
        wide[layer + A] = np.vstack([right, more_right])
    base = tiny if name == "tiny_classifier" else minilm
    other = AdaptedModel(base, dataclasses.replace(study, adapter=terms))
    other.load({**x, **wide})
    indices = range(len(examples.ids))
    plain = model.logits(examples.batch(indices))
    model.load(merged)
    found = model.logits(examples.batch(indices))
    assert torch.allclose(found, other.logits(examples.batch(indices)), rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 1e-3
    model.load(merged)  # loading it twice merges it once
    assert torch.equal(model.logits(examples.batch(indices)), found)
    model.load({"head.bias": x["head.bias"]})  # a tensor that is no factor leaves what is merged
    assert torch.equal(model.logits(examples.batch(indices)), found)
    model.load(x)  # another adapter takes it away, to the bit
    assert torch.equal(model.logits(examples.batch(indices)), plain)


def test_a_core_between_the_factors_is_a_factor_of_the_product(
    tiny, tiny_classifier, make_study, make_site, rows, randomised
):
    model = AdaptedModel(tiny, make_study(strategy={"name": "fed_sb"}))
    x = randomised(model)
    examples = make_site(model, rows)
    cores = [name for name in x if name.endswith(".lora_R")]
    assert len(cores) == len(modules(x)) > 0
    assert {x[name].shape for name in cores} == {(2, 2)}
    folded = {
        name: x[name] @ x[name.removesuffix(B) + ".lora_R"] if name.endswith(B) else value
        for name, value in x.items()
        if name not in cores
    }
    tiny_classifier.load(folded)
    batch = examples.batch(range(len(examples.ids)))
    assert torch.allclose(model.logits(batch), tiny_classifier.logits(batch), rtol=1e-4, atol=1e-4)


def test_a_site_of_a_lower_rank_has_the_first_part_of_the_same_adapter(tiny, make_study):
    study = make_study(strategy={"name": "ffa"}, sites={"A": {"patients_public": 8, "rank": 1}})
    whole, part = make_model(study, tiny), make_model(study, tiny, site="A")
    assert part.study_shapes == whole.shapes == whole.study_shapes
    first = whole.first_tensors(3)
    assert {n: v.tobytes() for n, v in part.first_tensors(3).items()} == {
        n: v.tobytes() for n, v in first.items()
    }
    own = cut(first, part.shapes)
    for layer in modules(first):
        assert own[layer + A].tobytes() == first[layer + A][:1].tobytes()
        assert own[layer + B].shape[1] == 1
    part.load(own)
    scales = {one.scaling["default"] for one in lora_layers(part.module["base"]).values()}
    assert scales == {study.adapter.alpha / study.adapter.rank}
