"""Errors are one line and an exit code of their own; nothing else is shown."""

import argparse

import pytest

from huizhen.cli import main as module
from huizhen.cli.main import build_parser, main
from huizhen.protocol import errors


def leaves(cls):
    """Return the tree of errors; kinds that other modules add have the code of their branch."""
    own = [child for child in cls.__subclasses__() if child.__module__ == errors.__name__]
    return [cls, *(leaf for child in own for leaf in leaves(child))]


def test_each_kind_of_error_has_an_exit_code_of_its_own(monkeypatch, capsys):
    codes = {}
    for kind in leaves(errors.HuizhenError):

        def fail(arguments, kind=kind):
            raise kind("rank is 9, at most 4 expected: lower it")

        parser = build_parser()
        monkeypatch.setattr(module, "build_parser", lambda parser=parser: parser)
        monkeypatch.setattr(
            parser, "parse_args", lambda argv, fail=fail: type("A", (), {"run": staticmethod(fail)})
        )
        codes[kind] = main([])
        captured = capsys.readouterr()
        assert captured.err == "huizhen: rank is 9, at most 4 expected: lower it\n"
        assert captured.out == ""
        monkeypatch.undo()
    assert 0 not in codes.values()
    branches = [kind for kind in codes if kind.__bases__ == (errors.HuizhenError,)]
    assert len({codes[branch] for branch in branches}) == len(branches)
    assert codes[errors.BudgetExhaustedError] == codes[errors.PrivacyError]


@pytest.mark.parametrize("arguments", [[], ["simulate"], ["no-such"], ["simulate", "a", "--oops"]])
def test_a_wrong_command_line_shows_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: huizhen" in capsys.readouterr().err


@pytest.mark.parametrize(
    "group", [[], ["simulate"], ["demo"], ["models"], ["site"], ["privacy"], ["audit"]]
)
def test_every_command_explains_itself(group, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*group, "--help"])
    assert caught.value.code == 0
    assert "huizhen" in capsys.readouterr().out


def actions(parser, words=()):
    """Give every command under a parser: its words, and its own parser."""
    groups = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    if not groups:
        yield words, parser
    for group in groups:
        for name, child in group.choices.items():
            yield from actions(child, (*words, name))


SITE = [
    (words, one)
    for words, one in actions(build_parser())
    if words[0] == "site" and words[1] != "ledger"
]


@pytest.mark.parametrize(("words", "parser"), SITE, ids=[" ".join(words) for words, _ in SITE])
def test_every_action_of_a_site_explains_each_argument_by_example(words, parser):
    assert [one.dest for one in parser._actions if not one.help] == []
    assert f"huizhen {' '.join(words)}" in parser.epilog.partition("examples:")[2]


def test_the_version_is_the_packages(capsys):
    from importlib.metadata import version

    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"huizhen {version('huizhen')}\n"


def test_ctrl_c_before_anything_began_is_an_exit_code(monkeypatch, capsys):
    from huizhen.simulations import experiment

    def stop(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "load_experiment", stop)
    assert main(["simulate", "a.toml", "--out", "b"]) == 130
    assert capsys.readouterr().err == "huizhen: stopped\n"
