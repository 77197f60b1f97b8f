"""Live progress of a run: a bar on a terminal, a line per round elsewhere."""

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import TaskID, TextColumn

from huizhen.protocol.mechanism import Mechanism
from huizhen.simulations.bars import LiveBars
from huizhen.simulations.engine import Work
from huizhen.simulations.runner import Observer


class Progress(LiveBars, Observer):
    """Shows round, loss, ε, bytes per site and the time left."""

    def __init__(self, console: Console) -> None:
        """Show on a console; a quiet one shows nothing."""
        super().__init__(console, TextColumn("{task.fields[detail]}", markup=False))
        self._total: TaskID | None = None
        self._arm: TaskID | None = None
        self._unit = ""

    def planned(self, works: list[Work]) -> None:
        """Start the bar of the whole run; its unit is a record read once."""
        total = sum(work.study.rounds.count * _cost(work) for work in works)
        self._total = self.bars.add_task("whole run", total=total, detail="")

    def restored(self, work: Work, rounds: int) -> None:
        """Count the rounds that an earlier run has done."""
        if self._total is not None:
            self.bars.update(self._total, advance=rounds * _cost(work))

    def site_done(self, work: Work, round: int, site: str, loss: float, sent: int) -> None:
        """Move the bars by one site's part."""
        if work.unit != self._unit:
            if self._arm is not None:
                self.bars.remove_task(self._arm)
            self._unit = work.unit
            self._arm = self.bars.add_task(
                work.unit, total=work.study.rounds.count * len(work.sites), detail=""
            )
            self.bars.update(self._arm, completed=(round - 1) * len(work.sites))
        shown = "" if math.isnan(loss) else f" loss {loss:.3f}"
        self.bars.update(
            self._arm or TaskID(0),
            advance=1,
            detail=f"{self._running(work, round)} {site}{shown} {_size(sent)}/site",
        )
        if self._total is not None:
            self.bars.update(self._total, advance=_cost(work) / len(work.sites))

    def round_done(self, work: Work, entry: Mapping[str, Any]) -> None:
        """Print the round's line where there is no terminal."""
        parts = [f"{work.unit}: round {entry['round']}/{work.study.rounds.count}"]
        if "loss" in entry:
            parts.append(f"loss {entry['loss']:.3f}")
        if "metrics" in entry:
            parts += [f"{key} {value:.3f}" for key, value in list(entry["metrics"].items())[:1]]
        if "epsilon" in entry:
            parts.append(f"ε {entry['epsilon']:.2f}")
        parts.append(f"{_size(entry['bytes_up'] / len(work.sites))}/site up")
        parts.append(f"{entry['seconds']:.1f} s")
        line = ", ".join(parts)
        if not self.console.is_terminal or entry["round"] == work.study.rounds.count:
            self.say(line)
        if self._arm is not None and entry["round"] < work.study.rounds.count:
            self.bars.update(self._arm, detail=self._running(work, entry["round"] + 1))

    def _running(self, work: Work, round: int) -> str:
        """Return the round and the ε that it is charged for, before its first gradient."""
        text = f"round {round}/{work.study.rounds.count}"
        if not (work.study.is_private and self.console.is_terminal):
            return text
        return f"{text} ε {Mechanism.of(work.study).epsilon_after(round):.2f}"


def _cost(work: Work) -> float:
    """Return the records that one round reads."""
    study = work.study
    records = sum(len(examples.ids) for examples in work.sites.values())
    if study.is_private:
        return records * study.privacy.sampling_rate * study.rounds.local_steps
    return float(records * study.rounds.local_epochs)


def _size(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
