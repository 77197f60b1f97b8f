"""One estimate from the noised metrics of several sites, with what it may be off by.

A rate p, right at top-1 say, is T / N: T patients of N, both summed over the sites and both noised.
At the true p the difference T - p·N is 0 but for chance,

    Var(T - pN) = N p (1 - p) + V_T - 2 p C_TN + p² V_N

the first term for which patients the sites happened to hold out, the others for the noise. The
interval is every p with (T - pN)² <= z² Var: Fieller 1954 for a ratio, Wilson 1927 for a
proportion, in one quadratic. A mean loss on [0, bound] is such a rate of the bound, and no variable
on that range varies more than N p (1 - p) says (Bhatia and Davis 2000).

    z = ln(20) / √2 = 2.12   the 95 % point of one Laplace variable in standard deviations; a normal
                             has 1.96 and sums of noise are between: rather too wide than too narrow
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from huizhen.protocol.errors import AggregationError, ProtocolError
from huizhen.protocol.metrics import LOSS_BOUND, LOSS_STEPS, SiteMetrics, sums_of

_Z = math.log(20) / math.sqrt(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate and its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JointMetrics:
    """What the sites together say about the adapter after a round."""

    round: int
    sites: tuple[str, ...]
    suppressed: tuple[str, ...]
    # sites that kept their counts: their patients are not in the estimate
    patients: int
    patients_standard_error: float
    # of the noise
    rates: dict[str, Interval]
    # shares of the patients
    loss: Interval | None
    # nats per token of the answer, mean over the patients


def join_metrics(values: Sequence[SiteMetrics]) -> JointMetrics:
    """Return the estimate over the patients of all sites that did not keep their counts.

    Args:
        values: from ``parse_metrics``, one per site, of one study and round.

    Raises:
        ProtocolError: two values are of one site, or of different studies or rounds.
        AggregationError: every site kept its counts, or there is none.
    """
    if len({value.site for value in values}) != len(values):
        raise ProtocolError("metrics of one site came twice, expected one value per site")
    if len({(v.study, v.round, v.epsilon_counts, v.epsilon_loss) for v in values}) > 1:
        raise ProtocolError("metrics are of different studies or rounds, they have no common mean")
    open_values = [value for value in values if value.counts is not None]
    if not open_values:
        raise AggregationError(
            f"{len(values)} sites sent metrics and none had enough patients: there is no estimate"
        )
    first, sites = open_values[0], len(open_values)
    cells: dict[str, int] = {}
    for value in open_values:
        for name, count in (value.counts or {}).items():
            cells[name] = cells.get(name, 0) + count
    total = sum(cells.values())
    variance = sites * first.count_deviation**2
    of_total = len(cells) * variance
    rates = {
        name: _interval(
            sum(cells[part] for part in parts),
            total,
            of_sum=len(parts) * variance,
            common=len(parts) * variance,
            of_total=of_total,
        )
        for name, parts in sums_of(cells).items()
    }
    return JointMetrics(
        round=first.round,
        sites=tuple(value.site for value in open_values),
        suppressed=tuple(value.site for value in values if value.is_suppressed),
        patients=total,
        patients_standard_error=math.sqrt(of_total),
        rates=rates,
        loss=_loss(open_values, total, of_total),
    )


def _loss(values: Sequence[SiteMetrics], total: int, of_total: float) -> Interval | None:
    sums = [value.loss for value in values if value.loss is not None]
    if not sums:
        return None
    share = _interval(
        sum(sums) / LOSS_STEPS,
        total,
        of_sum=len(sums) * (values[0].loss_deviation / LOSS_STEPS) ** 2,
        common=0.0,
        of_total=of_total,
    )
    return Interval(
        value=LOSS_BOUND * share.value, low=LOSS_BOUND * share.low, high=LOSS_BOUND * share.high
    )


def _interval(
    sum_: float, total: float, *, of_sum: float, common: float, of_total: float
) -> Interval:
    """Return p = sum / total within [0, 1], and every p that the numbers do not contradict.

    Args:
        sum_: T.
        total: N, more than 0.
        of_sum: V_T, the noise's variance in T.
        common: C_TN, its covariance.
        of_total: V_N.
    """
    value = min(1.0, max(0.0, sum_ / total))
    z2 = _Z**2
    a = total**2 + z2 * (total - of_total)
    b = sum_ * total + z2 * (total / 2 - common)
    c = sum_**2 - z2 * of_sum
    root = b * b - a * c
    if a <= 0 or root < 0:  # the noise on N swamps N, or T is far outside 0 to N: nothing is known
        return Interval(value=value, low=0.0, high=1.0)
    low, high = (b - math.sqrt(root)) / a, (b + math.sqrt(root)) / a
    if high < 0 or low > 1:
        return Interval(value=value, low=0.0, high=1.0)
    return Interval(value=value, low=max(0.0, min(low, value)), high=min(1.0, max(high, value)))
