"""Putting LoRA into a base model: which layers, which modules, and what cannot be."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from huizhen.protocol.adapter import Tensors
from huizhen.protocol.errors import ConfigError
from huizhen.protocol.study_terms import AdapterTerms
from huizhen.strategies.base import CORE, MERGED_A, MERGED_B, A, B


def layer_list(model: Any) -> Sequence[nn.Module]:
    """Return the base's transformer layers, first to last."""
    count = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ConfigError(f"the base {type(model).__name__} has no list of {count} layers")


def first_adapted_layer(terms: AdapterTerms, layers: int) -> int:
    """Return the first of ``layers`` layers that gets an adapter.

    Raises:
        ConfigError: more layers are to be adapted than there are.
    """
    if terms.layers is None:
        return 0
    if terms.layers > layers:
        raise ConfigError(f"[adapter] layers is {terms.layers}, the base has {layers}")
    return layers - terms.layers


def of_rank(terms: AdapterTerms, rank: int | None) -> AdapterTerms:
    """Return the terms at another rank and the same scale s = alpha / rank."""
    if rank is None or rank == terms.rank:
        return terms
    return replace(terms, rank=rank, alpha=terms.alpha * rank / terms.rank)


def attach(model: Any, terms: AdapterTerms) -> nn.Module:
    """Return the base with LoRA factors in its target modules; the adapter is float32.

    Raises:
        ConfigError: a target module does not exist or is narrower than the rank.
    """
    _check_targets(model, terms)
    config = LoraConfig(
        r=terms.rank,
        lora_alpha=terms.alpha,
        target_modules=_targets(model, terms),
        lora_dropout=0.0,
        bias="none",
    )
    with warnings.catch_warnings():
        # PEFT 0.21 asks for a name that transformers 5 is about to drop
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config)  # type: ignore[no-any-return]


def _targets(model: Any, terms: AdapterTerms) -> list[str]:
    """Return the target modules; where some layers only are adapted, by their full names.

    PEFT's ``layers_to_transform`` finds no layer whose name begins with ``layers.``.
    """
    if terms.layers is None:
        return list(terms.target_modules)
    adapted = layer_list(model)[-terms.layers :]
    inside = {id(module) for layer in adapted for module in layer.modules()}
    found = [
        name
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, nn.Linear)
        if any(name == target or name.endswith(f".{target}") for target in terms.target_modules)
    ]
    if not found:
        raise ConfigError(
            f"[adapter] target_modules names {', '.join(terms.target_modules)}, the last "
            f"{terms.layers} layers have none of them: leave out layers"
        )
    return found


def _check_targets(model: Any, terms: AdapterTerms) -> None:
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    ends = {name.rsplit(".", 1)[-1] for name in linears}
    for target in terms.target_modules:
        hits = [m for name, m in linears.items() if name == target or name.endswith(f".{target}")]
        if not hits:
            raise ConfigError(
                f"[adapter] target_modules names {target!r}, the base has "
                f"{', '.join(sorted(ends))}: name some of these"
            )
        if model.get_output_embeddings() in hits:
            raise ConfigError(
                f"[adapter] target_modules names {target!r}, the language model's head, which "
                "reads the answers' tokens alone: name layers below it"
            )
        narrow = min(min(module.weight.shape) for module in hits)
        if terms.rank > narrow:
            raise ConfigError(
                f"[adapter] rank is {terms.rank}, a {target!r} layer is only "
                f"{narrow} wide: lower it"
            )


@torch.no_grad()
def looks_causal(model: Any, tokenizer: Any) -> bool:
    """Whether a token's output ignores the tokens after it."""
    ids = torch.tensor([tokenizer("one two three four")["input_ids"]])
    other = ids.clone()
    other[0, -1] = ids[0, 0]
    first = [model(input_ids=x).last_hidden_state[0, 0] for x in (ids, other)]
    return bool(torch.allclose(first[0], first[1], atol=1e-5))


def lora_layers(adapted: nn.Module) -> dict[str, LoraLinear]:
    """Return the adapted layers by their modules' names in the protocol."""
    return {
        path.removeprefix("base_model.model."): layer
        for path, layer in adapted.named_modules()
        if isinstance(layer, LoraLinear)
    }


def add_cores(adapted: nn.Module) -> None:
    """Put an r × r matrix between the factors of each layer, ΔW = s·B·R·A, as Fed-SB trains it."""
    for layer in lora_layers(adapted).values():
        left = layer.lora_B["default"]
        rank = left.weight.shape[1]
        core = nn.Linear(rank, rank, bias=False)
        layer.lora_B["default"] = nn.Sequential(core, left)


def lora_parameters(adapted: nn.Module) -> dict[str, nn.Parameter]:
    """Return the factors, and what lies between them, by their names in the protocol."""
    found: dict[str, nn.Parameter] = {}
    for module, layer in lora_layers(adapted).items():
        found[module + A] = _weight(layer.lora_A["default"])
        outer = layer.lora_B["default"]
        if isinstance(outer, nn.Sequential):
            found[module + CORE], outer = _weight(outer[0]), outer[1]
        found[module + B] = _weight(outer)
    return found


def _weight(layer: nn.Module) -> nn.Parameter:
    return cast(nn.Parameter, layer.weight)


class Merged:
    """What a strategy has merged into the base's layers, W = W_0 + s·merged_B·merged_A.

    The base's own weights are kept, so that another adapter can be loaded after this one, in any
    order, with the same result.
    """

    def __init__(self, layers: Mapping[str, LoraLinear]) -> None:
        """Begin with nothing merged."""
        self._layers = layers
        self._own: dict[str, Tensor] = {}

    @torch.no_grad()
    def load(self, tensors: Tensors) -> None:
        """Take the merged pairs of those layers whose factors are among the tensors.

        The base is float32: a study that merges into a coarser one is refused when it is read.
        """
        for module, layer in self._layers.items():
            if not any(module + end in tensors for end in (A, B, MERGED_B)):
                continue
            weight = layer.get_base_layer().weight
            left, right = tensors.get(module + MERGED_B), tensors.get(module + MERGED_A)
            if left is None or right is None:
                if module in self._own:
                    weight.copy_(self._own.pop(module))
                continue
            if module not in self._own:
                self._own[module] = weight.detach().clone()
            product = torch.tensor(left) @ torch.tensor(right)
            weight.copy_(self._own[module] + layer.scaling["default"] * product)
