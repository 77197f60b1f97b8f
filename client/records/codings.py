"""Code systems and administrative codes by one short name, however a format writes them.

FHIR and the phenopackets name a code system by URI or prefix, CDA by OID (HL7 registry; the Chinese
shared documents, WS/T 500, by OIDs under 2.16.156.10011), HL7 v2 by a word of its table 0396.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from huizhen.client.records.record import Sex

# each short name, and what formats write for it: URI, OID, word of HL7 table 0396, prefix
_SYSTEMS: Final[dict[str, tuple[str, ...]]] = {
    "icd-10": (
        "http://hl7.org/fhir/sid/icd-10",
        "http://id.who.int/icd/release/10",
        "2.16.840.1.113883.6.3",
        "I10",
        "ICD10",
        "ICD-10",
    ),
    "icd-10-cn": ("http://hl7.org/fhir/sid/icd-10-cn", "2.16.156.10011.2.3.3.11", "ICD-10-CN"),
    "icd-10-cm": (
        "http://hl7.org/fhir/sid/icd-10-cm",
        "2.16.840.1.113883.6.90",
        "I10C",
        "ICD10CM",
        "ICD-10-CM",
    ),
    "icd-10-pcs": (
        "http://www.cms.gov/Medicare/Coding/ICD10",
        "http://hl7.org/fhir/sid/icd-10-pcs",
        "2.16.840.1.113883.6.4",
        "I10P",
    ),
    "icd-11": (
        "http://id.who.int/icd/release/11/mms",
        "http://hl7.org/fhir/sid/icd-11",
        "2.16.840.1.113883.6.347",
    ),
    "icd-9": ("http://hl7.org/fhir/sid/icd-9", "I9"),
    "icd-9-cm": (
        "http://hl7.org/fhir/sid/icd-9-cm",
        "2.16.840.1.113883.6.103",
        "2.16.840.1.113883.6.104",
        "2.16.840.1.113883.6.2",
        "I9C",
        "I9M",
        "I9CDX",
        "I9CP",
        "ICD9CM",
    ),
    "icd-9-cm-3": ("2.16.156.10011.2.3.3.12", "ICD-9-CM-3"),
    "icd-o-3": ("http://terminology.hl7.org/CodeSystem/icd-o-3", "2.16.840.1.113883.6.43.1"),
    "snomed": (
        "http://snomed.info/sct",
        "2.16.840.1.113883.6.96",
        "SCT",
        "SNOMED",
        "SNOMED-CT",
        "SNOMEDCT",
    ),
    "loinc": ("http://loinc.org", "2.16.840.1.113883.6.1", "LN", "LOINC"),
    "hpo": (
        "http://human-phenotype-ontology.org",
        "http://purl.obolibrary.org/obo/hp.owl",
        "http://purl.obolibrary.org/obo/hp.fhir",
        "2.16.840.1.113883.6.339",
        "HP",
        "HPO",
    ),
    "mondo": ("http://purl.obolibrary.org/obo/mondo.owl", "MONDO"),
    "omim": ("http://www.omim.org", "http://omim.org", "2.16.840.1.113883.6.174", "OMIM"),
    "orphanet": ("http://www.orpha.net", "ORPHA", "ORDO", "ORPHANET"),
    "ncit": (
        "http://ncicb.nci.nih.gov/xml/owl/EVS/Thesaurus.owl",
        "http://purl.obolibrary.org/obo/ncit.owl",
        "2.16.840.1.113883.3.26.1.1",
        "NCIT",
    ),
    "rxnorm": (
        "http://www.nlm.nih.gov/research/umls/rxnorm",
        "2.16.840.1.113883.6.88",
        "RXNORM",
    ),
    "atc": ("http://www.whocc.no/atc", "2.16.840.1.113883.6.73", "ATC"),
    "ndc": ("http://hl7.org/fhir/sid/ndc", "2.16.840.1.113883.6.69", "NDC"),
    "cvx": ("http://hl7.org/fhir/sid/cvx", "2.16.840.1.113883.12.292", "CVX"),
    "cpt": ("http://www.ama-assn.org/go/cpt", "2.16.840.1.113883.6.12", "C4", "CPT"),
    "ucum": ("http://unitsofmeasure.org", "2.16.840.1.113883.6.8", "UCUM"),
    "dicom": (
        "http://dicom.nema.org/resources/ontology/DCM",
        "1.2.840.10008.2.16.4",
        "DCM",
    ),
    "omop": ("https://fhir-terminology.ohdsi.org", "OMOP"),
    "": ("L",),  # HL7 table 0396: a local code
}
_EDITIONS: Final = ("http://snomed.info/sct/", "2.16.156.10011.2.3.3.11.")
# what continues one of these is an edition or a part of the same system

_SEXES: Final[dict[str, Sex]] = {
    **dict.fromkeys(("m", "male", "1", "男", "男性"), "male"),
    **dict.fromkeys(("f", "female", "2", "女", "女性"), "female"),
    **dict.fromkeys(("o", "other", "a", "un", "x"), "other"),
}


@dataclass(frozen=True, slots=True)
class Concept:
    """One meaning: the coding that says it best, and the others."""

    code: str = ""
    system: str = ""
    name: str = ""
    # the coding's own, otherwise the text
    text: str = ""
    # as the author wrote it
    others: tuple[str, ...] = ()
    # the other codings, each "system|code"

    def __repr__(self) -> str:
        return "Concept(<masked>)"


def best_concept(codings: Sequence[tuple[str, str, str]], text: str, prefer: str = "") -> Concept:
    """Return the meaning that several codings share.

    Args:
        codings: each code, short name of its system, and name.
        text: what the author wrote.
        prefer: the system whose code counts; otherwise the first well-known one.
    """
    if not codings:
        return Concept(name=text, text=text)

    def rank(i: int) -> int:
        code, system, _ = codings[i]
        if not code:
            return 3
        return 0 if system == prefer else 1 if system and system in _SYSTEMS else 2

    best = min(range(len(codings)), key=rank) if len(codings) > 1 else 0
    code, system, name = codings[best]
    others = tuple(f"{s}|{c}" for i, (c, s, _) in enumerate(codings) if c and i != best)
    return Concept(code, system, name or text, text, others)


def _key(given: str) -> str:
    key = given.strip().lower().removeprefix("urn:oid:").rstrip("/#")
    return "http://" + key.removeprefix("https://") if key.startswith("https://") else key


_BY_KEY: Final = {_key(form): name for name, forms in _SYSTEMS.items() for form in forms}


@lru_cache(maxsize=4096)
def system_name(given: str) -> str:
    """Return the short name of a code system; empty for a hospital's own codes.

    Args:
        given: a URI, an OID with or without ``urn:oid:``, a prefix, a word of HL7 table 0396.

    Returns:
        Such as "snomed" or "icd-10-cn"; of a system that is not known, what was given, without
        ``urn:oid:`` and at most 200 characters of it.
    """
    key = _key(given)
    if (name := _BY_KEY.get(key)) is not None:
        return name
    for edition in _EDITIONS:
        if key.startswith(edition):
            return _BY_KEY[edition.rstrip("/.")]
    if len(key) == 5 and key.startswith("99"):  # table 0396: 99zzz is a local system
        return ""
    bare = given.strip()
    return (bare[8:] if bare[:8].lower() == "urn:oid:" else bare)[:200]


def sex_of(given: str) -> Sex:
    """Return the sex that an administrative code says; empty for what says none.

    Known are FHIR's words, HL7 table 0001, GB/T 2261.1 (1 male, 2 female) and 男, 女.
    """
    return _SEXES.get(given.strip().lower(), "")
