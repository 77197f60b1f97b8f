"""The report's figures, as inline SVG that follows the page's light or dark colours.

Matplotlib draws with marker colours, which are replaced by the page's CSS variables; text stays
text in the page's own font. The same values give the same bytes: ids come from a fixed salt and
carry no date. Nothing in the result loads anything, so neither does the page.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

# Marker colour -> CSS variable of templates/report.html.j2. The values show where there is no CSS.
PALETTE = {
    "ink": "#1d2431",
    "muted": "#5b6573",
    "grid": "#d9dde3",
    "paper": "#fffffe",
    "local": "#b7791e",
    "pooled": "#2b6cb1",
    "federated": "#0f766f",
    "federated_dp": "#8b3fa1",
    "baseline": "#8a94a4",
}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "huizhen",
    "svg.id": None,
    "text.parse_math": False,  # a site may be called "$x$"
    "font.size": 10.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": PALETTE["grid"],
    "axes.labelcolor": PALETTE["muted"],
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": PALETTE["ink"],
    "xtick.color": PALETTE["muted"],
    "ytick.color": PALETTE["muted"],
    "grid.color": PALETTE["grid"],
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
}
WIDTH = 5.6  # inches; 403 units, so that text is still legible on a phone 360 pixels wide


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One arm of a comparison."""

    name: str
    value: float
    colour: str  # a key of PALETTE
    seeds: Sequence[float] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What one arm did over the rounds; either list of points may be empty."""

    name: str
    colour: str
    metric: Sequence[tuple[int, float]]
    loss: Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """One privacy budget; ``times_patients``: the cohort whose noise this would be."""

    epsilon: float
    value: float
    times_patients: float | None


def bars_figure(bars: Sequence[Bar], label: str, *, is_share: bool) -> str:
    """Draw one horizontal bar per arm, with a dot per seed."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.62 + 0.42 * len(bars)), layout="constrained")
        axes = figure.add_subplot()
        for y, bar in enumerate(bars):
            alpha = 0.45 if bar.colour == "baseline" else 0.85
            axes.barh(y, bar.value, 0.62, color=PALETTE[bar.colour], alpha=alpha)
            axes.scatter(
                bar.seeds, [y] * len(bar.seeds), s=16, color=PALETTE["paper"],
                edgecolors=PALETTE["ink"], linewidths=0.9, zorder=3,
            )  # fmt: skip
            end = max([bar.value, *bar.seeds])
            axes.annotate(
                f"{bar.value:.3f}", (end, y), (6, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(range(len(bars)), [b.name for b in bars], color=PALETTE["ink"])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        if is_share:
            axes.set_xlim(0, 1.08)
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        else:
            axes.set_xlim(0, 1.15 * max(max([b.value, *b.seeds]) for b in bars) or 1)
        axes.grid(axis="x")
        axes.set_xlabel(label)
        return _svg(figure, "bars")


def rounds_figure(lines: Sequence[Line], label: str) -> str:
    """Draw the metric and, below it, the loss against the round."""
    with mpl.rc_context(STYLE):
        wanted = [n for n in ("metric", "loss") if any(getattr(line, n) for line in lines)]
        figure = Figure(figsize=(WIDTH, 0.9 + 1.75 * len(wanted)), layout="constrained")
        panels = figure.subplots(len(wanted), 1, sharex=True, squeeze=False)[:, 0]
        for name, axes in zip(wanted, panels, strict=True):
            for line in lines:
                points = getattr(line, name)
                if points:
                    axes.plot(
                        *zip(*points, strict=True), color=PALETTE[line.colour], label=line.name,
                        marker="o" if len(points) <= 15 else None, markersize=4,
                    )  # fmt: skip
            axes.set_ylabel(label if name == "metric" else "training loss")
            axes.grid()
        panels[-1].set_xlabel("round")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        drawn: dict[str, Artist] = {}
        for axes in panels:
            for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
                drawn.setdefault(text, handle)
        figure.legend(
            list(drawn.values()), list(drawn), loc="outside upper center", ncols=len(drawn)
        )
        return _svg(figure, "rounds")


def sites_figure(
    rows: Sequence[tuple[str, float, Mapping[str, float]]], label: str, *, names: Mapping[str, str]
) -> str:
    """Draw each hospital's own model against the shared ones, on its own test patients.

    Args:
        rows: hospital, value of its own model, value of each shared arm.
        label: of the metric.
        names: of the shared arms that are drawn, in the legend.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.05 + 0.36 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for y, (_, own, shared) in enumerate(rows):
            ends = [own, *(shared[a] for a in names if a in shared)]
            axes.plot([min(ends), max(ends)], [y, y], color=PALETTE["grid"], linewidth=3, zorder=1)
        ys = range(len(rows))
        own_values = [own for _, own, _ in rows]
        axes.scatter(
            own_values,
            ys,
            s=58,
            color=PALETTE["local"],
            label="its own model",
            zorder=2,
            marker="s",
        )
        for arm, name in names.items():
            points = [(shared[arm], y) for y, (_, _, shared) in enumerate(rows) if arm in shared]
            if points:
                xs, rows_y = zip(*points, strict=True)
                axes.scatter(xs, rows_y, s=64, color=PALETTE[arm], label=name, zorder=3)
        axes.set_yticks(ys, [_short(site) for site, _, _ in rows], color=PALETTE["ink"])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.margins(x=0.08)
        axes.set_xlabel(label)
        figure.legend(loc="outside upper center", ncols=1 + len(names), handletextpad=0.2)
        return _svg(figure, "sites")


def sweep_figure(
    points: Sequence[SweepPoint],
    label: str,
    *,
    without_noise: float | None = None,
    target: float | None = None,
) -> str:
    """Draw the metric against ε; above, how many times the patients the noise stands for."""
    points = sorted(points, key=lambda p: p.epsilon)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
        axes = figure.add_subplot()
        epsilons = [p.epsilon for p in points]
        axes.plot(
            epsilons, [p.value for p in points], color=PALETTE["federated_dp"], marker="o",
            markersize=6,
        )  # fmt: skip
        axes.set_xscale("log")
        _ticks(axes, epsilons, [f"{e:.3g}" for e in epsilons])
        axes.grid(axis="y")
        axes.set_xlabel("ε per hospital (log scale)")
        axes.set_ylabel(label)
        for value, text, colour, below in (
            (without_noise, "together, without noise", "federated", False),
            (target, "target", "muted", target is not None and target < (without_noise or 0)),
        ):
            if value is not None:
                axes.axhline(value, color=PALETTE[colour], linewidth=1.4, linestyle=(0, (5, 3)))
                axes.annotate(
                    f"{text}: {value:.3f}", (0, value), (4, -4 if below else 4),
                    color=PALETTE[colour], va="top" if below else "bottom",
                    xycoords=axes.get_yaxis_transform(), textcoords="offset points",
                )  # fmt: skip
        heights = [v for v in (without_noise, target, *(p.value for p in points)) if v is not None]
        axes.set_ylim(min(0.0, *heights), 1.16 * max(heights) or 1)
        _patients_axis(axes, points)
        return _svg(figure, "sweep")


def _patients_axis(axes: Axes, points: Sequence[SweepPoint]) -> None:
    """Add the axis "as if the hospitals had m × the patients", at the points that have an m."""
    known = [(p.epsilon, p.times_patients) for p in points if p.times_patients is not None]
    if not known:
        return
    upper = axes.twiny()
    upper.set_xscale("log")
    upper.set_xlim(axes.get_xlim())
    _ticks(upper, [e for e, _ in known], [f"{m:.2g}×" for _, m in known])
    for side in ("left", "right", "bottom", "top"):
        upper.spines[side].set_visible(False)
    reference = [e for e, m in known if abs(m - 1) < 1e-9]
    at = f" at ε = {reference[0]:.3g}" if reference else ""
    upper.set_xlabel(f"as if the hospitals had m × the patients{at}")


def _ticks(axes: Axes, positions: Sequence[float], labels: Sequence[str]) -> None:
    """Tick a logarithmic axis at ``positions`` only, as far as the labels have room."""
    low, high = axes.get_xlim()
    kept: dict[float, str] = {}
    for position, text in zip(positions, labels, strict=True):
        last = next(reversed(kept), None)
        if last is None or (high / low) ** 0.07 < position / last:
            kept[position] = text
    axes.xaxis.set_major_locator(FixedLocator(list(kept)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: kept.get(x, f"{x:g}")))


def _short(name: str, limit: int = 22) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def _svg(figure: Figure, prefix: str) -> str:
    """Return the figure as an ``<svg>`` element for a page, its ids unique by ``prefix``."""
    with StringIO() as file, warnings.catch_warnings():
        # The browser draws the letters, so matplotlib's own fonts need not have them.
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        figure.savefig(file, format="svg", metadata={"Date": None})
        text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    head, body = text.split(">", 1)
    box = re.findall(r'viewBox="[^"]+"', head)[0]
    body = re.sub(r'( id="|url\(#|href="#)', rf"\1{prefix}-", body)
    body = re.sub(r"\n\s*", "\n", body)
    for name, colour in PALETTE.items():
        body = body.replace(colour, f"var(--{name.replace('_', '-')}, {colour})")
    return f'<svg {box} aria-hidden="true">{body}'.rstrip()
