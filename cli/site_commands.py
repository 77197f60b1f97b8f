"""``huizhen site init``, ``join``, ``studies``, ``approve``, ``run`` and what stops them."""

import argparse
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huizhen.cli.actions import add_action, print_json

if TYPE_CHECKING:
    from huizhen.client.home import Home, StudyFolder
    from huizhen.client.standing import Standing

_INIT = """examples:
  huizhen site init --site North

Makes the site's folder: keys that never leave it, site.toml, and policy.toml, which says what the
hospital allows. Read policy.toml before anything else.
"""
_JOIN = """examples:
  huizhen site join North.invitation

Compare the fingerprint with the coordinator by telephone first.
"""
_APPROVE = """examples:
  huizhen site studies
  huizhen site approve 9c1e2ab4 --cohort rare --epsilon 4
  huizhen site approve 9c1e2ab4 --cohort rare --epsilon 4 --steward li.pem     where two must sign
"""
_RUN = """examples:
  huizhen site run
  systemctl start huizhen-site                 see deploy/systemd

Runs in the foreground until Ctrl-C. After a crash, start it again: nothing else is needed.
"""
_STOP = """examples:
  huizhen site stop                            nothing leaves any more, within a second
  huizhen site stop --off                      take the stop back; then start the agent again

The same as making the file STOP in the site's folder by hand.
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
    init.add_argument("--site", required=True, metavar="NAME")
    join = add_action(actions, "join", "use an invitation", _JOIN, _join)
    join.add_argument("invitation", type=Path, metavar="INVITATION")
    add_action(actions, "studies", "what is offered here", _EXAMPLE.format("studies"), _studies)
    approve = add_action(actions, "approve", "consent to a study", _APPROVE, _approve)
    approve.add_argument("study", metavar="STUDY")
    approve.add_argument("--cohort", required=True, metavar="NAME", help="of policy.toml")
    approve.add_argument("--epsilon", type=float, help="that this study may spend here")
    approve.add_argument("--days", type=float, default=365.0, help="that it holds; default: 365")
    approve.add_argument("--steward", type=Path, metavar="KEY.pem", help="sign as this person")
    withdraw = add_action(
        actions, "withdraw", "end a consent", _EXAMPLE.format("withdraw 9c1e2ab4"), _withdraw
    )
    withdraw.add_argument("study", metavar="STUDY")
    add_action(actions, "run", "run the agent, in the foreground", _RUN, _run)
    pause = add_action(
        actions, "pause", "answer nothing until resumed", _EXAMPLE.format("pause"), _pause
    )
    pause.add_argument("--off", action="store_true", help="go on")
    stop = add_action(actions, "stop", "let nothing leave any more", _STOP, _stop)
    stop.add_argument("--off", action="store_true", help="take the stop back")
    add_action(actions, "status", "how this site is", _EXAMPLE.format("status"), _status)
    add_action(actions, "doctor", "what would keep it from working", _DOCTOR, _doctor)
    add_action(actions, "rotate", "replace the identity key", _ROTATE, _rotate)


def _home(args: argparse.Namespace) -> "Home":
    from huizhen.client.home import Home
    from huizhen.learning.bases import default_home

    return Home((args.home or default_home()) / "site")


def _now() -> datetime:
    return datetime.now(UTC)


def _init(args: argparse.Namespace) -> int:
    from huizhen.client.joining import init

    home = _home(args)
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
    home = _home(args)
    use_network(home)
    joined = join(home, invitation, _now)
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
    print(f"fingerprint, to compare by telephone: {invitation.pins.fingerprint}")
    print("next: huizhen site run, and huizhen site studies")
    return 0


def _studies(args: argparse.Namespace) -> int:
    home = _home(args)
    use_network(home)
    with _standing(home) as standing:
        rows = []
        for offer, offered in standing.offers():
            study, folder = offer.agreed(), home.study(offer.digest)
            private = study.is_private
            rows.append(
                {
                    "study": offer.digest,
                    "name": study.study.name,
                    "purpose": study.study.purpose,
                    "state": offered.state,
                    "round": offered.round,
                    "of": study.rounds.count,
                    "unit": study.privacy.unit,
                    "epsilon": study.privacy.epsilon if private else None,
                    "delta": study.privacy.delta if private else None,
                    "sites": list(study.sites),
                    "ends": offer.ends,
                    "approved": folder.approval() is not None,
                }
            )
    if args.json:
        return print_json({"studies": rows})
    if not rows:
        print("no study names this site")
    for row in rows:
        budget = "no bound on what it reveals"
        if row["epsilon"] is not None:
            budget = f"ε {row['epsilon']:g}, δ {row['delta']:g} per {row['unit']}"
        where = f"{row['state']}, round {row['round']} of {row['of']}"
        print(f"{row['study'][:12]}  {row['name']}  ({where})")
        print(f"    {row['purpose'] or 'no purpose is stated'}")
        print(f"    {budget}; with {', '.join(row['sites'])}; ends {row['ends']}")
        print(f"    {'approved here' if row['approved'] else 'not approved here'}")
    return 0


def _approve(args: argparse.Namespace) -> int:
    from huizhen.client.approvals import draft_approval, sign_as_site, sign_as_steward
    from huizhen.client.situation import Offered
    from huizhen.protocol.documents import public_of
    from huizhen.storage.keys import load_key

    home = _home(args)
    use_network(home)
    with _standing(home) as standing:
        folder = _find(home, standing, args.study)
        policy, key, now = home.policy(), load_key(home.key("identity")), _now()
        offered = Offered.of(folder.offer(standing.trust))
        document: Any = folder.approval() or draft_approval(
            policy,
            offered,
            alliance=standing.alliance,
            cohort=args.cohort,
            epsilon_cap=args.epsilon if offered.study.is_private else None,
            now=now,
            expires=now + timedelta(days=args.days),
        )
        if args.steward is not None:
            document = sign_as_steward(document, policy, public_of(key), load_key(args.steward))
            folder.keep_approval(document)
        ledger = _view(home, policy, offered, args.cohort)
        signed = sign_as_site(document, policy, offered, ledger, key, now)
        standing.approve(folder, signed, cohort=args.cohort, epsilon_cap=args.epsilon)
    if args.json:
        return print_json({"study": folder.digest, "cohort": args.cohort})
    print(f"study {folder.digest[:12]} is approved for cohort {args.cohort!r}")
    print("the agent answers its rounds from now on: huizhen site run")
    return 0


def _withdraw(args: argparse.Namespace) -> int:
    home = _home(args)
    use_network(home)
    with _standing(home) as standing:
        folder = _find(home, standing, args.study)
        standing.withdraw(folder)
    if args.json:
        return print_json({"study": folder.digest})
    print(f"the consent to study {folder.digest[:12]} is withdrawn; no further round is answered")
    return 0


def _run(args: argparse.Namespace) -> int:
    import logging
    import signal
    import threading

    home = _home(args)
    use_network(home)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    from huizhen.client.agent import ENDED, Agent, alone

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with alone(home):
        agent = Agent(home, clock=_now)
        if not args.json:
            print(f"site {agent.policy.site!r} is running; Ctrl-C stops it", flush=True)
            print(agent.walls.sentence, flush=True)
        agent.run(stop)
    return ENDED.get(agent.ended or "", 0)


def _pause(args: argparse.Namespace) -> int:
    home = _home(args)
    home.settings()
    if args.off:
        home.paused.unlink(missing_ok=True)
    else:
        home.paused.touch(mode=0o600)
    if args.json:
        return print_json({"paused": not args.off})
    print("the site goes on" if args.off else "the site answers nothing: 'pause --off' goes on")
    return 0


def _stop(args: argparse.Namespace) -> int:
    home = _home(args)
    place = home.folder / home.policy().stop.file
    if args.off:
        place.unlink(missing_ok=True)
    else:
        place.touch(mode=0o600)
    if args.json:
        return print_json({"stopped": not args.off, "file": str(place)})
    print(
        "the stop is taken back: start the agent again" if args.off else "nothing leaves any more"
    )
    return 0


def _status(args: argparse.Namespace) -> int:
    home = _home(args)
    policy, certificate = home.policy(), home.has_certificate()
    try:
        running = json.loads((home.run / "status.json").read_bytes())
    except (OSError, ValueError):
        running = None
    until = None if certificate is None else certificate.not_valid_after_utc.isoformat()
    value = {
        "site": policy.site,
        "policy": policy.digest(),
        "certificate_until": until,
        "paused": home.paused.exists(),
        "stopped": policy.is_stopped(home.folder),
        "agent": running,
        "studies": [
            {"study": one.digest, "approved": one.approval() is not None} for one in home.studies()
        ],
    }
    if args.json:
        return print_json(value)
    print(f"site {policy.site!r}, certificate until {until or 'none: join first'}")
    print(f"agent: {running['code'] if running else 'never ran'}", end="")
    print(f", at {running['time']}" if running else "")
    if value["paused"] or value["stopped"]:
        print("STOPPED" if value["stopped"] else "PAUSED")
    for one in home.studies():
        print(f"study {one.digest[:12]}: {'approved' if one.approval() else 'not approved'}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from huizhen.cli.doctor import show

    home = _home(args)
    use_network(home)
    from huizhen.client.doctor import examine

    return show(examine(home, _now), as_json=args.json)


def _rotate(args: argparse.Namespace) -> int:
    from huizhen.client.agent import alone
    from huizhen.client.joining import rotate

    home = _home(args)
    use_network(home)
    with alone(home), _standing(home) as standing:
        key = rotate(home, standing, _now)
    if args.json:
        return print_json({"identity": key})
    print(f"the identity key is {key} now; the old one lies beside it, for old documents alone")
    return 0


def use_network(home: "Home") -> None:
    """Put the site's own way out in force, whatever the environment says, before Flower is read."""
    terms = home.settings().network
    for name in list(os.environ):
        if name.lower() in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy", "no_proxy"):
            del os.environ[name]
    if terms.proxy:
        os.environ["HTTPS_PROXY"] = os.environ["grpc_proxy"] = terms.proxy  # noqa: SIM112 - gRPC's
    os.environ["FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE"] = str(terms.chunk_kib * 1024)
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"


def _standing(home: "Home") -> Any:
    from huizhen.client.standing import open_standing

    return open_standing(home, _now)


def _find(home: "Home", standing: "Standing", begin: str) -> "StudyFolder":
    """Return the one offered study whose digest begins so, or whose name it is."""
    from huizhen.protocol.errors import ConfigError

    known = [(offer.digest, offer.agreed().study.name) for offer, _ in standing.offers()]
    found = [digest for digest, name in known if digest.startswith(begin) or name == begin]
    if len(found) != 1:
        raise ConfigError(
            f"{len(found)} offered studies are called {begin!r}, expected one of: "
            f"{', '.join(f'{digest[:12]} {name!r}' for digest, name in known) or 'none'}"
        )
    return home.study(found[0])


def _view(home: "Home", policy: Any, offered: Any, cohort: str) -> Any:
    """Return what the cohort's ledger says about a study; None where it needs none."""
    from huizhen.client.ledger import Ledger
    from huizhen.client.training_site import ledger_view

    if offered.mechanism is None or cohort not in policy.cohorts:
        return None
    with Ledger.open(policy.ledger_file(home.folder, cohort)) as ledger:
        return ledger_view(ledger, offered)
