"""Killed at any moment, many times: no committed round is lost, none lacks what it names.

A child works as the rounds process does: an update's object and then its row, the result's objects
and then the record. It writes a line after each row, and a round's number after ``commit_record``
returned. Its lives end by SIGKILL; each next one goes on where the store says. Between them the
test reads everything.
"""

import subprocess
import sys

import pytest

from huizhen.server.objects import Objects
from huizhen.server.store import Store

SITES = ["A", "B", "C"]

WORK = """
import os, random, signal, sys, time
from datetime import UTC, datetime
from pathlib import Path
from huizhen.server.objects import Objects
from huizhen.server.store import Store
from huizhen.server.store_rounds import StoredAttempt, StoredRecord
from huizhen.server.store_updates import StoredUpdate

S, SITES, now = "5" * 64, ["A", "B", "C"], datetime(2026, 1, 31, 9, tzinfo=UTC)

def live(url, folder, out):
    objects = Objects(folder)
    with Store.open(url) as store:
        store.studies.propose(S, "s", b"offer", now)
        store.studies.change_state(S, "open", now)
        while True:
            last = store.rounds.last_record(S)
            number, parent = (1, S) if last is None else (last.round + 1, last.digest)
            made = store.rounds.attempts(S, number)
            attempt = made[-1].attempt + 1 if made else 1
            store.rounds.open_attempt(StoredAttempt(
                study=S, round=number, attempt=attempt, announcement=os.urandom(20),
                adapter=objects.put(os.urandom(2000)), opened=now, deadline=now))
            os.write(out, b"step\\n")
            for site in SITES:
                payload = f"update {number} of {site}".encode() * 100  # the same in every life
                store.updates.add_update(StoredUpdate(
                    study=S, round=number, site=site, attempt=attempt,
                    payload=objects.put(payload), document=os.urandom(20), received=now), b"told")
                os.write(out, b"step\\n")
            result = objects.put(f"adapter {number}".encode() * 1000)
            state = objects.put(f"state {number}".encode() * 1000)
            document = f"record {number} of attempt {attempt}".encode()
            store.rounds.commit_record(StoredRecord(
                study=S, round=number, attempt=attempt, parent=parent, document=document,
                adapter=result, strategy_state=state, committed=now), SITES)
            os.write(out, b"%d\\n" % number)

url, folder, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
moments = random.Random(seed)
while sys.stdin.readline():
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        os.close(ours)
        live(url, folder, theirs)
    os.close(theirs)
    with os.fdopen(ours) as said:
        lines = []
        for _ in range(moments.randint(1, 15)):  # of 5 in a round: a slow machine dies there too
            before = time.monotonic()
            lines.append(said.readline().strip())
        time.sleep(moments.uniform(0.0, 1.2) * (time.monotonic() - before))
        os.kill(child, signal.SIGKILL)
        lines += said.read().split()
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    print(*(line for line in lines if line != "step"), flush=True)
"""


def start(*arguments):
    return subprocess.Popen(  # noqa: S603 - our own code
        [sys.executable, "-c", WORK, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def chain(store, objects, making):
    """Check everything that the store holds; return its committed rounds."""
    records = store.rounds.records(making.study)
    parent = making.study
    for number, record in enumerate(records, 1):
        assert (record.round, record.parent) == (number, parent)
        assert objects.get(record.adapter) == f"adapter {number}".encode() * 1000
        assert objects.get(record.strategy_state) == f"state {number}".encode() * 1000
        counted = store.updates.counted(making.study, number)
        assert [one.site for one in counted] == SITES
        parent = record.digest
    for number in range(1, len(records) + 2):
        for one in store.updates.updates(making.study, number):
            assert objects.get(one.payload) == f"update {number} of {one.site}".encode() * 100
            told = store.updates.receipt(making.study, number, one.site, one.payload)
            assert told.document == b"told"
        attempts = [one.attempt for one in store.rounds.attempts(making.study, number)]
        assert attempts == list(range(1, len(attempts) + 1))
    assert all(objects.has(digest) for digest in store.object_digests())
    return records


@pytest.mark.slow
def test_killed_at_any_moment_no_committed_round_is_lost(kind, tmp_path, making, request):
    if kind == "sqlite":
        url = f"sqlite:///{tmp_path}/store.sqlite"
    else:
        server = request.getfixturevalue("postgresql")
        url = server.url(server.new())
    folder, lives = tmp_path / "objects", 60
    objects, before, died_between = Objects(folder), (), 0
    with start(url, str(folder), "7") as child:
        for _ in range(lives):
            child.stdin.write("live\n")
            child.stdin.flush()
            said = [int(word) for word in child.stdout.readline().split()]
            with Store.open(url) as store:
                records = chain(store, objects, making)
                assert records[: len(before)] == before
                reported = said[-1] if said else len(before)
                # At most the round whose commit was under way is there unreported.
                assert reported <= len(records) <= reported + 1
                died_between += store.updates.updates(making.study, len(records) + 1) != ()
                before = records
        child.stdin.close()
        assert child.wait(30) == 0
    assert len(before) > lives // 2
    assert died_between > lives // 10  # in the midst of rounds
    with Store.open(url) as store:
        objects.sweep(store.object_digests(), older_than_seconds=-1)
        chain(store, objects, making)
        left = {one.name for one in folder.glob("??/??/*")}
        assert left == store.object_digests()  # no drafts, nothing that no row names
