"""What a ledger states: its totals, and one JSON document that can be checked without the file.

The alliance or a regulator needs neither the hospital's disk nor its word: every entry, every rule,
every reservation against the cap of its day and the totals follow again from the entries alone.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from huizhen.protocol.accounting import ACCOUNTANT, Spend
from huizhen.protocol.errors import ConfigError, PrivacyError
from huizhen.protocol.ledger import Account, StudyAccount, check_witnessed, exact, replay, times
from huizhen.protocol.ledger_entries import Cap, Head, Unit
from huizhen.protocol.strict import MAX_WHOLE

FORMAT = "huizhen ledger 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyTotals:
    """One study's part; the ε of studies do not add up to the ledger's, which composes tighter."""

    study: str
    spend: Spend
    # of one round
    rounds_reserved: int
    rounds_charged: int
    last_round: int
    # 0 before the first
    is_closed: bool
    epsilon_charged: float
    # of this study alone, at the cap's delta
    epsilon_committed: float
    # with what is still reserved
    metrics_epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What a ledger has spent, promised and left, per unit of privacy at the cap's delta."""

    site: str
    cohort: str
    unit: Unit
    cap: Cap
    head: Head
    epsilon_charged: float
    epsilon_committed: float
    # charged and still reserved, composed
    epsilon_left: float
    # up to the cap; what fits must be composed, not subtracted
    metrics_epsilon: float
    metrics_left: float
    epsilon_with_metrics: float
    # of one that was trained on and held out
    studies: tuple[StudyTotals, ...]


def totals(account: Account) -> Totals:
    """Return what a ledger has spent, reserved and left.

    Raises:
        PrivacyError: the accountant cannot certify an ε.
    """
    charged = account.epsilon(account.charged())
    committed = account.epsilon(account.committed())
    metrics = account.metrics_epsilon
    return Totals(
        site=account.site,
        cohort=account.cohort,
        unit=account.unit,
        cap=account.cap,
        head=account.head,
        epsilon_charged=charged,
        epsilon_committed=committed,
        epsilon_left=max(0.0, account.cap.epsilon - committed),
        metrics_epsilon=float(metrics),
        metrics_left=max(0.0, float(exact(account.cap.metrics_epsilon) - metrics)),
        epsilon_with_metrics=charged + float(metrics),
        studies=tuple(_study_totals(account, study) for study in account.studies.values()),
    )


def export(account: Account) -> dict[str, Any]:
    """Return a ledger as JSON values that ``verify_export`` checks without the ledger's file.

    Raises:
        PrivacyError: the accountant cannot certify an ε.
    """
    return {
        "format": FORMAT,
        "accountant": ACCOUNTANT,
        "entries": [entry.to_json() for entry in account.entries],
        "totals": dataclasses.asdict(totals(account)),
    }


def verify_export(data: bytes, witnessed: Head | None = None) -> Account:
    """Return the account in an exported ledger after checking all that it says.

    Every entry, rule and reservation is checked and the totals are computed anew; what was exported
    is not trusted for anything but its entries.

    Raises:
        ConfigError: it is not an exported ledger, or of a newer version.
        PrivacyError: an entry is wrong, the totals are not those of the entries, or a witnessed
            entry is missing.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ConfigError("export is not JSON, expected what 'site ledger export' wrote") from error
    keys = {"format", "accountant", "entries", "totals"}
    if not isinstance(value, dict) or value.keys() != keys or value["format"] != FORMAT:
        raise ConfigError(f"export is not of the format {FORMAT!r}, or of a newer one")
    if not isinstance(value["entries"], list):
        raise ConfigError("export's entries are not a list")
    account = replay(value["entries"], priced=True)
    if witnessed is not None:
        check_witnessed(account, witnessed)
    for name, found in _differences(value["totals"], dataclasses.asdict(totals(account)), "totals"):
        raise PrivacyError(
            f"export says another {name} than its entries give, {found!r} by {ACCOUNTANT}: "
            "do not rely on it"
        )
    return account


def _study_totals(account: Account, study: StudyAccount) -> StudyTotals:
    spend, charged = study.terms.spend, len(study.charges)
    return StudyTotals(
        study=study.terms.study,
        spend=spend,
        rounds_reserved=study.terms.rounds,
        rounds_charged=charged,
        last_round=study.last_round,
        is_closed=study.closing is not None,
        epsilon_charged=account.epsilon(times(spend, charged)),
        epsilon_committed=account.epsilon(times(spend, study.committed_rounds)),
        metrics_epsilon=float(study.metrics_epsilon),
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _differences(stated: Any, found: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Give each place where what was stated is not what was found, and what was found."""
    if isinstance(found, Mapping):
        if not isinstance(stated, Mapping) or stated.keys() != found.keys():
            yield name, dict(found)
            return
        for key, item in found.items():
            yield from _differences(stated[key], item, f"{name}.{key}")
    elif isinstance(found, tuple):
        if not isinstance(stated, list) or len(stated) != len(found):
            yield name, list(found)
            return
        for i, item in enumerate(found):
            yield from _differences(stated[i], item, f"{name}[{i}]")
    elif not _agree(stated, found):
        yield name, found


def _agree(stated: Any, found: Any) -> bool:
    if isinstance(found, float):
        if type(stated) is int and abs(stated) <= MAX_WHOLE:  # some programs write 8.0 as 8
            stated = float(stated)
        # Processors and libraries round the last digits of ε differently.
        return type(stated) is float and math.isclose(stated, found, rel_tol=1e-6, abs_tol=1e-9)
    return type(stated) is type(found) and bool(stated == found)
