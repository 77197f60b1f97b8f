"""``huizhen privacy audit`` as a user meets it: one verdict, two files, one line of refusal.

Canaries cannot refute this experiment's claim (ε = 8 at δ = 1e-3); the other two checks that
depend on chance raise a wrong alarm with 1e-6 each.
"""

import argparse
import json

import numpy as np
import pytest
import torch

from huizhen.cli.privacy_audit import add_audit_parser
from huizhen.client import randomness
from huizhen.protocol.errors import ConfigError, HuizhenError, PrivacyError


@pytest.fixture
def audit(home, tmp_path, capsys):
    """Run the command; return its exit code, its error line and what it printed."""

    def audit(path, *options):
        parser = argparse.ArgumentParser(prog="huizhen privacy")
        add_audit_parser(parser.add_subparsers())
        where = ["--out", str(tmp_path / "out"), "--home", str(home), "--canaries", "64"]
        arguments = parser.parse_args(["audit", str(path), *where, *options])
        threads, refusal = torch.get_num_threads(), None
        try:
            code = arguments.run(arguments)
        except HuizhenError as error:
            code, refusal = error.exit_code, str(error)
        finally:
            torch.set_num_threads(threads)
        captured = capsys.readouterr()
        return code, refusal, captured.out, captured.err

    return audit


def test_an_audit_prints_its_verdict_and_leaves_its_files(audit, experiment_file, tmp_path):
    code, refusal, out, err = audit(experiment_file())
    assert (code, refusal) == (0, None)
    assert "not refuted" in out
    assert "could show epsilon" in err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"audit.json", "audit.png"}


def test_json_is_the_document_and_nothing_else(audit, experiment_file, tmp_path):
    code, _, out, err = audit(experiment_file(), "--json", "--steps", "2", "--threads", "1")
    assert code == 0
    assert err == ""
    assert json.loads(out) == json.loads((tmp_path / "out" / "audit.json").read_text())


def test_a_refuted_claim_is_an_error_and_still_documented(
    audit, experiment_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(randomness, "normals", np.zeros)
    code, refusal, out, _ = audit(experiment_file())
    assert code == PrivacyError.exit_code
    assert "varies less than noise" in refusal
    assert "do not train with these steps" in refusal
    assert "\n" not in refusal
    assert "verdict" in out
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["verdict"] == "refuted"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "0"], "--threads is 0"),
        (["--site", "West"], "--site is 'West'"),
        (["--canaries", "5000"], "5000 canaries"),
        (["--steps", "99"], "--steps is 99"),
    ],
)
def test_bad_options_are_one_line(audit, experiment_file, tmp_path, options, message):
    code, refusal, out, _ = audit(experiment_file(), *options)
    assert code == ConfigError.exit_code
    assert message in refusal
    assert "\n" not in refusal
    assert out == ""
    assert not (tmp_path / "out").exists()
