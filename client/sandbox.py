"""The walls around the process that trains: what it can reach, and what this machine can wall off.

    full      bubblewrap: no network, no other process, and of the disk only what Python and the
              base models need, read-only; its own /tmp is in memory and ends with it
    network   a network namespace of its own (util-linux ``unshare``), the disk as it is
    none      a plain process

``probe`` tries them and says which one this machine gives, and what is then not protected. At every
level the environment is a short list, so that no secret of the agent's is inherited.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, assert_never

from huizhen.protocol.errors import ConfigError

Level = Literal["full", "network", "none"]
LEVELS: tuple[Level, ...] = ("full", "network", "none")

_PACKAGES = ("client", "learning", "protocol", "storage", "strategies")
_SYSTEM = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/alternatives", "/etc/ld.so.cache",
    "/etc/localtime", "/sys/devices/system/cpu",
)  # fmt: skip
_PASSED = ("LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "TZ")
_PROBE_SECONDS = 20.0
_FAILURES = (OSError, ValueError, subprocess.TimeoutExpired)  # no such program, or no answer of it

_NOT_PROTECTED: Mapping[Level, str] = {
    "full": "training runs without network, sees no file of this site but the records that it is "
    "given, and writes nothing but its own temporary folder",
    "network": "training runs without network, but bubblewrap does not work here: the process that "
    "trains can read and write whatever this user can, the ledger, the keys and the audit log too",
    "none": "training is not walled off here, neither bubblewrap nor a network namespace works: "
    "the process that trains can use the network, and can read and write whatever this user can, "
    "the ledger, the keys and the audit log too",
}

# Run inside the walls: whether the network is another one, and a file outside cannot be seen.
_PROBE = (
    "import json, os, sys;"
    "print(json.dumps([os.readlink('/proc/self/ns/net'), os.path.exists(sys.argv[1])]))"
)


@dataclass(frozen=True, slots=True)
class Walls:
    """What walls there are, and a sentence for people about what is not protected."""

    level: Level
    sentence: str


def command(level: Level, program: Sequence[str], *, readable: Iterable[Path]) -> list[str]:
    """Return the command line that runs a program behind walls.

    Args:
        level: as ``probe`` found it.
        program: the program and its arguments.
        readable: files and folders that it may read, at level ``full``; what is not there is left
            out.
    """
    match level:
        case "full":
            return [*_bubblewrap(readable), "--", *program]
        case "network":
            return ["unshare", "--net", "--user", "--map-root-user", "--", *program]
        case "none":
            return list(program)
        case _:
            assert_never(level)


def environment(threads: int) -> dict[str, str]:
    """Return all that the process finds in its environment.

    Args:
        threads: of the numerical libraries.
    """
    passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
    return passed | {
        "HF_HUB_OFFLINE": "1",
        "HOME": "/tmp",  # noqa: S108  # never the user's own
        "MKL_NUM_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "PATH": "/usr/bin:/bin",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_OFFLINE": "1",
    }


def python_folders() -> list[Path]:
    """Return what this Python needs to import the worker: its own folders and the packages'."""
    found = [Path(sys.prefix), Path(sys.base_prefix)]
    for name in _PACKAGES:
        spec = importlib.util.find_spec(f"huizhen.{name}")
        if spec is not None and spec.submodule_search_locations:
            found += [Path(place) for place in spec.submodule_search_locations]
    return _outermost(found)


def check_hidden(readable: Iterable[Path], hidden: Iterable[Path]) -> None:
    """Refuse walls that would show what they must hide.

    Args:
        readable: as for ``command``.
        hidden: files and folders of the site: ledger, keys, audit log, other cohorts' data.

    Raises:
        ConfigError: a hidden place lies inside a readable one.
    """
    shown = [Path(os.path.realpath(place)) for place in (*map(Path, _SYSTEM), *readable)]
    for secret in hidden:
        place = Path(os.path.realpath(secret))
        for folder in shown:
            if place.is_relative_to(folder):
                raise ConfigError(
                    f"{str(secret)!r} lies in {str(folder)!r}, which the process that trains may "
                    "read: move it elsewhere"
                )


def probe() -> Walls:
    """Return the best level that this machine gives, after trying it."""
    for level in LEVELS[:-1]:
        if _holds(level):
            return Walls(level, _NOT_PROTECTED[level])
    return Walls("none", _NOT_PROTECTED["none"])


def _bubblewrap(readable: Iterable[Path]) -> list[str]:
    """Return bubblewrap with its options.

    The order counts: mounts cover what was there, and are made read-only after the last one. A
    process of root writes kernel settings in /proc without any capability, so /proc is too.
    Without ``--new-session``: who starts it does so in a session of its own, and kills that whole.
    """
    line = ["bwrap", "--unshare-all", "--die-with-parent", "--cap-drop", "ALL"]
    line += ["--tmpfs", "/tmp", "--proc", "/proc", "--dev", "/dev"]  # noqa: S108  # in memory
    for place in (*_SYSTEM, *map(str, readable)):
        line += ["--ro-bind-try", place, place]
    for place in ("/proc", "/dev", "/"):
        line += ["--remount-ro", place]
    return [*line, "--chdir", "/tmp"]  # noqa: S108


def _outermost(places: Sequence[Path]) -> list[Path]:
    """Return the places without those inside another."""
    every = list(dict.fromkeys(places))
    return [one for one in every if not any(other in one.parents for other in every)]


def _holds(level: Level) -> bool:
    """Whether a level's walls stand on this machine."""
    with tempfile.NamedTemporaryFile() as outside, contextlib.suppress(*_FAILURES):
        program = [sys.executable, "-I", "-S", "-c", _PROBE, outside.name]
        done = subprocess.run(  # noqa: S603  # our own command
            command(level, program, readable=python_folders()),
            env=environment(1),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PROBE_SECONDS,
            check=False,
        )
        network, is_visible = json.loads(done.stdout)
        has_own_network = network != str(Path("/proc/self/ns/net").readlink())
        return has_own_network and (level != "full" or not is_visible)
    return False
