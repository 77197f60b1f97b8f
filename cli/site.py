"""``huizhen site``: what a hospital sees of its own part; the privacy ledger."""

import argparse
import dataclasses
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from huizhen.cli.actions import add_action, add_ledger, ledger_path
from huizhen.cli.ledger_changes import add_changes
from huizhen.cli.site_commands import add_commands
from huizhen.cli.site_data import add_data

if TYPE_CHECKING:
    from huizhen.protocol.ledger_entries import Head
    from huizhen.protocol.ledger_statement import StudyTotals, Totals

_SHOW_EXAMPLES = """examples:
  huizhen site ledger show
  huizhen site ledger show --ledger /srv/huizhen/rare.sqlite --json
"""
_VERIFY_EXAMPLES = """examples:
  huizhen site ledger verify
  huizhen site ledger verify --witnessed 17:9c1e…       all 64 digits of the digest
  huizhen site ledger verify --export ledger.json       needs no ledger file, at anybody's

A restored older copy has a whole chain too. It is found with the last entry that somebody else saw,
as the coordinator or an earlier 'verify' has it.
"""
_EXPORT_EXAMPLES = """examples:
  huizhen site ledger export --out ledger.json

The document holds digests of studies, noise, rounds and times; nothing of any patient.
"""
_WIDTH = 32  # of a bar


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the actions of ``site ledger``."""
    site = subparsers.add_parser(
        "site",
        help="a hospital's own part: join, approve, run, stop, the ledger",
        description="A hospital's part.",
    )
    topics = site.add_subparsers(required=True, metavar="ACTION")
    add_commands(topics)
    add_data(topics)
    ledger = topics.add_parser(
        "ledger",
        help="what was spent on the patients' privacy",
        description="What was spent on the patients' privacy, by all studies together.",
    )
    actions = ledger.add_subparsers(required=True, metavar="ACTION")
    add_changes(actions)
    show = add_action(actions, "show", "what is spent, reserved and left", _SHOW_EXAMPLES, _show)
    add_ledger(show)
    verify = add_action(
        actions, "verify", "check every entry and compute all again", _VERIFY_EXAMPLES, _verify
    )
    source = verify.add_mutually_exclusive_group()
    add_ledger(source)
    source.add_argument("--export", type=Path, metavar="FILE.json", help="an exported ledger")
    verify.add_argument(
        "--witnessed", type=_head, metavar="N:DIGEST", help="an entry that somebody else has seen"
    )
    out = add_action(
        actions, "export", "write it as a document to check", _EXPORT_EXAMPLES, _export
    )
    add_ledger(out)
    out.add_argument("--out", type=Path, metavar="FILE.json", required=True, help="a new file")


def _head(text: str) -> "Head":
    from huizhen.protocol.ledger_entries import Head

    found = re.fullmatch(r"([1-9][0-9]{0,14}):([0-9a-f]{64})", text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{text[:80]!r} is not N:DIGEST, an entry's number and the 64 hex digits of its digest"
        )
    return Head(int(found[1]), found[2])


def _show(args: argparse.Namespace) -> int:
    from huizhen.client.ledger import Ledger

    with Ledger.open(ledger_path(args)) as ledger:
        totals = ledger.totals()
    if args.json:
        print(json.dumps(dataclasses.asdict(totals), ensure_ascii=False, indent=1))
    else:
        _print_totals(totals)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from huizhen.client.ledger import Ledger
    from huizhen.protocol.errors import ConfigError
    from huizhen.protocol.ledger_statement import totals as totals_of
    from huizhen.protocol.ledger_statement import verify_export

    if args.export is None:
        with Ledger.open(ledger_path(args), witnessed=args.witnessed) as ledger:
            totals = ledger.verify()
    else:
        try:
            data = args.export.read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read {str(args.export)!r}: {error.strerror}") from error
        totals = totals_of(verify_export(data, args.witnessed))
    if args.json:
        print(json.dumps(dataclasses.asdict(totals), ensure_ascii=False, indent=1))
        return 0
    head = totals.head
    print(f"{head.sequence} entries of cohort {totals.cohort!r} at site {totals.site!r}:")
    print("each follows the one before, and was within the cap of its time")
    if args.witnessed is None:
        print("no witnessed entry was given: an older copy of this ledger would pass as well")
    else:
        print(f"entry {args.witnessed.sequence} is the one that was witnessed")
    print(f"epsilon {totals.epsilon_charged:.4g} is spent, {totals.epsilon_committed:.4g} with")
    print(f"what is reserved; the cap is {totals.cap.epsilon:g} at delta {totals.cap.delta:g}")
    print(f"head {head.sequence}:{head.digest}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from huizhen.client.ledger import Ledger
    from huizhen.protocol.errors import ConfigError, StorageError

    with Ledger.open(ledger_path(args)) as ledger:
        document = ledger.export()
    text = json.dumps(document, ensure_ascii=False, indent=1) + "\n"
    try:
        with args.out.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as error:
        raise ConfigError(f"{str(args.out)!r} exists: choose another --out") from error
    except OSError as error:
        raise StorageError(f"cannot write {str(args.out)!r}: {error.strerror}") from error
    count = len(document["entries"])
    if args.json:
        print(json.dumps({"out": str(args.out), "entries": count}, ensure_ascii=False))
    else:
        print(f"{count} entries are in {args.out}; check them anywhere with:")
        print(f"  huizhen site ledger verify --export {args.out}")
    return 0


def _print_totals(totals: "Totals") -> None:
    from rich.console import Console
    from rich.table import Table

    cap, head = totals.cap, totals.head
    console = Console(markup=False, highlight=False)
    console.print(
        f"cohort {totals.cohort!r} at site {totals.site!r}, by {totals.unit}, "
        f"{head.sequence} entries",
        style="bold",
    )
    bars = Table.grid(padding=(0, 2))
    bars.add_row(
        "training",
        _bar(totals.epsilon_charged, totals.epsilon_committed, cap.epsilon),
        f"ε {totals.epsilon_charged:.4g} spent, {totals.epsilon_committed:.4g} with what is "
        f"reserved, {totals.epsilon_left:.4g} left of {cap.epsilon:g} at δ {cap.delta:g}",
    )
    bars.add_row(
        "metrics",
        _bar(totals.metrics_epsilon, totals.metrics_epsilon, cap.metrics_epsilon),
        f"ε {totals.metrics_epsilon:.4g} spent, {totals.metrics_left:.4g} left of "
        f"{cap.metrics_epsilon:g}",
    )
    console.print(bars)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("study")
    for title in ("rounds", "σ", "q", "steps", "ε spent", "ε at most", "metrics ε"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("state")
    for study in totals.studies:
        table.add_row(*_row(study))
    console.print()
    console.print(table)
    console.print("each study's ε is its own alone; together they compose to the bar above")
    console.print(f"head {head.sequence}:{head.digest}", style="dim", soft_wrap=True)


def _row(study: "StudyTotals") -> tuple[str, ...]:
    charged = study.rounds_charged
    return (
        study.study[:12],
        f"{charged} of {study.rounds_reserved}",
        f"{study.spend.noise_multiplier:g}",
        f"{study.spend.sampling_rate:g}",
        f"{study.spend.steps}",
        f"{study.epsilon_charged:.4g}",
        f"{study.epsilon_committed:.4g}",
        f"{study.metrics_epsilon:.4g}",
        "closed" if study.is_closed else f"at round {study.last_round}" if charged else "reserved",
    )


def _bar(spent: float, committed: float, cap: float) -> str:
    """Return spent, reserved and free parts of a cap; what is not nothing shows."""
    if cap <= 0:
        return "░" * _WIDTH
    first = min(_WIDTH, max(round(_WIDTH * spent / cap), int(spent > 0)))
    both = min(_WIDTH, max(round(_WIDTH * committed / cap), first + int(committed > spent)))
    return "█" * first + "▒" * (both - first) + "░" * (_WIDTH - both)
