"""The private steps of a round: everything that training does with patients under DP is this loop.

with private_steps(…) as step:
loss = step()          # p.grad of every trained tensor is a noised gradient now
optimizer.step()
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from huizhen.client.dp_sgd import ClipNorm, private_gradient
from huizhen.client.examples import Examples
from huizhen.client.model_checks import Memory
from huizhen.client.patient_gradients import ModelGradients, Rows
from huizhen.client.per_record import per_record_gradients
from huizhen.client.randomness import NoiseSource
from huizhen.learning.trainable import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTerms:
    """What a step is, in public numbers; names as in ``private_gradient``."""

    sampling_rate: float
    max_grad_norm: ClipNorm
    noise_multiplier: float
    denominator: float
    records_per_patient: int = 1
    batch_cap: int | None = None


@contextmanager
def private_steps(
    model: Model,
    parameters: Mapping[str, nn.Parameter],
    examples: Examples,
    units: Sequence[Rows],
    terms: StepTerms,
    *,
    steps: int,
    memory: Memory,
) -> Iterator[Callable[[], float]]:
    """Give a function that takes one step's gradient, for at most ``steps`` steps.

    It leaves the noised gradient in the parameters' ``grad`` and returns, for the site's own eyes,
    the mean loss of the sampled records.

    Args:
        model: with the adapter loaded.
        parameters: the trained tensors, from ``model.train_only``.
        examples: the site's records.
        units: the records of each patient, or each record alone.
        terms: public.
        steps: the noise is drawn ahead for so many.
        memory: from ``check_model``.

    Raises:
        PrivacyError: a layer or tensor of which each record's share cannot be had.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    size = sum(parameter.numel() for parameter in parameters.values())
    with (
        NoiseSource(size, steps) as noise,
        per_record_gradients(model.module, parameters) as recorder,
    ):
        source = ModelGradients(
            model,
            parameters,
            examples,
            units,
            recorder,
            records_per_patient=terms.records_per_patient,
            memory=memory,
        )

        def step() -> float:
            gradient, loss = private_gradient(
                source,
                shapes,
                sampling_rate=terms.sampling_rate,
                max_grad_norm=terms.max_grad_norm,
                noise_multiplier=terms.noise_multiplier,
                denominator=terms.denominator,
                noise=noise,
                batch_cap=terms.batch_cap,
            )
            for name, parameter in parameters.items():
                parameter.grad = gradient[name]
            return loss

        yield step
