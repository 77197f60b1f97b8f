"""Each record's own gradient of every trained tensor, from one backward pass.

A frozen base spends no work on the gradients of its weights. What is left for a trained linear
layer y = x Wᵀ + b is small, so its per-record gradients cost about what the sum over the batch
would (book-keeping: Bu et al. 2023, https://arxiv.org/abs/2210.00038):

    G_r = g_rᵀ x_r      shapes (out, T) · (T, in), as one batched product over the records r

LoRA's factors and the heads are such layers. An autograd function of our own gives G_r instead of
their sum. It works under activation checkpointing in both modes, since all is done in backward.
Shape suffixes: R records; T tokens.

Departure: a layer used twice in a forward pass, or sharing its weight, is refused, not summed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # torch's own name for it
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from huizhen.protocol.errors import PrivacyError


class Recorder:
    """Holds per-record gradients between a backward pass and ``take``."""

    def __init__(self, names: Mapping[int, str]) -> None:
        """Begin empty; ``names`` are the trained tensors by ``id``."""
        self._names = names
        self._gradients: dict[str, Tensor] = {}

    def add(self, parameter: Tensor, gradient_R: Tensor) -> None:
        """Keep what a layer's backward found.

        Raises:
            PrivacyError: the layer was used twice in this pass.
        """
        name = self._names[id(parameter)]
        if name in self._gradients:
            raise PrivacyError(
                f"tensor {name!r} is used twice in one pass, its records cannot be told apart: "
                "leave it out of target_modules"
            )
        self._gradients[name] = gradient_R

    def take(self, records: int) -> dict[str, Tensor]:
        """Return the gradients of the last backward pass, (R, *shape) each, and forget them.

        Raises:
            PrivacyError: a trained tensor got none, or not one for each of ``records``.
        """
        found, self._gradients = self._gradients, {}
        for name in self._names.values():
            rows = len(found[name]) if name in found else 0
            if rows != records:
                raise PrivacyError(
                    f"tensor {name!r} got {rows} gradients for {records} records: "
                    "it cannot be trained privately"
                )
        return {name: found[name] for name in self._names.values()}


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b, whose backward keeps per-record gradients instead of summing them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, recorder: Recorder
    ) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.recorder, ctx.weight, ctx.bias = recorder, weight, bias
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        gradient_R = gradient if gradient.dim() == 2 else gradient.flatten(1, -2)
        if ctx.weight.requires_grad:
            if gradient.dim() == 2:
                ctx.recorder.add(ctx.weight, gradient.unsqueeze(2) * x.unsqueeze(1))
            else:
                ctx.recorder.add(ctx.weight, gradient_R.transpose(1, 2) @ x.flatten(1, -2))
        if ctx.bias is not None and ctx.bias.requires_grad:
            ctx.recorder.add(ctx.bias, gradient if gradient.dim() == 2 else gradient_R.sum(1))
        return (gradient @ weight if ctx.needs_input_grad[0] else None), None, None, None


@contextmanager
def per_record_gradients(
    module: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> Iterator[Recorder]:
    """Let every backward pass through ``module`` record the gradients of ``parameters``.

    Inside, ``parameters`` get no ``grad``. The loss must be a sum of losses, one per record, each
    of its own record alone; the first dimension of every layer's input must run over the records.

    Args:
        module: the whole model.
        parameters: the trained tensors by name; weights and biases of ``nn.Linear`` only.

    Raises:
        PrivacyError: a module or tensor of which each record's share cannot be had, by name.
    """
    layers = check_supported(module, parameters)
    recorder = Recorder({id(parameter): name for name, parameter in parameters.items()})
    for layer in layers:
        layer.forward = partial(_forward, layer, recorder)  # type: ignore[method-assign]
    try:
        yield recorder
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: nn.Linear, recorder: Recorder, x: Tensor) -> Tensor:
    return _Linear.apply(x, layer.weight, layer.bias, recorder)  # type: ignore[no-any-return, no-untyped-call]


def check_supported(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[nn.Linear]:
    """Return the linear layers that own ``parameters``.

    Raises:
        PrivacyError: records are coupled (BatchNorm in training, even frozen; experts), the layer
            is of another kind (DoRA, LoRA on an embedding, LayerNorm), a tensor is shared, or it
            has fewer bits than float32.
    """
    wanted = {id(parameter): name for name, parameter in parameters.items()}
    owners: dict[str, list[nn.Module]] = {name: [] for name in parameters}
    for path, child in module.named_modules():
        _refuse_coupling(path, child)
        for parameter in child.parameters(recurse=False):
            if id(parameter) in wanted:
                owners[wanted[id(parameter)]].append(child)
    layers: dict[int, nn.Linear] = {}
    for name, found in owners.items():
        if parameters[name].dtype not in (torch.float32, torch.float64):
            raise PrivacyError(
                f"tensor {name!r} is {parameters[name].dtype}, too coarse for noise: "
                "keep the adapter in float32"
            )
        if len(found) != 1:
            raise PrivacyError(
                f"tensor {name!r} belongs to {len(found)} layers, each record's share of it "
                "cannot be told: train tensors of one layer"
            )
        if type(found[0]) is not nn.Linear:
            raise PrivacyError(
                f"tensor {name!r} belongs to a {type(found[0]).__name__}, only linear layers are "
                "trained privately: leave it out of target_modules"
            )
        layers[id(found[0])] = found[0]
    return list(layers.values())


def _refuse_coupling(path: str, module: nn.Module) -> None:
    """Refuse a module through which one record's gradient depends on another record."""
    kind = type(module).__name__
    if isinstance(module, _BatchNorm | _InstanceNorm) and (
        module.training or (isinstance(module, _BatchNorm) and module.running_mean is None)
    ):
        raise PrivacyError(
            f"module {path!r} is a {kind} in training mode, it mixes the records of a batch: "
            "use a base without it"
        )
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "router")
    if any(getattr(module, name, None) for name in experts):
        raise PrivacyError(
            f"module {path!r} is a {kind} that routes to experts, whose load couples the records: "
            "use a dense base"
        )
    if isinstance(module, LoraLayer) and (
        any(module.use_dora.values()) or len(module.lora_embedding_A) > 0
    ):
        raise PrivacyError(
            f"module {path!r} has DoRA or LoRA on an embedding, each record's share of which "
            "cannot be had: use LoRA on linear layers"
        )
