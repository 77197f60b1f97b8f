"""What this party has seen of the others' audit logs, and what it signs for them.

A witness signs a head when it has proof that the log only grew since the last head that it saw, and
writes it down before the signature leaves. So of a forked log it signs one branch at most, and who
has gone back cannot get its signature again. Two heads of one size that the owner has signed and
that differ prove a fork to anybody: both are kept, and nothing of that log is signed any more.
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from huizhen.protocol.audit_checkpoints import claimed_checkpoint, signed_by
from huizhen.protocol.documents import PublicKey, countersign, verify
from huizhen.protocol.errors import AuditError, ConfigError, ForkError, ProtocolError, WireError
from huizhen.protocol.merkle import is_extension
from huizhen.protocol.statements import Checkpoint, Head
from huizhen.storage import append_only

MAX_SEEN = 1000
# checkpoints of a log that are kept; a fork at a size before them is answered as one that is behind
_HASH_BYTES = 32


def _guard(when: str) -> str:
    return f"CREATE TRIGGER {when} BEGIN SELECT RAISE(ABORT, 'a witness forgets nothing'); END"


_FORMAT = append_only.Format(
    application=0x485A5731,  # "HZW1" in the file's header says that it is a witness's book
    schema=1,
    statements=(
        "CREATE TABLE seen (log TEXT NOT NULL, size INTEGER NOT NULL, root TEXT NOT NULL, "
        "checkpoint BLOB NOT NULL, proof BLOB NOT NULL, PRIMARY KEY (log, size)) WITHOUT ROWID",
        _guard("seen_never_changes BEFORE UPDATE ON seen"),
        _guard(
            "seen_only_grows BEFORE INSERT ON seen WHEN NEW.size <= "
            "(SELECT coalesce(max(size), 0) FROM seen WHERE log = NEW.log)"
        ),
        _guard(
            "seen_keeps_the_last BEFORE DELETE ON seen WHEN OLD.size = "
            "(SELECT max(size) FROM seen WHERE log = OLD.log)"
        ),
        "CREATE TABLE forks (log TEXT PRIMARY KEY, first BLOB NOT NULL, second BLOB NOT NULL) "
        "WITHOUT ROWID",
        _guard("forks_never_change BEFORE UPDATE ON forks"),
        _guard("forks_never_go BEFORE DELETE ON forks"),
        _guard(
            "forks_are_kept_once BEFORE INSERT ON forks "
            "WHEN EXISTS (SELECT 1 FROM forks WHERE log = NEW.log)"
        ),
        "CREATE TABLE unproven (log TEXT PRIMARY KEY, checkpoint BLOB NOT NULL) WITHOUT ROWID",
    ),
    name="witness book",
    article="a",
    broken=AuditError,
    consequence="nothing was signed",
)

Outcome: TypeAlias = Literal["signed", "behind", "unproven"]


@dataclass(frozen=True, slots=True)
class Seen:
    """A witness's answer to a checkpoint."""

    outcome: Outcome
    # behind: more was seen before; unproven: nothing shows that it continues what was seen
    document: bytes
    # countersigned: the checkpoint itself, or else the last one that was seen of the log


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a book has of one log."""

    log: str
    head: Head
    document: bytes
    # the last checkpoint, countersigned
    unproven: bytes | None
    # the last that came without a proof since then
    fork: tuple[bytes, bytes] | None


class WitnessBook:
    """A party's book of the others' logs, open. ``with`` lets go of the file at the end."""

    def __init__(self, path: Path) -> None:
        """Open the book.

        Raises:
            ConfigError: there is none, a newer version wrote it, or others may read it.
            AuditError: its tables were changed.
            StorageError: it is damaged or cannot be read.
        """
        self.path = path
        self._mutex = threading.RLock()
        self._database = _FORMAT.connect(path, threads=True)
        try:
            _FORMAT.check(self._database, path)
        except BaseException:
            self.shut()
            raise

    @classmethod
    def create(cls, path: Path) -> "WitnessBook":
        """Make an empty book and open it.

        Raises:
            ConfigError: the file exists, or others may enter its folder.
            StorageError: it cannot be written.
        """
        _FORMAT.create(path)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "WitnessBook":
        """Open the book, made if it is not there.

        Raises:
            ConfigError: a newer version wrote it, or others may read it.
            AuditError: its tables were changed.
            StorageError: it cannot be written or read.
        """
        if not path.exists():
            with contextlib.suppress(ConfigError):  # another process has just made it
                _FORMAT.create(path)
        return cls(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shut()

    def shut(self) -> None:
        """Let go of the file."""
        with self._mutex:
            self._database.close()

    def see(
        self,
        checkpoint: bytes,
        proof: Sequence[bytes],
        *,
        alliance: str,
        log: str,
        owner: Iterable[PublicKey],
        key: Ed25519PrivateKey,
    ) -> Seen:
        """Countersign a checkpoint that continues what was seen of its log, and remember it.

        Args:
            checkpoint: as its owner signed it, from whoever.
            proof: that the log grew from the last head seen here to this one; of the first
                checkpoint of a log nothing is asked.
            alliance: the own alliance's name.
            log: whose log it must be: the party that has the keys.
            owner: the keys under which that party's signature counts.
            key: this party's identity key.

        Raises:
            WireError: the bytes are no checkpoint, or the proof is none.
            ProtocolError: the owner has not signed it, or it is of another log.
            ForkError: the owner has signed two histories; both documents are kept.
            StorageError: it cannot be written down, so it is not signed.
        """
        document = verify(checkpoint, kind=Checkpoint.kind, keys=owner)
        said = Checkpoint.of(document)
        if (said.alliance, said.log) != (alliance, log) or said.size < 1:
            raise ProtocolError(
                f"checkpoint is of {said.size} entries of the log of {said.log!r} in "
                f"{said.alliance!r}, expected the log of {log!r} in {alliance!r}"
            )
        if any(len(one) != _HASH_BYTES for one in proof):
            raise WireError(f"proof is not of hashes of {_HASH_BYTES} bytes")
        with self._alone():
            shown = signed_by(checkpoint, document.signers)
            self._refuse_fork(said, shown)
            last = self._last(log)
            if last is not None and said.size <= last.head.size:
                outcome: Outcome = "signed" if said.size == last.head.size else "behind"
                return Seen(outcome, last.document)
            if last is not None and not _continues(last.head, said, proof):
                self._execute("INSERT OR REPLACE INTO unproven VALUES (?, ?)", log, shown)
                self._execute("COMMIT")
                return Seen("unproven", last.document)
            signed = countersign(shown, key)
            self._remember(said, signed, proof if last is not None else ())
        return Seen("signed", signed)

    def last(self, log: str) -> bytes | None:
        """Return the last checkpoint seen of a log, countersigned; None before any."""
        with self._mutex:
            found = self._last(log)
        return None if found is None else found.document

    def heads(self, log: str, after: int) -> list[tuple[bytes, list[bytes]]]:
        """Return how a log went on after a size, for another witness: checkpoints with proofs.

        Args:
            log: whose.
            after: the size that the other witness has seen; 0 gives the last checkpoint alone.
        """
        query = "SELECT checkpoint, proof FROM seen WHERE log = ? AND size > ? ORDER BY size"
        with self._mutex:
            rows = self._execute(query, log, after)
        if after == 0:
            return [(checkpoint, []) for checkpoint, _ in rows[-1:]]
        return [(checkpoint, _hashes(proof)) for checkpoint, proof in rows]

    def known(self) -> list[Known]:
        """Return what was seen of each log, by name."""
        with self._mutex:
            logs = [log for [log] in self._execute("SELECT DISTINCT log FROM seen ORDER BY log")]
            return [found for log in logs if (found := self._last(log)) is not None]

    def _refuse_fork(self, said: Checkpoint, document: bytes) -> None:
        """Keep two heads of one size that differ; refuse a log of which there are such."""
        query = "SELECT root, checkpoint FROM seen WHERE log = ? AND size = ?"
        for root, checkpoint in self._execute(query, said.log, said.size):
            if root != said.root and self._fork(said.log) is None:
                statement = "INSERT INTO forks VALUES (?, ?, ?)"
                self._execute(statement, said.log, checkpoint, document)
                self._execute("COMMIT")
        if (fork := self._fork(said.log)) is not None:
            first, second = (claimed_checkpoint(one) for one in fork)
            raise ForkError(
                f"log of {said.log!r} has forked: its owner signed {first.size} entries as "
                f"{first.root[:12]} and as {second.root[:12]}, both documents are kept",
                fork,
            )

    def _remember(self, said: Checkpoint, signed: bytes, proof: Sequence[bytes]) -> None:
        values = (said.log, said.size, said.root, signed, b"".join(proof))
        self._execute("INSERT INTO seen VALUES (?, ?, ?, ?, ?)", *values)
        self._execute(
            "DELETE FROM seen WHERE log = ? AND size NOT IN "
            "(SELECT size FROM seen WHERE log = ? ORDER BY size DESC LIMIT ?)",
            *(said.log, said.log, MAX_SEEN),
        )
        self._execute("DELETE FROM unproven WHERE log = ?", said.log)
        self._execute("COMMIT")

    def _last(self, log: str) -> Known | None:
        query = "SELECT size, root, checkpoint FROM seen WHERE log = ? ORDER BY size DESC LIMIT 1"
        for size, root, document in self._execute(query, log):
            unproven = self._execute("SELECT checkpoint FROM unproven WHERE log = ?", log)
            return Known(
                log=log,
                head=Head(size=size, root=root),
                document=document,
                unproven=unproven[0][0] if unproven else None,
                fork=self._fork(log),
            )
        return None

    def _fork(self, log: str) -> tuple[bytes, bytes] | None:
        rows = self._execute("SELECT first, second FROM forks WHERE log = ?", log)
        return (rows[0][0], rows[0][1]) if rows else None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep every other writer out until COMMIT, or until an error takes all back."""
        with self._mutex:
            self._execute("BEGIN IMMEDIATE")
            try:
                yield
            finally:
                if self._database.in_transaction:
                    self._execute("ROLLBACK")

    def _execute(self, statement: str, *values: Any) -> list[Any]:
        with _FORMAT.storage(self.path):
            return self._database.execute(statement, values).fetchall()


def _continues(last: Head, said: Checkpoint, proof: Sequence[bytes]) -> bool:
    before, after = bytes.fromhex(last.root), bytes.fromhex(said.root)
    return is_extension(last.size, before, said.size, after, proof)


def _hashes(joined: bytes) -> list[bytes]:
    return [joined[at : at + _HASH_BYTES] for at in range(0, len(joined), _HASH_BYTES)]
