"""``huizhen demo``: six synthetic hospitals, four arms, a few minutes."""

import argparse
import sys
from pathlib import Path
from typing import Any

from huizhen.cli.simulate import add_run_options, run_and_show

EPILOG = """examples:
  huizhen demo                     into runs/demo
  huizhen demo --out /tmp/demo     elsewhere

A demo that was stopped goes on where it was; a finished one is done anew.
"""


def add_parser(groups: Any) -> None:
    """Add the command."""
    parser = groups.add_parser(
        "demo",
        help="see six synthetic hospitals train one adapter, with and without privacy",
        description="Six synthetic hospitals learn to name rare diseases from phenotypes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    add_run_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Make the cohort and run the experiment on it."""
    from huizhen.simulations.demo import (
        clear_finished_demo,
        demo_experiment,
        write_demo_cohort,
    )

    out: Path = arguments.out
    clear_finished_demo(out)
    if not arguments.json:
        print(
            "making six synthetic hospitals from Human Phenotype Ontology frequencies",
            file=sys.stderr,
        )
    data = write_demo_cohort(out)
    again = ["huizhen", "demo", "--out", str(out)]
    return run_and_show(demo_experiment(data), arguments, out, resume=True, again=again)
