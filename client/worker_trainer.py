"""The agent's side of a site's training: a worker process behind walls, kept warm over rounds.

The process is started at the first call and again at the first call after it died; between rounds
it waits with the base model loaded. It is told the records through its pipe and can send back only
what is checked here: facts, one update in the wire format, noised metrics, or a code.
"""

import contextlib
import hashlib
import logging
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from huizhen.client.frames import CohortRecords, Frame, Start, read_frame, write_frame
from huizhen.client.sandbox import Walls, check_hidden, command, environment, probe, python_folders
from huizhen.client.trainer import (
    Code,
    Trained,
    TrainerError,
    TrainerFacts,
    TrainingReport,
    kept_bytes,
)
from huizhen.client.worker_process import WorkerProcess
from huizhen.protocol.adapter import Tensors
from huizhen.protocol.errors import ConfigError, PrivacyError, WireError
from huizhen.protocol.metrics import MAX_BYTES as MAX_METRICS_BYTES
from huizhen.protocol.strict import build
from huizhen.protocol.study import Study
from huizhen.protocol.wire import Message, decode, max_bytes
from huizhen.strategies.base import Strategy
from huizhen.strategies.catalogue import make_strategy

PING_SECONDS = 60.0
# until a warm worker that does not answer is taken for hung: it has nothing else to do
MAX_WORK_SECONDS = 24 * 3600.0
# of a start, a round or the metrics; what takes longer is hung
_END_SECONDS = 1.0

_log = logging.getLogger(__name__)


class WorkerTrainer:
    """Trains one site's part of one study in a process of its own. One thread calls at a time.

    Only ``stop`` may be called from any thread at any moment. ``with`` ends the process.
    """

    def __init__(
        self,
        study: Study,
        start: Start,
        records: Callable[[], CohortRecords],
        *,
        log: Path,
        hidden: Iterable[Path],
        walls: Walls | None = None,
    ) -> None:
        """Prepare; nothing is started.

        Args:
            study: what was agreed.
            start: what the process is told beside it.
            records: gives the cohort's records, the same each time; they are not kept here.
            log: where the process's own words go, for the site alone.
            hidden: what the process must not see: ledger, keys, audit log, other cohorts' data.
            walls: from ``probe``, which is asked now if they are not given.

        Raises:
            ConfigError: a hidden place lies in a folder that the process reads, or the study names
                an unknown strategy.
        """
        self.study, self.walls = study, walls or probe()
        self._start, self._records, self._log = start, records, log
        self._digest = study.digest()
        self._strategy: Strategy = make_strategy(study)
        self._readable = [*python_folders(), Path(start.home) / "bases"]
        if start.base is not None and Path(start.base).is_absolute():
            self._readable.append(Path(start.base))
        check_hidden(self._readable, [log, *hidden])
        self._facts: TrainerFacts | None = None
        self._trained_on: tuple[str | None, ...] | None = None
        self._changing = threading.Lock()  # of the two below
        self._is_stopped = False
        self._process: WorkerProcess | None = None
        self._is_warm = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def ready(self) -> TrainerFacts:
        """Return the facts once the process has loaded base and records, and answers.

        Raises:
            PrivacyError: the records are others than before.
            TrainerError: the process cannot train, or was stopped.
        """
        if self._is_warm and self._facts is not None:
            with contextlib.suppress(TrainerError):  # a dead one is started again below
                self._ask({"command": "ping"}, seconds=PING_SECONDS)
                return self._facts
        records = self._records()
        digests = _digests(records)
        if self._trained_on not in (None, digests):
            raise PrivacyError(
                f"records of site {self._start.site!r} are others than before, a study is trained "
                "on the same ones from its first round to its last: join again"
            )
        self._begin()
        payloads = [self.study.canonical(), records.train]
        payloads += [] if records.held_out is None else [records.held_out]
        answer = self._ask({"command": "start", "start": asdict(self._start)}, *payloads)
        with self._refusing():
            facts = self._check_facts(build(TrainerFacts, answer.header["facts"], "facts"))
        self._facts, self._trained_on, self._is_warm = facts, digests, True
        return facts

    def train(self, announcement: bytes, round: int, kept: Tensors) -> Trained:
        """Return the update Δ of a round, what to keep, and a report for the site's own eyes.

        Raises:
            TrainerError: the process could not, or was stopped; nothing of the round is left.
        """
        shapes = self.ready().shapes
        names = self._strategy.sends(shapes, round)
        agreed = {name: shape for name, shape in shapes.items() if name in names}
        keeps, most = self._strategy.keeps(shapes), max_bytes(agreed)
        if keeps:
            most += max_bytes(keeps)
        before = []
        if kept:
            terms = {"study": self._digest, "site": self._start.site}
            before = [kept_bytes(kept, **terms, round=max(1, round - 1))]
        answer = self._ask({"command": "train", "round": round}, announcement, *before, most=most)
        with self._refusing():
            data, *rest = answer.payloads
            update = self._check("update", decode(data, shapes=agreed), round)
            after: Tensors = {}
            if keeps:
                [data] = rest
                after = self._check("kept", decode(data, shapes=keeps), round)
            elif rest:
                raise WireError("more came than an update")
            values = dict(answer.header["report"])
            if values.get("loss") is None:  # JSON has no NaN
                values["loss"] = math.nan
            report = build(TrainingReport, values, "report")
        return Trained(update, after, report)

    def metrics(self, announcement: bytes) -> bytes:
        """Return noised metrics of the final adapter, drawn anew by each call.

        Raises:
            TrainerError: the process could not, or was stopped.
        """
        self.ready()
        answer = self._ask({"command": "metrics"}, announcement, most=MAX_METRICS_BYTES)
        with self._refusing():
            [data] = answer.payloads
        return data

    def stop(self) -> None:
        """Kill the process now and start no other; a call that waits for it fails at once.

        A stopped trainer stays stopped: what is to train again is made anew.
        """
        with self._changing:
            self._is_stopped = True
            process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the process, which has a second to end by itself, and start no other."""
        process = self._process
        if process is not None:
            with (
                contextlib.suppress(OSError, ValueError),
                _killing_after(2 * _END_SECONDS, process),  # one that hangs reads nothing
            ):
                write_frame(process.commands, Frame({"command": "end"}))
                process.ended.wait(_END_SECONDS)
        self.stop()
        if process is not None:
            process.ended.wait(_END_SECONDS)

    def _begin(self) -> None:
        """Start a process, unless stopped; end the one before."""
        self._is_warm = False
        with self._changing:
            if self._process is not None:
                self._process.kill()
            if self._is_stopped:
                raise TrainerError(Code.STOPPED)
            program = [sys.executable, "-m", "huizhen.client.worker"]
            line = command(self.walls.level, program, readable=self._readable)
            self._process = WorkerProcess(line, environment(self._start.threads), self._log)
        _log.info("worker started site=%s walls=%s", self._start.site, self.walls.level)

    def _ask(
        self,
        header: Mapping[str, Any],
        *payloads: bytes,
        most: int = 0,
        seconds: float | None = None,
    ) -> Frame:
        """Send a command and return its answer, whose payloads have ``most`` bytes or fewer.

        It must be there after ``seconds``, after ``MAX_WORK_SECONDS`` if None.

        Raises:
            TrainerError: the process answers with a code, with what is no answer, or not at all or
                in time; in the last three cases it is dead then.
        """
        process = self._process
        if self._is_stopped or process is None:
            raise TrainerError(Code.STOPPED)
        answer: Frame | None = None
        try:
            with _killing_after(MAX_WORK_SECONDS if seconds is None else seconds, process):
                write_frame(process.commands, Frame(header, payloads))
                answer = read_frame(process.answers, max_bytes=most)
        except WireError as error:
            raise self._lost(process, Code.BAD_REPLY) from error
        except (OSError, ValueError) as error:  # the pipe is broken, or closed already
            raise self._lost(process, Code.CRASHED) from error
        if answer is None or self._is_stopped:  # what came in the last moment is not used
            raise self._lost(process, Code.CRASHED)
        code = answer.header.get("code", Code.BAD_REPLY)
        if code is not None:
            known = Code(code) if code in list(Code) else Code.BAD_REPLY
            raise TrainerError(known, log=str(self._log))
        return answer

    def _lost(self, process: WorkerProcess, code: Code) -> TrainerError:
        """Make sure that the process is dead and return why it does not answer."""
        process.kill()
        if self._is_stopped:
            return TrainerError(Code.STOPPED)
        _log.error("worker lost site=%s code=%s", self._start.site, code.value)
        return TrainerError(code, log=str(self._log))

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Let no process go on that answers with other bytes than agreed."""
        try:
            yield
        except (AttributeError, ConfigError, KeyError, TypeError, ValueError, WireError) as error:
            if self._process is not None:
                self._process.kill()
            raise TrainerError(Code.BAD_REPLY, log=str(self._log)) from error

    def _check_facts(self, facts: TrainerFacts) -> TrainerFacts:
        if (facts.site, facts.study) != (self._start.site, self._digest):
            raise WireError("facts are of another site or study")
        if self._facts not in (None, facts) or facts.num_units < 1:
            raise WireError("facts are others than before, or of nobody")
        return facts

    def _check(self, kind: Literal["update", "kept"], message: Message, round: int) -> Tensors:
        found = (message.kind, message.study, message.round, message.site)
        if found != (kind, self._digest, round, self._start.site):
            raise WireError(f"{kind} is of another study, round or site")
        return message.tensors


@contextlib.contextmanager
def _killing_after(seconds: float, process: WorkerProcess) -> Iterator[None]:
    """Kill a process that has not answered by then: whoever waits for it sees it dead."""

    def kill() -> None:
        _log.error("worker hung seconds=%.0f", seconds)
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _digests(records: CohortRecords) -> tuple[str | None, ...]:
    """Return the SHA-256 of each part, None for one that is absent."""
    parts = (records.train, records.held_out)
    return tuple(None if part is None else hashlib.sha256(part).hexdigest() for part in parts)
