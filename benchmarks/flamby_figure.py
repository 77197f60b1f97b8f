"""The figure of ``flamby_dp``: accuracy against the published ε and against the true one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from huizhen.benchmarks.flamby_data import STANDARDISED, THEIRS


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy against the nominal and against the true ε."""
    figure = Figure(figsize=(8.0, 3.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    keys = sorted(result["epsilon"], key=float)
    pld = [[one["pld_true"] for one in result["epsilon"][key].values()] for key in keys]
    worst = [max(own) for own in pld]
    spans = [[high - min(own) for high, own in zip(worst, pld, strict=True)], [0.0] * len(keys)]
    for axes, x, bars, title in (
        (panels[0], [float(key) for key in keys], None, "as published: nominal ε"),
        (panels[1], worst, spans, "true ε (PLD) of the worst hospital; bar to the best"),
    ):
        for name, label, colour, mark in (
            (THEIRS, "FLamby, published", "#8a94a4", "o"),
            (STANDARDISED, "this run", "#0f766f", "s"),
        ):
            values = result["accuracy"][name]
            means, deviations = ([values[key][what] for key in keys] for what in ("mean", "sd"))
            axes.errorbar(
                x,
                means,
                yerr=deviations,
                xerr=bars if name == STANDARDISED else None,
                color=colour,
                marker=mark,
                markersize=5,
                capsize=2,
                linewidth=1.4,
                label=label,
            )
            axes.axhline(values["none"]["mean"], color=colour, linewidth=1, linestyle=":")
        axes.set(xscale="log", xlabel="ε at δ = 1e-4 (dotted: no DP)")
        axes.set_title(title, fontsize=9)
    panels[0].set_ylabel("accuracy, mean of four hospitals")
    panels[0].legend(fontsize=8, loc="lower right")
    figure.suptitle("Fed-Heart-Disease under DP, five seeds ± standard deviation", fontsize=11)
    figure.savefig(path)
