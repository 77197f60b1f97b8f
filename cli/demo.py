"""``huizhen demo``: six synthetic hospitals, four arms, a few minutes."""

import argparse
import sys
from pathlib import Path
from typing import Any

from huizhen.cli.simulate import add_run_options, run_and_show

EPILOG = """examples:
  huizhen demo                     into runs/demo
  huizhen demo --out /tmp/demo     elsewhere
  huizhen demo --federation        a coordinator and three hospitals as real processes over TLS,
                                   killed in the middle

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
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/demo")
    parser.add_argument(
        "--federation", action="store_true", help="run real processes, and kill some of them"
    )
    add_run_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Make the cohort and run the experiment on it."""
    from huizhen.simulations.demo import (
        clear_finished_demo,
        demo_experiment,
        write_demo_cohort,
    )

    if arguments.federation:
        return _run_federation(arguments)
    out: Path = arguments.out or Path("runs/demo")
    clear_finished_demo(out)
    if not arguments.json:
        print(
            "making six synthetic hospitals from Human Phenotype Ontology frequencies",
            file=sys.stderr,
        )
    data = write_demo_cohort(out)
    again = ["huizhen", "demo", "--out", str(out)]
    return run_and_show(demo_experiment(data), arguments, out, resume=True, again=again)


def _run_federation(arguments: argparse.Namespace) -> int:
    """Run the real federation and say whether its adapter is the expected one."""
    import dataclasses
    import json
    import time

    from huizhen.protocol.errors import ConfigError
    from huizhen.simulations.live_demo import run_live_demo

    out: Path = arguments.out or Path("runs/demo-federation")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{str(out)!r} is not empty: remove it or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()

    def say(text: str) -> None:
        if not arguments.json:
            print(f"{time.monotonic() - begin:6.1f} s  {text}", file=sys.stderr, flush=True)

    result = run_live_demo(out, arguments.home, say)
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(result), "is_same": result.is_same}))
    else:
        print(f"federation   {result.adapter}")
        print(f"in-process   {result.in_process}")
        print("the same adapter, to the byte" if result.is_same else "the adapters DIFFER")
        print(f"logs and folders of all parties: {out / 'federation'}")
    return 0 if result.is_same else 1
