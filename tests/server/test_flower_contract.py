"""What ``server/flower.py`` and ``client/flower.py`` rely on, asked of Flower 1.41.0 itself."""

import contextlib
import hashlib
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.interceptors import (
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from tests.federation.loopback import flower, node_pem, server_superlink, site_flower, superlink

from huizhen.protocol.errors import ProtocolError, StorageError
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


@pytest.fixture
def node(link, request):
    """A node of its own for each test, admitted and connected, and its number."""
    name = request.node.name
    number = link.admit(name)
    with link.connect(name) as fleet:
        assert fleet.node == number
        yield fleet


def receive(fleet, seconds=10.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (request := fleet.receive()) is not None:
            return request
        time.sleep(0.02)
    raise AssertionError("no message came")


def pull(run, name, *, max_bytes=MIB, seconds=10.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (reply := run.pull(name, max_bytes=max_bytes)) is not None:
            return reply
        time.sleep(0.02)
    raise AssertionError("no reply came")


def ask(run, fleet, payload=b"p", document=b"d"):
    """Send a node a message; return Flower's name of it and what the node got."""
    names = run.push([fleet.node], document, payload, seconds=600)
    return names[fleet.node], receive(fleet)


# The way of a message.


def test_a_message_goes_there_and_back_byte_by_byte(run, node):
    everything = bytes(range(256)) * 3
    name, request = ask(run, node, payload=everything, document=everything[::-1])
    assert (request.document, request.payload) == (everything[::-1], everything)
    node.reply(request, b"answer", everything)
    assert pull(run, name) == flower.Reply(b"answer", everything)


def test_an_answer_without_a_payload_goes_through(run, node):
    name, request = ask(run, node, payload=b"")
    assert request.payload == b""
    node.reply(request, b"refusal")
    assert pull(run, name) == flower.Reply(b"refusal", b"")


def test_a_large_payload_goes_in_chunks_that_the_edge_lets_through(run, node):
    """17 MiB are over the edge's limit of one body, and go both ways."""
    payload = os.urandom(17 * MIB)
    name, request = ask(run, node, payload=payload)
    assert request.payload == payload
    node.reply(request, b"d", payload[::-1])
    found = pull(run, name, max_bytes=17 * MIB, seconds=60)
    assert found.payload == payload[::-1]


def test_the_size_of_a_chunk_follows_the_variable():
    """It is read once, when Flower is loaded: so it is set before, by ``use_network``."""
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from huizhen.client.flower import pack\n"
        "from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects\n"
        "import os\n"
        "parts = get_all_nested_objects(pack(b'd', os.urandom(1 << 20)))\n"
        "print(sum(type(one).__name__ == 'ArrayChunk' for one in parts.values()))\n"
    )
    for size, chunks in ((64 << 10, 16), (512 << 10, 2)):
        environment = {**os.environ, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(size)}
        done = subprocess.run(  # noqa: S603 - our own interpreter
            [sys.executable, "-c", code], env=environment, capture_output=True, check=True
        )
        assert int(done.stdout) == chunks


def test_one_message_for_many_is_told_to_each(link, run):
    numbers = [link.admit(f"many {n}") for n in range(3)]
    with (
        link.connect("many 0") as one,
        link.connect("many 1") as two,
        link.connect("many 2") as three,
    ):
        names = run.push(numbers, b"d", b"same", seconds=60)
        assert set(names) == set(numbers)
        for fleet in (one, two, three):
            fleet.reply(receive(fleet), b"%d" % fleet.node)
        for fleet in (one, two, three):
            assert pull(run, names[fleet.node]).document == b"%d" % fleet.node


def test_a_message_is_delivered_once(run, node):
    ask(run, node)
    assert node.receive() is None


# Nodes.


def test_only_admitted_nodes_get_in(link):
    from tests.federation.loopback import make_node_key

    link.keys["stranger"] = make_node_key()
    with pytest.raises(site_flower.FleetError) as caught, link.connect("stranger"):
        pass
    assert caught.value.trouble in ("not_admitted", "still_online")


def test_admitting_again_gives_the_same_number(link):
    number = link.admit("again")
    assert link.control.admit(node_pem(link.keys["again"])) == number
    assert link.control.nodes()[node_pem(link.keys["again"])] == number


def test_id_1_an_expelled_node_pulls_and_pushes_nothing_and_never_comes_back(link, run):
    number = link.admit("expelled")
    with link.connect("expelled") as fleet:
        name, request = ask(run, fleet)
        run.push([number], b"d", b"secret", seconds=60)
        link.control.expel(number)
        for call in (fleet.receive, lambda: fleet.reply(request, b"late"), fleet.beat):
            with pytest.raises(site_flower.FleetError) as caught:
                call()
            assert caught.value.trouble == "not_admitted"
    assert pull(run, name) == flower.NoReply("no_answer")
    assert number not in run.online()
    with pytest.raises(site_flower.FleetError), link.connect("expelled"):
        pass
    with pytest.raises(ProtocolError, match="admitted once: make another"):
        link.control.admit(node_pem(link.keys["expelled"]))
    link.control.expel(number)  # again is free


def test_a_node_does_not_speak_for_another(link, run, node):
    """Its key signs for its own number alone."""
    number = link.admit("victim")
    with link.connect("victim") as victim:
        run.push([number], b"d", b"for the victim", seconds=60)
        thief = site_flower.Fleet(node._client, victim.node)
        for call in (thief.receive, thief.beat, thief.leave):
            with pytest.raises(site_flower.FleetError) as caught:
                call()
            assert caught.value.trouble == "not_admitted"
        assert receive(victim).payload == b"for the victim"


def test_a_killed_node_comes_back_at_once_by_its_last_number_alone(link):
    number = link.admit("killed")
    first = link.connect("killed")
    fleet = first.__enter__()  # and never leaves, as after kill -9
    with pytest.raises(site_flower.FleetError) as caught, link.connect("killed"):
        pass
    assert caught.value.trouble == "still_online"
    with link.connect("killed", last_node=number) as again:
        assert again.node == fleet.node == number
    first.__exit__(None, None, None)


def test_a_node_that_goes_away_gives_its_question_back(link, run):
    number = link.admit("leaving")
    with link.connect("leaving") as fleet:
        name, _ = ask(run, fleet)
        assert number in run.online()
        assert run.pull(name, max_bytes=MIB) is None
    assert pull(run, name) == flower.NoReply("no_answer")
    assert number not in run.online()


def test_a_wrong_number_of_another_is_not_deactivated(link, node):
    """The last number that a node remembers is its own, or nothing happens."""
    link.admit("other")
    with link.connect("other", last_node=node.node):
        node.beat()
        assert node.receive() is None


# Liars among the nodes.


def announce_reply(fleet, request, content, *, change=lambda message: None):
    """Send the head of a reply, as Flower has it, and return its parts without sending them."""
    reply = Message(content, reply_to=request._message)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    with no_object_id_recompute():
        head = message_to_proto(remove_content_from_message(reply))
        change(head)
        response = fleet._client.PushMessages(
            PushMessagesRequest(
                node=fleet._node,
                messages_list=[head],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[0.0],
            )
        )
        return get_all_nested_objects(reply), response


def test_an_answer_that_never_comes_holds_nobody_up(link, run, node):
    """A node announces an answer and sends no part of it; the others are heard meanwhile."""
    name, request = ask(run, node)
    announce_reply(node, request, site_flower.pack(b"d", b"never sent"))
    link.admit("honest")
    with link.connect("honest") as honest:
        other, question = ask(run, honest)
        begin = time.monotonic()
        assert run.pull(name, max_bytes=MIB) is None
        assert time.monotonic() - begin < 2
        honest.reply(question, b"here")
        assert pull(run, other).document == b"here"
        assert run.pull(name, max_bytes=MIB) is None


def test_when_a_node_s_process_connected_is_known(link, run, node):
    """A process that is killed while it sends leaves an answer that is never whole."""
    name, request = ask(run, node)
    asked = datetime.now(UTC)
    announce_reply(node, request, site_flower.pack(b"d", b"never sent"))
    assert run.pull(name, max_bytes=MIB) is None
    assert link.control.activations()[node.node] < asked
    own = next(one for one in link.keys if "process_connected" in one)
    with link.connect(own, last_node=node.node):
        assert link.control.activations()[node.node] > asked
        run.forget(name)
        again, request = ask(run, node)
        node.reply(request, b"whole", b"p")
        assert pull(run, again) == flower.Reply(b"whole", b"p")


def test_an_answer_that_comes_slowly_is_whole_when_it_is_there(run, node):
    name, request = ask(run, node)
    payload = os.urandom(3 * MIB)
    waiting: list[Any] = []

    def look():
        while not waiting:
            found = run.pull(name, max_bytes=4 * MIB)
            if found is not None:
                waiting.append(found)
            time.sleep(0.01)

    thread = threading.Thread(target=look)
    thread.start()
    node.reply(request, b"d", payload)
    thread.join(20)
    assert waiting == [flower.Reply(b"d", payload)]


def test_up_4_an_answer_over_the_limit_is_refused_without_its_bytes(run, node):
    name, request = ask(run, node)
    node.reply(request, b"d", os.urandom(12 * MIB))
    begin = time.monotonic()
    assert pull(run, name, max_bytes=MIB) == flower.NoReply("too_large")
    assert time.monotonic() - begin < 5


def test_up_4_an_answer_in_countless_parts_is_refused(run, node):
    name, request = ask(run, node)
    many = RecordDict({f"r{n}": ConfigRecord({"x": n}) for n in range(500)})
    announce_reply(node, request, many)
    assert pull(run, name, max_bytes=MIB) == flower.NoReply("too_large")


@pytest.mark.parametrize(
    "junk",
    [b"Message  2\0{}", b"Message  0\0", b"ConfigRecord  1\0\xff"],
    ids=["no content", "empty", "no protobuf"],
)
def test_up_1_a_part_that_flower_s_own_parsers_choke_on_is_malformed(run, node, junk):
    """Flower checks the digest of a part, never what is in it."""
    name, request = ask(run, node)

    reply = Message(site_flower.pack(b"d", b"p"), reply_to=request._message)
    reply.metadata.__dict__["_message_id"] = hashlib.sha256(junk).hexdigest()
    head = message_to_proto(remove_content_from_message(reply))
    response = node._client.PushMessages(
        PushMessagesRequest(
            node=node._node,
            messages_list=[head],
            message_object_trees=[ObjectTree(object_id=hashlib.sha256(junk).hexdigest())],
            clientapp_runtime_list=[0.0],
        )
    )
    node._client.PushObject(
        PushObjectRequest(
            node=node._node, run_id=request.run, object_id=hashlib.sha256(junk).hexdigest(),
            object_content=junk, session_id=response.session_id,
        )
    )  # fmt: skip
    assert pull(run, name) == flower.NoReply("malformed")


def test_up_4_who_withholds_one_part_does_not_pile_up_the_rest(run, node):
    """The others are fetched meanwhile, so that the limit is noticed."""
    name, request = ask(run, node)
    parts, response = announce_reply(node, request, site_flower.pack(b"d", os.urandom(12 * MIB)))
    chunks = [one for one, part in parts.items() if type(part).__name__ == "ArrayChunk"]
    for object_id in chunks:
        node._client.PushObject(
            PushObjectRequest(
                node=node._node, run_id=request.run, object_id=object_id,
                object_content=parts[object_id].deflate(), session_id=response.session_id,
            )
        )  # fmt: skip
    assert pull(run, name, max_bytes=MIB) == flower.NoReply("too_large")


def test_a_member_s_false_tree_spoils_no_announcement(link, run, node):
    """SuperLink keeps the first tree that names a part: here one without the adapter's chunks."""
    payload = os.urandom(MIB)
    _, request = ask(run, node, payload=payload)
    content: Any = flower.pack(b"d", payload)
    array = content["payload"]["payload"].object_id
    reply = Message(site_flower.pack(b"d", b"p"), reply_to=request._message)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    tree = ObjectTree(object_id=reply.object_id, children=[ObjectTree(object_id=array)])
    node._client.PushMessages(
        PushMessagesRequest(
            node=node._node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[tree],
            clientapp_runtime_list=[0.0],
        )
    )
    link.admit("asked later")
    with link.connect("asked later") as later:
        run.push([later.node], b"d", payload, seconds=60)
        assert receive(later).payload == payload


def odd(**records):
    return RecordDict(records)


@pytest.mark.parametrize(
    "content",
    [
        odd(),
        odd(document=ConfigRecord({"document": b"d"})),
        odd(document=ConfigRecord({"document": "text"}), payload=ArrayRecord({})),
        odd(
            document=ConfigRecord({"document": b"d", "note": "张三"}),
            payload=ArrayRecord({"payload": Array("uint8", (1,), "bytes", b"x")}),
        ),
        odd(
            document=ConfigRecord({"document": b"d"}),
            payload=ArrayRecord({"payload": Array("uint8", (1,), "bytes", b"x")}),
            more=ConfigRecord({"a": 1}),
        ),
        odd(
            document=ConfigRecord({"document": b"d"}),
            payload=ArrayRecord({"other": Array("uint8", (1,), "bytes", b"x")}),
        ),
    ],
    ids=["empty", "no payload", "text", "a key more", "a record more", "another name"],
)
def test_eg_1_other_content_than_was_agreed_is_malformed(run, node, content):
    name, request = ask(run, node)
    parts, response = announce_reply(node, request, content)
    for object_id in response.objects_to_push:
        node._client.PushObject(
            PushObjectRequest(
                node=node._node, run_id=request.run, object_id=object_id,
                object_content=parts[object_id].deflate(), session_id=response.session_id,
            )
        )  # fmt: skip
    assert pull(run, name) == flower.NoReply("malformed")


def set_head(**values):
    def change(head):
        for name, value in values.items():
            setattr(head.metadata, name, value)

    return change


def set_error(head):
    head.ClearField("content")
    head.error.code = 7
    head.error.reason = "KeyError: 张三"


@pytest.mark.parametrize(
    "change",
    [
        set_head(message_type="evil"),
        set_head(message_type="train.x"),
        set_head(created_at=float("nan")),
        set_head(created_at=1e300),
        set_head(ttl=float("inf")),
        set_head(ttl=-1.0),
        set_head(group_id="g" * 10_000),
        set_head(src_node_id=1),
        set_head(src_node_id=12345),
        set_head(dst_node_id=12345),
        set_head(message_id="x"),
        set_head(reply_to_message_id="x"),
        set_error,
    ],
    ids=lambda one: None,
)
def test_an_odd_head_of_an_answer_does_not_end_the_run(link, run, node, change):
    """Whatever Flower makes of it, the site has no answer and the others have theirs."""
    name, request = ask(run, node)
    with contextlib.suppress(httpx.HTTPError, ValueError):  # Flower may refuse it itself
        announce_reply(node, request, site_flower.pack(b"d", b"p"), change=change)
    for _ in range(5):
        found = run.pull(name, max_bytes=MIB)
        assert found is None or isinstance(found, flower.NoReply)
        time.sleep(0.02)
    other, question = ask(run, node)
    node.reply(question, b"still here")
    assert pull(run, other) == flower.Reply(b"still here", b"")
    assert not run.is_lost


# Who commands. ID-5.


def test_id_5_without_the_secret_no_task_is_acquired(link):
    for secret in (None, b"\x00" * 32):
        interceptors: list[Any] = [RuntimeVersionHttpInterceptor(component_name="SuperExec")]
        if secret is not None:
            interceptors.append(
                SuperExecAuthHttpInterceptor(
                    master_secret=secret,
                    protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"}),
                )
            )
        client = RuntimeHttpClient.from_server_address(
            link.link.address, False, link.link.ca.read_bytes(), interceptors=interceptors
        )
        try:
            with pytest.raises(httpx.HTTPStatusError) as caught:
                client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))
        finally:
            client.close()
        assert caught.value.response.status_code == 401


def test_the_edge_lets_no_more_paths_out_than_an_agent_uses():
    assert {path.rpartition("/")[2] for path in FLEET_PATHS} == {
        "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages",
        "push-messages", "push-object", "pull-object", "confirm-message-received",
    }  # fmt: skip


def test_code_6_the_child_calls_nobody_and_installs_nothing(link, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("FLWR_OIDC_ENABLED", "1")
    command, environment = server_superlink.superlink_command(
        link.link, certificate=link.folder, key=link.folder, home=link.folder / "h"
    )
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["PIP_NO_INDEX"] == "1"
    assert environment["HOME"] == environment["FLWR_HOME"] == str(link.folder / "h")
    assert not {"HTTPS_PROXY", "FLWR_OIDC_ENABLED"} & environment.keys()
    assert "--disable-runtime-dependency-installation" in command
    assert "--enable-supernode-auth" in command
    assert command[command.index("--isolation") + 1] == "process"
    assert command[command.index("--host") + 1] == "127.0.0.1"
    secret = link.link.secret.read_bytes()
    assert not any(secret.hex() in word for word in command)


def test_code_1_no_bundle_is_unpacked(link, run):
    found = [one.name for one in (link.folder / "flower").rglob("*")]
    assert not any(name == "apps" or name.endswith(".py") for name in found)


def test_a_link_without_its_secret_is_one_error(link, tmp_path):
    broken = server_superlink.Link(link.link.address, link.link.ca, tmp_path / "none", tmp_path)
    with pytest.raises(StorageError, match="cannot read"), flower.connect(broken):
        pass


# Restarts.


@pytest.mark.slow
def test_a_superlink_that_comes_back_has_given_the_run_up(tmp_path, monkeypatch):
    """Its state was in memory: nodes are admitted again, and another run begins."""
    monkeypatch.setattr(flower, "_PATIENCE_SECONDS", 5.0)
    with superlink(tmp_path / "superlink") as link:
        number = link.admit("north")
        with contextlib.suppress(server_superlink.RunLostError), flower.connect(link.link) as run:
            link.kill()
            with pytest.raises(server_superlink.RunLostError, match="cannot be reached"):
                run.online()
            assert run.is_lost
        link.start()
        with flower.connect(link.link) as run:
            assert run.online() == set()
            link.control.admit(node_pem(link.keys["north"]))
            with link.connect("north", last_node=number) as fleet:
                name, request = ask(run, fleet)
                fleet.reply(request, b"again")
                assert pull(run, name).document == b"again"


@pytest.mark.slow
def test_a_run_that_began_before_a_restart_is_lost(tmp_path):
    with superlink(tmp_path / "superlink") as link, flower.connect(link.link) as run:
        link.kill()
        link.start()
        with pytest.raises(server_superlink.RunLostError, match="refuses"):
            run.online()
