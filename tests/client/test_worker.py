"""The worker's side of the pipe: it answers with facts, an update, metrics or a code, nothing else.

Here it is served inside the test's own process; ``test_worker_trainer.py`` runs it for real.
"""

import io
import json
import logging
import math
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest

from huizhen.client import local_trainer, worker
from huizhen.client.frames import Frame, Start, read_frame, write_frame
from huizhen.client.governance import SitePolicy
from huizhen.client.trainer import Code, TrainingReport
from huizhen.protocol.errors import GovernanceError
from huizhen.protocol.metrics import parse_metrics
from huizhen.protocol.wire import Message, decode, encode
from huizhen.strategies.catalogue import make_strategy

CANARY = "zyxKANARIE"


@pytest.fixture
def study(make_study, tiny):
    return make_study(base={"digests": dict(tiny.digests)}, privacy={"unit": "none"})


@pytest.fixture
def start(home):
    policy = SitePolicy(site="A", withheld_fields=("id",))
    return Start(site="A", home=str(home), base="tiny", patient="id", policy=policy)


@pytest.fixture
def announce(tiny_classifier):
    """Return the bytes that ask for a round, and the shapes that answer."""

    def announce(study, round=1, /, **changes):
        model, strategy = tiny_classifier, make_strategy(study)
        x = strategy.init(model.first_tensors(study.study.seed)).x
        names = strategy.trains(model.shapes, round)
        terms = {"kind": "adapter", "study": study.digest(), "round": round, "site": ""} | changes
        tensors = {name: x[name] for name in names}
        shapes = {name: shape for name, shape in model.shapes.items() if name in names}
        return encode(Message(**terms, tensors=tensors)), shapes

    return announce


def jsonl(rows):
    """Return rows of patient, text and disease as the agent hands them over."""
    fields = ("id", "text", "disease")
    lines = [json.dumps(dict(zip(fields, row, strict=True)), ensure_ascii=False) for row in rows]
    return "".join(f"{line}\n" for line in lines).encode()


def begin(study, start, records, held_out=None, **changes):
    payloads = (study.canonical(), records, *([] if held_out is None else [held_out]))
    return Frame({"command": "start", "start": asdict(start) | changes}, payloads)


def ask(round, announcement):
    return Frame({"command": "train", "round": round}, (announcement,))


def served(*commands):
    """Return the worker's answers to commands."""
    asked, said = io.BytesIO(), io.BytesIO()
    for command in commands:
        write_frame(asked, command)
    asked.seek(0)
    worker.serve(asked, said)
    said.seek(0)
    found = []
    while (frame := read_frame(said, max_bytes=1 << 24)) is not None:
        found.append(frame)
    return found


def codes(answers):
    return [answer.header["code"] for answer in answers]


def test_a_worker_gives_facts_then_updates_and_ends(study, start, announce, rows):
    asked, shapes = announce(study)
    ping, end = Frame({"command": "ping"}), Frame({"command": "end"})
    answers = served(ping, begin(study, start, jsonl(rows)), ask(1, asked), ping, end, ping)
    assert codes(answers) == [None] * 4
    facts = answers[1].header["facts"]
    assert (facts["site"], facts["study"], facts["num_units"]) == ("A", study.digest(), 8)
    assert facts["has_held_out"] is False
    assert {name: tuple(shape) for name, shape in facts["shapes"].items()}.items() >= shapes.items()
    update = decode(answers[2].payloads[0], shapes=shapes)
    assert (update.kind, update.study, update.round, update.site) == (
        "update",
        study.digest(),
        1,
        "A",
    )
    assert any(array.any() for array in update.tensors.values())
    assert answers[2].header.keys() == {"code", "report"}
    assert answers[2].header["report"].keys() == {"loss", "steps", "seconds"}


def test_metrics_leave_as_noised_counts(make_study, tiny, start, announce, rows):
    study = make_study(base={"digests": dict(tiny.digests)}, privacy={"metrics_epsilon": 2.0})
    held_out = jsonl([(f"h{i}", "fever", "measles") for i in range(30)])
    final, _ = announce(study, 3)
    command = Frame({"command": "metrics"}, (final,))
    answers = served(begin(study, start, jsonl(rows), held_out), command)
    assert codes(answers) == [None, None]
    assert answers[0].header["facts"]["has_held_out"] is True
    assert parse_metrics(answers[1].payloads[0], study).site == "A"
    assert codes(served(begin(study, start, jsonl(rows)), command)) == [None, "not_private"]


@pytest.mark.parametrize(
    "records",
    [
        b"",
        b"not JSON\n",
        b"\xff\xfe\n",
        jsonl([("p1", CANARY, "measles")]),
        jsonl([("p1", CANARY, "measles"), ("", CANARY, "measles")]),
        jsonl([("p1", CANARY, "measles"), ("p2", "", CANARY)]),
        jsonl([("p1", CANARY, "plague"), ("p2", CANARY, "plague")]),
        b'{"id": "1", "note": "zyxKANARIE"}\n{"id": "2", "note": "zyxKANARIE"}\n',
    ],
    ids=[
        "none",
        "not JSON",
        "not UTF-8",
        "one patient",
        "no id",
        "no text",
        "no class",
        "no field",
    ],
)
def test_records_that_cannot_be_used_are_a_code_and_their_text_stays(study, start, records, caplog):
    caplog.set_level(logging.DEBUG)
    [answer] = served(begin(study, start, records))
    assert dict(answer.header) == {"code": "bad_records"}
    assert answer.payloads == ()
    assert "GovernanceError" in caplog.text or "ConfigError" in caplog.text
    assert CANARY not in caplog.text


def test_a_policy_that_withholds_a_field_of_the_task_is_obeyed(study, start, rows):
    policy = {"site": "A", "allowed_fields": ["text"]}
    assert codes(served(begin(study, start, jsonl(rows), policy=policy))) == ["bad_records"]


def test_another_base_than_agreed_is_refused(study, start, rows, with_terms):
    digests = dict(study.base.digests)
    name = next(iter(digests))
    other = with_terms(study, base={"digests": digests | {name: "0" * 64}})
    more = with_terms(study, base={"digests": digests | {"extra.json": "0" * 64}})
    fewer = with_terms(study, base={"digests": {name: digests[name]}})
    none = with_terms(study, base={"digests": {}})
    absent = with_terms(study, base={"name": "smollm2-135m-instruct"})
    unfit = with_terms(study, adapter={"target_modules": ("no_such_layer",)})
    for wrong, changes in (
        (other, {}),
        (more, {}),
        (fewer, {}),
        (none, {}),
        (absent, {"base": "smollm2-135m-instruct"}),  # and is not fetched
        (study, {"base": "no-such-base"}),
        (study, {"base": "/no/such/folder"}),
        (study, {"base": None}),
        (unfit, {}),
    ):
        assert codes(served(begin(wrong, start, jsonl(rows), **changes))) == ["wrong_base"], changes


def test_a_base_whose_file_was_changed_is_refused(study, start, rows, home, tmp_path):
    import shutil

    copy = tmp_path / "home"
    shutil.copytree(home, copy)
    [config] = copy.rglob("config.json")
    config.write_text(config.read_text() + " ")
    answers = served(begin(study, start, jsonl(rows), home=str(copy)))
    assert codes(answers) == ["wrong_base"]


def test_a_model_that_cannot_be_trained_privately_is_refused(
    make_study, tiny, start, rows, monkeypatch
):
    """By its coupling, by a patient who is trained on and held out; and memory has its own code."""
    private = make_study(base={"digests": dict(tiny.digests)}, privacy={"metrics_epsilon": 2.0})
    same = jsonl(rows[:1])
    assert codes(served(begin(private, start, jsonl(rows), same))) == ["not_private"]
    long = [(patient, "fever " * 40, disease) for patient, _, disease in rows]

    def greedy(model, examples):
        return 1e9

    monkeypatch.setattr("huizhen.client.model_checks._bytes_per_token", greedy)
    assert codes(served(begin(private, start, jsonl(long)))) == ["out_of_memory"]


@pytest.mark.parametrize("changes", [{"round": 2}, {"kind": "update"}, {"study": "00" * 32}])
def test_an_announcement_of_another_kind_round_or_study_is_a_code_and_the_worker_goes_on(
    study, start, announce, rows, changes
):
    wrong, _ = announce(study, 1, **changes)
    right, _ = announce(study)
    answers = served(begin(study, start, jsonl(rows)), ask(1, wrong), ask(1, b"?"), ask(1, right))
    assert codes(answers) == [None, "bad_announcement", "bad_announcement", None]


@pytest.mark.parametrize(
    "command",
    [
        Frame({"command": "train", "round": 1}, (b"x",)),
        Frame({"command": "metrics"}, (b"x",)),
        Frame({"command": "run", "code": "print(1)"}),
        Frame({}),
        Frame({"command": ["start"]}),
        Frame({"command": "start"}),
        Frame({"command": "start", "start": {"site": "A"}}, (b"{}", b"")),
        Frame({"command": "start", "start": []}, (b"{}", b"")),
    ],
)
def test_what_a_worker_does_not_understand_is_refused(command):
    assert codes(served(command, Frame({"command": "ping"}))) == ["bad_command", None]


def test_a_study_in_another_encoding_is_refused(study, start, rows):
    plain = begin(study, start, jsonl(rows))
    for data in (
        study.canonical() + b" ",
        study.canonical().replace(b'"format":1', b'"format":2'),
        study.canonical().replace(b'"count":2', b'"count":2,"counts":2'),
        b"[]",
        b"",
    ):
        changed = Frame(plain.header, (data, *plain.payloads[1:]))
        assert codes(served(changed)) == ["bad_command"]


def test_a_second_start_is_refused(study, start, rows):
    once = begin(study, start, jsonl(rows))
    assert codes(served(once, once)) == [None, "bad_command"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError(CANARY), "crashed"),
        (KeyError(CANARY), "crashed"),
        (RuntimeError(f"DefaultCPUAllocator: can't allocate memory: {CANARY}"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (ZeroDivisionError(CANARY), "crashed"),
    ],
)
def test_eg_3_whatever_goes_wrong_leaves_as_a_code_and_its_text_is_not_even_in_the_log(
    study, start, announce, rows, monkeypatch, caplog, error, code
):
    """An error of ours, which never shows a record, is in the log with its text."""

    def fail(*args, **kwargs):
        try:
            raise error
        except type(error):
            raise GovernanceError("reason of ours") from error

    def raw(*args, **kwargs):
        raise error

    caplog.set_level(logging.DEBUG)
    asked, _ = announce(study)
    monkeypatch.setattr(local_trainer, "train_round", raw)
    answers = served(begin(study, start, jsonl(rows)), ask(1, asked))
    assert dict(answers[1].header) == {"code": code}
    assert answers[1].payloads == ()
    assert type(error).__name__ in caplog.text
    assert "at=test_worker.py:" in caplog.text
    monkeypatch.setattr(local_trainer, "train_round", fail)
    assert codes(served(begin(study, start, jsonl(rows)), ask(1, asked)))[1] == "crashed"
    assert "reason of ours" in caplog.text
    assert CANARY not in caplog.text


def test_a_loss_of_nobody_and_an_update_without_end_are_said_in_json(
    study, start, announce, rows, monkeypatch
):
    asked, _ = announce(study)

    def nobody(*args, **kwargs):
        return TrainingReport(math.nan, 4, 0.5)

    monkeypatch.setattr(local_trainer, "train_round", nobody)
    answers = served(begin(study, start, jsonl(rows)), ask(1, asked))
    assert answers[1].header["report"] == {"loss": None, "steps": 4, "seconds": 0.5}

    def infinite(after, before):
        return {name: np.full_like(array, np.inf) for name, array in after.items()}

    monkeypatch.setattr(local_trainer, "difference", infinite)
    answers = served(begin(study, start, jsonl(rows)), ask(1, asked))
    assert dict(answers[1].header) == {"code": Code.DIVERGED.value}


def test_what_a_library_prints_or_reads_does_not_touch_the_pipe():
    """To standard output, by its number too; and standard input is empty."""
    program = """
import os, sys
from huizhen.client import worker
commands, answers = worker._take_streams()
print("stray print"); sys.stdout.flush()
os.write(1, b"stray write")
os.system("echo stray child")
assert sys.stdin.read() == "" and os.read(0, 1) == b""
answers.write(b"answer to " + commands.read()); answers.close()
"""
    done = subprocess.run(  # noqa: S603  # our own command
        [sys.executable, "-c", program], input=b"command", capture_output=True, check=True
    )
    assert done.stdout == b"answer to command"
    for word in (b"print", b"write", b"child"):
        assert b"stray " + word in done.stderr


def test_a_worker_that_is_busy_ends_when_the_agents_end_of_the_pipe_is_gone():
    program = """
import os, sys, time
from huizhen.client import worker
commands, answers = worker._take_streams()
worker._end_with_agent(commands.fileno())
os.write(answers.fileno(), b"busy")
time.sleep(60)
"""
    with subprocess.Popen(  # noqa: S603  # our own command
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.read(4) == b"busy"
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(2) == 1
