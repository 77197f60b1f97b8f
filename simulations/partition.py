"""Made-up sites: who holds which record, and which records are kept for the test."""

import bisect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from huizhen.client.records.record import Record
from huizhen.client.records.rows import read_rows, to_record, whole
from huizhen.learning.tasks import name_of
from huizhen.learning.template import nearest
from huizhen.protocol.errors import ConfigError, GovernanceError
from huizhen.simulations.baseline import check_ancestors
from huizhen.simulations.experiment import BinTerms, PartitionTerms, SimulationTerms, SplitTerms

UNKNOWN = "unknown"  # the site of records without the number whose ranges are the sites


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
        ConfigError: a field is missing from the data, the split names other than train and test, or
            it leaves either empty.
        GovernanceError: a record has no patient id, a site, split or class is a list, or a patient
            of a site stands in training and in test; or the sites' policy does not let the
            baseline read its field.
    """
    path = Path(terms.data)
    records = [
        to_record(fields, terms.patient, place)
        for place, fields in whole(read_rows(path, encoding=terms.encoding))
    ]
    if not records:
        raise ConfigError(f"{terms.data!r} holds no records, expected at least one a site")
    if terms.ancestors is not None:
        check_ancestors(records, terms)
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
    for name, site in sites.items():  # an id is a patient of one site: others may number alike
        both = {record.patient for record in site.train} & {r.patient for r in site.test}
        if both:
            raise GovernanceError(
                f"{len(both)} patients of site {name!r} stand in training and in test, none may: "
                "split by patient"
            )
    if not any(site.test for site in sites.values()):
        raise ConfigError(
            f"{terms.data!r} has no test records, some are needed: write 'test' in the field "
            f"{terms.split!r}, or let [simulation] split draw them"
        )
    return sites


def _natural(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdecimal() and len(name) < 20 else (1 << 62, name)


def _name(record: Record, field: str, what: str) -> str:
    name = name_of(record.fields.get(field), field, record.place)
    if not name:
        raise ConfigError(
            f"{record.place}: there is no {what} in the field {field!r}"
            f"{nearest(field, record.fields)}"
        )
    return name


def _site_of(
    records: list[Record], terms: SimulationTerms, label: str | None
) -> Callable[[Record], str]:
    if isinstance(terms.site, BinTerms):
        bins = terms.site
        if all(_bin(record.fields.get(bins.field), bins) == UNKNOWN for record in records):
            known = {name for record in records for name in record.fields} - {bins.field}
            raise ConfigError(
                f"[simulation] site reads the field {bins.field!r}, no record has a number in it"
                f"{nearest(bins.field, known)}"
            )
        return lambda record: _bin(record.fields.get(bins.field), bins)
    if terms.site is not None:
        field = terms.site
        return lambda record: _name(record, field, "site")
    if terms.partition is None:
        raise ConfigError("[simulation] needs either 'site' or 'partition'")
    dealt = _dirichlet(records, terms.partition, label)
    return lambda record: dealt[record.patient]


def _bin(value: Any, terms: BinTerms) -> str:
    """Return the name of the range that a value lies in."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        return UNKNOWN
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
            value = _name(record, label, "label") if label else ""
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
    return lambda record: _name(record, by, "group") in held_out


def _named_split(record: Record, field: str) -> bool:
    value = _name(record, field, "split")
    if value not in ("train", "test"):
        raise ConfigError(f"{record.place}: {field!r} is neither 'train' nor 'test'")
    return value == "test"


def _draw(records: list[Record], terms: SplitTerms) -> frozenset[str]:
    """Return the groups that are held out, at whatever sites their records are."""
    values = sorted({_name(record, terms.by, "group") for record in records})
    count = round(terms.test * len(values))
    if not 0 < count < len(values):
        raise ConfigError(
            f"[simulation] split holds out {count} of {len(values)} groups by {terms.by!r}, "
            f"expected some and not all: change test = {terms.test:g}, or by"
        )
    order = np.random.default_rng(terms.seed).permutation(len(values))
    return frozenset(values[i] for i in order[:count])
