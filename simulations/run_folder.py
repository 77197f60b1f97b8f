"""A run folder: what a simulation has done so far, safe against being killed at any moment.

    run.json                 whose folder this is: the run digest and all that it covers
    state/<unit>.safetensors the last closed round of each unit of work, tensors and history in one
    file results.json, …          what people read, written at the end

Every file is written beside its place, synced and renamed: a reader sees the old bytes or the new.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import rfc8785
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from huizhen.protocol.adapter import Tensors, in_order
from huizhen.protocol.errors import ConfigError, StorageError
from huizhen.storage.files import write_whole
from huizhen.strategies.base import StrategyState
from huizhen.strategies.stored import state_of, tensors_of

SCHEMA = 1
_SHOWN = 3  # differences that an error names
_MAX_NAME = 100  # bytes; a file system allows 255, and a unit's name has more in it than the site
_LEFT = re.compile(r"\..+\.(?:json|html|md|safetensors)\.(\d+)")  # what write_whole begins with


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state after the last closed round of one unit of work."""

    round: int
    # the round to do next
    strategy: StrategyState
    history: list[dict[str, Any]]
    kept: tuple[Tensors, ...] = ()
    # what each site keeps for itself, in the study's order; empty where it is in their outboxes


class RunFolder:
    """An out folder, locked while it is used."""

    def __init__(self, path: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
        """Open or make the folder of one run; a claim under which nothing was run is none.

        What killed processes were writing is removed.

        Args:
            path: the folder.
            identity: everything that changes the results: study, data, versions.
            resume: go on with what is there.

        Raises:
            ConfigError: the folder belongs to another run, holds one and ``resume`` is not set, or
                is in use.
            StorageError: it cannot be written.
        """
        self.path = path
        self.digest = hashlib.sha256(rfc8785.dumps(dict(identity))).hexdigest()
        with _storage(path):
            path.mkdir(parents=True, exist_ok=True)
            (path / "state").mkdir(exist_ok=True)
            self._lock = (path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ConfigError(f"{str(path)!r} is in use by another process: wait for it") from error
        try:
            self._claim(dict(identity), resume)
            with _storage(path):
                self._remove_left()
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.close()

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file for people and programs."""
        text = json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
        self.write(name, text.encode())

    def write(self, name: str, data: bytes) -> None:
        """Write a file so that it is whole or absent.

        Raises:
            StorageError: the disk is full or read-only.
        """
        write_whole(self.path / name, data)

    def save(self, unit: str, checkpoint: Checkpoint) -> None:
        """Store the state of a unit of work after a closed round."""
        notes = {"round": checkpoint.round, "history": checkpoint.history, "schema": SCHEMA}
        metadata = {"notes": json.dumps(notes, allow_nan=False)}
        tensors = tensors_of(checkpoint.strategy)
        for i, kept in enumerate(checkpoint.kept):
            tensors |= {f"k/{i}/{name}": array for name, array in in_order(kept).items()}
        self.write(f"state/{unit}.safetensors", save(tensors, metadata=metadata))

    def restore(self, unit: str) -> Checkpoint | None:
        """Return the state of a unit of work, or None if no round of it is closed.

        Raises:
            StorageError: the file is damaged.
        """
        path = self.path / "state" / f"{unit}.safetensors"
        try:
            if not path.exists():
                return None
            with safe_open(path, framework="numpy") as file:
                notes = json.loads(file.metadata()["notes"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
            round, history = int(notes["round"]), list(notes["history"])
            kept: dict[int, dict[str, Any]] = {}
            for name in [name for name in tensors if name.startswith("k/")]:
                _, i, rest = name.split("/", 2)
                kept.setdefault(int(i), {})[rest] = tensors.pop(name)
            own = tuple(kept[i] for i in range(len(kept)))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{str(path)!r} is damaged: remove it and ledgers/{unit}, if there is one, to do "
                "its part again"
            ) from error
        return Checkpoint(round, state_of(tensors), history, own)

    def _claim(self, identity: dict[str, Any], resume: bool) -> None:
        path = self.path / "run.json"
        claim = {"schema": SCHEMA, "digest": self.digest, "covers": identity}
        if not path.exists():
            self.write_json("run.json", claim)
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            digest, covers = found["digest"], dict(found["covers"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{str(path)!r} is damaged: choose another folder") from error
        if not self._has_begun():
            self.write_json("run.json", claim)
        elif digest != self.digest:
            differs = _differences(covers, identity)
            advice = "choose another --out"
            if len(differs) == 1 and differs[0].startswith("environment threads "):
                advice = f"use --threads {covers['environment']['threads']}, or {advice}"
            if len(differs) > _SHOWN:
                differs = [*differs[:_SHOWN], f"{len(differs) - _SHOWN} more"]
            raise ConfigError(
                f"{str(self.path)!r} belongs to another run (other {', '.join(differs)}): {advice}"
            )
        elif not resume:
            raise ConfigError(
                f"{str(self.path)!r} already holds this run: add --resume to go on with it, "
                "or choose another --out"
            )

    def _has_begun(self) -> bool:
        """Whether anything was trained, charged or written under the folder's claim."""
        states = (one for one in (self.path / "state").iterdir() if one.name[0] != ".")
        done = (self.path / "ledgers", self.path / "results.json")
        return any(states) or any(one.exists() for one in done)

    def _remove_left(self) -> None:
        """Remove what killed processes were writing; the lock says that state/ is ours alone."""
        for one in (self.path / "state").glob(".*"):
            if one.is_file():
                one.unlink()
        for folder in (self.path, self.path / "federated", self.path / "federated_dp"):
            for one in folder.glob(".*"):
                match = _LEFT.fullmatch(one.name)
                if match and not _is_running(int(match[1])):
                    one.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], above: str = "") -> list[str]:
    """Return the names of what differs, with both values where they are short."""
    names = []
    for key in {**wanted, **found}:
        value, other = wanted.get(key), found.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            names += _differences(other, value, f"{above}{key} ")
        elif value != other:
            short = len(f"{value}{other}") < 40
            names.append(f"{above}{key} {other!r}, now {value!r}" if short else f"{above}{key}")
    return names


def safe_name(name: str) -> str:
    """Return a site's name as a part of a file's name, different for different names.

    Six hex digits follow a % in a name that is written out; in one that is cut a - does.
    """
    whole = "".join(
        c if c.isascii() and (c.isalnum() or c in "-_") else f"%{ord(c):06x}" for c in name
    )
    if len(whole) <= _MAX_NAME:
        return whole
    end = f"%-{hashlib.sha256(whole.encode()).hexdigest()[:16]}"
    return whole[: _MAX_NAME - len(end)] + end


def tensors_digest(tensors: Tensors) -> str:
    """Return the SHA-256 of an adapter's canonical bytes: names, shapes and values."""
    return hashlib.sha256(save(dict(in_order(tensors)))).hexdigest()


@contextlib.contextmanager
def _storage(path: Path) -> Any:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
