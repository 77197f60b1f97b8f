"""``huizhen site data``: what a hospital's export is, before anything is trained on it."""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huizhen.cli.actions import add_action, print_json, show_table
from huizhen.cli.site_home import clock, site_home

if TYPE_CHECKING:
    from huizhen.client.data_desk import Watch

_CHECK = """examples:
  huizhen site data check export/data.toml
  huizhen site data check export/data.toml --report report.html
  huizhen site data check export/data.toml --json

data.toml says what is read, what its columns mean, and on what ground it may be used; docs/data.md
explains every key. Reads the export twice and changes nothing of it. Writes problems.jsonl, each
problem with its place and reason, and a report of one page without small numbers; both stay here.
"""
_DRAFT = """examples:
  huizhen site data draft export/notes.csv                 writes export/data.toml
  huizhen site data draft labs.xlsx --out labs.toml

Knows columns by their names, in Chinese and English, and results by the table of labs. Purpose,
ground and units stay empty: fill them in, then run 'huizhen site data check'.
"""
_SHOWN_PROBLEMS = 12


def add_data(topics: Any) -> None:
    """Register ``data`` and its actions."""
    data = topics.add_parser(
        "data",
        help="look at the records: quality, de-identification, who is held out",
        description="A hospital's own records.",
    )
    actions = data.add_subparsers(required=True, metavar="ACTION")
    draft = add_action(actions, "draft", "write a first data.toml for a table", _DRAFT, _draft)
    draft.add_argument("table", type=Path, metavar="TABLE", help="CSV, TSV, JSONL, Excel, Parquet")
    draft.add_argument(
        "--out", type=Path, metavar="DATA.toml", help="a new file (default: data.toml beside it)"
    )
    check = add_action(actions, "check", "say what would become of an export", _CHECK, _check)
    check.add_argument("data", type=Path, metavar="DATA.toml", help="what the export is")
    check.add_argument("--cohort", default="all", help="of these patients (default: all)")
    check.add_argument(
        "--report", type=Path, metavar="FILE.html", help="default: report.html in the site's folder"
    )


def _draft(args: argparse.Namespace) -> int:
    from huizhen.client.data_draft import draft
    from huizhen.client.quality.lab_table import shipped_table
    from huizhen.protocol.errors import ConfigError, StorageError

    out: Path = args.out or args.table.parent / "data.toml"
    text = draft(args.table, shipped_table())
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(f"{str(out)!r} exists: choose another --out") from error
    except OSError as error:
        raise StorageError(f"cannot write {str(out)!r}: {error.strerror}") from error
    if args.json:
        return print_json({"out": str(out)})
    print(f"{out} is a first draft: read it, fill in what is empty, then run")
    print(f"  huizhen site data check {out}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from huizhen.client.data_desk import DataDesk
    from huizhen.client.data_key import load_data_key
    from huizhen.client.data_report import page, statement
    from huizhen.client.data_terms import load_data
    from huizhen.client.quality.lab_table import shipped_table
    from huizhen.protocol.errors import ConfigError
    from huizhen.storage.files import write_whole

    if not args.cohort.replace("-", "").isalnum():
        raise ConfigError(f"cohort is {args.cohort!r}, expected letters, digits and '-'")
    home, today = site_home(args).folder, clock().date()
    folder = home / "data" / args.cohort
    data = load_data(args.data)
    key = load_data_key(home / "keys" / "data.key")
    with _progress(is_shown=not args.json) as watch:
        desk = DataDesk(
            data, args.data.parent, folder,
            cohort=args.cohort, key=key, table=shipped_table(), watch=watch,
        )  # fmt: skip
        document = statement(data, desk.check(today), today)
    report = args.report or folder / "report.html"
    write_whole(report, page(document).encode())
    places = {"report": str(report), "problems": str(folder / "problems.jsonl")}
    if args.json:
        return print_json({**places, "statement": document})
    _show(document)
    print(f"each problem with its place: {places['problems']}")
    print(f"the report: {places['report']}")
    return 0


def _show(document: Mapping[str, Any]) -> None:
    """Print what matters, as few numbers as the report has."""
    least = document["smallest_cell"]

    def number(count: int | None) -> str:
        return f"few (under {least}, or told by others)" if count is None else f"{count:,}"

    records, patients = number(document["records"]), number(document["patients"])
    held_out = number(document["held_out_patients"])
    print(f"{document['name']}: {records} records of {patients} patients could be used,")
    print(f"{held_out} of them held out to measure on")
    for name in ("fates", "problems"):
        cells = [
            cell for cell in document[name] if cell["count"] != 0 and cell["name"] != "records"
        ]
        rows = [{name: cell["name"], "entries": number(cell["count"])} for cell in cells]
        if rows:
            show_table((name, "entries"), rows[:_SHOWN_PROBLEMS])
    recall = document["recall"]
    if recall is not None:
        found = ", ".join(
            f"{one['name']} {one['hits'] / one['of']:.3f}"
            for one in recall["familiar"]
            if one["name"] in ("name", "id", "phone", "mrn")
        )
        print(f"de-identification finds on synthetic notes: {found}")


@contextmanager
def _progress(*, is_shown: bool) -> "Iterator[Watch]":
    """Show how far it is, where somebody looks."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not is_shown) as bar:
        task = bar.add_task("reading data.toml", total=None)

        def watch(step: str, count: int) -> None:
            done = f", {count:,} records" if count else ""
            bar.update(task, description=f"{step}{done}")

        yield watch
