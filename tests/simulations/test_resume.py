"""A run that is killed at a random moment and resumed ends as if nothing had happened."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from huizhen.cli.main import main
from huizhen.client.ledger import Ledger
from huizhen.client.site import Site
from huizhen.simulations import federation

ROUNDS = 12
SIMULATE = [sys.executable, "-m", "huizhen.cli.main", "simulate"]


@pytest.fixture(scope="module")
def server():
    """Processes that are forked where everything is imported, so that each starts at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["huizhen.simulations.runner", "huizhen.cli.simulate", "opacus"])
    return context


@pytest.fixture
def experiment(experiment_file):
    """Return several rounds of two seeds without privacy; each round takes some 50 ms."""
    return experiment_file(
        ("count = 2", f"count = {ROUNDS}"),
        ('site = "hospital"', 'site = "hospital"\narms = ["pooled", "federated"]\nseeds = [1, 2]'),
    )


@pytest.fixture
def simulate(server, experiment, home):
    """Start ``huizhen simulate`` in a process of its own."""

    def simulate(out, *options):
        where = ["--out", str(out), "--home", str(home), "--threads", "1"]
        arguments = ["simulate", str(experiment), *where, *options]
        process = server.Process(target=main, args=(arguments,))
        process.start()
        return process

    return simulate


def outcome(out):
    """Return the exported adapter's bytes and each seed's digest."""
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    digests = {
        (arm, one["seed"]): one["adapter"]
        for arm in ("pooled", "federated")
        for one in results["arms"][arm]["per_seed"]
    }
    files = {path.name: path.read_bytes() for path in (out / "federated").iterdir()}
    metrics = {arm: results["arms"][arm]["metrics"] for arm in results["arms"]}
    return digests, files, metrics


def saved(out):
    """Return how many files of state there are and when the last was written."""
    times = [path.stat().st_mtime_ns for path in (out / "state").glob("*.safetensors")]
    return len(times), max(times, default=0)


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def wait_for_rounds(process, out, count):
    """Wait until so many more rounds are saved; return whether the process still runs."""
    for _ in range(count):
        before = saved(out)
        while saved(out) == before:
            if not process.is_alive():
                return False
            time.sleep(0.002)
    return True


def finish(process, out):
    process.join(120)
    assert process.exitcode == 0
    assert (out / "results.json").exists()


def test_a_killed_run_ends_as_an_undisturbed_one(simulate, tmp_path):
    undisturbed = simulate(tmp_path / "whole")
    out = tmp_path / "killed"
    process = simulate(out)
    assert wait_for_rounds(process, out, 5)
    time.sleep(0.013)
    kill(process)
    assert not (out / "results.json").exists()
    before = saved(out)
    finish(simulate(out, "--resume"), out)
    finish(undisturbed, tmp_path / "whole")
    assert before[0] >= 1
    assert outcome(out) == outcome(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_again_and_again_ends_as_an_undisturbed_one(simulate, tmp_path, seed):
    finish(simulate(tmp_path / "whole"), tmp_path / "whole")
    generator = random.Random(seed)  # noqa: S311  # moments, no secrets
    out, kills = tmp_path / "killed", 0
    for _ in range(12):
        process = simulate(out, "--resume")
        if wait_for_rounds(process, out, generator.randint(0, 6)) and not process.join(
            generator.random() * 0.2
        ):
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            if process.exitcode == 0:  # it ended by itself in the last moment
                break
            assert process.exitcode == -signal.SIGKILL
            kills += 1
    finish(simulate(out, "--resume"), out)
    assert kills >= 3
    assert outcome(out) == outcome(tmp_path / "whole")


def test_a_resumed_run_does_not_do_a_stored_round_again(
    experiment, home, tmp_path, monkeypatch, capsys
):
    """Stopped by Ctrl-C in round 4 of the first unit, in this process."""
    done = []
    run_round = federation._run_round

    def counted(coordinator, state, sites, work, model, watcher):
        if (work.unit, state.round) == ("pooled-1", 4) and ("pooled-1", 4) not in done:
            done.append(("pooled-1", 4))
            raise KeyboardInterrupt
        done.append((work.unit, state.round))
        return run_round(coordinator, state, sites, work, model, watcher)

    monkeypatch.setattr(federation, "_run_round", counted)
    arguments = ["simulate", str(experiment), "--out", str(tmp_path / "run"), "--home", str(home)]
    assert main(arguments) == 130
    stopped = capsys.readouterr().err
    assert "stopped; every closed round is saved" in stopped
    again = f"huizhen simulate {experiment} --out {tmp_path / 'run'} --home {home} --resume"
    assert again in stopped
    assert main([*arguments, "--resume"]) == 0
    expected = [(u, r) for u in ("pooled-1", "federated-1", "pooled-2", "federated-2")
                for r in range(1, ROUNDS + 1)]  # fmt: skip
    assert [one for one in done if one != ("pooled-1", 4)] == [
        one for one in expected if one != ("pooled-1", 4)
    ]
    assert done.count(("pooled-1", 4)) == 2


def test_ctrl_c_saves_and_says_how_to_resume(experiment, home, tmp_path):
    out = tmp_path / "run"
    arguments = [*SIMULATE, str(experiment), "--out", str(out), "--home", str(home)]
    process = subprocess.Popen(  # noqa: S603  # our own command
        [*arguments, "--threads", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while saved(out)[0] == 0 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    hint = stderr.splitlines()[-1]
    assert f"--out {out} --threads 1 --home {home} --resume" in hint
    assert stdout == ""
    assert saved(out)[0] >= 1
    assert not [path for path in (out / "state").iterdir() if path.suffix != ".safetensors"]


def test_a_private_round_that_was_half_done_is_gone_on_with_under_the_same_charge(
    experiment_file, home, tmp_path, monkeypatch, capsys
):
    """Stopped after the first site of round 2 has answered: it answers with the same bytes."""
    path = experiment_file(
        ('site = "hospital"', 'site = "hospital"\narms = ["federated_dp"]'),
    )
    answers: list[tuple[str, int, bytes]] = []
    plain = Site.answer

    def noted(site, announcement, round):
        if len(answers) == 3:
            answers.append(("", 0, b""))
            raise KeyboardInterrupt
        envelope, report = plain(site, announcement, round)
        answers.append((site.name, round, envelope.data))
        return envelope, report

    monkeypatch.setattr(Site, "answer", noted)
    arguments = ["simulate", str(path), "--out", str(tmp_path / "run"), "--home", str(home)]
    assert main(arguments) == 130
    assert main([*arguments, "--resume", "--json"]) == 0
    assert answers[4] == answers[2]  # North in round 2, before and after
    [place] = (tmp_path / "run").rglob("North.sqlite")
    with Ledger.open(place) as ledger:
        assert ledger.verify().epsilon_charged <= 8.0
    rounds = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))["arms"][
        "federated_dp"
    ]["rounds"]
    assert "outside_share" in rounds[0]
    assert not {"outside_share", "training_seconds", "loss"} & rounds[1].keys()
