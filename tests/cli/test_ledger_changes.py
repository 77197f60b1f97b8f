"""``huizhen site ledger create``, ``cap`` and ``close``: a hospital decides on its own budget."""

import json
import shlex

import pytest

from huizhen.cli import ledger_changes
from huizhen.cli.main import build_parser, main
from huizhen.client.ledger import Ledger
from huizhen.protocol.accounting import Spend, epsilon
from huizhen.protocol.errors import BudgetExhaustedError
from huizhen.protocol.ledger_entries import Cap

S, T = "5" * 64, "5" * 8 + "7" * 56
SPEND = Spend(noise_multiplier=20.0, sampling_rate=1.0, steps=2)


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def run(home, monkeypatch, capsys):
    monkeypatch.setenv("HUIZHEN_HOME", str(home))

    def run(*words):
        code = main(["site", "ledger", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def path(home):
    """A ledger of one charged and one reserved study."""
    path = home / "site" / "ledger.sqlite"
    cap = Cap(epsilon=1.05, delta=1e-5, metrics_epsilon=0.5)
    with Ledger.create(path, site="North", cohort="rare", cap=cap) as ledger:
        ledger.reserve(S, SPEND, 4)
        ledger.charge(S, 1)
        ledger.reserve(T, SPEND, 3)
    return path


def totals(path):
    with Ledger.open(path) as ledger:
        return ledger.totals()


NEW = ("create", "--site", "North", "--cohort", "all", "--epsilon", 9, "--delta", 1e-6)


def test_a_ledger_is_made_where_others_look_for_it(run, home):
    code, out, err = run(*NEW)
    assert (code, err) == (0, "")
    found = totals(home / "site" / "ledger.sqlite")
    assert (found.site, found.cohort, found.unit) == ("North", "all", "patient")
    assert found.cap == Cap(epsilon=9.0, delta=1e-6)
    assert "epsilon 9 at delta 1e-06 on training, no metrics, for each patient" in out
    assert f"head 1:{found.head.digest}" in out
    assert run("show")[0] == 0


def test_every_option_of_a_new_ledger(run, tmp_path):
    path = tmp_path / "own" / "x.sqlite"
    more = ("--metrics-epsilon", 2, "--unit", "record", "--ledger", path, "--json")
    document = json.loads(run(*NEW, *more)[1])
    found = totals(path)
    assert (found.unit, found.cap) == ("record", Cap(epsilon=9, delta=1e-6, metrics_epsilon=2))
    assert document["ledger"] == str(path)
    assert document["cap"] == {"epsilon": 9.0, "delta": 1e-6, "metrics_epsilon": 2.0}
    assert document["head"]["digest"] == found.head.digest


def test_a_ledger_is_never_made_anew(run, path):
    before = path.read_bytes()
    code, out, err = run(*NEW)
    assert (code, out) == (2, "")
    assert "exists: a ledger is made once" in err
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "code", "line"),
    [
        (("--epsilon", "0"), 2, "epsilon is 0.0, expected more than 0"),
        (("--epsilon", "nan"), 2, "epsilon is nan"),
        (("--delta", "1"), 2, "delta is 1.0, expected between 0 and 1"),
        (("--metrics-epsilon", "-1"), 2, "metrics_epsilon is -1.0"),
        (("--cohort", " all"), 4, "cohort is ' all', expected 1 to 200 printable characters"),
    ],
)
def test_a_ledger_that_cannot_be_is_one_line(run, home, options, code, line):
    found, out, err = run(*NEW, *options)
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert line in err
    assert not (home / "site" / "ledger.sqlite").exists()


def test_a_cap_is_changed_and_told_before_and_after(run, path):
    code, out, err = run("cap", "--epsilon", 2)
    assert (code, err) == (0, "")
    found = totals(path)
    assert found.cap == Cap(epsilon=2.0, delta=1e-5, metrics_epsilon=0.5)
    lines = out.splitlines()
    assert lines[0] == "before: epsilon 1.05 at delta 1e-05 on training, epsilon 0.5 on metrics"
    assert lines[1] == "after:  epsilon 2 at delta 1e-05 on training, epsilon 0.5 on metrics"
    assert f"epsilon {found.epsilon_charged:.4g} is spent" in lines[2]
    assert lines[3] == f"head {found.head.sequence}:{found.head.digest}"


def test_what_is_not_named_of_a_cap_stays(run, path):
    document = json.loads(run("cap", "--metrics-epsilon", 0, "--json")[1])
    assert document["before"] == {"epsilon": 1.05, "delta": 1e-5, "metrics_epsilon": 0.5}
    assert document["after"] == {"epsilon": 1.05, "delta": 1e-5, "metrics_epsilon": 0.0}
    assert document["totals"]["head"]["sequence"] == totals(path).head.sequence == 5
    run("cap", "--delta", 1e-6)
    found = totals(path)
    assert found.cap == Cap(epsilon=1.05, delta=1e-6)
    assert found.epsilon_charged == epsilon([SPEND], 1e-6)


def test_a_cap_below_what_is_reserved_says_what_follows(run, path):
    out = run("cap", "--epsilon", 0.1)[1]
    assert "the cap is below what is reserved: a round that would pass it is refused" in out
    with Ledger.open(path) as ledger, pytest.raises(BudgetExhaustedError):
        ledger.charge(T, 1)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ((), "nothing is to be changed: give --epsilon, --delta or --metrics-epsilon"),
        (("--epsilon", "-1"), "epsilon is -1.0, expected more than 0"),
        (("--delta", "1e-14"), "delta is 1e-14, too small for the arithmetic"),
    ],
)
def test_a_cap_that_cannot_be_is_not_written(run, path, options, line):
    before = totals(path)
    code, out, err = run("cap", *options)
    assert (code, out, err.count("\n")) == (4 if "arithmetic" in line else 2, "", 1)
    assert line in err
    assert totals(path) == before


def test_a_cap_at_which_what_is_reserved_has_no_price_is_not_written(run, home):
    path, cap = home / "site" / "ledger.sqlite", Cap(epsilon=1.05, delta=1e-5)
    with Ledger.create(path, site="North", cohort="rare", cap=cap) as ledger:
        ledger.reserve(S, SPEND, 4)
    before = totals(path)
    code, _, err = run("cap", "--delta", 1e-14)
    assert code == 4
    assert "delta is 1e-14, too small for the arithmetic" in err
    assert totals(path) == before


@pytest.mark.parametrize("begin", [S, S[:9]])
def test_a_study_is_closed_by_its_digest_or_the_beginning(run, path, begin):
    code, out, err = run("close", begin)
    assert (code, err) == (0, "")
    found = totals(path)
    assert [study.is_closed for study in found.studies] == [True, False]
    assert f"study {S} is closed" in out
    left = epsilon([SPEND.times(4)], 1e-5)  # one round charged and three of the other study
    assert found.epsilon_committed == left
    assert f"{left:.4g} now" in out
    assert f"head 5:{found.head.digest}" in out


def test_closing_again_writes_nothing(run, path):
    first = json.loads(run("close", S, "--json")[1])
    assert (first["study"], first["entry"], first["was_closed"]) == (S, 5, False)
    again = json.loads(run("close", S, "--json")[1])
    assert (again["entry"], again["was_closed"]) == (5, True)
    assert "was closed before, by entry 5" in run("close", S)[1]
    assert totals(path).head.sequence == 5


def test_a_digest_that_names_none_or_two_studies_closes_none(run, path):
    for begin, line in (
        ("5" * 8, "2 studies of this ledger begin with '55555555'"),
        ("9" * 12, "no study here begins with '999999999999'"),
        ("7" * 8, "no study here begins with '77777777'"),  # in the middle of one
    ):
        code, out, err = run("close", begin)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert line in err
    assert totals(path).head.sequence == 4


@pytest.mark.parametrize("text", ["", "5555555", "5" * 65, "5555555G", "../55555555"])
def test_a_digest_in_another_form_shows_the_usage(run, path, capsys, text):
    with pytest.raises(SystemExit, match="2"):
        run("close", text)
    assert "usage: huizhen site ledger close" in capsys.readouterr().err


def test_the_examples_of_the_help_parse():
    texts = [getattr(ledger_changes, name) for name in dir(ledger_changes)]
    texts = [t for t in texts if isinstance(t, str) and t.startswith("examples:")]
    lines = "\n".join(t.replace("\\\n", "").split("\n\n")[0] for t in texts).splitlines()
    calls = [shlex.split(line.split("     ")[0]) for line in lines if "huizhen" in line]
    assert len(calls) == 5
    for program, *arguments in calls:
        assert program == "huizhen"
        build_parser().parse_args(arguments)  # exits where it cannot
