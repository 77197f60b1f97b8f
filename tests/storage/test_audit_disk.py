"""If an entry cannot get to the disk the caller learns it (AU-5), and many at once append in order.

A child writes a word after ``append`` returned, where its effect would be. Whatever it wrote must
be in the log, whenever the child was killed.
"""

import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from huizhen.protocol.documents import public_of
from huizhen.protocol.errors import StorageError
from huizhen.protocol.statements import Checkpoint
from huizhen.storage.audit import AuditLog

S = "5" * 64


def test_a_full_file_logs_nothing_and_says_so(used, path):
    [[pages]] = used._file._execute("PRAGMA page_count")
    used._file._execute(f"PRAGMA max_page_count = {pages}")

    def fill():
        for n in range(1, 1000):
            used.append("training_started", study=S, round=n, attempt=1)

    with pytest.raises(StorageError, match="disk is full: make room, nothing was logged, so nothi"):
        fill()
    used._file._execute("PRAGMA max_page_count = 1000000")
    before = used.head()
    assert used.append("work_paused", code="command").sequence == before.size + 1
    with AuditLog.open(path, witnessed=before) as again:
        assert again.head().size == before.size + 1


def test_a_read_only_file_logs_nothing_and_says_so(used, signers):
    used._file._execute("PRAGMA query_only = 1")  # SQLite answers as on a read-only disk
    with pytest.raises(StorageError, match="read-only: nothing was logged, so nothing may leave"):
        used.append("work_paused", code="command")
    with pytest.raises(StorageError, match="read-only"):
        used.checkpoint(signers[0])
    used._file._execute("PRAGMA query_only = 0")
    assert used.append("work_paused", code="command").sequence == 7


ON_A_SMALL_DISK = """
import os, subprocess, sys
from pathlib import Path
from huizhen.protocol.errors import StorageError
from huizhen.storage.audit import AuditLog
disk = Path(sys.argv[1])
path = disk / "site" / "audit.sqlite"
log = AuditLog.create(path, alliance="rare", log="North")
try:
    for n in range(1, 100_000):
        log.append("training_started", study="5" * 64, round=n, attempt=1)
except StorageError as error:
    print(error)
print(log.head().size == n, flush=True)
log.shut()
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
with AuditLog.open(path) as log:  # may be read
    try:
        log.append("work_paused", code="command")
    except StorageError as error:
        print(error)
subprocess.run(["mount", "-o", "remount,rw,size=8m", disk], check=True)
with AuditLog.open(path) as log:
    print(log.head().size == n)
    print(log.append("work_paused", code="command").sequence == n + 1)
"""


def test_a_disk_that_is_really_full_or_read_only_lets_nothing_be_logged(tmp_path):
    def apart(script, *arguments):
        command = ["unshare", "--mount", "sh", "-ec", script, "sh", tmp_path, *arguments]
        return subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - our own code

    mount = 'mount -t tmpfs -o size=400k tmpfs "$1"'
    if shutil.which("unshare") is None or apart(mount).returncode:
        pytest.skip("this user may not mount a small disk in a namespace of its own")
    done = apart(f'{mount}; "$2" -c "$3" "$1"', sys.executable, ON_A_SMALL_DISK)
    path = tmp_path / "site" / "audit.sqlite"
    nothing = "nothing was logged, so nothing may leave"
    assert done.stdout.splitlines() == [
        f"{str(path)!r} cannot grow, the disk is full: make room, {nothing}",
        "True",
        f"{str(path)!r} cannot be written, it or its disk is read-only: {nothing}",
        "True",
        "True",
    ], done.stderr


def test_a_write_that_the_system_cuts_short_logs_nothing(used, path):
    used.shut()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-c", CUT_SHORT, path], check=True, capture_output=True, text=True
    )
    message, sequence = done.stdout.splitlines()
    assert message == f"{str(path)!r} cannot be read or written, the disk fails or is full"
    assert sequence == "8"


CUT_SHORT = """
import resource, sys
from pathlib import Path
from huizhen.protocol.errors import StorageError
from huizhen.storage.audit import AuditLog
with AuditLog.open(Path(sys.argv[1])) as log:
    log.append("work_paused", code="command")
    size = Path(sys.argv[1] + "-wal").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, resource.RLIM_INFINITY))
    try:
        log.append("work_resumed", code="command")
    except StorageError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    print(log.append("work_resumed", code="command").sequence)
"""


def test_threads_append_one_after_the_other(log):
    def work(number):
        for n in range(1, 21):
            log.append("training_started", study=S, round=n, attempt=number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = log.entries()
    assert len(entries) == 81
    for number in range(1, 5):
        rounds = [e.facts["round"] for e in entries[1:] if e.facts["attempt"] == number]
        assert rounds == list(range(1, 21))


def test_another_process_s_entries_are_taken_in(used, path, signers):
    with AuditLog.open(path) as other:
        other.append("work_paused", code="command")
        assert used.append("work_resumed", code="command").sequence == 8
        assert other.head() == used.head()
        own = other.checkpoint(signers[0])
        assert used.checkpoint(signers[0]) == own


APPEND = """
import os, sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from huizhen.storage.audit import AuditLog
key = Ed25519PrivateKey.from_private_bytes(bytes([1] * 32))
log, name = AuditLog.open(Path(sys.argv[1])), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for n in range(1, int(sys.argv[3]) + 1):
    entry = log.append("training_started", study="5" * 64, round=n, attempt=name)
    os.write(1, f"{entry.sequence}\\n".encode())
    if n % 7 == 0:
        log.checkpoint(key)
"""


def start(path, name, count):
    return subprocess.Popen(  # noqa: S603 - our own code
        [sys.executable, "-c", APPEND, path, str(name), str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_append_one_after_the_other(log, path, signers):
    children = [start(path, name, 40) for name in (1, 2, 3)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    wrote = [[int(line) for line in child.communicate(timeout=60)[0].split()] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert sorted(number for numbers in wrote for number in numbers) == list(range(2, 122))
    with AuditLog.open(path, witnessed=log.head()) as again:
        for name, numbers in enumerate(wrote, 1):
            entries = [again.entries(number, number)[0] for number in numbers]
            assert [e.facts["round"] for e in entries] == list(range(1, 41))
            assert {e.facts["attempt"] for e in entries} == {name}
        assert len(again.checkpoints()) >= 5


@pytest.mark.slow
def test_killed_at_any_moment_no_entry_that_was_acknowledged_is_missing(log, path, signers):
    """Every head that was signed before a kill is a head of the log after it."""
    key = public_of(signers[0])
    heads: dict[int, str] = {}
    for attempt in range(1, 26):
        with start(path, attempt, 100_000) as child:
            assert child.stdout.readline() == "ready\n"
            child.stdin.write("go\n")
            child.stdin.flush()
            first = [child.stdout.readline() for _ in range(8)]  # one checkpoint at least
            time.sleep(0.004 * attempt)
            child.send_signal(signal.SIGKILL)
            wrote = [int(line) for line in [*first, *child.stdout.read().splitlines()]]
        assert child.returncode == -signal.SIGKILL
        with AuditLog.open(path) as again:
            entries = again.entries()
            assert [e.sequence for e in entries] == list(range(1, len(entries) + 1))
            assert wrote == list(range(wrote[0], wrote[-1] + 1))
            assert {entries[n - 1].facts["attempt"] for n in wrote} == {attempt}
            assert wrote[-1] <= len(entries) <= wrote[-1] + 1
            for size, root in heads.items():
                assert again.root(size) == root
            signed = [Checkpoint.read(one, [key]) for one in again.checkpoints()]
            heads = {said.size: said.root for said in signed}
    assert len(heads) >= 25
