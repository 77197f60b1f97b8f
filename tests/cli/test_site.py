"""``huizhen site ledger`` as a hospital, an alliance and a regulator call it."""

import json
import re

import pytest

from huizhen.cli.main import main
from huizhen.client.ledger import Ledger
from huizhen.protocol.accounting import Spend
from huizhen.protocol.ledger_entries import Cap

S, T = "5" * 64, "7" * 64
SPEND = Spend(noise_multiplier=20.0, sampling_rate=1.0, steps=2)


@pytest.fixture
def home(tmp_path):
    """A home with a ledger of seven entries at its place."""
    cap = Cap(epsilon=1.05, delta=1e-5, metrics_epsilon=0.5)
    path = tmp_path / "home" / "site" / "ledger.sqlite"
    with Ledger.create(path, site="North", cohort="rare 1", cap=cap) as ledger:
        ledger.reserve(S, SPEND, 4)
        ledger.charge(S, 1)
        ledger.charge(S, 3)
        ledger.charge_metrics(S, "top1", 0.25)
        ledger.close(S)
        ledger.reserve(T, SPEND, 3)
    return tmp_path / "home"


@pytest.fixture
def head(home):
    with Ledger.open(home / "site" / "ledger.sqlite") as ledger:
        return ledger.head()


@pytest.fixture
def run(home, monkeypatch, capsys):
    monkeypatch.setenv("HUIZHEN_HOME", str(home))
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words):
        code = main(["site", "ledger", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_show_gives_each_study_and_the_bar(run, head):
    code, out, err = run("show")
    assert (code, err) == (0, "")
    assert "cohort 'rare 1' at site 'North', by patient, 7 entries" in out
    [spent] = [line for line in out.splitlines() if line.startswith("training")]
    assert spent.count("█") + spent.count("▒") + spent.count("░") == 32
    assert spent.count("█") == round(32 * 0.3407 / 1.05)
    words = (
        r"ε 0\.340\d* spent, 0\.561\d* with what is reserved, 0\.488\d* left of 1\.05 at δ 1e-05"
    )
    assert re.search(words, spent)
    [metrics] = [line for line in out.splitlines() if line.startswith("metrics")]
    assert (metrics.count("█"), metrics.count("░")) == (16, 16)
    [closed] = [line.split() for line in out.splitlines() if line.startswith("555555555555")]
    assert closed[1:7] == ["2", "of", "4", "20", "1", "2"]
    assert closed[-1] == "closed"
    [other] = [line.split() for line in out.splitlines() if line.startswith("777777777777")]
    assert other[1:4] == ["0", "of", "3"]
    assert other[-1] == "reserved"
    assert f"head 7:{head.digest}" in out


def test_show_as_json_is_the_totals(run, head):
    code, out, _ = run("show", "--json")
    totals = json.loads(out)
    assert code == 0
    assert totals["head"] == {"sequence": 7, "digest": head.digest}
    assert [s["rounds_charged"] for s in totals["studies"]] == [2, 0]
    assert totals["metrics_left"] == 0.25


def test_an_export_is_verified_without_the_ledger(run, home, head, tmp_path):
    out_file = tmp_path / "ledger.json"
    code, out, _ = run("export", "--out", out_file)
    assert code == 0
    assert f"7 entries are in {out_file}" in out
    (home / "site" / "ledger.sqlite").unlink()
    code, out, _ = run("verify", "--export", out_file, "--witnessed", f"7:{head.digest}")
    assert code == 0
    assert "7 entries of cohort 'rare 1' at site 'North'" in out
    assert "entry 7 is the one that was witnessed" in out
    assert re.search(r"epsilon 0\.340\d* is spent", out)
    code, out, _ = run("verify", "--export", out_file, "--json")
    assert json.loads(out)["head"]["digest"] == head.digest
    code, out, err = run("verify", "--export", out_file, "--witnessed", f"6:{head.digest}")
    assert (code, out) == (4, "")
    assert "this is another ledger" in err
    forged = tmp_path / "forged.json"
    forged.write_text(out_file.read_text().replace('"round": 3', '"round": 4'))
    code, out, err = run("verify", "--export", forged)
    assert (code, out) == (4, "")
    assert err.startswith("huizhen: entry 4 of the ledger was changed")


def test_verify_of_a_ledger_says_that_only_a_witness_finds_an_older_copy(run, head):
    code, out, _ = run("verify")
    assert code == 0
    assert "no witnessed entry was given" in out
    assert f"head 7:{head.digest}" in out
    code, out, err = run("verify", "--witnessed", f"8:{head.digest}")
    assert (code, out) == (4, "")
    assert "this is an older copy or another ledger" in err


def test_export_never_writes_over_a_file(run, home):
    ledger = home / "site" / "ledger.sqlite"
    before = ledger.read_bytes()
    code, _, err = run("export", "--out", ledger)
    assert code == 2
    assert "exists: choose another --out" in err
    assert ledger.read_bytes() == before
    code, _, err = run("export", "--out", home / "nowhere" / "x.json")
    assert code == 7
    assert "cannot write" in err


def test_export_as_json_names_the_file(run, tmp_path):
    code, out, _ = run("export", "--json", "--out", tmp_path / "x.json")
    assert (code, json.loads(out)) == (0, {"out": str(tmp_path / "x.json"), "entries": 7})


@pytest.mark.parametrize("action", ["show", "verify"])
def test_the_file_is_found_by_option_home_or_environment(run, home, tmp_path, monkeypatch, action):
    monkeypatch.setenv("HUIZHEN_HOME", str(tmp_path))
    code, _, err = run(action)
    assert code == 2
    assert err == f"huizhen: no ledger at '{tmp_path}/site/ledger.sqlite': name the file of one\n"
    assert run(action, "--home", home)[0] == 0
    assert run(action, "--ledger", home / "site" / "ledger.sqlite")[0] == 0


def test_an_export_that_is_missing_or_something_else_is_one_line(run, tmp_path):
    code, _, err = run("verify", "--export", tmp_path / "none.json")
    assert (code, err.count("\n")) == (2, 1)
    (tmp_path / "other.json").write_text("{}")
    code, _, err = run("verify", "--export", tmp_path / "other.json")
    assert (code, err.count("\n")) == (2, 1)
    assert "export is not of the format 'huizhen ledger 1'" in err


@pytest.mark.parametrize("text", ["7", "7:abc", "0:" + "a" * 64, "x:" + "a" * 64, "7:" + "G" * 64])
def test_a_witnessed_entry_in_another_form_shows_the_usage(run, capsys, text):
    with pytest.raises(SystemExit, match="2"):
        run("verify", "--witnessed", text)
    assert "is not N:DIGEST" in capsys.readouterr().err


def test_ledger_and_export_are_not_checked_together(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("verify", "--ledger", "a", "--export", "b")
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["create", "cap", "close", "show", "verify", "export"])
def test_every_action_has_help_with_examples(run, capsys, action):
    with pytest.raises(SystemExit, match="0"):
        run(action, "--help")
    text = capsys.readouterr().out
    assert f"huizhen site ledger {action}" in text.split("examples:")[1]
    assert "--json" in text


@pytest.mark.parametrize(
    ("spent", "committed", "cap", "expected"),
    [
        (0, 0, 1, (0, 0, 32)),
        (1e-6, 0.5, 1, (1, 15, 16)),
        (0.25, 0.2500001, 1, (8, 1, 23)),
        (2, 3, 1, (32, 0, 0)),
        (1, 1, 1, (32, 0, 0)),
        (0, 0, 0, (0, 0, 32)),
    ],
)
def test_the_bar_shows_whatever_is_not_nothing(spent, committed, cap, expected):
    from huizhen.cli.site import _bar

    bar = _bar(spent, committed, cap)
    assert (bar.count("█"), bar.count("▒"), bar.count("░")) == expected
