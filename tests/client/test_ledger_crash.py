"""Killed anywhere, or used by several processes at once: a ledger never says less than was spent.

A child writes a word after ``charge`` returned, where the first gradient would be. Whatever it
wrote must be in the ledger, and a retry must find at most one charge per round.
"""

import signal
import subprocess
import sys
import time

import pytest

from huizhen.client.ledger import Ledger
from huizhen.protocol.accounting import Spend
from huizhen.protocol.ledger_entries import Cap

S, T = "5" * 64, "7" * 64
SPEND = Spend(noise_multiplier=1000.0, sampling_rate=1.0, steps=1)
CAP = Cap(epsilon=1.0, delta=1e-5, metrics_epsilon=1.0)

COMMON = f"""
import os, signal, sys
from pathlib import Path
from huizhen.client.ledger import Ledger
from huizhen.protocol.accounting import Spend
from huizhen.protocol.errors import PrivacyError
from huizhen.protocol.ledger_entries import Cap
S, T = {S!r}, {T!r}
SPEND, CAP = {SPEND!r}, {CAP!r}
path = Path(sys.argv[1])
"""

KILL_AT_EACH_LINE = """
def killed_at(point, prepare, files):
    # Fork a child that dies before the point-th line of the ledger's code; return what it wrote.
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        os.close(ours)
        seen = 0

        def trace(frame, event, argument):
            nonlocal seen
            if not frame.f_code.co_filename.endswith(files):
                return None
            if event in ("line", "return"):
                seen += 1
                if seen == point:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        act = prepare()
        sys.settrace(trace)
        act()
        sys.settrace(None)
        os.write(theirs, b"gradient")
        os._exit(0)
    os.close(theirs)
    wrote = os.read(ours, 100)
    os.close(ours)
    status = os.waitpid(child, 0)[1]
    assert os.WIFEXITED(status) or os.WTERMSIG(status) == signal.SIGKILL
    return wrote, os.WIFEXITED(status)
"""

CHARGE = """
FILES = ("client/ledger.py", "storage/append_only.py", "protocol/ledger.py")
with Ledger.create(path, site="A", cohort="rare", cap=CAP) as ledger:
    ledger.reserve(S, SPEND, 1000)
    ledger.charge(S, 1)  # prices once, the children inherit it

def charges(ledger):
    return [e.body["round"] for e in ledger._account.entries if e.kind == "charge"]

point, outcomes, is_finished = 0, [], False
while not is_finished:
    point += 1
    round = point + 1

    def prepare():
        ledger = Ledger.open(path)
        return lambda: ledger.charge(S, round)

    wrote, is_finished = killed_at(point, prepare, FILES)
    with Ledger.open(path) as ledger:
        was_charged = round in charges(ledger)
        assert was_charged or not wrote, f"point {point}: trained, not charged"
        ledger.charge(S, round)
        assert charges(ledger) == list(range(1, round + 1)), f"point {point}"
    outcomes.append(was_charged)
print(point, outcomes.index(True), all(outcomes[outcomes.index(True):]))
"""

CREATE = """
point, outcomes, is_finished = 0, [], False
while not is_finished:
    point += 1
    place = path.parent / f"{point}" / "ledger.sqlite"

    def prepare():
        return lambda: Ledger.create(place, site="A", cohort="rare", cap=CAP)

    _, is_finished = killed_at(point, prepare, ("storage/append_only.py",))
    outcomes.append(place.exists())
    if not place.exists():
        Ledger.create(place, site="A", cohort="rare", cap=CAP).shut()
    with Ledger.open(place) as ledger:
        assert ledger.head().sequence == 1
print(point, outcomes.index(True), all(outcomes[outcomes.index(True):]))
"""


def run(code, *arguments):
    done = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-c", COMMON + code, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def start(code, *arguments):
    return subprocess.Popen(  # noqa: S603 - our own code
        [sys.executable, "-c", COMMON + code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "site" / "ledger.sqlite"


@pytest.fixture
def reserved(path):
    with Ledger.create(path, site="A", cohort="rare", cap=CAP) as ledger:
        ledger.reserve(S, SPEND, 20_000)
    return path


def rounds(path):
    with Ledger.open(path) as ledger:
        return [e.body["round"] for e in ledger._account.entries if e.kind == "charge"]


NAMED_POINTS = """
class Dying(Ledger):
    def _execute(self, statement, *values):
        if statement == "COMMIT" and point == "before the commit":
            os.kill(os.getpid(), signal.SIGKILL)
        found = super()._execute(statement, *values)
        if statement == "COMMIT" and point == "after the commit":
            os.kill(os.getpid(), signal.SIGKILL)
        return found

for round, point in enumerate(["before the commit", "after the commit", "after the return"], 1):
    if os.fork() == 0:
        Dying.open(path).charge(S, round)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.wait()[1] == signal.SIGKILL
    with Ledger.open(path) as ledger:
        print([e.body["round"] for e in ledger._account.entries if e.kind == "charge"])
"""


def test_killed_around_the_commit_only_what_was_not_trained_is_missing(reserved):
    assert " ".join(run(NAMED_POINTS, reserved)) == "[] [2] [2, 3]"


@pytest.mark.slow
def test_killed_at_any_line_of_charge_the_ledger_says_at_least_what_was_spent(path):
    points, first_charged, is_never_lost = run(KILL_AT_EACH_LINE + CHARGE, path)
    assert is_never_lost == "True"
    assert 20 < int(first_charged) < int(points) - 5  # died both before and after the commit


@pytest.mark.slow
def test_killed_at_any_line_of_create_there_is_a_whole_ledger_or_none(path):
    points, first_there, is_never_lost = run(KILL_AT_EACH_LINE + CREATE, path)
    assert is_never_lost == "True"
    assert 5 < int(first_there) < int(points) - 5


CHARGE_ON = """
ledger = Ledger.open(path)
round = ledger.totals().studies[0].last_round
while True:
    round += 1
    ledger.charge(S, round)
    os.write(1, f"{round}\\n".encode())
"""


@pytest.mark.slow
def test_killed_at_any_moment_nothing_trained_is_missing(reserved):
    """The moments inside SQLite and the system, which no line marks."""
    for attempt in range(25):
        with start(CHARGE_ON, reserved) as child:
            first = child.stdout.readline()
            time.sleep(0.003 * attempt)
            child.send_signal(signal.SIGKILL)
            trained = [int(line) for line in [first, *child.stdout.read().splitlines()]]
        assert child.returncode == -signal.SIGKILL
        charged = rounds(reserved)
        assert charged == list(range(1, len(charged) + 1))
        assert trained[-1] <= charged[-1] <= trained[-1] + 1
    assert len(rounds(reserved)) > 50


RACE = """
def attempt(act):
    try:
        return act().sequence
    except PrivacyError:  # the budget, or a round that another process has passed
        return 0

large = Spend(noise_multiplier=10.0, sampling_rate=1.0, steps=1)
acts = {
    "metrics": lambda ledger: [
        attempt(lambda: ledger.charge_metrics(S, f"{sys.argv[2]}{n}", 0.05)) for n in range(15)
    ],
    "rounds": lambda ledger: [attempt(lambda: ledger.charge(S, n)) for n in range(1, 16)],
    "study": lambda ledger: [attempt(lambda: ledger.reserve(sys.argv[2] * 64, large, 4))],
}
for name, act in acts.items():
    with Ledger.open(path / f"{name}.sqlite") as ledger:
        print("ready", flush=True)
        sys.stdin.readline()
        print(*act(ledger), flush=True)
"""


@pytest.fixture(scope="module")
def raced(tmp_path_factory):
    """Three processes that go at the same time, three times; return what each was granted."""
    folder = tmp_path_factory.mktemp("race")
    found: dict[str, list[list[int]]] = {"metrics": [], "rounds": [], "study": []}
    for name in found:
        with Ledger.create(folder / f"{name}.sqlite", site="A", cohort="rare", cap=CAP) as ledger:
            ledger.reserve(S, SPEND, 1000)
    children = [start(RACE, folder, letter) for letter in "abc"]
    for granted in found.values():
        for child in children:
            assert child.stdout.readline() == "ready\n"
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
        granted += [[int(n) for n in child.stdout.readline().split()] for child in children]
    for child in children:
        child.communicate(timeout=60)
    assert [child.returncode for child in children] == [0, 0, 0]
    return folder, found


def test_processes_at_once_cannot_overdraw_the_metrics(raced):
    folder, found = raced
    granted = [n for numbers in found["metrics"] for n in numbers if n]
    assert sorted(granted) == list(range(3, 23))  # 20 of the 45 asked: 1.0 is 20 times 0.05
    with Ledger.open(folder / "metrics.sqlite") as ledger:
        assert ledger.verify().metrics_left == 0


def test_processes_at_once_pay_for_a_round_once(raced):
    folder, found = raced
    assert rounds(folder / "rounds.sqlite") == list(range(1, 16))
    for numbers in found["rounds"]:
        assert all(n in (0, round + 2) for round, n in enumerate(numbers, 1))


def test_processes_at_once_cannot_reserve_more_than_the_cap(raced):
    """4 rounds at σ = 10 cost ε = 0.72, 8 cost 1.07: of three studies one fits under 1."""
    folder, found = raced
    assert sorted(found["study"]) == [[0], [0], [3]]
    with Ledger.open(folder / "study.sqlite") as ledger:
        assert ledger.verify().epsilon_committed < 1
        assert len(ledger.totals().studies) == 2
