"""What the commands of a hospital share: its folder, its way out, its standing."""

import argparse
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huizhen.client.home import Home
    from huizhen.protocol.documents import PublicKey


def site_home(args: argparse.Namespace) -> "Home":
    """Return the site's folder in the home that is named."""
    from huizhen.client.home import Home
    from huizhen.learning.bases import default_home

    return Home((args.home or default_home()) / "site")


def clock() -> datetime:
    """Return the time, with a zone."""
    return datetime.now(UTC)


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


def standing_of(home: "Home") -> Any:
    """Give the site's standing with the alliance, open."""
    from huizhen.client.standing import open_standing

    return open_standing(home, clock)


def own_keys(home: "Home") -> list["PublicKey"]:
    """Return the identity keys that lie here, without the alliance's word for them."""
    from huizhen.protocol.documents import public_of
    from huizhen.storage.keys import load_key

    former = sorted(home.key("identity").parent.glob("identity-until-*.pem"))
    return [public_of(load_key(place)) for place in (home.key("identity"), *former)]
