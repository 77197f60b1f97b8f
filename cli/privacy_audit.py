"""``huizhen privacy audit``: hold a study's privacy claim against what its steps release."""

import argparse
import json
from pathlib import Path
from typing import Any

EPILOG = """examples:
  huizhen privacy audit my.toml --out runs/my-audit
  huizhen privacy audit my.toml --canaries 1024        more canaries can show more
  huizhen privacy audit my.toml --steps 20 --json      the claim of 20 steps, as JSON

One site's real patients and made-up canaries go through the private steps; the folder then holds
audit.json and audit.png. Both tell of real patients: leave them where the records are. An audit can
refute a claim, never prove it. Exits with 4 if the claim is refuted.
"""


def add_audit_parser(subparsers: Any) -> None:
    """Add ``audit`` to the group ``privacy``."""
    parser = subparsers.add_parser(
        "audit",
        help="try to refute a study's privacy claim on its own base and data",
        description="Try to refute a study's privacy claim, with canaries among its real patients.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", type=Path, metavar="EXPERIMENT.toml")
    parser.add_argument(
        "--canaries", type=int, default=256, metavar="N", help="made-up patients; default: 256"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="private steps to run; default: all of the study"
    )
    parser.add_argument(
        "--site", metavar="NAME", help="whose patients; default: the site with the most"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/audit"), metavar="DIR", help="default: runs/audit"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="processor threads; default: all")
    parser.add_argument("--home", type=Path, metavar="DIR", help="where base models are cached")
    parser.add_argument("--json", action="store_true", help="print audit.json, nothing else")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Audit the experiment of the command line."""
    import torch
    from rich.console import Console

    from huizhen.protocol.errors import ConfigError, PrivacyError
    from huizhen.simulations.audit_report import AuditProgress, audit_table, write_audit
    from huizhen.simulations.audit_study import audit_study
    from huizhen.simulations.audit_verdict import REFUTED
    from huizhen.simulations.experiment import load_experiment

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ConfigError(f"--threads is {arguments.threads}, expected at least 1")
        torch.set_num_threads(arguments.threads)
    experiment = load_experiment(arguments.experiment)
    with AuditProgress(Console(stderr=True, quiet=arguments.json)) as progress:
        document = audit_study(
            experiment,
            canaries=arguments.canaries,
            steps=arguments.steps,
            site=arguments.site,
            home=arguments.home,
            auditor=progress,
        )
    write_audit(document, arguments.out)
    if arguments.json:
        print(json.dumps(document, ensure_ascii=False))
    else:
        output = Console(markup=False, highlight=False)
        output.print(audit_table(document))
        output.print(f"picture: {arguments.out / 'audit.png'}", soft_wrap=True)
    if document["verdict"] == REFUTED:
        raise PrivacyError(f"{'; '.join(document['reasons'])}: do not train with these steps")
    return 0
