"""A party's audit log on disk: an entry is there before what it tells of can be seen outside.

``append`` returns when the entry is on the disk (write-ahead log, synchronous FULL), and raises
StorageError when it cannot get there: the caller then lets nothing leave. Several processes and
threads may append; each takes in what the others have written, and one at a time writes.

The file guards itself against accidents by triggers, and its own signed checkpoints say what the
entries under them were. Against a restored copy, a cut-off end or a rewritten file it needs a head
that somebody else has seen. ``protocol/audit.py`` says what an entry is.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from huizhen.protocol.audit import Entry, make_entry
from huizhen.protocol.audit_checkpoints import (
    check_head,
    claimed_checkpoint,
    key_ids,
    same_statement,
    with_signatures,
)
from huizhen.protocol.documents import PublicKey, public_of, verify
from huizhen.protocol.errors import AuditError, ProtocolError
from huizhen.protocol.statements import Checkpoint, Head, stamp
from huizhen.storage.append_only import MAX_ROW
from huizhen.storage.audit_file import FORMAT, AuditFile

Clock = Callable[[], datetime]


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Witnessed:
    """A checkpoint that others have signed."""

    head: Head
    witnesses: tuple[str, ...]
    # ids of their keys
    document: bytes


class AuditLog:
    """One party's log, open. ``with`` lets go of the file at the end."""

    def __init__(self, file: AuditFile, *, clock: Clock) -> None:
        """Take an open file; ``create`` and ``open`` are for everybody else."""
        self._file, self._clock = file, clock

    @classmethod
    def create(cls, path: Path, *, alliance: str, log: str, clock: Clock = _now) -> "AuditLog":
        """Make a party's log, whose first entry says whose it is, and open it.

        Args:
            path: the file, which must not exist; its folder is made for its owner alone.
            alliance: the alliance's name.
            log: the party's name: a site's, or ``coordinator``.
            clock: gives the present time, with a zone.

        Raises:
            ConfigError: the file exists, or others may enter its folder.
            StorageError: it cannot be written.
            ValueError: a name is none.
        """
        facts = {"alliance": alliance, "log": log}
        FORMAT.create(path, make_entry("log_opened", facts, sequence=1, now=clock()).canonical())
        return cls.open(path, clock=clock)

    @classmethod
    def open(cls, path: Path, *, witnessed: Head | None = None, clock: Clock = _now) -> "AuditLog":
        """Open a log after hashing all entries and comparing them with its checkpoints.

        Args:
            path: the file.
            witnessed: a head that somebody else has seen, which the log must have had.
            clock: gives the present time, with a zone.

        Raises:
            ConfigError: there is no log, a newer version wrote it, or others may read it.
            AuditError: an entry was changed, this is an older copy, or another log than was seen.
            StorageError: the file is damaged or cannot be read.
        """
        file = AuditFile(path)
        try:
            if witnessed is not None:
                check_head(file.tree, witnessed)
        except BaseException:
            file.shut()
            raise
        return cls(file, clock=clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shut()

    @property
    def alliance(self) -> str:
        """The alliance's name, as the first entry has it."""
        return self._file.alliance

    @property
    def log(self) -> str:
        """The name of the party whose log it is, as the first entry has it."""
        return self._file.log

    def shut(self) -> None:
        """Let go of the file."""
        self._file.shut()

    def append(self, event: str, /, **facts: Any) -> Entry:
        """Log what is about to happen, and return the entry; it is on the disk when this returns.

        Args:
            event: one of ``protocol.audit.EVENTS``.
            facts: exactly those that the event has.

        Raises:
            StorageError: the disk is full or read-only, or another process holds the file: nothing
                was logged, so nothing may leave.
            AuditError: the file is no longer the log that was opened.
            ValueError: no such event, or other facts than it has.
        """
        with self._file.alone():
            number = self._file.tree.size + 1
            entry = make_entry(event, facts, sequence=number, now=self._clock())
            self._file.add(entry.canonical())
        return entry

    def head(self) -> Head:
        """Return the size and root of the log as it is now."""
        self._file.refresh()
        return self._head()

    def root(self, size: int) -> str:
        """Return the root of the log's first ``size`` entries, in hex.

        Raises:
            ValueError: the log was never of that size.
        """
        self._file.refresh()
        return self._file.tree.root(size).hex()

    def proof(self, earlier: int, size: int | None = None) -> list[bytes]:
        """Return the proof that the log of ``size`` entries, all if None, extends its first ones.

        Raises:
            ValueError: the log was never of these sizes.
        """
        self._file.refresh()
        return self._file.tree.consistency(earlier, size)

    def inclusion(self, sequence: int, size: int | None = None) -> list[bytes]:
        """Return the proof that entry ``sequence`` is in the log of ``size`` entries, all if None.

        Raises:
            ValueError: the log has no such entry, or was never of that size.
        """
        self._file.refresh()
        return self._file.tree.inclusion(sequence - 1, size)

    def entries(self, first: int = 1, last: int = MAX_ROW) -> list[Entry]:
        """Return the entries from number ``first`` to ``last``, as far as there are.

        Raises:
            AuditError: one is not as it was written; names it.
            StorageError: the file cannot be read.
        """
        return self._file.entries(max(1, first), last)

    def checkpoint(self, key: Ed25519PrivateKey) -> bytes:
        """Return the log's present head, signed; the stored checkpoint if nothing was added since.

        Args:
            key: the party's identity key.

        Raises:
            StorageError: it cannot be stored.
            AuditError: the file is no longer the log that was opened.
        """
        owner = public_of(key).id
        with self._file.alone():
            head = self._head()
            for _, document in self._file.stored(size=head.size, owner=owner):
                return document
            document = Checkpoint(
                alliance=self.alliance,
                log=self.log,
                size=head.size,
                root=head.root,
                issued=stamp(self._clock()),
            ).signed(key)
            self._file.store(head, owner, document)
        return document

    def countersigned(self, data: bytes, keys: Iterable[PublicKey]) -> bytes:
        """Keep witnesses' signatures of an own checkpoint, and return it with all that it has.

        A checkpoint of a head that this log had, but that is not in the file, comes back as it is.

        Args:
            data: the checkpoint as a witness sent it back.
            keys: of those whose signatures count as a witness's.

        Raises:
            WireError: the bytes are no checkpoint.
            ProtocolError: a signature is wrong, or none is of the keys.
            AuditError: this log never had such a head: it is an older copy, or another log.
            StorageError: it cannot be stored.
        """
        document = verify(data, kind=Checkpoint.kind, keys=keys)
        said = Checkpoint.of(document)
        if (said.alliance, said.log) != (self.alliance, self.log):
            raise ProtocolError(f"checkpoint is of the log of {said.log!r}, expected {self.log!r}")
        with self._file.alone():
            head = Head(size=said.size, root=said.root)
            check_head(self._file.tree, head)
            own = [one for one in self._file.stored(size=said.size) if same_statement(one[1], data)]
            if not own:
                return data
            owner, stored = own[0]
            joined = with_signatures(stored, data, document.signers)
            if joined != stored:
                self._file.store(head, owner, joined)
        return joined

    def newest(self) -> bytes | None:
        """Return the checkpoint of the largest size, with all its signatures; None before any."""
        return next((document for _, document in self._file.stored()), None)

    def witnessed(self) -> Witnessed | None:
        """Return the checkpoint of the largest size that a witness has signed; None before any."""
        for owner, document in self._file.stored(signers=2):
            said = claimed_checkpoint(document)
            others = tuple(name for name in key_ids(document) if name != owner)
            return Witnessed(Head(size=said.size, root=said.root), others, document)
        return None

    def checkpoints(self) -> list[bytes]:
        """Return all checkpoints, the largest first, each with as many signatures as it ever had.

        Raises:
            AuditError: one does not say what the log was at its size.
        """
        found: dict[tuple[int, str], bytes] = {}
        for owner, document in self._file.stored():
            found.setdefault((claimed_checkpoint(document).size, owner), document)
        self._file.refresh()
        for document in found.values():
            said = claimed_checkpoint(document)
            if (said.alliance, said.log) != (self.alliance, self.log):
                raise AuditError(f"a checkpoint in this log is of the log of {said.log!r}")
            check_head(self._file.tree, Head(size=said.size, root=said.root))
        return list(found.values())

    def _head(self) -> Head:
        return Head(size=self._file.tree.size, root=self._file.tree.root().hex())
