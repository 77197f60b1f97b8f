"""``huizhen site ledger create``, ``cap`` and ``close``: the hospital decides its budget."""

import argparse
import dataclasses
import re
from typing import TYPE_CHECKING, Any

from huizhen.cli.actions import add_action, add_ledger, ledger_path, print_json

if TYPE_CHECKING:
    from huizhen.protocol.accounting import Spend
    from huizhen.protocol.ledger_entries import Cap
    from huizhen.protocol.ledger_statement import Totals

_CREATE_EXAMPLES = """examples:
  huizhen site ledger create --site North --cohort all --epsilon 10 --delta 1e-6
  huizhen site ledger create --site North --cohort rare --epsilon 4 --delta 1e-6 \\
      --metrics-epsilon 1 --ledger /srv/huizhen/rare.sqlite

The cap is for all studies on the cohort together, and is the hospital's own. Keep delta below one
over the number of its patients.
"""
_CAP_EXAMPLES = """examples:
  huizhen site ledger cap --epsilon 12
  huizhen site ledger cap --metrics-epsilon 0           no metrics leave any more

What is not named stays. Asks nothing; what was spent stays spent.
"""
_CLOSE_EXAMPLES = """examples:
  huizhen site ledger close 9c1e2ab4                    8 digits or more of the study's digest

The study cannot go on at this site. What it reserved and did not charge is free again.
"""
_SHORTEST = 8  # hex digits of a study's digest


def add_changes(actions: Any) -> None:
    """Register ``site ledger create``, ``site ledger cap`` and ``site ledger close``."""
    create = add_action(actions, "create", "make a cohort's ledger", _CREATE_EXAMPLES, _create)
    create.add_argument("--site", metavar="NAME", required=True, help="the hospital's name")
    create.add_argument("--cohort", metavar="NAME", required=True, help="of a set of patients")
    create.add_argument("--epsilon", type=float, required=True, help="cap on all training")
    create.add_argument("--delta", type=float, required=True, help="at which epsilon is counted")
    create.add_argument(
        "--metrics-epsilon", type=float, default=0.0, help="cap on metrics that leave; default: 0"
    )
    create.add_argument(
        "--unit", choices=("patient", "record"), default="patient", help="default: patient"
    )
    add_ledger(create)
    cap = add_action(actions, "cap", "change what may be spent", _CAP_EXAMPLES, _cap)
    cap.add_argument("--epsilon", type=float, help="cap on all training")
    cap.add_argument("--delta", type=float, help="at which epsilon is counted")
    cap.add_argument("--metrics-epsilon", type=float, help="cap on metrics that leave")
    add_ledger(cap)
    close = add_action(
        actions, "close", "end a study and free what it did not charge", _CLOSE_EXAMPLES, _close
    )
    close.add_argument("study", type=_digits, metavar="STUDY_DIGEST")
    add_ledger(close)


def _digits(text: str) -> str:
    if not re.fullmatch(rf"[0-9a-f]{{{_SHORTEST},64}}", text):
        raise argparse.ArgumentTypeError(
            f"{text[:80]!r} is not a study's digest or its first {_SHORTEST} hex digits or more"
        )
    return text


def _create(args: argparse.Namespace) -> int:
    from huizhen.client.ledger import Ledger

    cap = _cap_of(args.epsilon, args.delta, args.metrics_epsilon)
    path = ledger_path(args)
    with Ledger.create(path, site=args.site, cohort=args.cohort, cap=cap, unit=args.unit) as ledger:
        totals = ledger.totals()
    if args.json:
        print_json({"ledger": str(path), **dataclasses.asdict(totals)})
        return 0
    print(f"{path} is the ledger of cohort {totals.cohort!r} at site {totals.site!r}")
    print(f"all studies together may spend {_words(cap)}, for each {totals.unit}")
    print(f"head {totals.head.sequence}:{totals.head.digest}")
    return 0


def _cap(args: argparse.Namespace) -> int:
    from huizhen.client.ledger import Ledger
    from huizhen.protocol.accounting import epsilon
    from huizhen.protocol.errors import ConfigError

    named = (args.epsilon, args.delta, args.metrics_epsilon)
    if all(value is None for value in named):
        raise ConfigError("nothing is to be changed: give --epsilon, --delta or --metrics-epsilon")
    with Ledger.open(ledger_path(args)) as ledger:
        before = ledger.totals()
        old = before.cap
        values = zip(named, (old.epsilon, old.delta, old.metrics_epsilon), strict=True)
        cap = _cap_of(*(was if value is None else value for value, was in values))
        # An entry is never taken back: a delta at which nothing can be priced would stay.
        epsilon(_committed(before), cap.delta)
        ledger.change_cap(cap)
        after = ledger.totals()
    if args.json:
        caps = {"before": dataclasses.asdict(old), "after": dataclasses.asdict(cap)}
        print_json(caps | {"totals": dataclasses.asdict(after)})
        return 0
    print(f"before: {_words(old)}")
    print(f"after:  {_words(cap)}")
    print(
        f"epsilon {after.epsilon_charged:.4g} is spent, {after.epsilon_committed:.4g} with what is "
        f"reserved, {after.epsilon_left:.4g} left; metrics {after.metrics_epsilon:.4g}, "
        f"{after.metrics_left:.4g} left"
    )
    if after.epsilon_committed > cap.epsilon:
        print("the cap is below what is reserved: a round that would pass it is refused")
    print(f"head {after.head.sequence}:{after.head.digest}")
    return 0


def _close(args: argparse.Namespace) -> int:
    from huizhen.client.ledger import Ledger

    with Ledger.open(ledger_path(args)) as ledger:
        before = ledger.totals()
        study = _find(before, args.study)
        entry = ledger.close(study)
        after = ledger.totals()
    was_closed = entry.sequence <= before.head.sequence
    if args.json:
        closed = {"study": study, "entry": entry.sequence, "was_closed": was_closed}
        print_json(closed | {"totals": dataclasses.asdict(after)})
        return 0
    when = f"was closed before, by entry {entry.sequence}" if was_closed else "is closed"
    print(f"study {study} {when}")
    print(
        f"epsilon with what is reserved: {before.epsilon_committed:.4g} before, "
        f"{after.epsilon_committed:.4g} now; {after.epsilon_left:.4g} left of {after.cap.epsilon:g}"
    )
    print(f"head {after.head.sequence}:{after.head.digest}")
    return 0


def _cap_of(epsilon: float, delta: float, metrics_epsilon: float) -> "Cap":
    from huizhen.protocol.errors import ConfigError
    from huizhen.protocol.ledger_entries import Cap

    try:
        return Cap(epsilon=epsilon, delta=delta, metrics_epsilon=metrics_epsilon)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _committed(totals: "Totals") -> "list[Spend]":
    """Return what is charged or may still be."""
    rounds = [s.rounds_charged if s.is_closed else s.rounds_reserved for s in totals.studies]
    pairs = zip(totals.studies, rounds, strict=True)
    return [study.spend.times(count) for study, count in pairs if count]


def _find(totals: "Totals", begin: str) -> str:
    """Return the one study whose digest begins so."""
    from huizhen.protocol.errors import ConfigError

    found = [study.study for study in totals.studies if study.study.startswith(begin)]
    if len(found) != 1:
        count = f"{len(found)} studies of this ledger begin" if found else "no study here begins"
        raise ConfigError(
            f"{count} with {begin!r}, expected one: 'huizhen site ledger show --json' lists them"
        )
    return found[0]


def _words(cap: "Cap") -> str:
    metrics = f"epsilon {cap.metrics_epsilon:g} on metrics" if cap.metrics_epsilon else "no metrics"
    return f"epsilon {cap.epsilon:g} at delta {cap.delta:g} on training, {metrics}"
