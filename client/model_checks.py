"""What a site checks of a model before it trains it privately: once, and before the ledger pays.

Opacus' validator passes frozen BatchNorm and cannot see what a loss or a router does; here one
record's gradient is taken beside two different neighbours and must stay the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from huizhen.client.examples import Examples
from huizhen.client.per_record import Recorder, per_record_gradients
from huizhen.learning.trainable import Model
from huizhen.protocol.errors import ConfigError, PrivacyError

# Relative change of a gradient that rounding alone may make, by the dtype of the base. Seen were up
# to 2e-4 (smollm2, alone against in a batch) and 7e-3: other shapes add up in another order.
_COUPLING = {"float32": 1e-3, "bfloat16": 2e-2}
_MIB = 1 << 20
_NEIGHBOURS = 4  # records of other classes that stand beside a record in the check


@dataclass(frozen=True, slots=True)
class Memory:
    """What a microbatch may take, and what a padded token of it takes; both in bytes."""

    limit: int
    per_token: float


def check_model(model: Model, examples: Examples, memory_mib: int) -> Memory:
    """Return the memory plan of a site whose records this model can be trained on privately.

    Args:
        model: with any adapter loaded.
        examples: the site's records.
        memory_mib: bound on a microbatch's activations and gradients, in MiB.

    Raises:
        PrivacyError: a layer is of a kind that is not trained privately, or a record's gradient
            depends on another record.
        ConfigError: the longest record alone does not fit in the memory.
    """
    parameters = model.train_only(frozenset(model.parameters))
    loaded = model.read(frozenset(model.parameters))
    generator = np.random.default_rng(0)  # B = 0 and an empty head would hide a coupling
    try:
        model.load(
            {
                name: 0.02 * generator.standard_normal(shape, np.float32)
                for name, shape in model.shapes.items()
            }
        )
        with per_record_gradients(model.module, parameters) as recorder:
            per_token = _bytes_per_token(model, examples)
            longest = max(examples.lengths)
            rows = 2 * 4 * sum(parameter.numel() for parameter in parameters.values())
            needed = (per_token * longest + rows) / _MIB
            if needed > memory_mib:
                raise ConfigError(
                    f"a record of {longest} tokens needs about {needed:.0f} MiB to train, "
                    f"memory_mib is {memory_mib}: raise it or lower [task] max_tokens"
                )
            _refuse_coupling(model, examples, parameters, recorder)
    finally:
        model.load(loaded)
        model.train_only(frozenset())
    return Memory(memory_mib * _MIB, per_token)


def _bytes_per_token(model: Model, examples: Examples) -> float:
    """Return the bytes that a token of the longest record keeps for the backward pass, doubled.

    As much again is allowed for what the passes hold for a moment.
    """
    longest = int(np.argmax(examples.lengths))
    kept = _kept_bytes(model, examples, longest)
    if model.checkpointing:  # beside the layers' inputs, one layer at a time is run again
        with model.without_checkpointing():
            kept += _kept_bytes(model, examples, longest) / model.adapted_layers
    return 2 * kept / examples.lengths[longest]


def _kept_bytes(model: Model, examples: Examples, record: int) -> float:
    """Return what a forward pass over a record keeps for the backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in model.module.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> None:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            kept[place] = tensor.detach()  # alive, so that its place is not taken by another, and
            # detached: a tensor that is held by a graph that it holds would never be freed

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.losses(examples.batch([record]))
    return float(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))


def _refuse_coupling(
    model: Model,
    examples: Examples,
    parameters: Mapping[str, nn.Parameter],
    recorder: Recorder,
) -> None:
    """Refuse a model in which a record's gradient changes with what stands beside it.

    The longest and the shortest record are each taken alone and then beside themselves, beside each
    other and beside records of other classes, first in the batch and last: padding, places, the
    size of a batch and what it is made of must all say nothing.
    """
    order = [int(i) for i in np.argsort(examples.lengths, kind="stable")]
    longest, shortest = order[-1], order[0]
    classes = list({examples.labels[i]: i for i in order}.values())[:_NEIGHBOURS]
    for one, other in ((longest, shortest), (shortest, longest)):
        more = [other, *classes]
        alone = _gradient_at(model, examples, recorder, [one], 0)
        size = sum(float(grad.square().sum()) for grad in alone.values())
        for batch, at in (
            ([one, one], 1),
            ([one, other], 0),
            ([other, one], 1),
            ([one, *more], 0),
            ([*more, one], len(more)),
        ):
            found = _gradient_at(model, examples, recorder, batch, at)
            change = sum(float((alone[name] - found[name]).square().sum()) for name in parameters)
            _refuse_change(model, change, size)


def _gradient_at(
    model: Model, examples: Examples, recorder: Recorder, batch: list[int], at: int
) -> dict[str, Tensor]:
    """Return the gradient of the record at one place of a batch."""
    losses, _ = model.losses(examples.batch(batch))
    losses.sum().backward()  # type: ignore[no-untyped-call]  # torch's
    return {name: grad[at] for name, grad in recorder.take(len(batch)).items()}


def _refuse_change(model: Model, change: float, size: float) -> None:
    base = model.study.base
    if not change <= _COUPLING[base.dtype if base else "float32"] ** 2 * size:
        raise PrivacyError(
            "a record's gradient changes with its neighbour in the batch: this model cannot be "
            "trained privately"
        )
