"""Snapshots: what a study trains on, fixed, named by its content and encrypted at rest.

A snapshot is one Parquet file (``clean.SCHEMA``) sealed under the site's key
(``storage/sealed.py``), beside a manifest. Its digest is of the records and of the terms that they
were made by, so the same export under the same terms and key has the same digest, whatever wrote
the Parquet:

    digest = SHA-256( canonical JSON of the terms' digests · one canonical line for each record )
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import polars as pl
from polars.io.plugins import register_io_source

from huizhen.client.clean import SCHEMA, CleanRecord, from_rows
from huizhen.protocol.errors import ConfigError, DamagedError, StorageError
from huizhen.storage.files import write_whole
from huizhen.storage.sealed import SealedWriter, read_sealed

SCHEMA_VERSION = 1
BATCH = 2048
# records that are held at a time while a snapshot is written
_CURRENT = "current.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What is known of a snapshot without opening it."""

    schema: int = SCHEMA_VERSION
    digest: str
    made_by: Mapping[str, str]
    # name -> digest of what the records were made by: data.toml, the table of labs, the rules
    records: int
    held_out: int
    # records of them that are never trained on
    patients: int
    file: str
    # SHA-256 of the sealed file: an older one in its place is found


class Snapshots:
    """A cohort's snapshots in one folder; the last one that was made is the one in use."""

    def __init__(self, folder: Path, key: bytes, *, cohort: str) -> None:
        """Use a folder.

        Args:
            folder: of this cohort alone.
            key: 32 bytes, secret of the site.
            cohort: whose patients these are.
        """
        self._folder, self._key = folder, key
        self._purpose = b"huizhen snapshot " + cohort.encode()

    def write(self, records: Iterable[CleanRecord], made_by: Mapping[str, str]) -> Manifest:
        """Write a snapshot, make it the one in use, and remove the others.

        Args:
            records: in the order of the export; they are held in batches.
            made_by: name -> digest of what they were made by.

        Raises:
            HuizhenError: what ``records`` raises; the old snapshot stays.
            StorageError: the disk is full or read-only.
        """
        for left in self._folder.glob(".draft.*"):  # by a process that was killed
            left.unlink(missing_ok=True)
        counted = _Counted(made_by)
        draft = self._folder / "draft"
        with SealedWriter(draft, self._key, purpose=self._purpose) as file:
            counted.sink(records, file)
        manifest = counted.manifest(_digest_of(draft))
        place = self._place(manifest.digest)
        try:
            draft.replace(place)
        except OSError as error:
            raise StorageError(f"cannot write {str(place)!r}: {error.strerror}") from error
        write_whole(self._folder / _CURRENT, json.dumps(asdict(manifest), indent=2).encode())
        for other in self._folder.glob("*.sealed"):
            if other != place:
                other.unlink(missing_ok=True)
        return manifest

    def current(self) -> Manifest | None:
        """Return the manifest of the snapshot in use, None where none was made.

        Raises:
            StorageError: it cannot be read.
        """
        path = self._folder / _CURRENT
        try:
            return Manifest(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise DamagedError(f"{str(path)!r} is damaged: make the snapshot anew") from error
        except OSError as error:
            raise StorageError(f"cannot read {str(path)!r}: {error.strerror}") from error

    def parquet(self) -> bytes:
        """Return the Parquet bytes of the snapshot in use.

        Raises:
            ConfigError: none was made.
            DamagedError: it was changed, or sealed with another key.
            StorageError: it cannot be read.
        """
        manifest = self.current()
        if manifest is None:
            raise ConfigError(f"{str(self._folder)!r} holds no snapshot: make one first")
        place = self._place(manifest.digest)
        if _digest_of(place) != manifest.file:
            raise DamagedError(f"{str(place)!r} is another file than was made: make it anew")
        return b"".join(read_sealed(place, self._key, purpose=self._purpose))

    def _place(self, digest: str) -> Path:
        return self._folder / f"{digest}.sealed"


def read_parquet(data: bytes) -> Iterator[CleanRecord]:
    """Yield the records of a snapshot's Parquet bytes.

    Raises:
        DamagedError: they are none of a snapshot.
    """
    try:
        frame = pl.read_parquet(io.BytesIO(data))
        if dict(frame.schema) != dict(SCHEMA):
            raise DamagedError("snapshot has other columns than this version's: make it anew")
        for batch in frame.iter_slices(BATCH):
            yield from from_rows(batch.to_dicts())
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DamagedError("snapshot is no Parquet file: make it anew") from error


def _digest_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"cannot read {str(path)!r}: {error.strerror}") from error


class _Counted:
    """Counts and digests records while they are written."""

    def __init__(self, made_by: Mapping[str, str]) -> None:
        self._made_by = dict(sorted(made_by.items()))
        self._hash = hashlib.sha256(json.dumps(self._made_by).encode() + b"\n")
        self._patients: set[str] = set()
        self._records = self._held_out = 0
        self._error: BaseException | None = None

    def sink(self, records: Iterable[CleanRecord], file: SealedWriter) -> None:
        def batches(*_: Any) -> Iterator[pl.DataFrame]:
            try:
                yield from self._batches(records)
            except BaseException as error:  # it would come out as one of the engine's own
                self._error = error
                raise

        source = register_io_source(batches, schema=dict(SCHEMA), is_pure=True)
        try:
            source.sink_parquet(
                cast(IO[bytes], _Sink(file)),
                compression="zstd",
                maintain_order=True,
                row_group_size=BATCH,
            )
        except BaseException:
            if self._error is not None:
                raise self._error from None
            raise

    def _batches(self, records: Iterable[CleanRecord]) -> Iterator[pl.DataFrame]:
        rows: list[dict[str, Any]] = []
        for record in records:
            self._hash.update(record.canonical())
            self._patients.add(record.patient)
            self._records += 1
            self._held_out += record.is_held_out
            rows.append(record.row())
            if len(rows) == BATCH:
                yield pl.DataFrame(rows, schema=dict(SCHEMA))
                rows.clear()
        yield pl.DataFrame(rows, schema=dict(SCHEMA))

    def manifest(self, file: str) -> Manifest:
        return Manifest(
            file=file,
            digest=self._hash.hexdigest(),
            made_by=self._made_by,
            records=self._records,
            held_out=self._held_out,
            patients=len(self._patients),
        )


class _Sink(io.RawIOBase):
    """A sealed file as the Parquet writer sees it."""

    def __init__(self, file: SealedWriter) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._file.write(bytes(data))
