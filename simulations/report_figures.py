"""What the report's figures show: the values of ``results.json`` that ``figures.py`` draws.

A figure whose numbers are missing is left out.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from markupsafe import Markup

from huizhen.simulations.figures import (
    Bar,
    Line,
    SweepPoint,
    bars_figure,
    rounds_figure,
    sites_figure,
    sweep_figure,
)
from huizhen.simulations.verdict import (
    ARMS,
    METRICS,
    SHARED,
    arm_of,
    baseline_best,
    best_local,
    metrics_of,
    value_of,
)

T = TypeVar("T")


def figures_of(results: Mapping[str, Any], metric: str) -> Iterator[tuple[str, str, str, Markup]]:
    """Yield heading, its Chinese, caption and drawing of each figure that has its numbers."""
    label = _label(metric)
    bars = list(_bars(results, metric))
    if bars:
        drawing = bars_figure(bars, label, is_share=metric != "loss")
        caption = "All test patients of all hospitals."
        if any(b.seeds for b in bars):
            caption += " A dot is one seed."
        yield "How good is each way?", "各方案效果", caption, Markup(drawing)  # noqa: S704
    lines, measured = _first(results, metric, _lines)
    if lines:
        drawing = rounds_figure(lines, _label(measured))
        caption = f"The last round counts, not the best one.{first_seed(results)}"
        yield "Round by round", "逐轮变化", caption, Markup(drawing)  # noqa: S704
    rows, measured = _first(results, metric, _own_rows)
    if rows:
        names = {arm: ARMS[arm] for arm in SHARED if any(arm in shared for _, _, shared in rows)}
        drawing = sites_figure(rows, _label(measured), names=names)
        caption = "Each hospital's own test patients only: its own model against the shared one."
        yield "Is it better for us?", "对本院有好处吗", caption, Markup(drawing)  # noqa: S704
    points = [
        SweepPoint(epsilon=e, value=v, times_patients=p.get("times_patients"))
        for p in results.get("sweep") or []
        if (v := value_of(p, metric)) is not None and (e := p.get("epsilon")) and math.isfinite(e)
    ]
    if points:
        enough = results.get("enough") or {}
        drawing = sweep_figure(
            points,
            label,
            without_noise=value_of(_first_run(arm_of(results, "federated")), metric),
            target=enough.get("target") if enough.get("metric") == metric else None,
        )
        caption = (
            "Noise falls with ε, and with the number of patients: the upper axis says how many."
            f"{first_seed(results)}"
        )
        yield "What does privacy cost?", "隐私的代价", caption, Markup(drawing)  # noqa: S704


def first_seed(results: Mapping[str, Any]) -> str:
    """Return what to say of numbers that are of the first seed alone; nothing if it is the only."""
    several = any(len(arm_of(results, arm).get("per_seed") or ()) > 1 for arm in ARMS)
    return " All of the first seed." if several else ""


def _first_run(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an arm's first seed, as the points of a sweep are; the arm itself if it lists none."""
    runs: Sequence[Mapping[str, Any]] = entry.get("per_seed") or [entry]
    return runs[0]


def _first(
    results: Mapping[str, Any],
    metric: str,
    rows_of: Callable[[Mapping[str, Any], str], list[T]],
) -> tuple[list[T], str]:
    """Return the rows for ``metric``, or else for the first metric that has any.

    An exact match costs an answer per record, so rounds and hospitals often have the loss only.
    """
    metrics = [metric, *(m for m in metrics_of(results) if m != metric)]
    best = next((m for m in metrics if _is_measured(rows_of(results, m))), metric)
    return rows_of(results, best), best


def _is_measured(rows: Sequence[Any]) -> bool:
    return any(not isinstance(row, Line) or row.metric for row in rows)


def _label(metric: str) -> str:
    return METRICS[metric] + (" (lower is better)" if metric == "loss" else "")


def _bars(results: Mapping[str, Any], metric: str) -> Iterator[Bar]:
    def seeds(entry: Mapping[str, Any]) -> list[float]:
        runs = entry.get("per_seed") or []
        return [v for run in runs if (v := value_of(run, metric)) is not None]

    for arm, name in ARMS.items():
        entry = arm_of(results, arm)
        if (value := value_of(entry, metric)) is not None:
            name = f"{name} (mean)" if arm == "local" else name
            yield Bar(name=name, value=value, colour=arm, seeds=seeds(entry))
        if arm == "local" and (best := best_local(results, metric)):
            site = entry["sites"][best[0]]
            yield Bar(name="best hospital alone", value=best[1], colour=arm, seeds=seeds(site))
    pooled = (results.get("baseline") or {}).get("pooled") or {}
    for name, values in (
        ("TF-IDF, best alone", baseline_best(results, metric)),
        ("TF-IDF, pooled", pooled),
    ):
        if metric in values:
            yield Bar(name=name, value=values[metric], colour="baseline")


def _lines(results: Mapping[str, Any], metric: str) -> list[Line]:
    """Return the arms' lines over the rounds; none if no round has the metric or a loss."""
    lines = []
    for arm in ("pooled", "federated", "federated_dp"):
        rounds = arm_of(results, arm).get("rounds") or []
        measured = [(r["round"], v) for r in rounds if (v := value_of(r, metric)) is not None]
        losses = [(r["round"], v) for r in rounds if (v := value_of({"r": r}, "loss", "r"))]
        if measured or losses:
            lines.append(Line(name=ARMS[arm], colour=arm, metric=measured, loss=losses))
    return lines


def _own_rows(
    results: Mapping[str, Any], metric: str
) -> list[tuple[str, float, Mapping[str, float]]]:
    """Return site, own model and shared models, on the site's own test patients."""
    rows: list[tuple[str, float, Mapping[str, float]]] = []
    for site, entry in (arm_of(results, "local").get("sites") or {}).items():
        own = value_of(entry, metric, "own")
        shared = {
            arm: value
            for arm in SHARED
            if (value := value_of((arm_of(results, arm).get("sites") or {}).get(site, {}), metric))
            is not None
        }
        if own is not None and shared:
            rows.append((str(site), own, shared))
    return rows
