"""How ``huizhen privacy plan`` looks on a terminal."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from huizhen.protocol.plan_advice import alike, counted

if TYPE_CHECKING:
    from huizhen.protocol.plan_advice import Advice
    from huizhen.protocol.planning import Plan

_COLOURS = {"clear": "green", "noisy": "yellow", "drowned": "red"}


def print_plan(
    plan: "Plan", advice: "tuple[Advice, ...]", sentences: "tuple[str, ...]", *, unit: str
) -> None:
    """Print the terms, a line for each size of site, the verdict, ε by rounds, and the advice."""
    terms, output = plan.terms, Console(highlight=False)
    rounds, steps = counted(terms.rounds, "round"), counted(terms.steps_per_round, "step")
    output.print(
        f"ε = {terms.epsilon:g} at δ = {terms.delta:g} for each {unit}; {rounds} of {steps}; "
        f"{counted(terms.parameters, 'trained parameter')}; clip at {terms.max_grad_norm:g}; "
        f"{terms.weights} weights"
        + (f"; at most {terms.batch_cap:,} {unit}s a step" if terms.batch_cap else "")
    )
    output.print(_sites_table(plan, unit))
    output.print(
        "noise: in each coordinate of a step's mean gradient; ratio: the noise's length over the "
        "longest signal, which is clipped gradients that all point the same way\n",
        style="dim",
    )
    for sentence in sentences:
        output.print(escape(sentence))
    output.print(f"\nε that a {unit} has spent", style="bold")
    output.print(_epsilon_table(plan))
    output.print("\nWhat would help, each change alone", style="bold")
    output.print(_advice_table(plan, advice))


def _sites_table(plan: "Plan", unit: str) -> "Table":
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("site", overflow="fold")
    groups = alike(plan.sites)
    many = len(groups) < len(plan.sites)
    if many:
        table.add_column("sites", justify="right")
    for title in (f"{unit}s", "rate", "σ", "noise", "ratio,\none step", "ratio,\nwhole study"):
        table.add_column(title, justify="right")
    table.add_column("verdict")
    for site, count in groups:
        table.add_row(
            escape(site.name),
            *([f"{count}"] if many else []),
            f"{site.patients:,}",
            f"{site.sampling_rate:.3g}",
            f"{site.noise_multiplier:.4g}",
            f"{site.noise_per_coordinate:.2g}",
            f"{site.step_ratio:.3g}",
            f"{site.study_ratio:.2f}",
            f"[{_COLOURS[site.verdict]}]{site.verdict}[/]",
        )
    if len(plan.sites) > 1:
        ratios = (f"{plan.step_ratio:.3g}", f"{plan.study_ratio:.2f}")
        verdict = f"[bold {_COLOURS[plan.verdict]}]{plan.verdict}[/]"
        total = [f"{len(plan.sites)}"] if many else []
        table.add_row("[bold]together[/]", *total, "", "", "", "", *ratios, verdict)
    return table


def _epsilon_table(plan: "Plan") -> "Table":
    """Return ε after some rounds; sizes of sites that spend alike share a line."""
    sites: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for site, _ in alike(plan.sites):
        sites.setdefault(plan.epsilon_of_sites[site.name], []).append(f"{site.patients:,}")
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("sites of size", overflow="fold")
    for round, _ in next(iter(sites)):
        table.add_column(f"round {round:,}", justify="right")
    for spent, sizes in sites.items():
        name = ", ".join(sizes) if len(sites) > 1 else "every size"
        table.add_row(name, *(f"{epsilon:.3g}" for _, epsilon in spent))
    return table


def _advice_table(plan: "Plan", advice: "tuple[Advice, ...]") -> "Table":
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for one in advice:
        better = one.times_less_noise >= 1
        times = one.times_less_noise if better else 1 / one.times_less_noise
        table.add_row(
            f"{plan.study_ratio:.2f} → {one.study_ratio:.2f}",
            f"{times:.1f} times {'less' if better else 'more'}",
            one.change,
            f"[dim]{one.price}[/]",
            style=None if better else "dim",
        )
    return table
