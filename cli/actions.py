"""What the commands of a group have in common: ``--json``, ``--home`` and help with examples."""

import argparse
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
