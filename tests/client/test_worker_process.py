"""One life of a worker: it ends when it is told to, or with its agent, and its log is bounded.

The worker here is never told to start, so that no torch is imported.
"""

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

from huizhen.client.frames import Frame, read_frame, write_frame
from huizhen.client.sandbox import LEVELS, command, environment, probe, python_folders
from huizhen.client.trainer import TrainerError
from huizhen.client.worker_process import MAX_LOG_BYTES, WorkerProcess

FOUND = probe()
HELD = LEVELS[LEVELS.index(FOUND.level) :]  # test_sandbox.py fails where it is less than it could
IDLE = [sys.executable, "-m", "huizhen.client.worker"]


@pytest.mark.parametrize("level", LEVELS)
def test_a_worker_outlives_the_thread_that_started_it_and_ends_when_told(level, tmp_path):
    if level not in HELD:
        pytest.skip(f"this machine gives only the level {FOUND.level!r}: {FOUND.sentence}")
    found = []
    line = command(level, IDLE, readable=python_folders())

    def ping(process):
        write_frame(process.commands, Frame({"command": "ping"}))
        assert read_frame(process.answers, max_bytes=0) == Frame({"code": None})

    def start():
        found.append(WorkerProcess(line, environment(1), tmp_path / "worker.log"))
        ping(found[0])  # it has told the kernel by now whose end it must not outlive

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    [process] = found
    time.sleep(0.2)
    ping(process)
    write_frame(process.commands, Frame({"command": "end"}))
    assert process.ended.wait(5)
    assert not descendants(process.pid)


AGENT = """
import json, sys, time
from pathlib import Path
from huizhen.client.frames import Frame, read_frame, write_frame
from huizhen.client.sandbox import environment
from huizhen.client.worker_process import WorkerProcess
process = WorkerProcess(json.loads(sys.argv[1]), environment(1), Path(sys.argv[2]))
write_frame(process.commands, Frame({"command": "ping"}))
read_frame(process.answers, max_bytes=0)
print(process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("level", LEVELS)
def test_the_worker_dies_with_an_agent_that_is_killed(level, tmp_path):
    """Whoever else holds an end of its pipes: the kernel is told at every level."""
    if level not in HELD:
        pytest.skip(f"this machine gives only the level {FOUND.level!r}: {FOUND.sentence}")
    line = command(level, IDLE, readable=python_folders())
    agent = subprocess.Popen(  # noqa: S603  # our own command
        [sys.executable, "-c", AGENT, json.dumps(line), str(tmp_path / "worker.log")],
        stdout=subprocess.PIPE,
    )
    with agent:
        assert agent.stdout is not None
        pids = descendants(int(agent.stdout.readline()))
        assert pids
        with Path(f"/proc/{max(pids)}/cmdline").open() as words:
            assert "huizhen.client.worker" in words.read()
        # another holder of the pipes: their end does not come, and must not be waited for
        held = pipes_written_by(agent.pid)
        assert len(held) == 2  # to the worker, and to this test
        agent.kill()
        try:
            assert wait_until_gone(pids, 2)
        finally:
            for pipe in held:
                os.close(pipe)


def pipes_written_by(pid):
    """Open the writing ends of all pipes that a process writes to."""
    found = []
    for place in Path(f"/proc/{pid}/fd").iterdir():
        flags = Path(f"/proc/{pid}/fdinfo/{place.name}").read_text().split("flags:")[1].split()[0]
        if os.readlink(place).startswith("pipe:") and int(flags, 8) & os.O_WRONLY:  # noqa: PTH115
            found.append(os.open(place, os.O_WRONLY))
    return found


def test_a_kill_ends_what_the_worker_started_too(tmp_path):
    """Else a pipe stays open, and who writes to it or reads from it waits for ever."""
    process = WorkerProcess(["sh", "-c", "sleep 600 & wait"], environment(1), tmp_path / "log")
    while len(pids := descendants(process.pid)) < 2:
        time.sleep(0.01)
    process.kill()
    assert process.ended.wait(5)
    assert wait_until_gone(pids, 5)


@pytest.mark.parametrize("level", LEVELS)
def test_a_worker_dies_at_each_moment_of_its_start(level, tmp_path):
    """Stopped first: what is behind the walls does nothing then that could end it by itself."""
    if level not in HELD:
        pytest.skip(f"this machine gives only the level {FOUND.level!r}: {FOUND.sentence}")
    line = command(level, IDLE, readable=python_folders())
    for moment in range(40):
        process = WorkerProcess(line, environment(1), tmp_path / "worker.log")
        time.sleep(moment * 0.0003)
        for pid in descendants(process.pid):
            os.kill(pid, signal.SIGSTOP)
        process.kill()
        assert process.ended.wait(5), f"{moment * 0.3:.1f} ms after its start"


def test_one_that_says_no_more_is_alive_until_it_ends_or_is_killed(tmp_path):
    quiet = ["sh", "-c", "exec 2>&-; read line; exit"]
    process = WorkerProcess(quiet, environment(1), tmp_path / "log")
    assert not process.ended.wait(0.2)
    process.commands.write(b"end\n")
    process.commands.flush()
    assert process.ended.wait(5)
    process.kill()  # nothing is left to kill
    process = WorkerProcess(quiet, environment(1), tmp_path / "log")
    time.sleep(0.2)
    process.kill()
    assert process.ended.wait(5)


def test_a_log_is_bounded_and_the_one_before_is_kept(tmp_path):
    log = tmp_path / "worker.log"
    program = f"import sys; sys.stderr.write('a' * {3 * MAX_LOG_BYTES}); print('done')"
    for _ in range(2):
        process = WorkerProcess([sys.executable, "-c", program], environment(1), log)
        assert process.ended.wait(10)
    assert [path.stat().st_size for path in sorted(tmp_path.iterdir())] == [MAX_LOG_BYTES] * 2


def test_a_program_that_is_not_there_is_a_crash(tmp_path):
    with pytest.raises(TrainerError, match="code crashed"):
        WorkerProcess(["/no/such/program"], environment(1), tmp_path / "worker.log")
