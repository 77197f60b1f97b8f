"""What of a node's bytes is let through to SuperLink, which believes them."""

import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, ObjectTree

from huizhen.server.superlink import is_plain_answer


def tree(depth, *, twins=False, at=0):
    """Return a chain of parts; with twins the second one at each level is a bare leaf."""
    children = []
    if at < depth - 1:
        children = [tree(depth, twins=twins, at=at + 1)]
        if twins:
            children.append(ObjectTree(object_id=f"part {at + 1}"))
    return ObjectTree(object_id=f"part {at}", children=children)


def pushed(*trees, messages=1):
    return PushMessagesRequest(
        messages_list=[Message()] * messages, message_object_trees=trees
    ).SerializeToString()


def test_an_answer_as_flower_makes_it_passes():
    chunks = [ObjectTree(object_id=f"chunk {n}") for n in range(2000)]
    array = ObjectTree(object_id="array", children=chunks)
    arrays = ObjectTree(object_id="arrays", children=[array])
    config = ObjectTree(object_id="config")
    content = ObjectTree(object_id="content", children=[config, arrays])
    assert is_plain_answer(pushed(ObjectTree(object_id="root", children=[content])))


def test_up_4_twins_that_superlink_would_expand_without_end_are_refused():
    """Sixty levels are a few kB to send and 2^60 parts to expand."""
    data = pushed(tree(60, twins=True))
    assert len(data) < 10_000
    assert not is_plain_answer(data)
    assert not is_plain_answer(pushed(tree(4, twins=True)))


@pytest.mark.parametrize(
    "data",
    [
        b"\xff", b"", pushed(tree(6)), pushed(), pushed(tree(2), tree(2)),
        pushed(tree(2), messages=2), pushed(tree(2), messages=0),
    ],
    ids=["junk", "nothing", "too deep", "no tree", "two trees", "two messages", "no message"],
)  # fmt: skip
def test_anything_else_is_refused(data):
    assert not is_plain_answer(data)
