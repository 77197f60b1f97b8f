"""A simulated federation: the coordinator's rounds, and sites that an engine trains.

The same ``server.rounds`` and ``client.site`` run here that run over a network; what passes
between them is the bytes of the wire format.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from huizhen.client.ledger import Ledger
from huizhen.client.site import Site
from huizhen.client.trainer import Trainer
from huizhen.learning.trainable import Model
from huizhen.protocol.adapter import Tensors
from huizhen.protocol.errors import AggregationError, PrivacyError, ReleaseLostError
from huizhen.protocol.ledger_entries import Cap
from huizhen.protocol.metrics import parse_metrics
from huizhen.server.metrics import join_metrics
from huizhen.server.rounds import Coordinator, RoundState
from huizhen.simulations.engine import Engine, Work
from huizhen.simulations.run_folder import Checkpoint, RunFolder, safe_name

Evaluate = Callable[["Ready"], dict[str, Any]]
Ready = Callable[[str], None]
"""Makes the model that of a site, before its records are looked at."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What a study came to."""

    x: Tensors
    # the adapter
    own: Mapping[str, Tensors]
    # what of it each site has for itself, where the strategy leaves it something; by site
    history: list[dict[str, Any]]

    def of(self, site: str) -> Tensors:
        """Return the adapter as a site uses it."""
        return {**self.x, **self.own.get(site, {})}


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
    model: Model,
    folder: RunFolder,
    evaluate: Evaluate,
    *,
    engine: Engine,
    evaluate_every: int,
    watcher: Watcher,
) -> Trained:
    """Run a study to its end and return the adapter and the history of its rounds.

    Args:
        work: the study and its sites' records.
        model: shared by the sites.
        folder: every closed round is stored here; a stored one is not done again.
        evaluate: metrics of the adapter that it loads into ``model`` for each site.
        engine: trains the sites.
        evaluate_every: rounds between two evaluations; the last round is always evaluated.
        watcher: is told of progress.

    Raises:
        AggregationError: an update was refused, so that a round cannot close.
    """
    first = model.first_tensors(work.study.study.seed)
    coordinator = Coordinator(work.study, model.shapes)
    state, history = coordinator.first(first), []
    with contextlib.ExitStack() as ledgers:
        sites = _join(work, engine.trainers(work, model), folder, ledgers)
        if (stored := folder.restore(work.unit)) is not None:
            state = RoundState(round=stored.round, strategy=stored.strategy)
            history = stored.history
            for site in sites.values():
                site.skip_to(stored.round)
            for site, own in zip(sites.values(), stored.kept, strict=False):
                site.kept = own
            watcher.restored(work, stored.round - 1)
        while not coordinator.is_finished(state):
            begin = time.perf_counter()
            state, entry = _run_round(coordinator, state, sites, work, engine, watcher)
            if entry["round"] % evaluate_every == 0 or coordinator.is_finished(state):
                found = Trained(state.strategy.x, _own(sites, model), [])
                entry |= evaluate(_loads(model, found))
            if coordinator.is_finished(state):
                entry |= _let_out(coordinator, state, sites, work)
            entry["seconds"] = time.perf_counter() - begin
            history.append(entry)
            kept = () if work.study.is_private else tuple(site.kept for site in sites.values())
            folder.save(work.unit, Checkpoint(state.round, state.strategy, history, kept))
            watcher.round_done(work, entry)
        return Trained(state.strategy.x, _own(sites, model), history)


def _loads(model: Model, trained: Trained) -> Ready:
    """Return what makes the model that of a site; it is loaded once if all have the same."""
    if trained.own:
        return lambda site: model.load(trained.of(site))
    model.load(trained.x)
    return lambda site: None


def _own(sites: Mapping[str, Site], model: Model) -> dict[str, Tensors]:
    """Return what of the adapter each site keeps for itself."""
    found: dict[str, Tensors] = {}
    for name, site in sites.items():
        own = {n: value for n, value in site.kept.items() if n in model.shapes}
        if own:
            found[name] = own
    return found


def _join(
    work: Work,
    trainers: Mapping[str, Trainer],
    folder: RunFolder,
    ledgers: contextlib.ExitStack,
) -> dict[str, Site]:
    """Return the sites of a study, with their ledgers open where it is private."""
    sites = {}
    for name, trainer in trainers.items():
        ledger = None
        if work.study.is_private:
            ledger = ledgers.enter_context(open_ledger(folder, work, name))
        sites[name] = Site(name, work.study, trainer, ledger=ledger)
    return sites


def open_ledger(folder: RunFolder, work: Work, site: str) -> Ledger:
    """Return a site's ledger in one unit of work, made if no round of it is closed.

    Each simulated study has ledgers of its own, with its own ε as the cap: simulated runs are not
    releases of the same patients' data, so that nothing adds up.
    """
    path = folder.path / "ledgers" / work.unit / f"{safe_name(site)}.sqlite"
    if path.exists() or folder.restore(work.unit) is not None:  # a lost ledger is an error
        return Ledger.open(path, threads=True)
    terms = work.study.privacy
    if terms.unit == "none":
        raise PrivacyError(f"study of {work.unit} has no unit of privacy, nothing can be charged")
    cap = Cap(
        epsilon=terms.epsilon, delta=terms.delta, metrics_epsilon=terms.metrics_epsilon or 0.0
    )
    return Ledger.create(
        path, site=site, cohort="simulated", cap=cap, unit=terms.unit, threads=True
    )


def _run_round(
    coordinator: Coordinator,
    state: RoundState,
    sites: Mapping[str, Site],
    work: Work,
    engine: Engine,
    watcher: Watcher,
) -> tuple[RoundState, dict[str, Any]]:
    """Ask every site once and close the round; return the next state and the round's line."""
    begin, before = time.perf_counter(), engine.seconds_inside()
    entry: dict[str, Any] = {"round": state.round}
    announcement = coordinator.announcement(state)
    losses, details, is_whole = [], {}, True
    for name, envelope, report in engine.answers(sites, announcement, state.round):
        state, receipt = coordinator.receive(state, envelope.data)
        if receipt.refusal is not None:
            raise AggregationError(
                f"update of site {name!r} in round {entry['round']} was refused: {receipt.refusal}"
            )
        detail: dict[str, float] = {"bytes_up": len(envelope.data)}
        loss = math.nan
        if report is None:
            is_whole = False
        else:
            loss, detail["seconds"] = report.loss, report.seconds
        if math.isfinite(loss):
            losses.append(loss)
            detail["loss"] = loss
        details[name] = detail
        watcher.site_done(work, entry["round"], name, loss, len(envelope.data))
    entry["bytes_up"] = sum(detail["bytes_up"] for detail in details.values())
    entry["bytes_down"] = len(announcement) * len(sites)
    entry["sites"] = details
    state = coordinator.close_round(state)
    trained, after = time.perf_counter() - begin, engine.seconds_inside()
    if is_whole:  # else an earlier attempt trained some sites, and its times and losses are lost
        entry["training_seconds"] = trained
        if before is not None and after is not None:
            entry["outside_share"] = max(0.0, 1 - (after - before) / trained)
        if losses:
            entry["loss"] = sum(losses) / len(losses)
    if (mechanism := next(iter(sites.values())).mechanism) is not None:
        entry["epsilon"] = mechanism.epsilon_after(entry["round"])
    return state, entry


def _let_out(
    coordinator: Coordinator, state: RoundState, sites: Mapping[str, Site], work: Work
) -> dict[str, Any]:
    """Return what the sites say of the final adapter, as the coordinator reads their noised counts.

    A site says nothing when an earlier attempt was killed after its charge: that ε is spent.
    """
    if not work.study.is_private or work.study.privacy.metrics_epsilon is None:
        return {}
    announcement = coordinator.announcement(state)
    values, details = [], {}
    for name in work.held_out:
        try:
            data = sites[name].release_metrics(announcement)
        except ReleaseLostError:
            continue
        values.append(parse_metrics(data, work.study))
        details[name] = {key: asdict(one) for key, one in values[-1].readings().items()}
    joint = None
    if any(not value.is_suppressed for value in values):
        joint = asdict(join_metrics(values))
        joint |= {key: list(joint[key]) for key in ("sites", "suppressed")}  # as JSON has them
    return {
        "released": {
            "epsilon": work.study.privacy.metrics_epsilon,
            "sites": details,
            "silent": [name for name in work.sites if name not in details],
            "joint": joint,
        }
    }
