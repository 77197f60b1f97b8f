"""``huizhen simulate``: any data, many sites, one machine."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

EPILOG = """examples:
  huizhen simulate simulations/experiments/rare_disease_fed6.toml --out runs/fed6
  huizhen simulate my.toml --out runs/my --resume      go on after a stop or a crash
  huizhen simulate my.toml --out runs/my --json        results.json on standard output, no progress

The folder then holds report.html, results.json, privacy.json and the adapters.
"""


def add_parser(groups: Any) -> None:
    """Add the command."""
    parser = groups.add_parser(
        "simulate",
        help="compare local, pooled and federated training on your own data",
        description="Run an experiment: each arm and seed, on many sites in one process.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", type=Path, metavar="EXPERIMENT.toml")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run folder")
    parser.add_argument("--resume", action="store_true", help="go on with what the folder holds")
    add_run_options(parser)
    parser.set_defaults(run=run)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every run has."""
    parser.add_argument("--threads", type=int, metavar="N", help="processor threads; default: all")
    parser.add_argument("--home", type=Path, metavar="DIR", help="where base models are cached")
    parser.add_argument("--json", action="store_true", help="print results.json, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Run the experiment of the command line."""
    from huizhen.simulations.experiment import load_experiment

    experiment = load_experiment(arguments.experiment)
    again = ["huizhen", "simulate", str(arguments.experiment), "--out", str(arguments.out)]
    return run_and_show(experiment, arguments, arguments.out, resume=arguments.resume, again=again)


def run_and_show(
    experiment: Any, arguments: argparse.Namespace, out: Path, *, resume: bool, again: list[str]
) -> int:
    """Run an experiment with progress, print its table and write its report.

    Args:
        experiment: a parsed experiment.
        arguments: ``--threads``, ``--home``, ``--json``.
        out: the run folder.
        resume: go on with what it holds.
        again: the command, without the options that every run has and without ``--resume``.
    """
    import torch
    from rich.console import Console

    from huizhen.cli.main import INTERRUPTED
    from huizhen.protocol.errors import ConfigError
    from huizhen.simulations.progress import Progress
    from huizhen.simulations.report import summary_table, write_report
    from huizhen.simulations.runner import run_experiment

    more = " --resume" if again[1] == "simulate" else ""
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ConfigError(f"--threads is {arguments.threads}, expected at least 1")
        torch.set_num_threads(arguments.threads)
    command = shlex.join([*again, *_common_options(arguments)])
    console = Console(stderr=True, quiet=arguments.json)
    try:
        with Progress(console) as progress:
            results = run_experiment(
                experiment,
                out,
                resume=resume,
                home=arguments.home,
                observer=progress,
                command=command,
            )
        write_report(results, out)
    except KeyboardInterrupt:
        print(
            f"huizhen: stopped; every closed round is saved. Go on with:\n  {command}{more}",
            file=sys.stderr,
        )
        return INTERRUPTED
    if arguments.json:
        print(json.dumps(results, ensure_ascii=False))
        return 0
    output = Console(markup=False)
    output.print(summary_table(results))
    for line in [*results["notes"], results.get("enough", {}).get("text", "")]:
        if line:
            _say(output, line)
    if results["data"]["notice"]:
        _say(output, results["data"]["notice"], style="dim")
    _say(output, f"report: {out / 'report.html'}")
    for arm in ("federated", "federated_dp"):
        if arm in results["arms"]:
            promise = "no privacy guarantee"
            if arm == "federated_dp":
                promise = f"per-{experiment.study.privacy.unit} privacy"
            _say(output, f"adapter: {out / arm} ({promise})")
    return 0


def _say(output: Any, text: str, style: str = "") -> None:
    """Print a line; where nobody looks at a terminal it is not folded."""
    output.print(text, style=style, highlight=False, soft_wrap=not output.is_terminal)


def _common_options(arguments: argparse.Namespace) -> list[str]:
    """Return the options of ``add_run_options`` that were given."""
    options = [] if arguments.threads is None else ["--threads", str(arguments.threads)]
    options += [] if arguments.home is None else ["--home", str(arguments.home)]
    return [*options, "--json"] if arguments.json else options
