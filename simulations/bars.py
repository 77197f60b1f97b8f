"""Progress bars on a terminal, lines elsewhere: what every long command shows."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn


class LiveBars:
    """Bars that live while the context is entered; on no terminal there are none."""

    def __init__(self, console: Console, *columns: ProgressColumn) -> None:
        """Show on a console, with columns between the bar and the time left."""
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            *columns,
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        """Print a line, above the bars where there are any."""
        if self.console.is_terminal:
            self.bars.console.print(text, style="dim", markup=False, emoji=False, highlight=False)
        else:
            self.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
