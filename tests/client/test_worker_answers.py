"""A worker that lies: nothing of what it says is used unless it is exactly what was asked for."""

import json
import sys

import pytest

from huizhen.client import worker_trainer
from huizhen.client.frames import CohortRecords, Start, read_frame
from huizhen.client.governance import SitePolicy
from huizhen.client.sandbox import Walls
from huizhen.client.trainer import Code, TrainerError
from huizhen.client.worker_trainer import WorkerTrainer
from huizhen.protocol.wire import Message, encode
from huizhen.strategies.catalogue import make_strategy


@pytest.fixture
def study(make_study):
    return make_study(privacy={"unit": "none"})


@pytest.fixture
def announce(tiny_classifier):
    def announce(study, round):
        strategy = make_strategy(study)
        x = strategy.init(tiny_classifier.first_tensors(study.study.seed)).x
        tensors = {name: x[name] for name in strategy.trains(tiny_classifier.shapes, round)}
        terms = {"kind": "adapter", "study": study.digest(), "round": round, "site": ""}
        return encode(Message(**terms, tensors=tensors))

    return announce


SAYS = """
import json, sys
from huizhen.client.frames import Frame, read_frame, write_frame
facts, answers = json.load(open(sys.argv[1]))
for answer in [[{"code": None, "facts": facts}], [{"code": None}], *answers]:
    read_frame(sys.stdin.buffer, max_bytes=1 << 20)
    if isinstance(answer, str):
        sys.stdout.buffer.write(answer.encode())
        sys.stdout.buffer.flush()
    else:
        write_frame(sys.stdout.buffer, Frame(answer[0], tuple(map(bytes.fromhex, answer[1:]))))
sys.stdin.buffer.read(1)
"""


@pytest.fixture
def lying(study, tmp_path, monkeypatch, tiny_classifier):
    """Return a trainer whose worker answers with facts, to a ping, and then what it is told to."""

    def lying(*answers, **changes):
        shapes = {name: list(shape) for name, shape in tiny_classifier.shapes.items()}
        facts = {
            "site": "A",
            "study": study.digest(),
            "shapes": shapes,
            "study_shapes": shapes,
            "num_units": 8,
            "has_held_out": False,
        } | changes
        (tmp_path / "says.json").write_text(json.dumps([facts, answers]))
        line = [sys.executable, "-c", SAYS, str(tmp_path / "says.json")]
        monkeypatch.setattr(worker_trainer, "command", lambda *args, **kwargs: line)
        policy = SitePolicy(site="A")
        start = Start(site="A", home=str(tmp_path), base="tiny", patient="id", policy=policy)
        return WorkerTrainer(
            study,
            start,
            lambda: CohortRecords(train=b"{}"),
            log=tmp_path / "worker.log",
            hidden=[tmp_path],
            walls=Walls("none", "a fake"),
        )

    return lying


@pytest.mark.parametrize(
    "changes",
    [
        {"site": "B"},
        {"study": "00" * 32},
        {"num_units": 0},
        {"num_units": "8"},
        {"shapes": []},
        {"study_shapes": []},
        {"shapes": {"a": ["x"]}},
        {"patients": ["p1"]},
    ],
)
def test_facts_that_are_not_as_agreed_are_refused_and_the_worker_is_dead(lying, changes):
    with lying(**changes) as trainer:
        with pytest.raises(TrainerError) as caught:
            trainer.ready()
        assert caught.value.code is Code.BAD_REPLY
        assert trainer._process.ended.wait(2)


REPORT = {"loss": 1.0, "steps": 1, "seconds": 1.0}


@pytest.mark.parametrize(
    "answer",
    [
        "HTTP/1.1 200 OK\r\n\r\n",
        "stray print",
        [{}],
        [{"code": None}],
        [{"code": "no_such_code"}],
        [{"code": {"a": 1}}],
        [{"code": None, "report": REPORT}],
        [{"code": None, "report": REPORT}, b"not an update".hex()],
        [{"code": None, "report": REPORT}, "00" * (1 << 22)],
    ],
)
def test_an_answer_that_is_not_as_agreed_is_refused(lying, announce, study, answer):
    with lying(answer) as trainer:
        trainer.ready()
        with pytest.raises(TrainerError) as caught:
            trainer.train(announce(study, 1), 1, {})
        assert caught.value.code is Code.BAD_REPLY


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"site": "B"},
        {"round": 2},
        {"study": "00" * 32},
        {"kind": "adapter", "site": ""},
        {"tensors": {}},
        {"report": {**REPORT, "patients": ["p1"]}},
        {"report": [REPORT]},
        {"report": {**REPORT, "steps": "p1"}},
    ],
    ids=str,
)
def test_an_update_that_is_not_as_agreed_is_refused(
    lying, announce, study, changes, tiny_classifier
):
    """The first has nothing wrong: it is taken."""
    strategy = make_strategy(study)
    x = strategy.init(tiny_classifier.first_tensors(study.study.seed)).x
    tensors = {name: x[name] for name in strategy.trains(tiny_classifier.shapes, 1)}
    terms = {"kind": "update", "study": study.digest(), "round": 1, "site": "A"}
    report = changes.get("report", REPORT)
    terms |= {"tensors": tensors} | {k: v for k, v in changes.items() if k != "report"}
    with lying([{"code": None, "report": report}, encode(Message(**terms)).hex()]) as trainer:
        trainer.ready()
        if not changes:
            assert trainer.train(announce(study, 1), 1, {}).update.keys() == tensors.keys()
            return
        with pytest.raises(TrainerError) as caught:
            trainer.train(announce(study, 1), 1, {})
        assert caught.value.code is Code.BAD_REPLY
        assert trainer._process.ended.wait(2)


def test_eg_6_an_update_that_was_ready_in_the_moment_of_the_stop_is_not_used(
    lying, announce, study, monkeypatch, tiny_classifier
):
    strategy = make_strategy(study)
    x = strategy.init(tiny_classifier.first_tensors(study.study.seed)).x
    tensors = {name: x[name] for name in strategy.trains(tiny_classifier.shapes, 1)}
    terms = {"kind": "update", "study": study.digest(), "round": 1, "site": "A"}
    data = encode(Message(**terms, tensors=tensors))
    with lying([{"code": None, "report": REPORT}, data.hex()]) as trainer:
        trainer.ready()

        def stopped_meanwhile(stream, *, max_bytes):
            found = read_frame(stream, max_bytes=max_bytes)
            if found is not None and found.payloads:
                trainer.stop()
            return found

        monkeypatch.setattr(worker_trainer, "read_frame", stopped_meanwhile)
        with pytest.raises(TrainerError) as caught:
            trainer.train(announce(study, 1), 1, {})
        assert caught.value.code is Code.STOPPED
