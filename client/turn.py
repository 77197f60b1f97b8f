"""What a strategy adds to the gradients of a site's steps: FedProx's pull, SCAFFOLD's correction.

It is made of what was announced and of what the site had sent before, so it knows no record that
this round trains on, and under DP it is added after the noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from huizhen.protocol.adapter import Tensors
from huizhen.protocol.study import Study


@dataclass(frozen=True, slots=True)
class Turn:
    """What is added to the gradients of each step of a round."""

    parameters: Mapping[str, nn.Parameter]
    mu: float
    start: Mapping[str, Tensor]
    # the announced adapter, where μ pulls towards it
    correction: Mapping[str, Tensor]
    sums: dict[str, Tensor] | None
    # of the gradients so far, before anything was added; None where nobody asks

    @classmethod
    def of(
        cls,
        parameters: Mapping[str, nn.Parameter],
        study: Study,
        correction: Tensors,
        *,
        sums: bool,
    ) -> "Turn":
        """Return that of a round, before its first step."""
        mu = study.strategy.mu or 0.0
        start = {name: p.detach().clone() for name, p in parameters.items()} if mu else {}
        turns = {
            name: torch.from_numpy(correction[name]) for name in parameters if name in correction
        }
        return cls(parameters, mu, start, turns, {} if sums else None)

    @torch.no_grad()
    def __call__(self) -> None:
        """Add the gradient of FedProx's μ/2·‖θ − θ_t‖² (strategies/fedavg.py), and c − c_i."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            if self.sums is not None:
                if name in self.sums:
                    self.sums[name].add_(parameter.grad)
                else:
                    self.sums[name] = parameter.grad.detach().clone()
            if name in self.start:
                parameter.grad.add_(parameter - self.start[name], alpha=self.mu)
            if name in self.correction:
                parameter.grad.add_(self.correction[name])
