"""``huizhen audit verify``: a log or an export, against keys and heads that the reader trusts."""

import argparse
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huizhen.cli.actions import add_action
from huizhen.cli.audit_files import party_file, read_file

if TYPE_CHECKING:
    from huizhen.protocol.audit import Entry
    from huizhen.protocol.audit_checkpoints import Keys
    from huizhen.protocol.documents import PublicKey
    from huizhen.protocol.statements import Head

_EXAMPLES = """examples:
  huizhen audit verify --membership membership.json
  huizhen audit verify --witnessed 17:9c1e…             all 64 digits of the root
  huizhen audit verify --export log.json --key 3d40…    needs no log, at anybody's
  huizhen audit verify --export log.json --membership membership.json --witnessed south.json

A restored older copy is a whole log too. It is found with the head that somebody else has seen, as
'huizhen audit witness' writes it at any of the witnesses.
"""


def add_verify(actions: Any) -> None:
    """Register ``audit verify``."""
    verify = add_action(actions, "verify", "check every entry and signature", _EXAMPLES, _verify)
    source = verify.add_mutually_exclusive_group()
    source.add_argument(
        "--log", type=Path, metavar="FILE", help="default: the party's audit.sqlite in the home"
    )
    source.add_argument("--export", type=Path, metavar="FILE.json", help="an exported log")
    trusted = verify.add_mutually_exclusive_group()
    trusted.add_argument("--key", type=_key, metavar="HEX", help="the owner's identity key")
    trusted.add_argument(
        "--membership", type=Path, metavar="FILE", help="the alliance's, with everybody's keys"
    )
    verify.add_argument(
        "--witnessed", metavar="FILE|N:ROOT", help="a checkpoint or head that somebody else has"
    )


def _key(text: str) -> "PublicKey":
    from huizhen.protocol.documents import public_key
    from huizhen.protocol.errors import ProtocolError

    try:
        if not re.fullmatch(r"[0-9a-f]{64}", text):
            raise ValueError
        return public_key(bytes.fromhex(text))
    except (ProtocolError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text[:80]!r} is not an Ed25519 public key, 64 hex digits"
        ) from error


def _verify(args: argparse.Namespace) -> int:
    return _verify_log(args) if args.export is None else _verify_export(args)


def _verify_export(args: argparse.Namespace) -> int:
    from huizhen.protocol.audit_export import verify_export

    data = read_file(args.export)
    found = verify_export(data, keys=_keys(args), witnessed=_witnessed(args))
    _same_alliance(args, found.alliance)
    if args.json:
        document = {
            "alliance": found.alliance,
            "log": found.log,
            "entries": len(found.entries),
            "first": found.first,
            "last": found.last,
            "study": found.study,
            "head": found.head.model_dump(),
            "signers": found.signers,
            "witnessed": None if found.witnessed is None else found.witnessed.model_dump(),
            "witnesses": found.witnesses,
        }
        print(json.dumps({"schema": 1, **document}, ensure_ascii=False, indent=1))
        return 0
    _print_title(found.log, found.alliance, found.entries)
    if found.study is not None:
        print(f"of entries {found.first} to {found.last} those of study {found.study[:12]} alone:")
        print("each is in the log; that it has no more of them is its owner's word")
    else:
        part = "" if found.is_whole else f" of {found.head.size}"
        print(f"entries {found.first} to {found.last}{part} are all there, each in its place")
    signed = dict.fromkeys(found.witnesses, found.witnessed.size) if found.witnessed else {}
    if found.signers:
        signed[found.log] = found.head.size
        _print_signed(found.log, signed, found.head.size)
    else:
        print("no key was given: whose log it is was not verified")
    _print_witnessed(args)
    print(f"head {found.head.size}:{found.head.root}")
    return 0


def _verify_log(args: argparse.Namespace) -> int:
    from huizhen.protocol.audit_checkpoints import only_key
    from huizhen.protocol.documents import PublicKey
    from huizhen.storage.audit import AuditLog

    path = party_file(args, args.log, "audit.sqlite")
    with AuditLog.open(path, witnessed=_witnessed(args)) as log:
        _same_alliance(args, log.alliance)
        entries, documents, head = log.entries(), log.checkpoints(), log.head()
        name, alliance = log.log, log.alliance
    keys = _keys(args)
    if isinstance(keys, PublicKey):
        keys = only_key(name, keys)
    signed, others = _signed(documents, keys)
    size = len(entries)
    if args.json:
        document = {
            "alliance": alliance,
            "log": name,
            "entries": size,
            "head": head.model_dump(),
            "checkpoints": len(documents),
            "signed": signed,
            "witnessed": max([n for party, n in signed.items() if party != name], default=0),
            "clock_went_back": _clock_went_back(entries),
        }
        print(json.dumps({"schema": 1, **document}, ensure_ascii=False, indent=1))
        return 0
    _print_title(name, alliance, entries)
    print(f"each is as it was written, and {len(documents)} checkpoints are of these entries")
    if back := _clock_went_back(entries):
        print(f"the clock went back before {len(back)} of them, first before entry {back[0]}")
    if keys is None:
        print("no key was given: the signatures of the checkpoints were not verified")
    else:
        _print_signed(name, signed, size)
        if others:
            print(f"{others} checkpoints are signed with keys that were not given")
    _print_witnessed(args)
    print(f"head {head.size}:{head.root}")
    return 0


def _keys(args: argparse.Namespace) -> "Keys | PublicKey | None":
    from huizhen.protocol.audit_checkpoints import claimed_membership, keys_of_members

    if args.membership is not None:
        return keys_of_members(claimed_membership(read_file(args.membership)))
    key: PublicKey | None = args.key
    return key


def _same_alliance(args: argparse.Namespace, alliance: str) -> None:
    from huizhen.protocol.audit_checkpoints import claimed_membership
    from huizhen.protocol.errors import ConfigError

    if args.membership is None:
        return
    given = claimed_membership(read_file(args.membership)).alliance
    if given != alliance:
        raise ConfigError(f"membership is of alliance {given!r}, the log of {alliance!r}")


def _witnessed(args: argparse.Namespace) -> "Head | None":
    """Return the head that somebody else has seen; a file of it is trusted like the head itself."""
    from huizhen.protocol.audit_checkpoints import claimed_checkpoint
    from huizhen.protocol.errors import ConfigError, WireError
    from huizhen.protocol.statements import Head

    if args.witnessed is None:
        return None
    if found := re.fullmatch(r"([1-9][0-9]{0,14}):([0-9a-f]{64})", args.witnessed):
        return Head(size=int(found[1]), root=found[2])
    try:
        said = claimed_checkpoint(read_file(Path(args.witnessed)))
    except WireError as error:
        raise ConfigError(f"{args.witnessed!r} is neither a checkpoint nor N:ROOT") from error
    return Head(size=said.size, root=said.root)


def _signed(documents: list[bytes], keys: "Keys | None") -> tuple[dict[str, int], int]:
    """Return how far each party has signed, and how many checkpoints are under other keys."""
    from huizhen.protocol.audit_checkpoints import claimed_checkpoint, key_ids, read_checkpoint
    from huizhen.protocol.statements import moment

    signed: dict[str, int] = {}
    if keys is None:
        return signed, 0
    others = 0
    for document in documents:
        claimed = claimed_checkpoint(document)
        owner = keys(moment(claimed.issued)).get(claimed.log)
        if owner is None or owner.id not in key_ids(document):
            others += 1
            continue
        said, names = read_checkpoint(document, keys)
        for name in names:
            signed[name] = max(said.size, signed.get(name, 0))
    return signed, others


def _clock_went_back(entries: "list[Entry]") -> list[int]:
    return [later.sequence for first, later in pairwise(entries) if later.time < first.time]


def _print_title(log: str, alliance: str, entries: "list[Entry] | tuple[Entry, ...]") -> None:
    dates = f", {entries[0].time} to {entries[-1].time}" if entries else ""
    print(f"{len(entries)} entries of the audit log of {log!r} in alliance {alliance!r}{dates}")


def _print_signed(log: str, signed: dict[str, int], size: int) -> None:
    if log in signed:
        print(f"its owner has signed entries 1 to {signed[log]}")
    else:
        print("its owner has signed none with the key that was given")
    witnesses = {name: upto for name, upto in sorted(signed.items()) if name != log}
    for name, upto in witnesses.items():
        print(f"{name} has seen entries 1 to {upto}")
    covered = max(witnesses.values(), default=0)
    if covered < size:
        print(f"entries {covered + 1} to {size} are covered by no known witness")


def _print_witnessed(args: argparse.Namespace) -> None:
    if args.witnessed is None:
        print("no witnessed head was given: an older copy of this log would pass as well")
    else:
        print("the log has had the head that was witnessed")
