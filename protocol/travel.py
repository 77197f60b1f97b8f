"""How the numbers of an update travel: fewer bits each, or only some of them.

    float32   as they are
    float16   rounded to the nearest of IEEE 754 binary16: half the bytes
    int8      a row of a matrix, or a column where it is taller than wide (one rank of A or B), as a
              scale s = max|v| / 127 and integers ⌊v / s + u⌋ with u uniform in [0, 1), so that
              their mean is v (stochastic rounding; Alistarh et al. 2017, QSGD,
              https://arxiv.org/abs/1610.02132): a quarter of the bytes, off by at most s
    share     of the numbers, by a mask of the round that all sites have in common: what it leaves
              out is not sent and stays as it is at the coordinator (the random mask of Konečný et
              al. 2016, https://arxiv.org/abs/1610.05492)

Mask and u come from the study's public seed, so whoever holds the study knows both, the sums stay
sums, and a repeated round has the same bytes. Under DP all of it works on the noised update alone:
post-processing, which costs no privacy. Announced adapters are never rounded: every site and the
coordinator hold the same one, to the bit.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from huizhen.protocol.adapter import MAX_VALUE, Array, Shapes, Tensors, shapes_of
from huizhen.protocol.errors import WireError
from huizhen.protocol.public_bits import public_words

Dtype = Literal["float32", "float16", "int8"]
Stored = NDArray[np.float32] | NDArray[np.float16] | NDArray[np.int8]

SCALE = ".scale"
_MOST = 127
_HALF_MOST = 65504.0
_LEAST = 1e-30
# a row of smaller values travels as zeros: their scale would have few bits
_STORED: dict[str, tuple[str, str]] = {  # NumPy's name, safetensors' name
    "float32": ("<f4", "F32"),
    "float16": ("<f2", "F16"),
    "int8": ("i1", "I8"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Travel:
    """The terms of one round's updates."""

    dtype: Dtype = "float32"
    share: float = 1.0
    # of the numbers that are sent
    seed: int = 0
    # the study's
    round: int = 1

    @property
    def is_plain(self) -> bool:
        """Whether the numbers travel as they are, all of them."""
        return self.dtype == "float32" and self.share == 1

    @property
    def most(self) -> float:
        """The largest value that travels."""
        return _HALF_MOST if self.dtype == "float16" else MAX_VALUE

    def cut(self, tensors: Tensors) -> Tensors:
        """Return an update with values over what travels cut off."""
        return {name: np.clip(value, -self.most, self.most) for name, value in tensors.items()}

    def mask(self, name: str, size: int) -> NDArray[np.bool_] | None:
        """Return which of a tensor's numbers travel, in the order of its bytes; None for all."""
        if self.share == 1:
            return None
        words = public_words(self.seed, f"mask/{self.round}/{name}", size)
        found: NDArray[np.bool_] = words < math.ceil(self.share * 2**16)
        return found

    def layout(self, shapes: Shapes) -> dict[str, tuple[str, str, tuple[int, ...]]]:
        """Return what is stored for tensors of these shapes: NumPy's type, safetensors', shape."""
        found: dict[str, tuple[str, str, tuple[int, ...]]] = {}
        for name, shape in shapes.items():
            mask = self.mask(name, math.prod(shape))
            stored = tuple(shape) if mask is None else (int(mask.sum()),)
            found[name] = (*_STORED[self.dtype], stored)
            if self.dtype == "int8":
                found[name + SCALE] = (*_STORED["float32"], _scales(shape))
        return found

    def arrived(self, tensors: Tensors, site: str) -> Tensors:
        """Return an update as the coordinator reads it.

        Raises:
            WireError: as ``stored``.
        """
        if self.is_plain:
            return tensors
        return self.tensors(self.stored(tensors, site), shapes_of(tensors))

    def stored(self, tensors: Tensors, site: str) -> dict[str, Stored]:
        """Return the arrays that ``layout`` names.

        Args:
            tensors: the update.
            site: whose it is; each rounds by its own u, so that their errors do not add up.

        Raises:
            WireError: a value is over what the type holds.
        """
        found: dict[str, Stored] = {}
        for name, value in tensors.items():
            mask = self.mask(name, value.size)
            whole: Stored
            if self.dtype == "int8":
                found[name + SCALE], whole = self._rounded(name, value, mask, site)
            elif self.dtype == "float16":
                whole = _halved(name, value)
            else:
                whole = value
            found[name] = whole if mask is None else whole.reshape(-1)[mask]
        return found

    def tensors(self, stored: dict[str, Stored], shapes: Shapes) -> dict[str, Array]:
        """Return the float32 tensors of stored arrays; what the mask leaves out is 0.

        Raises:
            WireError: a scale and its integers are none that rounding gives.
        """
        found: dict[str, Array] = {}
        for name, shape in shapes.items():
            value, mask = stored[name], self.mask(name, math.prod(shape))
            if mask is None:
                whole = value.astype(np.float32).reshape(shape)
            else:
                flat = np.zeros(math.prod(shape), np.float32)
                flat[mask] = value
                whole = flat.reshape(shape)
            if self.dtype == "int8":
                scale = stored[name + SCALE].reshape(_along(shape))
                _check_rounded(name, whole, scale)
                whole = np.clip(whole * scale, -MAX_VALUE, MAX_VALUE).astype(np.float32)
            found[name] = whole
        return found

    def _rounded(
        self, name: str, value: Array, mask: NDArray[np.bool_] | None, site: str
    ) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
        """Return the scale of each row and the rounded integers."""
        whole = value.astype(np.float64)
        if mask is not None:
            whole *= mask.reshape(value.shape)
        along = _along(value.shape)
        axes = tuple(i for i, size in enumerate(along) if size == 1)
        largest = np.abs(whole).max(axis=axes, keepdims=True, initial=0.0)
        largest = np.where(largest < _LEAST, 0.0, largest)
        if (largest > MAX_VALUE).any():
            raise WireError(
                f"tensor {name!r} holds a value over {MAX_VALUE:g}, which int8 does not"
            )
        scale = (largest / _MOST).astype(np.float32)
        words = public_words(self.seed, f"rounding/{self.round}/{site}/{name}", value.size)
        u = (words.reshape(value.shape) + 0.5) / 2**16
        divisor = np.where(scale > 0, scale.astype(np.float64), 1.0)
        rounded = np.clip(np.floor(whole / divisor + u), -_MOST, _MOST)
        rounded = np.where(scale > 0, rounded, 0).astype(np.int8)
        if mask is not None:
            rounded *= mask.reshape(value.shape)
        return scale.reshape(_scales(value.shape)), rounded


PLAIN = Travel()


def _check_rounded(name: str, whole: Array, scale: NDArray[Any]) -> None:
    """Refuse what no rounding gives, so that a message has one encoding.

    The largest value of a row is 127 scales, up to rounding, and becomes 126 or 127.
    """
    axes = tuple(i for i, size in enumerate(scale.shape) if size == 1)
    largest = np.abs(whole).max(axis=axes, keepdims=True, initial=0.0)
    is_good = np.where(
        scale > 0,
        (largest >= _MOST - 1) & (scale <= MAX_VALUE / _MOST * (1 + 2**-20)),
        (largest == 0) & (scale == 0) & ~np.signbit(scale),
    )
    if not is_good.all() or (whole < -_MOST).any():
        raise WireError(f"tensor {name!r} holds what no rounding gives")


def _along(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a tensor's scales that broadcasts over it: one for all but a matrix."""
    if len(shape) != 2:
        return (1,) * len(shape)
    height, width = shape
    return (1, width) if height > width else (height, 1)


def _scales(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a tensor's scales as they are stored."""
    return (math.prod(_along(shape)),)


def _halved(name: str, value: Array) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = value.astype(np.float16)
    if not np.isfinite(half).all():
        raise WireError(f"tensor {name!r} holds a value over 65504, which float16 does not")
    return half
