"""``huizhen site init``, ``join``, ``studies``, ``approve``, ``run`` and what stops them."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huizhen.cli.actions import add_action, print_json
from huizhen.cli.site_home import clock, own_keys, site_home, standing_of, use_network
from huizhen.cli.site_studies import add_studies

if TYPE_CHECKING:
    from huizhen.protocol.invitation import Pins

_INIT = """examples:
  huizhen site init --site North

Makes the site's folder: keys that never leave it, site.toml, and policy.toml, which says what the
hospital allows. Read policy.toml before anything else.
"""
_JOIN = """examples:
  huizhen site join North.invitation           shows the fingerprint and asks
  huizhen site join North.invitation --fingerprint "5110 2ec1 9583 1ada 6a53 7f1c ec8a d037"

The coordinator reads the fingerprint out by telephone; nothing is sent before the two agree.
"""
_PAUSE = """examples:
  huizhen site pause                           each round is refused, nothing else changes
  huizhen site pause --off                     go on
"""
_RUN = """examples:
  huizhen site run
  systemctl start huizhen-site                 see deploy/systemd

Runs in the foreground until Ctrl-C. After a crash, start it again: nothing else is needed.
"""
_STOP = """examples:
  huizhen site stop                            nothing leaves any more, within a second
  huizhen site stop --off                      take the stop back; then start the agent again

The same as making the file STOP in the site's folder by hand, or the one that policy.toml names.
"""
_DOCTOR = """examples:
  huizhen site doctor                          each line says what to do

Looks at keys, policy, sandbox, disk, log, ledgers, base models, DNS, proxy, TLS and the clock.
"""
_ROTATE = """examples:
  huizhen site rotate                          stop the agent first, start it after

The old key signs for the new one; what it signed before stays valid, what it signs later is not.
"""
_EXAMPLE = """examples:
  huizhen site {}
"""


def add_commands(actions: Any) -> None:
    """Register the commands of a hospital's own part, its ledger apart."""
    init = add_action(actions, "init", "make this hospital's folder and keys", _INIT, _init)
    init.add_argument(
        "--site", required=True, metavar="NAME", help="of this hospital, as studies call it"
    )
    join = add_action(actions, "join", "use an invitation", _JOIN, _join)
    join.add_argument(
        "invitation", type=Path, metavar="INVITATION", help="the file that the coordinator made"
    )
    agreed = join.add_mutually_exclusive_group()
    agreed.add_argument("--fingerprint", metavar="HEX", help="as the coordinator read it to you")
    agreed.add_argument("--yes", action="store_true", help="it was compared; do not ask")
    add_studies(actions)
    add_action(actions, "run", "run the agent, in the foreground", _RUN, _run)
    pause = add_action(actions, "pause", "answer nothing until resumed", _PAUSE, _pause)
    pause.add_argument("--off", action="store_true", help="go on")
    stop = add_action(actions, "stop", "let nothing leave any more", _STOP, _stop)
    stop.add_argument("--off", action="store_true", help="take the stop back")
    add_action(actions, "status", "how this site is", _EXAMPLE.format("status"), _status)
    add_action(actions, "doctor", "what would keep it from working", _DOCTOR, _doctor)
    add_action(actions, "rotate", "replace the identity key", _ROTATE, _rotate)


def _init(args: argparse.Namespace) -> int:
    from huizhen.client.joining import init

    home = site_home(args)
    init(home, args.site)
    if args.json:
        return print_json({"folder": str(home.folder), "site": args.site})
    print(f"{home.folder} is the folder of {args.site!r}; its keys never leave it")
    print(f"next: read {home.folder / 'policy.toml'}, and decide what it allows")
    print("then: huizhen site join INVITATION")
    return 0


def _join(args: argparse.Namespace) -> int:
    from huizhen.client.joining import join
    from huizhen.protocol.errors import ConfigError
    from huizhen.protocol.invitation import Invitation

    try:
        invitation = Invitation.parse(args.invitation.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {str(args.invitation)!r}: {error.strerror}") from error
    home = site_home(args)
    _check_fingerprint(args, invitation.pins)
    use_network(home)
    joined = join(home, invitation, clock)
    members = [member.site for member in joined.trust.active]
    if args.json:
        return print_json(
            {
                "alliance": invitation.pins.alliance,
                "fingerprint": invitation.pins.fingerprint,
                "members": members,
                "certificate_until": joined.until.isoformat(),
            }
        )
    print(f"{invitation.site!r} is in {invitation.pins.alliance!r} with {', '.join(members)}")
    print("next: huizhen site run, and huizhen site studies")
    return 0


def _check_fingerprint(args: argparse.Namespace, pins: "Pins") -> None:
    """Have people say whom they believe, before anything is sent."""
    from huizhen.protocol.errors import ConfigError, GovernanceError

    if args.fingerprint is not None:
        if not pins.has_fingerprint(args.fingerprint):
            raise ConfigError(
                f"the invitation has fingerprint {pins.fingerprint}, --fingerprint is "
                f"{args.fingerprint!r}: if the coordinator read that to you, ask for another file"
            )
        return
    print(f"fingerprint of {pins.alliance!r}: {pins.fingerprint}", file=sys.stderr)
    if args.yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError(
            "nobody is here to compare the fingerprint: give the one that the coordinator read to "
            "you with --fingerprint, or --yes"
        )
    print("is this what the coordinator read to you? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise GovernanceError(
            "the fingerprint was not confirmed, nothing was sent: telephone the coordinator"
        )


def _run(args: argparse.Namespace) -> int:
    import logging
    import signal
    import threading

    home = site_home(args)
    use_network(home)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    from huizhen.client.agent import ENDED, Agent, alone

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with alone(home):
        agent = Agent(home, clock=clock)
        if not args.json:
            print(f"site {agent.policy.site!r} is running; Ctrl-C stops it", flush=True)
            print(agent.walls.sentence, flush=True)
        agent.run(stop)
    return ENDED.get(agent.ended or "", 0)


def _pause(args: argparse.Namespace) -> int:
    home = site_home(args)
    home.settings()
    _set_file(home.paused, is_there=not args.off)
    if args.json:
        return print_json({"paused": not args.off})
    print("the site goes on" if args.off else "the site answers nothing: 'pause --off' goes on")
    return 0


def _stop(args: argparse.Namespace) -> int:
    from huizhen.client.home import SETTINGS
    from huizhen.client.policy_terms import StopRule
    from huizhen.protocol.errors import HuizhenError

    home, trouble = site_home(args), None
    plain = place = home.folder / StopRule().file
    try:
        place = home.folder / home.policy().stop.file
    except HuizhenError as error:
        if not (home.folder / SETTINGS).exists():
            raise
        trouble = error
    _set_file(place, is_there=not args.off)
    if args.off and plain != place:
        _set_file(plain, is_there=False)
    if args.json:
        print_json({"stopped": not args.off, "file": str(place)})
    elif args.off:
        print("the stop is taken back: start the agent again")
    else:
        print("nothing leaves any more")
    if trouble is not None:
        done = "taken away" if args.off else "made"
        print(f"policy.toml cannot be used; {plain} was {done}", file=sys.stderr)
        raise trouble
    return 0


def _set_file(place: Path, *, is_there: bool) -> None:
    """Make or take away a file that pauses or stops, on the disk when this returns."""
    from huizhen.protocol.errors import StorageError
    from huizhen.storage.files import sync

    try:
        if is_there:
            place.touch(mode=0o600)
        else:
            place.unlink(missing_ok=True)
        sync(place.parent)
    except OSError as error:
        raise StorageError(f"cannot change {str(place)!r}: {error.strerror}") from error


def _status(args: argparse.Namespace) -> int:
    from huizhen.client.approvals import is_in_force

    home = site_home(args)
    policy, certificate = home.policy(), home.has_certificate()
    try:
        running = json.loads((home.run / "status.json").read_bytes())
    except (OSError, ValueError):
        running = None
    until = None if certificate is None else certificate.not_valid_after_utc.isoformat()
    keys = own_keys(home)
    studies: list[dict[str, Any]] = [
        {"study": one.digest, "approved": is_in_force(one.approval(), policy, keys, clock())}
        for one in home.studies()
    ]
    value = {
        "site": policy.site,
        "policy": policy.digest(),
        "certificate_until": until,
        "paused": home.paused.exists(),
        "stopped": policy.is_stopped(home.folder),
        "agent": running,
        "studies": studies,
    }
    if args.json:
        return print_json(value)
    print(f"site {policy.site!r}, certificate until {until or 'none: join first'}")
    print(f"agent: {running['code'] if running else 'never ran'}", end="")
    print(f", at {running['time']}" if running else "")
    if value["paused"] or value["stopped"]:
        print("STOPPED" if value["stopped"] else "PAUSED")
    for one in studies:
        print(f"study {one['study'][:12]}: {'approved' if one['approved'] else 'not approved'}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from huizhen.cli.doctor import show

    home = site_home(args)
    use_network(home)
    from huizhen.client.doctor import examine

    return show(examine(home, clock), as_json=args.json)


def _rotate(args: argparse.Namespace) -> int:
    from huizhen.client.agent import alone
    from huizhen.client.joining import rotate

    home = site_home(args)
    use_network(home)
    with alone(home), standing_of(home) as standing:
        key = rotate(home, standing, clock)
    if args.json:
        return print_json({"identity": key})
    print(f"the identity key is {key} now; the old one lies beside it, for old documents alone")
    return 0
