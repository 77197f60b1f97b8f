"""An update leaves with the agreed tensors or not at all."""

import hashlib
from typing import Any

import numpy as np
import pytest

from huizhen.client.outbox import Outbox, send
from huizhen.protocol.errors import PrivacyError, ReleaseLostError, StorageError, WireError
from huizhen.protocol.travel import Travel
from huizhen.protocol.wire import decode

UPDATE = {"a.lora_B": np.ones((2, 1), np.float32), "head.bias": np.zeros(2, np.float32)}
S = "ab" * 32
SHAPES = {"a.lora_B": (2, 1), "head.bias": (2,)}


def test_the_agreed_tensors_leave_as_an_update():
    envelope = send(study="ab" * 32, round=3, site="A", update=UPDATE, agreed=SHAPES)
    message = decode(envelope.data, shapes=SHAPES)
    assert (message.kind, message.study, message.round, message.site) == (
        "update",
        "ab" * 32,
        3,
        "A",
    )
    assert (message.tensors["a.lora_B"] == 1).all()


@pytest.mark.parametrize(
    "agreed",
    [
        {"a.lora_B": (2, 1)},
        {**SHAPES, "a.lora_A": (1, 2)},
        {"a.lora_B": (2, 1), "head.weight": (2,)},
        {},
        {**SHAPES, "a.lora_B": (1, 2)},
        {**SHAPES, "a.lora_B": (2,)},
    ],
    ids=["more", "fewer", "others", "none agreed", "turned", "flat"],
)
def test_other_tensors_than_agreed_do_not_leave(agreed):
    with pytest.raises(PrivacyError, match="nothing was sent"):
        send(study="ab" * 32, round=3, site="A", update=UPDATE, agreed=agreed)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_do_not_leave(value):
    broken = {"a.lora_B": np.full((2, 1), value, np.float32)}
    with pytest.raises(WireError, match="not finite"):
        send(study="ab" * 32, round=3, site="A", update=broken, agreed={"a.lora_B": (2, 1)})


def test_a_value_that_no_coordinator_counts_does_not_leave():
    for value, is_sent in ((2.0**20, True), (float(np.nextafter(np.float32(2**20), 3e38)), False)):
        large = {"a.lora_B": np.full((2, 1), -value, np.float32)}
        agreed = {"a.lora_B": (2, 1)}
        if is_sent:
            send(study=S, round=3, site="A", update=large, agreed=agreed)
        else:
            with pytest.raises(WireError, match="which no coordinator counts"):
                send(study=S, round=3, site="A", update=large, agreed=agreed)


def test_what_was_kept_comes_back_and_nothing_else(tmp_path):
    outbox = Outbox(tmp_path / "outbox")
    sent = [send(study=S, round=n, site="A", update=UPDATE, agreed=SHAPES) for n in (3, 4)]
    digests = [hashlib.sha256(one.data).hexdigest() for one in sent]
    for one in sent:
        outbox.keep(S, one)
    assert [outbox.kept(S, digest) for digest in digests] == sent
    left = tmp_path / "outbox" / S / ".left.update.77"
    left.write_bytes(b"what a killed process wrote")
    with outbox.alone(S):
        outbox.forget_others(S, digests[1])
    assert not left.exists()
    with pytest.raises(ReleaseLostError, match="nothing else may be sent"):
        outbox.kept(S, digests[0])
    [place] = (tmp_path / "outbox").rglob("*.update")
    place.write_bytes(sent[0].data)
    with pytest.raises(ReleaseLostError, match="was changed"):
        outbox.kept(S, digests[1])


def test_a_disk_that_does_not_give_an_update_has_not_lost_it(tmp_path):
    """Lost is lost for ever, and the study goes on; a disk can be mended."""
    outbox = Outbox(tmp_path)
    (tmp_path / S / f"{S}.update").mkdir(parents=True)
    with pytest.raises(StorageError, match="cannot be read: Is a directory"):
        outbox.kept(S, S)


def test_metrics_are_kept_by_study(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.keep_metrics(S, b"{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    assert outbox.kept_metrics(S, digest) == b"{}"
    with pytest.raises(ReleaseLostError, match="nothing else may be sent"):
        outbox.kept_metrics("cd" * 32, digest)
    with pytest.raises(ReleaseLostError, match="was changed"):
        outbox.kept_metrics(S, "0" * 64)


def test_ledgers_of_like_names_have_outboxes_of_their_own(tmp_path):
    places = [tmp_path / name for name in ("rare", "rare.sqlite", "rare.2024", "rare.2025")]
    assert len({Outbox.beside(place).folder for place in places}) == 4


@pytest.mark.parametrize(
    ("dtype", "most"), [("float32", 2.0**20), ("float16", 65504), ("int8", 2.0**20)]
)
def test_under_privacy_a_value_is_cut_and_the_release_leaves(dtype, most):
    """Whether it leaves would else tell where its values lie, again with each attempt."""
    large = {"a.lora_B": np.array([[3e9], [-3e9]], np.float32)}
    agreed = {"a.lora_B": (2, 1)}
    terms: dict[str, Any] = {"study": S, "round": 3, "site": "A", "update": large, "agreed": agreed}
    travel = Travel(dtype=dtype)
    with pytest.raises(WireError, match="holds a value over"):
        send(**terms, travel=travel)
    envelope = send(**terms, travel=travel, saturate=True)
    found = decode(envelope.data, shapes={"a.lora_B": (2, 1)}, travel=travel).tensors["a.lora_B"]
    assert found.ravel().tolist() == pytest.approx([most, -most], rel=1e-6)


def test_what_is_kept_here_is_given_back_only_as_it_was(tmp_path):
    outbox = Outbox(tmp_path)
    envelope = send(study=S, round=3, site="A", update=UPDATE, agreed=SHAPES)
    digest = hashlib.sha256(envelope.data).hexdigest()
    assert outbox.own(S, digest) is None
    outbox.keep_own(S, envelope, b"own numbers")
    assert outbox.own(S, digest) == b"own numbers"
    [place] = (tmp_path / S).glob("*.own")
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.write_bytes(bytes(data))
    assert outbox.own(S, digest) is None
