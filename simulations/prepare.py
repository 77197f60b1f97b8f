"""From an experiment file to everything a run needs: sites, base model, study, examples."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from huizhen.client.examples import Examples
from huizhen.client.governance import SitePolicy, admit
from huizhen.client.site import check_delta
from huizhen.client.site_examples import SiteExamples, site_examples
from huizhen.client.training import units
from huizhen.learning.bases import resolve
from huizhen.learning.metrics import concordance_index
from huizhen.learning.models import check_digests, make_model
from huizhen.learning.survival import times_of
from huizhen.learning.tasks import UNSEEN, fields_read, name_of
from huizhen.learning.template import nearest
from huizhen.learning.trainable import Model
from huizhen.protocol.errors import ConfigError
from huizhen.protocol.study import Study
from huizhen.protocol.study_terms import BaseTerms, SiteTerms
from huizhen.simulations.experiment import BinTerms, Experiment, SimulationTerms
from huizhen.simulations.partition import UNKNOWN, SiteRecords

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All that the arms share."""

    experiment: Experiment
    study: Study
    # with labels, base digests and the sites' public sizes
    model: Model
    records: Mapping[str, SiteRecords]
    train: Mapping[str, Examples]
    test: Mapping[str, Examples]
    notes: tuple[str, ...]


def complete_study(experiment: Experiment, sites: Mapping[str, SiteRecords], home: Any) -> Study:
    """Return the study with all that a simulation fills in.

    Raises:
        ConfigError: the file names a site that the data does not have, or δ is too large for a
            site.
    """
    study = experiment.study
    base = None if study.base is None else _with_digests(study.base, home)
    unknown = sorted(study.sites.keys() - sites.keys())
    if unknown:
        raise ConfigError(
            f"[sites.{unknown[0]}] is not in the data, sites are {', '.join(sites)}: mend the name"
        )
    by_record = study.privacy.unit == "record"
    terms = {
        name: study.sites.get(name)
        or SiteTerms(
            patients_public=round_two_digits(len(site.train) if by_record else site.patients())
        )
        for name, site in sites.items()
    }
    task = study.task
    if task.kind != "instruction":
        labels = task.labels or _labels(sites, task.label or "")
        texts = task.label_texts or _label_texts(sites, task.label or "", task.label_text, labels)
        task = replace(task, labels=labels, label_texts=texts)
    return replace(study, sites=terms, task=task, base=base)


def prepare(
    experiment: Experiment,
    study: Study,
    sites: Mapping[str, SiteRecords],
    *,
    home: Path | None,
    say: Say,
) -> Prepared:
    """Load the base and turn every site's records into examples.

    Args:
        experiment: the parsed file.
        study: from ``complete_study``.
        sites: the records.
        home: where base models are cached; None for the platform's folder.
        say: is told what is being done.

    Raises:
        GovernanceError: a site has too few patients, a text, label or answer is empty, or a feature
            is no number.
        ConfigError: a field of the task is missing from a record.
    """
    asked = experiment.study.base  # the study has its plain name, which need not be its place
    model = make_model(study, None if asked is None else resolve(asked.name, home=home))
    _check_fields(sites, fields_read(study.task))
    found = {}
    for name, site in sites.items():
        count = len(site.train) + len(site.test)
        say(f"reading {count} records of site {name}")
        found[name] = one_site(name, site, experiment.simulation, model)
        check_delta(name, study, len(units(found[name].train, study)))
    test = {name: examples.held_out for name, examples in found.items()}
    if study.task.kind == "survival":
        _check_comparable(list(test.values()))
    read = {name: examples.read for name, examples in found.items()}
    dropped = {field for examples in found.values() for field in examples.fields_dropped}
    return Prepared(
        experiment=experiment,
        study=study,
        model=model,
        records=sites,
        train={name: examples.train for name, examples in found.items()},
        test=test,
        notes=(*_notes(experiment.simulation, sites, study, read, test), *_dropped(dropped)),
    )


def one_site(name: str, records: SiteRecords, terms: SimulationTerms, model: Model) -> SiteExamples:
    """Return what a model reads of one site, by the way that records take at a hospital.

    Raises:
        HuizhenError: as ``prepare`` says.
    """
    policy = _policy(name, terms, terms.minimum_patients)
    admitted = admit(records.train, policy, held_out=records.test)
    return site_examples(admitted, model.encoder(), model)


def round_two_digits(number: int) -> int:
    """Return a size rounded to two significant digits: 1,259 → 1,300; 96 stays; at least 1."""
    return max(1, int(float(f"{number:.2g}")))


def subset(examples: Examples, share: float, seed: int) -> Examples:
    """Return the records of a random share of the patients."""
    patients = sorted(set(examples.patients))
    keep = max(2, round(share * len(patients)))
    chosen = set(np.random.default_rng(seed).permutation(patients)[:keep].tolist())
    rows = [i for i, patient in enumerate(examples.patients) if patient in chosen]
    return examples.take(rows)


def _with_digests(terms: BaseTerms, home: Path | None) -> BaseTerms:
    """Return the section with the name and digests that are the same wherever the folder lies."""
    base = resolve(terms.name, home=home)
    check_digests(terms, base)
    return replace(terms, name=base.name, digests=dict(base.digests))


def _check_comparable(test: Sequence[Examples]) -> None:
    """Refuse test records of which no two have an order."""
    times = times_of([row for one in test for row in one.ids])
    events = np.array([label == 1 for one in test for label in one.labels], bool)
    if concordance_index(times, events, np.zeros(len(times), np.float32)) is None:
        raise ConfigError(
            "no two test records can be compared, a C-index needs one with the event and one that "
            "was followed for longer: hold out more"
        )


def _check_fields(sites: Mapping[str, SiteRecords], wanted: Sequence[str]) -> None:
    """Refuse a task that reads a field that no record has."""
    known = {name for site in sites.values() for record in site.train for name in record.fields}
    for name in wanted:
        if name not in known:
            raise ConfigError(
                f"[task] reads the field {name!r}, no record has it{nearest(name, known)}"
            )


def _dropped(names: Set[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return (f"De-identification dropped the fields {', '.join(sorted(names))}.",)


def _policy(site: str, terms: SimulationTerms, minimum: int) -> SitePolicy:
    """Return a made-up site's policy."""
    return SitePolicy(
        site=site,
        minimum_patients=minimum,
        allowed_fields=terms.allowed_fields,
        withheld_fields=(terms.patient,),
    )


def _labels(sites: Mapping[str, SiteRecords], field: str) -> tuple[str, ...]:
    values = {
        name_of(record.fields.get(field), field, record.place)
        for site in sites.values()
        for record in site.train
    } - {""}
    if len(values) < 2:
        raise ConfigError(
            f"[task] label {field!r} has {len(values)} classes in the training records, "
            "a classification needs two: name another field"
        )
    return tuple(sorted(values))


def _label_texts(
    sites: Mapping[str, SiteRecords], field: str, text: str | None, labels: tuple[str, ...]
) -> tuple[str, ...]:
    if text is None:
        return ()
    texts: dict[str, str] = {}
    for site in sites.values():
        for record in site.train:
            label = name_of(record.fields.get(field), field, record.place)
            if label not in labels:
                continue
            own = str(record.fields.get(text) or "")
            if texts.setdefault(label, own) != own:
                raise ConfigError(
                    f"[task] label_text {text!r} differs between records of class {label!r}, it "
                    "must be public knowledge of the class: name another field"
                )
    missing = [label for label in labels if not texts.get(label)]
    if missing:
        raise ConfigError(f"[task] label_text {text!r} is empty for class {missing[0]!r}: fill it")
    return tuple(texts[label] for label in labels)


def _notes(
    terms: SimulationTerms,
    sites: Mapping[str, SiteRecords],
    study: Study,
    train: Mapping[str, Examples],
    test: Mapping[str, Examples],
) -> tuple[str, ...]:
    notes = []
    if isinstance(terms.site, BinTerms) and (lost := sites.get(UNKNOWN)):
        notes.append(
            f"{len(lost.train) + len(lost.test)} records have no number in {terms.site.field!r}: "
            f"they are the site {UNKNOWN!r}."
        )
    holders = Counter(
        patient
        for site in sites.values()
        for patient in {record.patient for record in (*site.train, *site.test)}
    )
    if several := sum(count > 1 for count in holders.values()):
        notes.append(
            f"{several} patient ids stand at several sites: if they are the same people, their "
            "epsilon adds up over those sites."
        )
    cut = sum(e.cut for e in (*train.values(), *test.values()))
    total = sum(len(e.ids) for e in (*train.values(), *test.values()))
    if cut and study.task.is_linear:
        notes.append(
            f"{cut} of {total} records had a feature outside its public range, moved to the edge."
        )
    elif cut:
        notes.append(
            f"{cut} of {total} texts were longer than max_tokens = {study.task.max_tokens} and cut."
        )
    unlisted = sum(label == UNSEEN for e in train.values() for label in e.labels)
    if unlisted:
        notes.append(
            f"{unlisted} training records have a class that [task] labels leaves out: not used."
        )
    unseen = sum(label == UNSEEN for e in test.values() for label in e.labels)
    if unseen:
        notes.append(
            f"{unseen} test records have a class that the study does not list: each counts as an "
            "error."
        )
    return tuple(notes)
