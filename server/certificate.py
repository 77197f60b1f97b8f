"""Issues the privacy certificate of a study, and makes the page that people read and print.

The page says what the certificate says and nothing else; its words are in
``templates/certificate.toml``. All texts are escaped by Jinja2, and the page's own policy forbids
it to load or run anything. Numbers are rounded up, so that none on paper is better than the true.
"""

import functools
import importlib.metadata
import tomllib
from collections.abc import Sequence
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from huizhen.protocol.accounting import ACCOUNTANT, Spend, renyi_epsilon
from huizhen.protocol.certificate import (
    Certificate,
    LedgerState,
    MechanismTerms,
    MetricsBudget,
    SiteSpend,
    Statement,
)
from huizhen.protocol.errors import PrivacyError, ProtocolError
from huizhen.protocol.ledger_statement import Totals
from huizhen.protocol.mechanism import Mechanism
from huizhen.protocol.membership import attack_bounds, true_positive_bound
from huizhen.protocol.study import Study

_TEMPLATES = Path(__file__).parent / "templates"
_COMPARED = (0.1, 1.0, 3.0)  # ε of other studies, for a feeling of scale
_SHOWN_RATES = (0.01, 0.1)
_AXIS = 240.0  # of the figure, in its own units


def issue(
    study: Study, *, issued: str, ledgers: Sequence[Totals] = (), simulated: bool = False
) -> Certificate:
    """Return the certificate of a study.

    Args:
        study: what was agreed.
        issued: the day, as 2026-11-22.
        ledgers: what the sites' ledgers state after the last round, at most one per cohort, checked
            by ``verify_export``; a site without one is taken to have joined every round.
        simulated: whether the sites were made up on one machine.

    Raises:
        PrivacyError: the study promises nothing, no round was charged, the cohorts of a site were
            charged more rounds than the study has, or an ε cannot be certified.
        ProtocolError: a ledger is of no site of the study, counts by another unit, came twice, or
            charged the study with another mechanism; or no ledger of a site holds the study.
    """
    if not study.is_private:
        raise PrivacyError("[privacy] unit is 'none': there is nothing to certify")
    mechanism = Mechanism.of(study)
    sites = _site_spends(study, mechanism, ledgers)
    rounds = _most_rounds(study, sites)
    terms, spent = study.privacy, mechanism.per_round.times(rounds)
    is_capped = terms.batch_cap is not None
    return Certificate(
        study=study.study.name,
        digest=study.digest(),
        purpose=study.study.purpose,
        issued=issued,
        unit="patient" if terms.unit == "patient" else "record",
        epsilon_agreed=terms.epsilon,
        delta=terms.delta,
        epsilon=max(mechanism.epsilon_after(rounds), *(site.epsilon for site in sites)),
        epsilon_renyi=None if is_capped else renyi_epsilon([spent], terms.delta),
        accountant=ACCOUNTANT,
        accountant_version=importlib.metadata.version("dp-accounting"),
        mechanism=MechanismTerms(
            name="truncated_poisson_gaussian" if is_capped else "poisson_gaussian",
            clipping="auto_s" if terms.max_grad_norm == "auto" else "flat",
            max_grad_norm=1.0 if terms.max_grad_norm == "auto" else terms.max_grad_norm,
            records_per_patient=1 if terms.unit == "record" else terms.records_per_patient,
            per_round=mechanism.per_round,
            rounds=study.rounds.count,
            noise=_statement("noise", "chacha20_box_muller"),
        ),
        sites=sites,
        metrics=None
        if terms.metrics_epsilon is None
        else MetricsBudget(epsilon=terms.metrics_epsilon, minimum=terms.metrics_minimum),
        attacks=attack_bounds([spent], terms.delta),
        assumptions=_assumptions(study, sites),
        not_covered=_not_covered(study, sites, simulated),
    )


def page(certificate: Certificate) -> str:
    """Return the certificate as one HTML page that needs nothing else."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"up": rounded_up, "percent": _percent, "plain": _plain}
    return environment.get_template("certificate.html").render(
        certificate=certificate,
        step=certificate.mechanism.per_round,
        labels=_labels(certificate.unit),
        rows=_attack_rows(certificate),
        curves=_curves(certificate),
        axis=_AXIS,
    )


def rounded_up(value: float, digits: int = 3) -> str:
    """Return a number with so many significant digits, never below what it was."""
    exact = Decimal(repr(value))
    if exact == 0:
        return "0"
    grid = Decimal(1).scaleb(exact.adjusted() - digits + 1)
    return f"{exact.quantize(grid, rounding=ROUND_CEILING):f}"


def _site_spends(
    study: Study, mechanism: Mechanism, ledgers: Sequence[Totals]
) -> tuple[SiteSpend, ...]:
    found: dict[str, list[SiteSpend]] = {name: [] for name in study.sites}
    holders = set()
    for totals in ledgers:
        if totals.site not in found:
            raise ProtocolError(f"ledger is of site {totals.site[:100]!r}, not in this study")
        if totals.unit != study.privacy.unit:
            raise ProtocolError(
                f"ledger of site {totals.site!r} counts by {totals.unit}, the study by "
                f"{study.privacy.unit}"
            )
        if any(spend.cohort == totals.cohort for spend in found[totals.site]):
            raise ProtocolError(
                f"ledger of site {totals.site!r} and cohort {totals.cohort!r} came twice"
            )
        rounds = _charged(totals, study.digest(), mechanism.per_round)
        if rounds is not None:
            holders.add(totals.site)
        state = LedgerState(
            sequence=totals.head.sequence,
            digest=totals.head.digest,
            epsilon=totals.epsilon_charged,
            delta=totals.cap.delta,
            metrics_epsilon=totals.metrics_epsilon,
        )
        found[totals.site].append(
            _spend(study, mechanism, totals.site, totals.cohort, rounds or 0, state)
        )
    for site, spends in found.items():
        if not spends:
            spends.append(_spend(study, mechanism, site, "", study.rounds.count, None))
        elif site not in holders:
            raise ProtocolError(
                f"no ledger of site {site!r} holds this study, expected the one that reserved its "
                "rounds: ask the site for the ledger it trained under"
            )
    return tuple(spend for spends in found.values() for spend in spends)


def _most_rounds(study: Study, sites: Sequence[SiteSpend]) -> int:
    """Return the rounds that were charged for a patient who is in all cohorts of a site."""
    rounds = dict.fromkeys(study.sites, 0)
    for spend in sites:
        rounds[spend.site] += spend.rounds
    site = max(rounds, key=rounds.__getitem__)
    if rounds[site] == 0:
        raise PrivacyError("no site has charged a round of this study: there is nothing to certify")
    if rounds[site] > study.rounds.count:
        raise PrivacyError(
            f"the cohorts of site {site!r} were charged {rounds[site]} rounds together, the study "
            f"has {study.rounds.count}: a patient who is in all of them spent more than was agreed"
        )
    return rounds[site]


def _charged(totals: Totals, digest: str, per_round: Spend) -> int | None:
    """Return the rounds of a study that a ledger charged at this study's price; None without it."""
    for account in totals.studies:
        if account.study == digest:
            if account.spend != per_round:
                raise ProtocolError(
                    f"ledger of site {totals.site!r} charged this study with another mechanism"
                )
            return account.rounds_charged
    return None


def _spend(
    study: Study,
    mechanism: Mechanism,
    site: str,
    cohort: str,
    rounds: int,
    ledger: LedgerState | None,
) -> SiteSpend:
    return SiteSpend(
        site=site,
        cohort=cohort,
        patients_public=study.sites[site].patients_public,
        rounds=rounds,
        epsilon=mechanism.epsilon_after(rounds),
        ledger=ledger,
    )


def _assumptions(study: Study, sites: Sequence[SiteSpend]) -> tuple[Statement, ...]:
    codes = ["disjoint_patients", "honest_hospital", "public_terms", "secret_noise"]
    codes += ["floating_point"]
    if any(site.ledger is not None for site in sites):
        codes.append("complete_ledger")
    if study.privacy.batch_cap is not None:
        codes.append("size_bound")
    if study.privacy.metrics_epsilon is not None:
        codes.append("held_out_split")
    return tuple(_statement("assumptions", code) for code in codes)


def _not_covered(
    study: Study, sites: Sequence[SiteSpend], simulated: bool
) -> tuple[Statement, ...]:
    codes = ["tuning", "base_model", "public_labels", "side_channels", "several_hospitals"]
    codes += ["groups", "other_studies", "population", "usefulness"]
    if study.base is None:
        codes.remove("base_model")
    if study.privacy.unit == "record":
        codes.insert(0, "record_unit")
    if any(site.ledger is None for site in sites):
        codes.append("no_ledger")
    if study.privacy.metrics_epsilon is not None:
        codes.append("held_out_and_trained")
    if simulated:
        codes.append("simulated")
    return tuple(_statement("not_covered", code) for code in codes)


def _statement(kind: str, code: str) -> Statement:
    return Statement(code=code, **_texts()[kind][code])


@functools.cache
def _texts() -> dict[str, dict[str, dict[str, str]]]:
    return tomllib.loads((_TEMPLATES / "certificate.toml").read_text(encoding="utf-8"))


def _labels(unit: str) -> dict[str, dict[str, str]]:
    texts = _texts()
    return texts["labels"] | (texts["labels_of_records"] if unit == "record" else {})


def _attack_rows(certificate: Certificate) -> list[dict[str, Any]]:
    """Return the lines of the table: a label, what is added to it, and a bound for each rate."""
    shown = [b for b in certificate.attacks if b.false_positive_rate in _SHOWN_RATES]
    bounds = {
        "guessing": [bound.false_positive_rate for bound in shown],
        "this_noise": [bound.by_mechanism for bound in shown],
        "this_epsilon": [bound.by_epsilon for bound in shown],
    }
    rows = [{"label": label, "more": "", "bounds": own} for label, own in bounds.items()]
    for other in _COMPARED:
        pair = (other, certificate.delta)
        own = [true_positive_bound(bound.false_positive_rate, [pair]) for bound in shown]
        rows.append({"label": "compared", "more": f"ε = {other:g}", "bounds": own})
    return rows


def _curves(certificate: Certificate) -> dict[str, str]:
    """Return the points of the figure's two curves, as an SVG polyline has them."""

    def points(which: str) -> str:
        return " ".join(
            f"{_AXIS * bound.false_positive_rate:.1f},{_AXIS * (1 - getattr(bound, which)):.1f}"
            for bound in certificate.attacks
        )

    return {"noise": points("by_mechanism"), "epsilon": points("by_epsilon")}


def _plain(value: float) -> str:
    """Return a number without an exponent, which few readers know."""
    return f"{Decimal(repr(value)):f}"


def _percent(share: float) -> str:
    """Return a share in percent with one decimal, rounded up."""
    tenths = (Decimal(repr(share)) * 1000).to_integral_value(rounding=ROUND_CEILING)
    return f"{tenths / 10:.1f} %"
