"""Stores to test against: SQLite files, and databases of one PostgreSQL started for the session."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from huizhen.server.store import Store
from huizhen.server.store_rounds import StoredAttempt, StoredRecord
from huizhen.server.store_updates import StoredUpdate

STUDY = "5" * 64
START = datetime(2026, 1, 31, 9, tzinfo=UTC)


class Making:
    """Rows for a study, with awkward bytes, digests that tell what they name, and a clock."""

    study = STUDY

    def at(self, seconds=0) -> datetime:
        return START + timedelta(seconds=seconds)

    def digest(self, word: str) -> str:
        return word.encode().hex().rjust(64, "0")

    def attempt(self, round=1, attempt=1, **values) -> StoredAttempt:
        defaults = {
            "study": STUDY,
            "announcement": f"\x00announce {round}.{attempt}\xff".encode("latin-1"),
            "adapter": self.digest(f"x{round}"),
            "opened": self.at(),
            "deadline": self.at(600),
        }
        return StoredAttempt(round=round, attempt=attempt, **{**defaults, **values})

    def update(self, site="A", round=1, payload="u", **values) -> StoredUpdate:
        defaults = {"study": STUDY, "attempt": 1, "document": b"\x00signed", "received": self.at()}
        digest = self.digest(payload)
        return StoredUpdate(site=site, round=round, payload=digest, **{**defaults, **values})

    def record(self, parent=STUDY, round=1, **values) -> StoredRecord:
        defaults = {
            "study": STUDY,
            "attempt": 1,
            "document": f"\x00record {round}\xff".encode("latin-1"),
            "adapter": self.digest(f"x{round + 1}"),
            "strategy_state": self.digest(f"s{round + 1}"),
            "committed": self.at(),
        }
        return StoredRecord(parent=parent, round=round, **{**defaults, **values})


def find_binary(name):
    """Return a PostgreSQL program, from the path or where Debian puts it."""
    places = [os.environ.get("PATH", ""), *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    return shutil.which(name, path=os.pathsep.join(places))


class PostgreSQL:
    """A server on a Unix socket in a temporary folder, for one user who may do everything."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._made = folder, 0
        self._as: dict[str, Any] = {}
        if os.getuid() == 0:  # as root PostgreSQL refuses to run
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            self._as = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

    def start(self) -> None:
        data = self.folder / "data"
        subprocess.run(  # noqa: S603 - a program found above
            [find_binary("initdb"), "-D", data, "-U", "tester", "-A", "trust", "-N", "-E", "UTF8"],
            check=True,
            capture_output=True,
            cwd=self.folder,
            **self._as,
        )
        self.run()

    def run(self) -> None:
        """Start the server on the data there is."""
        # Without scans of indexes rows come as they were written, so that no test is right by luck.
        options = [f"-k{self.folder}", "-clisten_addresses=", "-cenable_indexscan=off"]
        self.process = subprocess.Popen(  # noqa: S603 - a program found above
            [find_binary("postgres"), "-D", self.folder / "data", *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            start_new_session=True,
            **self._as,
        )
        for _ in range(200):
            with contextlib.suppress(psycopg.OperationalError):
                return self.execute("SELECT 1")
            time.sleep(0.05)
        raise RuntimeError("PostgreSQL did not start")

    def kill(self) -> None:
        """End the server and all that it started as a power cut would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)

    def execute(self, statement: str, database: str = "postgres") -> None:
        with psycopg.connect(
            host=str(self.folder), user="tester", dbname=database, autocommit=True
        ) as connection:
            connection.execute(statement.encode())

    def url(self, database: str) -> str:
        return f"postgresql://tester@/{database}?host={self.folder}"

    def new(self, template: str = "template1") -> str:
        self._made += 1
        name = f"store{self._made}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    if find_binary("initdb") is None or find_binary("postgres") is None:
        pytest.skip("PostgreSQL's initdb and postgres are not installed here")
    memory = Path("/dev/shm")  # noqa: S108 - a folder of our own is made in it
    with tempfile.TemporaryDirectory(
        prefix="huizhen-", dir=memory if memory.is_dir() else None, ignore_cleanup_errors=True
    ) as folder:
        server = PostgreSQL(Path(folder))
        server.start()
        yield server
        server.stop()


@pytest.fixture(scope="session")
def template(postgresql):
    """The name of a database that holds an empty store: copying it is faster than making one."""
    name = postgresql.new()
    Store.open(postgresql.url(name)).shut()
    return name


@pytest.fixture(params=["sqlite", "postgresql"])
def kind(request):
    return request.param


@pytest.fixture
def url(kind, tmp_path, request):
    """The URL of an empty store: a file that is not there yet, or a database."""
    if kind == "sqlite":
        return f"sqlite:///{tmp_path}/state/store.sqlite"
    server = request.getfixturevalue("postgresql")
    return server.url(server.new(request.getfixturevalue("template")))


@pytest.fixture
def store(url):
    with Store.open(url) as opened:
        yield opened


@pytest.fixture(scope="session")
def making():
    return Making()


@pytest.fixture
def opened(store, making):
    """A store with one open study."""
    store.studies.propose(STUDY, "rare diseases", b"offer", making.at())
    store.studies.change_state(STUDY, "open", making.at())
    return store


@pytest.fixture
def asked(opened, making):
    """A store whose open study has asked for updates of its first round."""
    opened.rounds.open_attempt(making.attempt())
    return opened


@pytest.fixture
def clock():
    """A clock that stands until a test moves it."""
    from tests.server.test_registry import Clock

    return Clock()


@pytest.fixture
def desk(tmp_path, clock):
    """The desk of an alliance that three sites have joined."""
    from tests.server.test_studies import founded, join

    with founded(tmp_path / "coordinator", clock) as desk:
        desk.registry.found()
        join(desk, clock)
        yield desk
