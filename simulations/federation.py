"""The in-process engine: the coordinator's rounds and the sites' training, one site after another.

The same ``server.rounds`` and ``client.site`` run here that run over a network; what passes
between them is the bytes of the wire format. One ``AdaptedModel`` serves all sites.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from huizhen.client.examples import Examples
from huizhen.client.site import Site
from huizhen.learning.model import AdaptedModel
from huizhen.protocol.adapter import Tensors
from huizhen.protocol.errors import AggregationError
from huizhen.protocol.study import Study
from huizhen.server.rounds import Coordinator, RoundState
from huizhen.simulations.run_folder import Checkpoint, RunFolder

Evaluate = Callable[[], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Work:
    """One unit of work of a simulation: one study run to its end, or resumed."""

    unit: str
    # its name in the run folder
    study: Study
    sites: Mapping[str, Examples]


class Watcher:
    """Is told of progress; this one stays silent."""

    def restored(self, work: Work, rounds: int) -> None:
        """So many rounds of a unit of work are taken from the run folder."""

    def site_done(self, work: Work, round: int, site: str, loss: float, sent: int) -> None:
        """A site's update was counted; ``sent`` is its size in bytes."""

    def round_done(self, work: Work, entry: Mapping[str, Any]) -> None:
        """A round is closed and stored; ``entry`` is its line of the history."""


def run(
    work: Work,
    model: AdaptedModel,
    folder: RunFolder,
    evaluate: Evaluate,
    *,
    evaluate_every: int,
    watcher: Watcher,
) -> tuple[Tensors, list[dict[str, Any]]]:
    """Run a study to its end and return the adapter and the history of its rounds.

    Args:
        work: the study and its sites' records.
        model: shared by the sites.
        folder: every closed round is stored here; a stored one is not done again.
        evaluate: metrics of the adapter that is loaded into ``model``.
        evaluate_every: rounds between two evaluations; the last round is always evaluated.
        watcher: is told of progress.

    Raises:
        AggregationError: an update was refused, so that a round cannot close.
    """
    study = work.study
    first = model.first_tensors(study.study.seed)
    coordinator = Coordinator(study, model.shapes)
    sites = {n: Site(n, study, examples, model, first) for n, examples in work.sites.items()}
    state, history = coordinator.first(first), []
    if (stored := folder.restore(work.unit)) is not None:
        state, history = RoundState(round=stored.round, strategy=stored.strategy), stored.history
        for site in sites.values():
            site.skip_to(stored.round)
        watcher.restored(work, stored.round - 1)
    while not coordinator.is_finished(state):
        begin, inside = time.perf_counter(), model.model_seconds
        entry: dict[str, Any] = {"round": state.round}
        state = _collect(coordinator, state, sites, work, entry, watcher)
        state = coordinator.close_round(state)
        trained, inside = time.perf_counter() - begin, model.model_seconds - inside
        if entry["round"] % evaluate_every == 0 or coordinator.is_finished(state):
            model.load(state.strategy.x)
            entry |= evaluate()
        entry["seconds"] = time.perf_counter() - begin
        entry["training_seconds"] = trained
        entry["outside_share"] = max(0.0, 1 - inside / trained)
        if (mechanism := next(iter(sites.values())).mechanism) is not None:
            entry["epsilon"] = mechanism.epsilon_after(entry["round"])
        history.append(entry)
        folder.save(work.unit, Checkpoint(state.round, state.strategy, history))
        watcher.round_done(work, entry)
    return state.strategy.x, history


def _collect(
    coordinator: Coordinator,
    state: RoundState,
    sites: Mapping[str, Site],
    work: Work,
    entry: dict[str, Any],
    watcher: Watcher,
) -> RoundState:
    """Ask every site once and note what passed between them in ``entry``."""
    announcement = coordinator.announcement(state)
    losses, details = [], {}
    for name, site in sites.items():
        envelope, report = site.answer(announcement, state.round)
        state, receipt = coordinator.receive(state, envelope.data)
        if receipt.refusal is not None:
            raise AggregationError(
                f"update of site {name!r} in round {entry['round']} was refused: {receipt.refusal}"
            )
        details[name] = {"bytes_up": len(envelope.data), "seconds": report.seconds}
        if math.isfinite(report.loss):
            losses.append(report.loss)
            details[name]["loss"] = report.loss
        watcher.site_done(work, entry["round"], name, report.loss, len(envelope.data))
    entry["bytes_up"] = sum(detail["bytes_up"] for detail in details.values())
    entry["bytes_down"] = len(announcement) * len(sites)
    entry["sites"] = details
    if losses:
        entry["loss"] = sum(losses) / len(losses)
    return state
