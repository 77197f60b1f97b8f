"""Canaries: patients of our own whose gradients nothing but the clipping bounds.

Gradient canaries as in Nasr et al. 2023, "Tight Auditing of Differentially Private Machine
Learning" (https://arxiv.org/abs/2302.07956), many at a time. Their directions are fixed, public and
exactly orthogonal, so that no canary hides another. Shape suffix: U patients.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from huizhen.client.dp_sgd import PatientBatch, PatientGradients
from huizhen.protocol.errors import ConfigError

CANARY_NORM: Final = 100.0  # in units of C: only the clipping makes it C
_ROW_NUMBERS = 1 << 24  # of canary gradients made at a time, 64 MiB

Indices = NDArray[np.intp]


class Canaries:
    """Patients whose gradients share no coordinate: canary i has the signs ±1 on coordinates i.

    Coordinates are dealt to the canaries by a public permutation, so that each canary reaches into
    many tensors.
    """

    def __init__(self, count: int, shapes: Mapping[str, tuple[int, ...]], clip: float) -> None:
        """Deal the coordinates.

        Args:
            count: m.
            shapes: of the trained tensors, by name.
            clip: C.

        Raises:
            ConfigError: there are fewer trained numbers than canaries, or fewer than two canaries.
        """
        self.shapes = dict(shapes)
        self._size = sum(math.prod(shape) for shape in shapes.values())
        if not 2 <= count <= self._size:
            raise ConfigError(
                f"{count} canaries, expected 2 to {self._size}, one for each trained number: "
                "choose another --canaries"
            )
        self.count, self._clip = count, clip
        public = np.random.default_rng(count)
        each = self._size // count
        self._places = public.permutation(self._size)[: each * count].reshape(count, each)
        self._signs = public.choice([-1.0, 1.0], (count, each)) / math.sqrt(each)

    def gradients(self, which: Indices) -> dict[str, Tensor]:
        """Return the gradients of some canaries, (U, *shape) by tensor, each of norm 100 C."""
        rows = np.zeros((len(which), self._size), np.float32)
        values = CANARY_NORM * self._clip * self._signs[which]
        np.put_along_axis(rows, self._places[which], values.astype(np.float32), axis=1)
        ends = np.cumsum([math.prod(shape) for shape in self.shapes.values()])
        parts = np.split(rows, ends[:-1], axis=1)
        return {
            name: torch.from_numpy(np.ascontiguousarray(part)).view(len(which), *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def scores(self, released: Mapping[str, Tensor]) -> NDArray[np.float64]:
        """Return ⟨g̃, u_i⟩ of each canary, shape (m,)."""
        flat = torch.cat([released[name].flatten() for name in self.shapes]).double().numpy()
        return np.asarray((flat[self._places] * self._signs).sum(axis=1))

    def batches(self, which: Indices) -> Iterator[PatientBatch]:
        """Yield the gradients of some canaries in parts that fit in memory."""
        step = max(1, _ROW_NUMBERS // self._size)
        for begin in range(0, len(which), step):
            yield PatientBatch(self.gradients(which[begin : begin + step]), [])


class WithCanaries:
    """A site's patients and, after them, the canaries whose coin came up; notes who is drawn."""

    def __init__(self, source: PatientGradients, canaries: Canaries, included: Indices) -> None:
        """Append the canaries at ``included`` to the patients of ``source``."""
        self._source, self._canaries, self._included = source, canaries, included
        self.sizes: list[int] = []
        # patients and canaries in each step
        self.counts = np.zeros(self.num_patients, np.int64)
        # steps of each patient and canary

    @property
    def num_patients(self) -> int:
        """How many patients and canaries there are to sample from."""
        return self._source.num_patients + len(self._included)

    def microbatches(self, chosen: Indices) -> Iterator[PatientBatch]:
        """Yield the gradients of the patients and canaries at ``chosen``."""
        self.sizes.append(len(chosen))
        self.counts[chosen] += 1
        real = self._source.num_patients
        yield from self._source.microbatches(chosen[chosen < real])
        yield from self._canaries.batches(self._included[chosen[chosen >= real] - real])
