"""A frozen base model with one LoRA adapter and a head that can be swapped in place.

All sites of a simulation share one ``AdaptedModel``: loading another adapter copies a few hundred
kilobytes, the base stays. The layers below the first adapted one never change, so what they give is
computed once per record (``prefix``) and only the layers above run in training.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # torch's own name for it
from torch.utils.checkpoint import checkpoint

from huizhen.learning.bases import Base, load_model
from huizhen.learning.batching import sorted_batches
from huizhen.learning.lora import (
    Merged,
    add_cores,
    attach,
    first_adapted_layer,
    layer_list,
    looks_causal,
    lora_layers,
    lora_parameters,
    of_rank,
)
from huizhen.learning.tasks import TaskEncoder
from huizhen.learning.trainable import Batch, Model
from huizhen.protocol.adapter import Shapes, Tensors, is_head
from huizhen.protocol.errors import ConfigError
from huizhen.protocol.study import Study
from huizhen.strategies.base import MERGED_A, MERGED_B
from huizhen.strategies.public_random import uniform
from huizhen.strategies.ranks import at_rank

IdRow = np.ndarray[tuple[int], np.dtype[np.int64]]
_EVALUATION_TOKENS = 4096  # padded tokens in a batch that needs no gradient


class _ReachedBoundaryError(Exception):
    """Stops the forward pass where the frozen layers end."""


class AdaptedModel(Model):
    """The base, the adapter's parameters by their names in the protocol, and the task's head."""

    def __init__(self, base: Base, study: Study, *, rank: int | None = None) -> None:
        """Load the base and attach an adapter of a rank, the study's when None.

        Raises:
            ConfigError: the target modules do not exist or get no gradient, the rank is larger than
                a layer, or more layers are to be adapted than there are.
        """
        if study.base is None or study.adapter is None:
            raise ConfigError("study has no [base] or no [adapter]: add the section")
        kind = study.task.kind
        model, self.tokenizer = load_model(
            base, causal_lm=kind == "instruction", dtype=study.base.dtype
        )
        self.base = base
        model.config.use_cache = False  # a layer that is run again would fill the cache twice
        self._network: Any = model
        _check_length(model, study)
        self._layers = layer_list(model)
        self._boundary = first_adapted_layer(study.adapter, len(self._layers))
        self._bypass = False
        self.is_causal = kind == "instruction" or looks_causal(model, self.tokenizer)
        adapted = attach(model, of_rank(study.adapter, rank))
        if study.strategy.name == "fed_sb":
            add_cores(adapted)
        self._merged = Merged(lora_layers(adapted))
        self.hidden_size = int(model.config.hidden_size)
        module = nn.ModuleDict({"base": adapted})
        if kind == "classification":
            module["head"] = nn.Linear(self.hidden_size, max(1, len(study.task.labels)))
        module.eval()  # no dropout: the same record always gives the same gradient
        super().__init__(study, module, _named_parameters(module))
        self._install_bypass()
        for layer in self._layers[self._boundary :]:
            layer.forward = self._checkpointed(layer.forward)
        self._refuse_modules_without_gradient()
        self._refuse_wrong_prefix()

    @property
    def study_shapes(self) -> Shapes:
        """The shape of each tensor at the study's rank."""
        terms = self.study.adapter
        return at_rank(self.shapes, None if terms is None else terms.rank)

    @property
    def adapted_layers(self) -> int:
        """How many layers have an adapter or lie above one that has."""
        return len(self._layers) - self._boundary

    @property
    def has_prefix(self) -> bool:
        """Whether some layers lie below the first adapted one."""
        return self._boundary > 0

    def load(self, tensors: Tensors) -> None:
        """Copy all tensors, or some, into the model, with what was merged into the base."""
        self._merged.load(tensors)
        super().load({n: t for n, t in tensors.items() if not n.endswith((MERGED_A, MERGED_B))})

    def encoder(self) -> TaskEncoder:
        """Return what turns a record's fields into token ids."""
        return TaskEncoder(self.study.task, self.tokenizer)

    def first_tensors(self, seed: int) -> dict[str, np.ndarray[Any, Any]]:
        """Return the study's first adapter: A as in Hu et al. 2021, B = 0, a head from label texts.

        It holds nothing private: A is of the public seed, the head of the public label texts.
        A is the same everywhere; the head may differ in its last bits between processors.
        """
        first: dict[str, np.ndarray[Any, Any]] = {}
        for name, shape in self.study_shapes.items():
            if name.endswith(".lora_A"):
                first[name] = uniform(seed, name, shape, 1 / math.sqrt(shape[1]))
            else:
                first[name] = np.zeros(shape, np.float32)
        if self.study.task.label_texts:
            first["head.weight"] = self._head_from_texts.copy()
        return first

    @functools.cached_property
    def _head_from_texts(self) -> np.ndarray[Any, Any]:
        """The bare base's view of the label texts, the same for every seed: B = 0 hides A.

        On one thread, so that all parties on like processors start from the same bytes: how sums
        are split among threads changes their last bits.
        """
        self.load(
            {n: np.zeros(s, np.float32) for n, s in self.shapes.items() if n.endswith(".lora_B")}
        )
        ids = [np.asarray(self.tokenizer(t)["input_ids"]) for t in self.study.task.label_texts]
        rows = [torch.from_numpy(row[: self.study.task.max_tokens]) for row in ids]
        with torch.no_grad(), one_thread():
            pooled = [self._pool(self._features(b.inputs, b.mask), b.mask) for b in _singles(rows)]
            weight = F.normalize(torch.cat(pooled).float(), dim=1)
        return (weight - weight.mean(dim=0)).numpy()

    def prefix(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """Return what the frozen layers give for each record, (T_i, H); ids when there are none."""
        if not self.has_prefix:
            return list(ids)
        found: list[Tensor] = [torch.empty(0)] * len(ids)
        for indices in sorted_batches([len(row) for row in ids], _EVALUATION_TOKENS):
            rows = [ids[i] for i in indices]
            batch = pad(rows, [0] * len(rows), [0] * len(rows), rows)
            hidden = self._run_to_boundary(batch)
            for row, i in enumerate(indices):
                found[i] = hidden[row, : len(ids[i])].clone()
        return found

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return each record's loss (B,), by its own tokens alone, and its number of terms (B,).

        No record's loss depends on another record of the batch, but for the rounding of float32.
        """
        hidden = self._features(batch.inputs, batch.mask)
        if self.kind == "classification":
            logits = self._classify(hidden, batch.mask)
            smoothing = self.study.task.label_smoothing
            losses = F.cross_entropy(
                logits, batch.labels, reduction="none", label_smoothing=smoothing
            )
            return losses, torch.ones(len(logits))
        places = torch.arange(batch.mask.shape[1] - 1)[None, :] + 1
        answers = (places >= batch.answer_starts[:, None]) & (batch.mask[:, 1:] > 0)
        rows, columns = answers.nonzero(as_tuple=True)
        # of the answer's tokens alone
        logits = self._network.lm_head(hidden[rows, columns]).float()
        terms = F.cross_entropy(logits, batch.targets[rows, columns + 1], reduction="none")
        counts = answers.sum(dim=1)
        sums = torch.zeros(len(counts)).index_add(0, rows, terms)
        return sums / counts.clamp(min=1), counts

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Return the class scores of each record, (B, labels)."""
        return self._classify(self._features(batch.inputs, batch.mask), batch.mask)

    @torch.no_grad()
    def generate(self, prompts: Sequence[IdRow], max_new_tokens: int) -> list[str]:
        """Return the model's greedy answer to each prompt, given as token ids (T_i,)."""
        answers = []
        with self.timed():
            for prompt in prompts:
                ids = torch.from_numpy(prompt)[None, :]
                whole = self._network.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
                text = self.tokenizer.decode(whole[0, len(prompt) :], skip_special_tokens=True)
                answers.append(text.strip())
        return answers

    def _features(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """Return the last layer's outputs (B, T, H)."""
        core = self._network.base_model if self.kind == "instruction" else self._network
        if not inputs.is_floating_point():
            return core(input_ids=inputs, attention_mask=mask).last_hidden_state  # type: ignore[no-any-return]
        self._bypass = True
        try:
            return core(inputs_embeds=inputs, attention_mask=mask).last_hidden_state  # type: ignore[no-any-return]
        finally:
            self._bypass = False

    def _pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return one vector per record, (B, H): an encoder's mean, a causal LM's last token."""
        if self.is_causal:
            last = mask.sum(dim=1) - 1
            return hidden[torch.arange(len(hidden)), last]
        weights = mask.unsqueeze(2).to(hidden.dtype)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)

    def _classify(self, hidden: Tensor, mask: Tensor) -> Tensor:
        pooled = self._pool(hidden, mask).float()
        if self.study.task.head == "normalised":
            pooled = self.study.task.head_scale * F.normalize(pooled, dim=1)
        return self.module["head"](pooled)  # type: ignore[no-any-return]

    def _install_bypass(self) -> None:
        """Let the frozen layers pass their input on while ``_bypass`` is set."""
        if not self.has_prefix:
            return
        for layer in self._layers[: self._boundary]:
            layer.forward = self._bypassed(layer.forward, "hidden_states")
        embeddings = getattr(self._network, "embeddings", None)
        if embeddings is not None:  # BERT-likes add positions to inputs_embeds; the prefix has them
            embeddings.forward = self._bypassed(embeddings.forward, "inputs_embeds")

    def _bypassed(self, forward: Any, name: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self._bypass:
                return forward(*args, **kwargs)
            return kwargs[name] if name in kwargs else args[0]

        return run

    def _checkpointed(self, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.checkpointing and torch.is_grad_enabled():
                return checkpoint(forward, *args, use_reentrant=False, **kwargs)
            return forward(*args, **kwargs)

        return run

    @torch.no_grad()
    def _run_to_boundary(self, batch: Batch) -> Tensor:
        caught: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
            raise _ReachedBoundaryError

        hook = self._layers[self._boundary].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._features(batch.inputs, batch.mask)
        except _ReachedBoundaryError:
            return caught[0]
        finally:
            hook.remove()
        raise ConfigError("the base does not run its layers in order: leave out [adapter] layers")

    def _refuse_modules_without_gradient(self) -> None:
        ids = torch.tensor([self.tokenizer("a b c")["input_ids"]])
        batch = Batch(
            ids, torch.ones_like(ids), torch.zeros(1, dtype=torch.long), torch.ones(1), ids
        )
        self.train_only(frozenset(self.parameters))
        self.losses(batch)[0].sum().backward()  # type: ignore[no-untyped-call]  # torch's
        for name, parameter in self.parameters.items():
            if parameter.grad is None and not is_head(name):
                raise ConfigError(
                    f"[adapter] target_modules reach {name.rsplit('.', 1)[0]!r}, which gets no "
                    "gradient in this task: name only modules that the task uses"
                )
        self.train_only(frozenset())

    @torch.no_grad()
    def _refuse_wrong_prefix(self) -> None:
        """Refuse a base that changes ``inputs_embeds`` on their way to the first adapted layer."""
        if not self.has_prefix:
            return
        ids = torch.tensor(self.tokenizer("one two three four")["input_ids"])
        whole, cached = (pad([row], [0], [0], [ids]) for row in (ids, self.prefix([ids])[0]))
        features = [self._features(batch.inputs, batch.mask) for batch in (whole, cached)]
        if not torch.allclose(features[0], features[1], rtol=1e-3, atol=1e-3):
            raise ConfigError(
                f"the base {self.base.name!r} cannot go on from the outputs of its frozen layers: "
                "leave out [adapter] layers"
            )


def _check_length(model: Any, study: Study) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and study.task.max_tokens > limit:
        raise ConfigError(
            f"[task] max_tokens is {study.task.max_tokens}, the base reads {limit}: lower it"
        )


def _named_parameters(module: nn.ModuleDict) -> dict[str, nn.Parameter]:
    found = lora_parameters(module["base"])
    if "head" in module:
        found |= {f"head.{name}": one for name, one in module["head"].named_parameters()}
    return found


def pad(
    inputs: Sequence[Tensor], labels: Sequence[int], starts: Sequence[int], ids: Sequence[Tensor]
) -> Batch:
    """Return records as one batch, padded on the right with zeros; ``ids`` may be left empty."""
    lengths = torch.tensor([len(row) for row in inputs])
    padded = nn.utils.rnn.pad_sequence(list(inputs), batch_first=True)
    mask = (torch.arange(padded.shape[1])[None, :] < lengths[:, None]).long()
    targets = nn.utils.rnn.pad_sequence(list(ids), batch_first=True) if ids else mask[:, :0]
    return Batch(padded, mask, torch.tensor(labels), torch.tensor(starts), targets)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _singles(rows: Sequence[Tensor]) -> Iterator[Batch]:
    for row in rows:
        yield pad([row], [0], [0], [row])
