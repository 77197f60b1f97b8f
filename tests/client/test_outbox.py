"""An update leaves with the agreed tensors or not at all."""

import numpy as np
import pytest

from huizhen.client.outbox import send
from huizhen.protocol.errors import PrivacyError, WireError
from huizhen.protocol.wire import decode

UPDATE = {"a.lora_B": np.ones((2, 1), np.float32), "head.bias": np.zeros(2, np.float32)}


def test_the_agreed_tensors_leave_as_an_update():
    envelope = send(study="ab" * 32, round=3, site="A", update=UPDATE, agreed=set(UPDATE))
    assert envelope.tensors == ("a.lora_B", "head.bias")
    message = decode(envelope.data, shapes={"a.lora_B": (2, 1), "head.bias": (2,)})
    assert (message.kind, message.study, message.round, message.site) == (
        "update",
        "ab" * 32,
        3,
        "A",
    )
    assert (message.tensors["a.lora_B"] == 1).all()


@pytest.mark.parametrize(
    "agreed",
    [{"a.lora_B"}, {"a.lora_B", "head.bias", "a.lora_A"}, {"a.lora_B", "head.weight"}, set()],
    ids=["more", "fewer", "others", "none agreed"],
)
def test_other_tensors_than_agreed_do_not_leave(agreed):
    with pytest.raises(PrivacyError, match="nothing was sent"):
        send(study="ab" * 32, round=3, site="A", update=UPDATE, agreed=agreed)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_do_not_leave(value):
    broken = {"a.lora_B": np.full((2, 1), value, np.float32)}
    with pytest.raises(WireError, match="not finite"):
        send(study="ab" * 32, round=3, site="A", update=broken, agreed={"a.lora_B"})
