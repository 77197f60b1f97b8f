"""A site's audit log at work, and what somebody with access to its disk can do to it."""

import shutil
import sqlite3
from contextlib import closing
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from huizhen.protocol.documents import countersign, public_of
from huizhen.storage.audit import AuditLog

S = "5" * 64


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.now = datetime(2026, 3, 1, 8, 30, tzinfo=UTC)

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(scope="session")
def signers():
    """Return the keys of a log's owner, of two witnesses and of a stranger."""
    return [Ed25519PrivateKey.from_private_bytes(bytes([n] * 32)) for n in range(1, 5)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "site" / "audit.sqlite"


@pytest.fixture
def log(path, clock):
    with AuditLog.create(path, alliance="rare", log="North", clock=clock) as log:
        yield log


@pytest.fixture
def used(log, signers):
    """A log of six entries, of which four are under a checkpoint that a witness has signed."""
    owner, witness, *_ = signers
    log.append("study_offered", study=S)
    log.append("approval_given", study=S, cohort="rare 1", epsilon_cap=2.0)
    log.append("training_started", study=S, round=1, attempt=1)
    log.countersigned(countersign(log.checkpoint(owner), witness), [public_of(witness)])
    log.append("training_ended", study=S, round=1, attempt=1, code=None)
    log.append("update_sent", study=S, round=1, attempt=1, payload="a" * 64, bytes=1000)
    return log


@pytest.fixture(scope="session")
def tamper():
    """Write to a file as somebody with SQLite would; its triggers are put back after it."""

    def tamper(path, *statements, guarded=False):
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            query = "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
            triggers = [] if guarded else database.execute(query).fetchall()
            for name, _ in triggers:
                database.execute(f"DROP TRIGGER {name}")
            for statement in statements:
                database.execute(*statement if isinstance(statement, tuple) else (statement,))
            for _, sql in triggers:
                database.execute(sql)

    return tamper


@pytest.fixture
def copied(tmp_path):
    """Copy a file as a backup does, with what is only in its write-ahead log."""

    def copy(path, name="backup"):
        folder = tmp_path / name
        folder.mkdir(mode=0o700)
        for part in (path.name, f"{path.name}-wal"):
            if path.with_name(part).exists():
                shutil.copy2(path.with_name(part), folder / part)
        return folder / path.name

    return copy
