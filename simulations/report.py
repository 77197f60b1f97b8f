"""The report of a simulation: one HTML file that needs nothing else, and a table for the terminal.

Everything shown is computed from ``results.json``; a part whose numbers are missing is left out.
All texts are escaped by Jinja2, and the page's own policy forbids it to load or run anything.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.table import Table
from rich.text import Text

from huizhen.protocol.errors import ConfigError
from huizhen.simulations.report_figures import figures_of, first_seed
from huizhen.simulations.verdict import (
    ARMS,
    DASH,
    METRICS,
    SHARED,
    arm_of,
    baseline_best,
    best_local,
    epsilon_of,
    megabytes,
    metrics_of,
    number,
    plain,
    primary_metric,
    spread_of,
    value_of,
    verdict,
)
from huizhen.storage.files import write_whole

PRIVACY = {
    "mechanism": "mechanism",
    "unit": "unit of privacy",
    "epsilon": "ε",
    "delta": "δ",
    "noise_multiplier": "noise multiplier σ",
    "sampling_rate": "sampling rate q",
    "steps": "steps",
    "accountant": "accountant",
}


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
    write_whole(path, html.encode())
    return path


def summary_table(results: Mapping[str, Any]) -> Table:
    """Return the table of arms for the terminal."""
    metrics = metrics_of(results)
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


def _page(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that the template shows."""
    if not results.get("arms"):
        raise ConfigError("the results have no arms, a report needs at least one: run the study")
    metrics = metrics_of(results)
    primary = primary_metric(results)
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
        "figures": list(figures_of(results, primary)),
        "enough": (results.get("enough") or {}).get("text"),
        "data": data,
        "sites": _sites(results),
        "privacy": [(PRIVACY.get(k, k.replace("_", " ")), _items(privacy[k])) for k in order],
        "fewer": _fewer(results, primary),
        "first_seed": first_seed(results),
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
        (number(p.get("patients")), number(p.get("epsilon"), 2), number(value_of(p, metric)))
        for p in results.get("sweep_patients") or []
    ]


def _rows(results: Mapping[str, Any]) -> list[Row]:
    rows = []
    primary = primary_metric(results)
    for arm, name in ARMS.items():
        entry = arm_of(results, arm)
        if not entry:
            continue
        rounds = entry.get("rounds") or []
        # where all records are pooled nothing travels between parties
        sent = [r for r in rounds if arm in SHARED and r.get("bytes_up") is not None]
        rows.append(
            Row(
                name=f"{name} (mean)" if arm == "local" else name,
                colour=arm,
                metrics=entry.get("metrics") or {},
                spread=spread_of(entry),
                seconds=entry.get("seconds"),
                bytes_up=sum(r["bytes_up"] for r in sent) if sent else None,
                bytes_down=sum(r.get("bytes_down") or 0 for r in sent) if sent else None,
                epsilon=epsilon_of(entry),
            )
        )
        if arm == "local" and (best := best_local(results, primary)):
            site = entry["sites"][best[0]]
            rows.append(
                Row(
                    name=f"best alone: {best[0]}",
                    colour=arm,
                    metrics=site.get("metrics") or {},
                    spread=spread_of(site),
                )
            )
    for name, values in (
        ("TF-IDF, best alone", baseline_best(results, primary)),
        ("TF-IDF, pooled", (results.get("baseline") or {}).get("pooled") or {}),
    ):
        if values:
            rows.append(Row(name=name, colour="baseline", metrics=values, spread={}))
    return rows


def _tiles(results: Mapping[str, Any], metric: str) -> list[tuple[str, str, str]]:
    """Return colour, value and caption of the numbers at the top."""
    best = best_local(results, metric)
    epsilon = epsilon_of(arm_of(results, "federated_dp"))
    tiles = [
        ("local", best[1] if best else None, "best hospital alone"),
        ("federated", value_of(arm_of(results, "federated"), metric), "together"),
        (
            "federated_dp",
            value_of(arm_of(results, "federated_dp"), metric),
            "together, private"
            + (f" (ε\u00a0=\u00a0{epsilon:.3g})" if epsilon is not None else ""),
        ),
        ("pooled", value_of(arm_of(results, "pooled"), metric), "all records pooled"),
    ]
    return [(colour, number(value), text) for colour, value, text in tiles if value is not None]


def _sites(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per hospital: its data, and what the run says about it."""
    sites = (results.get("data") or {}).get("sites") or {}
    shared = arm_of(results, "federated") or arm_of(results, "federated_dp")
    budgets = arm_of(results, "federated_dp").get("epsilon") or {}
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
        rounds = [r for r in arm_of(results, arm).get("rounds") or [] if r.get("bytes_up")]
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
            share = arm_of(results, arm).get("outside_share", fmean(shares))
            text += f"; {100 * share:.1f} % of the training time was outside forward and backward"
        sentences.append(text[0].upper() + text[1:] + ".")
    if released := arm_of(results, "federated_dp").get("released"):
        sentences.append(_released(released))
    return sentences


def _released(released: Mapping[str, Any]) -> str:
    """Return the metrics that the hospitals let out, in a sentence."""
    text = (
        f"Noised counts on held-out patients, ε = {released['epsilon']:g} for each of them and one "
        "release: "
    )
    joint = released["joint"]
    if joint is None:
        return text + "every hospital kept them back, too few patients seem to be behind them."
    parts = [
        f"{METRICS[name]} {one['value']:.3f} ({one['low']:.3f} to {one['high']:.3f})"
        for name, one in joint["rates"].items()
    ]
    if joint["loss"] is not None:
        one = joint["loss"]
        parts.append(f"loss {one['value']:.2f} ({one['low']:.2f} to {one['high']:.2f})")
    text += (
        f"{', '.join(parts)} on about {joint['patients']} patients, all a coordinator would know"
    )
    if kept := len(joint["suppressed"]):
        text += f"; {kept} of the hospitals kept theirs back"
    return text + "."


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
            f"{unseen} test records have a class that the study does not list: they count as "
            "errors for every arm."
        )
    if not any(spread_of(arm_of(results, arm)) for arm in ARMS):
        limits.append("One run per arm: how much of a difference is chance is not known.")
    limits.append(
        "Every hospital ran on the same machine, and all test patients were scored in one place: a "
        "real alliance has networks, outages, and only the metrics its study lets out."
    )
    return limits
