"""The schema of a store's database: which steps of ``migrations/`` it has, and those it lacks."""

import threading
from pathlib import Path

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from huizhen.protocol.errors import ConfigError

_FOLDER = Path(__file__).with_name("migrations")
_ONE_AT_A_TIME = threading.Lock()  # Alembic's ``op`` is one for the whole process


def migrate(connection: Connection, name: str) -> None:
    """Bring a database to the newest schema, in the transaction that is open.

    Alembic's own ``env.py`` is for its command line; a store is migrated when it is opened.

    Args:
        connection: in a transaction that no other writer is beside.
        name: of the database, for people.

    Raises:
        ConfigError: a newer version of huizhen has made its schema.
    """
    steps = ScriptDirectory(_FOLDER, version_locations=[_FOLDER])
    context = MigrationContext.configure(connection)
    found, newest = context.get_current_revision(), steps.get_current_head()
    if found == newest:
        return
    if found is not None and found not in {step.revision for step in steps.walk_revisions()}:
        raise ConfigError(
            f"{name!r} has schema {found!r}, this version knows up to {newest!r}: upgrade huizhen"
        )
    with _ONE_AT_A_TIME, Operations.context(context):
        for step in reversed(list(steps.iterate_revisions(newest, found))):
            step.module.upgrade()
        context.stamp(steps, "head")
