"""HetLoRA: zero-pad the factors of different ranks, and weigh them by the norms of their products.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP
2024 (https://arxiv.org/abs/2401.06432): with S_i the Frobenius norm of site i's whole product ΔW_i,
its share is w_i·S_i / Σ w_j·S_j (the paper's S_i / Σ S_j where weights are equal), factors are
padded to the greatest rank, averaged apart, and cut for each site. Not exact. The paper's pruning
of a site's own rank is not here: a site's rank is what its hardware carries, and public.

A site of lower rank counts as 0 in the ranks that it does not hold, as in the paper: they shrink in
every round. ``svd`` and ``ffa`` take them for unchanged.

Norms are of the sites' own updates: under DP they are of noised ones, and this costs nothing more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from huizhen.protocol.adapter import Array, Tensors
from huizhen.strategies.base import A, B, Facts, Given, Stacking, StrategyState, modules, pair
from huizhen.strategies.products import Factor, f32, norm
from huizhen.strategies.stacking import factors, in_turn, others


@dataclass(frozen=True, slots=True, kw_only=True)
class HetLora(Stacking):
    """Both factors are trained and averaged, larger products counting for more."""

    facts = Facts(linear=False, exact=False, mixed_ranks=True, sees_individual_updates=True)

    def init(self, x: Tensors) -> StrategyState:
        """Return the state before the first round."""
        return StrategyState(x)

    def join(self, state: StrategyState, given: Sequence[Given], round: int) -> StrategyState:
        """Return the state after a round in which these updates were counted.

        Raises:
            AggregationError: an update does not fit the adapter.
        """
        given = in_turn(given)
        x = others(state.x, given)
        own = {module: factors(state.x, given, module) for module in modules(state.x)}
        shares = _by_norm(
            [one.share for one in given],
            [
                sum(norm(left, right) ** 2 for _, left, right in site) ** 0.5
                for site in zip(*own.values(), strict=True)
            ],
        )
        for module, terms in own.items():
            left, right = pair(state.x, module)
            x[module + B] = _padded(shares, [one for _, one, _ in terms], left.shape)
            x[module + A] = _padded(shares, [one for _, _, one in terms], right.shape)
        return StrategyState(x, state.moments)


def _by_norm(shares: Sequence[float], norms: Sequence[float]) -> list[float]:
    """Return shares in proportion to share times norm; as they were where every product is 0."""
    weights = [share * size for share, size in zip(shares, norms, strict=True)]
    total = sum(weights)
    return [weight / total for weight in weights] if total else list(shares)


def _padded(
    shares: Sequence[float],
    parts: Sequence[Factor],
    shape: tuple[int, ...],
) -> Array:
    total = np.zeros(shape, np.float64)
    for share, part in zip(shares, parts, strict=True):
        total[: part.shape[0], : part.shape[1]] += share * part
    return f32(total)
