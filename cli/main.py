"""The one command ``huizhen``: errors become one line and an exit code."""

import argparse
import os
import sys
from importlib.metadata import version

from huizhen.cli import audit, coordinator, demo, models, privacy, simulate, site, strategies
from huizhen.protocol.errors import HuizhenError

INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every group of commands."""
    parser = argparse.ArgumentParser(
        prog="huizhen",
        description="Huizhen 会诊: hospitals train one LoRA adapter together; "
        "the records stay home.",
        epilog="Start with: huizhen demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"huizhen {version('huizhen')}")
    groups = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (demo, simulate, models, strategies, privacy, coordinator, site, audit):
        module.add_parser(groups)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except HuizhenError as error:
        print(f"huizhen: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("huizhen: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
