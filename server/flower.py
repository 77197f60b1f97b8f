"""One run of Flower's that carries messages; this process is its app and its executor.

It starts a run whose app bundle is empty, claims its task with the secret, and pushes and pulls
messages. With ``superlink.py`` and ``coming.py`` it is all that the server side knows of Flower
(flwr 1.41.0; a contract test holds each fact).
"""

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
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
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPushError,
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
from huizhen.server.coming import SMALLEST_CHUNK, Coming
from huizhen.server.flower_strategy import as_flower_strategy as as_flower_strategy
from huizhen.server.superlink import Control, FlowerRefusedError, Link, RunLostError, call

HEARTBEAT_SECONDS = 10.0
# of the run's task; Flower gives it up after 60
_DOCUMENT, _PAYLOAD = "document", "payload"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one message."""

    document: bytes
    payload: bytes


@dataclass(frozen=True, slots=True)
class NoReply:
    """Nothing usable came back for one message, and nothing will."""

    code: str


class Run:
    """A run of which this process is the app; made by ``connect``."""

    def __init__(self, client: RuntimeHttpClient, number: int, spool: Path) -> None:
        """Use a client that has claimed the run's task, and a folder for answers that come."""
        self._client, self.number, self.is_lost = client, number, False
        self._node = Node(node_id=SUPERLINK_NODE_ID)
        self._spool = spool
        self._coming: dict[str, Coming] = {}
        # answers whose parts are not all there, by the name of the message

    def __enter__(self) -> Self:
        """Return the run."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the answers that are still coming."""
        for coming in self._coming.values():
            coming.close()

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
            self.forget(name)  # of a round that closed without it
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
                push_objects(
                    parts,
                    push,
                    object_ids_to_push=set(response.objects_to_push),
                    max_concurrent_pushes=1,  # each holds three copies of its chunk
                )
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
        coming = self._coming.get(name) or self._begin(name)
        if coming is None:
            return None
        if isinstance(coming, NoReply):
            return coming
        if len(coming.missing) > 16 + max_bytes // SMALLEST_CHUNK:
            return self._done(name, coming, NoReply("too_large"))
        while coming.missing:
            found = self._part(coming.missing[-1])
            if found is None:
                return self._done(name, coming, NoReply("no_answer"))
            if not found.object_available:
                if time.monotonic() - coming.since > _PULL_SECONDS:
                    return self._done(name, coming, NoReply("no_answer"))
                # Others first: who withholds one part cannot pile up the rest at SuperLink.
                coming.missing.insert(0, coming.missing.pop())
                return None
            if coming.size + len(found.object_content) > max_bytes + _FRAMING:
                return self._done(name, coming, NoReply("too_large"))
            coming.keep(found.object_content)
        try:
            answer: Reply | NoReply = Reply(*unpack(coming.message_of(max_bytes)))
        except StorageError:
            raise
        except Exception:  # noqa: BLE001 - a stranger's bytes in Flower's parsers raise anything
            answer = NoReply("malformed")
        return self._done(name, coming, answer)

    def forget(self, name: str) -> None:
        """Have SuperLink let go of a message, and of what has come of its answer."""
        coming = self._coming.get(name) or self._begin(name)
        if isinstance(coming, Coming):
            self._done(name, coming, NoReply("no_answer"))
        elif coming is None:
            self._confirm(name)

    def _begin(self, name: str) -> Coming | NoReply | None:
        """Ask for the parts of an answer; None while there is no answer."""
        response = self._call(self._client.PullMessages, PullAppMessagesRequest(message_ids=[name]))
        if not response.messages_list:
            return None
        head, tree = response.messages_list[0], response.message_object_trees[0]
        if head.HasField("error"):
            self._confirm(head.metadata.message_id, name)
            return NoReply("no_answer")
        parts = [part.object_id for part in iterate_object_tree(tree)]
        made = Coming(head.metadata.message_id, tree.object_id, parts, self._spool)
        self._coming[name] = made
        return made

    def _part(self, part: str) -> Any:
        """Return what SuperLink says of a part, None where it knows none."""
        request = PullObjectRequest(node=self._node, run_id=self.number, object_id=part)
        found = self._call(self._client.PullObject, request)
        if len(found.object_content) > 1 << 20:
            gc.collect()  # httpx's answers refer to themselves and would keep some chunks each
        return found if found.object_found else None

    def _done(self, name: str, coming: Coming, answer: Reply | NoReply) -> Reply | NoReply:
        """Have SuperLink forget an answer, and return it."""
        self._coming.pop(name).close()
        self._confirm(coming.message, name)
        return answer

    def _confirm(self, *messages: str) -> None:
        """Have SuperLink delete messages; it keeps what nobody confirms until the run ends."""
        for message in messages:
            self._call(
                self._client.ConfirmMessageReceived,
                ConfirmMessageReceivedRequest(
                    node=self._node, run_id=self.number, message_object_id=message
                ),
            )

    def beat(self) -> None:
        """Say that the run's app is alive."""
        if not self._call(self._client.SendTaskHeartbeat, SendTaskHeartbeatRequest()).success:
            self.is_lost = True

    def end(self) -> None:
        """Say that the run is over."""
        with contextlib.suppress(ProtocolError):
            call(self._client.PushTaskOutput, PushTaskOutputRequest(sub_status="completed"))

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
                return call(function, request)
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
        found = call(client.PullTaskInput, PullTaskInputRequest())
        run = Run(client, found.run.run_id, link.spool)
        TaskIdentity.task_id, TaskIdentity.run_id = found.task_id, run.number
        TaskIdentity.node_id = SUPERLINK_NODE_ID  # Flower's messages take their sender from here
        beats = threading.Thread(target=_beat, args=(run, stop), name="heartbeat", daemon=True)
        beats.start()
        with run:
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


_FRAMING = 1 << 20  # of the records around a payload
_PULL_SECONDS = 1800.0
_PATIENCE_SECONDS = 45.0  # after 60 Flower gives up a run whose app was silent


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
            found = call(client.AcquireTask, request)
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
