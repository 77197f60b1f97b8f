"""The way out: an update becomes bytes here or not at all, and is kept until the next one.

Bytes are kept before they leave, so that asking again gives the same ones after any crash, noised
metrics too. The ledger names what may leave by its digest; what it does not name is never sent.
"""

import contextlib
import fcntl
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from huizhen.protocol.adapter import MAX_VALUE, Shapes, Tensors, shapes_of
from huizhen.protocol.errors import PrivacyError, ReleaseLostError, StorageError, WireError
from huizhen.protocol.travel import PLAIN, Travel
from huizhen.protocol.wire import Message, encode
from huizhen.storage.files import make_folder, write_whole


@dataclass(frozen=True, slots=True)
class Envelope:
    """Bytes that may leave the hospital; only this module makes one."""

    data: bytes


def send(
    *,
    study: str,
    round: int,
    site: str,
    update: Tensors,
    agreed: Shapes,
    travel: Travel = PLAIN,
    saturate: bool = False,
) -> Envelope:
    """Return an update as the bytes that leave.

    Args:
        study: the study's digest.
        round: the round that the update answers.
        site: this site's name.
        update: the tensors.
        agreed: the tensors that the study lets leave in this round.
        travel: how their numbers do.
        saturate: cut off values over what travels. Under DP: whether a release leaves must not
            depend on its values, which are noised and may be cut for free.

    Raises:
        PrivacyError: the update holds other tensors than agreed.
        WireError: a value is not finite, or larger than any sum takes.
    """
    found, wanted = shapes_of(update), {name: tuple(shape) for name, shape in agreed.items()}
    if found != wanted:
        names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        raise PrivacyError(f"update and agreement differ in tensor {names[0]!r}: nothing was sent")
    if saturate:
        update = travel.cut(update)
    message = Message(kind="update", study=study, round=round, site=site, tensors=update)
    data = encode(message, travel)
    if any((np.abs(array) > MAX_VALUE).any() for array in update.values()):
        raise WireError(f"update holds a value over {MAX_VALUE:g}, which no coordinator counts")
    return Envelope(data)


class Outbox:
    """What one ledger's site has sent last in each study, and its metrics."""

    def __init__(self, folder: Path) -> None:
        """Use a folder, which is made when something is kept."""
        self.folder = folder

    @classmethod
    def beside(cls, ledger: Path) -> "Outbox":
        """Return the outbox that belongs to a ledger's file, and to no other."""
        return cls(ledger.with_name(f"{ledger.name}.outbox"))

    def keep(self, study: str, envelope: Envelope) -> None:
        """Put an update on the disk, beside what is there.

        Raises:
            StorageError: the disk is full or read-only.
        """
        write_whole(self._place(study, hashlib.sha256(envelope.data).hexdigest()), envelope.data)

    def keep_own(self, study: str, envelope: Envelope, data: bytes) -> None:
        """Put what a strategy keeps at the site on the disk, with the update of the same round.

        Raises:
            StorageError: the disk is full or read-only.
        """
        digest = hashlib.sha256(envelope.data).hexdigest()
        whole = hashlib.sha256(data).digest() + data  # a changed byte must not steer a round
        write_whole(self._place(study, digest).with_suffix(".own"), whole)

    def own(self, study: str, digest: str) -> bytes | None:
        """Return what was kept with the update of a SHA-256; None where nothing is left of it."""
        try:
            whole = self._place(study, digest).with_suffix(".own").read_bytes()
        except OSError:
            return None
        return whole[32:] if hashlib.sha256(whole[32:]).digest() == whole[:32] else None

    def kept(self, study: str, digest: str) -> Envelope:
        """Return the update with a SHA-256.

        Raises:
            ReleaseLostError: it is not there, or is not what was kept.
            StorageError: the disk does not give it.
        """
        return Envelope(self._read(self._place(study, digest), digest))

    def keep_metrics(self, study: str, data: bytes) -> None:
        """Put a study's metrics on the disk.

        Raises:
            StorageError: the disk is full or read-only.
        """
        write_whole(self._metrics(study), data)

    def kept_metrics(self, study: str, digest: str) -> bytes:
        """Return the metrics of a study, which must have a SHA-256.

        Raises:
            ReleaseLostError: they are not there, or are not what was kept.
            StorageError: the disk does not give them.
        """
        return self._read(self._metrics(study), digest)

    @contextlib.contextmanager
    def alone(self, study: str) -> Iterator[None]:
        """Keep other processes from keeping and forgetting in a study meanwhile.

        Raises:
            StorageError: the folder cannot be written.
        """
        place = self.folder / study / ".lock"
        try:
            make_folder(place.parent)
            with place.open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise StorageError(f"cannot write {str(place)!r}: {error.strerror}") from error

    def forget_others(self, study: str, digest: str | None) -> None:
        """Remove all updates of a study but one, and what killed processes left; inside ``alone``.

        An earlier round is never asked again, and an update that no entry names must not stay.
        """
        for place in (self.folder / study).glob("*"):
            is_of_round = place.suffix in (".update", ".own") or place.name.startswith(".")
            if is_of_round and place.name not in (".lock", f"{digest}.update", f"{digest}.own"):
                place.unlink(missing_ok=True)

    def _read(self, place: Path, digest: str) -> bytes:
        try:
            data = place.read_bytes()
        except FileNotFoundError as error:
            raise ReleaseLostError(
                f"{str(place)!r}, which was to be sent, is lost: "
                "nothing else may be sent in its place"
            ) from error
        except OSError as error:
            raise StorageError(
                f"{str(place)!r}, which was to be sent, cannot be read: {error.strerror}"
            ) from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise ReleaseLostError(f"{str(place)!r} was changed: nothing was sent")
        return data

    def _place(self, study: str, digest: str) -> Path:
        return self.folder / study / f"{digest}.update"

    def _metrics(self, study: str) -> Path:
        return self.folder / study / "metrics.json"
