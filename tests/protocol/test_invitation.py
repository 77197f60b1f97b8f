"""An invitation is one file that says all, or it is refused; its token shows nowhere else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.protocol.errors import ConfigError
from huizhen.protocol.invitation import MAX_BYTES, Invitation, Pins
from huizhen.protocol.statements import Board

# RFC 8032 §7.1, tests 1 and 2: public keys.
ONE = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
TWO = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
TOKEN = "Tk-_" + "x" * 39
PINS = Pins(
    alliance="罕见病 rare", board=Board(keys=(ONE, TWO), threshold=2), authority="-----BEGIN\n"
)


def invitation(**changes):
    values = {
        "site": "北京 North", "pins": PINS, "fleet": "fl.example:8443", "service": "[::1]:8444",
        "door": "10.0.0.1:8445", "token": TOKEN, "expires": "2026-03-08T09:00:00Z",
    }  # fmt: skip
    return Invitation(**{**values, **changes})


def test_a_file_comes_back_as_it_was_made():
    made = invitation()
    assert Invitation.parse(made.to_bytes()) == made
    assert "北京" in made.to_bytes().decode()  # people read it


def changed(**changes):
    return json.dumps(json.loads(invitation().to_bytes()) | changes).encode()


def in_pins(**changes):
    value = json.loads(invitation().to_bytes())
    value["pins"] |= changes
    return json.dumps(value).encode()


def without(name):
    value = json.loads(invitation().to_bytes())
    del value[name]
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"", "file"),
        (b"[]", "file"),
        (b"{", "file"),
        (b"\xff", "file"),
        (changed(admin=True), "admin"),
        (changed(schema=2), "schema"),
        (changed(schema="1"), "schema"),
        (changed(site="../North"), "site"),
        (changed(site=7), "site"),
        (changed(fleet="https://fl.example:8443"), "fleet"),
        (changed(fleet="fl.example"), "fleet"),
        (changed(door="a b:1"), "door"),
        (changed(service="x:123456"), "service"),
        (changed(**{"token": "short"}), "token"),
        (changed(token="x" * 44), "token"),
        (changed(token="+" * 43), "token"),
        (changed(expires="2026-03-08"), "expires"),
        (changed(expires="2026-02-30T09:00:00Z"), "expires"),
        (in_pins(more=1), "pins.more"),
        (in_pins(alliance="a\nb"), "pins.alliance"),
        (in_pins(authority="x" * 8001), "pins.authority"),
        (in_pins(board={"keys": [ONE], "threshold": 0}), "pins.board.threshold"),
        (in_pins(board={"keys": [], "threshold": 1}), "pins.board.keys"),
        (in_pins(board={"keys": [ONE[:-2]], "threshold": 1}), "pins.board.keys.0"),
        (without("pins"), "pins"),
        (without("token"), "token"),
    ],
)
def test_a_file_that_is_no_invitation_is_refused_and_says_where(data, place):
    with pytest.raises(ConfigError, match=f"wrong '{place}' .*ask for it again"):
        Invitation.parse(data)


def test_a_file_that_is_too_large_is_not_parsed():
    with pytest.raises(ConfigError, match=f"at most {MAX_BYTES}"):
        Invitation.parse(b" " * MAX_BYTES + invitation().to_bytes())


@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_else(data):
    with pytest.raises(ConfigError):
        Invitation.parse(data)


def test_id_6_the_token_is_in_no_repr_and_in_no_error():
    made = invitation()
    assert TOKEN not in f"{made} {made!r}"
    with pytest.raises(ConfigError) as caught:
        Invitation.parse(changed(fleet="no port"))
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    "swapped",
    [
        {"alliance": "罕见病 Rare"},
        {"authority": "-----BEGIN \n"},
        {"board": Board(keys=(ONE, TWO), threshold=1)},
        {"board": Board(keys=(ONE,), threshold=1)},
        {"board": Board(keys=(TWO, ONE), threshold=2)},
    ],
)
def test_a_file_that_was_swapped_on_the_way_has_another_fingerprint(swapped):
    other = PINS.model_copy(update=swapped)
    assert other.fingerprint != PINS.fingerprint


def test_the_fingerprint_is_sha_256_over_all_pins_for_people_to_read_aloud():
    """By hand: RFC 8785 of three keys in order, hashed by another program's function."""
    import hashlib

    text = (
        f'{{"alliance":"罕见病 rare","authority":"-----BEGIN\\n",'
        f'"board":{{"keys":["{ONE}","{TWO}"],"threshold":2}}}}'
    )
    whole = hashlib.sha256(text.encode()).hexdigest()
    assert PINS.fingerprint.replace(" ", "") == whole[:32]
    assert [len(group) for group in PINS.fingerprint.split(" ")] == [4] * 8
