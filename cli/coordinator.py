"""``huizhen coordinator``: an alliance's coordinator, from its first day to a released adapter."""

import argparse
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huizhen.cli.actions import add_action, print_json, show_table
from huizhen.cli.study_steps import add_study, coordinator_home

if TYPE_CHECKING:
    pass

_GROUP = """examples, in the order of the first day:
  huizhen coordinator init --alliance "Rare diseases East" --name fed.example.org
  huizhen coordinator up
  huizhen coordinator invite North
  huizhen coordinator study new study.toml
  huizhen coordinator study open 9c1e2ab4
  huizhen coordinator status
"""
_INIT = """examples:
  huizhen coordinator init --alliance "Rare diseases East" --name fed.example.org
  huizhen coordinator init --alliance Demo --name 127.0.0.1 --port 18440 --home /srv/demo

Makes one folder with settings, keys, the certificate authority and the store. Back up keys/ apart
from the rest. Five ports are used from --port on: fleet, service, door, status, Flower's own.
"""
_UP = """examples:
  huizhen coordinator up
  systemctl start huizhen-coordinator          see deploy/systemd

Runs in the foreground until Ctrl-C. After a crash, start it again: nothing else is needed.
"""
_INVITE = """examples:
  huizhen coordinator invite North             writes North.invitation
  huizhen coordinator invite North --days 3 --out /media/usb/north.invitation

Hand the file over; read the fingerprint to each other over the telephone. It is good for one site.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the actions of ``coordinator``."""
    group = subparsers.add_parser(
        "coordinator",
        help="run an alliance: its members, its studies, its rounds",
        description="An alliance's coordinator.",
        epilog=_GROUP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = group.add_subparsers(required=True, metavar="ACTION")
    init = add_action(actions, "init", "make a coordinator's folder", _INIT, _init)
    init.add_argument("--alliance", required=True, metavar="NAME", help="as documents name it")
    init.add_argument(
        "--name", action="append", required=True, metavar="HOST", help="how sites reach it; again"
    )
    init.add_argument("--port", type=int, default=8443, help="the first of five; default: 8443")
    init.add_argument(
        "--board", action="append", default=[], metavar="KEY", help="public keys in hex; again"
    )
    init.add_argument("--threshold", type=int, default=1, help="of the board, that must sign")
    add_action(actions, "up", "run everything, in the foreground", _UP, _up)
    invite = add_action(actions, "invite", "let a hospital join", _INVITE, _invite)
    invite.add_argument("site", metavar="SITE", help="the hospital's name in the alliance")
    invite.add_argument("--days", type=float, default=14.0, help="that it is good; default: 14")
    invite.add_argument("--out", type=Path, metavar="FILE", help="default: SITE.invitation")
    add_action(actions, "sites", "who is in the alliance", _EXAMPLE.format("sites"), _sites)
    add_action(actions, "status", "studies and their rounds", _EXAMPLE.format("status"), _status)
    revoke = add_action(
        actions, "revoke", "shut a site out for ever", _EXAMPLE.format("revoke North"), _revoke
    )
    revoke.add_argument("site", metavar="SITE", help="its name never comes back")
    approve = add_action(
        actions, "approve", "sign what waits for the board, as one of it", _APPROVE, _approve
    )
    approve.add_argument(
        "draft", type=Path, metavar="DRAFT.json", help="from the folder board/ of the coordinator"
    )
    approve.add_argument("--key", type=Path, metavar="KEY.pem", help="this person's, Ed25519")
    runs = add_action(actions, "runs", "the rounds of a study", _EXAMPLE.format("runs 9c1e"), _runs)
    runs.add_argument("study", metavar="DIGEST_OR_NAME", help="the first digits are enough")
    add_study(actions)
    add_action(
        actions, "doctor", "what would keep it from working", _EXAMPLE.format("doctor"), _doctor
    )


_APPROVE = """examples:
  huizhen coordinator approve membership-4-1c9d.json --key wang.pem   on anybody's machine
  huizhen coordinator approve membership-4-1c9d.json                  at the coordinator: in force

A change of members, or a study, waits in the coordinator's folder board/ until enough have signed.
"""
_EXAMPLE = """examples:
  huizhen coordinator {}
"""


def _init(args: argparse.Namespace) -> int:
    from huizhen.server.desk import open_desk
    from huizhen.server.founding import found
    from huizhen.server.registry import WaitingForBoardError

    home = coordinator_home(args)
    found(
        home,
        alliance=args.alliance,
        names=args.name,
        first_port=args.port,
        board=args.board,
        threshold=args.threshold,
        clock_now=datetime.now(UTC),
    )
    waiting = ""
    with open_desk(home) as desk:
        try:
            desk.registry.found()
        except WaitingForBoardError as error:
            waiting = str(error)
    if args.json:
        return print_json({"folder": str(home.folder), "waiting": waiting})
    print(f"{home.folder} is the coordinator of {args.alliance!r}")
    if waiting:
        print(waiting)
    print("next: huizhen coordinator up")
    print("then: huizhen coordinator invite SITE")
    return 0


def _up(args: argparse.Namespace) -> int:
    import logging
    import os

    # gRPC would otherwise speak up whenever a part is started; its threads hold nothing of a child.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    from huizhen.server.supervisor import up

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for name in ("alembic", "httpx"):  # they name every step and every request
        logging.getLogger(name).setLevel(logging.WARNING)
    home = coordinator_home(args)

    def ready(addresses: Mapping[str, str]) -> None:
        if args.json:
            print(json.dumps({"ready": dict(addresses)}), flush=True)
        else:
            where = ", ".join(f"{name} {address}" for name, address in addresses.items())
            print(f"coordinator is up: {where}; Ctrl-C stops it", flush=True)

    up(home, ready=ready)
    return 0


def _invite(args: argparse.Namespace) -> int:
    from huizhen.protocol.errors import ConfigError
    from huizhen.server.desk import open_desk

    home = coordinator_home(args)
    out: Path = args.out or Path(f"{args.site}.invitation")
    with open_desk(home) as desk:
        made = desk.registry.invite(args.site, desk.settings.public, days=args.days)
    try:
        out.touch(mode=0o600, exist_ok=False)
        out.write_bytes(made.to_bytes())
    except FileExistsError as error:
        raise ConfigError(f"{str(out)!r} exists: choose another --out") from error
    if args.json:
        return print_json({"invitation": str(out), "fingerprint": made.pins.fingerprint})
    print(f"{out} lets {args.site!r} join until {made.expires}")
    print(f"fingerprint, to compare by telephone: {made.pins.fingerprint}")
    return 0


def _sites(args: argparse.Namespace) -> int:
    from huizhen.server.desk import open_desk

    with open_desk(coordinator_home(args)) as desk:
        trust = desk.registry.trust()
        statuses = {one.site: one for one in desk.store.sites.statuses()}
        rows = []
        for member in trust.membership.members:
            status = statuses.get(member.site)
            rows.append(
                {
                    "site": member.site,
                    "status": member.status,
                    "since": member.since,
                    "seen": None if status is None else status.seen.isoformat(timespec="seconds"),
                    "version": None if status is None else status.version,
                    "codes": [] if status is None else list(status.codes),
                    "clock_skew_seconds": None if status is None else status.clock_skew_seconds,
                }
            )
    if args.json:
        return print_json({"sites": rows})
    show_table(("site", "status", "since", "seen", "version", "codes"), rows)
    return 0


def _status(args: argparse.Namespace) -> int:
    from huizhen.server.desk import open_desk
    from huizhen.server.studies import offered

    with open_desk(coordinator_home(args)) as desk:
        rows = []
        for stored in desk.store.studies.studies():
            study = offered(desk, stored).agreed()
            last = desk.store.rounds.last_record(stored.digest)
            said = desk.store.studies.standing(stored.digest)
            approved = [site for site, one in said.items() if one.kind == "approval"]
            rows.append(
                {
                    "study": stored.digest,
                    "name": stored.name,
                    "state": stored.state,
                    "round": 0 if last is None else last.round,
                    "of": study.rounds.count,
                    "approved": len(approved),
                    "sites": len(study.sites),
                    "adapter": None if last is None else last.adapter,
                }
            )
    if args.json:
        return print_json({"studies": rows})
    shown = [{**row, "study": str(row["study"])[:12]} for row in rows]
    show_table(("study", "name", "state", "round", "of", "approved", "sites"), shown)
    return 0


def _revoke(args: argparse.Namespace) -> int:
    from huizhen.server.desk import open_desk

    with open_desk(coordinator_home(args)) as desk:
        desk.registry.revoke(args.site)
    if args.json:
        return print_json({"revoked": args.site})
    print(f"site {args.site!r} is out; its certificate and its node are refused from now on")
    return 0


def _approve(args: argparse.Namespace) -> int:
    from huizhen.protocol.documents import claimed, countersign
    from huizhen.protocol.errors import ConfigError, StorageError
    from huizhen.server.desk import open_desk
    from huizhen.server.studies import accept
    from huizhen.storage.files import write_whole
    from huizhen.storage.keys import load_key

    try:
        document = args.draft.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {str(args.draft)!r}: {error.strerror}") from error
    if args.key is not None:
        write_whole(args.draft, countersign(document, load_key(args.key)))
        if args.json:
            return print_json({"draft": str(args.draft), "in_force": False})
        print(f"{args.draft} is signed; pass it on, the last one takes it to the coordinator")
        return 0
    home = coordinator_home(args)
    if not home.settings_file.exists():
        raise ConfigError("no coordinator is here: name your key with --key to sign the draft")
    with open_desk(home) as desk:
        if "members" in claimed(document):
            version = desk.registry.accept(document).membership.version
            found: dict[str, Any] = {"membership": version}
            text = f"membership {version} is in force"
        else:
            made = accept(desk, document)
            found = {"study": made.digest}
            text = f"study {made.digest} is offered to {', '.join(made.study['sites'])}"
    if args.json:
        return print_json({**found, "in_force": True})
    print(text)
    return 0


def _runs(args: argparse.Namespace) -> int:
    from huizhen.protocol.statements import Record
    from huizhen.server.desk import open_desk
    from huizhen.server.studies import find

    with open_desk(coordinator_home(args)) as desk:
        study, rows = find(desk, args.study), []
        for stored in desk.store.rounds.records(study.digest):
            record = Record.read(stored.document, desk.registry.trust().coordinator)
            rows.append(
                {
                    "round": record.round,
                    "closed": record.closed,
                    "attempt": record.attempt,
                    "counted": [one.site for one in record.counted],
                    "absent": [f"{one.site}:{one.code}" for one in record.absent],
                    "adapter": record.result[:12],
                }
            )
        last = desk.store.rounds.last_attempt(study.digest)
    is_open = last is not None and last.round > len(rows)
    if args.json:
        return print_json({"study": study.digest, "state": study.state, "rounds": rows})
    show_table(("round", "closed", "attempt", "counted", "absent", "adapter"), rows)
    if last is not None and is_open:
        print(f"round {last.round} is open, attempt {last.attempt}, until {last.deadline:%F %TZ}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from huizhen.cli.doctor import show
    from huizhen.server.desk import open_desk
    from huizhen.server.doctor import examine

    with open_desk(coordinator_home(args)) as desk:
        return show(examine(desk), as_json=args.json)
