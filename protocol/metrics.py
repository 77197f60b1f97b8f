"""Metrics that a site lets out: noised counts over its held-out patients.

A patient falls into exactly one cell, say "right at top-1" or "wrong", by one of their records. So
adding or removing a patient, with any number of records, moves one cell by one: the L1 sensitivity
of all cells together is 1, and each may carry noise of the whole ε (Dwork et al. 2006, histograms).
An instruction's loss is a sum of whole numbers, 0 to ``LOSS_STEPS`` from each patient; it has half
of the ε for itself and the cells have the other half. What a reader wants, right at top-3 or the
number of patients, are sums of cells, computed after the noise.

    cells   c_j + Z,  P(Z = z) ∝ e^(-ε_counts·|z|)
    loss    l + Z,    P(Z = z) ∝ e^(-ε_loss·|z| / LOSS_STEPS)

Both together are ε-differentially private, ε = ε_counts + ε_loss, with δ = 0. There is exactly one
encoding of a value: RFC 8785 JSON that ``parse_metrics`` reads back and compares.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import rfc8785

from huizhen.protocol.errors import ConfigError, ProtocolError, WireError
from huizhen.protocol.strict import build
from huizhen.protocol.study import Study
from huizhen.protocol.study_terms import TaskTerms

SCHEMA = 1
LOSS_BOUND = 5.0  # nats per token of the answer; a loss above it counts as this, for every site
LOSS_STEPS = 1000  # the whole numbers that a patient's loss may be, bound and grid both public
MIN_EPSILON, MAX_EPSILON = 1e-3, 100.0
MAX_BYTES = 1 << 13
SUMS = {"top1": ("top1",), "top3": ("top1", "top2_to_3"), "exact_match": ("exact",)}
# what readers ask for, as sums of cells


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A noised number and the standard deviation of its noise."""

    value: float
    standard_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteMetrics:
    """What one site says about the adapter after a round; nothing in it is exact."""

    study: str
    # the study's digest, SHA-256 in hex
    site: str
    round: int
    epsilon_counts: float
    epsilon_loss: float
    # 0 where no loss is released
    minimum: int
    # patients; ``counts`` is None where the noised number of patients is lower
    counts: dict[str, int] | None
    # per cell; noise may make one negative
    loss: int | None
    # noised sum over the patients, in LOSS_BOUND / LOSS_STEPS nats

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.study):
            raise ValueError(f"study is {self.study[:70]!r}, expected a SHA-256 in hex")
        parts_are_right = self.epsilon_counts > 0 and self.epsilon_loss >= 0
        if not (parts_are_right and self.epsilon <= MAX_EPSILON):
            raise ValueError(f"epsilon is {self.epsilon}, expected over 0 to {MAX_EPSILON:g}")
        if self.round < 1 or self.minimum < 1:
            raise ValueError(f"round or minimum is {min(self.round, self.minimum)}, expected 1 up")
        if self.counts is not None and sum(self.counts.values()) < self.minimum:
            raise ValueError(f"counts are of fewer patients than minimum, {self.minimum}")
        if (self.loss is None) != (self.counts is None or self.epsilon_loss == 0):
            raise ValueError("loss and its epsilon contradict each other")

    @property
    def epsilon(self) -> float:
        """What the release cost each held-out patient, by pure ε-differential privacy."""
        return self.epsilon_counts + self.epsilon_loss

    @property
    def is_suppressed(self) -> bool:
        """Whether the site kept its counts because too few patients seem to be behind them."""
        return self.counts is None

    @property
    def count_deviation(self) -> float:
        """Standard deviation of the noise on each cell."""
        return noise_deviation(self.epsilon_counts)

    @property
    def loss_deviation(self) -> float:
        """Standard deviation of the noise on ``loss``; 0 where none is released."""
        return noise_deviation(self.epsilon_loss / LOSS_STEPS) if self.epsilon_loss else 0.0

    def readings(self) -> dict[str, Reading]:
        """Return the number of patients, how many are right, and the summed loss in nats."""
        if self.counts is None:
            return {}
        cells = {"patients": tuple(self.counts), **sums_of(self.counts)}
        found = {
            name: Reading(
                value=sum(self.counts[cell] for cell in parts),
                standard_error=math.sqrt(len(parts)) * self.count_deviation,
            )
            for name, parts in cells.items()
        }
        if self.loss is not None:
            unit = LOSS_BOUND / LOSS_STEPS
            found["loss"] = Reading(
                value=self.loss * unit, standard_error=self.loss_deviation * unit
            )
        return found

    def canonical(self) -> bytes:
        """Return the RFC 8785 JSON: the noised numbers, their ε and their standard errors."""
        errors = {name: round(self.count_deviation, 4) for name in self.counts or ()}
        if self.loss is not None:
            errors["loss"] = round(self.loss_deviation, 4)
        values = {name: getattr(self, name) for name in self.__slots__}
        return rfc8785.dumps({"schema": SCHEMA, "standard_errors": errors, **values})


def noise_deviation(rate: float) -> float:
    """Return the standard deviation of P(z) ∝ e^(-rate·|z|) over the whole numbers."""
    return math.sqrt(2) / (2 * math.sinh(rate / 2))


def cells_of(task: TaskTerms) -> tuple[str, ...]:
    """Return the cells of a study's counts; among three classes top-3 is always right."""
    if task.kind == "instruction":
        return ("exact", "wrong")
    return ("top1", "wrong") if len(task.labels) <= 3 else ("top1", "top2_to_3", "wrong")


def sums_of(cells: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return what readers ask for that these cells can answer, each as cells to add."""
    return {name: parts for name, parts in SUMS.items() if all(part in cells for part in parts)}


def budgets(study: Study) -> tuple[float, float]:
    """Return ε of the counts and of the loss.

    Raises:
        ConfigError: the study lets no metrics out, or with an ε that makes no sense.
    """
    epsilon = study.privacy.metrics_epsilon
    if epsilon is None:
        raise ConfigError("[privacy] has no metrics_epsilon, no metrics leave: nothing was sent")
    if not MIN_EPSILON <= epsilon <= MAX_EPSILON:
        raise ConfigError(
            f"[privacy] metrics_epsilon is {epsilon}, expected {MIN_EPSILON:g} to {MAX_EPSILON:g}"
        )
    return (epsilon / 2, epsilon / 2) if study.task.kind == "instruction" else (epsilon, 0.0)


def parse_metrics(data: bytes, study: Study) -> SiteMetrics:
    """Return the metrics in ``data``.

    Args:
        data: what arrived, from anyone.
        study: the study that they must be of.

    Raises:
        WireError: the bytes are not the one encoding of a value.
        ProtocolError: the value is of another study, site, budget or task.
    """
    if len(data) > MAX_BYTES:
        raise WireError(f"metrics have {len(data)} bytes, at most {MAX_BYTES} are allowed")
    try:
        table = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WireError("metrics are not JSON") from error
    if not isinstance(table, dict) or type(table.get("schema")) is not int:
        raise WireError("metrics have no schema number")
    if table.pop("schema") != SCHEMA:
        raise WireError(f"metrics are of another schema than {SCHEMA}: update the software")
    table.pop("standard_errors", None)  # they follow from ε, and the comparison below holds them
    try:
        value = build(SiteMetrics, table, "metrics")
        is_canonical = value.canonical() == data
    except (ConfigError, rfc8785.CanonicalizationError, ArithmeticError, RecursionError) as error:
        raise WireError(str(error)) from error
    if not is_canonical:
        raise WireError("metrics are not in their one canonical encoding")
    _check(value, study)
    return value


def _check(value: SiteMetrics, study: Study) -> None:
    if value.study != study.digest():
        raise ProtocolError("metrics are of another study: they were not counted")
    if value.site not in study.sites or value.round > study.rounds.count:
        raise ProtocolError("metrics are of a site or round that the study does not have")
    if (value.epsilon_counts, value.epsilon_loss) != budgets(study):
        raise ProtocolError("metrics were noised with another epsilon than the study's")
    if value.minimum != study.privacy.metrics_minimum:
        raise ProtocolError(f"metrics were kept under {value.minimum} patients, not as agreed")
    if value.counts is not None and set(value.counts) != set(cells_of(study.task)):
        raise ProtocolError("metrics have other counts than the study's task")
