"""Who is held out: whole patients, in the same share of every class, and the same ones for ever.

A patient who was trained on must never be measured on, so each keeps the side that was once drawn;
only new ones are drawn, so that every stratum comes as near to the share as the old ones leave
room for. Who comes first among the new is decided by a keyed hash: by nothing that a hospital's
numbers of patients say, such as when they came.
"""

import hmac
from collections.abc import Mapping


def draw(
    strata: Mapping[str, str], share: float, *, before: Mapping[str, bool], key: bytes
) -> dict[str, bool]:
    """Return for each patient whether they are held out.

    Args:
        strata: patient -> class, of all patients.
        share: of the patients to hold out, 0 to below 1.
        before: what was drawn earlier, which stays; patients who are gone count no more.
        key: secret of the site.

    Returns:
        patient -> held out. Where all are new, ``share`` of them to the nearest whole patient,
        halves to training, and of each stratum its share rounded up or down.
    """
    groups: dict[str, list[str]] = {}
    for patient, stratum in strata.items():
        groups.setdefault(stratum, []).append(patient)
    drawn: dict[str, bool] = {}
    wanted = _quotas({stratum: len(some) for stratum, some in groups.items()}, share, key)
    for stratum, patients in groups.items():
        known = [one for one in patients if one in before]
        drawn |= {one: before[one] for one in known}
        new = sorted((one for one in patients if one not in before), key=lambda p: _rank(key, p))
        left = wanted[stratum] - sum(before[one] for one in known)
        for position, one in enumerate(new):
            drawn[one] = position < left
    return {patient: drawn[patient] for patient in strata}


def _quotas(sizes: Mapping[str, int], share: float, key: bytes) -> dict[str, int]:
    """Return how many of each stratum to hold out: its share, and of all the share to the nearest.

    By largest remainder (Hamilton), so that many small classes do not round to nobody.
    """
    quotas = {stratum: int(share * size) for stratum, size in sizes.items()}
    left = _nearest(share * sum(sizes.values())) - sum(quotas.values())
    remainders = sorted(
        sizes, key=lambda one: (quotas[one] - share * sizes[one], _rank(key, f"class {one}"))
    )
    for stratum in remainders[: max(0, left)]:
        quotas[stratum] += 1
    return quotas


def _nearest(number: float) -> int:
    return int(number + 0.5) if number % 1 != 0.5 else int(number)


def _rank(key: bytes, patient: str) -> bytes:
    return hmac.digest(key, patient.encode(), "sha256")
