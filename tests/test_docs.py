"""The pages say what is true: links resolve, make targets exist, command lines parse."""

import re
import shlex
from pathlib import Path, PurePath

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


def test_every_command_line_in_the_readme_parses(capsys):
    from huizhen.cli.main import build_parser

    text = (ROOT / "README.md").read_text("utf-8")
    calls = commands("\n".join(fenced(text)), "huizhen")
    assert calls, "README.md shows no huizhen command line"
    refused = []
    for call in calls:
        try:
            build_parser().parse_args(call)
        except SystemExit as stop:
            if stop.code:  # --help ends with 0
                refused.append((call, capsys.readouterr().err))
    assert refused == []


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
