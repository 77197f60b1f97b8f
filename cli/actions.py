"""What the commands of a group have in common: ``--json``, ``--home`` and help with examples."""

import argparse
import json
from pathlib import Path
from typing import Any


def add_action(
    actions: Any, name: str, summary: str, examples: str, run: Any
) -> argparse.ArgumentParser:
    """Register a command, which ``run`` carries out, and return it for more arguments."""
    parser: argparse.ArgumentParser = actions.add_parser(
        name,
        help=summary,
        description=summary.capitalize() + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.add_argument(
        "--home", type=Path, help="where state lives (default: $HUIZHEN_HOME, else the data folder)"
    )
    parser.set_defaults(run=run)
    return parser


def add_ledger(parser: Any) -> None:
    """Let a command be told which ledger it is about."""
    parser.add_argument(
        "--ledger", type=Path, metavar="FILE", help="default: site/ledger.sqlite in the home"
    )


def ledger_path(arguments: argparse.Namespace) -> Path:
    """Return the ledger's file."""
    from huizhen.learning.bases import default_home

    path: Path | None = arguments.ledger
    return path or (arguments.home or default_home()) / "site" / "ledger.sqlite"


def print_json(document: dict[str, Any]) -> int:
    """Print a document for programs, and return the exit code of success."""
    print(json.dumps({"schema": 1, **document}, ensure_ascii=False, indent=1))
    return 0


def show_table(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    """Print rows for people; a list is shown with blanks between."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column)
    for row in rows:
        values = [row[column] for column in columns]
        table.add_row(*(" ".join(v) if isinstance(v, list) else str(v or "") for v in values))
    Console(markup=False, highlight=False).print(table)
