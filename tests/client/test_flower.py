"""The site's connection among liars: which paths it asks, whom it believes, what it sends."""

import contextlib
import inspect
import os
import socket
import ssl
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.fleet_pb2 import ActivateNodeResponse, PushMessagesRequest, PushMessagesResponse
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from hypothesis import given
from hypothesis import strategies as st
from tests.federation.loopback import flower, make_node_key, site_flower, superlink

from huizhen.client import agent, answering
from huizhen.protocol.errors import StorageError
from huizhen.server.authority import Authority, pem
from huizhen.server.edge import FLEET_PATHS

MIB = 1 << 20


@pytest.fixture(scope="module")
def link(tmp_path_factory):
    with superlink(tmp_path_factory.mktemp("superlink")) as made:
        yield made


@pytest.fixture(scope="module")
def run(link):
    with flower.connect(link.link) as made:
        yield made


class Counting:
    """A wire between a node and the edge that counts what passes, and can be cut."""

    def __init__(self, to):
        self.host, _, port = to.rpartition(":")
        self.port = int(port)
        self.up = self.down = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection((self.host, self.port))
                self._open += [near, far]
                for one, other, way in ((near, far, "up"), (far, near, "down")):
                    threading.Thread(target=self._pump, args=(one, other, way), daemon=True).start()

    def _pump(self, one, other, way):
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                setattr(self, way, getattr(self, way) + len(data))
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)

    def cut(self):
        self._listener.close()
        for one in self._open:
            one.close()


@pytest.fixture
def wire(link):
    made = Counting(link.fleet)
    yield made
    made.cut()


def ask(run, fleet, payload):
    names = run.push([fleet.node], b"d", payload, seconds=600)
    while (request := fleet.receive()) is None:
        pass
    return names[fleet.node], request


def test_code_1_and_3_an_agent_asks_for_no_bundle_and_no_run(link, run, monkeypatch):
    """Of Flower's Fleet API it uses eight calls; none of them brings code here."""
    from flwr.supernode.fleet_http_client import FleetHttpClient

    asked = []
    real = FleetHttpClient._unary_unary

    def spy(self, *, path, **rest):
        asked.append(path)
        return real(self, path=path, **rest)

    monkeypatch.setattr(FleetHttpClient, "_unary_unary", spy)
    number = link.admit("paths")
    with link.connect("paths", last_node=number) as fleet:
        _, request = ask(run, fleet, b"p")
        fleet.reply(request, b"d", b"p")
        fleet.beat()
    assert set(asked) == FLEET_PATHS
    assert not [path for path in asked if "fab" in path or "run" in path]


def test_code_1_and_3_no_call_of_the_agent_could_bring_code():
    text = "".join(inspect.getsource(module) for module in (site_flower, agent, answering))
    for word in ("GetFab", "GetRun", "Fab(", "AcquireTask", "import_module", "exec(", "eval("):
        assert word not in text


def test_eg_5_what_leaves_for_an_answer_is_its_payload_and_five_percent(link, run, wire):
    """All bytes on the wire are counted: TLS, HTTP, Flower's records and the polling."""
    number = link.admit("bytes")
    with site_flower.connect(wire.address, ca=link.link.ca, key=link.keys["bytes"]) as fleet:
        assert fleet.node == number
        _, request = ask(run, fleet, b"small")
        payload, before = os.urandom(4 * MIB), wire.up
        fleet.reply(request, b"d" * 900, payload)
        sent = wire.up - before
    assert len(payload) < sent < 1.05 * len(payload)


def test_the_answer_tells_no_time(link, run, monkeypatch):
    """How long training took would tell of the number of records."""
    from flwr.supernode.fleet_http_client import FleetHttpClient

    seen = []
    real = FleetHttpClient.PushMessages

    def spy(self, message, **rest):
        seen.append(message)
        return real(self, message, **rest)

    monkeypatch.setattr(FleetHttpClient, "PushMessages", spy)
    link.admit("time")
    with link.connect("time") as fleet:
        _, request = ask(run, fleet, b"p")
        fleet.reply(request, b"d")
    [pushed] = seen
    assert list(pushed.clientapp_runtime_list) == [0.0]


# Whom it believes.


def test_a_coordinator_of_another_authority_is_not_spoken_to(link, tmp_path):
    other = tmp_path / "other.pem"
    other.write_bytes(pem(Authority.make("rare", make_node_key(), datetime.now(UTC)).certificate))
    with (
        pytest.raises(site_flower.FleetError) as caught,
        site_flower.connect(link.fleet, ca=other, key=make_node_key()),
    ):
        pass
    assert caught.value.trouble == "tls"


def test_nobody_there_is_unreachable(link):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with (
        pytest.raises(site_flower.FleetError) as caught,
        site_flower.connect(address, ca=link.link.ca, key=make_node_key()),
    ):
        pass
    assert caught.value.trouble == "unreachable"


def test_an_authority_that_is_gone_is_one_error(link, tmp_path):
    with (
        pytest.raises(StorageError, match="cannot read"),
        site_flower.connect(link.fleet, ca=tmp_path / "none", key=make_node_key()),
    ):
        pass


def test_eg_6_a_cut_connection_ends_what_is_being_sent(link, run):
    link.admit("cut")
    with link.connect("cut") as fleet:
        name, request = ask(run, fleet, b"p")
        failed = []

        def send():
            try:
                fleet.reply(request, b"d", os.urandom(60 * MIB))
            except Exception as error:  # noqa: BLE001 - whatever a shut socket says
                failed.append(error)

        thread = threading.Thread(target=send)
        thread.start()
        fleet.abort()
        thread.join(10)
        assert not thread.is_alive()
        assert failed
    assert not isinstance(run.pull(name, max_bytes=100 * MIB), flower.Reply)


# Where it lets itself be sent.


class LyingEdge:
    """An edge of the alliance that admits a node, takes the head of an answer, and then lies."""

    def __init__(self, folder):
        self.status, self.headers, self.body = 200, {}, b""
        self.paths = []
        authority, key = Authority.make("rare", make_node_key(), datetime.now(UTC)), make_node_key()
        server = authority.for_server(["127.0.0.1"], key.public_key(), datetime.now(UTC))
        self.ca, chain = folder / "authority.pem", folder / "server.pem"
        self.ca.write_bytes(pem(authority.certificate))
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        chain.write_bytes(pem(server) + private)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain)
        edge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                edge.answer(self, self.rfile.read(int(self.headers["content-length"])))

            def log_message(self, *_):
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.address = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler, body):
        self.paths.append(handler.path)
        status, headers, found = self.status, self.headers, self.body
        if handler.path.endswith("/activate-node"):
            status, headers, found = 200, {}, ActivateNodeResponse(node_id=7).SerializeToString()
        elif handler.path.endswith("/push-messages"):
            [tree] = PushMessagesRequest.FromString(body).message_object_trees
            wanted = [one.object_id for one in iterate_object_tree(tree)]
            taken = PushMessagesResponse(objects_to_push=wanted)
            status, headers, found = 200, {}, taken.SerializeToString()
        handler.send_response(status)
        for name, value in {**headers, "content-length": str(len(found))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(found)


@pytest.fixture
def lying_edge(tmp_path):
    made = LyingEdge(tmp_path)
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def elsewhere():
    """A plain server within the hospital, and what it was sent."""
    received: list[bytes] = []

    def accept():
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                with near:
                    received.append(near.recv(1 << 16))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/x", received
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_nothing_follows_the_coordinator_elsewhere(lying_edge, elsewhere, status):
    """A 307 would carry the update over an open line, a 302 make this site ask any address."""
    address, received = elsewhere
    lying_edge.status, lying_edge.headers = status, {"location": address}
    asked = Message(site_flower.pack(b"d", b"p"), 7, "train")
    with site_flower.connect(lying_edge.address, ca=lying_edge.ca, key=make_node_key()) as fleet:
        for call in (
            lambda: fleet.reply(site_flower.Request(b"d", b"p", 1, asked), b"d", b"update"),
            fleet.beat,
            fleet.receive,
        ):
            with pytest.raises(site_flower.FleetError, match=f"status {status}") as caught:
                call()
            assert caught.value.trouble == "unreachable"
    assert any(path.endswith("/push-object") for path in lying_edge.paths)
    assert received == []


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (200, {"content-encoding": "gzip"}, b"no gzip"),
        (200, {}, b"no message"),
        (500, {}, b"[" * 100_000),
        (500, {}, b'{"code": ' + b"9" * 5000 + b"}"),
        (307, {"location": "http://[::"}, b""),
    ],
    ids=["not compressed", "no message", "nested", "digits", "nowhere"],
)
def test_what_no_coordinator_answers_is_unreachable(lying_edge, status, headers, body):
    """One kind of error, so that the heartbeat and the agent go on."""
    lying_edge.status, lying_edge.headers, lying_edge.body = status, headers, body
    with (
        site_flower.connect(lying_edge.address, ca=lying_edge.ca, key=make_node_key()) as fleet,
        pytest.raises(site_flower.FleetError) as caught,
    ):
        fleet.beat()
    assert caught.value.trouble == "unreachable"


# What it takes for a message.

texts = st.sampled_from(["document", "payload", "张三", "", "x"])
values: st.SearchStrategy[Any] = st.one_of(
    st.binary(max_size=9), st.integers(0, 9), st.text(max_size=9), st.floats(0, 1)
)
configs: st.SearchStrategy[Any] = st.dictionaries(texts, values, max_size=3).map(
    lambda one: ConfigRecord(one)
)
arrays: st.SearchStrategy[Any] = st.dictionaries(
    texts, st.binary(max_size=9).map(lambda b: Array("uint8", (len(b),), "bytes", b)), max_size=3
).map(ArrayRecord)
contents = st.dictionaries(texts, st.one_of(configs, arrays), max_size=3).map(
    lambda one: RecordDict(one)
)


@given(contents)
def test_eg_1_nothing_but_a_document_and_a_payload_is_a_message(content):
    message = Message(content, 1, "train")
    for module, errors in ((site_flower, site_flower.FleetError), (flower, (KeyError, ValueError,
                            TypeError, AttributeError))):  # fmt: skip
        try:
            document, payload = module.unpack(message)
        except errors:
            continue
        assert set(content) == {"document", "payload"}
        assert dict(content["document"]) == {"document": document}
        assert set(content["payload"]) == {"payload"}
        assert (type(document), type(payload)) == (bytes, bytes)


@given(st.binary(max_size=50), st.binary(max_size=50))
def test_what_is_packed_on_one_side_is_unpacked_on_the_other(document, payload):
    for one, other in ((site_flower, flower), (flower, site_flower)):
        message = Message(one.pack(document, payload), 1, "train")
        assert other.unpack(message) == (document, payload)
