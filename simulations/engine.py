"""Where a simulation trains its sites: one after another here, or on Flower's engine, side by side.

An engine gives each site a ``Trainer`` and has the sites answer an announcement. Ledgers, outboxes,
the coordinator and the evaluation stay in this process whichever it is.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from huizhen.client.examples import Examples
from huizhen.client.local_trainer import LocalTrainer
from huizhen.client.outbox import Envelope
from huizhen.client.site import Site
from huizhen.client.trainer import Trainer, TrainingReport
from huizhen.learning.model import AdaptedModel
from huizhen.learning.trainable import Model
from huizhen.protocol.study import Study
from huizhen.simulations.experiment import SimulationTerms
from huizhen.strategies.ranks import site_rank

Answer = tuple[str, Envelope, TrainingReport | None]
"""A site's name, its update, and what it says of its training if it trained just now."""


@dataclass(frozen=True, slots=True)
class Work:
    """One unit of work of a simulation: one study run to its end, or resumed."""

    unit: str
    # its name in the run folder
    study: Study
    sites: Mapping[str, Examples]
    held_out: Mapping[str, Examples] = field(default_factory=dict)
    # for the metrics that sites let out; a site may have none
    share: float | None = None
    # of each site's patients that are trained on; all when None


class Engine(Protocol):
    """Trains the sites of units of work."""

    def trainers(self, work: Work, model: Model) -> Mapping[str, Trainer]:
        """Return what trains for each site.

        Raises:
            HuizhenError: a site cannot be trained as the study asks.
        """

    def answers(
        self, sites: Mapping[str, Site], announcement: bytes, round: int
    ) -> Iterator[Answer]:
        """Yield every site's answer, in the order of the sites.

        Raises:
            HuizhenError: a site cannot answer.
        """

    def seconds_inside(self) -> float | None:
        """Return the time spent in passes so far; None where it cannot be known."""


class InProcess:
    """One site after another in this process; one model serves all of a rank."""

    def __init__(self, terms: SimulationTerms) -> None:
        """Take how much memory a site has, and whether it checkpoints."""
        self._terms = terms
        self._models: dict[int, Model] = {}

    def trainers(self, work: Work, model: Model) -> Mapping[str, Trainer]:
        """Return trainers that share the model."""
        first = model.first_tensors(work.study.study.seed)
        models = site_models(work.study, model)
        self._models = {id(one): one for one in models.values()}
        found = {}
        for name, examples in work.sites.items():
            models[name].checkpointing = self._terms.checkpointing
            found[name] = LocalTrainer(
                name,
                work.study,
                examples,
                models[name],
                first,
                held_out=work.held_out.get(name),
                memory_mib=self._terms.memory_mib,
            )
        return found

    def answers(
        self, sites: Mapping[str, Site], announcement: bytes, round: int
    ) -> Iterator[Answer]:
        """Yield one answer after the other."""
        for name, site in sites.items():
            yield (name, *site.answer(announcement, round))

    def seconds_inside(self) -> float | None:
        """Return the time that the models have spent in passes."""
        return sum(model.model_seconds for model in self._models.values())


def site_models(study: Study, model: Model) -> dict[str, Model]:
    """Return the model of each site: one for all, but for sites of another rank."""
    by_rank: dict[int | None, Model] = {site_rank(study, None): model}
    found = {}
    for site in study.sites:
        rank = site_rank(study, site)
        if rank not in by_rank and isinstance(model, AdaptedModel):
            by_rank[rank] = AdaptedModel(model.base, study, rank=rank)
        found[site] = by_rank[rank]
    return found
