"""HZM1 has one encoding of each message, and a liar gets a WireError and nothing else.

The golden files were written by ``struct`` and ``json``, not by ``encode``. They are a promise and
never change (docs/adr/0005): a later format has another magic and its own files.
"""

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from huizhen.protocol.errors import WireError
from huizhen.protocol.wire import (
    MAX_HEADER_BYTES,
    Message,
    declared_values,
    decode,
    encode,
    max_bytes,
)


def f32(values):
    return np.array(values, np.float32)


GOLDEN = Path(__file__).parent.parent / "golden"
STUDY = "00112233445566778899aabbccddeeff" * 2
SHAPES = {"head.bias": (3,), "l.0.lora_B": (2, 2)}
UPDATE = Message(
    kind="update",
    study=STUDY,
    round=7,
    site="Hôpital 会诊",
    tensors={  # not in the order of the wire
        "l.0.lora_B": np.array([[0.1, -2.5], [1e-45, 3.4028235e38]], np.float32),
        "head.bias": np.array([-0.0, 1 / 3, -1.1754942e-38], np.float32),
    },
)
ADAPTER = Message(
    kind="adapter",
    study=STUDY,
    round=1,
    site="",
    tensors={
        "\U0001f600.lora_B": f32([[1]]),
        "\ufb33.lora_B": f32([[-1.5, 2]]),
        "head.scale": f32(0.75),
        "head.weight": np.zeros((0, 4), np.float32),
    },
)


def shapes_of(message):
    return {name: array.shape for name, array in message.tensors.items()}


def same(a, b):
    """Whether two messages are the same to the last bit of every value."""
    return (
        replace(a, tensors={}) == replace(b, tensors={})
        and shapes_of(a) == shapes_of(b)
        and all(a.tensors[name].tobytes() == b.tensors[name].tobytes() for name in a.tensors)
    )


def header(**changes):
    """Return the header of ``UPDATE`` as JSON values."""
    shapes = {"head.bias": [3], "l.0.lora_B": [2, 2]}
    values = {"dtype": "float32", "kind": "update", "round": 7, "site": UPDATE.site}
    return {**values, "study": STUDY, "tensors": shapes, **changes}


def dumps(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()


def payload(entries=None, data=None, *, pad=True):
    """Return safetensors bytes by hand; by default those of ``UPDATE``."""
    if entries is None:
        entries = {
            "head.bias": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
            "l.0.lora_B": {"dtype": "F32", "shape": [2, 2], "data_offsets": [12, 28]},
        }
    if data is None:
        data = UPDATE.tensors["head.bias"].tobytes() + UPDATE.tensors["l.0.lora_B"].tobytes()
    text = (
        entries
        if isinstance(entries, bytes)
        else json.dumps(entries, separators=(",", ":")).encode()
    )
    if pad:
        text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def assemble(head=None, body=None, *, length=None, magic=b"HZM1"):
    """Return a message from parts that may lie."""
    text = head if isinstance(head, bytes) else dumps(header() if head is None else head)
    claimed = len(text) if length is None else length
    return magic + struct.pack("<I", claimed) + text + (payload() if body is None else body)


VALID = encode(UPDATE)


@pytest.mark.parametrize(("name", "message"), [("update", UPDATE), ("adapter", ADAPTER)])
def test_the_bytes_are_the_golden_ones(name, message):
    golden = (GOLDEN / f"hzm1-{name}.bin").read_bytes()
    assert encode(message) == golden
    assert same(decode(golden, shapes=shapes_of(message)), message)


def test_the_hand_made_parts_are_the_valid_message():
    assert assemble() == VALID  # so each attack below differs in what it says, and in no more


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
names = names.filter(lambda name: name != "__metadata__")
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
messages = st.builds(
    Message,
    kind=st.sampled_from(["adapter", "update"]),
    study=st.text("0123456789abcdef", max_size=64),
    round=st.integers(1, 1_000_000),
    site=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    tensors=st.dictionaries(
        names,
        arrays(
            np.float32,
            array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3),
            elements=finite,
        ),
        max_size=4,
    ),
)


messages = messages.filter(lambda message: message.kind == "update" or not message.site)


@given(messages)
def test_decode_undoes_encode_to_the_last_bit_within_the_announced_size(message):
    data = encode(message)
    shapes = shapes_of(message)
    assert same(decode(data, shapes=shapes), message)
    header_bytes = int.from_bytes(data[4:8], "little")
    assert len(data) - 8 - header_bytes <= max_bytes(shapes) - 8 - MAX_HEADER_BYTES


def test_negative_zero_and_subnormals_survive():
    values = np.array([-0.0, 0.0, 1e-45, -1e-45, 1.1754942e-38], np.float32)
    data = encode(replace(UPDATE, tensors={"a": values}))
    found = decode(data, shapes={"a": (5,)}).tensors["a"]
    assert found.tobytes() == values.tobytes()
    assert np.signbit(found).tolist() == [True, False, False, True, False]


def refused_or_canonical(data):
    """Decode; whatever is not refused must be the one encoding of what came out."""
    try:
        message = decode(data, shapes=SHAPES)
    except WireError:
        return
    assert encode(message) == data


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(data):
    with pytest.raises(WireError):
        decode(data, shapes=SHAPES)


@given(st.binary(max_size=200), st.integers(0, 2**32 - 1))
def test_arbitrary_bytes_after_the_magic_are_refused(data, length):
    with pytest.raises(WireError):
        decode(b"HZM1" + struct.pack("<I", length) + data, shapes=SHAPES)
    with pytest.raises(WireError):
        decode(b"HZM1" + struct.pack("<I", len(data)) + data, shapes=SHAPES)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def declaring(*shapes):
    """Return what begins as a message with tensors of these shapes, in JSON."""
    text = ", ".join(f'"{number}": {shape}' for number, shape in enumerate(shapes))
    return assemble(json.dumps(header(tensors={})).replace("{}", f"{{{text}}}").encode())


def test_a_header_says_how_many_numbers_come():
    assert declared_values(declaring("[2, 3]", "[]", "[0, 9]")) == 7
    assert declared_values(declaring(f"[{2**40}]")) == 2**40


@pytest.mark.parametrize(
    "shapes",
    [
        ["[1e999]"], ["[NaN]"], ["[2.0]"], ["[true]"], ["[null]"], ['["2"]'], ["[[2]]"], ["[-1]"],
        [f"[{2**40 + 1}]"], ["[1" + "0" * 4000 + "]"], [f"[{2**40}, 2]"], [f"[{2**40}]", "[1]"],
        ["3"], ["null"], ['"23"'], ['{"2": 3}'],
    ],
    ids=lambda one: one[0][:9],
)  # fmt: skip
def test_a_shape_that_no_message_has_is_refused_before_anything_counts_with_it(shapes):
    with pytest.raises(WireError, match=r"header (has|names)"):
        declared_values(declaring(*shapes))


@given(st.sampled_from(sorted(header())), json_values)
def test_any_json_in_any_place_of_the_header_is_refused_or_canonical(key, value):
    refused_or_canonical(assemble(json.dumps(header(**{key: value}), sort_keys=True).encode()))
    refused_or_canonical(assemble(dumps_or_escape(header(**{key: value}))))


def dumps_or_escape(value):
    try:
        return dumps(value)
    except UnicodeEncodeError:
        return json.dumps(value).encode()


@given(json_values)
def test_any_json_as_the_payload_header_is_refused(value):
    with pytest.raises(WireError):
        decode(assemble(body=payload(json.dumps(value).encode())), shapes=SHAPES)


@settings(max_examples=400)
@given(st.data())
def test_a_mutated_message_is_refused_or_canonical(data):
    mutated = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        match data.draw(st.sampled_from(["flip", "set", "insert", "delete", "truncate", "repeat"])):
            case "flip":
                mutated[at] ^= 1 << data.draw(st.integers(0, 7))
            case "set":
                mutated[at] = data.draw(st.integers(0, 255))
            case "insert":
                mutated[at:at] = data.draw(st.binary(min_size=1, max_size=4))
            case "delete":
                del mutated[at : at + data.draw(st.integers(1, 4))]
            case "truncate":
                del mutated[at:]
            case _:
                mutated[at:at] = mutated[at : at + 8]
        assume(mutated)
    refused_or_canonical(bytes(mutated))


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_anywhere_is_refused_or_canonical(bit):
    for at in range(len(VALID)):
        mutated = bytearray(VALID)
        mutated[at] ^= 1 << bit
        refused_or_canonical(bytes(mutated))


def test_every_truncation_and_every_repetition_of_the_end_is_refused():
    for size in range(len(VALID)):
        with pytest.raises(WireError):
            decode(VALID[:size], shapes=SHAPES)
        with pytest.raises(WireError):
            decode(VALID + VALID[size:], shapes=SHAPES)


@pytest.mark.parametrize(
    "length", [0, 1, 8, len(VALID) - 8, len(VALID) - 7, MAX_HEADER_BYTES, 2**31, 2**32 - 1]
)
def test_a_lie_about_the_header_length_is_refused(length):
    with pytest.raises(WireError, match="header"):
        decode(assemble(length=length), shapes=SHAPES)


def test_a_header_over_the_limit_is_refused_before_it_is_read():
    head = b" " * (MAX_HEADER_BYTES + 1)
    with pytest.raises(WireError, match="header claims"):
        decode(assemble(head, b""), shapes=SHAPES)
    with pytest.raises(WireError, match="header is not JSON"):  # one less is read
        decode(assemble(head[1:], b""), shapes=SHAPES)


def test_an_oversize_message_is_refused_before_it_is_parsed():
    limit = max_bytes(SHAPES)
    with pytest.raises(WireError, match=f"has {limit + 1} bytes, at most {limit}"):
        decode(b"\0" * (limit + 1), shapes=SHAPES)
    with pytest.raises(WireError, match="begins with"):  # one less is looked at
        decode(b"\0" * limit, shapes=SHAPES)


@pytest.mark.parametrize("site", ["\ud800", "a\udfff", "\udc00\ud800"])
def test_a_surrogate_in_the_site_is_refused(site):
    with pytest.raises(WireError, match="not Unicode"):
        decode(assemble(json.dumps(header(site=site)).encode()), shapes=SHAPES)
    with pytest.raises(WireError):  # as the bytes ED A0 80, which UTF-8 has not
        decode(assemble(dumps(header(site="@")).replace(b"@", b"\xed\xa0\x80")), shapes=SHAPES)
    with pytest.raises(WireError, match="not Unicode"):
        encode(replace(UPDATE, site=site))


DUPLICATES = {
    "first lies": dumps(header()).replace(b'"round":7', b'"round":6,"round":7'),
    "last lies": dumps(header()).replace(b'"round":7', b'"round":7,"round":6'),
    "same value": dumps(header()).replace(b'"round":7', b'"round":7,"round":7'),
    "tensor": dumps(header()).replace(b'"head.bias":[3]', b'"head.bias":[9],"head.bias":[3]'),
}


@pytest.mark.parametrize("head", DUPLICATES.values(), ids=DUPLICATES)
def test_duplicate_json_keys_are_refused(head):
    with pytest.raises(WireError, match="canonical"):
        decode(assemble(head), shapes=SHAPES)


def test_duplicate_keys_in_the_payload_are_refused():
    entry = b'"head.bias":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}'
    other = b'"l.0.lora_B":{"dtype":"F32","shape":[2,2],"data_offsets":[12,28]}'
    for text in (b"{%b,%b,%b}" % (entry, entry, other), b"{%b,%b,%b}" % (entry, other, other)):
        with pytest.raises(WireError):
            decode(assemble(body=payload(text)), shapes=SHAPES)


ENTRIES = json.loads(payload()[8 : 8 + struct.unpack("<Q", payload()[:8])[0]])
SWAPPED = {
    "l.0.lora_B": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "head.bias": {"dtype": "F32", "shape": [3], "data_offsets": [16, 28]},
}
COMPACT = json.dumps(ENTRIES, separators=(",", ":")).encode()
DTYPE_LAST = dumps(header()).replace(b'"dtype":"float32",', b"")[:-1] + b',"dtype":"float32"}'
OTHER_ENCODINGS = {
    "spaces in the header": json.dumps(header(), ensure_ascii=False, sort_keys=True).encode(),
    "order of keys": DTYPE_LAST,
    "an escape": dumps(header()).replace(b'"update"', b'"\\u0075pdate"'),
    "ascii": json.dumps(header(), separators=(",", ":"), sort_keys=True).encode(),
    "a shape of floats": dumps(header()).replace(b"[3]", b"[3.0]"),
    "a shape with an exponent": dumps(header()).replace(b"[3]", b"[3e0]"),
}
OTHER_PAYLOADS = {
    "metadata": payload({"__metadata__": {"a": "b"}, **ENTRIES}),
    "empty metadata": payload({"__metadata__": {}, **ENTRIES}),
    "order of keys": payload(dict(reversed(ENTRIES.items()))),
    "order of data": payload(SWAPPED, VALID[-16:] + VALID[-28:-16]),
    "spaces": payload(json.dumps(ENTRIES).encode()),
    "more padding": payload(COMPACT + b" " * 64),
    "a trailing byte": payload() + b"\0",
    "a trailing newline": payload() + b"\n",
}


@pytest.mark.parametrize("head", OTHER_ENCODINGS.values(), ids=OTHER_ENCODINGS)
def test_another_encoding_of_the_same_header_is_refused(head):
    assert json.loads(head) == header()
    with pytest.raises(WireError, match="canonical"):
        decode(assemble(head), shapes=SHAPES)


@pytest.mark.parametrize("body", OTHER_PAYLOADS.values(), ids=OTHER_PAYLOADS)
def test_another_encoding_of_the_same_payload_is_refused(body):
    assert body != payload()
    with pytest.raises(WireError):
        decode(assemble(body=body), shapes=SHAPES)


@pytest.mark.parametrize(
    "shape", [[2**40, 2**40], [2**63], [2**64], [-1], [3, 2**62], [0], [10**100], [3, 1]]
)
def test_a_huge_or_false_shape_is_refused_and_nothing_is_allocated_for_it(shape):
    head = header(tensors={"head.bias": shape, "l.0.lora_B": [2, 2]})
    with pytest.raises(WireError, match="shape"):
        decode(assemble(head), shapes=SHAPES)
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 12]}
    with pytest.raises(WireError, match="payload"):
        decode(assemble(body=payload({**ENTRIES, "head.bias": entry})), shapes=SHAPES)


@pytest.mark.parametrize("depth", [*range(900, 1010, 5), 100_000])
def test_a_deeply_nested_shape_is_refused(depth):
    deep = dumps(header()).replace(b"[3]", b"[" * depth + b"]" * depth)
    with pytest.raises(WireError):
        decode(assemble(deep), shapes=SHAPES)


@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF])
@pytest.mark.parametrize("at", [-28, -4], ids=["first", "last"])
def test_nan_and_infinity_are_refused_on_both_sides(bits, at):
    data = bytearray(VALID)
    data[at : at + 4 or None] = struct.pack("<I", bits)
    with pytest.raises(WireError, match="not finite"):
        decode(bytes(data), shapes=SHAPES)
    value = np.frombuffer(struct.pack("<I", bits), np.float32)
    with pytest.raises(WireError, match="'a' holds a value that is not finite"):
        encode(replace(UPDATE, tensors={"b": three, "a": value}))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        *[("F64", 8), ("F16", 2), ("BF16", 2), ("I32", 4), ("U32", 4), ("I8", 1), ("BOOL", 1)],
        *[("C64", 8), ("F8_E4M3", 1), ("F8_E5M2", 1), ("F8_E8M0", 1), ("F4", 0.5), ("f32", 4)],
    ],
)
def test_a_payload_of_another_dtype_is_refused(dtype, size):
    middle, end = int(4 * size), int(8 * size)
    entries = {
        "a": {"dtype": dtype, "shape": [4], "data_offsets": [0, middle]},
        "b": {"dtype": dtype, "shape": [4], "data_offsets": [middle, end]},
    }
    head = header(tensors={"a": [4], "b": [4]})
    with pytest.raises(WireError, match="payload"):
        decode(assemble(head, payload(entries, b"\0" * end)), shapes={"a": (4,), "b": (4,)})


def test_a_header_that_names_another_dtype_is_refused():
    with pytest.raises(WireError, match="dtype"):
        decode(assemble(header(dtype="float64")), shapes=SHAPES)


one = np.ones((2, 2), np.float32)
three = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"l.0.lora_B": one}, "'head.bias' is missing"),
        ({"head.bias": three}, "'l.0.lora_B' is missing"),
        ({"head.bias": three, "l.0.lora_B": one, "x": one}, "'x' is not part of the study"),
        ({"head.bias": three, "l.0.lora_b": one}, "'l.0.lora_B' is missing"),
        ({"head.bias": three, "l.0.lora_B": one.reshape(4)}, r"has shape \[4\], expected \[2, 2\]"),
        ({"head.bias": three, "l.0.lora_B": one[:1]}, r"has shape \[1, 2\], expected"),
        ({}, "is missing"),
    ],
)
def test_missing_extra_renamed_and_reshaped_tensors_are_refused(tensors, complaint):
    with pytest.raises(WireError, match=complaint):
        decode(encode(replace(UPDATE, tensors=tensors)), shapes=SHAPES)


def test_a_payload_with_other_tensors_than_its_header_is_refused():
    for entries in (
        {"head.bias": ENTRIES["head.bias"]},
        {**ENTRIES, "l.0.lora_B": {**ENTRIES["l.0.lora_B"], "shape": [4]}},
        {("x" if name == "head.bias" else name): entry for name, entry in ENTRIES.items()},
    ):
        end = max(entry["data_offsets"][1] for entry in entries.values())
        with pytest.raises(WireError, match="payload is not"):
            decode(assemble(body=payload(entries, VALID[-28:][:end])), shapes=SHAPES)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kind": "model"}, "kind"),
        ({"kind": "adapter"}, "adapter names a site"),
        ({"kind": ["update"]}, "kind is not of type str"),
        ({"round": 0}, "round is 0"),
        ({"round": -1}, "round is -1"),
        ({"round": 1_000_001}, "round is 1000001"),
        ({"round": 7.0}, "round is not of type int"),
        ({"round": True}, "round is not of type int"),
        ({"round": None}, "round is not of type int"),
        ({"study": 5}, "study is not of type str"),
        ({"site": None}, "site is not of type str"),
        ({"tensors": []}, "tensors is not of type dict"),
        ({"extra": 1}, "other keys"),
    ],
)
def test_a_header_with_a_wrong_field_is_refused(change, complaint):
    with pytest.raises(WireError, match=complaint):
        decode(assemble(header(**change)), shapes=SHAPES)


@pytest.mark.parametrize("key", sorted(header()))
def test_a_header_without_a_field_is_refused(key):
    head = header()
    del head[key]
    with pytest.raises(WireError, match="other keys"):
        decode(assemble(head), shapes=SHAPES)


@pytest.mark.parametrize("magic", [b"HZM2", b"hzm1", b"\0\0\0\0", b"PK\3\4", b"\x80\4\x95\0"])
def test_another_magic_is_refused(magic):
    with pytest.raises(WireError, match="begins with"):
        decode(assemble(magic=magic), shapes=SHAPES)


@pytest.mark.parametrize("round", [0, -3, 1_000_001, 2**60])
def test_a_round_that_no_one_may_send_is_not_encoded(round):
    with pytest.raises(WireError, match="round"):
        encode(replace(UPDATE, round=round))


def test_a_header_that_no_one_may_send_is_not_encoded():
    with pytest.raises(WireError, match=f"at most {MAX_HEADER_BYTES}"):
        encode(replace(UPDATE, site="x" * MAX_HEADER_BYTES))


@pytest.mark.parametrize("names", [["a"], ["b", "a"], ["é", "z", "中文", "😀", 'quote"', "back\\"]])
def test_the_payload_is_what_the_safetensors_library_reads_and_writes(names):
    tensors = {name: np.full((2, n + 1), n, np.float32) for n, name in enumerate(names)}
    tensors["empty"] = np.ones((), np.float32)
    data = encode(replace(UPDATE, tensors=tensors))
    body = data[8 + int.from_bytes(data[4:8], "little") :]
    found = safetensors.numpy.load(body)
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)
    assert body == safetensors.numpy.save(tensors)


def test_views_are_read_only_and_copies_are_not():
    views = decode(VALID, shapes=SHAPES, copy=False).tensors
    assert not any(array.flags.writeable for array in views.values())
    assert all(array.flags.writeable for array in decode(VALID, shapes=SHAPES).tensors.values())
