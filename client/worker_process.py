"""One life of the worker: its start, its pipes, its log, its end."""

import contextlib
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, cast

from huizhen.client.trainer import Code, TrainerError

MAX_LOG_BYTES = 1 << 20  # of one life; the log of the life before is kept beside it


class WorkerProcess:
    """A running worker. A thread of its own starts it, keeps what it says, and sees it end.

    The kernel takes the thread that starts a process for its parent: were that a short-lived one,
    the worker would be killed as soon as the thread ends, not the agent.

    Attributes:
        commands: what the worker reads.
        answers: what it writes.
        ended: set when it is dead and both are closed.
    """

    commands: IO[bytes]
    answers: IO[bytes]

    def __init__(self, line: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        """Start a worker.

        Args:
            line: the command line.
            variables: its whole environment.
            log: where the worker's own words go.

        Raises:
            TrainerError: there is no such program.
        """
        self._line, self._variables, self._log = line, variables, log
        self._process: subprocess.Popen[bytes] | None = None
        self._error: OSError | None = None
        self._started, self.ended = threading.Event(), threading.Event()
        threading.Thread(target=self._keep, name="worker-keeper", daemon=True).start()
        self._started.wait()
        if self._error is not None:
            raise TrainerError(Code.CRASHED) from self._error

    @property
    def pid(self) -> int:
        """The process's number; of bubblewrap where it runs behind it."""
        return 0 if self._process is None else self._process.pid

    def kill(self) -> None:
        """Kill it, from any thread; nothing happens if it is dead."""
        if self._process is not None:
            self._process.kill()

    def _keep(self) -> None:
        try:
            process = subprocess.Popen(  # noqa: S603  # our own command
                self._line,
                env=self._variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            self._error = error
            self._started.set()
            return
        self.commands, self.answers = (cast(IO[bytes], p) for p in (process.stdin, process.stdout))
        words = cast(IO[bytes], process.stderr)
        self._process = process
        self._started.set()
        self._keep_words(words)
        process.wait()
        for pipe in (self.commands, self.answers, words):
            with contextlib.suppress(OSError):  # what was still to be sent has nobody to read it
                pipe.close()
        self.ended.set()

    def _keep_words(self, words: IO[bytes]) -> None:
        """Write what the process says into the log, up to a limit, until it ends."""
        left = MAX_LOG_BYTES
        with contextlib.ExitStack() as files:
            log: IO[bytes] | None = None
            while part := os.read(words.fileno(), 1 << 16):
                with contextlib.suppress(OSError):  # a full disk must not keep the process waiting
                    log = log or files.enter_context(_new_log(self._log))
                    log.write(part[:left])
                    left -= len(part[:left])


def _new_log(path: Path) -> IO[bytes]:
    """Return an empty log for its owner alone; the one before is kept beside it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists():
        path.replace(path.with_name(f"{path.name}.1"))
    place = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    return os.fdopen(place, "wb", buffering=0)
