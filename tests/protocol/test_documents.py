"""A document says what its signers signed, in one encoding, or it is refused."""

import base64
import json
from typing import Any

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from huizhen.protocol import documents
from huizhen.protocol.documents import MAX_BYTES, countersign, public_key, public_of, sign, verify
from huizhen.protocol.errors import HuizhenError, ProtocolError, WireError

# RFC 8032 §7.1, tests 1 to 3: secret keys.
SECRETS = [
    "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
    "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
    "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
]
ONE, TWO, THREE = (Ed25519PrivateKey.from_private_bytes(bytes.fromhex(s)) for s in SECRETS)
BOARD = [public_of(key) for key in (ONE, TWO, THREE)]
BODY: dict[str, Any] = {"study": "ab" * 32, "round": 3, "sites": ["北京", "Köln"], "until": None}


def test_what_was_signed_comes_back_with_its_signers():
    data = sign("round-record", BODY, ONE, TWO)
    found = verify(data, kind="round-record", keys=BOARD, threshold=2)
    assert found.body == BODY
    assert set(found.signers) == {BOARD[0].id, BOARD[1].id}
    assert found.data == data
    assert sign("round-record", BODY, TWO, ONE) == data  # whoever signs first


def test_a_signature_is_what_dsse_and_rfc_8032_say():
    """Verified without securesystemslib: PAE by hand, Ed25519 by cryptography."""
    value = json.loads(sign("approval", {"a": 1}, ONE))
    payload, kind = base64.b64decode(value["payload"]), value["payloadType"]
    assert (payload, kind) == (b'{"a":1}', "application/vnd.huizhen.approval+json")
    pae = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
    [entry] = value["signatures"]
    key = Ed25519PublicKey.from_public_bytes(BOARD[0].raw)
    key.verify(base64.b64decode(entry["sig"]), pae)
    assert entry["keyid"] == BOARD[0].id


def test_signers_may_join_later_and_in_any_order():
    both = countersign(sign("membership", BODY, ONE), TWO)
    assert both == countersign(sign("membership", BODY, TWO), ONE)
    assert countersign(both, TWO) == both


@pytest.mark.parametrize("threshold", [2, 3])
def test_too_few_signatures_are_refused(threshold):
    data = sign("membership", BODY, *(ONE, TWO)[: threshold - 1])
    with pytest.raises(ProtocolError, match=f"is signed by {threshold - 1} of 3 known keys"):
        verify(data, kind="membership", keys=BOARD, threshold=threshold)


def test_a_signature_of_a_stranger_counts_for_nothing():
    data = sign("membership", BODY, ONE, THREE)
    found = verify(data, kind="membership", keys=BOARD[:2])
    assert found.signers == (BOARD[0].id,)
    with pytest.raises(ProtocolError, match="is signed by 1 of 2 known keys, 2 must"):
        verify(data, kind="membership", keys=BOARD[:2], threshold=2)
    with pytest.raises(ProtocolError, match="0 of 0"):
        verify(data, kind="membership", keys=[])


def test_a_document_of_one_kind_does_not_pass_for_another():
    with pytest.raises(ProtocolError, match=r"vnd\.huizhen\.approval\+json', expected"):
        verify(sign("approval", BODY, ONE), kind="membership", keys=BOARD)


def changed(data, **changes):
    return rfc8785.dumps(json.loads(data) | changes)


def test_a_changed_body_or_kind_has_a_wrong_signature():
    data = sign("approval", BODY, ONE)
    other = rfc8785.dumps({**BODY, "round": 4})
    kind = "application/vnd.huizhen.membership+json"
    for forged, as_kind in (
        (changed(data, payload=base64.b64encode(other).decode()), "approval"),
        (changed(data, payloadType=kind), "membership"),
    ):
        with pytest.raises(ProtocolError, match="wrong signature of key"):
            verify(forged, kind=as_kind, keys=BOARD)


def test_one_wrong_signature_refuses_even_where_enough_are_right():
    value = json.loads(sign("approval", BODY, ONE, TWO))
    value["signatures"][0]["sig"] = value["signatures"][1]["sig"]
    with pytest.raises(ProtocolError, match="wrong signature"):
        verify(rfc8785.dumps(value), kind="approval", keys=BOARD)


VALID = sign("approval", BODY, ONE)
ENTRY = json.loads(VALID)["signatures"][0]
LOOSE = base64.b64encode(json.dumps(BODY).encode()).decode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not JSON"),
        (b"[]", "other keys"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (VALID + b" ", "canonical"),
        (b" " + VALID, "canonical"),
        (changed(VALID, more=1), "other keys"),
        (changed(VALID, payloadType=3), "no text"),
        (changed(VALID, payload=3), "no text"),
        (changed(VALID, payload="*"), "not base64"),
        (changed(VALID, payload="e30"), "not base64"),
        (changed(VALID, payload="W10="), "no JSON object"),
        (changed(VALID, payload="YWJj"), "payload is not JSON"),
        (changed(VALID, payload=LOOSE), "canonical"),
        (changed(VALID, signatures=[]), "1 to 64 signatures"),
        (changed(VALID, signatures={}), "1 to 64 signatures"),
        (changed(VALID, signatures=[ENTRY] * 2), "signed twice"),
        (changed(VALID, signatures=[ENTRY] * 65), "1 to 64 signatures"),
        (changed(VALID, signatures=[{**ENTRY, "cert": ""}]), "other keys"),
        (changed(VALID, signatures=[{**ENTRY, "keyid": "A" * 64}]), "id of a key"),
        (changed(VALID, signatures=[{**ENTRY, "keyid": 5}]), "id of a key"),
        (changed(VALID, signatures=[{**ENTRY, "sig": "AAAA"}]), "64 bytes"),
        (b"x" * (MAX_BYTES + 1), "at most"),
    ],
)
def test_bytes_that_are_not_the_one_encoding_are_refused(data, message):
    with pytest.raises(WireError, match=message):
        verify(data, kind="approval", keys=BOARD)
    with pytest.raises(WireError, match=message):
        countersign(data, TWO)


@given(st.integers(0, len(VALID) - 1), st.integers(1, 255))
def test_no_flipped_bit_is_accepted(place, flip):
    data = bytearray(VALID)
    data[place] ^= flip
    with pytest.raises(HuizhenError):
        verify(bytes(data), kind="approval", keys=BOARD)


@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_else(data):
    with pytest.raises(WireError):
        verify(data, kind="approval", keys=BOARD)


@pytest.mark.parametrize("value", [float("nan"), 2**60, "\ud800", {1: 2}, b"x", object()])
def test_a_body_that_cannot_be_written_is_refused(value):
    with pytest.raises(WireError, match="cannot write"):
        sign("approval", {"a": value}, ONE)


def test_a_document_that_is_too_large_is_not_made():
    with pytest.raises(WireError, match="at most"):
        sign("approval", {"a": "x" * MAX_BYTES}, ONE)


@pytest.mark.parametrize("kind", ["", "Approval", "a b", "a/b", "-a", "a-"])
def test_a_kind_is_lower_case_words(kind):
    with pytest.raises(ValueError, match="kind is"):
        sign(kind, {}, ONE)


def test_no_threshold_of_nobody():
    with pytest.raises(ValueError, match="threshold is 0"):
        verify(VALID, kind="approval", keys=BOARD, threshold=0)


@pytest.mark.parametrize("raw", [b"", bytes(31), bytes(33)])
def test_what_is_no_key_is_refused(raw):
    with pytest.raises(ProtocolError, match="expected 32"):
        public_key(raw)
    assert public_key(BOARD[0].raw) == BOARD[0]


def test_no_private_key_is_in_a_document():
    for secret in SECRETS:
        assert bytes.fromhex(secret) not in VALID
        assert secret.encode() not in VALID
    assert documents.public_of(ONE).raw.hex() not in VALID.decode()  # its id alone
