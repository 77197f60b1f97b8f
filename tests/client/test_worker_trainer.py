"""The agent's side of training: same bytes as in its own process, kept warm, killed at once.

A worker takes seconds to import torch, so that most tests share one; what only needs a process, and
not a model, uses one that was never told to start.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.client.processes import descendants, wait_until_gone

from huizhen.client import worker_trainer
from huizhen.client.frames import CohortRecords, Start
from huizhen.client.governance import SitePolicy, admit
from huizhen.client.ledger import Ledger
from huizhen.client.local_trainer import LocalTrainer
from huizhen.client.records.rows import read_lines, to_record
from huizhen.client.sandbox import LEVELS, probe
from huizhen.client.site import Site
from huizhen.client.site_examples import site_examples
from huizhen.client.trainer import Code, TrainerError
from huizhen.client.worker_trainer import WorkerTrainer
from huizhen.learning.models import make_model
from huizhen.protocol.errors import PrivacyError
from huizhen.protocol.ledger_entries import Cap
from huizhen.protocol.mechanism import Mechanism
from huizhen.protocol.metrics import parse_metrics
from huizhen.protocol.wire import Message, encode
from huizhen.server.rounds import Coordinator
from huizhen.strategies.catalogue import make_strategy

FOUND = probe()
HELD = LEVELS[LEVELS.index(FOUND.level) :]  # test_sandbox.py fails where it is less than it could
LOADED = "loaded base=tiny"


def jsonl(rows):
    fields = ("id", "text", "disease")
    lines = [json.dumps(dict(zip(fields, row, strict=True))) for row in rows]
    return "".join(f"{line}\n" for line in lines).encode()


@pytest.fixture(scope="module")
def records(rows):
    held_out = jsonl([(f"h{i}", "fever", "measles") for i in range(30)])
    return CohortRecords(train=jsonl(rows), held_out=held_out)


@pytest.fixture(scope="module")
def study(make_study, tiny):
    return make_study(base={"digests": dict(tiny.digests)}, privacy={"unit": "none"})


@pytest.fixture(scope="module")
def private_study(make_study, tiny):
    return make_study(base={"digests": dict(tiny.digests)}, privacy={"metrics_epsilon": 2.0})


@pytest.fixture(scope="module")
def start(home):
    policy = SitePolicy(site="A", withheld_fields=("id",))
    return Start(site="A", home=str(home), base="tiny", patient="id", policy=policy)


@pytest.fixture(scope="module")
def make(start, records):
    """Return a trainer whose log lies in a folder that stands for a site's."""

    def make(study, folder, records=records, walls=FOUND):
        log = folder / "worker.log"
        return WorkerTrainer(study, start, lambda: records, log=log, hidden=[folder], walls=walls)

    return make


@pytest.fixture(scope="module")
def shared(make, study, tmp_path_factory):
    """One warm worker for several tests, and its log."""
    folder = tmp_path_factory.mktemp("site")
    with make(study, folder) as trainer:
        yield trainer, folder / "worker.log"


@pytest.fixture
def in_process(start, records, tiny):
    """Return a trainer in this process on the same records."""

    def make(study):
        train, held_out = (
            [to_record(fields, "id", place) for place, fields in read_lines(data, "records")]
            for data in (records.train, records.held_out)
        )
        model = make_model(study, tiny)
        found = site_examples(admit(train, start.policy, held_out=held_out), model.encoder(), model)
        first = model.first_tensors(study.study.seed)
        return LocalTrainer("A", study, found.train, model, first, held_out=found.held_out)

    return make


@pytest.fixture
def announce(tiny_classifier):
    def announce(study, round):
        strategy = make_strategy(study)
        x = strategy.init(tiny_classifier.first_tensors(study.study.seed)).x
        tensors = {name: x[name] for name in strategy.trains(tiny_classifier.shapes, round)}
        terms = {"kind": "adapter", "study": study.digest(), "round": round, "site": ""}
        return encode(Message(**terms, tensors=tensors))

    return announce


def test_the_update_has_the_same_bytes_as_one_made_in_this_process_and_the_base_loads_once(
    shared, in_process, study, announce
):
    trainer, log = shared
    here, there = (Site("A", study, one) for one in (in_process(study), trainer))
    for round in (1, 2):
        asked = announce(study, round)
        (expected, plain), (found, report) = (site.answer(asked, round) for site in (here, there))
        assert found.data == expected.data
        assert plain is not None
        assert report is not None
        assert (report.loss, report.steps) == (plain.loss, plain.steps)
    # where metrics do not leave, held-out records are none
    assert trainer.ready() == dataclasses.replace(here.trainer.ready(), has_held_out=False)
    assert log.read_text().count(LOADED) == 1
    assert log.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(FOUND.level == "none", reason=f"no walls here: {FOUND.sentence}")
def test_code_4_the_warm_worker_itself_is_behind_the_walls(shared):
    trainer, _ = shared
    trainer.ready()
    pids = descendants(trainer._process.pid)
    spaces = {os.readlink(f"/proc/{pid}/ns/net") for pid in pids}  # noqa: PTH115  # no file
    own = os.readlink("/proc/self/ns/net")  # noqa: PTH115
    trains = max(pids, key=lambda pid: int(Path(f"/proc/{pid}/statm").read_text().split()[1]))
    assert os.readlink(f"/proc/{trains}/ns/net") != own  # noqa: PTH115
    assert spaces
    if FOUND.level == "full":
        assert os.readlink(f"/proc/{trains}/ns/mnt") != os.readlink("/proc/self/ns/mnt")  # noqa: PTH115


def test_eg_3_an_announcement_that_does_not_fit_is_a_code_and_the_worker_stays_warm(
    shared, study, announce
):
    trainer, log = shared
    trainer.ready()
    before = trainer._process.pid
    with pytest.raises(TrainerError, match=r"code bad_announcement; its log is '") as caught:
        trainer.train(announce(study, 2), 1, {})
    assert caught.value.code is Code.BAD_ANNOUNCEMENT
    assert trainer.ready().num_units == 8
    assert trainer._process.pid == before
    assert "ProtocolError" in log.read_text()


def test_a_worker_that_was_killed_is_started_again_by_the_next_call(shared, study, announce):
    trainer, log = shared
    trainer.ready()
    process = trainer._process
    os.kill(process.pid, signal.SIGKILL)
    assert process.ended.wait(2)
    update = trainer.train(announce(study, 1), 1, {}).update
    assert any(array.any() for array in update.values())
    assert trainer._process is not process
    assert log.with_name("worker.log.1").read_text().count(LOADED) == 1
    assert log.read_text().count(LOADED) == 1


def test_eg_6_a_worker_that_trains_is_killed_within_a_second_and_starts_no_more(
    make, study, announce, with_terms, tmp_path
):
    endless = with_terms(study, rounds={"local_epochs": 1_000_000})
    trainer, seen = make(endless, tmp_path), []
    trainer.ready()
    asked, process = announce(endless, 1), trainer._process

    def train():
        try:
            trainer.train(asked, 1, {})
        except TrainerError as error:
            seen.append((error.code, time.monotonic()))

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    time.sleep(0.5)
    assert thread.is_alive()
    pids, begin = descendants(process.pid), time.monotonic()
    assert len(pids) >= 1
    trainer.stop()
    thread.join(5)
    [(code, end)] = seen
    assert code is Code.STOPPED
    assert end - begin < 1
    assert wait_until_gone(pids, begin + 1 - time.monotonic())
    for call in (
        trainer.ready,
        lambda: trainer.train(asked, 1, {}),
        lambda: trainer.metrics(asked),
    ):
        with pytest.raises(TrainerError, match="was stopped"):
            call()
    assert trainer._process is process


def test_a_worker_that_hangs_is_killed_and_taken_for_dead(make, study, tmp_path, monkeypatch):
    trainer = make(study, tmp_path)
    with trainer:
        trainer._begin()
        process = trainer._process
        trainer._ask({"command": "ping"}, seconds=30)
        pids = descendants(process.pid)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        begin = time.monotonic()
        with pytest.raises(TrainerError) as caught:
            trainer._ask({"command": "ping"}, seconds=0.5)
        assert caught.value.code is Code.CRASHED
        assert 0.5 <= time.monotonic() - begin < 5
        assert wait_until_gone(pids, 5)
        monkeypatch.setattr(worker_trainer, "MAX_WORK_SECONDS", 0.5)
        trainer._begin()
        for pid in descendants(trainer._process.pid):
            os.kill(pid, signal.SIGSTOP)
        with pytest.raises(TrainerError, match="code crashed"):
            trainer._ask({"command": "start", "start": {}}, b"x" * (1 << 20))  # more than a pipe


def test_a_worker_that_hangs_with_a_full_pipe_is_ended_with_its_trainer(make, study, tmp_path):
    trainer = make(study, tmp_path)
    trainer._begin()
    process = trainer._process
    for pid in descendants(process.pid):
        os.kill(pid, signal.SIGSTOP)
    pipe = process.commands.fileno()
    os.set_blocking(pipe, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, b"x" * 4096)
    os.set_blocking(pipe, True)
    trainer.close()
    assert process.ended.is_set()


def test_a_warm_worker_that_hangs_is_started_again_by_the_next_call(shared, monkeypatch):
    trainer, _ = shared
    facts, process = trainer.ready(), trainer._process
    monkeypatch.setattr(worker_trainer, "PING_SECONDS", 0.5)
    time.sleep(0.6)
    assert trainer.ready() == facts
    assert trainer._process is process  # the limit of a question ends with its answer
    for pid in descendants(process.pid):
        os.kill(pid, signal.SIGSTOP)
    assert trainer.ready() == facts
    assert trainer._process is not process


def test_a_round_that_hangs_is_paid_for_once_and_trained_again_by_the_next_worker(
    make, private_study, announce, tmp_path, monkeypatch
):
    study, path = private_study, tmp_path / "site" / "ledger.sqlite"
    cap = Cap(epsilon=8.5, delta=1e-3, metrics_epsilon=2.0)
    with (
        Ledger.create(path, site="A", cohort="rare", cap=cap) as ledger,
        make(study, path.parent) as trainer,
    ):
        site = Site("A", study, trainer, ledger=ledger)

        def hang(announcement, round, kept):
            for pid in descendants(trainer._process.pid):
                os.kill(pid, signal.SIGSTOP)
            return trainer._ask({"command": "train", "round": round}, announcement)

        with monkeypatch.context() as patch:
            patch.setattr(worker_trainer, "MAX_WORK_SECONDS", 0.5)
            patch.setattr(trainer, "train", hang)
            with pytest.raises(TrainerError, match="code crashed"):
                site.answer(announce(study, 1), 1)
        assert ledger.totals().epsilon_charged == Mechanism.of(study).epsilon_after(1)
        assert site.answer(announce(study, 1), 1)[0].data
        assert ledger.totals().epsilon_charged == Mechanism.of(study).epsilon_after(1)


def test_a_private_study_is_trained_and_measured_through_the_worker(
    make, private_study, announce, tmp_path
):
    """With the ledger's promises: charged first, asked again the same bytes."""
    study, path = private_study, tmp_path / "site" / "ledger.sqlite"
    cap = Cap(epsilon=8.5, delta=1e-3, metrics_epsilon=2.0)
    with (
        Ledger.create(path, site="A", cohort="rare", cap=cap) as ledger,
        make(study, path.parent) as trainer,
    ):
        site = Site("A", study, trainer, ledger=ledger)
        sent = [site.answer(announce(study, round), round)[0] for round in (1, 2)]
        assert ledger.totals().epsilon_charged == Mechanism.of(study).epsilon_after(2)
        assert site.answer(announce(study, 2), 2) == (sent[1], None)
        data = site.release_metrics(announce(study, 3))
        assert site.release_metrics(announce(study, 3)) == data
        found = parse_metrics(data, study)
        assert found.readings()["patients"].value == pytest.approx(30, abs=15)
        assert ledger.totals().metrics_epsilon == 2.0
        assert (path.parent / "worker.log").read_text().count(LOADED) == 1


def test_a_round_that_a_dead_worker_cannot_train_is_not_paid_for(
    make, private_study, announce, tmp_path, start
):
    """The records are others when the worker is started again, or it does not start at all."""
    study, path = private_study, tmp_path / "site" / "ledger.sqlite"
    given = [CohortRecords(train=jsonl([(f"p{i}", "fever", "measles") for i in range(8)]))]
    trainer = WorkerTrainer(
        study,
        start,
        lambda: given[-1],
        log=path.with_name("worker.log"),
        hidden=[path.parent],
        walls=FOUND,
    )
    cap = Cap(epsilon=8.5, delta=1e-3)
    with Ledger.create(path, site="A", cohort="rare", cap=cap) as ledger, trainer:
        site = Site("A", study, trainer, ledger=ledger)
        process = trainer._process
        assert process is not None
        process.kill()
        assert process.ended.wait(2)
        given.append(CohortRecords(train=given[0].train, held_out=given[0].train))
        with pytest.raises(PrivacyError, match="are others than before"):
            site.answer(announce(study, 1), 1)
        given.pop()
        trainer.walls = dataclasses.replace(FOUND, level="none")
        trainer._start = dataclasses.replace(start, base="no-such-base")
        with pytest.raises(TrainerError, match="fetch the base that was agreed on"):
            site.answer(announce(study, 1), 1)
        trainer.stop()
        with pytest.raises(TrainerError, match="was stopped"):
            site.answer(announce(study, 1), 1)
        assert ledger.totals().epsilon_charged == 0


def test_the_agent_side_imports_no_torch():
    program = (
        "import sys, huizhen.client.worker_trainer;"
        "heavy = {'torch', 'transformers', 'peft', 'opacus'} & sys.modules.keys();"
        "sys.exit(f'imported: {sorted(heavy)}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)  # noqa: S603  # our own command


def test_what_a_strategy_keeps_at_the_site_passes_the_walls_both_ways(
    make, in_process, tiny, make_study, tmp_path
):
    rounds = {"length": "steps", "local_steps": 2, "optimizer": "sgd", "momentum": 0.0}
    study = make_study(
        base={"digests": dict(tiny.digests)},
        privacy={"unit": "none"},
        strategy={"name": "scaffold"},
        rounds={**rounds, "quorum": 1},
    )
    here = Site("A", study, in_process(study))
    coordinator = Coordinator(study, here.trainer.ready().shapes)
    state = coordinator.first(make_model(study, tiny).first_tensors(study.study.seed))
    with make(study, tmp_path / "site") as trainer:
        there = Site("A", study, trainer)
        for _ in range(2):
            asked = coordinator.announcement(state), state.round
            (expected, _), (found, _) = (site.answer(*asked) for site in (here, there))
            assert found.data == expected.data
            assert there.kept.keys() == here.kept.keys() != set()
            assert all((there.kept[name] == here.kept[name]).all() for name in here.kept)
            state, _ = coordinator.receive(state, found.data)
            state = coordinator.close_round(state)
