"""``huizhen audit``: a party's audit log, and what it has seen of the others'; all offline."""

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huizhen.cli.actions import add_action
from huizhen.cli.audit_files import party_file, read_file, write_new
from huizhen.cli.audit_verify import add_verify

if TYPE_CHECKING:
    from huizhen.protocol.audit import Entry

_SHOW_EXAMPLES = """examples:
  huizhen audit show
  huizhen audit show --last 0                           all entries
  huizhen audit show --study 9c1e2ab4 --json            8 digits or more of the study's digest
"""
_EXPORT_EXAMPLES = """examples:
  huizhen audit export --out log.json --key identity.pem
  huizhen audit export --out study.json --study 9c1e2ab4
  huizhen audit export --out part.json --from 100 --to 180 --membership membership.json

The document holds digests, numbers, codes and names of parties; nothing of any patient. That it was
made is an entry of the log too. Check it anywhere with: huizhen audit verify --export FILE
"""
_WITNESS_EXAMPLES = """examples:
  huizhen audit witness
  huizhen audit witness --of South --out south.json     for: huizhen audit verify --witnessed
"""
_SHORTEST = 8  # hex digits of a study's digest
_SHOWN = 12  # hex digits of any digest in the table
_LAST = 20


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the actions of ``audit``."""
    audit = subparsers.add_parser(
        "audit",
        help="the log of what this party did: show, verify, export, witness",
        description="The log of what this party did; nothing here asks a network.",
    )
    actions = audit.add_subparsers(required=True, metavar="ACTION")
    show = add_action(actions, "show", "what happened, the newest last", _SHOW_EXAMPLES, _show)
    _add_log(show)
    show.add_argument(
        "--last", type=int, default=_LAST, metavar="N", help=f"entries; 0: all; default: {_LAST}"
    )
    _add_study(show)
    add_verify(actions)
    out = add_action(
        actions, "export", "write entries as a document to check", _EXPORT_EXAMPLES, _export
    )
    _add_log(out)
    out.add_argument("--out", type=Path, metavar="FILE.json", required=True, help="a new file")
    _add_study(out)
    out.add_argument("--from", type=int, default=1, dest="first", metavar="N", help="default: 1")
    out.add_argument("--to", type=int, dest="last", metavar="N", help="default: all signed ones")
    out.add_argument(
        "--key", type=Path, metavar="FILE.pem", help="sign a checkpoint of all entries first"
    )
    out.add_argument(
        "--membership", type=Path, metavar="FILE", help="list the keys of those who signed"
    )
    witness = add_action(
        actions, "witness", "what was seen of the others' logs", _WITNESS_EXAMPLES, _witness
    )
    witness.add_argument(
        "--book", type=Path, metavar="FILE", help="default: witnessed.sqlite beside the log"
    )
    witness.add_argument("--of", metavar="NAME", help="whose log, with --out")
    witness.add_argument("--out", type=Path, metavar="FILE.json", help="write its last checkpoint")


def _add_log(parser: Any) -> None:
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="default: the party's audit.sqlite in the home"
    )


def _add_study(parser: Any) -> None:
    parser.add_argument("--study", type=_digits, metavar="DIGEST", help="of this study alone")


def _digits(text: str) -> str:
    if not re.fullmatch(rf"[0-9a-f]{{{_SHORTEST},64}}", text):
        raise argparse.ArgumentTypeError(
            f"{text[:80]!r} is not a study's digest or its first {_SHORTEST} hex digits or more"
        )
    return text


def _show(args: argparse.Namespace) -> int:
    from huizhen.storage.audit import AuditLog

    with AuditLog.open(party_file(args, args.log, "audit.sqlite")) as log:
        entries = log.entries()
        title = f"audit log of {log.log!r} in alliance {log.alliance!r}, {len(entries)} entries"
        head = log.head()
    if args.study is not None:
        entries = [one for one in entries if str(one.facts.get("study")).startswith(args.study)]
    shown = entries[-args.last :] if args.last > 0 else entries
    if args.json:
        print(json.dumps([one.to_json() for one in shown], ensure_ascii=False, indent=1))
        return 0
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    console.print(title, style="bold")
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("entry", justify="right", no_wrap=True)
    for column in ("time", "event", "facts"):
        table.add_column(column, no_wrap=column != "facts")
    for one in shown:
        table.add_row(str(one.sequence), one.time, one.event, _facts(one))
    console.print(table)
    if len(shown) < len(entries):
        console.print(f"{len(entries) - len(shown)} earlier ones are not shown: --last 0")
    console.print(f"head {head.size}:{head.root}", style="dim", soft_wrap=True)
    return 0


def _facts(entry: "Entry") -> str:
    return "  ".join(f"{name} {_short(value)}" for name, value in entry.facts.items())


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ":".join(_short(value[name]) for name in ("size", "root"))
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:_SHOWN]
    return "-" if value is None else str(value)


def _export(args: argparse.Namespace) -> int:
    from huizhen.protocol.audit_checkpoints import (
        claimed_checkpoint,
        claimed_membership,
        keys_of_members,
    )
    from huizhen.protocol.errors import ConfigError
    from huizhen.protocol.statements import digest_of, moment
    from huizhen.storage.audit import AuditLog
    from huizhen.storage.audit_export import export
    from huizhen.storage.keys import load_key

    if args.out.exists():
        raise ConfigError(f"{str(args.out)!r} exists: choose another --out")
    with AuditLog.open(party_file(args, args.log, "audit.sqlite")) as log:
        if args.key is not None:
            log.checkpoint(load_key(args.key))
        keys = None
        if args.membership is not None and (newest := log.newest()) is not None:
            members = keys_of_members(claimed_membership(read_file(args.membership)))
            keys = members(moment(claimed_checkpoint(newest).issued))
        study = None if args.study is None else _find(log.entries(), args.study)
        data = export(log, first=args.first, last=args.last, study=study, keys=keys)
        shown = json.loads(data)
        first, last = shown["first"], shown["last"]
        # What leaves is in the log before it is anywhere else.
        log.append("log_exported", document=digest_of(data), first=first, last=last, study=study)
    write_new(args.out, data)
    count, digest = len(shown["entries"]), digest_of(data)
    if args.json:
        print(json.dumps({"schema": 1, "out": str(args.out), "entries": count, "sha256": digest}))
        return 0
    print(f"{count} of entries {first} to {last} are in {args.out}, SHA-256 {digest}")
    print("check them anywhere, with a key or a membership that is trusted there:")
    print(f"  huizhen audit verify --export {args.out} --key HEX")
    return 0


def _find(entries: "list[Entry]", begin: str) -> str:
    """Return the one study of these entries whose digest begins so."""
    from huizhen.protocol.errors import ConfigError

    studies = {one.facts["study"] for one in entries if one.facts.get("study") is not None}
    found = [study for study in studies if study.startswith(begin)]
    if len(found) != 1:
        count = f"{len(found)} studies of this log begin" if found else "no study here begins"
        raise ConfigError(f"{count} with {begin!r}, expected one: 'huizhen audit show' has them")
    return str(found[0])


def _witness(args: argparse.Namespace) -> int:
    from huizhen.protocol.audit_checkpoints import claimed_checkpoint
    from huizhen.protocol.errors import ConfigError
    from huizhen.storage.witness import WitnessBook

    if (args.of is None) != (args.out is None):
        raise ConfigError("--of and --out go together: name the log and the new file")
    with WitnessBook(party_file(args, args.book, "witnessed.sqlite")) as book:
        known = book.known()
    if args.out is not None:
        documents = [one.document for one in known if one.log == args.of]
        if not documents:
            raise ConfigError(f"nothing was seen of the log of {args.of!r}: see 'audit witness'")
        write_new(args.out, documents[0])
    rows = [
        {
            "log": one.log,
            "size": one.head.size,
            "root": one.head.root,
            "issued": claimed_checkpoint(one.document).issued,
            "unproven": None if one.unproven is None else claimed_checkpoint(one.unproven).size,
            "forked": one.fork is not None,
        }
        for one in known
    ]
    if args.json:
        print(json.dumps({"schema": 1, "logs": rows}, ensure_ascii=False, indent=1))
        return 0
    for row in rows:
        print(f"{row['log']}: {row['size']} entries on {row['issued']}, {row['root']}")
        if row["forked"]:
            print("  has forked: its owner signed two histories, nothing of it is signed any more")
        elif row["unproven"] is not None:
            print(f"  then a checkpoint of {row['unproven']} came that nothing joins to this one")
    if not rows:
        print("nothing was seen of any other log yet")
    return 0
