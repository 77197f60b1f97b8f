"""An update's numbers in fewer bits, or only some of them: what arrives, and what is refused."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from huizhen.protocol.errors import ConfigError, WireError
from huizhen.protocol.public_bits import public_words
from huizhen.protocol.study import parse_study
from huizhen.protocol.travel import PLAIN, Travel
from huizhen.protocol.wire import Message, decode, encode

SHAPES = {"a.lora_B": (5, 3), "b.lora_A": (2, 4), "head.bias": (7,), "none": (0, 3)}
WAYS = [
    Travel(dtype=dtype, share=share, seed=3, round=2)
    for dtype in ("float32", "float16", "int8")
    for share in (1.0, 0.4)
]
every_way = pytest.mark.parametrize("travel", WAYS, ids=lambda one: f"{one.dtype}-{one.share}")


def update(seed=0, scale=1e-2):
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.normal(size=s)).astype(np.float32) for n, s in SHAPES.items()}


def message(tensors, site="A"):
    return Message(kind="update", study="ab" * 32, round=2, site=site, tensors=tensors)


def arrived(tensors, travel, site="A"):
    return decode(encode(message(tensors, site), travel), shapes=SHAPES, travel=travel).tensors


def masks(travel):
    return {
        n: np.ones(s, bool) if (m := travel.mask(n, int(np.prod(s)))) is None else m.reshape(s)
        for n, s in SHAPES.items()
    }


@every_way
def test_what_arrives_is_float32_of_the_same_shapes_and_near_what_was_sent(travel):
    sent = update()
    found = arrived(sent, travel)
    for name, mask in masks(travel).items():
        value = found[name]
        assert (value.dtype, value.shape) == (np.float32, SHAPES[name])
        assert not value[~mask].any()
        kept = np.abs(np.where(mask, sent[name], 0))
        wide = kept.max(axis=int(SHAPES[name][0] <= SHAPES[name][-1] and value.ndim == 2),
                        keepdims=True, initial=0) / 127  # fmt: skip
        bound = {"float32": 0, "float16": np.abs(sent[name]) * 2**-11, "int8": wide * 1.0001}
        assert (np.abs(value - sent[name])[mask] <= (bound[travel.dtype] + 0 * value)[mask]).all()
    assert any(value.any() for value in found.values())


@every_way
def test_the_bytes_are_the_same_again_and_shrink_as_they_should(travel):
    big = {"w": (64, 256)}
    value = {"w": np.random.default_rng(0).normal(size=big["w"]).astype(np.float32)}
    data = encode(message(value), travel)
    assert encode(message(value), travel) == data
    size = {"float32": 4, "float16": 2, "int8": 1}[travel.dtype] * travel.share * 64 * 256
    extra = 64 * 4 if travel.dtype == "int8" else 0
    assert len(data) == pytest.approx(size + extra + 400, rel=0.03)


def test_int8_by_hand():
    """Row 0 has s = 1: 127 stays, 0.25 becomes 0 or 1. Row 1 is 0 and stays so."""
    travel, shapes = Travel(dtype="int8", seed=1), {"w": (2, 2)}
    sent = {"w": np.array([[127, 0.25], [0, 0]], np.float32)}
    found = decode(encode(message(sent), travel), shapes=shapes, travel=travel).tensors["w"]
    assert found[0, 0] == 127
    assert found[0, 1] in (0, 1)
    assert not found[1].any()


def test_rounding_to_int8_is_right_on_average_over_rounds_and_sites():
    sent = {"w": np.array([[127, 0.25, -0.75, 63.1]], np.float32)}
    found = [
        decode(encode(message(sent, site), way), shapes={"w": (1, 4)}, travel=way).tensors["w"]
        for round, site in itertools.product(range(1, 501), ("A", "B", "C", "D"))
        for way in [Travel(dtype="int8", seed=1, round=round)]
    ]
    # 2,000 draws of a deviation of at most 1/2: 4.5 deviations of the mean are 0.05
    assert np.mean(found, axis=0) == pytest.approx(sent["w"], abs=0.05)
    assert len({one.tobytes() for one in found}) > 4


def test_each_site_rounds_by_its_own_numbers_and_all_leave_out_the_same():
    travel, sent = Travel(dtype="int8", share=0.5, seed=1), update(scale=1.0)
    one, other = (arrived(sent, travel, site) for site in "AB")
    assert any((one[name] != other[name]).any() for name in sent)
    plain = dataclasses.replace(travel, dtype="float32")
    zero = [{n: v == 0 for n, v in arrived(sent, plain, site).items()} for site in "AB"]
    assert all((zero[0][name] == zero[1][name]).all() for name in sent)


def mask(travel, name, size):
    found = travel.mask(name, size)
    assert found is not None
    return found


def test_the_mask_is_of_the_study_the_round_and_the_tensor():
    ways = [Travel(share=0.5, seed=s, round=r) for s, r in ((1, 1), (1, 2), (2, 1))]
    found = {mask(way, name, 400).tobytes() for way in ways for name in ("a", "b")}
    assert len(found) == 6
    # 400,000 coins: 5 deviations are 0.4 %
    assert mask(Travel(share=0.3), "a", 400_000).mean() == pytest.approx(0.3, abs=0.004)


def test_over_the_rounds_every_number_is_sent():
    seen = np.zeros(1000, bool)
    for round in range(1, 60):
        seen |= Travel(share=0.25, seed=9, round=round).mask("a", 1000)
    assert seen.all()


def usual(value):
    """Whether it is no value that int8 takes for 0 whatever stands beside it."""
    return value == 0 or abs(value) > 1e-20


@settings(max_examples=60)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32).filter(usual), min_size=6, max_size=6),
    travel=st.sampled_from(WAYS),
)
def test_the_reader_agrees_with_a_slow_twin(values, travel):
    """One number after the other, by the definition."""
    shapes = {"w": (2, 3)}
    sent = {"w": np.array(values, np.float32).reshape(2, 3)}
    found = decode(encode(message(sent), travel), shapes=shapes, travel=travel).tensors["w"]
    mask = travel.mask("w", 6)
    for i in range(2):
        kept = [
            float(sent["w"][i, j]) if mask is None or mask[3 * i + j] else 0.0 for j in range(3)
        ]
        scale = float(np.float32(max(abs(value) for value in kept) / 127))
        for j, value in enumerate(kept):
            if travel.dtype == "float32":
                assert found[i, j] == np.float32(value)
            elif travel.dtype == "float16":
                assert found[i, j] == np.float32(np.float16(value))
            else:
                word = public_words(3, "rounding/2/A/w", 6)[3 * i + j]
                steps = math.floor(value / scale + (int(word) + 0.5) / 65536) if scale else 0
                sent_here = mask is None or mask[3 * i + j]
                assert found[i, j] == pytest.approx(scale * steps if sent_here else 0, rel=1e-6)


def test_a_value_that_float16_does_not_hold_does_not_leave():
    large = update()
    large["head.bias"][0] = 70_000
    with pytest.raises(WireError, match=r"'head.bias' holds a value over 65504"):
        encode(message(large), Travel(dtype="float16"))


@every_way
def test_bytes_of_another_way_are_refused(travel):
    data = encode(message(update()), travel)
    for other in WAYS:
        if other != travel:
            with pytest.raises(WireError, match=r"dtype|encoding"):
                decode(data, shapes=SHAPES, travel=other)
    for i in (8, len(data) // 2, len(data) - 1):
        with pytest.raises(WireError):
            decode(data[:i], shapes=SHAPES, travel=travel)
    with pytest.raises(WireError):
        decode(data + b"\x00", shapes=SHAPES, travel=travel)


@pytest.mark.parametrize(
    ("whole", "scale"),
    [
        ([1, 2, 3, 127], np.nan), ([1, 2, 3, 127], np.inf), ([1, 2, 3, 127], -1.0),
        ([1, 2, 3, -128], 1.0), ([1, 2, 3, 125], 1.0), ([0, 0, 0, 0], 1.0), ([0, 0, 0, 1], 0.0),
        ([0, 0, 0, 0], -0.0), ([1, 2, 3, 127], 9000.0), ([1, 2, 3, 127], 3e38),
    ],
)  # fmt: skip
def test_int8_has_one_encoding_and_what_no_rounding_gives_is_refused(whole, scale):
    """Among them all that would decode to infinity, or to what other bytes decode to."""
    travel, shapes = Travel(dtype="int8"), {"w": (1, 4)}
    data = encode(message({"w": np.array([[1, 2, 3, 127]], np.float32)}), travel)
    # integers, then the scale: ".scale" is after the tensor itself
    assert data[-8:] == bytes([1, 2, 3, 127]) + np.float32(1).tobytes()
    other = np.array(whole, np.int8).tobytes() + np.float32(scale).tobytes()
    with pytest.raises(WireError, match=r"not finite|no rounding"):
        decode(data[:-8] + other, shapes=shapes, travel=travel)


@settings(max_examples=100)
@given(st.lists(st.floats(-(2**20), 2**20, width=32), min_size=12, max_size=12), st.booleans())
def test_whatever_is_sent_as_int8_is_read(values, is_masked):
    travel = Travel(dtype="int8", share=0.5 if is_masked else 1.0, seed=1)
    sent = {"w": np.array(values, np.float32).reshape(3, 4)}
    data = encode(message(sent), travel)
    found = decode(data, shapes={"w": (3, 4)}, travel=travel).tensors["w"]
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= 2**20


def test_a_value_that_int8_does_not_hold_does_not_leave():
    with pytest.raises(WireError, match=r"holds a value over 1.04858e\+06"):
        encode(message({"w": np.array([[2.0**21]], np.float32)}), Travel(dtype="int8"))


def test_as_they_are_nothing_is_copied():
    data = encode(message(update()))
    found = decode(data, shapes=SHAPES, travel=PLAIN, copy=False).tensors
    assert not any(value.flags.owndata for value in found.values())


def terms(name="fedavg", **rounds):
    private = {} if name != "scaffold" else {"unit": "none"}
    steps = {"length": "steps", "optimizer": "sgd", "momentum": 0.0}
    return {
        "study": {"name": "s", "seed": 4},
        "task": {"kind": "tabular", "label": "y", "labels": ["0", "1"], "features": {"f": [0, 1]}},
        "privacy": private,
        "strategy": {"name": name},
        "rounds": {**rounds, **(steps if name == "scaffold" else {})},
    }


def test_the_study_says_how_its_updates_travel():
    study = parse_study(terms(update_dtype="int8", update_share=0.5), "study.toml")
    assert study.travel(7) == Travel(dtype="int8", share=0.5, seed=4, round=7)
    assert parse_study(terms(), "study.toml").travel(1).is_plain


@pytest.mark.parametrize("share", [0, -0.5, 0.0009, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ConfigError, match=r"\[rounds\].*update_share is .*, expected 0.001 to 1"):
        parse_study(terms(update_share=share), "study.toml")


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad", "fedavgm", "scaffold"])
def test_who_takes_an_update_for_a_gradient_needs_every_number(name):
    parse_study(terms(name, update_dtype="int8"), "study.toml")
    with pytest.raises(ConfigError, match=f"{name!r} would take what is not sent for a gradient"):
        parse_study(terms(name, update_share=0.5), "study.toml")
