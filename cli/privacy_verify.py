"""``huizhen privacy verify``: compute a privacy certificate's numbers anew."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huizhen.protocol.certificate import Certificate

EPILOG = """examples:
  huizhen privacy verify runs/fed6/privacy.json
  huizhen privacy verify privacy.json --json

Needs neither the study nor its data. Exits with 1 if the file is no certificate, or if one of its
numbers is better than its mechanism allows.
"""
_NOT_CHECKED = (
    "that the sites did what is stated: that rests on its assumptions",
    "that the ledgers are the sites' own: compare their last entries with what a witness has seen",
    "that it is the study's own certificate: compare its SHA-256 with the one on the printed page",
)


def add_verify_parser(subparsers: Any) -> None:
    """Add ``verify`` to the group ``privacy``."""
    parser = subparsers.add_parser(
        "verify",
        help="check a privacy certificate's numbers against its mechanism",
        description="Compute the numbers of a privacy certificate anew from its mechanism.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("certificate", type=Path, metavar="FILE.json")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check the certificate of the command line."""
    from huizhen.protocol.certificate import check_certificate, parse_certificate
    from huizhen.protocol.errors import ConfigError, HuizhenError, PrivacyError, WireError

    path: Path = arguments.certificate
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}") from error
    try:
        certificate = parse_certificate(data)
        check_certificate(certificate)
    except (WireError, PrivacyError) as error:
        if arguments.json:
            print(json.dumps({"schema": 1, "holds": False, "reason": str(error)}))
        raise HuizhenError(f"{path.name} does not hold: {error}") from error
    checked = _checked(certificate)
    if arguments.json:
        document = {
            "schema": 1,
            "holds": True,
            "sha256": certificate.fingerprint(),
            "study": certificate.digest,
            "epsilon": certificate.epsilon,
            "delta": certificate.delta,
            "epsilon_by_site": certificate.epsilon_by_site(),
            "checked": checked,
            "not_checked": _NOT_CHECKED,
        }
        print(json.dumps(document, ensure_ascii=False, indent=1))
        return 0
    print(f"study {certificate.study!r}, digest {certificate.digest}")
    print(
        f"epsilon is at most {certificate.epsilon:.4g} at delta {certificate.delta:g} for each "
        f"{certificate.unit}; {certificate.epsilon_agreed:g} was agreed"
    )
    print("computed again from the mechanism, and not better than that:")
    for line in checked:
        print(f"  {line}")
    print("not checked:")
    for line in _NOT_CHECKED:
        print(f"  {line}")
    print(f"SHA-256 {certificate.fingerprint()}")
    return 0


def _checked(certificate: "Certificate") -> list[str]:
    """Return in words what ``check_certificate`` has found to hold."""
    step = certificate.mechanism.per_round
    lines = []
    for site in certificate.sites:
        cohort = f", cohort {site.cohort!r}" if site.cohort else ""
        steps = site.rounds * step.steps
        lines.append(
            f"site {site.site!r}{cohort}: epsilon {site.epsilon:.4g} after {site.rounds} rounds, "
            f"{steps} steps of noise {step.noise_multiplier:g} at rate {step.sampling_rate:g}"
        )
    for name, spent in certificate.epsilon_by_site().items():
        if sum(site.site == name for site in certificate.sites) > 1:
            lines.append(f"site {name!r}: epsilon {spent:.4g} for one in all its cohorts")
    largest = max(site.patients_public for site in certificate.sites)
    lines.append(
        f"delta {certificate.delta:g} is below one over the {largest:,} patients of the "
        "largest site"
    )
    with_ledger = sum(site.ledger is not None for site in certificate.sites)
    lines.append(
        f"ledgers, {with_ledger} of {len(certificate.sites)}: none states less than this study "
        "spent, each at its own delta"
    )
    lines.append(f"attacks at {len(certificate.attacks)} false positive rates: none is understated")
    return lines
