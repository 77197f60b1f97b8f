"""One record model for every source: what a hospital knows of a patient at one moment.

What a reader cannot make a record of is an ``Unreadable``: whoever reads decides what becomes of
it, nothing is dropped in silence. Nothing here shows what a record says: each ``repr`` is masked.

Times are ISO 8601 texts as precise as the source: ``2023``, ``2023-05``, ``2023-05-06`` or
``2023-05-06T08:30:00``, with an offset where the source has one (``records/times.py``).
"""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from huizhen.protocol.errors import GovernanceError

Sex = Literal["", "female", "male", "other"]
Comparator = Literal["", "<", "<=", ">", ">="]
FindingKind = Literal["condition", "phenotype", "procedure", "drug", "allergy", "other"]
_WHOLE = re.compile(r"\d+\.0+", re.ASCII)
MAX_ENTRY_BYTES = 16 << 20
# one line, message, resource or document; larger ones are refused before they are parsed


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something coded: a diagnosis, a phenotype, a drug."""

    code: str
    # without its system's name: "E11.9", "HP:0001250"; empty where there is only a name
    system: str = ""
    # lower-case: "icd-10", "icd-10-cn", "snomed", "loinc", "hpo", "rxnorm", "omop"; otherwise the
    # URI or OID that the source gives; empty for a hospital's own codes
    name: str = ""
    # as the source writes it
    kind: FindingKind = "other"
    time: str = ""
    is_absent: bool = False
    # looked for and not there

    def __repr__(self) -> str:
        return "Finding(<masked>)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """A laboratory result or another measured value."""

    code: str
    # as the source codes it: a LOINC code, or the hospital's own
    system: str = ""
    # as of a finding
    name: str = ""
    value: float | None = None
    # None: the result is not a number
    comparator: Comparator = ""
    # of a value beyond what the instrument measures: "<0.01" is 0.01 with "<"
    text: str = ""
    # the result as the source writes it: "<0.01", "阳性"
    unit: str = ""
    # as the source writes it
    low: float | None = None
    high: float | None = None
    # the reference range, in that unit
    time: str = ""

    def __repr__(self) -> str:
        return "Lab(<masked>)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image that a record refers to; its pixels stay in their file."""

    path: str
    # as the source names it
    modality: str = ""
    # DICOM's code: "CT", "MR", "DX"
    frames: int = 1

    def __repr__(self) -> str:
        return f"Image(<masked>, {self.modality})"


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a hospital's export; its content never shows in logs or errors."""

    patient: str
    # the hospital's own number of the patient
    fields: Mapping[str, Any]
    # what has no place below, by the source's own names
    place: str
    # file and line, row, segment or resource
    kind: str = ""
    # what the entry is: "patient", "encounter", "note", "labs", "diagnosis", "report", "image", …
    encounter: str = ""
    # the hospital's own number of the visit or stay
    time: str = ""
    text: str = ""
    findings: tuple[Finding, ...] = ()
    labs: tuple[Lab, ...] = ()
    images: tuple[Image, ...] = ()
    sex: Sex = ""
    birth: str = ""
    # a time
    death: str = ""
    # a time
    age: float | None = None
    # in years at the time of the record, where the source gives it
    identifiers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # what names the patient, to be found in texts and removed: "name", "id", "phone", "mrn",
    # "insurance", "address", "email", "relative", "employer"; it goes no further than that

    def __repr__(self) -> str:
        return f"Record(<masked>, {self.place})"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An entry that is no record."""

    place: str
    problem: str
    # what was found, what was expected: what to do; nothing of the entry's content


Entry = Record | Unreadable


def patient_of(value: Any, where: str, place: str) -> str:
    """Return a patient's id as text.

    A whole number is one id however it is written, 7, 7.0 or ７: a column with gaps makes 7.0 of 7.

    Args:
        value: what the source has.
        where: what the source calls it, such as the name of a column.
        place: of the entry.

    Raises:
        GovernanceError: there is none, without which no patient can be protected.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or isinstance(value, bool) or not str(value).strip():
        raise GovernanceError(
            f"{place}: record has no patient id in {where!r}, every record needs one: "
            "fill it, or name the right field"
        )
    text = unicodedata.normalize("NFKC", str(value)).strip()
    return text.partition(".")[0] if _WHOLE.fullmatch(text) else text
