"""Flower's SuperLink: the command that runs it, whom it admits, and how it is called.

It serves three APIs on one port, two of them to anybody who reaches it; so it listens on loopback
only, and ``edge.py`` lets the Fleet paths alone out. A run's app bundle is empty: none is ever
unpacked, and no token stands on a command line.

Its state is disposable and stays in memory (docs/adr/0008): whatever goes wrong, the caller admits
the nodes again and connects again, to a new run.
"""

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    StartRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from google.protobuf.message import DecodeError

from huizhen.protocol.errors import ProtocolError

_APP = b"""[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "huizhen"
version = "1.0.0"
description = "Carries messages; no code is shipped."
dependencies = []
[tool.flwr.app]
publisher = "huizhen"
[tool.flwr.app.components]
serverapp = "huizhen.server.superlink:none"
clientapp = "huizhen.server.superlink:none"
"""
T = TypeVar("T")


class RunLostError(ProtocolError):
    """Flower has given up the run, or cannot be reached: connect again."""


class FlowerRefusedError(ProtocolError):
    """The SuperLink answers with an error of its own."""

    def __init__(self, code: int | None, text: str) -> None:
        """Keep Flower's number of the error."""
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class Link:
    """Where the SuperLink is, and what opens it."""

    address: str
    # host and port, on loopback
    ca: Path
    secret: Path
    # 32 random bytes that claim tasks
    spool: Path
    # a folder for answers that are not all there yet


def superlink_command(
    link: Link, *, certificate: Path, key: Path, home: Path
) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs the SuperLink, and its whole environment.

    Args:
        link: where it listens.
        certificate: its own, PEM, for the host of the link; signed by the link's authority.
        key: of the certificate, PEM.
        home: a folder for what Flower writes.
    """
    host, port = link.address.rsplit(":", 1)
    script = Path(sys.executable).with_name("flower-superlink")
    command = [
        str(script), "--host", host, "--port", port,
        "--ssl-ca-certfile", str(link.ca), "--ssl-certfile", str(certificate),
        "--ssl-keyfile", str(key), "--enable-supernode-auth", "--database", FLWR_IN_MEMORY_DB_NAME,
        "--isolation", "process", "--superexec-auth-secret-file", str(link.secret),
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    return command, silent_environment(home)


def silent_environment(home: Path) -> dict[str, str]:
    """Return the variables under which Flower calls nobody and writes into ``home`` alone."""
    kept = {
        name: os.environ[name] for name in ("PATH", "LANG", "TZ", "TMPDIR") if name in os.environ
    }
    return kept | {
        "FLWR_HOME": str(home),
        "HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "HF_HUB_OFFLINE": "1",
        "PIP_NO_INDEX": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }


def is_plain_answer(data: bytes) -> bool:
    """Whether a node's ``push-messages`` is one answer whose parts form a small tree.

    SuperLink expands the tree that a node names, without a limit: twins at each level are few bytes
    and make 2^60 parts.
    """
    try:
        asked = PushMessagesRequest.FromString(data)
    except DecodeError:
        return False
    if len(asked.messages_list) != 1 or len(asked.message_object_trees) != 1:
        return False
    seen: set[str] = set()
    todo = [(asked.message_object_trees[0], 1)]
    while todo:
        part, depth = todo.pop()
        if part.object_id in seen or depth > _DEPTH:
            return False
        seen.add(part.object_id)
        todo += [(child, depth + 1) for child in part.children]
    return True


_DEPTH = 5  # message, its records, arrays, an array, its chunks


class Control:
    """The SuperLink's list of admitted nodes."""

    def __init__(self, link: Link) -> None:
        """Use a link; nothing is asked yet."""
        self._link = link

    def admit(self, node_key: bytes) -> int:
        """Let a node in, by its public key in PEM, and return its number; again is free.

        Raises:
            RunLostError: the SuperLink cannot be reached.
            ProtocolError: it refuses the key.
        """
        with self._client() as client:
            try:
                return int(
                    call(client.RegisterNode, RegisterNodeRequest(public_key=node_key)).node_id
                )
            except FlowerRefusedError as error:
                if error.code != ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
                    raise
        number = self.nodes().get(node_key)
        if number is None:
            raise ProtocolError("node key was expelled before, each is admitted once: make another")
        return number

    def expel(self, node: int) -> None:
        """Shut a node out for ever; its next request fails.

        Raises:
            RunLostError: the SuperLink cannot be reached.
        """
        with self._client() as client, contextlib.suppress(FlowerRefusedError):
            call(client.UnregisterNode, UnregisterNodeRequest(node_id=node))

    def nodes(self) -> dict[bytes, int]:
        """Return the admitted nodes' numbers by public key, in PEM."""
        with self._client() as client:
            found = call(client.ListNodes, ListNodesRequest()).nodes_info
        return {
            bytes(one.public_key): int(one.node_id) for one in found if one.status != "unregistered"
        }

    def activations(self) -> dict[int, datetime]:
        """Return when each node's process last connected, by the node's number."""
        with self._client() as client:
            found = call(client.ListNodes, ListNodesRequest()).nodes_info
        return {
            int(one.node_id): datetime.fromisoformat(one.last_activated_at)
            for one in found
            if one.last_activated_at
        }

    def start_run(self) -> int:
        """Start a run that carries messages, and return its number."""
        bundle, _ = build_fab_from_files({"pyproject.toml": _APP})
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        with self._client() as client:
            return int(call(client.StartRun, StartRunRequest(fab=fab_to_proto(fab))).run_id)

    def _client(self) -> ControlHttpClient:
        return ControlHttpClient.from_server_address(
            self._link.address,
            False,
            self._link.ca.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )


def call(function: Callable[[Any], T], request: Any) -> T:
    """Call the SuperLink once, and name what went wrong."""
    try:
        return function(request)
    except httpx.HTTPStatusError as error:
        known = FlowerError.from_json(error.response.text)
        status = error.response.status_code
        if status in (502, 503, 504):
            raise RunLostError(f"SuperLink answers with status {status}") from error
        text = known.message if known else f"status {status}"
        raise FlowerRefusedError(known.code if known else None, text) from error
    except httpx.TransportError as error:
        raise RunLostError(f"SuperLink cannot be reached: {type(error).__name__}") from error
    except ValueError as error:
        raise RunLostError("the answer is not SuperLink's") from error
