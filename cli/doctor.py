"""How a doctor's findings are shown, for both parties."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huizhen.storage.findings import Finding

_MARKS = {
    "ok": ("ok     ", "green"),
    "warning": ("warning", "yellow"),
    "failure": ("FAILURE", "red"),
}


def show(findings: "Iterable[Finding]", *, as_json: bool) -> int:
    """Print findings as they come; return 1 where one is a failure."""
    from rich.console import Console

    console, found = Console(markup=False, highlight=False), []
    for one in findings:
        found.append(one)
        if as_json:
            continue
        mark, style = _MARKS[one.state]
        console.print(mark, style=style, end=" ")
        console.print(f"{one.name}: {one.text}", soft_wrap=True)
        if one.todo:
            console.print(f"        → {one.todo}", soft_wrap=True)
    if as_json:
        print(json.dumps({"schema": 1, "findings": [asdict(one) for one in found]}, indent=1))
    return int(any(one.state == "failure" for one in found))
