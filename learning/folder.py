"""What may lie in a base model's folder, its digests, and how a folder enters the cache.

Read are safetensors, JSON, text, sentencepiece and chat template files at the top level, and
what a conversion came from under ``source/`` (a GGUF, and its terms). Anything that runs code when
it is loaded (Python, pickles and their kin) is refused wherever it lies, and so is an
``adapter_config.json``, which would make transformers load a second model, and a link that
leaves the folder.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huizhen.protocol.errors import ConfigError, StorageError
from huizhen.storage.files import sync

MANIFEST = "manifest.json"
READ_SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja"})
REFUSED_SUFFIXES = frozenset(
    [
        ".py",
        ".pyc",
        ".so",
        ".bin",
        ".pkl",
        ".pickle",
        ".dill",
        ".joblib",
        ".pt",
        ".pth",
        ".ckpt",
        ".h5",
        ".hdf5",
        ".keras",
        ".msgpack",
        ".npy",
        ".npz",
    ]
)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hex.

    Raises:
        StorageError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror}), a file expected") from error


def check(folder: Path) -> None:
    """Refuse a folder that is not a plain full-precision model.

    Raises:
        ConfigError: no or a quantised ``config.json``, no weights, a file that may run code, or
            a link that leaves the folder.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json, a folder with config.json is expected")
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise ConfigError(
                f"{name} in {folder} is a link that leaves the folder, files are expected: "
                f"copy the folder with cp -rL"
            )
        if path.suffix.lower() in REFUSED_SUFFIXES:
            raise ConfigError(
                f"{name} in {folder} may run code when it is loaded, safetensors or GGUF expected: "
                f"remove it, or convert it where it was made"
            )
        if path.name == "adapter_config.json":
            raise ConfigError(
                f"{name} in {folder} makes it an adapter, a base model expected: merge it first"
            )
    if "quantization_config" in _json(folder / "config.json"):
        raise ConfigError(
            f"config.json in {folder} has quantization_config, full-precision weights expected"
        )
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{folder} has no *.safetensors, weights in safetensors are expected")


def digests(folder: Path) -> dict[str, str]:
    """Return relative path -> SHA-256 of every file that is read."""
    return {path: digest(folder / path) for path in _read_files(folder)}


def study_digests(found: Mapping[str, str]) -> dict[str, str]:
    """Return the part of ``digests`` that a study records: the same at every hospital.

    For a model that came as files, all of them. For a converted GGUF: its ``source/``, and what
    the conversion must give whatever the versions of the libraries (weights, token ids, chat
    template). Its ``config.json`` names the version of transformers that wrote it, so it is
    checked against the cache's manifest only.
    """
    if not any(path.startswith("source/") for path in found):
        return dict(found)
    pinned = ("source/", "tokenizer.json", "chat_template.jinja")
    return {
        path: value
        for path, value in found.items()
        if path.startswith(pinned) or path.endswith(".safetensors")
    }


def differences(folder: Path, expected: Mapping[str, str], where: str) -> list[str]:
    """Return what differs from ``expected``, one line per file: lost, added or changed."""
    present = set(_read_files(folder))
    present |= {  # what is never read must not lie there either
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in REFUSED_SUFFIXES
    }
    lines = [f"{path} is missing, {where} lists it" for path in sorted(set(expected) - present)]
    lines += [f"{path} is there, {where} lists no such file" for path in present - set(expected)]
    for path in sorted(present & set(expected)):
        found = digest(folder / path)
        if found != expected[path]:
            lines.append(f"{path} has SHA-256 {found}, {where} says {expected[path]}")
    return lines


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what was recorded when the folder entered the cache.

    Raises:
        StorageError: it is missing or not what was written.
    """
    manifest = _json(folder / MANIFEST)
    kinds = {"schema": int, "name": str, "source": str, "licence": str, "files": dict}
    if any(not isinstance(manifest.get(key), kind) for key, kind in kinds.items()):
        raise StorageError(f"{folder / MANIFEST} is damaged, schema 1 expected: delete {folder}")
    return manifest


def write_manifest(folder: Path, **facts: Any) -> None:
    """Record the digests of a new folder, and ``facts`` about where it comes from."""
    document = {"schema": 1, **facts, "files": digests(folder)}
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def publish(made: Path, final: Path) -> bool:
    """Move a finished folder into its place; ``False`` if another process was first.

    Everything is on the disk before the rename, so a folder that is in its place is whole.
    """
    for path in [*made.rglob("*"), made]:
        sync(path)
    try:
        made.rename(final)
    except OSError:
        if final.is_dir():
            return False
        raise
    sync(final.parent)
    return True


def _read_files(folder: Path) -> list[str]:
    found = [p for p in folder.iterdir() if p.suffix in READ_SUFFIXES and p.name != MANIFEST]
    found += folder.glob("source/*")
    found += folder.glob("additional_chat_templates/*.jinja")
    return sorted(p.relative_to(folder).as_posix() for p in found if p.is_file())


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read ({error}), a JSON object expected") from error
    if not isinstance(document, dict):
        raise StorageError(f"{path} is not an object, a JSON object expected")
    return document
