"""What the data custodian must have decided before a record may be used."""

from collections.abc import Sequence
from dataclasses import dataclass

from huizhen.client.records import Record
from huizhen.protocol.errors import GovernanceError


@dataclass(frozen=True, slots=True, kw_only=True)
class SitePolicy:
    """What one site demands of its own data."""

    site: str
    minimum_patients: int = 2
    # with fewer, what leaves says too much about each, whatever the noise


@dataclass(frozen=True, slots=True)
class Admitted:
    """Records that governance let pass, and why; only ``admit`` makes it."""

    site: str
    records: tuple[Record, ...]
    patients: int
    reasons: tuple[str, ...]


def admit(records: Sequence[Record], policy: SitePolicy) -> Admitted:
    """Return the records that may be used.

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
    return Admitted(
        policy.site,
        tuple(records),
        patients,
        (f"{patients} patients, at least {policy.minimum_patients} demanded",),
    )
