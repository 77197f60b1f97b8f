"""What every trained model has, whatever it reads: named tensors to load, to train and to read."""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from huizhen.learning.tasks import Encoder
from huizhen.protocol.adapter import Shapes, Tensors
from huizhen.protocol.study import Study


@dataclass(frozen=True, slots=True)
class Batch:
    """Records of like length, padded on the right.

    ``inputs`` are token ids (B, T), outputs of the frozen layers (B, T, H) or features (B, F);
    ``mask`` (B, T) is 1 on tokens; ``labels`` (B,); ``answer_starts`` (B,); ``targets`` (B, T) are
    the ids again, (B, 0) where the task has no answers.
    """

    inputs: Tensor
    mask: Tensor
    labels: Tensor
    answer_starts: Tensor
    targets: Tensor


class Model(ABC):
    """A study's model in one process; all sites of a simulation share it and swap what is loaded.

    Attributes:
        study: whose model it is.
        kind: of its task.
        module: all layers, the frozen ones too.
        parameters: what is trained, by the names of the protocol and in its order.
        checkpointing: whether to keep only each layer's input for the backward pass and run the
            layer again in it.
        model_seconds: time spent in forward and backward passes and in generating.
    """

    def __init__(
        self, study: Study, module: nn.ModuleDict, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Take the layers; nothing of them is trained before ``train_only``."""
        self.study = study
        self.kind = study.task.kind
        self.module = module
        self.parameters = {n: parameters[n] for n in sorted(parameters, key=str.encode)}
        self.checkpointing = False
        self.model_seconds = 0.0
        for parameter in module.parameters():
            parameter.requires_grad_(False)

    @property
    @abstractmethod
    def adapted_layers(self) -> int:
        """How many layers are trained or lie above one that is."""

    @abstractmethod
    def encoder(self) -> Encoder:
        """Return what turns a record's fields into what the model reads."""

    @abstractmethod
    def first_tensors(self, seed: int) -> dict[str, NDArray[Any]]:
        """Return what the study starts from; it holds nothing private."""

    @abstractmethod
    def prefix(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """Return what the frozen layers give for each record; ``ids`` when there are none."""

    @abstractmethod
    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return each record's loss (B,), by its own terms alone, and its number of terms (B,).

        No record's loss depends on another record of the batch, but for the rounding of float32.
        """

    @abstractmethod
    def logits(self, batch: Batch) -> Tensor:
        """Return the class scores of each record, (B, labels)."""

    @property
    def shapes(self) -> Shapes:
        """The shape of each tensor, in order."""
        return {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}

    @property
    def study_shapes(self) -> Shapes:
        """The shape of each tensor in the study; a site may train a lower rank of it."""
        return self.shapes

    def load(self, tensors: Tensors) -> None:
        """Copy all tensors, or some, into the model."""
        with torch.no_grad():
            for name, value in tensors.items():
                self.parameters[name].copy_(torch.from_numpy(np.array(value)))

    def read(self, names: Sequence[str] | frozenset[str]) -> dict[str, NDArray[Any]]:
        """Return copies of the named tensors."""
        return {
            name: parameter.detach().numpy().copy()
            for name, parameter in self.parameters.items()
            if name in names
        }

    def train_only(self, names: frozenset[str]) -> dict[str, nn.Parameter]:
        """Let only the named tensors get gradients; return them."""
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in names)
            parameter.grad = None
        return {name: self.parameters[name] for name in self.parameters if name in names}

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time inside as the model's own."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.model_seconds += time.perf_counter() - begin

    @contextlib.contextmanager
    def without_checkpointing(self) -> Iterator[None]:
        """Keep all that the backward pass needs, inside."""
        before, self.checkpointing = self.checkpointing, False
        try:
            yield
        finally:
            self.checkpointing = before
