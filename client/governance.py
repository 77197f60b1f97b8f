"""What the data custodian must have decided before a record may be used."""

from collections.abc import Sequence
from dataclasses import dataclass

from huizhen.client.records.record import Record
from huizhen.protocol.errors import GovernanceError


@dataclass(frozen=True, slots=True, kw_only=True)
class SitePolicy:
    """What one site demands of its own data."""

    site: str
    minimum_patients: int = 2
    # with fewer, what leaves says too much about each, whatever the noise
    allowed_fields: tuple[str, ...] | None = None
    # what a task may read; None for any but the withheld ones
    withheld_fields: tuple[str, ...] = ()
    # what no task may read: the patient's id among them


@dataclass(frozen=True, slots=True)
class Admitted:
    """Records that governance let pass, and its rules; only ``admit`` makes it."""

    policy: SitePolicy
    records: tuple[Record, ...]
    held_out: tuple[Record, ...] = ()
    # never trained on: what metrics are computed on


def admit(
    records: Sequence[Record], policy: SitePolicy, *, held_out: Sequence[Record] = ()
) -> Admitted:
    """Return the records that may be used.

    Args:
        records: to train on.
        policy: of the site.
        held_out: to compute metrics on; no minimum applies to them here, since metrics are kept
            back under a minimum of their own.

    Raises:
        GovernanceError: the site has fewer patients than its policy demands.
    """
    patients = len({record.patient for record in records})
    if patients < policy.minimum_patients:
        noun = "patient" if patients == 1 else "patients"
        raise GovernanceError(
            f"site {policy.site!r} has {patients} training {noun}, at least "
            f"{policy.minimum_patients} are needed: leave it out or merge it with another"
        )
    return Admitted(policy, tuple(records), tuple(held_out))
