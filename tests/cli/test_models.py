"""``huizhen models`` as people and programs call it."""

import argparse
import json
import subprocess
import sys

import pytest

from huizhen.cli import models
from huizhen.learning.bases import catalogue
from huizhen.protocol.errors import ConfigError


def run(*words):
    parser = argparse.ArgumentParser(prog="huizhen")
    models.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["models", *map(str, words)])
    return args.run(args)


def test_list_shows_every_base_and_which_are_here(tmp_path, capsys):
    assert run("fetch", "tiny", "--home", tmp_path) == 0
    capsys.readouterr()
    assert run("list", "--json", "--home", tmp_path) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(catalogue())
    assert [name for name, row in rows.items() if row["cached"]] == ["tiny"]
    assert rows["minilm"]["digests"] == "catalogue"
    assert rows["qwen3-0.6b"]["digests"] == "trusted on first fetch"


def test_the_table_names_licences_and_what_is_trusted_on_first_fetch(tmp_path, capsys):
    assert run("list", "--home", tmp_path) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "never redistributed by Huizhen" in text
    assert "qwen3-0.6b *" in text
    assert "* trusted on first fetch" in text


def test_fetch_tells_where_it_is_and_its_digests(tmp_path, capsys):
    assert run("fetch", "tiny", "--json", "--home", tmp_path) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["folder"] == str(tmp_path / "bases" / "tiny")
    assert facts["digests"] == catalogue()["tiny"].digests


def test_fetch_of_an_unknown_name_is_left_to_the_main_program(tmp_path):
    with pytest.raises(ConfigError, match="the nearest is 'tiny'"):
        run("fetch", "tinny", "--home", tmp_path)


def test_verify_exits_with_one_and_names_the_file(tmp_path, capsys):
    run("fetch", "tiny", "--home", tmp_path)
    assert run("verify", "--home", tmp_path) == 0
    (tmp_path / "bases" / "tiny" / "config.json").write_text("{}")
    capsys.readouterr()
    assert run("verify", "tiny", "--home", tmp_path) == 1
    assert capsys.readouterr().out.startswith("tiny: config.json has SHA-256")
    assert run("verify", "--json", "--home", tmp_path) == 1
    assert json.loads(capsys.readouterr().out)[0]["name"] == "tiny"


def test_verify_of_what_is_not_here_is_a_problem(tmp_path, capsys):
    assert run("verify", "minilm", "--home", tmp_path) == 1
    assert "not in the cache" in capsys.readouterr().out
    assert run("verify", "--home", tmp_path) == 0
    assert "no base model is in the cache" in capsys.readouterr().out


@pytest.mark.parametrize("action", ["list", "fetch", "verify"])
def test_every_action_has_help_with_examples(action, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(action, "--help")
    text = capsys.readouterr().out
    assert "examples:" in text
    assert f"huizhen models {action}" in text
    assert "--json" in text


def test_help_and_list_need_no_torch():
    code = "import argparse, sys; from huizhen.cli import models\n"
    code += "p = argparse.ArgumentParser(); models.add_parser(p.add_subparsers())\n"
    code += "args = p.parse_args(['models', 'list']); args.run(args)\n"
    code += "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False)  # noqa: S603 - our own code
    assert done.returncode == 0
