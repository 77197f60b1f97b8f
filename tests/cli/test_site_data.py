"""``huizhen site data`` as a data steward calls it."""

import argparse
import hashlib
import json

import pytest

from huizhen.cli import site
from huizhen.protocol.errors import ConfigError, GovernanceError

TEXT = """
[data]
name = "discharge letters"
[governance]
purpose = "a test"
basis = "made_up"
minimum_patients = 5
[identifiers]
method = "none"
[[sources]]
path = "notes.csv"
patient = "住院号"
text = ["小结"]
"""


def run(home, *words):
    parser = argparse.ArgumentParser(prog="huizhen")
    site.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["site", "data", *map(str, words), "--home", str(home)])
    return args.run(args)


@pytest.fixture
def export(tmp_path):
    def write(text=TEXT, patients=40):
        rows = [f"Z{i},{hashlib.sha256(b'%d' % i).hexdigest()}" for i in range(patients)]
        lines = ["住院号,小结", *rows, "Z1,SECRET,more"]
        (tmp_path / "notes.csv").write_bytes("\n".join(lines).encode("gb18030"))
        (tmp_path / "data.toml").write_text(text, "utf-8")
        return tmp_path / "data.toml"

    return write


def test_a_check_says_what_would_become_of_an_export(export, tmp_path, capsys):
    assert run(tmp_path / "home", "check", export()) == 0
    said = capsys.readouterr().out
    assert "discharge letters: 40 records of 40 patients could be used" in said
    assert "unreadable" in said
    folder = tmp_path / "home" / "site" / "data" / "all"
    assert "40" in (folder / "report.html").read_text("utf-8")
    [line] = (folder / "problems.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["place"] == "notes.csv:42"
    everything = [path.read_bytes() for path in folder.iterdir()]
    assert not any(b"SECRET" in data for data in [*everything, said.encode()])
    key = tmp_path / "home" / "site" / "keys" / "data.key"
    assert key.stat().st_mode & 0o777 == 0o600


def test_a_check_speaks_json(export, tmp_path, capsys):
    place = tmp_path / "r.html"
    assert run(tmp_path / "home", "check", export(), "--json", "--report", place) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == str(place)
    assert found["statement"]["records"] == 40
    [source] = found["statement"]["sources"]
    assert source == {"format": "csv", "encoding": "gb18030", "parts": 1}
    assert (
        place.read_text("utf-8").startswith("<!doctype html>") or "<!doctype" in place.read_text()
    )


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        (("notes.csv", "letters.csv"), ConfigError, "there is no file 'letters.csv'"),
        (('"小结"', '"总结"'), ConfigError, "has no column '总结'"),
        (("patients = 5", "patients = 50"), GovernanceError, "32 patients are left to train on"),
        (('"made_up"', '"consent"'), ConfigError, "needs a committee's reference"),
        (("patient =", "pateint ="), ConfigError, "did you mean 'patient'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(export, tmp_path, change, error, problem):
    with pytest.raises(error, match=problem):
        run(tmp_path / "home", "check", export(TEXT.replace(*change)))


def test_a_cohort_is_no_path(export, tmp_path):
    with pytest.raises(ConfigError, match="expected letters, digits and '-'"):
        run(tmp_path / "home", "check", export(), "--cohort", "../x")


def test_a_draft_is_written_beside_the_table_and_never_over_another(export, tmp_path, capsys):
    export()
    (tmp_path / "data.toml").unlink()
    assert run(tmp_path / "home", "draft", tmp_path / "notes.csv") == 0
    assert "site data check" in capsys.readouterr().out
    text = (tmp_path / "data.toml").read_text("utf-8")
    assert 'patient = "住院号"' in text
    with pytest.raises(ConfigError, match=r"data\.toml' exists: choose another --out"):
        run(tmp_path / "home", "draft", tmp_path / "notes.csv")
    with pytest.raises(ConfigError, match="purpose is empty"):  # a person must say
        run(tmp_path / "home", "check", tmp_path / "data.toml")
    out = tmp_path / "other.toml"
    assert run(tmp_path / "home", "draft", tmp_path / "notes.csv", "--out", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(out)
