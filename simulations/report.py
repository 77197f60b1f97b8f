"""The report of a simulation: one HTML file that needs nothing else, and a table for the terminal.

Everything shown is computed from ``results.json``; a part whose numbers are missing is left out.
All texts are escaped by Jinja2, and the page's own policy forbids it to load or run anything.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from huizhen.protocol.errors import ConfigError, StorageError
from huizhen.simulations.figures import (
    Bar,
    Line,
    SweepPoint,
    bars_figure,
    rounds_figure,
    sites_figure,
    sweep_figure,
)

ARMS = {
    "local": "each hospital alone",
    "pooled": "all records pooled",
    "federated": "together",
    "federated_dp": "together, private",
}
METRICS = {
    "top1": "top-1",
    "top3": "top-3",
    "macro_f1": "macro F1",
    "exact_match": "exact match",
    "loss": "loss",
}
PRIVACY = {
    "mechanism": "mechanism",
    "unit": "unit of privacy",
    "epsilon": "ε",
    "delta": "δ",
    "sigma": "noise multiplier σ",
    "noise_multiplier": "noise multiplier σ",
    "q": "sampling rate q",
    "sampling_rate": "sampling rate q",
    "steps": "steps",
    "accountant": "accountant",
}
SHARED = ("federated", "federated_dp")
DASH = "–"
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table of arms."""

    name: str
    colour: str
    metrics: Mapping[str, float]
    spread: Mapping[str, float]
    seconds: float | None = None
    bytes_up: int | None = None
    bytes_down: int | None = None
    epsilon: float | None = None

    def value(self, metric: str) -> tuple[str, str]:
        """Return the metric to three places, and its spread over seeds or nothing."""
        text, spread = number(self.metrics.get(metric)), self.spread.get(metric)
        return text, "" if spread is None or text == DASH else f"± {number(spread)}"


def write_report(results: Mapping[str, Any], folder: Path) -> Path:
    """Write ``report.html`` into ``folder``, whole or not at all, and return its path.

    Raises:
        ConfigError: the results have no arms.
        StorageError: the folder cannot be written.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "megabytes": megabytes, "plain": plain}
    html = environment.get_template("report.html.j2").render(_page(results))
    path = folder / "report.html"
    partial = folder / f".report.html.{os.getpid()}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w", encoding="utf-8", newline="\n") as file:
                file.write(html)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {str(path)!r}: {error.strerror}") from error
    return path


def summary_table(results: Mapping[str, Any]) -> Table:
    """Return the table of arms for the terminal."""
    metrics = _metrics(results)
    rows = _rows(results)
    has_bytes = any(r.bytes_up is not None for r in rows)
    table = Table(title=Text(str(results.get("name", "results"))), caption=Text(verdict(results)))
    table.add_column("arm")
    for heading in [METRICS[m] for m in metrics] + ["seconds"]:
        table.add_column(heading, justify="right", no_wrap=True)
    if has_bytes:
        table.add_column("MB up", justify="right")
        table.add_column("MB down", justify="right")
    table.add_column("ε", justify="right")
    for row in rows:
        cells = [
            row.name,
            *(" ".join(row.value(m)).strip() for m in metrics),
            number(row.seconds, 1),
        ]
        if has_bytes:
            cells += [megabytes(row.bytes_up), megabytes(row.bytes_down)]
        table.add_row(*(Text(c) for c in [*cells, number(row.epsilon, 2)]))
    return table


def verdict(results: Mapping[str, Any]) -> str:
    """Return what came out, in one or two plain sentences.

    "Better" needs a difference from the best single hospital above the spread over seeds.
    """
    metric = _primary(results)
    value = {arm: _value(_arm(results, arm), metric) for arm in ARMS}
    best = _best_local(results, metric)
    parts = []
    opening = ""
    if (together := value["federated"]) is not None:
        parts.append(f"together {together:.3f}")
        if best is not None:
            gain = (together - best[1]) * (-1 if metric == "loss" else 1)
            spread = _spread(_arm(results, "federated")).get(metric, 0.0)
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
        epsilon = _epsilon(_arm(results, "federated_dp"))
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


def _page(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that the template shows."""
    if not results.get("arms"):
        raise ConfigError("the results have no arms, a report needs at least one: run the study")
    metrics = _metrics(results)
    primary = _primary(results)
    privacy = results.get("privacy") or {}
    order = sorted(set(privacy) - {"schema"}, key=_privacy_order(privacy))
    data = results.get("data") or {}
    return {
        "name": str(results.get("name", "results")),
        "kind": results.get("kind", "classification"),
        "verdict": verdict(results),
        "tiles": _tiles(results, primary),
        "metrics": [(m, METRICS[m]) for m in metrics],
        "primary": METRICS[primary],
        "rows": _rows(results),
        "baseline_text": (results.get("baseline") or {}).get("text"),
        "figures": list(_figures(results, primary)),
        "enough": (results.get("enough") or {}).get("text"),
        "data": data,
        "sites": _sites(results),
        "privacy": [(PRIVACY.get(k, k.replace("_", " ")), _items(privacy[k])) for k in order],
        "fewer": _fewer(results, primary),
        "left": _left(results),
        "samples": results.get("samples") or [],
        "notes": results.get("notes") or [],
        "limits": _limits(results),
        "provenance": results.get("provenance") or {},
    }


def _privacy_order(privacy: Mapping[str, Any]) -> Callable[[str], int]:
    """Return the place of a key: the known ones as in ``PRIVACY``, the others as they came."""
    keys = [*PRIVACY, *privacy]
    return keys.index


def _items(value: Any) -> list[str]:
    """Return one text, or one per entry of a list of texts; a long list of numbers is cut."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if any(isinstance(v, str) for v in value):
            return [plain(v) for v in value]
        if len(value) > 6:
            return [f"{plain(value[:3])}, … {plain(value[-1])}"]
    return [plain(value)]


def _fewer(results: Mapping[str, Any], metric: str) -> list[tuple[str, str, str]]:
    """Return patients, ε and the metric of the runs on fewer patients."""
    return [
        (number(p.get("patients")), number(p.get("epsilon"), 2), number(_value(p, metric)))
        for p in results.get("sweep_patients") or []
    ]


def _arm(results: Mapping[str, Any], arm: str) -> Mapping[str, Any]:
    return (results.get("arms") or {}).get(arm) or {}


def _value(holder: Mapping[str, Any], metric: str, key: str = "metrics") -> float | None:
    """Return a metric of an arm, a site or a round; None where it is missing or not finite."""
    value = (holder.get(key) or {}).get(metric)
    return None if value is None or not math.isfinite(value) else float(value)


def _spread(entry: Mapping[str, Any]) -> Mapping[str, float]:
    """Return the spread over seeds; nothing after one run, which has none."""
    return {} if len(entry.get("per_seed") or "??") < 2 else entry.get("spread") or {}


def _metrics(results: Mapping[str, Any]) -> list[str]:
    """Return the metrics that any arm has, in the order of ``METRICS``."""
    present = {m for arm in ARMS for m in _arm(results, arm).get("metrics") or {}}
    return [m for m in METRICS if m in present]


def _primary(results: Mapping[str, Any]) -> str:
    """Return the metric that the report is about: the first that is not zero for every arm."""
    metrics = _metrics(results)
    telling = (m for m in metrics if any(_value(_arm(results, arm), m) for arm in ARMS))
    return next(telling, metrics[0] if metrics else "top1")


def _epsilon(arm: Mapping[str, Any]) -> float | None:
    """Return the largest ε of the arm's sites, the one that any patient can count on."""
    return max((arm.get("epsilon") or {}).values(), default=None)


def _best_local(results: Mapping[str, Any], metric: str) -> tuple[str, float] | None:
    """Return the hospital whose own model does best on all test patients, and its value."""
    sites = _arm(results, "local").get("sites") or {}
    values = {s: v for s, entry in sites.items() if (v := _value(entry, metric)) is not None}
    if not values:
        return None
    best = (min if metric == "loss" else max)(values, key=lambda s: values[s])
    return best, values[best]


def _baseline_best(results: Mapping[str, Any], metric: str) -> Mapping[str, float]:
    local = (results.get("baseline") or {}).get("local") or {}
    return max(local.values(), key=lambda m: m.get(metric, 0.0), default={})


def _rows(results: Mapping[str, Any]) -> list[Row]:
    rows = []
    primary = _primary(results)
    for arm, name in ARMS.items():
        entry = _arm(results, arm)
        if not entry:
            continue
        rounds = entry.get("rounds") or []
        sent = [r for r in rounds if r.get("bytes_up") is not None]
        rows.append(
            Row(
                name=f"{name} (mean)" if arm == "local" else name,
                colour=arm,
                metrics=entry.get("metrics") or {},
                spread=_spread(entry),
                seconds=entry.get("seconds"),
                bytes_up=sum(r["bytes_up"] for r in sent) if sent else None,
                bytes_down=sum(r.get("bytes_down") or 0 for r in sent) if sent else None,
                epsilon=_epsilon(entry),
            )
        )
        if arm == "local" and (best := _best_local(results, primary)):
            site = entry["sites"][best[0]]
            rows.append(
                Row(
                    name=f"best alone: {best[0]}",
                    colour=arm,
                    metrics=site.get("metrics") or {},
                    spread=_spread(site),
                )
            )
    for name, values in (
        ("TF-IDF, best alone", _baseline_best(results, primary)),
        ("TF-IDF, pooled", (results.get("baseline") or {}).get("pooled") or {}),
    ):
        if values:
            rows.append(Row(name=name, colour="baseline", metrics=values, spread={}))
    return rows


def _tiles(results: Mapping[str, Any], metric: str) -> list[tuple[str, str, str]]:
    """Return colour, value and caption of the numbers at the top."""
    best = _best_local(results, metric)
    epsilon = _epsilon(_arm(results, "federated_dp"))
    tiles = [
        ("local", best[1] if best else None, "best hospital alone"),
        ("federated", _value(_arm(results, "federated"), metric), "together"),
        (
            "federated_dp",
            _value(_arm(results, "federated_dp"), metric),
            "together, private"
            + (f" (ε\u00a0=\u00a0{epsilon:.3g})" if epsilon is not None else ""),
        ),
        ("pooled", _value(_arm(results, "pooled"), metric), "all records pooled"),
    ]
    return [(colour, number(value), text) for colour, value, text in tiles if value is not None]


def _figures(results: Mapping[str, Any], metric: str) -> Iterator[tuple[str, str, str, Markup]]:
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
        caption = "The last round counts, not the best one."
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
        if (v := _value(p, metric)) is not None and (e := p.get("epsilon")) and math.isfinite(e)
    ]
    if points:
        enough = results.get("enough") or {}
        drawing = sweep_figure(
            points,
            label,
            without_noise=_value(_arm(results, "federated"), metric),
            target=enough.get("target") if enough.get("metric") == metric else None,
        )
        caption = (
            "Noise falls with ε, and with the number of patients: the upper axis says how many."
        )
        yield "What does privacy cost?", "隐私的代价", caption, Markup(drawing)  # noqa: S704


def _first(
    results: Mapping[str, Any],
    metric: str,
    rows_of: Callable[[Mapping[str, Any], str], list[T]],
) -> tuple[list[T], str]:
    """Return the rows for ``metric``, or else for the first metric that has any.

    An exact match costs an answer per record, so rounds and hospitals often have the loss only.
    """
    metrics = [metric, *(m for m in _metrics(results) if m != metric)]
    best = next((m for m in metrics if _is_measured(rows_of(results, m))), metric)
    return rows_of(results, best), best


def _is_measured(rows: Sequence[Any]) -> bool:
    return any(not isinstance(row, Line) or row.metric for row in rows)


def _label(metric: str) -> str:
    return METRICS[metric] + (" (lower is better)" if metric == "loss" else "")


def _bars(results: Mapping[str, Any], metric: str) -> Iterator[Bar]:
    def seeds(entry: Mapping[str, Any]) -> list[float]:
        runs = entry.get("per_seed") or []
        return [v for run in runs if (v := _value(run, metric)) is not None]

    for arm, name in ARMS.items():
        entry = _arm(results, arm)
        if (value := _value(entry, metric)) is not None:
            name = f"{name} (mean)" if arm == "local" else name
            yield Bar(name=name, value=value, colour=arm, seeds=seeds(entry))
        if arm == "local" and (best := _best_local(results, metric)):
            site = entry["sites"][best[0]]
            yield Bar(name="best hospital alone", value=best[1], colour=arm, seeds=seeds(site))
    pooled = (results.get("baseline") or {}).get("pooled") or {}
    for name, values in (
        ("TF-IDF, best alone", _baseline_best(results, metric)),
        ("TF-IDF, pooled", pooled),
    ):
        if metric in values:
            yield Bar(name=name, value=values[metric], colour="baseline")


def _lines(results: Mapping[str, Any], metric: str) -> list[Line]:
    """Return the arms' lines over the rounds; none if no round has the metric or a loss."""
    lines = []
    for arm in ("pooled", "federated", "federated_dp"):
        rounds = _arm(results, arm).get("rounds") or []
        measured = [(r["round"], v) for r in rounds if (v := _value(r, metric)) is not None]
        losses = [(r["round"], v) for r in rounds if (v := _value({"r": r}, "loss", "r"))]
        if measured or losses:
            lines.append(Line(name=ARMS[arm], colour=arm, metric=measured, loss=losses))
    return lines


def _own_rows(
    results: Mapping[str, Any], metric: str
) -> list[tuple[str, float, Mapping[str, float]]]:
    """Return site, own model and shared models, on the site's own test patients."""
    rows: list[tuple[str, float, Mapping[str, float]]] = []
    for site, entry in (_arm(results, "local").get("sites") or {}).items():
        own = _value(entry, metric, "own")
        shared = {
            arm: value
            for arm in SHARED
            if (value := _value((_arm(results, arm).get("sites") or {}).get(site, {}), metric))
            is not None
        }
        if own is not None and shared:
            rows.append((str(site), own, shared))
    return rows


def _sites(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per hospital: its data, and what the run says about it."""
    sites = (results.get("data") or {}).get("sites") or {}
    shared = _arm(results, "federated") or _arm(results, "federated_dp")
    budgets = _arm(results, "federated_dp").get("epsilon") or {}
    return [
        {
            "name": str(name),
            "epsilon": budgets.get(name),
            "bytes_up": ((shared.get("sites") or {}).get(name) or {}).get("bytes_up"),
            **{
                key: entry.get(key)
                for key in (
                    "train_patients", "test_patients", "train_records", "test_records",
                    "labels_seen",
                )
            },
        }
        for name, entry in sites.items()
    ]  # fmt: skip


def _left(results: Mapping[str, Any]) -> list[str]:
    """Return what left the hospitals, a sentence per shared arm that was counted."""
    hospitals = len((results.get("data") or {}).get("sites") or {})
    sentences = []
    for arm in SHARED:
        rounds = [r for r in _arm(results, arm).get("rounds") or [] if r.get("bytes_up")]
        if not rounds:
            continue
        total = sum(r["bytes_up"] for r in rounds)
        text = f"{ARMS[arm]}: {megabytes(total)} MB of adapter updates in {len(rounds)} rounds"
        if hospitals:
            text += (
                f", {number(total / len(rounds) / hospitals / 1e3, 1)} kB per hospital and round"
            )
        if back := sum(r.get("bytes_down") or 0 for r in rounds):
            text += f"; {megabytes(back)} MB came back"
        shares = [s for r in rounds if (s := r.get("outside_share")) is not None]
        if shares:
            share = _arm(results, arm).get("outside_share", fmean(shares))
            text += f"; {100 * share:.1f} % of the time was not training"
        sentences.append(text[0].upper() + text[1:] + ".")
    return sentences


def _limits(results: Mapping[str, Any]) -> list[str]:
    """Return what these numbers do not show."""
    data = results.get("data") or {}
    limits = []
    if data.get("synthetic"):
        limits.append(
            "The patients are synthetic. The numbers say that the methods work and compare; they "
            "say nothing about diagnosing real patients."
        )
    if unseen := data.get("unseen_labels"):
        limits.append(
            f"{unseen} test records have a label outside the study's list: they count as errors "
            "for every arm."
        )
    if not any(_spread(_arm(results, arm)) for arm in ARMS):
        limits.append("One run per arm: how much of a difference is chance is not known.")
    limits.append(
        "Every hospital ran on the same machine, and all test patients were scored in one place: a "
        "real alliance has networks, outages, and only the metrics its study lets out."
    )
    return limits
