"""Sites on Flower's simulation engine: Ray's actors, on this machine or on a cluster.

    this process   coordinator, sites with their ledgers ── RemoteTrainer ──┐ a message of Flower's
    Ray            RayBackend ─► actors, each with one base ─► LocalTrainer ┘

Flower's ``RayBackend`` places the actors by the resources that a site needs and hands them
messages; its own server side is left out, since the coordinator here is the product's. Where
RAY_ADDRESS names a cluster, Ray joins it; else it starts on this machine, on loopback.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from huizhen.client.site import Site
from huizhen.client.trainer import Trained, Trainer, TrainerFacts, TrainingReport
from huizhen.learning.trainable import Model
from huizhen.protocol.adapter import Tensors
from huizhen.protocol.errors import ConfigError, HuizhenError
from huizhen.protocol.strict import build
from huizhen.protocol.study import Study
from huizhen.protocol.wire import Message as Wire
from huizhen.protocol.wire import decode, encode
from huizhen.simulations.engine import Answer, Work
from huizhen.simulations.experiment import Experiment
from huizhen.strategies.catalogue import make_strategy

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
        try:
            import ray
            from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend
        except ImportError as error:
            raise ConfigError(
                "[simulation] engine is 'flower', Ray is not installed: pip install "
                "'huizhen[simulation]'"
            ) from error
        from huizhen.simulations.flower_app import app

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        terms = self._experiment.simulation
        start: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if "RAY_ADDRESS" not in os.environ:
            start["_node_ip_address"] = "127.0.0.1"
        resources: dict[str, Any] = {
            "num_cpus": terms.cpus_per_site,
            "num_gpus": terms.gpus_per_site,
        }
        try:
            self._backend = RayBackend({"init_args": start, "client_resources": resources})
            self._backend.build(app)
        except (ValueError, ConnectionError) as error:
            ray.shutdown()
            raise ConfigError(
                f"[simulation] a site needs {terms.cpus_per_site:g} processors and "
                f"{terms.gpus_per_site:g} GPUs, no machine of Ray's has them: lower cpus_per_site "
                "or gpus_per_site, or set RAY_ADDRESS to the cluster"
            ) from error
        return self

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
        setup = json.dumps(
            {
                "experiment": dict(self._experiment.sections),
                "path": str(self._experiment.path),
                "study": self._study.canonical().decode(),
                "home": None if self._home is None else str(self._home.absolute()),
                "threads": max(1, int(self._experiment.simulation.cpus_per_site)),
            }
        )
        found = {name: RemoteTrainer(self, setup, work, name) for name in work.sites}
        with ThreadPoolExecutor(self.actors) as pool:
            for future in [pool.submit(one.ready) for one in found.values()]:
                future.result()
        return found

    def answers(
        self, sites: Mapping[str, Site], announcement: bytes, round: int
    ) -> Iterator[Answer]:
        """Yield every site's answer in the order of the sites; they train side by side."""
        pool = ThreadPoolExecutor(self.actors)
        try:
            asked = {n: pool.submit(one.answer, announcement, round) for n, one in sites.items()}
            for name, future in asked.items():
                yield (name, *future.result())
        finally:  # after Ctrl-C nobody waits for what is being trained: Ray ends it
            pool.shutdown(wait=False, cancel_futures=True)

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
            raise ActorError(
                f"an actor of Ray's failed at site {asked['site']!r}: {error}: if it was killed "
                "for memory, raise cpus_per_site so that fewer run; then --resume"
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
        self._engine, self._site, self._study = engine, site, work.study
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
            before = encode(
                Wire(kind="kept", study=facts.study, round=last, site=self._site, tensors=kept)
            )
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
