"""Which fields of a record a task may read: a list of them, everything else is left out.

The patient's id among it: patients become numbers in the order of their first record, those to
train on and those held out in one go, so that a patient of both is found.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huizhen.client.governance import Admitted
from huizhen.protocol.errors import GovernanceError


@dataclass(frozen=True, slots=True)
class SelectedRecord:
    """A record with the fields that a task reads, and no other."""

    patient: int
    # a number with no meaning outside this object
    fields: Mapping[str, Any]
    place: str

    def __repr__(self) -> str:
        return f"SelectedRecord(<masked>, {self.place})"


@dataclass(frozen=True, slots=True)
class Selected:
    """All that ``examples`` accepts; only ``select`` makes it."""

    site: str
    records: tuple[SelectedRecord, ...]
    held_out: tuple[SelectedRecord, ...]
    fields_dropped: tuple[str, ...]


def select(admitted: Admitted, wanted: tuple[str, ...]) -> Selected:
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
        clean.append(SelectedRecord(number, kept, record.place))
    first = len(admitted.records)
    return Selected(policy.site, tuple(clean[:first]), tuple(clean[first:]), tuple(sorted(dropped)))
