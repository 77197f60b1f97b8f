"""How an alliance begins: one folder with keys, an authority, a store and a log."""

import json
import tomllib
from collections.abc import Sequence
from datetime import datetime

from huizhen.protocol.audit_checkpoints import COORDINATOR
from huizhen.protocol.documents import public_of
from huizhen.protocol.errors import ConfigError
from huizhen.protocol.study import check_site_name
from huizhen.server.authority import Authority, pem
from huizhen.server.home import SETTINGS, Home, parse_settings
from huizhen.server.store import Store
from huizhen.storage.audit import AuditLog
from huizhen.storage.files import make_folder, write_whole
from huizhen.storage.keys import (
    fingerprint,
    load_key,
    load_node_key,
    make_key,
    make_node_key,
    make_tls_key,
)

_TEXT = """# The alliance's coordinator. Addresses are HOST:PORT.

[alliance]
name = {name}
board = {board}
threshold = {threshold}                # so many of the board must sign

[listen]                     # on this machine
fleet = "0.0.0.0:{fleet}"       # Flower's Fleet paths over TLS, for the sites' agents
service = "0.0.0.0:{service}"     # the alliance service, mutual TLS
door = "0.0.0.0:{door}"        # enrolment and renewal
superlink = "127.0.0.1:{superlink}" # Flower itself, which obeys whoever reaches it
status = "127.0.0.1:{status}"    # /health and /metrics

[public]                     # how sites reach it; invitations say so
names = {names}
fleet = "{host}:{fleet}"
service = "{host}:{service}"
door = "{host}:{door}"

[store]
url = ""                     # postgresql://user@host/name?passfile=/path; empty: store.sqlite here
"""


def found(
    home: Home,
    *,
    alliance: str,
    names: Sequence[str],
    first_port: int,
    board: Sequence[str],
    threshold: int,
    clock_now: datetime,
) -> None:
    """Make a coordinator's folder.

    Args:
        home: the folder, which must not hold a coordinator.
        alliance: the alliance's name.
        names: host names and addresses under which sites reach it, the first one for invitations.
        first_port: of five that follow each other: fleet, service, door, status, superlink.
        board: Ed25519 public keys in hex; empty: one key is made here.
        threshold: so many of the board must sign.
        clock_now: the present time.

    Raises:
        ConfigError: there is a coordinator already, or a value cannot be.
        StorageError: it cannot be written.
    """
    if (home.folder / SETTINGS).exists():
        raise ConfigError(
            f"{str(home.folder)!r} holds a coordinator already: choose another --home"
        )
    check_site_name(alliance)
    if not names:
        raise ConfigError("no host name is given: say under which name sites reach this machine")
    try:
        make_folder(home.folder, mode=0o700)
        home.folder.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"cannot make {str(home.folder)!r}: {error.strerror}") from error
    if not home.key("identity").exists():
        make_key(home.key("identity"))
    if not board:
        place = home.key("board")
        if not place.exists():
            make_key(place)
        board = [public_of(load_key(place)).raw.hex()]
    if not home.authority.exists():
        place = home.key("authority")
        signer = load_node_key(place) if place.exists() else make_node_key(place)
        authority = Authority.make(alliance, signer, clock_now)
        write_whole(home.authority, pem(authority.certificate))
    if not home.key("server").exists():
        make_tls_key(home.key("server"))
    host = f"[{names[0]}]" if ":" in names[0] else names[0]
    text = _TEXT.format(
        name=json.dumps(alliance, ensure_ascii=False),
        board=json.dumps(list(board)),
        threshold=threshold,
        names=json.dumps(list(names), ensure_ascii=False),
        host=host,
        fleet=first_port,
        service=first_port + 1,
        door=first_port + 2,
        status=first_port + 3,
        superlink=first_port + 4,
    )
    parse_settings(tomllib.loads(text), SETTINGS)
    Store.open(f"sqlite:///{(home.folder / 'store.sqlite').absolute()}").shut()
    if not home.audit.exists():
        with AuditLog.create(
            home.audit, alliance=alliance, log=COORDINATOR, clock=lambda: clock_now
        ) as log:
            key = load_key(home.key("identity")).public_key()
            log.append("key_made", purpose="identity", fingerprint=fingerprint(key))
    write_whole(home.folder / SETTINGS, text.encode())  # last: a folder that has it is whole
