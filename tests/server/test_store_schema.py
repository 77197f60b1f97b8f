"""A store is brought to this version's schema whole or not at all, and never back."""

import shutil
import sqlite3
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, event

from huizhen.protocol.errors import ConfigError, StorageError
from huizhen.server import store_schema
from huizhen.server.store import Store
from huizhen.server.tables import STATES, metadata, studies

SECOND = '''
"""A step of the future.

Revision: 0002, follows 0001.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("studies", sa.Column("colour", sa.String(), server_default="red"))
'''


def test_the_migrated_database_is_what_the_tables_say(store):
    with store._database.reading() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, metadata) == []
        assert context.get_current_revision() == "0001"


def test_the_comparison_sees_a_difference(store):
    with store._database.writing() as connection:
        connection.exec_driver_sql("ALTER TABLE studies ADD COLUMN colour VARCHAR")
        [found] = compare_metadata(MigrationContext.configure(connection), metadata)
        assert found[0] == "remove_column"


def test_the_database_knows_the_states_of_a_study(opened, making):
    for state in STATES:
        with opened._database.writing() as connection:
            connection.execute(studies.update().values(state=state))
    with (
        pytest.raises(StorageError, match=r"was refused .*ck_studies_state.*: nothing") as caught,
        opened._database.writing() as connection,
    ):
        connection.execute(studies.update().values(state="lost"))
    assert "rare diseases" not in str(caught.value)  # PostgreSQL would show the whole row


@pytest.fixture
def next_version(tmp_path, monkeypatch):
    """Make this version one that has a second step."""
    folder = tmp_path / "migrations"
    shutil.copytree(store_schema._FOLDER, folder)
    (folder / "step_0002.py").write_text(SECOND, encoding="utf-8")

    def upgrade():
        monkeypatch.setattr(store_schema, "_FOLDER", folder)

    return upgrade


def test_an_older_store_is_brought_up_with_what_it_holds(opened, making, url, next_version):
    opened.shut()
    next_version()
    for _ in range(2):
        with Store.open(url) as store, store._database.reading() as connection:
            rows = connection.exec_driver_sql("SELECT name, colour FROM studies").all()
            assert rows == [("rare diseases", "red")]


def test_a_store_of_a_newer_version_is_refused(url, next_version, monkeypatch):
    before = store_schema._FOLDER
    next_version()
    Store.open(url).shut()
    monkeypatch.setattr(store_schema, "_FOLDER", before)
    with pytest.raises(ConfigError, match="has schema '0002', this version knows up to '0001'"):
        Store.open(url)


class Killed(BaseException):
    """What a test raises where a process would die."""


@pytest.mark.parametrize("at", ["CREATE TABLE counted", "CREATE TRIGGER records", "INSERT INTO al"])
def test_a_migration_that_dies_leaves_nothing_and_the_next_one_ends_it(tmp_path, at):
    path = tmp_path / "store.sqlite"

    def die(connection, cursor, statement, *_):
        if statement.strip().startswith(at):
            raise Killed

    event.listen(Engine, "before_cursor_execute", die)
    try:
        with pytest.raises(Killed):
            Store.open(f"sqlite:///{path}")
    finally:
        event.remove(Engine, "before_cursor_execute", die)
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM sqlite_schema").fetchall() == [(0,)]
    database.close()
    Store.open(f"sqlite:///{path}").shut()


def test_every_step_says_what_it_follows():
    steps = sorted(Path(store_schema._FOLDER).glob("step_*.py"))
    assert [one.stem for one in steps] == [f"step_{n:04d}" for n in range(1, len(steps) + 1)]
