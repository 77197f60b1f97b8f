"""Made-up sites: who holds which record, and which records are kept for the test."""

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from huizhen.client.records import Record, read_rows, to_record
from huizhen.learning.template import nearest
from huizhen.protocol.errors import ConfigError, GovernanceError
from huizhen.simulations.experiment import BinTerms, PartitionTerms, SimulationTerms, SplitTerms


@dataclass(frozen=True, slots=True)
class SiteRecords:
    """What one made-up hospital holds."""

    train: tuple[Record, ...]
    test: tuple[Record, ...]

    def patients(self) -> int:
        """Return the number of training patients."""
        return len({record.patient for record in self.train})


def read_sites(terms: SimulationTerms, label: str | None) -> dict[str, SiteRecords]:
    """Return the records of each site, in the order of the sites' names.

    Args:
        terms: the ``[simulation]`` section.
        label: the field of the class, for a Dirichlet partition.

    Raises:
        ConfigError: a field is missing from the data, or the split names other than train and test.
        GovernanceError: a record has no patient id, or a patient stands in training and in test.
    """
    path = Path(terms.data)
    records = [
        to_record(fields, terms.patient, place)
        for place, fields in read_rows(path, encoding=terms.encoding)
    ]
    if not records:
        raise ConfigError(f"{terms.data!r} holds no records, expected at least one a site")
    site_of = _site_of(records, terms, label)
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(site_of(record), []).append(record)
    is_test = _is_test(groups, terms)
    sites = {}
    for name in sorted(groups, key=_natural):
        test = tuple(record for record in groups[name] if is_test(record))
        train = tuple(record for record in groups[name] if not is_test(record))
        sites[name] = SiteRecords(train, test)
    trained = {record.patient for site in sites.values() for record in site.train}
    both = trained & {record.patient for site in sites.values() for record in site.test}
    if both:
        raise GovernanceError(
            f"{len(both)} patients stand in training and in test, none may: split by patient"
        )
    if not any(site.test for site in sites.values()):
        raise ConfigError(f"{terms.data!r} has no test records: set [simulation] split")
    return sites


def _natural(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdecimal() and len(name) < 20 else (1 << 62, name)


def _field(record: Record, name: str, what: str) -> Any:
    if name not in record.fields or record.fields[name] in (None, ""):
        raise ConfigError(
            f"{record.place}: there is no {what} in the field {name!r}"
            f"{nearest(name, record.fields)}"
        )
    return record.fields[name]


def _site_of(
    records: list[Record], terms: SimulationTerms, label: str | None
) -> Callable[[Record], str]:
    if isinstance(terms.site, BinTerms):
        bins = terms.site
        return lambda record: _bin(record.fields.get(bins.field), bins)
    if terms.site is not None:
        field = terms.site
        return lambda record: str(_field(record, field, "site"))
    if terms.partition is None:
        raise ConfigError("[simulation] needs either 'site' or 'partition'")
    dealt = _dirichlet(records, terms.partition, label)
    return lambda record: dealt[record.patient]


def _bin(value: Any, terms: BinTerms) -> str:
    """Return the name of the range that a value lies in."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return "unknown"
    names = [f"{terms.field} {low:g} to {high:g}" for low, high in pairwise(terms.below)]
    names = [
        f"{terms.field} under {terms.below[0]:g}",
        *names,
        f"{terms.field} {terms.below[-1]:g} on",
    ]
    return names[bisect.bisect_right(terms.below, number)]


def _dirichlet(
    records: list[Record], terms: PartitionTerms, label: str | None
) -> Mapping[str, str]:
    """Deal whole patients: each class goes to the sites in shares drawn from a Dirichlet.

    Hsu et al. 2019 (https://arxiv.org/abs/1909.06335), by patient instead of by example: a patient
    counts for the class of the first record.
    """
    generator = np.random.default_rng(terms.seed)
    by_class: dict[str, list[str]] = {}
    seen: set[str] = set()
    for record in records:
        if record.patient not in seen:
            seen.add(record.patient)
            value = str(_field(record, label, "label")) if label else ""
            by_class.setdefault(value, []).append(record.patient)
    dealt = {}
    width = len(str(terms.sites))
    for value in sorted(by_class):
        shares = generator.dirichlet([terms.alpha] * terms.sites)
        for patient, site in zip(
            by_class[value],
            generator.choice(terms.sites, size=len(by_class[value]), p=shares),
            strict=True,
        ):
            dealt[patient] = f"site-{site + 1:0{width}d}"
    if len(set(dealt.values())) < terms.sites:
        raise GovernanceError(
            f"partition deals {len(dealt)} patients to {terms.sites} sites and leaves "
            f"{terms.sites - len(set(dealt.values()))} without any: lower sites or raise alpha"
        )
    return dealt


def _is_test(
    groups: Mapping[str, list[Record]], terms: SimulationTerms
) -> Callable[[Record], bool]:
    if isinstance(terms.split, str):
        field = terms.split
        return lambda record: _named_split(record, field)
    by = terms.split.by
    held_out = _draw([r for records in groups.values() for r in records], terms.split)
    return lambda record: str(_field(record, by, "group")) in held_out


def _named_split(record: Record, field: str) -> bool:
    value = str(_field(record, field, "split"))
    if value not in ("train", "test"):
        raise ConfigError(f"{record.place}: {field!r} is neither 'train' nor 'test'")
    return value == "test"


def _draw(records: list[Record], terms: SplitTerms) -> frozenset[str]:
    """Return the groups that are held out, at whatever sites their records are."""
    values = sorted({str(_field(record, terms.by, "group")) for record in records})
    order = np.random.default_rng(terms.seed).permutation(len(values))
    return frozenset(values[i] for i in order[: round(terms.test * len(values))])
