"""``huizhen strategies``: which ways to average there are, what each promises and what it moves."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from huizhen.cli.actions import show_table
from huizhen.protocol.errors import ConfigError

if TYPE_CHECKING:
    from huizhen.strategies.about import Choice

_EXAMPLES = """examples:
  huizhen strategies
  huizhen strategies --modules 24 --width 2048 --rank 16 --sites 10 --rounds 20
  huizhen strategies --json

Bytes are float32, for an adapter of square layers; the default is RoBERTa-large with LoRA of rank 8
on query and value. A head's bytes come on top. docs/strategies.md says which to choose.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``strategies``."""
    parser = subparsers.add_parser(
        "strategies",
        help="ways to average: what each promises and what it moves",
        description="Ways to average, for [strategy] name in a study.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--modules", type=int, default=48, help="adapted layers (default 48)")
    add("--width", type=int, default=1024, help="rows and columns of a layer (default 1024)")
    add("--rank", type=int, default=8, help="[adapter] rank (default 8)")
    add("--sites", type=int, default=5, help="hospitals (default 5)")
    add("--rounds", type=int, default=20, help="[rounds] count (default 20)")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from huizhen.strategies.about import choices, square

    for name in ("modules", "width", "rank", "sites", "rounds"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}, expected 1 or more")
    shapes = square(args.modules, args.width, args.rank)
    found = choices(shapes, sites=args.sites, rounds=args.rounds)
    if args.json:
        print(json.dumps([asdict(one) for one in found], indent=1))
        return 0
    _show(found)
    return 0


def _show(found: "list[Choice]") -> None:
    rows = [
        {
            "name": one.name,
            "product": "exact" if one.facts.exact else "-",
            "works on": "sums" if one.facts.linear else "each update",
            "ranks": "may differ" if one.facts.mixed_ranks else "one",
            "up": _megabytes(one.up),
            "down": _megabytes(one.down),
            "last": _megabytes(one.down_last),
            "what it is": one.about,
        }
        for one in found
    ]
    show_table(tuple(rows[0]), rows)
    print("\nMB of one site: up and down in round 2, down in the last round.")
    print("exact: the product that goes on is the mean of the sites' products.")
    print("sums: the coordinator needs no single site's update, so secure sums can hide them.")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}"
