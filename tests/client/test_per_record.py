"""Each record's gradient against plain autograd on the same graph, one record's loss at a time.

Both sides of a comparison run in float64, where the order of a sum is worth about 1e-15 of it; the
float32 of a real base is compared in test_patient_gradients.
"""

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleModule
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F  # noqa: N812  # torch's own name for it
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from huizhen.client.per_record import per_record_gradients
from huizhen.protocol.errors import PrivacyError

EXACT = 1e-9  # of a record's norm
CLASSES = 3


class Block(nn.Module):
    """A frozen base of two layers with dropout between them, behind a checkpoint when asked."""

    def __init__(self, width, bias, dropout):
        super().__init__()
        self.first = nn.Linear(width, width + 1, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(width + 1, width, bias=bias)
        self.reentrant: bool | None = None

    def run(self, x):
        return x + self.second(self.dropout(torch.tanh(self.first(x))))

    def forward(self, x):
        if self.reentrant is None:
            return self.run(x)
        return checkpoint(self.run, x, use_reentrant=self.reentrant)


class Net(nn.Module):
    """A base, the mean over what stands between records and features, and a head."""

    def __init__(self, base, width):
        super().__init__()
        self.base = base
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        hidden = self.base(x)
        return self.head(hidden if x.dim() == 2 else hidden.flatten(1, -2).mean(1))


def adapt(module, targets, **terms):
    """Put LoRA on a module, every tensor of it random, in float64 and in training mode."""
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, **terms)
    return scatter(inject_adapter_in_model(config, module))


def scatter(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().train()


def trained(module, wanted):
    """Freeze all but the tensors whose names ``wanted`` takes; return those."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(wanted(name))
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def by_loop(parameters, loss_R):
    """Return the slow twin's gradients, (R, *shape): a backward pass for each record."""
    rows = [
        torch.autograd.grad(loss, list(parameters.values()), retain_graph=True) for loss in loss_R
    ]
    return {
        name: torch.stack(of) for name, of in zip(parameters, zip(*rows, strict=True), strict=True)
    }


def in_one_pass(module, parameters, losses):
    with per_record_gradients(module, parameters) as recorder:
        loss_R = losses()
        loss_R.sum().backward()
        found = recorder.take(len(loss_R))
    assert all(parameter.grad is None for parameter in parameters.values())
    return found


def distance(found, expected):
    """Return the greatest distance of a record's gradients, relative to the norm of its own."""
    assert list(found) == list(expected)
    for name in found:
        assert found[name].shape == expected[name].shape
    apart_R = sum((found[name] - expected[name]).flatten(1).square().sum(1) for name in found)
    norm_R = sum(grad.flatten(1).square().sum(1) for grad in expected.values())
    assert not apart_R[norm_R == 0].any()
    return float((apart_R / norm_R).nan_to_num().max().sqrt())


KINDS: dict[str, dict[str, Any] | None] = {
    "linear": None,
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "LoRA with bias": {"lora_bias": True},
    "LoRA with dropout": {"lora_dropout": 0.4},
}
FACTORS = {
    "both": lambda name: "lora_" in name,
    "A": lambda name: "lora_A" in name,
    "B": lambda name: "lora_B" in name,
    "none": lambda name: False,
}


@settings(max_examples=150)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    factors=st.sampled_from(sorted(FACTORS)),
    head=st.booleans(),
    bias=st.booleans(),
    dropout=st.sampled_from([0.0, 0.3]),
    reentrant=st.sampled_from([None, True, False]),
    between=st.lists(st.integers(1, 5), max_size=2),
    records=st.integers(1, 6),
    width=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_every_records_gradient_is_that_of_its_own_loss(
    kind, factors, head, bias, dropout, reentrant, between, records, width, seed
):
    torch.manual_seed(seed)
    base = Block(width, bias or kind == "LoRA with bias", dropout)
    terms = KINDS[kind]
    lora = terms is not None
    net = Net(adapt(base, ["first", "second"], **(terms or {})) if lora else base, width)
    scatter(net)
    own = FACTORS[factors] if lora else (lambda name: name.startswith("base."))
    head = head or (lora and factors == "none")
    parameters = trained(net, lambda name: own(name) or (head and name.startswith("head.")))
    x = torch.randn(records, *between, width, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(CLASSES, (records,))
    weight_R = torch.rand(records).double() + 0.1

    def losses():
        torch.manual_seed(seed + 1)  # the same dropout in every forward pass
        return weight_R * F.cross_entropy(net(x), labels, reduction="none")

    expected = by_loop(parameters, losses())
    base.reentrant = reentrant
    assert distance(in_one_pass(net, parameters, losses), expected) < EXACT


SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


class Encoder(nn.Module):
    """An encoder with LoRA and a head that classifies records."""

    def __init__(self):
        super().__init__()
        config = BertConfig(**SIZES, hidden_dropout_prob=0.1)
        base = BertModel(config, add_pooling_layer=False)
        self.base = adapt(base, ["query", "value", "dense"], lora_dropout=0.2)
        self.head = nn.Linear(SIZES["hidden_size"], CLASSES).double()

    def forward(self, ids, mask):
        hidden = self.base(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(2).double()
        scores = self.head((hidden * weights).sum(1) / weights.sum(1))
        return F.cross_entropy(scores, ids[:, 0] % CLASSES, reduction="none")


class Causal(nn.Module):
    """A causal language model with LoRA that learns the records' own tokens."""

    def __init__(self):
        super().__init__()
        config = LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False, attention_dropout=0.1)
        targets = ["q_proj", "v_proj", "down_proj"]
        self.base = adapt(LlamaForCausalLM(config), targets, lora_dropout=0.2)

    def forward(self, ids, mask):
        scores = self.base(input_ids=ids, attention_mask=mask).logits[:, :-1]
        terms = F.cross_entropy(scores.transpose(1, 2), ids[:, 1:], reduction="none")
        return (terms * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)


@pytest.fixture(params=[Encoder, Causal])
def network(request):
    torch.manual_seed(1)
    return request.param()


def losses_of(network):
    """Return the losses of five records of different lengths, always under the same dropout."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(40, (5, 9), generator=generator)
    lengths = torch.tensor([9, 2, 5, 9, 3])
    torch.manual_seed(7)
    return network(ids, (torch.arange(9)[None, :] < lengths[:, None]).long())


def wanted(name):
    return "lora_" in name or name.startswith("head.")


# the first layer reads frozen outputs: torch says that its hook has no input to differentiate by
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_the_gradients_are_those_of_opacus_hooks(network):
    parameters = trained(network, wanted)
    found = in_one_pass(network, parameters, lambda: losses_of(network))
    losses_of(GradSampleModule(network, loss_reduction="sum")).sum().backward()
    samples = {name: parameter.grad_sample for name, parameter in parameters.items()}
    assert distance(found, samples) < EXACT


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_checkpointing_of_transformers_changes_nothing(network, reentrant):
    parameters = trained(network, wanted)
    expected = by_loop(parameters, losses_of(network))
    if reentrant is not None:
        network.base.activation_checkpointing_enable({"use_reentrant": reentrant})
        network.base.enable_input_require_grads()
        assert network.base.is_activation_checkpointing
    found = in_one_pass(network, parameters, lambda: losses_of(network))
    assert distance(found, expected) < EXACT


def two_layers():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, CLASSES))


def of_last(name):
    return name.startswith("1.")


def test_batchnorm_that_no_longer_looks_at_its_batch_is_let_in():
    net = adapt(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), ["0"]).eval()
    x = torch.randn(6, 4, dtype=torch.float64)
    parameters = trained(net, wanted)
    expected = by_loop(parameters, net(x).square().sum(1))
    found = in_one_pass(net, parameters, lambda: net(x).square().sum(1))
    assert distance(found, expected) < EXACT


def attempt(forward, x, records):
    """Take the gradients of ``records`` from a pass in which the last layer is trained."""
    net = two_layers()
    parameters = trained(net, of_last)
    with per_record_gradients(net, parameters) as recorder:
        forward(net, x).square().sum().backward()
        return recorder.take(records)


def test_a_layer_that_is_used_twice_is_refused():
    def twice(net, x):
        return net(x) + net(2 * x)

    with pytest.raises(PrivacyError, match=r"tensor '1\.\w+' is used twice in one pass"):
        attempt(twice, torch.ones(5, 4), 5)


def test_a_layer_whose_first_dimension_runs_over_tokens_is_refused():
    def flattened(net, x):
        return net(x.flatten(0, 1))

    def tokens_first(net, x):
        return net(x.transpose(0, 1))

    x = torch.ones(5, 7, 4)
    with pytest.raises(PrivacyError, match="got 35 gradients for 5 records"):
        attempt(flattened, x, 5)
    with pytest.raises(PrivacyError, match="got 7 gradients for 5 records"):
        attempt(tokens_first, x, 5)
    assert attempt(lambda net, x: net(x), x, 5)["1.weight"].shape == (5, CLASSES, 4)


def test_a_tensor_that_gets_no_gradient_is_refused_by_name():
    with pytest.raises(PrivacyError, match=r"'1\.weight' got 0 gradients for 5 records"):
        attempt(lambda net, x: net[0](x).requires_grad_(), torch.ones(5, 4), 5)


def test_a_second_take_gives_nothing_of_the_pass_before():
    net = two_layers()
    with per_record_gradients(net, trained(net, of_last)) as recorder:
        net(torch.ones(5, 4)).sum().backward()
        recorder.take(5)
        with pytest.raises(PrivacyError, match="got 0 gradients for 5 records"):
            recorder.take(5)


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_the_module_is_as_before_afterwards_whatever_happened(error):
    net = two_layers()
    parameters = trained(net, of_last)
    x = torch.ones(5, 4)
    before = net(x)
    with contextlib.suppress(RuntimeError), per_record_gradients(net, parameters):
        assert torch.equal(net(x), before)
        if error is not None:
            raise error
    assert not any("forward" in vars(module) for module in net.modules())
    net(x).sum().backward()
    assert all(parameter.grad is not None for parameter in parameters.values())
