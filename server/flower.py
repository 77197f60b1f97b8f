"""The coordinator's end of Flower: its SuperLink on loopback, and one run that carries messages.

All that the server side knows of Flower is here (flwr 1.41.0; a contract test holds each fact).
Flower's SuperLink serves three APIs on one port, two of them to anybody who reaches it; so it
listens on loopback only, and ``edge.py`` lets the Fleet paths alone out. This module is also the
executor of the run: it starts a run whose app bundle is empty, claims its task with the secret, and
pushes and pulls messages. No bundle is ever unpacked, and no token stands on a command line.

Flower's state is disposable and stays in memory (docs/adr/0008): whatever goes wrong, the caller
admits the nodes again and connects again, to a new run.
"""

import contextlib
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import fab_to_proto, message_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    StartRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    GetNodesRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPushError,
    inflate_object_from_contents,
    push_objects,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from huizhen.protocol.errors import ProtocolError, StorageError

HEARTBEAT_SECONDS = 10.0
# of the run's task; Flower gives it up after 60
_DOCUMENT, _PAYLOAD = "document", "payload"
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
serverapp = "huizhen.server.flower:none"
clientapp = "huizhen.server.flower:none"
"""
T = TypeVar("T")


class RunLostError(ProtocolError):
    """Flower has given up the run, or cannot be reached: connect again."""


@dataclass(frozen=True, slots=True)
class Link:
    """Where the SuperLink is, and what opens it."""

    address: str
    # host and port, on loopback
    ca: Path
    secret: Path
    # 32 random bytes that claim tasks


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one message."""

    document: bytes
    payload: bytes


@dataclass(frozen=True, slots=True)
class NoReply:
    """Nothing usable came back for one message, and nothing will."""

    code: str


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
                    _call(client.RegisterNode, RegisterNodeRequest(public_key=node_key)).node_id
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
            _call(client.UnregisterNode, UnregisterNodeRequest(node_id=node))

    def nodes(self) -> dict[bytes, int]:
        """Return the admitted nodes' numbers by public key, in PEM."""
        with self._client() as client:
            found = _call(client.ListNodes, ListNodesRequest()).nodes_info
        return {
            bytes(one.public_key): int(one.node_id) for one in found if one.status != "unregistered"
        }

    def start_run(self) -> int:
        """Start a run that carries messages, and return its number."""
        bundle, _ = build_fab_from_files({"pyproject.toml": _APP})
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        with self._client() as client:
            return int(_call(client.StartRun, StartRunRequest(fab=fab_to_proto(fab))).run_id)

    def _client(self) -> ControlHttpClient:
        return ControlHttpClient.from_server_address(
            self._link.address,
            False,
            self._link.ca.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )


class Run:
    """A run of which this process is the app; made by ``connect``."""

    def __init__(self, client: RuntimeHttpClient, number: int) -> None:
        """Use a client that has claimed the run's task."""
        self._client, self.number, self.is_lost = client, number, False
        self._node = Node(node_id=SUPERLINK_NODE_ID)
        self._coming: dict[str, _Coming] = {}
        # answers whose parts are not all there, by the name of the message
        self._held = ""
        # the one of them whose parts are kept as they come: one at a time fits into memory

    def online(self) -> set[int]:
        """Return the numbers of the nodes that are there now."""
        found = self._call(self._client.GetNodes, GetNodesRequest()).nodes
        return {int(node.node_id) for node in found}

    def push(
        self, nodes: Iterable[int], document: bytes, payload: bytes, *, seconds: float
    ) -> dict[int, str]:
        """Send one message to several nodes; return the message's name for each that gets it.

        Args:
            nodes: to whom.
            document: signed.
            payload: what belongs to it; sent to SuperLink once for all.
            seconds: how long an answer is waited for.
        """
        now = time.monotonic()
        for name in [n for n, one in self._coming.items() if now - one.since > _PULL_SECONDS]:
            del self._coming[name]  # of a round that closed without it
        content = pack(document, payload)
        made = [Message(content, node, MessageType.TRAIN, ttl=seconds) for node in nodes]
        with no_object_id_recompute():
            parts: dict[str, Any] = {}
            for message in made:
                message.metadata.__dict__["_message_id"] = message.object_id
                parts.update(get_all_nested_objects(message))
            response = self._call(
                self._client.PushMessages,
                PushAppMessagesRequest(
                    messages_list=[message_to_proto(remove_content_from_message(m)) for m in made],
                    message_object_trees=[get_object_tree(message) for message in made],
                ),
            )

            def push(name: str, data: bytes) -> None:
                request = PushObjectRequest(
                    node=self._node,
                    run_id=self.number,
                    object_id=name,
                    object_content=data,
                    session_id=response.session_id,
                )
                if not self._call(self._client.PushObject, request).stored:
                    raise ObjectPushError(name, self.number, response.session_id)

            try:
                push_objects(parts, push, object_ids_to_push=set(response.objects_to_push))
            except ObjectPushError as error:
                raise RunLostError("SuperLink no longer takes a message") from error
        names = zip(made, response.message_ids, strict=True)
        return {message.metadata.dst_node_id: name for message, name in names if name}

    def pull(self, name: str, *, max_bytes: int) -> Reply | NoReply | None:
        """Return what came back for a message; None while nothing has, or not yet all of it.

        A node announces its answer before it sends the parts, and may never send them: so nothing
        here waits for a part, and nobody keeps the others waiting.

        Args:
            name: as ``push`` gave it.
            max_bytes: of the payload; a larger one is refused before all of it is fetched.
        """
        coming = self._coming.get(name)
        if coming is None:
            response = self._call(
                self._client.PullMessages, PullAppMessagesRequest(message_ids=[name])
            )
            if not response.messages_list:
                return None
            head, tree = response.messages_list[0], response.message_object_trees[0]
            parts = [part.object_id for part in iterate_object_tree(tree)]
            coming = self._coming[name] = _Coming(
                head.metadata.message_id, tree.object_id, parts, list(parts), time.monotonic()
            )
            if head.HasField("error"):
                return self._done(name, coming, NoReply("no_answer"))
            if len(parts) > 16 + max_bytes // _SMALLEST_CHUNK:
                return self._done(name, coming, NoReply("too_large"))
        if self._held not in self._coming:
            self._held = name
        while coming.missing:
            found = self._part(coming.missing[-1])
            if found is None:
                return self._done(name, coming, NoReply("no_answer"))
            if not found.object_available:
                if time.monotonic() - coming.since > _PULL_SECONDS:
                    return self._done(name, coming, NoReply("no_answer"))
                return None
            coming.seen_bytes += len(found.object_content)
            if coming.seen_bytes > max_bytes + _FRAMING:
                return self._done(name, coming, NoReply("too_large"))
            part = coming.missing.pop()
            if self._held == name:  # of the others it is only seen that they are there
                coming.held[part] = bytes(found.object_content)
        return self._done(name, coming, self._whole(coming))

    def _whole(self, coming: "_Coming") -> Reply | NoReply:
        """Fetch an answer whose parts are all there."""
        parts, coming.held = coming.held, {}
        for part in set(coming.parts) - parts.keys():
            found = self._part(part)
            if found is None or not found.object_available:
                return NoReply("no_answer")
            parts[part] = bytes(found.object_content)
        try:
            whole: Any = inflate_object_from_contents(coming.root, parts)
            return Reply(*unpack(whole))
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
            return NoReply("malformed")

    def _part(self, part: str) -> Any:
        """Return what SuperLink says of a part, None where it knows none."""
        request = PullObjectRequest(node=self._node, run_id=self.number, object_id=part)
        found = self._call(self._client.PullObject, request)
        return found if found.object_found else None

    def _done(self, name: str, coming: "_Coming", answer: Reply | NoReply) -> Reply | NoReply:
        """Have SuperLink forget an answer, and return it."""
        del self._coming[name]
        request = ConfirmMessageReceivedRequest(
            node=self._node, run_id=self.number, message_object_id=coming.message
        )
        self._call(self._client.ConfirmMessageReceived, request)
        return answer

    def beat(self) -> None:
        """Say that the run's app is alive."""
        if not self._call(self._client.SendTaskHeartbeat, SendTaskHeartbeatRequest()).success:
            self.is_lost = True

    def end(self) -> None:
        """Say that the run is over."""
        with contextlib.suppress(ProtocolError):
            _call(self._client.PushTaskOutput, PushTaskOutputRequest(sub_status="completed"))

    def _call(self, function: Callable[[Any], T], request: Any) -> T:
        """Call the SuperLink, over and over while it restarts.

        Raises:
            RunLostError: it has given up the run, or stays away.
        """
        end = time.monotonic() + _PATIENCE_SECONDS
        while True:
            if self.is_lost:
                raise RunLostError("SuperLink has given up the run")
            try:
                return _call(function, request)
            except FlowerRefusedError as error:
                self.is_lost = True
                raise RunLostError(f"SuperLink refuses: {error}") from error
            except RunLostError:
                if time.monotonic() > end:
                    self.is_lost = True
                    raise
                time.sleep(0.5)


@contextlib.contextmanager
def connect(link: Link) -> Iterator[Run]:
    """Start a run, claim its task and give it; it is over at the end of ``with``.

    Raises:
        RunLostError: the SuperLink cannot be reached.
        StorageError: the secret or the certificate cannot be read.
    """
    try:
        secret, ca = link.secret.read_bytes(), link.ca.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {error.filename!r}: {error.strerror}") from error
    number = Control(link).start_run()
    token = _claim(link.address, ca, secret, number)
    client = RuntimeHttpClient.from_server_address(
        link.address,
        False,
        ca,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"),
            RuntimeTokenHttpInterceptor(token),
        ],
    )
    stop = threading.Event()
    try:
        found = _call(client.PullTaskInput, PullTaskInputRequest())
        run = Run(client, found.run.run_id)
        TaskIdentity.task_id, TaskIdentity.run_id = found.task_id, run.number
        TaskIdentity.node_id = SUPERLINK_NODE_ID  # Flower's messages take their sender from here
        beats = threading.Thread(target=_beat, args=(run, stop), name="heartbeat", daemon=True)
        beats.start()
        yield run
        run.end()
    finally:
        stop.set()
        client.close()


def pack(document: bytes, payload: bytes) -> RecordDict:
    """Return a document and what belongs to it as the content of a message."""
    # An array is the only record that Flower sends in chunks.
    array = Array(dtype="uint8", shape=(len(payload),), stype="bytes", data=payload)
    return RecordDict(
        {
            _DOCUMENT: ConfigRecord({_DOCUMENT: document}),
            _PAYLOAD: ArrayRecord({_PAYLOAD: array}),
        }
    )


def unpack(message: Message) -> tuple[bytes, bytes]:
    """Return the document and the payload of a message.

    Raises:
        ValueError: it has other content.
    """
    content = message.content
    document, array = content[_DOCUMENT][_DOCUMENT], content[_PAYLOAD][_PAYLOAD]
    is_whole = len(content) == len(content[_DOCUMENT]) + 1 == len(content[_PAYLOAD]) + 1 == 2
    if not (is_whole and isinstance(document, bytes) and isinstance(array, Array)):
        raise ValueError("message has other content than was agreed")
    return document, bytes(array.data)


_SMALLEST_CHUNK = 64 << 10  # of a site with the slowest link
_FRAMING = 1 << 20  # of the records around a payload
_PULL_SECONDS = 1800.0
_PATIENCE_SECONDS = 45.0  # after 60 Flower gives up a run whose app was silent


class FlowerRefusedError(ProtocolError):
    """The SuperLink answers with an error of its own."""

    def __init__(self, code: int | None, text: str) -> None:
        """Keep Flower's number of the error."""
        super().__init__(text)
        self.code = code


@dataclass(slots=True)
class _Coming:
    """An answer that a node has announced."""

    message: str
    # Flower's name of it
    root: str
    parts: list[str]
    # the whole tree, by digest
    missing: list[str]
    # those that were not seen at SuperLink
    since: float
    # on the monotonic clock
    seen_bytes: int = 0
    # of the parts that were seen
    held: dict[str, bytes] = field(default_factory=dict)


def _claim(address: str, ca: bytes, secret: bytes, number: int) -> str:
    """Return the token of a run's task."""
    client = RuntimeHttpClient.from_server_address(
        address,
        False,
        ca,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(
                master_secret=secret,
                protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"}),
            ),
        ],
    )
    try:
        for _ in range(100):  # tasks of earlier runs that nobody claimed come first
            request = AcquireTaskRequest(supported_task_types=["flwr-serverapp"])
            found = _call(client.AcquireTask, request)
            if not found.token:
                break
            if found.task.run_id == number:
                return str(found.token)
    finally:
        client.close()
    raise RunLostError(f"SuperLink offers no task of run {number}")


def _beat(run: Run, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(ProtocolError):
            run.beat()


def _call(function: Callable[[Any], T], request: Any) -> T:
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
