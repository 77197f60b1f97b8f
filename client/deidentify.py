"""De-identification: what of a record may reach training.

For now: a field allow-list. Only the fields that the study's task reads survive, everything else,
the patient's id among it, is dropped; patients become numbers in the order of their first record,
those to train on and those held out in one go, so that a patient of both is found.
Free text inside an allowed field is not searched for identifiers yet: a field that may hold any
must not be named by a task.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huizhen.client.governance import Admitted
from huizhen.protocol.errors import GovernanceError


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
    held_out: tuple[CleanRecord, ...]
    fields_dropped: tuple[str, ...]


def deidentify(admitted: Admitted, wanted: tuple[str, ...]) -> Deidentified:
    """Return the records with the wanted fields alone.

    Args:
        admitted: what governance let pass.
        wanted: the fields that the study's task reads.

    Raises:
        GovernanceError: the site's policy does not allow a wanted field.
    """
    policy = admitted.policy
    for name in wanted:
        listed = policy.allowed_fields is None or name in policy.allowed_fields
        if not listed or name in policy.withheld_fields:
            raise GovernanceError(
                f"[task] reads the field {name!r}, the policy of site {policy.site!r} does not let "
                "it: take it out of the task"
            )
    numbers: dict[str, int] = {}
    dropped: set[str] = set()
    clean = []
    for record in (*admitted.records, *admitted.held_out):
        number = numbers.setdefault(record.patient, len(numbers))
        kept = {name: record.fields[name] for name in wanted if name in record.fields}
        dropped |= record.fields.keys() - set(wanted)
        clean.append(CleanRecord(number, kept, record.place))
    first = len(admitted.records)
    return Deidentified(
        policy.site, tuple(clean[:first]), tuple(clean[first:]), tuple(sorted(dropped))
    )
