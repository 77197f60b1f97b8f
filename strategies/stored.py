"""A strategy's state as bytes: what a coordinator or a simulation keeps to go on after a crash.

safetensors with ``x/<tensor>`` for the adapter and ``m/<moment>/<tensor>`` for what the strategy
remembers besides; the same state gives the same bytes.
"""

from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load

from huizhen.protocol.adapter import in_order
from huizhen.protocol.errors import DamagedError
from huizhen.protocol.wire import safetensors
from huizhen.strategies.base import StrategyState


def encode_state(state: StrategyState) -> bytes:
    """Return a state as bytes."""
    return b"".join(safetensors(tensors_of(state)))


def decode_state(data: bytes) -> StrategyState:
    """Return the state that ``encode_state`` wrote.

    Raises:
        DamagedError: the bytes are none.
    """
    try:
        return state_of(load(data))
    except (SafetensorError, ValueError, KeyError) as error:
        raise DamagedError("the stored state of a strategy is damaged") from error


def tensors_of(state: StrategyState) -> dict[str, Any]:
    """Return all arrays of a state under their stored names."""
    tensors = {f"x/{name}": array for name, array in in_order(state.x).items()}
    for moment, values in state.moments.items():
        tensors |= {f"m/{moment}/{name}": array for name, array in in_order(values).items()}
    return tensors


def state_of(tensors: Mapping[str, Any]) -> StrategyState:
    """Return the state whose arrays ``tensors_of`` named."""
    x = {name[2:]: array for name, array in tensors.items() if name.startswith("x/")}
    moments: dict[str, dict[str, Any]] = {}
    for name, array in tensors.items():
        if name.startswith("m/"):
            _, moment, rest = name.split("/", 2)
            moments.setdefault(moment, {})[rest] = array
    return StrategyState(x, moments)
