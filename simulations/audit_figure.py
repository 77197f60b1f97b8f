"""The picture of an audit: what the canaries scored, and the bound beside claim and ceiling.

Drawn from ``audit.json`` alone; the same document gives the same bytes.
"""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from huizhen.simulations.audit_verdict import REFUTED
from huizhen.simulations.figures import PALETTE, STYLE

_WIDTH, _HEIGHT, _DPI = 7.2, 5.6, 160  # inches, dots per inch
_BINS = 28
_GROUPS = (("out", "baseline", "not in the data"), ("in", "federated_dp", "in the data"))


def audit_figure(document: Mapping[str, Any]) -> bytes:
    """Return the picture of an audit as a PNG.

    Args:
        document: from ``audit_study``.
    """
    with mpl.rc_context({**STYLE, "figure.facecolor": PALETTE["paper"]}):
        room = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.08)
        figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, layout=room)
        above, below = figure.subplots(2, 1, height_ratios=[2.3, 1])
        figure.suptitle(_title(document), x=0.015, ha="left", fontsize=12, color=PALETTE["ink"])
        _scores(above, document)
        _bounds(below, document)
        with BytesIO() as file:
            figure.savefig(file, format="png", metadata={"Software": None})
            return file.getvalue()


def _title(document: Mapping[str, Any]) -> str:
    claim = document["claim"]
    outcome = "REFUTED" if document["verdict"] == REFUTED else "not refuted, not proved"
    return (
        f"Claim: ε = {claim['epsilon']:.2f}, δ = {claim['delta']:g} per {document['unit']} "
        f"in {claim['steps']} steps: {outcome}"
    )


def _scores(axes: Axes, document: Mapping[str, Any]) -> None:
    """Draw the scores of canaries in and out as two histograms, and where guesses were made."""
    groups = {name: np.asarray(document["scores"][name]) for name, *_ in _GROUPS}
    everything = np.sort(np.concatenate(list(groups.values())))
    width = float(everything[-1] - everything[0]) or 1.0
    edges = np.linspace(everything[0], everything[0] + width, _BINS + 1).tolist()
    for name, colour, said in _GROUPS:
        axes.hist(
            groups[name], edges, color=PALETTE[colour], alpha=0.55, edgecolor=PALETTE[colour],
            linewidth=0.8, label=f"{len(groups[name])} canaries {said}",
        )  # fmt: skip
    bound, top = document["bound"], axes.get_ylim()[1]
    half = bound["guesses"] // 2
    low, high = everything[half - 1], everything[-half]
    if 2 * half == len(everything):
        low = high = (low + high) / 2
    axes.set_xlim(everything[0] - 0.16 * width, everything[0] + 1.16 * width)
    axes.set_ylim(0, 1.2 * top)
    for limit, text, side, shift in ((low, "said out", "right", -6), (high, "said in", "left", 6)):
        axes.axvline(limit, color=PALETTE["muted"], linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            text, (limit, 1.12 * top), (shift, 0), ha=side, va="center",
            textcoords="offset points", color=PALETTE["muted"],
        )  # fmt: skip
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set_xlabel("score: what was released in a canary's direction, in units of C")
    axes.set_ylabel("canaries")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


def _bounds(axes: Axes, document: Mapping[str, Any]) -> None:
    """Draw the bound, the claim and the ceiling under each other on one scale of ε."""
    bound, claim = document["bound"], document["claim"]["epsilon"]
    rows = (
        ("shown", bound["epsilon_lower"], "federated_dp", f"ε ≥ {bound['epsilon_lower']:.2f}"),
        ("claim", claim, "ink", f"{claim:.2f}"),
        ("could show", bound["ceiling"], "baseline", f"{bound['ceiling']:.2f} without noise"),
    )
    for y, (_, value, colour, text) in enumerate(rows):
        axes.barh(y, value, 0.56, color=PALETTE[colour], alpha=0.8)
        axes.annotate(text, (value, y), (6, 0), textcoords="offset points", va="center")
    axes.axvline(claim, color=PALETTE["ink"], linewidth=1, linestyle=(0, (4, 3)), alpha=0.6)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], color=PALETTE["ink"])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, 1.35 * max(value for _, value, *_ in rows))
    axes.set_xlabel(
        f"ε: {bound['right']} of {bound['guesses']} guesses on {document['canaries']} canaries "
        f"were right; confidence {100 * bound['confidence']:.0f} %"
    )
