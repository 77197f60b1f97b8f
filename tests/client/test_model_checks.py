"""What must not be trained privately is refused before the first step, by the name of its part."""

import dataclasses
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F  # noqa: N812  # torch's own name for it
from transformers import MixtralConfig, MixtralForCausalLM

from huizhen.client.model_checks import check_model
from huizhen.client.per_record import check_supported
from huizhen.learning.model import AdaptedModel
from huizhen.protocol.errors import ConfigError, PrivacyError

MIB = 1 << 20
PLENTY = 1024  # MiB


def between(*middle):
    return nn.Sequential(nn.Linear(4, 4), *middle)


def lora(module, target, **terms):
    return inject_adapter_in_model(LoraConfig(r=2, target_modules=[target], **terms), module)


def mixtral():
    config = MixtralConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    return lora(MixtralForCausalLM(config).eval(), "q_proj")


def shared():
    net = between(nn.Linear(4, 4))
    net[1].weight = net[0].weight
    return net


def way_of_its_own():
    return between(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))


# a net, the beginning of the names of what is trained in it, and what is said
UNSUPPORTED = {
    "frozen BatchNorm": (
        lambda: lora(between(nn.BatchNorm1d(4)), "0"),
        "0.lora_",
        "module '1' is a BatchNorm1d in training mode, it mixes the records",
    ),
    "BatchNorm without statistics": (
        lambda: lora(between(nn.BatchNorm1d(4, track_running_stats=False).eval()), "0"),
        "0.lora_",
        "module '1' is a BatchNorm1d in training mode",
    ),
    "frozen InstanceNorm": (
        lambda: lora(between(nn.InstanceNorm1d(4, affine=True)), "0"),
        "0.lora_",
        "module '1' is a InstanceNorm1d in training mode",
    ),
    "experts": (mixtral, "model.layers.0.self_attn.q_proj.lora_", "a Mixtral.* routes to experts"),
    "DoRA": (lambda: lora(between(), "0", use_dora=True), "0.lora_", "module '0' has DoRA or LoRA"),
    "LoRA on an embedding": (
        lambda: lora(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)), "0"),
        "1.",
        "module '0' has DoRA or LoRA on an embedding",
    ),
    "LoRA on a convolution": (
        lambda: lora(nn.Sequential(nn.Conv1d(4, 4, 1)), "0"),
        "0.lora_",
        "tensor '0.lora_A.default.weight' belongs to a Conv1d",
    ),
    "bfloat16": (
        lambda: between(nn.Linear(4, 4).bfloat16()),
        "1.",
        "tensor '1.weight' is torch.bfloat16, too coarse for noise",
    ),
    "LayerNorm": (lambda: between(nn.LayerNorm(4)), "1.", "'1.weight' belongs to a LayerNorm"),
    "Embedding": (lambda: between(nn.Embedding(5, 4)), "1.", "'1.weight' belongs to a Embedding"),
    "convolution": (lambda: between(nn.Conv1d(4, 4, 1)), "1.", "'1.weight' belongs to a Conv1d"),
    "recurrence": (lambda: between(nn.GRU(4, 4)), "1.", "'1.weight_ih_l0' belongs to a GRU"),
    "attention": (
        lambda: between(nn.MultiheadAttention(4, 2)),
        "1.out_proj",
        "'1.out_proj.weight' belongs to a NonDynamically",
    ),
    "normed weight": (way_of_its_own, "1.", "'1.bias' belongs to a ParametrizedLinear"),
    "shared weight": (shared, "0.weight", "tensor '0.weight' belongs to 2 layers"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_a_layer_of_which_a_records_share_cannot_be_had_is_refused_by_name(case):
    make, begin, message = UNSUPPORTED[case]
    net = make()
    parameters = {name: p for name, p in net.named_parameters() if name.startswith(begin)}
    assert parameters
    with pytest.raises(PrivacyError, match=message):
        check_supported(net, parameters)


def test_a_tensor_that_is_in_no_layer_is_refused():
    with pytest.raises(PrivacyError, match="tensor 'stray' belongs to 0 layers"):
        check_supported(between(), {"stray": nn.Parameter(torch.zeros(3))})


def test_what_is_frozen_may_be_of_any_kind():
    net = lora(between(nn.LayerNorm(4).bfloat16(), nn.BatchNorm1d(4)), "0").eval()
    parameters = {name: p for name, p in net.named_parameters() if "lora_" in name}
    layers = check_supported(net, parameters)
    assert [layer.weight for layer in layers] == list(parameters.values())


MODELS = ["tiny_classifier", "tiny_assistant", "minilm_classifier"]


@pytest.fixture(params=MODELS)
def model(request):
    return request.getfixturevalue(request.param)


def kept_bytes(model, batch):
    """Return what a forward pass keeps for the backward pass, but for the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.module.parameters()}
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model.train_only(frozenset(model.parameters))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = model.losses(batch)
    model.train_only(frozenset())
    del losses
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)


def test_the_plan_covers_what_a_microbatch_keeps(model, make_site, rows, randomised):
    randomised(model)
    examples = make_site(model, rows)
    memory = check_model(model, examples, PLENTY)
    assert memory.limit == PLENTY * MIB
    order = sorted(range(len(rows)), key=examples.lengths.__getitem__)
    for chosen in (order[-1:], order[:1], order[-4:], order[::3]):
        padded = len(chosen) * max(examples.lengths[i] for i in chosen)
        kept = kept_bytes(model, examples.batch(chosen))
        assert kept <= padded * memory.per_token
        assert kept > 0.2 * padded * memory.per_token  # and does not ask for much too much


def test_a_record_that_does_not_fit_is_refused_with_the_numbers(minilm_classifier, make_site, rows):
    examples = make_site(minilm_classifier, rows)
    found = r"a record of 23 tokens needs about \d+ MiB to train, memory_mib is 1: raise it"
    with pytest.raises(ConfigError, match=found):
        check_model(minilm_classifier, examples, 1)
    assert check_model(minilm_classifier, examples, 2).limit == 2 * MIB


def test_a_model_of_independent_records_is_accepted(model, make_site, rows, randomised):
    examples = make_site(model, rows)
    check_model(model, examples, PLENTY)
    randomised(model)
    check_model(model, examples, PLENTY)
    check_model(model, examples.take([3]), PLENTY)  # one record has no neighbour


def token_mean(model, plain, batch):
    losses, counts = plain(batch)
    return losses * counts / counts.sum()


def share_of_all(model, plain, batch):
    losses, _ = plain(batch)
    return losses * losses.detach() / losses.detach().sum()


def contrast(model, plain, batch):
    """Let every record tell its own pooled output from those of the others in its batch."""
    pooled = F.normalize(model._pool(model._features(batch.inputs, batch.mask), batch.mask), dim=1)
    own = F.cross_entropy(5 * pooled @ pooled.T, torch.arange(len(pooled)), reduction="none")
    return own + F.cross_entropy(model.module["head"](pooled), batch.labels, reduction="none")


def mean_over_the_batch(model, plain, batch):
    losses, _ = plain(batch)
    return losses / len(losses)


def test_a_coupling_that_the_first_adapter_hides_is_found(
    tiny_classifier, make_site, rows, monkeypatch
):
    """With B = 0 and an empty head all records have the same loss."""
    first = tiny_classifier.first_tensors(0)
    tiny_classifier.load(first)
    plain = tiny_classifier.losses
    wrong = lambda batch: (share_of_all(tiny_classifier, plain, batch), None)  # noqa: E731
    monkeypatch.setattr(tiny_classifier, "losses", wrong)
    with pytest.raises(PrivacyError, match="changes with its neighbour in the batch"):
        check_model(tiny_classifier, make_site(tiny_classifier, rows), PLENTY)
    for name, value in tiny_classifier.read(frozenset(first)).items():
        assert (value == first[name]).all()  # the check leaves the adapter as it was


def scaled_by_the_padding(model, plain, batch):
    """Let a record's loss grow with the longest of its batch; it is the same among equals."""
    losses, _ = plain(batch)
    return losses * batch.mask.shape[1] / 48


def moved_by_the_first(model, plain, batch):
    """Let every record but the first depend on the first."""
    losses, _ = plain(batch)
    return torch.cat([losses[:1], losses[1:] * (1 + losses[0].detach())])


def share_of_the_class(model, plain, batch):
    """Weigh a record by how many of its batch have its class, as balanced sampling would."""
    losses, _ = plain(batch)
    same = (batch.labels[:, None] == batch.labels[None, :]).float().mean(dim=1)
    return losses * same


def mean_of_larger_batches(model, plain, batch):
    losses, _ = plain(batch)
    return losses * losses.detach().mean() if len(losses) > 2 else losses


LOSSES = [
    token_mean, share_of_all, contrast, mean_over_the_batch, scaled_by_the_padding,
    moved_by_the_first, share_of_the_class, mean_of_larger_batches,
]  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_that_couples_records_is_refused(
    tiny_assistant, tiny_classifier, make_site, rows, randomised, monkeypatch, loss
):
    model = tiny_assistant if loss is token_mean else tiny_classifier
    randomised(model)
    plain = model.losses
    monkeypatch.setattr(model, "losses", lambda batch: (loss(model, plain, batch), None))
    with pytest.raises(PrivacyError, match="changes with its neighbour in the batch"):
        check_model(model, make_site(model, rows), PLENTY)
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


@pytest.fixture
def hooked(tiny_classifier, randomised):
    """A model, and the first LoRA layer whose inputs a test may change."""
    randomised(tiny_classifier)
    layers = [m for m in tiny_classifier.module.modules() if getattr(m, "lora_A", None)]
    yield tiny_classifier, layers[1]  # v_proj: the first token's q_proj changes nothing
    layers[1]._forward_pre_hooks.clear()
    layers[1]._forward_hooks.clear()


def test_a_layer_that_mixes_the_records_is_refused(hooked, make_site, rows):
    model, layer = hooked
    examples = make_site(model, rows)
    layer.register_forward_pre_hook(lambda _, args: (args[0] - args[0].mean(dim=0, keepdim=True),))
    with pytest.raises(PrivacyError, match="changes with its neighbour in the batch"):
        check_model(model, examples, PLENTY)


@pytest.mark.parametrize("tokens", [2, 48])
def test_a_layer_that_takes_tokens_for_records_is_refused(hooked, make_site, rows, tokens):
    """With as many tokens as records the numbers agree; only the gradients tell."""
    model, layer = hooked
    examples = make_site(model, rows)
    cut = {
        name: tuple(row[:tokens] for row in getattr(examples, name)) for name in ("ids", "inputs")
    }
    layer.register_forward_pre_hook(lambda _, args: (args[0].transpose(0, 1),))
    layer.register_forward_hook(lambda _, args, out: out.transpose(0, 1))
    expected = r"v_proj\.lora_\w' got 45 gradients for 1 records"
    if tokens == 2:
        expected = "neighbour|got 2 gradients for 1 records"
    with pytest.raises(PrivacyError, match=expected):
        check_model(model, dataclasses.replace(examples, **cut), PLENTY)


def test_a_bfloat16_base_of_independent_records_is_accepted(tiny, make_study, make_site, rows):
    model = AdaptedModel(tiny, make_study(base={"name": "tiny", "dtype": "bfloat16"}))
    assert model.module["base"].dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters.values())
    check_model(model, make_site(model, rows), PLENTY)


def test_nothing_is_left_trainable_and_no_gradient_is_kept(tiny_classifier, make_site, rows):
    check_model(tiny_classifier, make_site(tiny_classifier, rows), PLENTY)
    for parameter in tiny_classifier.module.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None


def test_the_check_leaves_no_graph_behind(minilm_classifier, make_site, rows, monkeypatch):
    """A tensor that its own graph holds is never freed, and with it all that the graph holds."""

    class Mark:
        pass

    marks = []
    plain = minilm_classifier.losses

    def marked(batch):
        losses, counts = plain(batch)
        nodes = [losses.grad_fn]
        for node in nodes:
            above = [n for n, _ in node.next_functions if n is not None]
            nodes += [n for n in above if "m" not in n.metadata]
            if above and "m" not in node.metadata:  # a leaf's own node lives with the leaf
                node.metadata["m"] = mark = Mark()
                marks.append(weakref.ref(mark))
        return losses, counts

    monkeypatch.setattr(minilm_classifier, "losses", marked)
    check_model(minilm_classifier, make_site(minilm_classifier, rows), 64)
    gc.collect()
    assert len(marks) > 100
    assert not any(mark() for mark in marks)
