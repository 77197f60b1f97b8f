"""The picture of a privacy plan: ε over the rounds, and noise against signal over patients.

Both panels show numbers of ``protocol/planning.py``, whose docstring defines the ratio and its
thresholds.
"""

import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from huizhen.protocol.errors import ConfigError, StorageError
from huizhen.protocol.plan_advice import alike
from huizhen.protocol.planning import CLEAR, DROWNED, Plan, Verdict
from huizhen.simulations.figures import PALETTE, STYLE

FORMATS = (".png", ".svg", ".pdf")
_COLOURS: dict[Verdict, str] = {
    "clear": PALETTE["federated"],
    "noisy": PALETTE["local"],
    "drowned": PALETTE["federated_dp"],
}
_PAPER: dict[Any, Any] = {**STYLE, "figure.facecolor": "white", "savefig.dpi": 160}


def draw_plan(plan: Plan, path: Path) -> None:
    """Write the picture of a plan.

    Args:
        plan: what to draw.
        path: its ending chooses the format, one of ``FORMATS``.

    Raises:
        ConfigError: the ending is another.
        StorageError: the file cannot be written.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--out is {str(path)!r}, expected a name in {', '.join(FORMATS)}")
    with mpl.rc_context(_PAPER), warnings.catch_warnings():
        # A site may be called what matplotlib's own fonts cannot write.
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        figure = Figure(figsize=(9.6, 3.9), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
        _draw_epsilon(left, plan)
        _draw_ratio(right, plan)
        try:
            figure.savefig(path)
        except OSError as error:
            raise StorageError(f"cannot write {str(path)!r}: {error.strerror}") from error


def _draw_epsilon(axes: Axes, plan: Plan) -> None:
    rounds, epsilons = zip(*[(0, 0.0), *plan.epsilon_after], strict=True)
    axes.plot(
        rounds,
        epsilons,
        color=PALETTE["federated_dp"],
        marker="o" if len(rounds) <= 26 else None,
        markersize=3.5,
    )
    axes.axhline(plan.terms.epsilon, color=PALETTE["muted"], linewidth=1.2, linestyle=(0, (5, 3)))
    axes.annotate(
        f"agreed: ε = {plan.terms.epsilon:g}", (0, plan.terms.epsilon), (2, 4),
        textcoords="offset points", color=PALETTE["muted"],
    )  # fmt: skip
    axes.set_xlim(0, rounds[-1] * 1.03)
    axes.set_ylim(0, 1.14 * plan.terms.epsilon)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid()
    axes.set_xlabel("round")
    axes.set_ylabel("ε that a patient has spent")
    axes.set_title(f"ε at δ = {plan.terms.delta:g}", loc="left", fontsize=10.5)


def _draw_ratio(axes: Axes, plan: Plan) -> None:
    sizes, ratios = zip(*plan.ratio_of_patients, strict=True)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot(sizes, ratios, color=PALETTE["ink"], linewidth=1.4)
    low, high = min(ratios), max(ratios)
    bottom, top = min(low, CLEAR / 2, plan.study_ratio) / 1.3, max(high, DROWNED * 2) * 1.3
    bands: tuple[tuple[Verdict, float, float], ...] = (
        ("clear", bottom, CLEAR),
        ("noisy", CLEAR, DROWNED),
        ("drowned", DROWNED, top),
    )
    for verdict, start, end in bands:
        axes.axhspan(start, end, color=_COLOURS[verdict], alpha=0.09, linewidth=0)
        axes.annotate(
            verdict, (0.985, end), (0, -4), xycoords=("axes fraction", "data"), ha="right",
            va="top", textcoords="offset points", color=_COLOURS[verdict],
        )  # fmt: skip
    _mark_sites(axes, plan)
    if len(plan.sites) > 1:
        axes.axhline(plan.study_ratio, color=_COLOURS[plan.verdict], linewidth=1.6, linestyle="--")
        axes.annotate(
            f"all {len(plan.sites)} together: {plan.study_ratio:.2g}", (0.015, plan.study_ratio),
            (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
            color=_COLOURS[plan.verdict],
        )  # fmt: skip
    axes.set_xlim(sizes[0], sizes[-1])
    axes.set_ylim(bottom, top)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
        axis.set_minor_locator(NullLocator())
    axes.grid()
    axes.set_xlabel("patients of a site")
    axes.set_ylabel("noise ÷ longest signal")
    axes.set_title(
        f"Whole study: {plan.terms.steps:,} steps, {plan.terms.parameters:,} parameters",
        loc="left", fontsize=10.5,
    )  # fmt: skip


def _mark_sites(axes: Axes, plan: Plan) -> None:
    """Draw one dot per size, named where there is room: by turns over and under the curve."""
    last = {1: 0.0, -1: 0.0}
    span = plan.ratio_of_patients[-1][0] / plan.ratio_of_patients[0][0]
    for i, (site, count) in enumerate(alike(plan.sites)):
        axes.scatter(
            [site.patients], [site.study_ratio], s=42, color=_COLOURS[site.verdict],
            edgecolors="white", linewidths=1, zorder=4,
        )  # fmt: skip
        side = -1 if i % 2 else 1
        if site.patients > last[side] * span**0.07:
            last[side] = site.patients
            axes.annotate(
                f"{site.patients:,}" if count == 1 else f"{site.patients:,} (×{count})",
                (site.patients, site.study_ratio), (6 * side, 4 * side), zorder=5,
                textcoords="offset points", ha="left" if side > 0 else "right",
                va="bottom" if side > 0 else "top",
            )  # fmt: skip
