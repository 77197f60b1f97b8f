"""On what ground a record may be used, and which may not.

Nothing is used after the day on which an ethics committee's reference ends. A patient who has
withdrawn is left out from the next snapshot on; so is text of a genome, which names its patient and
their kin whatever is replaced (Gymrek et al., Science 2013).
"""

import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import Any

from huizhen.client.data_key import Pseudonyms
from huizhen.client.data_terms import GovernanceTerms
from huizhen.client.records.record import Record, patient_of
from huizhen.protocol.errors import ConfigError, GovernanceError

_LETTERS = re.compile(r"[ACGTUN]{60,}", re.IGNORECASE)
# a read of a sequencer, or a line of FASTA; no word is so long
_BLOCKS = re.compile(r"(?:\b[ACGTUN]{10}\s+(?:\d+\s+)?){5,}", re.IGNORECASE)
# of ten letters, as GenBank writes it
_VCF = re.compile(
    r"##fileformat=VCF|^#CHROM\tPOS\t|^(?:chr)?[\dXYM]{1,2}\t\d+\t\S+\t[ACGTN]+\t", re.M
)
_VARIANTS = re.compile(r"\brs\d{4,}\b|\b(?:NC|NG)_\d+\.\d+:g\.\d", re.IGNORECASE)
MAX_VARIANTS = 20
# of those polymorphisms 30 to 80 single out one person (Lin, Owen, Altman, Science 2004)
MAX_EXCLUDED_BYTES = 64 << 20


class Reason(StrEnum):
    """Why a record may not be used."""

    WITHDRAWN = "withdrawn"
    # its patient does not want it
    GENOMIC = "genomic"
    DOUBTFUL = "doubtful"
    # its patient's number may be of two people
    LIKE_TRAINING = "like_training"
    # held out, and it says what a record to train on says


@dataclass(frozen=True, slots=True)
class AdmittedRecord:
    """A record and the ground on which it may be used; only a ``Gate`` makes it."""

    record: Record
    ground: GovernanceTerms


class Gate:
    """Lets pass what may be used."""

    def __init__(self, terms: GovernanceTerms, excluded: Set[str], pseudonyms: Pseudonyms) -> None:
        """Prepare.

        Args:
            terms: of the data.
            excluded: patients who have withdrawn, by the hospital's number or by pseudonym.
            pseudonyms: of the site.
        """
        self.terms, self._excluded, self._pseudonyms = terms, excluded, pseudonyms

    def admit(self, record: Record) -> AdmittedRecord | Reason:
        """Return the record with its ground, or why it may not be used."""
        if self.excludes(record.patient):
            return Reason.WITHDRAWN
        words = [record.text, *(one.name for one in record.findings)]
        words += [one.text for one in record.labs]
        if any(is_genomic(text) for text in (*words, *_texts(record.fields))):
            return Reason.GENOMIC
        return AdmittedRecord(record, self.terms)

    def excludes(self, patient: str) -> bool:
        """Tell whether a patient, by the hospital's number, has withdrawn."""
        if not self._excluded:
            return False
        return patient in self._excluded or self._pseudonyms.patient(patient) in self._excluded


def check_ground(terms: GovernanceTerms, today: date) -> None:
    """Refuse what an ethics committee's reference covers no more.

    Raises:
        GovernanceError: its last day is over.
    """
    last = terms.expires()
    if last is not None and today > last:
        raise GovernanceError(
            f"[governance] ethics {terms.ethics[:80]!r} ended on {last.isoformat()}, today is "
            f"{today.isoformat()}: have it renewed, then change ethics_expires"
        )


def is_genomic(text: str) -> bool:
    """Tell whether a text holds a sequence, a table of variants, or many of them."""
    if len(text) < 20:
        return False
    if _LETTERS.search(text) or _BLOCKS.search(text) or _VCF.search(text):
        return True
    low = text.lower()
    is_worth_it = "rs" in low or ":g." in low
    return is_worth_it and sum(1 for _ in _VARIANTS.finditer(text)) >= MAX_VARIANTS


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts of a field, in lists and tables too, a list's also as one."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from map(str, value)
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list | tuple):
        texts = [text for one in value for text in _texts(one)]
        yield " ".join(texts)


def read_excluded(path: Path) -> frozenset[str]:
    """Return the patients in a file, one a line; empty lines and those after ``#`` are not.

    Raises:
        ConfigError: it cannot be read, or is too large.
    """
    try:
        if path.stat().st_size > MAX_EXCLUDED_BYTES:
            raise ConfigError(f"{str(path)!r} has over {MAX_EXCLUDED_BYTES} bytes: split the data")
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read {str(path)!r}, expected patients in UTF-8, one a line"
        ) from error
    named = (line for line in lines if line.strip() and not line.startswith("#"))
    return frozenset(patient_of(line, path.name, path.name) for line in named)
