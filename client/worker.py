"""The process that trains: ``python -m huizhen.client.worker``, started by ``worker_trainer``.

It has no keys, no ledger and, where the machine allows it, no network and no disk. It gets the
study and the records once, holds the base model, and answers commands until its pipe ends:

    start     study, records                →  facts
    train     announcement of a round,      →  update Δ in the wire format, what to keep
              what the last one kept           likewise, report
    metrics   announcement of the final one →  noised metrics
    ping, end

An error leaves as one code of ``trainer.Code``. Its text goes to standard error, which the agent
keeps in a log, and there only the messages of this project's own errors, which never show a
record's content; of any other error only its type and place.
"""

import contextlib
import ctypes
import faulthandler
import logging
import math
import os
import resource
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from huizhen.client.frames import Frame, Start, read_frame, write_frame
from huizhen.client.governance import admit
from huizhen.client.records.record import Record
from huizhen.client.records.rows import read_lines, to_record
from huizhen.client.trainer import Code, Trainer, TrainerError
from huizhen.learning.bases import Base, cache_folder, resolve
from huizhen.learning.catalogue import entry
from huizhen.protocol.adapter import Tensors
from huizhen.protocol.errors import (
    ConfigError,
    HuizhenError,
    PrivacyError,
    ProtocolError,
    WireError,
)
from huizhen.protocol.mechanism import Mechanism
from huizhen.protocol.strict import build
from huizhen.protocol.study import Study, read_study
from huizhen.protocol.wire import Message, decode, encode

if TYPE_CHECKING:
    from huizhen.client.local_trainer import LocalTrainer
    from huizhen.learning.trainable import Model

MAX_START_BYTES = 1 << 33  # of study and records together: what a cohort's text never reaches

_PR_SET_PDEATHSIG = 1
_REFUSALS = (HuizhenError, AttributeError, KeyError, TypeError, ValueError)
_log = logging.getLogger("huizhen.client.worker")  # also where it is run as __main__


def main() -> int:
    """Serve the agent at the other end of standard input and output; return an exit code."""
    commands, answers = _take_streams()
    _end_with_agent(commands.fileno())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold records
    faulthandler.enable()
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s"
    )
    try:
        serve(commands, answers)
    except (WireError, OSError) as error:
        _note(error)
        return 1
    return 0


def serve(commands: IO[bytes], answers: IO[bytes]) -> None:
    """Answer commands until ``end`` or the end of the stream.

    Raises:
        WireError: the agent sent what is no frame.
        OSError: the agent is gone.
    """
    trainer: LocalTrainer | None = None
    while (frame := read_frame(commands, max_bytes=_limit(trainer))) is not None:
        name = frame.header.get("command")
        if name == "end":
            return
        try:
            answer = Frame({"code": None})
            if name == "start" and trainer is None:
                trainer = _start(frame)
                answer = _facts(trainer)
            elif name == "train" and trainer is not None:
                answer = _train(trainer, frame)
            elif name == "metrics" and trainer is not None:
                answer = _metrics(trainer, frame)
            elif name != "ping":
                raise TrainerError(Code.BAD_COMMAND)
        except Exception as error:  # noqa: BLE001  # whatever it is, only its code may leave
            _note(error)
            answer = Frame({"code": _code(error).value})
        del frame  # its payloads may be records
        write_frame(answers, answer)


def _start(frame: Frame) -> "LocalTrainer":
    """Load the base, read the records and return what trains."""
    with _failing_as(Code.BAD_COMMAND):
        start = build(Start, frame.header.get("start", {}), "start")
        study_bytes, train, *held_out = frame.payloads
        study = read_study(study_bytes)
    if study.is_private:
        with _failing_as(Code.NOT_PRIVATE):
            Mechanism.of(study)
    base = _base(start)
    with _failing_as(Code.BAD_RECORDS):
        admitted = admit(
            _records(train, start.patient, "records"),
            start.policy,
            held_out=[r for one in held_out for r in _records(one, start.patient, "held-out")],
        )
    import torch  # after all that fails without it

    from huizhen.client.local_trainer import LocalTrainer
    from huizhen.client.site_examples import site_examples

    torch.set_num_threads(start.threads)
    model = _model(study, base, start)
    with _failing_as(Code.BAD_RECORDS):
        found = site_examples(admitted, model.encoder(), model)
    with _failing_as(Code.OUT_OF_MEMORY, ConfigError), _failing_as(Code.NOT_PRIVATE, PrivacyError):
        return LocalTrainer(
            start.site,
            study,
            found.train,
            model,
            model.first_tensors(study.study.seed),
            held_out=found.held_out if held_out else None,
            memory_mib=start.memory_mib,
        )


def _base(start: Start) -> Base | None:
    """Return the base; one that is not in the cache is never fetched from here."""
    if start.base is None:
        return None
    home = Path(start.home)
    with _failing_as(Code.WRONG_BASE):
        is_folder = Path(start.base).is_absolute()
        if not is_folder and not cache_folder(entry(start.base), home).is_dir():
            raise ConfigError(f"base {start.base!r} is not in the cache: fetch it first")
        return resolve(start.base, home=home)


def _model(study: Study, base: Base | None, start: Start) -> "Model":
    """Return the study's model, if the base is the one that was agreed on."""
    from huizhen.learning.models import make_model

    begin = time.perf_counter()
    with _failing_as(Code.WRONG_BASE):
        if study.base is not None and base is not None and study.base.digests != dict(base.digests):
            raise ConfigError(
                "[base] digests are not those of the base's files, all of them and no others: "
                "get the base that the study was agreed on"
            )
        model = make_model(study, base, site=start.site)
    model.checkpointing = start.checkpointing
    _log.info("loaded base=%s seconds=%.1f", start.base, time.perf_counter() - begin)
    return model


def _records(data: bytes, patient: str, name: str) -> list[Record]:
    return [to_record(fields, patient, place) for place, fields in read_lines(data, name)]


def _facts(trainer: Trainer) -> Frame:
    facts = asdict(trainer.ready())
    return Frame({"code": None, "facts": facts})


def _train(trainer: "LocalTrainer", frame: Frame) -> Frame:
    with _failing_as(Code.BAD_COMMAND):
        [announcement, *before], round = frame.payloads, frame.header["round"]
        if type(round) is not int or len(before) > 1:
            raise TrainerError(Code.BAD_COMMAND)
        kept = decode(before[0], shapes=trainer.kept_shapes).tensors if before else {}
    with _failing_as(Code.BAD_ANNOUNCEMENT, ProtocolError):
        trained = trainer.train(announcement, round, kept)
    facts, report = trainer.ready(), trained.report
    parts: dict[Literal["update", "kept"], Tensors] = {"update": trained.update}
    if trained.kept:
        parts["kept"] = trained.kept
    with _failing_as(Code.DIVERGED, WireError):
        payloads = [
            encode(Message(kind=k, study=facts.study, round=round, site=facts.site, tensors=t))
            for k, t in parts.items()
        ]
    _log.info("trained round=%d steps=%d seconds=%.1f", round, report.steps, report.seconds)
    # JSON has no NaN, which is the loss of a round that drew nobody
    loss = None if math.isnan(report.loss) else report.loss
    values = {"loss": loss, "steps": report.steps, "seconds": report.seconds}
    return Frame({"code": None, "report": values}, tuple(payloads))


def _metrics(trainer: "LocalTrainer", frame: Frame) -> Frame:
    with _failing_as(Code.BAD_COMMAND):
        [announcement] = frame.payloads
    with _failing_as(Code.BAD_ANNOUNCEMENT, ProtocolError):
        return Frame({"code": None}, (trainer.metrics(announcement),))


def _limit(trainer: "LocalTrainer | None") -> int:
    """Return how many bytes the next command's payloads may have."""
    return MAX_START_BYTES if trainer is None else trainer.max_command_bytes


@contextlib.contextmanager
def _failing_as(code: Code, *kinds: type[Exception]) -> Iterator[None]:
    """Give an error of these kinds a code, unless they have one; without kinds, any refusal."""
    try:
        yield
    except (TrainerError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, kinds or _REFUSALS):
            raise TrainerError(code) from error
        raise


def _code(error: BaseException) -> Code:
    if isinstance(error, TrainerError):
        return error.code
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch's words
        return Code.OUT_OF_MEMORY
    return Code.NOT_PRIVATE if isinstance(error, PrivacyError) else Code.CRASHED


def _note(error: BaseException) -> None:
    """Write where an error came from; what it says only if it is one of ours."""
    seen: BaseException | None = error
    while seen is not None:
        frames = traceback.extract_tb(seen.__traceback__)
        places = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
        said = str(seen) if isinstance(seen, HuizhenError) else "<its text may show a record>"
        _log.error("failed type=%s text=%s at=%s", type(seen).__name__, said, places)
        seen = seen.__cause__ or seen.__context__


def _take_streams() -> tuple[IO[bytes], IO[bytes]]:
    """Return the pipe's two ends, and leave nothing of it for a library to read or print to."""
    commands, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return os.fdopen(commands, "rb"), os.fdopen(answers, "wb")


def _end_with_agent(pipe: int) -> None:
    """End this process at once when the agent's end of a pipe is gone, whatever it is doing."""
    _die_with_parent()
    watched = select.poll()
    watched.register(pipe, 0)  # no data: only that the other end is closed

    def watch() -> None:
        watched.poll()
        os._exit(1)

    threading.Thread(target=watch, name="agent-watch", daemon=True).start()


def _die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends; Linux alone has it."""
    if sys.platform == "linux":
        prctl: Callable[..., int] = ctypes.CDLL(None).prctl
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    ended_with = main()
    logging.shutdown()
    os._exit(ended_with)  # the libraries would take a second to clean up
