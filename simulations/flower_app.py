"""What runs in each of Flower's actors: a ``ClientApp`` that trains whichever site it is asked for.

An actor reads the experiment's records and base itself, so both must lie at the same place on every
machine. It keeps one base, and the examples of each site that it has trained: a message holds the
announcement and nothing of a record.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from huizhen.client.local_trainer import LocalTrainer
from huizhen.client.site import diverged
from huizhen.client.trainer import Trained, Trainer
from huizhen.learning.bases import resolve
from huizhen.learning.models import make_model
from huizhen.protocol.errors import ConfigError, HuizhenError, WireError
from huizhen.protocol.study import Study, read_study
from huizhen.protocol.wire import Message as Wire
from huizhen.protocol.wire import decode, encode
from huizhen.simulations.engine import site_models
from huizhen.simulations.experiment import parse_experiment
from huizhen.simulations.partition import read_sites
from huizhen.simulations.prepare import one_site, subset
from huizhen.simulations.provenance import file_digest

APP = ClientApp()
Asked = Mapping[str, Any]


def app() -> ClientApp:
    """Return the app, by its name: nothing of it is sent to the actors."""
    return APP


@APP.train()
def answer(message: Message, context: Context) -> Message:
    """Do what a message asks: get ready, train a round, or measure."""
    asked = dict(message.content.config_records["asked"])
    said: dict[str, Any]
    try:
        said = _COMMANDS[str(asked["command"])](asked)
    except HuizhenError as error:  # raised again where the site is
        said = {"error": type(error).__name__, "text": str(error)}
    return Message(content=RecordDict({"said": ConfigRecord(said)}), reply_to=message)


def _ready(asked: Asked) -> dict[str, Any]:
    return {"facts": json.dumps(asdict(_trainer(asked).ready()))}


def _train(asked: Asked) -> dict[str, Any]:
    trainer, round = _trainer(asked), int(asked["round"])
    kept = decode(asked["kept"], shapes=trainer.kept_shapes).tensors if asked["kept"] else {}
    trained = trainer.train(asked["announcement"], round, kept)
    return pack(trained, trainer, round)


def _metrics(asked: Asked) -> dict[str, Any]:
    return {"metrics": _trainer(asked).metrics(asked["announcement"])}


_COMMANDS: dict[str, Callable[[Asked], dict[str, Any]]] = {
    "ready": _ready,
    "train": _train,
    "metrics": _metrics,
}


def pack(trained: Trained, trainer: Trainer, round: int) -> dict[str, Any]:
    """Return what training gave, as values that a Flower message holds."""
    facts = trainer.ready()

    def data(kind: Any, tensors: Any) -> bytes:
        message = Wire(kind=kind, study=facts.study, round=round, site=facts.site, tensors=tensors)
        try:
            return encode(message)
        except WireError as error:
            raise diverged(facts.site, round, error) from error

    return {
        "update": data("update", trained.update),
        "kept": data("kept", trained.kept) if trained.kept else b"",
        "loss": trained.report.loss,
        "steps": trained.report.steps,
        "seconds": trained.report.seconds,
    }


def _trainer(asked: Asked) -> LocalTrainer:
    return _actor(str(asked["setup"])).trainer(
        asked["study"], str(asked["site"]), float(asked["share"]), bool(asked["measures"])
    )


@functools.lru_cache(maxsize=1)
def _actor(setup: str) -> "_Actor":
    return _Actor(json.loads(setup))


class _Actor:
    """What an actor holds of one experiment."""

    def __init__(self, setup: dict[str, Any]) -> None:
        """Read the records and load the base.

        Raises:
            ConfigError: this machine's records are others than those of the machine that asks.
        """
        torch.set_num_threads(setup["threads"])
        self.experiment = parse_experiment(setup["experiment"], Path(setup["path"]))
        self.study: Study = read_study(setup["study"].encode())
        home = None if setup["home"] is None else Path(setup["home"])
        base = self.experiment.study.base
        self._model = make_model(
            self.study, None if base is None else resolve(base.name, home=home)
        )
        self._model.checkpointing = self.experiment.simulation.checkpointing
        found = file_digest(Path(self.experiment.simulation.data))
        if found != setup["data"]:
            raise ConfigError(
                f"[simulation] data {self.experiment.simulation.data!r} has other bytes on another "
                "machine, or was changed: every machine needs the same file at the same place"
            )
        self._records = read_sites(self.experiment.simulation, self.study.task.label)
        self.examples = functools.cache(self._examples)
        self._others: dict[int | None, Any] = {}
        self._unit: tuple[bytes, float] = b"", 0.0
        self._trainers: dict[str, LocalTrainer] = {}

    def _examples(self, site: str) -> Any:
        found = one_site(site, self._records[site], self.experiment.simulation, self._model)
        return found.train, found.held_out

    def trainer(self, study_bytes: bytes, site: str, share: float, measures: bool) -> LocalTrainer:
        """Return the trainer of a site in one unit of work; a share of 0 is everybody.

        Those of the unit before are let go.
        """
        if self._unit != (study_bytes, share):
            self._unit, self._trainers = (study_bytes, share), {}
        if site not in self._trainers:
            study = read_study(study_bytes)
            train, held_out = self.examples(site)
            if share:
                train = subset(train, share, self.experiment.simulation.seeds[0])
            model = self.model(study, site)
            self._trainers[site] = LocalTrainer(
                site,
                study,
                train,
                model,
                model.first_tensors(study.study.seed),
                held_out=held_out if measures else None,
                memory_mib=self.experiment.simulation.memory_mib,
            )
        return self._trainers[site]

    def model(self, study: Study, site: str) -> Any:
        """Return the model of the site's rank."""
        rank = study.sites[site].rank
        if rank not in self._others:
            one = replace(study, sites={site: study.sites[site]})
            model = site_models(one, self._model)[site]
            model.checkpointing = self.experiment.simulation.checkpointing
            self._others[rank] = model
        return self._others[rank]


def unpack_error(said: Any) -> HuizhenError | None:
    """Return the error that an actor met, as what it was there; None if it met none."""
    if "error" not in said:
        return None
    from huizhen.protocol import errors

    kind = getattr(errors, str(said["error"]), None)
    is_ours = isinstance(kind, type) and issubclass(kind, HuizhenError)
    return (kind if is_ours else WireError)(str(said["text"]))  # type: ignore[misc]
