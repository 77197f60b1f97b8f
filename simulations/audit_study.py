"""The audit of a user's own study: its base, its privacy terms and one site's real patients.

What ``audit.py`` measures becomes one document, ``audit.json``: the claim, the four checks, the
verdict, and what that verdict is worth. It holds facts about real patients (how many were drawn,
how far one moves the sum), so it stays where the records are.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from torch import nn

from huizhen.client.examples import Examples
from huizhen.client.model_checks import check_model
from huizhen.client.patient_gradients import ModelGradients
from huizhen.client.per_record import per_record_gradients
from huizhen.client.training import units
from huizhen.learning.trainable import Model
from huizhen.protocol.errors import ConfigError
from huizhen.protocol.mechanism import Mechanism
from huizhen.protocol.study import Study
from huizhen.simulations.audit import (
    Bound,
    Claim,
    Transcript,
    draws_p_value,
    judge,
    neighbours,
    noise_p_value,
    sensitivity,
    transcribe,
)
from huizhen.simulations.audit_verdict import (
    MEANING,
    REFUTED,
    advice,
    reasons_against,
    spent_by,
)
from huizhen.simulations.canaries import Canaries
from huizhen.simulations.engine import site_models
from huizhen.simulations.experiment import Experiment
from huizhen.simulations.partition import SiteRecords, read_sites
from huizhen.simulations.prepare import complete_study, prepare
from huizhen.simulations.provenance import environment
from huizhen.simulations.runner import arm_study
from huizhen.strategies.catalogue import make_strategy
from huizhen.strategies.ranks import cut

SCHEMA: Final = 1


class Auditor:
    """Is told how an audit gets on; this one stays silent."""

    def say(self, text: str) -> None:
        """What is being done."""

    def stepped(self, done: int, steps: int, seconds: float) -> None:
        """So many of the steps are done, in so many seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """One site's private step, as training would take it."""

    site: str
    study: Study
    model: Model
    examples: Examples
    parameters: Mapping[str, nn.Parameter]
    claim: Claim
    memory_mib: int


def audit_study(
    experiment: Experiment,
    *,
    canaries: int = 256,
    steps: int | None = None,
    site: str | None = None,
    home: Path | None = None,
    auditor: Auditor | None = None,
) -> dict[str, Any]:
    """Audit the private steps of one site and return what ``audit.json`` holds.

    Args:
        experiment: the parsed file.
        canaries: m.
        steps: how many of the study's steps to run; all when absent.
        site: whose patients; the site with the most when absent.
        home: where base models are cached.
        auditor: is told of progress.

    Raises:
        ConfigError: the study is not private, has no such site or fewer steps, or there are more
            canaries than trained numbers.
        HuizhenError: whatever keeps the study from being run at all.
    """
    begin = time.perf_counter()
    auditor = auditor or Auditor()
    if not experiment.study.is_private:
        raise ConfigError(
            f"{experiment.path.name} [privacy] unit is 'none', there is no claim to audit: "
            "set it to 'patient' or 'record'"
        )
    sites = read_sites(experiment.simulation, experiment.study.task.label)
    name = _site(site, sites)
    study = complete_study(experiment, sites, home)
    prepared = prepare(experiment, study, {name: sites[name]}, home=home, say=auditor.say)
    study = arm_study(prepared.study, experiment.simulation.seeds[0], private=True)
    first = prepared.model.first_tensors(study.study.seed)
    model = site_models(study, prepared.model)[name]  # of the site's own rank
    model.checkpointing = experiment.simulation.checkpointing
    strategy = make_strategy(study)
    model.load(cut(strategy.init(first).x, model.shapes))
    names = strategy.trains(model.shapes, 1)
    try:
        subject = _Subject(
            site=name,
            study=study,
            model=model,
            examples=prepared.train[name],
            parameters=model.train_only(names),
            claim=_claim(study, name, steps),
            memory_mib=experiment.simulation.memory_mib,
        )
        document = _audit(subject, canaries, auditor)
    finally:
        model.train_only(frozenset())
    return document | {"seconds": time.perf_counter() - begin}


def _audit(subject: _Subject, count: int, auditor: Auditor) -> dict[str, Any]:
    claim, model, parameters = subject.claim, subject.model, subject.parameters
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    planted = Canaries(count, shapes, claim.clip)
    guesses = claim.guesses(count)
    memory = check_model(model, subject.examples, subject.memory_mib)
    model.train_only(frozenset(parameters))
    patients = units(subject.examples, subject.study)
    compared, left_out = neighbours(patients, subject.examples.lengths)
    with per_record_gradients(model.module, parameters) as recorder:

        def source(records_per_patient: int) -> ModelGradients:
            return ModelGradients(
                model,
                parameters,
                subject.examples,
                patients,
                recorder,
                records_per_patient=records_per_patient,
                memory=memory,
            )

        auditor.say(f"leaving out {len(left_out)} of {len(compared)} patients, one at a time")
        moved = sensitivity(
            source(max(map(len, patients))), shapes, claim.max_grad_norm, compared, left_out
        )
        auditor.say(
            f"{count} canaries, {guesses} guesses: could show epsilon "
            f"{claim.ceiling(count, guesses):.2f}, the claim is {claim.epsilon:.2f}"
        )
        transcript = transcribe(
            source(subject.study.privacy.records_per_patient),
            planted,
            claim,
            _watch(claim, auditor),
        )
    bound = judge(transcript, claim, guesses)
    return _document(subject, bound, transcript, moved, len(compared))


def _watch(claim: Claim, auditor: Auditor) -> Callable[[int], None]:
    """Return what tells an auditor of the steps, and after the first pass of the time they take."""
    begin = time.perf_counter()

    def watch(done: int) -> None:
        nonlocal begin
        seconds = time.perf_counter() - begin
        if done > 0:
            auditor.stepped(done, claim.steps, seconds)
            return
        expected = claim.steps * claim.sampling_rate * seconds
        auditor.say(f"{claim.steps} steps, about {duration(expected)}")
        begin = time.perf_counter()

    return watch


def duration(seconds: float) -> str:
    """Return a length of time as people say it."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _document(
    subject: _Subject, bound: Bound, transcript: Transcript, moved: list[float], compared: int
) -> dict[str, Any]:
    study, claim, m = subject.study, subject.claim, len(transcript.scores)
    draws = draws_p_value(transcript, claim.sampling_rate)
    noise = noise_p_value(transcript, claim)
    reasons = reasons_against(claim, bound, moved=max(moved), draws=draws, noise=noise)
    in_reach = bound.ceiling > claim.epsilon
    most = sum(one.numel() for one in subject.parameters.values())
    return {
        "schema": SCHEMA,
        "study": {
            "name": study.study.name,
            "digest": study.digest(),
            "base": study.base.name if study.base else None,
            "epsilon": study.privacy.epsilon,
            "steps": _steps(study),
        },
        "site": subject.site,
        "unit": study.privacy.unit,
        "claim": asdict(claim),
        "canaries": m,
        "bound": asdict(bound),
        "in_reach": in_reach,
        "neighbours": {"moved": moved, "patients": compared},
        "draws": {
            "p_value": draws,
            "least": min(transcript.sizes),
            "most": max(transcript.sizes),
            "of": len(transcript.counts),
        },
        "noise": {"p_value": noise},
        "verdict": REFUTED if reasons else f"not {REFUTED}",
        "reasons": reasons,
        "meaning": MEANING,
        "advice": None if in_reach else advice(claim, m, most),
        "notes": _notes(study, claim),
        "scores": {
            "in": transcript.scores[transcript.included].tolist(),
            "out": transcript.scores[~transcript.included].tolist(),
        },
        "environment": environment(),
    }


def _claim(study: Study, site: str, steps: int | None) -> Claim:
    terms, planned = study.privacy, _steps(study)
    steps = planned if steps is None else steps
    if not 1 <= steps <= planned:
        raise ConfigError(f"--steps is {steps}, the study has {planned}: choose 1 to {planned}")
    sigma = Mechanism.of(study).noise_multiplier
    return Claim(
        epsilon=spent_by(sigma, terms.sampling_rate, steps, terms.delta),
        delta=terms.delta,
        noise_multiplier=sigma,
        sampling_rate=terms.sampling_rate,
        steps=steps,
        max_grad_norm=terms.max_grad_norm,
        denominator=terms.sampling_rate * study.sites[site].patients_public,
    )


def _notes(study: Study, claim: Claim) -> list[str]:
    notes = []
    if study.privacy.batch_cap is not None:
        notes.append(
            "batch_cap is left out, since canaries would fill it: "
            "the claim is that of plain Poisson sampling."
        )
    if claim.steps < _steps(study):
        notes.append(f"{claim.steps} of the study's {_steps(study)} steps were run.")
    return notes


def _steps(study: Study) -> int:
    return study.rounds.count * study.rounds.local_steps


def _site(wanted: str | None, sites: Mapping[str, SiteRecords]) -> str:
    if wanted is None:
        return max(sites, key=lambda name: sites[name].patients())
    if wanted not in sites:
        raise ConfigError(f"--site is {wanted!r}, sites are {', '.join(sites)}: name one of these")
    return wanted
