"""The privacy certificate: what was promised to each patient, what it cost, what it rests on.

A value with one encoding, RFC 8785 JSON, whose SHA-256 stands on the printed page. It says in words
of two languages what the numbers assume and leave out, so that it can be read without the software,
and it holds all that is needed to compute the numbers anew: ``check_certificate`` does.
"""

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

import rfc8785

from huizhen.protocol.accounting import Spend, epsilon
from huizhen.protocol.errors import ConfigError, PrivacyError, WireError
from huizhen.protocol.ledger_entries import Unit
from huizhen.protocol.membership import AttackBound, attack_bounds
from huizhen.protocol.strict import build

SCHEMA = 1
MAX_BYTES = 1 << 20
MECHANISMS = {
    "poisson_gaussian": "Gaussian on Poisson samples (DP-SGD), noise added in full at each site",
    "truncated_poisson_gaussian": "Gaussian on truncated Poisson samples (DP-SGD), noise added in "
    "full at each site",
}
_TOLERANCE = 1e-3  # relative: another version of the accountant may discretise otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """One thing that the numbers assume or leave out, in words."""

    code: str
    zh: str
    en: str

    def __post_init__(self) -> None:
        has_text = self.zh.strip() and self.en.strip()
        if not (re.fullmatch(r"[a-z0-9_]{1,60}", self.code) and has_text):
            raise ValueError(f"statement {self.code[:60]!r} has no code or no text")


@dataclass(frozen=True, slots=True, kw_only=True)
class MechanismTerms:
    """How each step of training hides each patient; the same at every site."""

    name: Literal["poisson_gaussian", "truncated_poisson_gaussian"]
    clipping: Literal["flat", "auto_s"]
    max_grad_norm: float
    # C; 1 under AUTO-S
    records_per_patient: int
    per_round: Spend
    rounds: int
    # the most that a site may join
    noise: Statement
    # where the random numbers come from

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_grad_norm) and self.max_grad_norm > 0):
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}, expected more than 0")
        if min(self.records_per_patient, self.rounds) < 1:
            raise ValueError("records_per_patient and rounds are expected to be 1 or more")
        if (self.name == "poisson_gaussian") != (self.per_round.batch_cap is None):
            raise ValueError(f"name is {self.name}, the batch cap {self.per_round.batch_cap}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerState:
    """What a hospital's own ledger says of one cohort: all studies, not only this one."""

    sequence: int
    digest: str
    # the last entry's number and SHA-256 in hex: later copies of the ledger must contain it
    epsilon: float
    delta: float
    metrics_epsilon: float

    def __post_init__(self) -> None:
        if self.sequence < 1 or not re.fullmatch(r"[0-9a-f]{64}", self.digest):
            raise ValueError(f"ledger's head is {self.sequence}:{self.digest[:70]!r}")
        if not (0 <= self.epsilon < math.inf and 0 <= self.metrics_epsilon < math.inf):
            raise ValueError("ledger's epsilon is not a finite number from 0")
        if not 0 < self.delta < 1:
            raise ValueError(f"ledger's delta is {self.delta}, expected between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSpend:
    """What this study cost each patient of one cohort of a site."""

    site: str
    cohort: str
    # empty where no ledger was presented
    patients_public: int
    rounds: int
    # charged; where no ledger was presented, all that were planned
    epsilon: float
    # of these rounds alone
    ledger: LedgerState | None

    def __post_init__(self) -> None:
        if self.patients_public < 1 or self.rounds < 0 or not 0 <= self.epsilon < math.inf:
            raise ValueError(f"site {self.site!r} has an impossible size, rounds or epsilon")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsBudget:
    """What noised counts over held-out patients cost each of those patients."""

    epsilon: float
    minimum: int
    # patients; counts over fewer, by the noised number, do not leave

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < math.inf or self.minimum < 1:
            raise ValueError(f"metrics epsilon is {self.epsilon}, minimum {self.minimum}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """All that a study promises about privacy."""

    schema: int = SCHEMA
    study: str
    digest: str
    # of the study, SHA-256 in hex
    purpose: str
    issued: str
    # the day, as 2026-11-22
    unit: Unit
    neighbouring: Literal["add_or_remove_one"] = "add_or_remove_one"
    epsilon_agreed: float
    # the study's; what was spent is never above it
    delta: float
    epsilon: float
    # of the alliance: the largest of the sites', no patient being at two; a patient may be in all
    # cohorts of a site, whose rounds are composed
    epsilon_renyi: float | None
    # of the same steps by Rényi accounting, an independent upper bound; None under a batch cap
    accountant: str
    accountant_version: str
    mechanism: MechanismTerms
    sites: tuple[SiteSpend, ...]
    metrics: MetricsBudget | None
    # None where no metrics leave
    attacks: tuple[AttackBound, ...]
    # at the alliance's epsilon, by rising false positive rate
    assumptions: tuple[Statement, ...]
    not_covered: tuple[Statement, ...]

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema is {self.schema}, expected {SCHEMA}: update the software")
        if not re.fullmatch(r"[0-9a-f]{64}", self.digest):
            raise ValueError(f"digest is {self.digest[:70]!r}, expected a SHA-256 in hex")
        if date.fromisoformat(self.issued).isoformat() != self.issued:
            raise ValueError(f"issued is {self.issued!r}, expected a day such as 2026-11-22")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta is {self.delta}, expected between 0 and 1")
        if len({(site.site, site.cohort) for site in self.sites}) != len(self.sites):
            raise ValueError("a site's cohort is listed twice")
        largest = max((site.epsilon for site in self.sites), default=math.inf)
        is_composed = len(self.rounds_by_site) < len(self.sites)
        if self.epsilon < largest or (self.epsilon > largest and not is_composed):
            raise ValueError(f"epsilon is {self.epsilon}, expected the largest of the sites'")
        if not 0 < self.epsilon_agreed < math.inf or self.epsilon > self.epsilon_agreed:
            raise ValueError(f"epsilon is {self.epsilon}, {self.epsilon_agreed} was agreed")
        if any(rounds > self.mechanism.rounds for rounds in self.rounds_by_site.values()):
            raise ValueError(f"a site has more rounds than the study, {self.mechanism.rounds}")
        rates = [bound.false_positive_rate for bound in self.attacks]
        if not rates or rates != sorted(set(rates)):
            raise ValueError("attacks are not in the order of rising false positive rates")
        if not (self.assumptions and self.not_covered):
            raise ValueError("assumptions or not_covered is empty, no guarantee is without either")

    @property
    def rounds_by_site(self) -> dict[str, int]:
        """The rounds that each site charged, over all its cohorts."""
        return {
            name: sum(site.rounds for site in self.sites if site.site == name)
            for name in {site.site: None for site in self.sites}
        }

    @property
    def spends(self) -> tuple[Spend, ...]:
        """What was released about a patient of the site that spent the most."""
        rounds = max(self.rounds_by_site.values())
        return (self.mechanism.per_round.times(rounds),) if rounds else ()

    def epsilon_after(self, rounds: int) -> float:
        """Return the ε of so many rounds of the mechanism, computed now.

        Raises:
            PrivacyError: the accountant cannot certify it.
        """
        return epsilon([self.mechanism.per_round.times(rounds)], self.delta) if rounds else 0.0

    def epsilon_by_site(self) -> dict[str, float]:
        """Return the ε of each site: as stated, or composed now where it has several cohorts.

        Raises:
            PrivacyError: the accountant cannot certify it.
        """
        found = {}
        for name, rounds in self.rounds_by_site.items():
            own = [site.epsilon for site in self.sites if site.site == name]
            found[name] = own[0] if len(own) == 1 else self.epsilon_after(rounds)
        return found

    def canonical(self) -> bytes:
        """Return the RFC 8785 JSON."""
        return rfc8785.dumps(dataclasses.asdict(self))

    def fingerprint(self) -> str:
        """Return the SHA-256 of ``canonical()`` in hex: what the printed page is compared by."""
        return hashlib.sha256(self.canonical()).hexdigest()

    def summary(self) -> dict[str, Any]:
        """Return the main facts as plain values with English words, for a report of results."""
        mechanism, step = self.mechanism, self.mechanism.per_round
        return {
            "schema": self.schema,
            "study": self.digest,
            "mechanism": MECHANISMS[mechanism.name],
            "unit": self.unit,
            "neighbouring": self.neighbouring,
            "noise_multiplier": step.noise_multiplier,
            "sampling_rate": step.sampling_rate,
            "batch_cap": step.batch_cap,
            "steps": mechanism.rounds * step.steps,
            "delta": self.delta,
            "clipping": mechanism.clipping,
            "max_grad_norm": mechanism.max_grad_norm,
            "records_per_patient": mechanism.records_per_patient,
            "epsilon": self.epsilon_by_site(),
            "metrics_epsilon": self.metrics.epsilon if self.metrics else None,
            "accountant": f"{self.accountant}, version {self.accountant_version}",
            "assumes": [statement.en for statement in self.assumptions],
            "does_not_cover": [statement.en for statement in self.not_covered],
        }


def parse_certificate(data: bytes) -> Certificate:
    """Return the certificate in ``data``; whether its numbers follow is for ``check_certificate``.

    Raises:
        WireError: the bytes are not the one encoding of a certificate.
    """
    if len(data) > MAX_BYTES:
        raise WireError(f"certificate has {len(data)} bytes, at most {MAX_BYTES} are allowed")
    try:
        table = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WireError("certificate is not JSON") from error
    if not isinstance(table, dict):
        raise WireError("certificate is not a JSON object")
    try:
        certificate = build(Certificate, table, "certificate")
        is_canonical = certificate.canonical() == data
    except (ConfigError, PrivacyError, rfc8785.CanonicalizationError, UnicodeError) as error:
        raise WireError(str(error)) from error
    if not is_canonical:
        raise WireError("certificate is not in its one canonical encoding")
    return certificate


def check_certificate(certificate: Certificate) -> None:
    """Compute the numbers anew from the mechanism and refuse a certificate that understates one.

    Raises:
        PrivacyError: a site's ε, or what an attacker may recognise, is more than is stated, or is
            left out; or δ is not below one over the patients of a site.
    """
    step, delta = certificate.mechanism.per_round, certificate.delta
    for site in certificate.sites:
        if delta * site.patients_public >= 1:
            raise PrivacyError(
                f"delta is {delta:g}, site {site.site!r} has about {site.patients_public} "
                f"patients, expected less than {1 / site.patients_public:.2g}: such a promise "
                "would let a whole patient out"
            )
        spent = certificate.epsilon_after(site.rounds)
        _check_not_below(f"epsilon of site {site.site!r}", site.epsilon, spent)
        if site.ledger is not None and site.rounds:
            there = epsilon([step.times(site.rounds)], site.ledger.delta)
            _check_not_below(f"ledger of site {site.site!r}", site.ledger.epsilon, there)
    for name, rounds in certificate.rounds_by_site.items():
        spent = certificate.epsilon_after(rounds)
        _check_not_below(f"epsilon with all cohorts of site {name!r}", certificate.epsilon, spent)
    found = attack_bounds(certificate.spends, delta)
    due = [bound.false_positive_rate for bound in found]
    if [bound.false_positive_rate for bound in certificate.attacks] != due:
        raise PrivacyError(f"attacks are at other false positive rates than {due}")
    for stated, true in zip(certificate.attacks, found, strict=True):
        _check_not_below("attacks by epsilon", stated.by_epsilon, true.by_epsilon)
        _check_not_below("attacks by mechanism", stated.by_mechanism, true.by_mechanism)


def _check_not_below(what: str, stated: float, found: float) -> None:
    if stated < found * (1 - _TOLERANCE):
        raise PrivacyError(
            f"{what} is stated as {stated:.6g}, the mechanism gives {found:.6g}: "
            "do not rely on this certificate"
        )
