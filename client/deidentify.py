"""De-identification: what of a record may reach training.

For now: a field allow-list. Only the fields that the study's task reads survive, everything else,
the patient's id among it, is dropped; patients become numbers in the order of their first record.
Free text inside an allowed field is not searched for identifiers yet: a field that may hold any
must not be named by a task.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huizhen.client.governance import Admitted


@dataclass(frozen=True, slots=True)
class CleanRecord:
    """A record after de-identification."""

    patient: int
    # a number with no meaning outside this object
    fields: Mapping[str, Any]
    place: str

    def __repr__(self) -> str:
        return f"CleanRecord(<masked>, {self.place})"


@dataclass(frozen=True, slots=True)
class Deidentified:
    """All that ``examples`` accepts; only ``deidentify`` makes it."""

    site: str
    records: tuple[CleanRecord, ...]
    patients: int
    fields_kept: tuple[str, ...]
    fields_dropped: tuple[str, ...]


def deidentify(admitted: Admitted, allowed: tuple[str, ...]) -> Deidentified:
    """Return the records with the allowed fields alone.

    Args:
        admitted: what governance let pass.
        allowed: the fields that the study's task reads.
    """
    numbers: dict[str, int] = {}
    dropped: set[str] = set()
    records = []
    for record in admitted.records:
        number = numbers.setdefault(record.patient, len(numbers))
        kept = {name: record.fields[name] for name in allowed if name in record.fields}
        dropped |= record.fields.keys() - set(allowed)
        records.append(CleanRecord(number, kept, record.place))
    return Deidentified(
        admitted.site, tuple(records), len(numbers), allowed, tuple(sorted(dropped))
    )
