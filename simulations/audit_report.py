"""An audit as people meet it: progress, a table to read, ``audit.json`` and the picture."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn
from rich.table import Table

from huizhen.simulations.audit_figure import audit_figure
from huizhen.simulations.audit_study import Auditor, duration
from huizhen.simulations.bars import LiveBars
from huizhen.storage.files import write_whole

DOCUMENT, PICTURE = "audit.json", "audit.png"


class AuditProgress(LiveBars, Auditor):
    """Shows the steps as a bar on a terminal, as a few lines elsewhere."""

    def __init__(self, console: Console) -> None:
        """Show on a console; a quiet one shows nothing."""
        super().__init__(console, MofNCompleteColumn())
        self._steps = self.bars.add_task("private steps", total=None, visible=False)

    def stepped(self, done: int, steps: int, seconds: float) -> None:
        """Move the bar; where there is no terminal, print a line now and then."""
        self.bars.update(self._steps, total=steps, completed=done, visible=True)
        if not self.console.is_terminal and done < steps and done % max(1, steps // 4) == 0:
            left = seconds / done * (steps - done)
            self.say(f"step {done} of {steps}, about {duration(left)} left")


def audit_table(document: Mapping[str, Any]) -> Table:
    """Return what a person reads of an audit, the verdict last."""
    table = Table.grid(padding=(0, 2))
    for name, text in _rows(document):
        table.add_row(name, text)
    return table


def _rows(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    claim, bound, draws = document["claim"], document["bound"], document["draws"]
    yield (
        "claim",
        f"ε = {claim['epsilon']:.2f}, δ = {claim['delta']:g} per {document['unit']} at site "
        f"{document['site']}: σ = {claim['noise_multiplier']:g}, q = {claim['sampling_rate']:g}, "
        f"{claim['steps']} steps",
    )
    yield (
        "canaries",
        f"ε ≥ {bound['epsilon_lower']:.2f} with {100 * bound['confidence']:.0f} % confidence: "
        f"{bound['right']} of {bound['guesses']} guesses on {document['canaries']} canaries are "
        f"right; without any noise they would show {bound['ceiling']:.2f}",
    )
    if not document["in_reach"]:
        advice = document["advice"]
        yield (
            "",
            "that is under the claim: canaries could not refute it, only the checks below could"
            + (f"; within reach: {advice}" if advice else ""),
        )
    moved, compared = document["neighbours"]["moved"], document["neighbours"]["patients"]
    yield (
        "neighbours",
        f"leaving out one of {compared} real patients moved the clipped sum by {max(moved):.3f} C "
        f"at most ({len(moved)} tried)",
    )
    yield (
        "draws",
        f"{draws['least']} to {draws['most']} of {draws['of']} patients and canaries a step, "
        f"p = {draws['p_value']:.2g} under Poisson sampling",
    )
    yield "noise", f"p = {document['noise']['p_value']:.2g} if σ is what is claimed"
    for note in document["notes"]:
        yield "note", note
    yield "verdict", f"{document['verdict']}. {document['meaning']}"


def write_audit(document: Mapping[str, Any], out: Path) -> None:
    """Write ``audit.json`` and ``audit.png`` into a folder, over those of an earlier audit.

    Raises:
        StorageError: the folder cannot be written.
    """
    text = json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    write_whole(out / DOCUMENT, text.encode())
    write_whole(out / PICTURE, audit_figure(document))
