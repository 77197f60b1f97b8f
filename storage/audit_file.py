"""The SQLite file under an audit log: its entries, its checkpoints, and the tree over both.

When a file is opened every entry is hashed into the tree. A checkpoint in the file says what the
entries under it were, so only those that no checkpoint speaks for are parsed as well.
"""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huizhen.protocol.audit import SCHEMA, Entry, read_entry
from huizhen.protocol.audit_checkpoints import key_ids
from huizhen.protocol.audit_tree import Tree
from huizhen.protocol.errors import AuditError
from huizhen.protocol.merkle import leaf_hash
from huizhen.protocol.statements import Head
from huizhen.storage import append_only

_CHECKPOINTS = (
    "size INTEGER NOT NULL, root TEXT NOT NULL, owner TEXT NOT NULL, signers INTEGER NOT NULL, "
    "checkpoint BLOB NOT NULL"
)
FORMAT = append_only.Format(
    application=0x485A4131,  # "HZA1" in the file's header says that it is an audit log
    schema=SCHEMA,
    statements=(
        *append_only.table("entries", "entry BLOB NOT NULL", "an audit log"),
        *append_only.table("checkpoints", _CHECKPOINTS, "an audit log"),
    ),
    name="audit log",
    article="an",
    broken=AuditError,
    consequence="nothing was logged, so nothing may leave",
)


class AuditFile:
    """An open file, for several threads one at a time."""

    def __init__(self, path: Path) -> None:
        """Open the file and take in what it has.

        Raises:
            ConfigError: there is no log, a newer version wrote it, or others may read it.
            AuditError: an entry was changed, or the end was cut off.
            StorageError: the file is damaged or cannot be read.
        """
        self.path, self.tree = path, Tree()
        self.alliance = self.log = ""
        self._identity = append_only.identity(path)
        self._mutex = threading.RLock()
        self._database = FORMAT.connect(path, threads=True)
        try:
            FORMAT.check(self._database, path)
            self._load()
        except BaseException:
            self.shut()
            raise

    def shut(self) -> None:
        """Let go of the file."""
        with self._mutex:
            self._database.close()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep every other writer out until ``commit``, or until an error takes all back."""
        with self._mutex:
            self._execute("BEGIN IMMEDIATE")
            try:
                self.refresh()
                yield
            finally:
                self._roll_back()

    def refresh(self) -> None:
        """Take in what other processes have appended.

        Raises:
            AuditError: the file is no longer the one that was opened, or an entry is none.
            StorageError: it cannot be read.
        """
        with self._mutex:
            last = self.tree.size
            rows = FORMAT.rows(self._database, self.path, last)
            if append_only.identity(self.path) != self._identity or not self._begins(rows, last):
                raise AuditError(
                    f"{str(self.path)!r} is no longer the audit log that was opened: it was "
                    "replaced, open it again with the witnessed head"
                )
            for n, (number, data) in enumerate(rows[1:], last + 1):
                _entry(number, n, data)
                self.tree.append(leaf_hash(data))

    def add(self, data: bytes) -> None:
        """Write the next entry; call it within ``alone``. It is on the disk when this returns."""
        self._execute("INSERT INTO entries VALUES (?, ?)", self.tree.size + 1, data)
        self._execute("COMMIT")
        self.tree.append(leaf_hash(data))

    def entries(self, first: int, last: int) -> list[Entry]:
        """Return the entries from number ``first`` to ``last``, as far as there are.

        Raises:
            AuditError: one is not as it was when it was taken in; names it.
            StorageError: the file cannot be read.
        """
        with self._mutex:
            self.refresh()
            found = []
            rows = FORMAT.rows(self._database, self.path, first, min(last, self.tree.size))
            for n, (number, data) in enumerate(rows, first):
                found.append(_entry(number, n, data))
                if leaf_hash(data) != self.tree.leaf(n - 1):
                    raise AuditError(f"entry {n} of the audit log was changed since it was opened")
        return found

    def stored(
        self, *, size: int | None = None, owner: str | None = None, signers: int = 1
    ) -> list[tuple[str, bytes]]:
        """Return checkpoints and their owner's key id, the largest and the most signed first.

        Args:
            size: only those of so many entries.
            owner: only those under the key of this id.
            signers: only those that so many keys or more have signed.
        """
        query = (
            "SELECT owner, checkpoint FROM checkpoints WHERE size = coalesce(?, size) "
            "AND owner = coalesce(?, owner) AND signers >= ? "
            "ORDER BY size DESC, signers DESC, sequence DESC"
        )
        with self._mutex:
            return self._execute(query, size, owner, signers)

    def store(self, head: Head, owner: str, document: bytes) -> None:
        """Write a checkpoint; call it within ``alone``. It is on the disk when this returns."""
        self._execute(
            "INSERT INTO checkpoints SELECT coalesce(max(sequence), 0) + 1, ?, ?, ?, ?, ? "
            "FROM checkpoints",
            *(head.size, head.root, owner, len(key_ids(document)), document),
        )
        self._execute("COMMIT")

    def _load(self) -> None:
        self._execute("BEGIN")  # entries and checkpoints of one moment
        try:
            rows = FORMAT.rows(self._database, self.path, 1)
            for n, (number, data) in enumerate(rows, 1):
                if number != n or not isinstance(data, bytes):
                    _entry(number, n, data)
                self.tree.append(leaf_hash(data))
            covered = self._check_checkpoints(rows)
        finally:
            self._roll_back()
        for number, data in [*rows[:1], *rows[covered:]]:
            _entry(number, number, data)
        opened = _entry(1, 1, rows[0][1] if rows else b"")
        if opened.event != "log_opened":
            raise AuditError("entry 1 of the audit log does not say whose log it is")
        self.alliance, self.log = opened.facts["alliance"], opened.facts["log"]

    def _check_checkpoints(self, rows: list[tuple[int, Any]]) -> int:
        """Return the size of the last checkpoint; all of them must be of these entries."""
        query, good = "SELECT DISTINCT size, root FROM checkpoints ORDER BY size", 0
        for size, root in self._execute(query):
            if size > self.tree.size:
                raise AuditError(
                    f"entry {self.tree.size + 1} of the audit log is missing, it has a checkpoint "
                    f"of {size}: its end was cut off"
                )
            if self.tree.root(size).hex() != root:
                for number, data in rows[good:size]:
                    _entry(number, number, data)  # names the one, if it is not even an entry
                raise AuditError(
                    f"entry {good + 1} of the audit log, or one from there to {size}, was changed: "
                    "they are not those that a checkpoint was made of"
                )
            good = size
        return good

    def _begins(self, rows: list[tuple[int, Any]], last: int) -> bool:
        """Whether rows begin with the last entry that was taken in."""
        number, data = rows[0] if rows else (0, b"")
        if number != last or not isinstance(data, bytes):
            return False
        return leaf_hash(data) == self.tree.leaf(last - 1)

    def _roll_back(self) -> None:
        if self._database.in_transaction:
            self._execute("ROLLBACK")

    def _execute(self, statement: str, *values: Any) -> list[Any]:
        with FORMAT.storage(self.path):
            return self._database.execute(statement, values).fetchall()


def _entry(number: int, expected: int, data: Any) -> Entry:
    """Return the entry in a row, which must be the next one."""
    if number != expected:
        raise AuditError(f"entry {expected} of the audit log is missing, {number} comes after it")
    if not isinstance(data, bytes):
        raise AuditError(f"entry {number} of the audit log is not as it was written")
    return read_entry(data, number)
