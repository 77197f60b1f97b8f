"""What a run depends on besides its file: data, versions, processor, threads."""

import hashlib
import platform
import resource
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("huizhen", "torch", "transformers", "peft", "opacus", "dp-accounting", "numpy")


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def environment(threads: int | None = None) -> dict[str, str]:
    """Return what bit-exactness is promised for: versions, CPU capability and threads.

    Args:
        threads: that sites train with; this process's when None.
    """
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(threads or torch.get_num_threads()),
    }


def peak_memory_mib() -> float:
    """Return the most memory this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
