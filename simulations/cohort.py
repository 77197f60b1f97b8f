"""Synthetic patients of the demo, drawn from the disease-phenotype frequencies of the HPO.

Which diseases. A disease of OMIM *qualifies* with at least ``MIN_PHENOTYPES`` phenotypes of known
frequency (``hpo.py`` says which are) and at least 4 phenotypes expected per patient. Its *body
system* is the branch under "Phenotypic abnormality" that most of its phenotypes lie in. Families of
four: draw a body system (without repetition while there are others), draw a disease in it, then
draw three of its 6 nearest of the same system (cosine of the frequencies of all phenotypes and
their ancestors, weighted by rarity). No two chosen diseases share a name up to the first comma or
number, since numbered series are often the same picture with another gene.

What a patient has: each phenotype independently, with its frequency as ``hpo.py`` reads it. What a
visit notes: a few of these, some named by a more general parent, now and then one that has nothing
to do with it. Which hospital: diseases are shared out by a Dirichlet(α) affinity of each hospital,
under sizes that fall geometrically. Real patients are neither independent draws nor so tidy: a
result on this cohort says that the software works, not that a diagnosis does.

Whoever shows a cohort shows ``hpo.HPO_NOTICE`` with it.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from math import log, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from huizhen.protocol.errors import ConfigError
from huizhen.simulations.hpo import (
    ABNORMALITY,
    ONSET_YEARS,
    Disease,
    ancestors,
    read_diseases,
    read_ontology,
)
from huizhen.storage.files import write_whole

Record = dict[str, Any]

MIN_PHENOTYPES = 8
VISITS = (0.4, 0.3, 0.2, 0.1)  # of patients with one to four visits


def choose_diseases(count: int, rng: np.random.Generator, *, near: int = 6) -> list[Disease]:
    """Choose ``count`` diseases in families of four by the rule in the module's docstring."""
    systems = _by_system()
    order: list[str] = []
    chosen: list[Disease] = []
    while len(chosen) < count:
        if not order:
            order = [str(s) for s in rng.permutation(sorted(systems))]
        first_names = {_first_name(d) for d in chosen}
        members = [d for d in systems[order.pop()] if _first_name(d) not in first_names]
        if len(members) < near:
            raise ConfigError(
                f"diseases = {count}, the HPO has fewer in families of four: ask less"
            )
        first = members[rng.integers(len(members))]
        ranked = sorted(members, key=lambda d: (-round(_similarity(first, d), 9), d.id))
        nearest: dict[str, Disease] = {}
        for disease in ranked:  # the first itself leads, and stands for its name
            nearest.setdefault(_first_name(disease), disease)
        others = list(islice(nearest.values(), 1, 1 + near))
        family = [first, *(others[i] for i in rng.permutation(len(others))[:3])]
        chosen += family[: count - len(chosen)]
    return chosen


def make_cohort(
    *,
    seed: int,
    sites: int = 6,
    diseases: int = 24,
    patients: int = 900,
    alpha: float = 0.3,
    size_ratio: float = 5.0,
    test_share: float = 0.28,
    terms_per_visit: float = 3.0,
    general_share: float = 0.2,
    noise_share: float = 0.1,
    min_train_patients: int = 30,
) -> list[Record]:
    """Return one record per visit, ordered by site and patient; the same seed, the same records.

    Args:
        seed: of every draw, the choice of the diseases included.
        sites: hospitals, named ``hospital-a`` onwards, the largest first.
        diseases: labels, each with the same number of patients give or take one.
        patients: over all hospitals, both splits.
        alpha: of the Dirichlet distribution of each hospital's affinity to the diseases.
        size_ratio: patients of the largest hospital over those of the smallest.
        test_share: of each hospital's patients, with all their visits.
        terms_per_visit: phenotypes noted at a visit: 1 + Poisson, as far as the patient has them.
        general_share: chance that a phenotype is noted as one of its parents.
        noise_share: chance, per phenotype noted, of one more that the disease does not explain.
        min_train_patients: the least that a hospital may train on.

    Raises:
        ConfigError: the numbers allow no such cohort.
    """
    if not (1 <= sites <= 26 and 2 <= diseases <= patients and alpha > 0 and size_ratio >= 1):
        raise ConfigError(
            f"sites = {sites}, diseases = {diseases}, patients = {patients}, alpha = {alpha}, "
            f"size_ratio = {size_ratio}: need 1 to 26 sites, 2 or more diseases, a patient for "
            "each, alpha > 0, size_ratio >= 1"
        )
    if not (0 < test_share < 1 and terms_per_visit >= 1):
        raise ConfigError(
            f"test_share = {test_share}, terms_per_visit = {terms_per_visit}: need a share between "
            "0 and 1, and 1 or more terms"
        )
    choice_rng, site_rng, patient_rng = (
        np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3)
    )
    chosen = choose_diseases(diseases, choice_rng)
    sizes = _sizes(patients, sites, size_ratio)
    train = sizes - np.rint(sizes * test_share).astype(int)
    if train.min() < min_train_patients:
        raise ConfigError(
            f"the smallest hospital would train on {train.min()} patients, the least is "
            f"{min_train_patients}: raise patients, or lower sites or size_ratio"
        )
    visits = _Visits(patient_rng, terms_per_visit, general_share, noise_share)
    records: list[Record] = []
    number = 0
    for site, labels in enumerate(_share_out(sizes, diseases, alpha, site_rng)):
        is_test = site_rng.permutation(len(labels)) >= train[site]
        for label, test in zip(labels, is_test, strict=True):
            number += 1
            head = {
                "patient": f"p{number:05d}",
                "site": f"hospital-{chr(ord('a') + site)}",
                "split": "test" if test else "train",
            }
            records += visits.of_patient(head, chosen[label])
    return records


def cohort_lines(**kwargs: Any) -> bytes:
    """Return ``make_cohort(**kwargs)`` as JSON lines."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in make_cohort(**kwargs))
    return "".join(lines).encode()


def write_cohort(path: Path, **kwargs: Any) -> Path:
    """Write ``make_cohort(**kwargs)`` as JSON lines, whole or not at all, and return ``path``."""
    write_whole(path, cohort_lines(**kwargs))
    return path


@dataclass(frozen=True, slots=True)
class _Visits:
    """How a patient's phenotypes become what was written down."""

    rng: np.random.Generator
    terms_per_visit: float
    general_share: float
    noise_share: float

    def of_patient(self, head: Record, disease: Disease) -> list[Record]:
        rng = self.rng
        has = disease.draw(rng)
        spans = [ONSET_YEARS[o] for o in disease.onsets] or [(0.0, 40.0)]
        age = rng.uniform(*spans[rng.integers(len(spans))])
        is_male = disease.is_x_linked_recessive or rng.random() < 0.5
        records = []
        for visit in range(1, 1 + int(rng.choice([1, 2, 3, 4], p=VISITS))):
            terms = self.noted(has)
            records.append(
                head
                | {
                    "visit": visit,
                    "disease": disease.id,
                    "label": disease.name,
                    "age_years": round(float(age), 1),
                    "sex": "MALE" if is_male else "FEMALE",
                    "terms": terms,
                    "observed_labels": [read_ontology().names[t] for t in terms],
                }
            )
            age += rng.exponential(0.5)
        return records

    def noted(self, has: Sequence[str]) -> list[str]:
        """Return the phenotypes written down at one visit, each once."""
        rng, ontology = self.rng, read_ontology()
        count = min(len(has), 1 + rng.poisson(self.terms_per_visit - 1))
        noted = [has[i] for i in rng.permutation(len(has))[:count]]
        for i, term in enumerate(noted):
            above = [p for p in ontology.parents[term] if p != ABNORMALITY]
            if above and rng.random() < self.general_share:
                noted[i] = above[rng.integers(len(above))]
        background, weights = _background()
        for _ in range(rng.binomial(count, self.noise_share)):
            noted.append(background[rng.choice(len(background), p=weights)])
        return list(dict.fromkeys(noted))


def _sizes(patients: int, sites: int, ratio: float) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the patients of each hospital, a falling geometric series."""
    ends = np.cumsum(ratio ** -np.linspace(0, 1, sites) if sites > 1 else np.ones(1))
    upto = np.rint(patients * ends / ends[-1]).astype(np.int64)
    return np.asarray(np.diff(upto, prepend=0), np.int64)


def _share_out(
    sizes: np.ndarray[Any, np.dtype[np.int64]],
    diseases: int,
    alpha: float,
    rng: np.random.Generator,
) -> list[list[int]]:
    """Return the labels of each hospital's patients.

    One patient after the other, in random order, goes to a hospital with probability proportional
    to its affinity to the disease and to its free places: both margins hold exactly.
    """
    affinity = rng.dirichlet(np.full(diseases, alpha), len(sizes)) + 1e-9
    free = sizes.astype(float)
    labels: list[list[int]] = [[] for _ in sizes]
    for label in rng.permutation(np.arange(sizes.sum()) % diseases):
        pull = affinity[:, label] * free
        site = rng.choice(len(sizes), p=pull / pull.sum())
        labels[site].append(int(label))
        free[site] -= 1
    return labels


@cache
def _qualifying() -> tuple[Disease, ...]:
    return tuple(
        d for d in read_diseases() if d.known >= MIN_PHENOTYPES and sum(d.frequencies.values()) >= 4
    )


@cache
def _by_system() -> dict[str, list[Disease]]:
    """Return the qualifying diseases of each body system that has enough of them for a family."""
    parents = read_ontology().parents
    systems: dict[str, list[Disease]] = defaultdict(list)
    for disease in _qualifying():
        branches: Counter[str] = Counter()
        for term in disease.frequencies:
            lineage = (term, *ancestors(term))
            branches.update(t for t in lineage if ABNORMALITY in parents[t])
        systems[min(branches, key=lambda t: (-branches[t], t))].append(disease)
    return {system: members for system, members in systems.items() if len(members) >= 24}


@cache
def _profiles() -> dict[str, dict[str, float]]:
    """Return the unit vector of each qualifying disease over phenotypes and their ancestors.

    A term's share is the largest below it; its weight the logarithm of how few diseases have it.
    """
    shares: dict[str, dict[str, float]] = {}
    for disease in _qualifying():
        share: dict[str, float] = {}
        for term, frequency in disease.frequencies.items():
            for t in (term, *ancestors(term)):
                share[t] = max(frequency, share.get(t, 0.0))
        shares[disease.id] = share
    holders = Counter(t for share in shares.values() for t in share)
    profiles = {}
    for disease_id, share in shares.items():
        weighted = {t: f * log(len(shares) / holders[t]) for t, f in sorted(share.items())}
        norm = sqrt(sum(w * w for w in weighted.values()))
        profiles[disease_id] = {t: w / norm for t, w in weighted.items()}
    return profiles


def _similarity(a: Disease, b: Disease) -> float:
    """Return the cosine of two qualifying diseases."""
    one, other = _profiles()[a.id], _profiles()[b.id]
    return sum(w * other.get(t, 0.0) for t, w in one.items())


@cache
def _background() -> tuple[list[str], np.ndarray[Any, np.dtype[np.float64]]]:
    """Return every phenotype of OMIM's diseases and its share of the annotations."""
    counts = Counter(t for d in read_diseases() for t in d.frequencies)
    terms = sorted(counts)
    weights = np.array([counts[t] for t in terms], float)
    return terms, weights / weights.sum()


def _first_name(disease: Disease) -> str:
    return re.split(r"[,;(]| \d| type ", disease.name.lower(), maxsplit=1)[0].strip()
