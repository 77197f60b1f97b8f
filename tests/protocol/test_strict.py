"""What is not declared is refused, and the message says where and what was meant."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.protocol.errors import ConfigError
from huizhen.protocol.strict import build, check_keys, read_toml


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    depth: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    rate: float
    steps: int = 4
    is_final: bool = False
    name: str = "x"
    mode: Literal["slow", "fast"] = "slow"
    tags: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    limit: int | None = None
    norm: float | Literal["auto"] = 1.0
    inner: Inner = field(default_factory=Inner)
    choice: Inner | Literal["none"] = "none"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected at least 1")


def refusal(**table):
    with pytest.raises(ConfigError) as caught:
        build(Terms, {"rate": 0.5, **table}, "a.toml [terms]")
    return str(caught.value)


def test_every_declared_type_is_built():
    table = {
        "rate": 3,
        "steps": 5,
        "is_final": True,
        "name": "é",
        "mode": "fast",
        "tags": ["b", "a"],
        "sizes": {"n": 7},
        "limit": 9,
        "norm": "auto",
        "inner": {"depth": 11},
        "choice": {"depth": 13},
    }
    found = build(Terms, table, "a.toml [terms]")
    assert found == Terms(
        rate=3.0,
        steps=5,
        is_final=True,
        name="é",
        mode="fast",
        tags=("b", "a"),
        sizes={"n": 7},
        limit=9,
        norm="auto",
        inner=Inner(depth=11),
        choice=Inner(depth=13),
    )
    assert type(found.rate) is float  # TOML writes 3 for 3.0; the digest must not depend on it


def test_what_is_absent_has_its_default():
    assert build(Terms, {"rate": 0.5}, "a.toml") == Terms(rate=0.5)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("step", "steps"), ("Rate", "rate"), ("is-final", "is_final"), ("tag", "tags")],
)
def test_an_unknown_key_names_the_place_and_the_nearest_key(key, nearest):
    expected = f"a.toml [terms] has an unknown key {key!r}: did you mean {nearest!r}?"
    assert refusal(**{key: 1}) == expected


def test_an_unknown_key_near_nothing_lists_what_is_known():
    message = refusal(zzzz=1)
    assert message.startswith("a.toml [terms] has an unknown key 'zzzz': known are choice, inner,")


def test_check_keys_accepts_what_is_known():
    check_keys({"a": 1}, ["a", "b"], "a.toml")


def test_a_missing_key_is_named():
    with pytest.raises(ConfigError, match=r"a.toml \[terms\] has no 'rate': add it"):
        build(Terms, {"steps": 3}, "a.toml [terms]")


WRONG = [
    ("steps", True, "a whole number"),  # bool is a subclass of int
    ("steps", 1.0, "a whole number"),
    ("steps", "1", "a whole number"),
    ("rate", True, "a number"),
    ("rate", "0.5", "a number"),
    ("is_final", 1, "true or false"),
    ("is_final", "true", "true or false"),
    ("name", 5, "a string"),
    ("mode", "Fast", "one of 'slow', 'fast'"),
    ("mode", ["fast"], "one of 'slow', 'fast'"),
    ("tags", "abc", "a list"),  # not its letters
    ("tags", {"a": 1}, "a list"),
    ("tags", ["a", 1], "a string"),
    ("sizes", [1], "a table"),
    ("sizes", {"n": 1.5}, "a whole number"),
    ("limit", 1.5, "a whole number"),
    ("limit", False, "a whole number"),
    ("norm", "Auto", "a number or 'auto'"),
    ("norm", True, "a number or 'auto'"),
    ("inner", 3, "a table"),
    ("choice", "some", "a table or 'none'"),
]


@pytest.mark.parametrize(("key", "value", "expected"), WRONG, ids=lambda value: str(value))
def test_a_value_of_the_wrong_type_is_refused_and_what_was_expected_is_said(key, value, expected):
    message = refusal(**{key: value})
    assert message.startswith(f"a.toml [terms] {key}")
    assert message.endswith(expected)


@pytest.mark.parametrize("key", ["inner", "choice"])
def test_a_wrong_key_in_a_nested_table_keeps_its_own_complaint(key):
    expected = f"a.toml [terms] {key} has an unknown key 'dept': did you mean 'depth'?"
    assert refusal(**{key: {"dept": 1}}) == expected


def test_a_value_out_of_range_names_the_place():
    assert refusal(steps=0) == "a.toml [terms] steps is 0, expected at least 1"


@pytest.mark.parametrize("key", ["steps", "rate", "limit", "norm"])
@pytest.mark.parametrize("value", [2**53, -(2**53), 10**400], ids=["2^53", "-2^53", "10^400"])
def test_a_whole_number_that_canonical_json_cannot_hold_is_refused(key, value):
    assert key in refusal(**{key: value})


def test_the_largest_whole_number_is_accepted():
    assert build(Terms, {"rate": 2**53 - 1, "limit": 2**53 - 1}, "").limit == 2**53 - 1


plain = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.none(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([*Terms.__slots__, "rat"]), plain))
def test_only_config_errors_come_out(table):
    try:
        found = build(Terms, table, "a.toml")
    except ConfigError:
        return
    assert isinstance(found, Terms)
    assert type(found.steps) is int
    assert type(found.rate) is float


def test_read_toml_returns_the_tables(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes("[a]\r\nb = 'é'\n".encode())
    assert read_toml(path) == {"a": {"b": "é"}}


def test_read_toml_drops_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xef\xbb\xbf[a]\nb = 1\n")
    assert read_toml(path) == {"a": {"b": 1}}


BAD_FILES = {
    "repeats a key": (b"a = 1\na = 2", "is not TOML"),
    "is cut off": (b"[a", "is not TOML"),
    "is latin-1": ("a = 'é'".encode("latin-1"), "is not UTF-8"),
    "nests without end": (b"a = " + b"[" * 100_000, "is not TOML"),
    "has a number without end": (b"a = " + b"9" * 5000, "is not TOML"),
}


@pytest.mark.parametrize(("data", "complaint"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_not_toml_is_refused_by_name(tmp_path, data, complaint):
    path = tmp_path / "bad.toml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=f"bad.toml' {complaint}"):
        read_toml(path)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml"):
        read_toml(tmp_path / "none.toml")
