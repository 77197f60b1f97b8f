"""Flower's own SuperLink on loopback, with our edge before it, for tests of what Flower does."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from huizhen.client import flower as site_flower
from huizhen.protocol.errors import ProtocolError
from huizhen.server import flower, supervisor
from huizhen.server import superlink as server_superlink
from huizhen.server.authority import Authority, pem
from huizhen.server.edge import make_edge
from huizhen.server.home import Home
from huizhen.simulations.live import free_ports
from huizhen.storage.files import write_whole

__all__ = [
    "SuperLink",
    "flower",
    "make_node_key",
    "node_pem",
    "server_superlink",
    "site_flower",
    "superlink",
]


def make_node_key() -> ec.EllipticCurvePrivateKey:
    """Return a node's key."""
    return ec.generate_private_key(ec.SECP384R1())


def node_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a node's public key as Flower wants it."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@dataclass
class SuperLink:
    """A SuperLink process, and what opens it."""

    folder: Path
    link: server_superlink.Link
    process: subprocess.Popen[bytes] | None = None
    fleet: str = ""
    # the edge's address
    keys: dict[str, ec.EllipticCurvePrivateKey] = field(default_factory=dict)

    @property
    def control(self) -> server_superlink.Control:
        """The list of nodes."""
        return server_superlink.Control(self.link)

    def start(self) -> None:
        """Start it and wait until it answers."""
        command, environment = server_superlink.superlink_command(
            self.link,
            certificate=self.folder / "server.pem",
            key=self.folder / "keys" / "server.pem",
            home=self.folder / "flower",
        )
        with (self.folder / "superlink.log").open("ab") as log:
            self.process = subprocess.Popen(  # noqa: S603 - our own command
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        end = time.monotonic() + 60
        while True:
            try:
                self.control.nodes()
            except ProtocolError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)
            else:
                return

    def kill(self) -> None:
        """End it with SIGKILL."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def admit(self, name: str) -> int:
        """Make a node's key, have it admitted and return the node's number."""
        self.keys[name] = make_node_key()
        return self.control.admit(node_pem(self.keys[name]))

    def connect(
        self, name: str, *, last_node: int | None = None, fleet: str | None = None
    ) -> contextlib.AbstractContextManager[site_flower.Fleet]:
        """Connect a node over the edge."""
        return site_flower.connect(
            fleet or self.fleet, ca=self.link.ca, key=self.keys[name], last_node=last_node
        )


@contextlib.contextmanager
def superlink(folder: Path) -> Iterator[SuperLink]:
    """Give a running SuperLink and an edge before it."""
    port = free_ports(2)
    home = Home(folder)
    (folder / "keys").mkdir(parents=True)
    (folder / "flower").mkdir()
    authority = Authority.make("rare", make_node_key(), datetime.now(UTC))
    key = ec.generate_private_key(ec.SECP256R1())
    server = authority.for_server(["127.0.0.1"], key.public_key(), datetime.now(UTC))
    write_whole(home.authority, pem(authority.certificate))
    write_whole(home.certificate, pem(server))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_whole(home.key("server"), private)
    write_whole(home.secret, os.urandom(32))
    link = server_superlink.Link(f"127.0.0.1:{port}", home.authority, home.secret, home.flower)
    made = SuperLink(folder, link)
    made.fleet = f"127.0.0.1:{port + 1}"
    try:
        made.start()
        edge = supervisor._serve(make_edge(link.address, home.authority), made.fleet, home)
        try:
            yield made
        finally:
            edge.shut()
    finally:
        made.kill()
