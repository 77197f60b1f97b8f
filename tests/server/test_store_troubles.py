"""Full disks, stopped writers, many at once: a store refuses in one line and goes on."""

import contextlib
import json
import subprocess
import sys
import threading
from collections import Counter

import pytest

from huizhen.protocol.errors import StorageError
from huizhen.server import store_database
from huizhen.server.store import Store


@pytest.fixture
def file(tmp_path):
    return tmp_path / "state" / "store.sqlite"


def ask(store, statement):
    """Run a statement that no method has, in a transaction that writes."""
    with store._database.writing() as connection:
        return connection.exec_driver_sql(statement)


def test_a_full_disk_refuses_and_the_store_goes_on_afterwards(file, making):
    """SQLite's own bound on a file's size stands for the disk's."""
    with Store.open(f"sqlite:///{file}") as store:
        pages = ask(store, "PRAGMA page_count").scalar_one()
        ask(store, f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(StorageError, match="cannot grow, the disk is full: make room, nothing"):
            store.studies.propose(making.study, "strokes", bytes(100_000), making.at())
        assert store.studies.studies() == ()
        ask(store, "PRAGMA max_page_count = 10000")
        assert store.studies.propose(making.study, "strokes", bytes(100_000), making.at()) is True


ON_A_SMALL_DISK = """
import json, os, sys
from datetime import UTC, datetime
from pathlib import Path
from huizhen.protocol.errors import StorageError
from huizhen.server.objects import Objects
from huizhen.server.store import Store

folder = Path(sys.argv[1])
now = datetime(2026, 1, 31, tzinfo=UTC)
objects, kept, said = Objects(folder / "objects"), [], []
with Store.open(f"sqlite:///{folder}/store.sqlite") as store:
    filler = folder / "filler"
    filler.write_bytes(bytes(1 << 20))
    try:
        for number in range(10_000):
            store.studies.propose(f"{number:064d}", "s", os.urandom(5000), now)
            kept.append(number)
    except StorageError as error:
        said.append(str(error))
    try:
        objects.put(os.urandom(2 << 20))
    except StorageError as error:
        said.append(str(error))
    filler.unlink()
    store.studies.propose("f" * 64, "s", b"", now)
    digest = objects.put(b"small")
with Store.open(f"sqlite:///{folder}/store.sqlite") as store:
    found = [one.digest for one in store.studies.studies()]
    whole = found == [f"{number:064d}" for number in kept] + ["f" * 64]
    print(json.dumps([said, whole, objects.has(digest), len(list(folder.glob("objects/*/*/*")))]))
"""


def test_a_disk_that_is_really_full_loses_nothing(tmp_path):
    script = f'mount -t tmpfs -o size=3m tmpfs "$1" && exec {sys.executable} -c "$2" "$1"'
    done = subprocess.run(  # noqa: S603 - our own code
        ["unshare", "--mount", "sh", "-c", script, "sh", str(tmp_path), ON_A_SMALL_DISK],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 and done.stderr.startswith(("unshare:", "mount:")):
        pytest.skip(f"no small disk can be mounted here: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    said, is_whole, is_there, objects = json.loads(done.stdout)
    assert "cannot grow, the disk is full: make room" in said[0]
    assert "No space left on device" in said[1]
    assert (is_whole, is_there, objects) == (True, True, 1)


def test_a_disk_that_cannot_be_written_refuses(asked, making, kind, url):
    if kind == "sqlite":
        with asked._database.writing() as connection:
            connection.exec_driver_sql("PRAGMA query_only = ON")
        with pytest.raises(StorageError, match="is read-only: nothing was written"):
            asked.updates.add_update(making.update(), b"told")
        return
    with asked._database.reading() as connection:
        name = connection.exec_driver_sql("SELECT current_database()").scalar_one()
    ask(asked, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    with Store.open(url) as again:
        assert again.studies.study(making.study) is not None
        with pytest.raises(StorageError, match="is read-only: nothing was written"):
            again.updates.add_update(making.update(), b"told")


def test_a_writer_that_does_not_end_keeps_others_out_for_a_while_only(url, making, monkeypatch):
    monkeypatch.setattr(store_database, "BUSY_SECONDS", 0.3)
    with Store.open(url) as one, Store.open(url) as two:
        with one._database.writing():
            assert two.studies.studies() == ()  # readers do not wait
            with pytest.raises(StorageError, match=r"is held by another process .*: try again"):
                two.studies.propose(making.study, "strokes", b"offer", making.at())
        assert two.studies.propose(making.study, "strokes", b"offer", making.at()) is True


def test_a_process_that_stops_while_it_writes_lets_the_others_in(
    postgresql, template, making, monkeypatch
):
    monkeypatch.setattr(store_database, "_IDLE_SECONDS", 0.2)
    url = postgresql.url(postgresql.new(template))
    with Store.open(url) as one, Store.open(url) as two:
        with (
            pytest.raises(StorageError, match="ended a transaction in which this process was st"),
            one._database.writing(),
        ):
            two.studies.propose(making.study, "strokes", b"offer", making.at())
        assert one.studies.study(making.study) is not None


def test_a_failed_transaction_leaves_nothing(asked, making):
    with contextlib.suppress(KeyboardInterrupt), asked._database.writing() as connection:
        connection.exec_driver_sql("INSERT INTO leases SELECT study, 'me', deadline FROM attempts")
        raise KeyboardInterrupt
    assert ask(asked, "SELECT count(*) FROM leases").scalar_one() == 0
    assert asked.rounds.lease(making.study, "me", 60, making.at()) is True


def test_a_restarted_postgresql_is_found_again(postgresql, template, making):
    name = postgresql.new(template)
    with Store.open(postgresql.url(name)) as store:
        store.studies.propose(making.study, "strokes", b"offer", making.at())
        with store._database.reading() as connection:
            [[backend]] = connection.exec_driver_sql("SELECT pg_backend_pid()")
        postgresql.execute(f"SELECT pg_terminate_backend({backend})")
        assert store.studies.study(making.study) is not None


# Many at once.


def test_threads_share_a_store(asked, making):
    start, found = threading.Barrier(8), Counter[str]()

    def work(number):
        start.wait()
        for step in range(10):
            update = making.update(f"site {step}", payload=f"{number}")
            try:
                found["new" if asked.updates.add_update(update, b"told") else "known"] += 1
            except store_database.DuplicateError:
                found["duplicate"] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"new": 10, "duplicate": 70}
    assert len(asked.updates.updates(making.study, 1)) == 10


RACE = """
import sys
from datetime import UTC, datetime
from huizhen.protocol.errors import ProtocolError
from huizhen.server.store import Store
from huizhen.server.store_members import StoredInvitation
from huizhen.server.store_rounds import StoredAttempt, StoredRecord
from huizhen.server.store_updates import StoredUpdate

url, me = sys.argv[1:]
S, now = "5" * 64, datetime(2026, 1, 31, 9, tzinfo=UTC)

def won(act):
    try:
        return int(act())
    except ProtocolError:
        return 0

print("ready", flush=True)
sys.stdin.readline()
store = Store.open(url)
store.studies.propose(S, "s", b"offer", now)
store.studies.change_state(S, "open", now)
print("ready", flush=True)
sys.stdin.readline()
wins = [
    won(lambda: store.members.add_membership(1, me.encode(), now)),
    won(lambda: store.rounds.lease(S, me, 60, now)),
]
won(lambda: store.members.add_invitation(StoredInvitation(
    token="7" * 64, site="A", made=now, expires=now.replace(hour=10))) is None)
wins.append(won(lambda: store.members.use_invitation("7" * 64, "A", now, key=me)))
updates = rounds = 0
for round in range(1, 11):
    won(lambda: store.rounds.open_attempt(StoredAttempt(
        study=S, round=round, attempt=1, announcement=b"", adapter="x", opened=now, deadline=now)))
    updates += won(lambda: store.updates.add_update(StoredUpdate(
        study=S, round=round, site="A", attempt=1, payload=me, document=b"", received=now),
        b"told"))
    while (last := store.rounds.last_record(S)) is None or last.round < round:
        sites = [one.site for one in store.updates.updates(S, round)]
        rounds += won(lambda: store.rounds.commit_record(StoredRecord(
            study=S, round=round, attempt=1, parent=S if last is None else last.digest,
            document=f"{round} by {me}".encode(), adapter="x", strategy_state="s",
            committed=now), sites))
print(*wins, updates, rounds, flush=True)
"""


@pytest.fixture
def empty(kind, file, request):
    """The URL of nothing: processes that open it at once make the store between them."""
    if kind == "sqlite":
        return f"sqlite:///{file}"
    server = request.getfixturevalue("postgresql")
    return server.url(server.new())


def start(*arguments):
    return subprocess.Popen(  # noqa: S603 - our own code
        [sys.executable, "-c", RACE, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_share_a_store_that_none_of_them_made_before(empty, making):
    children = [start(empty, name) for name in "abc"]
    for _ in range(2):
        for child in children:
            assert child.stdout.readline() == "ready\n"
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
    found = [[int(word) for word in child.communicate(timeout=60)[0].split()] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    memberships, leases, invitations, updates, rounds = map(sum, zip(*found, strict=True))
    assert (memberships, leases, invitations, updates, rounds) == (1, 1, 1, 10, 10)
    with Store.open(empty) as store:
        records = store.rounds.records(making.study)
        assert [one.round for one in records] == list(range(1, 11))
        parents = [making.study, *(one.digest for one in records[:-1])]
        assert [one.parent for one in records] == parents
        assert store.counts().updates == {making.study: 10}
