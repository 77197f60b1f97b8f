"""The pages say what is true: links resolve, make targets exist, command lines parse."""

import ast
import dataclasses
import inspect
import json
import re
import shlex
from pathlib import Path, PurePath
from typing import get_args

import pytest

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`([^`\n]+)`")
LINKS = (
    re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)"),  # [text](target "title")
    re.compile(r"^\[[^\]]+\]:\s*(\S+)", re.MULTILINE),  # [name]: target
    re.compile(r"\b(?:src|href)=\"([^\"]+)\""),  # HTML
)
MADE_BY_TOOLS = {"build", "dist", "runs"}  # and whatever begins with a dot
PAGES = sorted(
    page.relative_to(ROOT)
    for page in ROOT.rglob("*.md")
    if not any(p in MADE_BY_TOOLS or p.startswith(".") for p in page.relative_to(ROOT).parts)
)

# Flower's own command line, which its packages import, is not up to date with click.
imports_flower = pytest.mark.filterwarnings("ignore:'click.utils:DeprecationWarning")
OPERATE = "docs/operate.md"
FOR_OPERATORS = [
    OPERATE, "docs/threat-model.md", "docs/reliability.md", "deploy/systemd/README.md",
    "deploy/nginx/README.md",
]  # fmt: skip


def fenced(text: str) -> list[str]:
    return [match[1] for match in FENCE.findall(text)]


def commands(source: str, program: str) -> list[list[str]]:
    """The arguments of every call of ``program`` in lines of shell, with or without a prompt."""
    found: list[list[str]] = []
    for line in source.replace("\\\n", " ").splitlines():
        bare = re.sub(r"^\s*[$%] ", "", line).strip()
        if program not in bare:
            continue
        lexer = shlex.shlex(bare, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            tokens = list(lexer)
        except ValueError:  # an apostrophe in a program's output
            continue
        words: list[str] = []
        for token in [*tokens, ";"]:
            if token and set(token) <= set("();<>|&"):
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words and PurePath(words[0]).name == program:
                    found.append(words[1:])
                words = []
            else:
                words.append(token)
    return found


def targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", makefile, re.MULTILINE))


def unknown_targets(lines: str, makefile: str) -> set[str]:
    asked = {word for call in commands(lines, "make") for word in call}
    return {word for word in asked if "=" not in word and word[0] != "-"} - targets(makefile)


def anchors(text: str) -> set[str]:
    """The names that a link may point at, as the usual hosts derive them from the headings."""
    names: set[str] = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", FENCE.sub("", text), re.MULTILINE):
        name = base = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = 0
        while name in names:
            count += 1
            name = f"{base}-{count}"
        names.add(name)
    return names


def leads_nowhere(link: str, page: Path, root: Path) -> bool:
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    if name.startswith("/") or not target.is_relative_to(root) or not target.exists():
        return True
    is_page = target.suffix == ".md"
    return bool(anchor) and is_page and anchor not in anchors(target.read_text("utf-8"))


def broken_links(page: Path, root: Path) -> list[str]:
    prose = CODE_SPAN.sub("", FENCE.sub("", page.read_text("utf-8")))
    links = [target for pattern in LINKS for target in pattern.findall(prose)]
    local = [link for link in links if not re.match(r"[a-z][a-z0-9+.-]*:", link)]
    return [link for link in local if leads_nowhere(link, page, root)]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_relative_link_resolves(page):
    assert broken_links(ROOT / page, ROOT) == []


def test_broken_links_are_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b` & c\n[x](gone.md) [x](page.md#a-b--c) [x](#nowhere) [x](/etc) ![x](../up.png)\n"
        '[x](https://example.org/gone) `[x](in-code.md)` <img src="gone.png">\n\n[x]: lost.md\n'
        "```\n[x](in-fence.md)\n```\n",
        "utf-8",
    )
    expected = {"gone.md", "#nowhere", "/etc", "../up.png", "gone.png", "lost.md"}
    assert set(broken_links(page, tmp_path)) == expected


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_make_target_on_a_page_exists(page):
    text = (ROOT / page).read_text("utf-8")
    shell = "\n".join([*fenced(text), *CODE_SPAN.findall(FENCE.sub("", text))])
    assert unknown_targets(shell, (ROOT / "Makefile").read_text("utf-8")) == set()


def test_every_make_target_of_ci_exists():
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert {"lint", "test", "test-slow"} <= {w for call in commands(script, "make") for w in call}
    assert unknown_targets(script, (ROOT / "Makefile").read_text("utf-8")) == set()


def test_unknown_make_targets_are_seen():
    lines = "$ make demo  # runs it\nmake PYTHON=python3.13 tset && make -j check | tail -1\n"
    assert unknown_targets(lines, "demo:\ncheck: lint\n") == {"tset"}


def test_every_make_target_is_described():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    [phony] = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    described = set(re.findall(r"^([a-z][a-z-]*):.*  ## ", makefile, re.MULTILINE))
    assert described == set(phony.split())


def refused(calls: list[list[str]], capsys) -> list[tuple[list[str], str]]:
    """Those of the command lines that the real parser does not take, and what it says."""
    from huizhen.cli.main import build_parser

    found = []
    for call in calls:
        try:
            build_parser().parse_args(call)
        except SystemExit as stop:
            if stop.code:  # --help ends with 0
                found.append((call, capsys.readouterr().err))
    return found


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_command_line_on_a_page_parses(page, capsys):
    text = (ROOT / page).read_text("utf-8")
    shown = re.sub(r"^# (?:runuser -u \w+ -- )?", "$ ", "\n".join(fenced(text)), flags=re.MULTILINE)
    calls = commands(shown, "huizhen")
    assert calls or page != Path("README.md"), "README.md shows no huizhen command line"
    assert refused(calls, capsys) == []


@pytest.mark.parametrize("page", FOR_OPERATORS)
def test_every_command_in_a_sentence_exists(page, capsys):
    """A command that is only named, without its arguments, must have a --help."""
    prose = FENCE.sub("", (ROOT / page).read_text("utf-8"))
    spans = [shlex.split(one)[1:] for one in CODE_SPAN.findall(prose) if one.startswith("huizhen ")]
    named = [call for call, _ in refused(spans, capsys)]
    assert refused([[*call, "--help"] for call in named], capsys) == []
    assert [call for call in named if any(word.startswith("-") for word in call)] == []


def test_command_lines_are_found_with_their_arguments():
    text = (
        "```console\n$ .venv/bin/huizhen demo --seed 3 > out.txt  # note\n"
        "round 1: it's done by huizhen\nOMP_NUM_THREADS=1 huizhen simulate \\\n  a.toml\n```\n"
        "`huizhen prose`\n~~~\nhuizhen\n~~~\n"
    )
    calls = commands("\n".join(fenced(text)), "huizhen")
    assert calls == [["demo", "--seed", "3"], ["simulate", "a.toml"], []]


def test_no_page_holds_a_place_for_a_figure_that_was_never_filled():
    assert [page.name for page in PAGES if "@@" in (ROOT / page).read_text(encoding="utf-8")] == []


def section(page: str, *headings: str) -> str:
    """The text under a heading, up to the next one of its level or above; headings nest."""
    text = (ROOT / page).read_text("utf-8")
    for heading in headings:
        _, begun, text = f"\n{text}".partition(f"\n{heading}\n")
        assert begun, f"{page} has no {heading!r}"
        level = heading.index(" ")
        text = re.split(rf"^#{{1,{level}}} ", text, maxsplit=1, flags=re.MULTILINE)[0]
    return text


def rows(text: str) -> list[list[str]]:
    """The cells of every table's rows, without the heads."""
    found: list[list[str]] = []
    for line in text.splitlines():
        if re.fullmatch(r"\|[-|: ]+\|", line):
            found.pop()  # the head
        elif line.startswith("|"):
            found.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


def in_code(cell: str) -> str:
    return cell.strip("`")


@pytest.mark.parametrize("party", ["coordinator", "site"])
def test_every_setting_is_on_the_page_with_its_default(party):
    from huizhen.client import home as site
    from huizhen.server import home as coordinator

    parts = {"coordinator": coordinator, "site": site}[party]._SECTIONS
    for name, terms in parts.items():
        listed = rows(section(OPERATE, "## Settings", f"### {party}.toml", f"#### `[{name}]`"))
        found = {in_code(row[0]): row[1] for row in listed}
        expected = {}
        for one in dataclasses.fields(terms):
            default = one.default
            if one.default_factory is not dataclasses.MISSING:
                default = one.default_factory()
            is_required = default is dataclasses.MISSING
            default = list(default) if isinstance(default, tuple) else default
            expected[one.name] = "required" if is_required else json.dumps(default)
        assert found == expected, f"[{name}]"


def test_every_metric_on_the_page_is_one_and_all_are_there():
    from huizhen.server import status

    source = inspect.getsource(status)
    counters = re.findall(r'CounterMetricFamily\(\s*"(\w+)"', source)
    known = {f"{name}_total" for name in counters}
    known |= set(re.findall(r'GaugeMetricFamily\(\s*"(\w+)"', source))
    text = section(OPERATE, "## Watching")
    assert {in_code(row[0]) for row in rows(text)} == known
    assert set(re.findall(r"huizhen_\w+", text)) == known


@imports_flower
def test_every_exit_code_is_on_the_page():
    from huizhen.cli.main import INTERRUPTED
    from huizhen.client.agent import ENDED
    from huizhen.protocol import errors

    kinds = (one for one in vars(errors).values() if isinstance(one, type))
    codes = {one.exit_code for one in kinds if issubclass(one, errors.HuizhenError)}
    known = {0, INTERRUPTED, *ENDED.values(), *codes}
    found = [int(row[0]) for row in rows(section(OPERATE, "## Exit codes"))]
    assert found == sorted(known)


def words_of_code() -> set[str]:
    """Every text in the code that could be a code."""
    found = set()
    for folder in ("client", "server", "protocol"):
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value.partition(": ")[0])
    return found


@imports_flower
def test_every_code_on_the_page_is_in_the_code_and_all_are_there():
    from huizhen.client import flower, situation, trainer
    from huizhen.protocol import chain, trust
    from huizhen.server import validation

    found = [in_code(row[0]) for row in rows(section(OPERATE, "## Codes"))]
    assert set(found) - words_of_code() == set()
    assert [code for code in set(found) if found.count(code) > 1] == []
    known = {*get_args(situation.Code), *get_args(chain.Code), *get_args(trust.Code)}
    known |= {*get_args(flower.Trouble), *get_args(validation.Refusal), *trainer.Code}
    assert known - set(found) == set()


IDS = [
    f"{kind}-{number}"
    for kind, last in {"ID": 9, "CODE": 7, "EG": 6, "UP": 8, "PB": 8, "AU": 5, "CO": 2}.items()
    for number in range(1, last + 1)
]


def test_every_property_says_what_enforces_it_and_has_a_test_named_for_it():
    listed = rows(section("docs/threat-model.md", "## Properties"))
    assert [row[0] for row in listed] == IDS
    tests = {path: path.read_text("utf-8") for path in (ROOT / "tests").rglob("*.py")}
    for name, _, enforced, attacked in listed:
        for place in re.findall(r"`(\w+/[\w/]+\.py)`", enforced):
            assert (ROOT / place).exists(), f"{name}: no {place}"
        kind, _, number = name.lower().partition("-")
        called = re.compile(rf"def test_(\w+_and_)?({kind}_(\d_and_)?)?({kind}_)?{number}_")
        linked = [
            (ROOT / "docs" / place).resolve() for place in re.findall(r"\]\((\S+?)\)", attacked)
        ]
        assert any(called.search(tests[place]) for place in linked if place in tests), (
            f"{name}: no linked file has a test that is named for it"
        )


def test_nginx_passes_what_the_edge_passes():
    from huizhen.server.edge import FLEET_PATHS, MAX_BODY_BYTES

    text = (ROOT / "deploy/nginx/fleet-http.conf").read_text("utf-8")
    assert set(re.findall(r'"~\^(\S+)\\z"\s+1;', text)) == FLEET_PATHS
    assert f"client_max_body_size {MAX_BODY_BYTES >> 20}m;" in text


@imports_flower
@pytest.mark.parametrize("party", ["coordinator", "site"])
def test_a_unit_runs_a_command_that_exists(party, capsys):
    from huizhen.client.agent import ENDED

    text = (ROOT / f"deploy/systemd/huizhen-{party}.service").read_text("utf-8")
    keys = dict(line.split("=", 1) for line in text.splitlines() if re.match(r"[A-Z]\w+=", line))
    assert refused(commands(keys["ExecStart"], "huizhen"), capsys) == []
    assert commands(keys["ExecStart"], "huizhen") != []
    ended = " ".join(str(code) for code in sorted(ENDED.values())) if party == "site" else None
    assert keys.get("RestartPreventExitStatus") == ended


def test_the_units_leave_bubblewrap_what_it_needs():
    text = (ROOT / "deploy/systemd/huizhen-site.service").read_text("utf-8")
    keys = dict(re.findall(r"^(\w+)=(.*)", text, re.MULTILINE))
    assert keys.keys() & {
        "RestrictNamespaces", "ProtectKernelTunables", "ProtectKernelLogs", "ProtectProc",
        "ProtectControlGroups", "ProcSubset", "PrivateUsers", "SystemCallFilter",
    } == set()  # fmt: skip
    assert "AF_NETLINK" in keys["RestrictAddressFamilies"].split()
