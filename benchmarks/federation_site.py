"""A light site for ``benchmarks/federation.py``: everything of a real one but records and training.

    python -m huizhen.benchmarks.federation_site FOLDER

It joins with an invitation and approves studies with its own keys. It then asks for work as the
agent does, checks each announcement's signature, chain and adapter, and answers with a signed
update of random values in the wire format. There is no policy, no ledger and no worker, so what a
round takes is transport, validation, aggregation and commit.
"""

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from huizhen.benchmarks.federation_values import random_tensors, tensor_shapes
from huizhen.client.agent import BUSY_POLL_SECONDS, BUSY_SECONDS
from huizhen.client.flower import Fleet, FleetError, connect
from huizhen.client.home import Home
from huizhen.client.joining import init, join
from huizhen.client.outbox import send
from huizhen.client.standing import Standing, open_standing
from huizhen.protocol.documents import claimed
from huizhen.protocol.invitation import Invitation
from huizhen.protocol.statements import Announcement, Approval, Update, digest_of, stamp
from huizhen.protocol.wire import declared_values, decode
from huizhen.storage.keys import load_key, load_node_key

CONNECTED = "connected"
# what a site prints once its node is active

logger = logging.getLogger(__name__)


def now() -> datetime:
    """Return the present time."""
    return datetime.now(UTC)


def enrol(home: Home, site: str, invitation: Invitation) -> None:
    """Make a site's folder and join with an invitation.

    Raises:
        HuizhenError: the folder is taken, or the coordinator refuses.
    """
    init(home, site)
    join(home, invitation, now)


def approve(home: Home, study: str) -> None:
    """Consent to a study that is offered, and hand the consent in.

    Raises:
        HuizhenError: the study is not offered here, or the coordinator refuses.
    """
    with open_standing(home, now) as standing:
        standing.offers()
        said = Approval(
            alliance=standing.alliance,
            study=study,
            site=standing.site,
            cohort="all",
            epsilon_cap=None,
            issued=stamp(now()),
            expires=stamp(now() + timedelta(days=1)),
        )
        document = said.signed(load_key(home.key("identity")))
        standing.approve(home.study(study), document, cohort="all", epsilon_cap=None)


def answer(
    standing: Standing, identity: Ed25519PrivateKey, document: bytes, payload: bytes
) -> tuple[bytes, bytes]:
    """Return a signed update to an announcement, and its payload.

    Raises:
        ChainError: the announcement does not follow what was accepted.
        WireError: the adapter is not in the wire format.
    """
    study = str(claimed(document).get("study"))
    coordinator = standing.trust.coordinator
    asked = Announcement.read(document, coordinator)
    chain = standing.chain(study)
    if chain.round + 1 < asked.round or chain.parent != asked.parent:
        chain = standing.catch_up(study)
    after, asked = chain.check(document, payload, coordinator, site=standing.site, now=now())
    standing.keep_chain(after)
    values = declared_values(payload)
    shapes = tensor_shapes(values)
    decode(payload, shapes=shapes)
    data = send(
        study=asked.study,
        round=asked.round,
        site=standing.site,
        update=random_tensors(values),
        agreed=shapes,
    ).data
    update = Update(
        alliance=asked.alliance,
        study=asked.study,
        round=asked.round,
        attempt=asked.attempt,
        site=standing.site,
        announcement=digest_of(document),
        payload=digest_of(data),
        ledger=None,
    )
    return update.signed(identity), data


def serve(home: Home, stop: threading.Event, connected: Callable[[], None]) -> None:
    """Answer the coordinator's messages until told to stop.

    Args:
        home: of a site that has joined.
        stop: ends it.
        connected: is called whenever the node has become active.
    """
    node: int | None = None
    fleet_address = home.settings().coordinator.fleet
    key = load_node_key(home.key("node"))
    with open_standing(home, now) as standing:
        while not stop.is_set():
            try:
                with connect(fleet_address, ca=home.authority, key=key, last_node=node) as fleet:
                    node = fleet.node
                    connected()
                    _work(home, standing, fleet, stop)
            except FleetError as error:  # not yet admitted, or the coordinator starts again
                logger.warning("no connection: trouble=%s %s", error.trouble, error)
                stop.wait(0.2)


def _work(home: Home, standing: Standing, fleet: Fleet, stop: threading.Event) -> None:
    identity, idle = load_key(home.key("identity")), home.settings().network.poll_seconds
    busy_until = 0.0
    while not stop.is_set():
        request = fleet.receive()
        if request is not None:
            document, payload = answer(standing, identity, request.document, request.payload)
            fleet.reply(request, document, payload)
            busy_until = time.monotonic() + BUSY_SECONDS
            continue
        stop.wait(BUSY_POLL_SECONDS if time.monotonic() < busy_until else idle)


def main(folder: str) -> None:
    """Be the site of a folder until SIGTERM."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    serve(Home(Path(folder)), stop, lambda: print(CONNECTED, flush=True))


if __name__ == "__main__":
    main(sys.argv[1])
