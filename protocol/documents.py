"""Signed documents: what one party states and another relies on.

A document is JSON (RFC 8785) in an envelope of the Dead Simple Signing Envelope (DSSE 1.0.2,
https://github.com/secure-systems-lab/dsse), signed with Ed25519 (RFC 8032). The signature covers
the kind of the document, so that no approval passes for a membership; what else a document is bound
to (study, round, attempt, what it follows) stands in its body. ``securesystemslib`` signs and
verifies; this module says which bytes are a document at all. There is exactly one encoding of a
document with given signatures: a receiver parses, encodes again and compares.

A key is named by its id, the SHA-256 that ``securesystemslib`` gives it.
"""

import base64
import binascii
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import CryptoSigner, Signature, SSlibKey

from huizhen.protocol.errors import ProtocolError, WireError

MAX_BYTES = 4 << 20
MAX_SIGNATURES = 64
_TYPE = "application/vnd.huizhen.{}+json"
_KIND = re.compile(r"[a-z]{1,32}(-[a-z]{1,32}){0,3}")
_KEY_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class PublicKey:
    """An Ed25519 public key and its id."""

    raw: bytes
    # 32 bytes

    @property
    def id(self) -> str:
        """The name that signatures give the key, 64 hex digits."""
        return str(self._key().keyid)

    def _key(self) -> SSlibKey:
        return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(self.raw))


@dataclass(frozen=True, slots=True)
class Document:
    """A document whose signatures were verified; only ``verify`` makes one."""

    kind: str
    body: Mapping[str, Any]
    signers: tuple[str, ...]
    # ids of the keys that signed, of those the verifier knows, sorted
    data: bytes
    # the whole envelope, to keep or to pass on


def public_key(raw: bytes) -> PublicKey:
    """Return the key of 32 raw bytes.

    Raises:
        ProtocolError: they are no Ed25519 public key.
    """
    try:
        Ed25519PublicKey.from_public_bytes(raw)
    except (ValueError, TypeError) as error:
        raise ProtocolError(f"public key has {len(raw)} bytes, expected 32 of Ed25519") from error
    return PublicKey(raw)


def public_of(private: Ed25519PrivateKey) -> PublicKey:
    """Return the public key of a private one."""
    return PublicKey(private.public_key().public_bytes_raw())


def sign(kind: str, body: Mapping[str, Any], *keys: Ed25519PrivateKey) -> bytes:
    """Return a signed document.

    Args:
        kind: lower-case words with dashes between them.
        body: JSON values without floating-point surprises: what RFC 8785 writes.
        keys: of everyone who signs now; others may add theirs with ``countersign``.

    Raises:
        WireError: the body cannot be written, or is too large.
    """
    envelope = Envelope(_payload(body), _type_of(kind), {})
    return _signed(envelope, keys)


def countersign(data: bytes, *keys: Ed25519PrivateKey) -> bytes:
    """Return a document with further signatures; those that are there stay as they are.

    Raises:
        WireError: the bytes are no document, or it has too many signatures.
    """
    envelope, _ = _parse(data)
    return _signed(envelope, keys)


def verify(data: bytes, *, kind: str, keys: Iterable[PublicKey], threshold: int = 1) -> Document:
    """Return a document that enough of the known keys have signed.

    Signatures of other keys are not looked at: a document may have been signed for other readers
    too. A wrong signature under a known key refuses the whole.

    Args:
        data: what arrived, from anyone.
        kind: what it must be.
        keys: whose signatures count.
        threshold: how many different ones must have signed.

    Raises:
        WireError: the bytes are not the one encoding of a document.
        ProtocolError: it is of another kind, a signature is wrong, or too few have signed.
    """
    if threshold < 1:
        raise ValueError(f"threshold is {threshold}, expected 1 or more")
    envelope, body = _parse(data)
    if envelope.payload_type != _type_of(kind):
        raise ProtocolError(
            f"document is of type {envelope.payload_type[:80]!r}, expected {_type_of(kind)!r}"
        )
    known = {key.id: key for key in keys}
    signers = sorted(envelope.signatures.keys() & known.keys())
    for name in signers:
        try:
            known[name]._key().verify_signature(envelope.signatures[name], envelope.pae())
        except UnverifiedSignatureError as error:
            raise ProtocolError(
                f"document of kind {kind!r} has a wrong signature of key {name[:12]}"
            ) from error
    if len(signers) < threshold:
        raise ProtocolError(
            f"document of kind {kind!r} is signed by {len(signers)} of {len(known)} known keys, "
            f"{threshold} must have signed"
        )
    return Document(kind, body, tuple(signers), data)


def claimed(data: bytes) -> Mapping[str, Any]:
    """Return what a document says, unverified: only to learn under whose key to verify it.

    Raises:
        WireError: the bytes are not the one encoding of a document.
    """
    return _parse(data)[1]


def _signed(envelope: Envelope, keys: Collection[Ed25519PrivateKey]) -> bytes:
    for key in keys:
        envelope.sign(CryptoSigner(key, public_of(key)._key()))
    if len(envelope.signatures) > MAX_SIGNATURES:
        raise WireError(
            f"document has {len(envelope.signatures)} signatures, at most {MAX_SIGNATURES} fit"
        )
    data = _encode(envelope)
    if len(data) > MAX_BYTES:
        raise WireError(f"document has {len(data)} bytes, at most {MAX_BYTES} are allowed")
    return data


def _encode(envelope: Envelope) -> bytes:
    value = envelope.to_dict()
    value["signatures"] = sorted(value["signatures"], key=lambda one: one["keyid"])
    return rfc8785.dumps(value)


def _payload(body: Mapping[str, Any]) -> bytes:
    try:
        return rfc8785.dumps(dict(body))
    except (rfc8785.CanonicalizationError, UnicodeEncodeError, RecursionError) as error:
        raise WireError("document holds a value that RFC 8785 cannot write") from error


def _type_of(kind: str) -> str:
    if not _KIND.fullmatch(kind):
        raise ValueError(f"kind is {kind!r}, expected lower-case words")
    return _TYPE.format(kind)


def _parse(data: bytes) -> tuple[Envelope, dict[str, Any]]:
    """Return the envelope in ``data`` and its body; no signature is verified yet."""
    if len(data) > MAX_BYTES:
        raise WireError(f"document has {len(data)} bytes, at most {MAX_BYTES} are allowed")
    value = _json(data, "document")
    if not isinstance(value, dict) or value.keys() != {"payload", "payloadType", "signatures"}:
        raise WireError("document has other keys than payload, payloadType and signatures")
    if not isinstance(value["payloadType"], str):
        raise WireError("document has a payloadType that is no text")
    payload = _base64(value["payload"], "payload")
    signatures: dict[str, Signature] = {}
    entries = value["signatures"]
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_SIGNATURES:
        raise WireError(f"document has no list of 1 to {MAX_SIGNATURES} signatures")
    for entry in entries:
        if not isinstance(entry, dict) or entry.keys() != {"keyid", "sig"}:
            raise WireError("signature has other keys than keyid and sig")
        name, sig = entry["keyid"], _base64(entry["sig"], "signature")
        if not isinstance(name, str) or not _KEY_ID.fullmatch(name) or len(sig) != 64:
            raise WireError("signature is not 64 bytes under the id of a key")
        if name in signatures:
            raise WireError(f"document is signed twice by key {name[:12]}")
        signatures[name] = Signature(name, sig.hex())
    envelope = Envelope(payload, value["payloadType"], signatures)
    body = _json(payload, "document's payload")
    if not isinstance(body, dict):
        raise WireError("document's payload is no JSON object")
    try:
        is_one = _encode(envelope) == data and _payload(body) == payload
    except rfc8785.CanonicalizationError as error:  # a lone surrogate in the payload's type
        raise WireError("document holds text that is not Unicode") from error
    if not is_one:
        raise WireError("document is not in its one canonical encoding")
    return envelope, body


def _json(data: bytes, what: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} is not JSON") from error


def _base64(text: Any, what: str) -> bytes:
    if not isinstance(text, str):
        raise WireError(f"document has a {what} that is no text")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise WireError(f"document has a {what} that is not base64") from error
