"""A store opens only what is one, says in one line what is wrong, and never changes what it has."""

import os
import sqlite3

import pytest

from huizhen.protocol.errors import ConfigError, StorageError
from huizhen.server.store import Store
from huizhen.server.tables import APPEND_ONLY


@pytest.fixture
def file(tmp_path):
    return tmp_path / "state" / "store.sqlite"


def sqlite(path):
    return Store.open(f"sqlite:///{path}")


def ask(store, statement):
    """Run a statement that no method has, in a transaction that writes."""
    with store._database.writing() as connection:
        return connection.exec_driver_sql(statement)


# What may be opened.


@pytest.mark.parametrize(
    "url",
    [
        "",
        "store.sqlite",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///a?mode=ro",
        "sqlite+aiosqlite:///a",
        "mysql://host/name",
        "postgresql://host",
        "postgresql+asyncpg://host/name",
        "postgresql://host:port/name",
    ],
)
def test_a_wrong_url_is_refused(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="expected sqlite:////absolute/file or postgresql://"):
        Store.open(url)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "url", ["postgresql://me:s3cret@host/name", "postgresql://me:s3cret@host:port/name"]
)
def test_a_password_in_a_url_is_refused_and_not_repeated(url):
    with pytest.raises(ConfigError) as caught:
        Store.open(url)
    assert "s3cret" not in str(caught.value)


def test_a_database_that_cannot_be_reached_is_one_line(tmp_path):
    with pytest.raises(StorageError, match=r"^'postgresql\S*' cannot be reached: [^\n]*$"):
        Store.open(f"postgresql://me@/name?host={tmp_path}")


def test_a_database_that_is_not_there_is_one_line(postgresql):
    with pytest.raises(StorageError, match="cannot be reached: look at the URL"):
        Store.open(postgresql.url("nowhere"))


def test_the_file_is_for_its_owner_alone(file):
    before = os.umask(0)
    try:
        with sqlite(file) as store:
            ask(store, "CREATE TABLE t (x)")
            assert {one.name for one in file.parent.iterdir()} == {
                "store.sqlite",
                "store.sqlite-wal",
                "store.sqlite-shm",
            }
            assert {one.stat().st_mode & 0o777 for one in file.parent.iterdir()} == {0o600}
            assert file.parent.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


def test_a_file_that_others_may_read_is_refused(file):
    sqlite(file).shut()
    file.chmod(0o640)
    with pytest.raises(ConfigError, match=r"open to others .*mode 640.*: chmod 600"):
        sqlite(file)


def test_a_commit_is_on_the_disk_when_it_is_reported(file):
    settings = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    with (
        sqlite(file) as store,
        store._database.reading() as one,
        store._database.writing() as two,
    ):
        for connection in (one, two):  # the second is a new one
            for name, value in settings.items():
                found = connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
                assert (name, found) == (name, value)


def test_a_postgresql_that_does_not_sync_is_refused(postgresql, template):
    name = postgresql.new(template)
    postgresql.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
    with pytest.raises(ConfigError, match="synchronous_commit = off, a commit would not survive"):
        Store.open(postgresql.url(name))


@pytest.mark.parametrize("kind_of_file", ["text", "ledger", "tables"])
def test_a_file_that_is_no_store_is_refused_and_left_as_it_is(file, kind_of_file):
    file.parent.mkdir(mode=0o700)
    if kind_of_file == "text":
        file.write_bytes(b"dear diary, " * 1000)
    else:
        with sqlite3.connect(file) as database:
            database.execute("CREATE TABLE entries (x)")
            if kind_of_file == "ledger":
                database.execute("PRAGMA application_id = 1213877297")
        database.close()
    file.chmod(0o600)
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="is not a store: name another file"):
        sqlite(file)
    assert file.read_bytes() == before


def test_a_damaged_file_is_refused(file, making):
    with sqlite(file) as store:
        for number in range(50):
            store.studies.propose(f"{number:064d}", "strokes", bytes(3000), making.at())
    data = bytearray(file.read_bytes())
    data[-4096 : -4096 + 64] = b"\xff" * 64  # a page of rows that opening alone does not read
    file.write_bytes(data)
    with pytest.raises(StorageError, match=r"is damaged.*: restore a backup"):
        sqlite(file)


# What is kept stays.


@pytest.mark.parametrize("table", APPEND_ONLY)
def test_what_was_written_is_never_changed(asked, making, kind, table):
    asked.members.add_membership(1, b"document", making.at())
    asked.studies.add_approval(making.study, "A", b"yes", issued=making.at(), now=making.at())
    asked.studies.add_release(making.study, b"release", making.at())
    asked.updates.add_update(making.update("A"), b"told")
    asked.rounds.commit_record(making.record(), ["A"])
    everything = f"SELECT * FROM {table}"  # noqa: S608 - a name from our own list
    before = ask(asked, everything).all()
    column = "version" if table == "memberships" else "study"
    attacks = [
        f"UPDATE {table} SET {column} = {column}",  # noqa: S608
        f"DELETE FROM {table}",  # noqa: S608
    ]
    if kind == "sqlite":
        attacks.append(f"INSERT OR REPLACE INTO {table} {everything}")
    else:
        attacks.append(f"TRUNCATE {table} CASCADE")
    for attack in attacks:
        with pytest.raises(StorageError, match=f"{table} are append-only"):
            ask(asked, attack)
    assert ask(asked, everything).all() == before
    assert len(before) == 1


def test_sweeping_keeps_what_a_row_names(asked, making):
    asked.updates.add_update(making.update("A", payload="u"), b"told")
    asked.rounds.commit_record(making.record(), ["A"])
    named = {making.digest(word) for word in ("x1", "u", "x2", "s2")}
    assert asked.object_digests() == named
