"""One real federation for many tests: starting it costs more than most of what is done to it."""

import json
import random

import pytest

from huizhen.simulations.live import Live

SITES = ("North", "South", "East")
SYMPTOMS = {"A": "fever cough", "B": "seizure ataxia"}


def records(site, count=40):
    """Return a site's made-up records as JSON lines."""
    draw = random.Random(site)  # noqa: S311 - made-up records
    lines = []
    for number in range(count):
        label = draw.choice("AB")
        fields = {"patient": f"{site}-{number}", "label": label}
        lines.append(json.dumps(fields | {"text": f"{SYMPTOMS[label]} case {number}"}))
    return "\n".join(lines) + "\n"


def study_text(name, *, rounds=8, quorum=3, minutes=5.0, steps=2):
    """Return a private study of the three sites as TOML."""
    sites = "\n".join(f"[sites.{site}]\npatients_public = 40" for site in SITES)
    return f"""
[study]
name = "{name}"
[base]
name = "tiny"
[adapter]
rank = 2
target_modules = ["q_proj", "v_proj"]
[task]
kind = "classification"
text = "{{text}}"
label = "label"
labels = ["A", "B"]
max_tokens = 32
[privacy]
unit = "patient"
epsilon = 8.0
delta = 1e-4
sampling_rate = 0.3
learning_rate = 0.5
[strategy]
name = "ffa_ortho"
[rounds]
count = {rounds}
local_steps = {steps}
quorum = {quorum}
deadline_minutes = {minutes}
{sites}
"""


def pytest_terminal_summary(terminalreporter):
    """Show how long each part took to recover, as docs/reliability.md has it."""
    found = [
        f"{value:6.1f} s  {report.nodeid.split('::')[-1]}"
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, value in report.user_properties
        if name == "seconds to recover"
    ]
    if found:
        terminalreporter.section("seconds to recover")
        terminalreporter.write_line("\n".join(found))


@pytest.fixture(scope="module")
def federation(tmp_path_factory, home):
    """A coordinator and three sites that run, with ledgers."""
    folder = tmp_path_factory.mktemp("federation")
    with Live(folder, bases=home) as live:
        live.found()
        for site in SITES:
            place = folder / f"{site}.jsonl"
            place.write_text(records(site), "utf-8")
            live.add_site(site, place, unit="patient", epsilon=1e6, min_sites=2)
            live.start_site(site)
        yield live
