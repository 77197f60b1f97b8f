"""Named arrays have one order, one type and their own shapes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from huizhen.protocol.adapter import difference, in_order, is_head, shapes_of


def f32(values):
    return np.array(values, np.float32)


# U+FB33 comes first by UTF-8 and code point, U+1F600 first by UTF-16, as RFC 8785 sorts.
NAMES = ["l.10.lora_A", "l.2.lora_A", "Ω", "\ufb33", "\U0001f600", "head.bias", "a", "a.b", "B"]


@given(st.permutations(NAMES))
def test_any_insertion_order_gives_the_order_of_utf8(names):
    tensors = {name: np.zeros(1, np.float32) for name in names}
    expected = ["B", "a", "a.b", "head.bias", "l.10.lora_A", "l.2.lora_A", "Ω"]
    assert list(in_order(tensors)) == [*expected, "\ufb33", "\U0001f600"]
    assert list(shapes_of(tensors)) == [*expected, "\ufb33", "\U0001f600"]


def test_arrays_become_contiguous_little_endian_float32_of_the_same_values():
    values = np.arange(12, dtype=">f8").reshape(3, 4)[:, ::3]
    found = in_order({"a": values})["a"]
    assert found.dtype == np.dtype("<f4")
    assert found.flags.c_contiguous
    assert found.tolist() == [[0, 3], [4, 7], [8, 11]]


def test_a_scalar_keeps_its_empty_shape():
    assert shapes_of({"head.scale": f32(3.5)}) == {"head.scale": ()}


def test_an_update_is_after_minus_before_for_what_was_trained():
    before = {"A": f32([5.0]), "B": f32([1.5, -2.0])}
    found = difference({"B": f32([1.0, 0.25])}, before)
    assert {name: array.tolist() for name, array in found.items()} == {"B": [-0.5, 2.25]}


def test_only_names_under_head_belong_to_the_head():
    assert is_head("head.weight")
    assert not is_head("head_2.weight")
    assert not is_head("layer.head.weight.lora_B")
