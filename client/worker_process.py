"""One life of the worker: its start, its pipes, its log, its end."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, cast

from huizhen.client.trainer import Code, TrainerError

MAX_LOG_BYTES = 1 << 20  # of one life; the log of the life before is kept beside it
_LOOK_SECONDS = 0.01  # between two looks whether one that says nothing more has ended


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
        self._reaping = threading.Lock()  # held where the process's number is used or given back
        self._is_reaped = False
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
        """Kill it and all that it started, from any thread; nothing happens if it is dead.

        Its group and not it alone: the walls are processes of their own, and what is behind them
        ends with them only from some point of their start on. One that is left holds the pipes.
        """
        with self._reaping:
            if self._process is not None and not self._is_reaped:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)

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
        self._reap(process)
        for pipe in (self.commands, self.answers, words):
            with contextlib.suppress(OSError):  # what was still to be sent has nobody to read it
                pipe.close()
        self.ended.set()

    def _reap(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the end; from then on its number may be another's, and is not killed."""
        while True:
            with self._reaping:
                if process.poll() is not None:
                    self._is_reaped = True
                    return
            time.sleep(_LOOK_SECONDS)

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
