"""Rules that bear updates of sites that lie: each makes one update of all, for ``Averaging``.

    median             by coordinate                      Yin et al. 2018 (arXiv 1803.01498)
    trimmed_mean       without the f least and greatest   Yin et al. 2018, Definition 2
    geometric_median   smoothed Weiszfeld, as RFA         Pillutla et al. 2022 (arXiv 1912.13445)
    multi_krum         mean of the n − f best surrounded  Blanchard et al. 2017 (arXiv 1703.02757)
    centred_clipping   mean of what is cut to a radius    Karimireddy et al. 2021 (arXiv 2012.10333)

Distances are over all tensors together. They are those of the products where the update is of B
alone and A has orthonormal rows (``ffa_ortho``); over (A, B) of ``fedavg`` two updates with one
product may look far apart. A bound on the norm of every update is always on
(``[rounds] max_update_norm``), whatever the rule. Plain Krum, which throws away all sites but one,
is not here.

The last three need the distances between the updates alone, since what they give is a weighted mean
of them: with weights that sum to 1, and D the squared distances,
‖Δ_i − Σ w_j Δ_j‖² = Σ_j w_j D_ij − ½ Σ_jk w_j w_k D_jk. Sums are in float64 and by the order of the
sites' names: who came first changes nothing. Memory is that of all updates of a round.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from huizhen.protocol.adapter import BLOCK, Array, Tensors, in_order, shapes_of
from huizhen.protocol.errors import AggregationError
from huizhen.strategies.base import Given
from huizhen.strategies.stacking import in_turn

SMOOTHING = 1e-6
_MOST_STEPS = 1000
_CLIPPING_STEPS = 10

Rows = NDArray[np.float64]


def median(given: Sequence[Given]) -> Tensors:
    """Return the coordinate-wise median, the mean of the middle two where their number is even."""
    return _by_coordinate(given, lambda rows: np.median(rows, axis=0))


def trimmed_mean(given: Sequence[Given], f: int) -> Tensors:
    """Return the mean of each coordinate without its f least and f greatest values.

    Raises:
        AggregationError: there are fewer than 2f + 1 updates.
    """
    n = len(given)
    if n < 2 * f + 1:
        raise AggregationError(f"{n} updates, {f} trimmed at either end needs {2 * f + 1}")
    return _by_coordinate(given, lambda rows: _mean(np.sort(rows, axis=0)[f : n - f]))


def geometric_median(given: Sequence[Given]) -> Tensors:
    """Return the point with the least weighted sum of distances to the updates.

    Weiszfeld's iteration from the mean, each update weighing p_i / max(ν, its distance) with
    ν = 1e-6 of the median distance between updates, until no weight moves by more than 1e-12.
    """
    given = in_turn(given)
    return _weighted(given, _median_weights(given, _distances(given)))


def multi_krum(given: Sequence[Given], f: int) -> Tensors:
    """Return the mean of the n − f updates whose n − f − 2 nearest are nearest to them.

    Raises:
        AggregationError: there are fewer than 2f + 3 updates.
    """
    given = in_turn(given)
    n = len(given)
    if n < 2 * f + 3:
        raise AggregationError(f"{n} updates, multi-Krum against {f} needs {2 * f + 3}")
    near = np.sort(_distances(given), axis=1)[:, 1 : n - f - 1]  # the first is its own, 0
    chosen = np.argsort(near.sum(axis=1), kind="stable")[: n - f]
    weights = np.zeros(n)
    weights[chosen] = 1 / (n - f)
    return _weighted(given, weights)


def centred_clipping(given: Sequence[Given], radius: float) -> Tensors:
    """Return the centre v after v ← v + Σ p_i (Δ_i − v)·min(1, τ/‖Δ_i − v‖), ten times.

    Departure: the paper starts from the round before; here from the geometric median, so that a
    round follows from its updates alone.
    """
    given = in_turn(given)
    squared = _distances(given)
    weights, shares = _median_weights(given, squared), _shares(given)
    for _ in range(_CLIPPING_STEPS):
        steps = shares * (radius / np.maximum(_lengths(squared, weights), radius))
        weights = weights * (1 - steps.sum()) + steps
    return _weighted(given, weights)


def rule_of(
    combine: str, f: int | None, radius: float | None
) -> Callable[[Sequence[Given]], Tensors]:
    """Return the rule that a study names.

    Raises:
        KeyError: it names none of these.
    """
    return {
        "median": median,
        "trimmed_mean": lambda given: trimmed_mean(given, f or 0),
        "geometric_median": geometric_median,
        "multi_krum": lambda given: multi_krum(given, f or 0),
        "centred_clipping": lambda given: centred_clipping(given, radius or 0.0),
    }[combine]


def _shares(given: Sequence[Given]) -> Rows:
    shares = np.array([one.share for one in given], np.float64)
    found: Rows = shares / shares.sum()
    return found


def _median_weights(given: Sequence[Given], squared: Rows) -> Rows:
    shares = weights = _shares(given)
    lengths = np.sqrt(squared)
    # By the middle of the updates, so that a liar far away does not set what counts as near.
    least = SMOOTHING * float(np.median(np.median(lengths, axis=1)))
    least = least or SMOOTHING * float(lengths[lengths > 0].min(initial=np.inf))
    for _ in range(_MOST_STEPS if least < np.inf else 0):
        pulls = shares / np.maximum(least, _lengths(squared, weights))
        before, weights = weights, pulls / pulls.sum()
        if np.abs(weights - before).max() <= 1e-12:
            break
    return weights


def _lengths(squared: Rows, weights: Rows) -> Rows:
    """Return the distance of each update from the weighted mean, the weights summing to 1."""
    to_each = squared @ weights
    found: Rows = np.sqrt(np.maximum(to_each - weights @ to_each / 2, 0))
    return found


def _distances(given: Sequence[Given]) -> Rows:
    """Return the squared distance of each update from each other, (n, n)."""
    found = np.zeros((len(given), len(given)))
    for _, _, rows in _blocks(given):
        for i in range(len(given) - 1):
            found[i, i + 1 :] += ((rows[i + 1 :] - rows[i]) ** 2).sum(axis=1)
    return found + found.T


def _weighted(given: Sequence[Given], weights: Rows) -> Tensors:
    """Return Σ w_i Δ_i, the weights summing to 1; of equal updates, theirs to the bit."""
    return _by_coordinate(given, lambda rows: rows[0] + weights[1:] @ (rows[1:] - rows[0]))


def _by_coordinate(given: Sequence[Given], rule: Callable[[Rows], Rows]) -> Tensors:
    found = {name: np.empty(shape, np.float32) for name, shape in _common(given).items()}
    for name, at, rows in _blocks(in_turn(given)):
        found[name].reshape(-1)[at] = rule(rows)
    return found


def _blocks(given: Sequence[Given]) -> Iterator[tuple[str, slice, Rows]]:
    """Give all updates' values block by block, (n, block) in float64.

    Raises:
        AggregationError: a value is not finite, or the tensors differ.
    """
    shapes = _common(given)
    ordered: list[dict[str, Array]] = [in_order(one.update) for one in given]
    for name in shapes:
        flat = [update[name].reshape(-1) for update in ordered]
        for start in range(0, flat[0].size, BLOCK):
            at = slice(start, start + BLOCK)
            rows = np.stack([one[at] for one in flat]).astype(np.float64)
            if not np.isfinite(rows).all():
                raise AggregationError(f"an update of {name!r} holds a value that is not finite")
            yield name, at, rows


def _common(given: Sequence[Given]) -> dict[str, tuple[int, ...]]:
    shapes = [shapes_of(one.update) for one in in_turn(given)]
    for one, own in zip(in_turn(given), shapes, strict=True):
        if own != shapes[0]:
            raise AggregationError(f"update of site {one.site!r} has other tensors than the first")
    return shapes[0]


def _mean(rows: Rows) -> Rows:
    """Return the mean of rows; of equal ones, theirs to the bit."""
    found: Rows = rows[0] + (rows - rows[0]).mean(axis=0)
    return found
