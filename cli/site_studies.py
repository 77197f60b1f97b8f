"""``huizhen site studies | approve | withdraw``: what a hospital consents to."""

import argparse
import contextlib
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huizhen.cli.actions import add_action, print_json
from huizhen.cli.site_home import clock, site_home, standing_of, use_network

if TYPE_CHECKING:
    from collections.abc import Iterable

    from huizhen.client.home import Home, StudyFolder
    from huizhen.client.policy import Policy
    from huizhen.client.situation import Offered
    from huizhen.client.standing import Standing
    from huizhen.protocol.statements import Approval

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
_STUDY = "its digest, as far as it is unique, or its name"
_EXAMPLE = """examples:
  huizhen site {}
"""


def add_studies(actions: Any) -> None:
    """Register the commands about studies."""
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


def _studies(args: argparse.Namespace) -> int:
    from huizhen.client.approvals import is_in_force

    home = site_home(args)
    use_network(home)
    with standing_of(home) as standing:
        rows, policy, keys, now = [], home.policy(), standing.own_keys(), clock()
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
    home = site_home(args)
    use_network(home)
    with standing_of(home) as standing:
        given = None if args.sign is None else _read_draft(args.sign)
        wanted = args.study if given is None else claimed_approval(given).study
        folder = _find(home, standing, wanted)
        policy, key, now = home.policy(), load_key(home.key("identity")), clock()
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

    home = site_home(args)
    use_network(home)
    untold = None
    with standing_of(home) as standing:
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
