"""The site's end of Flower's Fleet API: messages in, replies out, nothing else.

All that the client side knows of Flower is here (flwr 1.41.0; a contract test holds each fact). The
agent speaks the Fleet API by itself in place of a ``flower-supernode``: it never fetches an app
bundle, so that no shipped code can run, and keeps the base model loaded between rounds.

Flower carries bytes and is trusted with nothing: a message is a signed document and what belongs to
it; both are checked elsewhere.
"""

import contextlib
import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_head_values_from_object_content,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from huizhen.protocol.errors import ProtocolError, StorageError

HEARTBEAT_SECONDS = 10.0
# Flower takes a node for lost after two of them; its own nodes use 30
MAX_OBJECTS = 4096  # of one message: 20 GB in Flower's chunks of 5 MB
_DOCUMENT, _PAYLOAD = "document", "payload"

logger = logging.getLogger(__name__)

Trouble: TypeAlias = Literal[
    "unreachable",  # no connection, or an answer that a proxy made
    "tls",  # the other side does not prove who it is
    "not_admitted",  # revoked, never registered, or this clock is wrong
    "still_online",  # an earlier process of this node is not yet taken for lost
    "run_over",  # the coordinator has begun another run
    "lost",  # a part of a message is gone
    "malformed",  # what came is not what the coordinator sends
]
T = TypeVar("T")


class FleetError(ProtocolError):
    """The connection did not do what was asked; ``trouble`` says what to do about it."""

    def __init__(self, trouble: Trouble, text: str) -> None:
        """Name the trouble."""
        super().__init__(text)
        self.trouble: Trouble = trouble


@dataclass(frozen=True, slots=True)
class Request:
    """A message of the coordinator."""

    document: bytes
    payload: bytes
    run: int
    _message: Any
    # Flower's own, to reply to


class Fleet:
    """One node's connection; made by ``connect``."""

    def __init__(self, client: FleetHttpClient, node: int) -> None:
        """Use a client whose node is active."""
        self._client, self._node = client, Node(node_id=node)
        self.node = node

    def receive(self) -> Request | None:
        """Return the next message, or None while there is none.

        Raises:
            FleetError: it could not be had, or is none of the coordinator's.
        """
        response = _call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        head, tree = message_from_proto(response.messages_list[0]), response.message_object_trees[0]
        run = head.metadata.run_id
        parts: dict[str, bytes] = {}

        def pull(name: str) -> bytes:
            request = PullObjectRequest(node=self._node, run_id=run, object_id=name)
            found = _call(self._client.PullObject, request)
            if not found.object_found:
                raise ObjectPullError(name, "not found")
            if not found.object_available:
                raise ObjectUnavailableError(name)
            content = bytes(found.object_content)
            if hashlib.sha256(content).hexdigest() != name:
                raise ValueError("a part is another than was named")
            return content

        try:
            level = [tree.object_id]
            while level:  # each part names its own; SuperLink keeps whatever tree came first
                if len(parts) + len(level) > MAX_OBJECTS:
                    raise ValueError(f"message has over {MAX_OBJECTS} parts")
                parts |= pull_objects(level, pull, initial_backoff=0.02, backoff_cap=1.0)
                heads = [get_object_head_values_from_object_content(parts[one]) for one in level]
                named = dict.fromkeys(child for _, children, _ in heads for child in children)
                level = [one for one in named if one not in parts]
            whole: Any = inflate_object_from_contents(tree.object_id, parts)
        except FleetError:
            raise
        except ObjectPullError as error:
            raise FleetError("lost", "a part of a message is gone") from error
        except Exception as error:  # Flower's parsers raise anything
            raise FleetError("malformed", "message is not one of Flower's") from error
        _call(
            self._client.ConfirmMessageReceived,
            ConfirmMessageReceivedRequest(
                node=self._node, run_id=run, message_object_id=head.metadata.message_id
            ),
        )
        whole.metadata.__dict__["_message_id"] = tree.object_id
        document, payload = unpack(whole)
        return Request(document, payload, run, whole)

    def reply(self, request: Request, document: bytes, payload: bytes = b"") -> None:
        """Send the answer to a message.

        Raises:
            FleetError: it could not be sent; ``run_over`` when nobody waits for it any more.
        """
        reply = Message(pack(document, payload), reply_to=request._message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            tree, parts = get_object_tree(reply), get_all_nested_objects(reply)
            response = _call(
                self._client.PushMessages,
                PushMessagesRequest(
                    node=self._node,
                    messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[tree],
                    clientapp_runtime_list=[0.0],  # how long it trained is nobody's business
                ),
            )

            def push(name: str, content: bytes) -> None:
                stored = _call(
                    self._client.PushObject,
                    PushObjectRequest(
                        node=self._node,
                        run_id=request.run,
                        object_id=name,
                        object_content=content,
                        session_id=response.session_id,
                    ),
                )
                if not stored.stored:
                    raise ObjectPushError(name, request.run, response.session_id)

            try:
                push_objects(parts, push, object_ids_to_push=set(response.objects_to_push))
            except ObjectPushError as error:
                raise FleetError("lost", "the coordinator no longer takes this answer") from error

    def beat(self) -> None:
        """Say that the node is alive.

        Raises:
            FleetError: it could not be said.
        """
        _call(
            self._client.SendNodeHeartbeat,
            SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_SECONDS),
        )

    def abort(self) -> None:
        """Close the connection under whatever is being sent; for another thread."""
        with contextlib.suppress(Exception):  # whatever it says, the sockets are shut
            self._client.close()

    def leave(self) -> None:
        """Say that the node goes; what it has not answered is given up at once."""
        _call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=self.node))


@contextlib.contextmanager
def connect(
    address: str,
    *,
    ca: Path,
    key: EllipticCurvePrivateKey,
    last_node: int | None = None,
) -> Iterator[Fleet]:
    """Give the connection of an admitted node, alive until the end of ``with``.

    Args:
        address: host and port of the coordinator's edge.
        ca: the alliance's certificate authority, PEM.
        key: the node's key, P-384.
        last_node: the number that this node had last: a process that was killed is still online for
            Flower, and only this number ends that at once.

    Raises:
        FleetError: the coordinator cannot be reached, or does not admit this node.
        StorageError: the authority's certificate cannot be read.
    """
    try:
        authority = ca.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {str(ca)!r}: {error.strerror}") from error
    client = FleetHttpClient.from_server_address(
        address,
        False,
        authority,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(key, key.public_key()),
        ],
    )
    # Flower's client follows: a 307 would carry the update, unencrypted, wherever it points.
    client._client.follow_redirects = False
    with client:
        if last_node is not None:
            with contextlib.suppress(FleetError):
                _call(client.DeactivateNode, DeactivateNodeRequest(node_id=last_node))
        fleet = Fleet(client, _activate(client, key))
        stop = threading.Event()
        beats = threading.Thread(target=_beat, args=(fleet, stop), name="heartbeat", daemon=True)
        beats.start()
        try:
            yield fleet
        finally:
            stop.set()
            with contextlib.suppress(FleetError):
                fleet.leave()


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
        FleetError: it has other content.
    """
    try:
        content = message.content
        document, array = content[_DOCUMENT][_DOCUMENT], content[_PAYLOAD][_PAYLOAD]
        is_whole = len(content) == len(content[_DOCUMENT]) + 1 == len(content[_PAYLOAD]) + 1 == 2
        if is_whole and isinstance(document, bytes) and isinstance(array, Array):
            return document, bytes(array.data)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise FleetError("malformed", "message has other content than was agreed") from error
    raise FleetError("malformed", "message has other content than was agreed")


def _activate(client: FleetHttpClient, key: EllipticCurvePrivateKey) -> int:
    request = ActivateNodeRequest(
        public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=HEARTBEAT_SECONDS
    )
    return int(_call(client.ActivateNode, request).node_id)


def _beat(fleet: Fleet, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS * 0.8):
        try:
            fleet.beat()
        except FleetError as error:  # the main loop meets the same trouble and acts on it
            logger.debug("heartbeat failed: trouble=%s", error.trouble)


def _call(function: Callable[[Any], T], request: Any) -> T:
    """Call the coordinator once, and name what went wrong."""
    try:
        return function(request)
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        known = FlowerError.from_json(error.response.text)
        if status == httpx.codes.UNAUTHORIZED:
            raise FleetError(
                "not_admitted",
                "the coordinator does not admit this node: it is revoked, or this clock is wrong",
            ) from error
        if known is not None and known.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
            raise FleetError(
                "still_online", "an earlier process of this site counts as online"
            ) from error
        if status == httpx.codes.FORBIDDEN:
            raise FleetError("run_over", "the coordinator has ended the run that asked") from error
        raise FleetError("unreachable", f"the coordinator answers with status {status}") from error
    except httpx.RequestError as error:
        if "certificate" in str(error).lower():
            raise FleetError(
                "tls", "the coordinator's certificate is not of this alliance"
            ) from error
        raise FleetError(
            "unreachable", f"the coordinator cannot be reached: {type(error).__name__}"
        ) from error
    except ValueError as error:
        raise FleetError("unreachable", "the answer is not the coordinator's") from error
    except RuntimeError as error:  # httpx, of a client that ``abort`` has closed
        raise FleetError("unreachable", "the connection was cut here") from error
