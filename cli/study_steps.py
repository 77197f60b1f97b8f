"""``huizhen coordinator study``: a study from its offer to its end, and every round again."""

import argparse
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huizhen.cli.actions import add_action, print_json

if TYPE_CHECKING:
    from huizhen.server.home import Home

_STUDY = """examples:
  huizhen coordinator study new study.toml --ends 2027-06-30
  huizhen coordinator study open 9c1e2ab4
  huizhen coordinator study pause 9c1e2ab4
  huizhen coordinator study verify 9c1e2ab4   computes every round again from the signed updates
"""


def add_study(actions: Any) -> None:
    """Register the steps of a study."""
    study = actions.add_parser(
        "study",
        help="offer, open, pause, close and verify studies",
        epilog=_STUDY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    steps = study.add_subparsers(required=True, metavar="STEP")
    new = add_action(steps, "new", "offer a study to its sites", _STUDY, _new)
    new.add_argument("file", type=Path, metavar="STUDY.toml", help="see docs/operate.md")
    new.add_argument("--ends", metavar="DAY", help="as 2027-06-30; default: in 180 days")
    for name, state, help in (
        ("open", "open", "let its rounds run"),
        ("pause", "paused", "run no further round until it is opened again"),
        ("close", "closed", "end it for ever"),
    ):
        step = add_action(steps, name, help, _STUDY, _change)
        step.add_argument("study", metavar="DIGEST_OR_NAME", help="the first digits are enough")
        step.set_defaults(state=state)
    verify = add_action(
        steps, "verify", "compute every round again from the signed updates", _STUDY, _verify
    )
    verify.add_argument("study", metavar="DIGEST_OR_NAME", help="the first digits are enough")


def coordinator_home(args: argparse.Namespace) -> "Home":
    """Return the coordinator's folder in the home that is named."""
    from huizhen.learning.bases import default_home
    from huizhen.server.home import Home

    return Home((args.home or default_home()) / "coordinator")


def _new(args: argparse.Namespace) -> int:
    from huizhen.learning.first import first_adapter
    from huizhen.protocol.errors import ConfigError
    from huizhen.protocol.strict import read_toml
    from huizhen.protocol.study import parse_study
    from huizhen.server.desk import open_desk
    from huizhen.server.studies import offer

    try:
        ends = (
            datetime.now(UTC) + timedelta(days=180)
            if args.ends is None
            else datetime.strptime(args.ends, "%Y-%m-%d").replace(tzinfo=UTC) + timedelta(days=1)
        )
    except ValueError as error:
        raise ConfigError(f"--ends is {args.ends!r}, expected a day as 2027-06-30") from error
    study, first = first_adapter(parse_study(read_toml(args.file), str(args.file)), args.home)
    with open_desk(coordinator_home(args)) as desk:
        made = offer(desk, study, first, ends=ends)
    if args.json:
        return print_json({"study": made.digest, "ends": made.ends})
    print(f"study {made.digest} is offered to {', '.join(study.sites)} until {made.ends}")
    print(f"sites approve it with: huizhen site approve {made.digest[:12]} --cohort NAME")
    print(f"then: huizhen coordinator study open {made.digest[:12]}")
    return 0


def _change(args: argparse.Namespace) -> int:
    from huizhen.server.desk import open_desk
    from huizhen.server.studies import change, find

    with open_desk(coordinator_home(args)) as desk:
        study = find(desk, args.study)
        was_other = change(desk, study, args.state)
    if args.json:
        return print_json({"study": study.digest, "state": args.state, "changed": was_other})
    print(f"study {study.name!r} is {args.state}{'' if was_other else ' already'}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from huizhen.server.desk import open_desk
    from huizhen.server.recompute import recompute
    from huizhen.server.studies import find, offered

    rounds = []
    with open_desk(coordinator_home(args)) as desk:
        study = find(desk, args.study)
        for one in recompute(desk, offered(desk, study)):
            rounds.append(one)
            if args.json:
                continue
            if one.problem:
                print(f"round {one.round} DOES NOT FOLLOW: {one.problem}")
            else:
                print(f"round {one.round} follows from {', '.join(one.counted)}: {one.adapter}")
    is_good = not any(one.problem for one in rounds)
    if args.json:
        print_json(
            {"study": study.digest, "verified": is_good, "rounds": list(map(asdict, rounds))}
        )
    elif not rounds:
        print(f"study {study.name!r} has no committed round")
    return int(not is_good)
