"""The first reason found is the one that is told, from the bytes outward to the sender."""

import numpy as np
import pytest

from huizhen.protocol.wire import Message, encode
from huizhen.server.validation import check_update


def f32(values):
    return np.array(values, np.float32)


GOOD = {"kind": "update", "study": "ab", "round": 3, "site": "north"}
SHAPES = {"x.lora_B": (2,)}


def checked(*, shapes=SHAPES, seen=(), max_norm=2.0, **changes):
    tensors = {"x.lora_B": f32([0.25, -1])}
    data = encode(Message(**{**GOOD, "tensors": tensors, **changes}))
    return check_update(
        data,
        shapes=shapes,
        study="ab",
        round=3,
        sites={"north", "south"},
        seen=seen,
        max_norm=max_norm,
    )


def test_a_good_update_comes_back_as_it_was_sent():
    message = checked(seen={"south"})
    assert isinstance(message, Message)
    assert (message.site, message.round) == ("north", 3)
    assert message.tensors["x.lora_B"].tolist() == [0.25, -1]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"kind": "adapter", "site": ""}, "wrong_kind"),
        ({"study": "AB"}, "wrong_study"),
        ({"study": ""}, "wrong_study"),
        ({"round": 2}, "wrong_round"),
        ({"round": 4}, "wrong_round"),
        ({"site": "north "}, "unknown_site"),
        ({"seen": {"north"}}, "duplicate"),
        ({"shapes": {"x.lora_B": (3,)}}, "malformed"),
        ({"shapes": {}}, "malformed"),
    ],
)
def test_each_fault_has_its_code(changes, code):
    assert checked(**changes) == code


@pytest.mark.parametrize(("most", "code"), [(1.03, "norm_too_large"), (1.031, None)])
def test_up_2_an_update_over_the_study_s_norm_is_refused(most, code):
    """Its norm is the root of 1.0625, 1.0308."""
    found = checked(max_norm=most)
    assert found == code if code else isinstance(found, Message)


def test_with_all_faults_the_outermost_is_told_first():
    faults = {"study": "cd", "round": 9, "site": "west"}
    assert checked(**{**faults, "kind": "adapter", "site": ""}) == "wrong_kind"
    for name, code in {
        "study": "wrong_study",
        "round": "wrong_round",
        "site": "unknown_site",
    }.items():
        assert checked(seen={"west", "north"}, **faults) == code
        del faults[name]
    assert checked(seen={"west", "north"}, **faults) == "duplicate"
