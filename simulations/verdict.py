"""What came out, in a sentence; and how the numbers of ``results.json`` are found and written."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

ARMS = {
    "local": "each hospital alone",
    "pooled": "all records pooled",
    "federated": "together",
    "federated_dp": "together, private",
}
SHARED = ("federated", "federated_dp")
METRICS = {
    "top1": "top-1",
    "top3": "top-3",
    "macro_f1": "macro F1",
    "c_index": "C-index",
    "exact_match": "exact match",
    "loss": "loss",
}
DASH = "–"


def verdict(results: Mapping[str, Any]) -> str:
    """Return what came out, in one or two plain sentences.

    "Better" needs a difference from the best single hospital above the spread over seeds.
    """
    metric = primary_metric(results)
    value = {arm: value_of(arm_of(results, arm), metric) for arm in ARMS}
    best = best_local(results, metric)
    parts = []
    opening = ""
    if (together := value["federated"]) is not None:
        parts.append(f"together {together:.3f}")
        if best is not None:
            gain = (together - best[1]) * (-1 if metric == "loss" else 1)
            spread = spread_of(arm_of(results, "federated")).get(metric, 0.0)
            if gain > spread:
                opening = "Training together beat every hospital alone: "
            elif gain < -spread:
                opening = "Training together did not reach the best hospital alone: "
            else:
                opening = "Training together was no better than the best hospital alone: "
    if best is not None:
        parts.append(f"best single hospital {best[1]:.3f}")
    if value["pooled"] is not None:
        parts.append(f"all records pooled {value['pooled']:.3f}")
    sentence = ", ".join(parts)
    if (private := value["federated_dp"]) is not None:
        epsilon = epsilon_of(arm_of(results, "federated_dp"))
        budget = "differential privacy" if epsilon is None else f"ε = {epsilon:.3g}"
        sentence += f"{'; ' if sentence else ''}with {budget}, {private:.3f}"
    if not sentence:
        return "No arm was measured."
    text = f"{opening}{sentence} ({METRICS[metric]}{', lower is better' * (metric == 'loss')})."
    return text[0].upper() + text[1:]


def number(value: Any, places: int = 3) -> str:
    """Return a number with ``places`` decimals; a dash for what is none, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return DASH
    return f"{value:,.{places}f}" if isinstance(value, float) or places != 3 else f"{value:,}"


def megabytes(value: Any) -> str:
    """Return bytes as megabytes (10⁶)."""
    return DASH if value is None else number(value / 1e6, 2)


def plain(value: Any) -> str:
    """Return any value of the privacy or provenance section as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        texts = {k: plain(v) for k, v in value.items()}
        if len(texts) > 1 and len(set(texts.values())) == 1:
            return f"{next(iter(texts.values()))} (each)"
        return " · ".join(f"{k}: {v}" for k, v in texts.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(plain, value))
    return DASH if value is None else str(value)


def arm_of(results: Mapping[str, Any], arm: str) -> Mapping[str, Any]:
    """Return what the results say about an arm; nothing if it was not run."""
    return (results.get("arms") or {}).get(arm) or {}


def value_of(holder: Mapping[str, Any], metric: str, key: str = "metrics") -> float | None:
    """Return a metric of an arm, a site or a round; None where it is missing or not finite."""
    value = (holder.get(key) or {}).get(metric)
    return None if value is None or not math.isfinite(value) else float(value)


def spread_of(entry: Mapping[str, Any]) -> Mapping[str, float]:
    """Return the spread over seeds; nothing after one run, which has none."""
    return {} if len(entry.get("per_seed") or "??") < 2 else entry.get("spread") or {}


def metrics_of(results: Mapping[str, Any]) -> list[str]:
    """Return the metrics that any arm has, in the order of ``METRICS``."""
    present = {m for arm in ARMS for m in arm_of(results, arm).get("metrics") or {}}
    return [m for m in METRICS if m in present]


def primary_metric(results: Mapping[str, Any]) -> str:
    """Return the metric that the report is about: the first that is not zero for every arm."""
    metrics = metrics_of(results)
    telling = (m for m in metrics if any(value_of(arm_of(results, arm), m) for arm in ARMS))
    return next(telling, metrics[0] if metrics else "top1")


def epsilon_of(arm: Mapping[str, Any]) -> float | None:
    """Return the largest ε of the arm's sites, the one that any patient can count on."""
    return max((arm.get("epsilon") or {}).values(), default=None)


def best_local(results: Mapping[str, Any], metric: str) -> tuple[str, float] | None:
    """Return the hospital whose own model does best on all test patients, and its value."""
    sites = arm_of(results, "local").get("sites") or {}
    values = {s: v for s, entry in sites.items() if (v := value_of(entry, metric)) is not None}
    if not values:
        return None
    best = (min if metric == "loss" else max)(values, key=lambda s: values[s])
    return best, values[best]


def baseline_best(results: Mapping[str, Any], metric: str) -> Mapping[str, float]:
    """Return the metrics of the best baseline that one hospital trained alone."""
    local = (results.get("baseline") or {}).get("local") or {}
    return max(local.values(), key=lambda m: m.get(metric, 0.0), default={})
