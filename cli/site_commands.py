"""``huizhen site init``, ``join``, ``studies``, ``approve``, ``run`` and what stops them."""

import argparse
import contextlib
import json
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huizhen.cli.actions import add_action, print_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from huizhen.client.home import Home, StudyFolder
    from huizhen.client.policy import Policy
    from huizhen.client.situation import Offered
    from huizhen.client.standing import Standing
    from huizhen.protocol.documents import PublicKey
    from huizhen.protocol.invitation import Pins
    from huizhen.protocol.statements import Approval

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
_APPROVE = """examples:
  huizhen site studies
  huizhen site approve 9c1e2ab4 --cohort rare --epsilon 4
  huizhen site approve 9c1e2ab4 --cohort rare --epsilon 4 --steward li.pem     where two must sign

Where stewards sign on machines of their own, the approval goes round as a file:
  huizhen site approve 9c1e2ab4 --cohort rare --epsilon 4 --draft rare.approval
  huizhen site approve --sign rare.approval --steward li.pem     each steward, anywhere
  huizhen site approve --sign rare.approval                      at the site, which signs last
"""
_WITHDRAW = """examples:
  huizhen site withdraw 9c1e2ab4

Holds here at once. The coordinator is told now, or by the agent as soon as it can be reached.
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
_STUDY = "its digest, as far as it is unique, or its name"
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
    add_action(actions, "studies", "what is offered here", _EXAMPLE.format("studies"), _studies)
    approve = add_action(actions, "approve", "consent to a study", _APPROVE, _approve)
    approve.add_argument("study", nargs="?", metavar="STUDY", help=_STUDY)
    approve.add_argument("--cohort", metavar="NAME", help="of policy.toml")
    approve.add_argument("--epsilon", type=float, help="that this study may spend here")
    approve.add_argument("--days", type=float, default=365.0, help="that it holds; default: 365")
    approve.add_argument("--steward", type=Path, metavar="KEY.pem", help="sign as this person")
    files = approve.add_mutually_exclusive_group()
    files.add_argument("--draft", type=Path, metavar="FILE", help="write it for stewards to sign")
    files.add_argument("--sign", type=Path, metavar="FILE", help="sign what --draft wrote")
    withdraw = add_action(actions, "withdraw", "end a consent", _WITHDRAW, _withdraw)
    withdraw.add_argument("study", metavar="STUDY", help=_STUDY)
    add_action(actions, "run", "run the agent, in the foreground", _RUN, _run)
    pause = add_action(actions, "pause", "answer nothing until resumed", _PAUSE, _pause)
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
    _check_fingerprint(args, invitation.pins)
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


def _studies(args: argparse.Namespace) -> int:
    from huizhen.client.approvals import is_in_force

    home = _home(args)
    use_network(home)
    with _standing(home) as standing:
        rows, policy, keys, now = [], home.policy(), standing.own_keys(), _now()
        for offer, offered in standing.offers():
            study, approval = offer.agreed(), home.study(offer.digest).approval()
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
                    "approved": is_in_force(approval, policy, keys, now),
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
    from huizhen.client.approvals import (
        claimed_approval,
        sign_as_site,
        sign_as_steward,
        write_draft,
    )
    from huizhen.client.doctor import check_bases
    from huizhen.client.situation import Offered
    from huizhen.protocol.documents import public_of
    from huizhen.protocol.errors import ConfigError
    from huizhen.storage.files import write_whole
    from huizhen.storage.keys import load_key

    if args.sign is not None:
        if (args.study, args.cohort, args.epsilon) != (None, None, None):
            raise ConfigError("--sign goes by its file: leave out STUDY, --cohort and --epsilon")
        if args.steward is not None:
            return _sign_apart(args)
    elif args.study is None or args.cohort is None:
        raise ConfigError("approve got no STUDY or no --cohort: give both, or --sign FILE")
    home = _home(args)
    use_network(home)
    with _standing(home) as standing:
        given = None if args.sign is None else _read_draft(args.sign)
        wanted = args.study if given is None else claimed_approval(given).study
        folder = _find(home, standing, wanted)
        policy, key, now = home.policy(), load_key(home.key("identity")), _now()
        offered = Offered.of(folder.offer(standing.trust))
        document = given or folder.approval() or _draft(args, standing, policy, offered, now)
        said = claimed_approval(document)
        _refuse_other_terms(args, said, standing, offered)
        if args.steward is not None:
            document = sign_as_steward(document, policy, public_of(key), load_key(args.steward))
            folder.keep_approval(document)
        if args.draft is not None:
            write_whole(args.draft, write_draft(document))
        else:
            ledger = _view(home, policy, offered, said.cohort)
            signed = sign_as_site(document, policy, offered, ledger, key, now)
            standing.approve(folder, signed, cohort=said.cohort, epsilon_cap=said.epsilon_cap)
    if args.json:
        return print_json({**_facts(said), "in_force": args.draft is None})
    if args.draft is not None:
        print(f"{args.draft} would approve study {folder.digest[:12]}: {_terms(said)}")
        print(f"each steward: huizhen site approve --sign {args.draft.name} --steward KEY.pem")
        print(f"then here: huizhen site approve --sign {args.draft.name}")
        return 0
    print(f"study {folder.digest[:12]} is approved: {_terms(said)}")
    if (bases := check_bases(home)).state != "ok":
        print(f"{bases.text}, so no round can be answered yet: {bases.todo}")
    print("the agent answers its rounds from now on: huizhen site run")
    return 0


def _draft(
    args: argparse.Namespace,
    standing: "Standing",
    policy: "Policy",
    offered: "Offered",
    now: datetime,
) -> "Approval":
    from huizhen.client.approvals import draft_approval

    return draft_approval(
        policy,
        offered,
        alliance=standing.alliance,
        cohort=args.cohort,
        epsilon_cap=args.epsilon if offered.study.is_private else None,
        now=now,
        expires=now + timedelta(days=args.days),
    )


def _refuse_other_terms(
    args: argparse.Namespace, said: "Approval", standing: "Standing", offered: "Offered"
) -> None:
    """Refuse an approval that people have signed in other terms than are asked for now."""
    from huizhen.protocol.errors import GovernanceError

    if said.alliance != standing.alliance:
        raise GovernanceError(
            f"the approval is for alliance {said.alliance!r}, this site is in {standing.alliance!r}"
        )
    for name, asked, found in (
        ("--cohort", args.cohort, said.cohort),
        ("--epsilon", args.epsilon if offered.study.is_private else None, said.epsilon_cap),
    ):
        if asked is not None and asked != found:
            raise GovernanceError(
                f"{name} is {asked!r}, the approval that is kept says {found!r}: give the same, or "
                f"'huizhen site withdraw {offered.digest[:12]}' and begin anew"
            )


def _sign_apart(args: argparse.Namespace) -> int:
    """Add a steward's signature to a file; nothing of the site need be here."""
    from huizhen.client.approvals import sign_apart
    from huizhen.storage.files import write_whole
    from huizhen.storage.keys import load_key

    said, signed = sign_apart(_read_draft(args.sign), load_key(args.steward))
    if not args.json:
        where = f"study {said.study} at site {said.site!r}"
        print(f"you approve {where}: {_terms(said)}", flush=True)
    write_whole(args.sign, signed)
    if args.json:
        return print_json({**_facts(said), "in_force": False})
    print(f"{args.sign} is signed; pass it on, the site signs last")
    return 0


def _read_draft(place: Path) -> "Approval | bytes":
    from huizhen.client.approvals import read_draft
    from huizhen.protocol.errors import StorageError

    try:
        data = place.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {str(place)!r}: {error.strerror}") from error
    return read_draft(data)


def _terms(said: "Approval") -> str:
    """Return what people agree to, in words."""
    budget = "no bound on ε" if said.epsilon_cap is None else f"ε {said.epsilon_cap:g}"
    return f"cohort {said.cohort!r}, {budget}, until {said.expires}"


def _facts(said: "Approval") -> dict[str, Any]:
    return {
        "study": said.study,
        "cohort": said.cohort,
        "epsilon": said.epsilon_cap,
        "until": said.expires,
    }


def _withdraw(args: argparse.Namespace) -> int:
    from huizhen.protocol.errors import HuizhenError

    home = _home(args)
    use_network(home)
    untold = None
    with _standing(home) as standing:
        folder = _find_kept(home, standing, args.study)
        standing.withdraw(folder)
        try:
            standing.tell_withdrawal(folder)
        except HuizhenError as error:
            untold = str(error)
    if args.json:
        return print_json({"study": folder.digest, "told": untold is None})
    print(f"the consent to study {folder.digest[:12]} is withdrawn; no further round is answered")
    if untold is not None:
        print(f"the coordinator could not be told yet: {untold}")
        print("the agent tells it as soon as it can: huizhen site run")
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
    _set_file(home.paused, is_there=not args.off)
    if args.json:
        return print_json({"paused": not args.off})
    print("the site goes on" if args.off else "the site answers nothing: 'pause --off' goes on")
    return 0


def _stop(args: argparse.Namespace) -> int:
    from huizhen.client.home import SETTINGS
    from huizhen.client.policy_terms import StopRule
    from huizhen.protocol.errors import HuizhenError

    home, trouble = _home(args), None
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

    home = _home(args)
    policy, certificate = home.policy(), home.has_certificate()
    try:
        running = json.loads((home.run / "status.json").read_bytes())
    except (OSError, ValueError):
        running = None
    until = None if certificate is None else certificate.not_valid_after_utc.isoformat()
    keys = _own_keys(home)
    studies: list[dict[str, Any]] = [
        {"study": one.digest, "approved": is_in_force(one.approval(), policy, keys, _now())}
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


def _own_keys(home: "Home") -> list["PublicKey"]:
    """Return the identity keys that lie here, without the alliance's word for them."""
    from huizhen.protocol.documents import public_of
    from huizhen.storage.keys import load_key

    former = sorted(home.key("identity").parent.glob("identity-until-*.pem"))
    return [public_of(load_key(place)) for place in (home.key("identity"), *former)]


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
    known = ((offer.digest, offer.agreed().study.name) for offer, _ in standing.offers())
    return home.study(_one_of(known, begin))


def _find_kept(home: "Home", standing: "Standing", begin: str) -> "StudyFolder":
    """Return the one study that is kept here and called so; nobody is asked."""
    from huizhen.protocol.errors import HuizhenError

    known = []
    for folder in home.studies():
        name = ""
        with contextlib.suppress(HuizhenError):  # its digest is enough to end a consent
            name = folder.offer(standing.trust).agreed().study.name
        known.append((folder.digest, name))
    return home.study(_one_of(known, begin))


def _one_of(studies: "Iterable[tuple[str, str]]", begin: str) -> str:
    from huizhen.protocol.errors import ConfigError

    known = list(studies)
    found = [digest for digest, name in known if digest.startswith(begin) or name == begin]
    if len(found) != 1:
        raise ConfigError(
            f"{len(found)} offered studies are called {begin!r}, expected one of: "
            f"{', '.join(f'{digest[:12]} {name!r}' for digest, name in known) or 'none'}"
        )
    return found[0]


def _view(home: "Home", policy: Any, offered: Any, cohort: str) -> Any:
    """Return what the cohort's ledger says about a study; None where it needs none."""
    from huizhen.client.ledger import Ledger
    from huizhen.client.training_site import ledger_view

    if offered.mechanism is None or cohort not in policy.cohorts:
        return None
    with Ledger.open(policy.ledger_file(home.folder, cohort)) as ledger:
        return ledger_view(ledger, offered)
