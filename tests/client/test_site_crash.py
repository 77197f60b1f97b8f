"""A site killed at any point of a round: its ledger says at least what was spent."""

import hashlib
import os
import signal

import pytest

from huizhen.client import local_trainer, private_steps
from huizhen.client import site as site_module
from huizhen.client import trainer as trainer_module
from huizhen.client.ledger import Ledger
from huizhen.client.local_trainer import LocalTrainer
from huizhen.client.outbox import Outbox
from huizhen.client.site import Site
from huizhen.protocol.ledger_entries import Cap
from huizhen.protocol.mechanism import Mechanism
from huizhen.protocol.wire import Message, encode
from huizhen.strategies.catalogue import make_strategy

CALLS = (
    "reserve", "decode", "charge", "train_round", "private_gradient", "difference", "send", "keep",
    "answer",
)  # fmt: skip
BEFORE_ANY_GRADIENT = (
    "before reserve", "after reserve", "before decode", "after decode", "before charge",
    "after charge", "before train_round", "before private_gradient",
)  # fmt: skip
WITH_A_GRADIENT = (
    "after private_gradient", "after train_round", "before difference", "after difference",
    "before send", "after send", "before keep", "after keep", "before answer", "after answer",
    "at the end",
)  # fmt: skip


@pytest.fixture
def study(tiny_classifier, with_terms):
    return with_terms(tiny_classifier.study, privacy={"unit": "patient"})


@pytest.fixture
def examples(tiny_classifier, make_site, rows):
    return make_site(tiny_classifier, rows)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "site" / "ledger.sqlite"
    with Ledger.create(path, site="A", cohort="rare", cap=Cap(epsilon=8.5, delta=1e-3)):
        pass
    return path


@pytest.fixture
def take_round(tiny_classifier, study, examples, path):
    """Let a site answer a round; ``note`` is told of the first gradient and of the update."""

    def take(round, note):
        model = tiny_classifier
        first = model.first_tensors(study.study.seed)
        x = make_strategy(study).init(first).x
        names = make_strategy(study).trains(model.shapes, round)
        tensors = {name: x[name] for name in names}
        terms = {"kind": "adapter", "study": study.digest(), "round": round, "site": ""}
        with Ledger.open(path) as ledger:
            trainer = LocalTrainer("A", study, examples, model, first)
            site = Site("A", study, trainer, ledger=ledger)
            envelope, _ = site.answer(encode(Message(**terms, tensors=tensors)), round)
            note(f"update {hashlib.sha256(envelope.data).hexdigest()}")

    return take


def killed_at(point, take_round, round, log, monkeypatch):
    """Take a round in a process that ends itself at a point; return what it noted before."""
    child = os.fork()
    if child == 0:
        try:
            _arm(point, log, round, monkeypatch)
            take_round(round, lambda text: _note(log, text))
            if point == "at the end":
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(3)  # an error, or the point was never reached
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"{point} was not reached"
    assert os.WTERMSIG(status) == signal.SIGKILL
    return log.read_text().splitlines() if log.exists() else []


def _note(log, text):
    with log.open("a") as file:
        file.write(f"{text}\n")
        file.flush()
        os.fsync(file.fileno())


def _arm(point, log, round, monkeypatch):
    when, call = point.split(maxsplit=1)
    owners = {
        "reserve": Ledger, "charge": Ledger, "answer": Ledger, "private_gradient": private_steps,
        "keep": Outbox, "decode": trainer_module, "train_round": local_trainer,
        "difference": local_trainer,
    }  # fmt: skip
    for name in CALLS:
        owner = owners.get(name, site_module)
        plain = getattr(owner, name)

        def run(*args, _name=name, _plain=plain, **kwargs):
            if _name == call and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if _name == "private_gradient":
                _note(log, f"gradient {round}")
            found = _plain(*args, **kwargs)
            if _name == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        monkeypatch.setattr(owner, name, run)


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("point", [*BEFORE_ANY_GRADIENT, *WITH_A_GRADIENT])
def test_a_kill_never_leaves_less_in_the_ledger_than_was_spent(
    point, round, take_round, path, study, tmp_path, monkeypatch
):
    if round == 2:
        take_round(1, lambda text: None)
    noted = killed_at(point, take_round, round, tmp_path / "log", monkeypatch)
    mechanism = Mechanism.of(study)
    with Ledger.open(path) as ledger:
        charged = ledger.verify().epsilon_charged
    before, after = (mechanism.epsilon_after(rounds) for rounds in (round - 1, round))
    has_computed = f"gradient {round}" in noted
    assert charged in (before, after)
    assert charged == after or not has_computed
    assert has_computed == (point in WITH_A_GRADIENT)
    # the round is taken again, under the same charge; where something may have left, it is the same
    again: list[str] = []
    take_round(round, again.append)
    with Ledger.open(path) as ledger:
        assert ledger.verify().epsilon_charged == after
    sent = [line for line in noted if line.startswith("update")]
    assert (len(sent) == 1) == (point == "at the end")
    assert sent in ([], again)
    with Ledger.open(path) as ledger:
        answers = [ledger.answered(study.digest(), one) for one in range(1, round + 1)]
    named = {f"{one.update}.update" for one in answers if one is not None}
    left = {p.name for p in Outbox.beside(path).folder.rglob("*") if p.is_file()} - {".lock"}
    assert again[0].removeprefix("update ") + ".update" in left
    assert left <= named  # nothing of the first try
    if point in ("after answer", "at the end"):
        with Ledger.open(path) as ledger:
            given = ledger.answered(study.digest(), round)
        assert given is not None
        assert again == [f"update {given.update}"]
