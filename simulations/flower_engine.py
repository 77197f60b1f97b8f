"""Sites on Flower's simulation engine: Ray's actors, on this machine or on a cluster.

    this process   coordinator, sites with their ledgers ── RemoteTrainer ──┐ a message of Flower's
    Ray            RayBackend ─► actors, each with one base ─► LocalTrainer ┘

Flower's ``RayBackend`` places the actors by the resources that a site needs and hands them
messages; its own server side is left out, since the coordinator here is the product's. Where
RAY_ADDRESS names a cluster, Ray joins it; else a Ray of its own starts on this machine, and listens
on loopback alone: whoever reaches Ray can run code.
"""

import contextlib
import functools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from huizhen.client.site import Site
from huizhen.client.trainer import Trained, Trainer, TrainerFacts, TrainingReport, kept_bytes
from huizhen.learning.trainable import Model
from huizhen.protocol.adapter import Tensors
from huizhen.protocol.errors import ConfigError, HuizhenError
from huizhen.protocol.strict import build
from huizhen.protocol.study import Study
from huizhen.protocol.wire import decode
from huizhen.simulations.engine import Answer, Work
from huizhen.simulations.experiment import Experiment
from huizhen.simulations.provenance import file_digest
from huizhen.strategies.catalogue import make_strategy

_START_SECONDS = 120.0  # of an actor; one that waits for longer waits for somebody else
_RUN, _NODE = 1, 1  # names that Flower's messages must have, and nobody reads


class ActorError(HuizhenError):
    """An actor ended, or failed at what it was asked."""


class FlowerEngine:
    """Trains sites side by side in Flower's actors."""

    def __init__(self, experiment: Experiment, study: Study, home: Path | None) -> None:
        """Prepare; nothing is started.

        Args:
            experiment: the parsed file: every actor reads it again, and the records that it names.
            study: of ``complete_study``.
            home: where base models are cached, on every machine.
        """
        self._experiment, self._study, self._home = experiment, study, home
        self._backend: Any = None

    def __enter__(self) -> Self:
        """Start Ray, or join the cluster, and place the actors.

        Raises:
            ConfigError: Ray is not installed, cannot be reached, or no machine has the resources
                of one site.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        is_here = not os.environ.get("RAY_ADDRESS")
        if is_here:  # without it Ray takes this machine's own address for 127.0.0.1
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        try:
            import ray
            from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend
        except ImportError as error:
            raise ConfigError(
                "[simulation] engine is 'flower', Ray is not installed: pip install "
                "'huizhen[simulation]'"
            ) from error
        from huizhen.simulations.flower_app import app

        cpus = self._experiment.simulation.cpus_per_site
        start: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if is_here:  # "local": never one that another user of this machine has started
            start |= {"_node_ip_address": "127.0.0.1", "address": "local"}
        resources: dict[str, Any] = {"num_cpus": cpus}
        try:
            self._backend = RayBackend({"init_args": start, "client_resources": resources})
        except (ValueError, ConnectionError, RuntimeError) as error:
            ray.shutdown()
            place = "on this machine" if is_here else f"at {os.environ['RAY_ADDRESS']!r}"
            raise ConfigError(
                f"Ray cannot be started or reached {place}: {error}: set RAY_ADDRESS to a cluster "
                "of the same versions, or unset it"
            ) from error
        try:
            self._backend.build(app)
            self._drop_pending(ray)
        except ValueError as error:
            self.__exit__(None, None, None)
            raise ConfigError(
                f"[simulation] a site needs {cpus:g} processors, no machine of Ray's has them, or "
                "others use them: lower cpus_per_site, or set RAY_ADDRESS to a larger cluster"
            ) from error
        return self

    def _drop_pending(self, ray: Any) -> None:
        """Leave out actors that do not start: Flower counts processors that others use too.

        Raises:
            ValueError: none starts.
        """
        pool = self._backend.pool
        asked = {actor.__ray_ready__.remote(): actor for actor in pool.pool}
        ready, waiting = ray.wait(list(asked), num_returns=len(asked), timeout=_START_SECONDS)
        for one in waiting:
            ray.kill(asked[one])
        pool.pool[:] = [asked[one] for one in ready]
        pool.num_actors = len(ready)
        if not ready:
            raise ValueError("no actor starts")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the actors; a Ray that was started here ends too."""
        if self._backend is not None:
            self._backend.terminate()
            self._backend = None

    @property
    def actors(self) -> int:
        """How many sites train at the same time."""
        return int(self._backend.num_workers)

    def trainers(self, work: Work, model: Model) -> Mapping[str, Trainer]:
        """Return what asks the actors; each site is made ready in one of them."""
        found = {name: RemoteTrainer(self, self._setup, work, name) for name in work.sites}
        with self._side_by_side() as pool:
            for future in [pool.submit(one.ready) for one in found.values()]:
                future.result()
        return found

    @functools.cached_property
    def _setup(self) -> str:
        """What every actor is told of the experiment; the records are read for it once."""
        return json.dumps(
            {
                "experiment": self._same_everywhere(),
                "path": str(self._experiment.path.absolute()),
                "data": file_digest(Path(self._experiment.simulation.data)),
                "study": self._study.canonical().decode(),
                "home": None if self._home is None else str(self._home.absolute()),
                "threads": self._experiment.simulation.site_threads,
            }
        )

    def _same_everywhere(self) -> dict[str, Any]:
        """Return the file's tables with places that do not depend on where a process started."""
        found = {name: dict(table) for name, table in self._experiment.sections.items()}
        found["simulation"]["data"] = str(Path(found["simulation"]["data"]).absolute())
        base = found.get("base")
        if base is not None and Path(base["name"]).is_dir():
            base["name"] = str(Path(base["name"]).absolute())
        return found

    def answers(
        self, sites: Mapping[str, Site], announcement: bytes, round: int
    ) -> Iterator[Answer]:
        """Yield every site's answer in the order of the sites; they train side by side."""
        with self._side_by_side() as pool:
            asked = {n: pool.submit(one.answer, announcement, round) for n, one in sites.items()}
            for name, future in asked.items():
                yield (name, *future.result())

    @contextlib.contextmanager
    def _side_by_side(self) -> Iterator[ThreadPoolExecutor]:
        """Give as many threads as there are actors; all are over at the end.

        After an error the sites that train are waited for, since what they answer is paid for;
        after Ctrl-C their actors are killed.
        """
        pool = ThreadPoolExecutor(self.actors)
        try:
            yield pool
        except (HuizhenError, GeneratorExit):
            raise
        except BaseException:
            self._kill_busy()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _kill_busy(self) -> None:
        import ray

        for actor in list(self._backend.pool._future_to_actor.values()):
            ray.kill(actor)

    def seconds_inside(self) -> float | None:
        """Return None: the actors' passes are not timed."""
        return None

    def ask(self, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what an actor says.

        Raises:
            HuizhenError: what it met.
            ActorError: it ended.
        """
        from flwr.app import ConfigRecord, Context, Message, RecordDict
        from flwr.supercore.task_identity import TaskIdentity

        from huizhen.simulations.flower_app import unpack_error

        TaskIdentity.run_id = TaskIdentity.task_id = _RUN
        TaskIdentity.node_id = _NODE
        content = RecordDict({"asked": ConfigRecord(dict(asked))})
        message = Message(content, dst_node_id=_NODE, message_type="train")
        context = Context(
            run_id=_RUN,
            node_id=_NODE,
            node_config={"partition-id": 0},
            state=RecordDict(),
            run_config={},
        )
        try:
            reply, _ = self._backend.process_message(message, context)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            advice = "mend the cause, then --resume"
            if type(error).__name__ in ("RayActorError", "ActorDiedError", "OutOfMemoryError"):
                advice = "if its memory ran out, raise cpus_per_site so that fewer run; --resume"
            raise ActorError(
                f"an actor of Ray's failed at site {asked['site']!r}: {lines[-1]}: {advice}"
            ) from error
        said = reply.content.config_records["said"]
        if (met := unpack_error(said)) is not None:
            raise met
        return dict(said)


class RemoteTrainer:
    """A site's trainer in whichever actor is free."""

    _facts: TrainerFacts | None = None

    def __init__(self, engine: FlowerEngine, setup: str, work: Work, site: str) -> None:
        """Prepare; nothing is asked."""
        self._engine, self._site = engine, site
        self._strategy = make_strategy(work.study)
        self._asked = {
            "setup": setup,
            "study": work.study.canonical(),
            "site": site,
            "share": work.share or 0.0,
            "measures": site in work.held_out,
        }

    def ready(self) -> TrainerFacts:
        """Return the facts; the first time, from an actor."""
        if self._facts is None:
            said = self._engine.ask({**self._asked, "command": "ready"})
            self._facts = build(TrainerFacts, json.loads(said["facts"]), "facts")
        return self._facts

    def train(self, announcement: bytes, round: int, kept: Tensors) -> Trained:
        """Return the update Δ of a round, what to keep, and a report."""
        facts = self.ready()
        shapes, before = facts.shapes, b""
        if kept:
            last = max(1, round - 1)
            before = kept_bytes(kept, study=facts.study, site=self._site, round=last)
        said = self._engine.ask(
            {
                **self._asked,
                "command": "train",
                "round": round,
                "announcement": announcement,
                "kept": before,
            }
        )
        names, keeps = self._strategy.sends(shapes, round), self._strategy.keeps(shapes)
        agreed = {name: shape for name, shape in shapes.items() if name in names}
        after = decode(said["kept"], shapes=keeps).tensors if said["kept"] else {}
        report = TrainingReport(
            loss=float(said["loss"]), steps=int(said["steps"]), seconds=float(said["seconds"])
        )
        return Trained(decode(said["update"], shapes=agreed).tensors, after, report)

    def metrics(self, announcement: bytes) -> bytes:
        """Return fresh noised metrics of the final adapter."""
        said = self._engine.ask({**self._asked, "command": "metrics", "announcement": announcement})
        return bytes(said["metrics"])
