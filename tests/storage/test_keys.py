"""Keys are for their owner alone, never written over, and no output shows their bytes (ID-6)."""

import base64
import hashlib
import logging
import os
import traceback

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from huizhen.protocol.documents import public_of
from huizhen.protocol.errors import ConfigError, StorageError
from huizhen.storage.keys import (
    fingerprint,
    load_key,
    load_node_key,
    load_tls_key,
    make_key,
    make_node_key,
    make_tls_key,
)

KINDS = {
    "identity": (make_key, load_key),
    "node": (make_node_key, load_node_key),
    "tls": (make_tls_key, load_tls_key),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "site" / "keys" / "a.pem"


def pem(key, encryption=None):
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())


def secrets_of(key):
    """The private number in every form in which it could be printed."""
    if isinstance(key, Ed25519PrivateKey):
        raw = key.private_bytes_raw()
    else:
        raw = key.private_numbers().private_value.to_bytes(key.curve.key_size // 8)
    body = b"".join(pem(key).splitlines()[1:-1])
    return [raw.hex(), base64.b64encode(raw).decode()[:40], body.decode()[30:60], repr(raw)[2:30]]


@kinds
def test_a_key_is_loaded_as_it_was_made(path, kind):
    make, load = KINDS[kind]
    made = make(path)
    assert pem(load(path)) == pem(made) == path.read_bytes()
    assert pem(load_pem_private_key(path.read_bytes(), None)) == pem(made)


def test_the_kinds_are_what_their_readers_take(path):
    assert isinstance(make_key(path), Ed25519PrivateKey)
    assert make_node_key(path.with_name("node.pem")).curve.name == ec.SECP384R1.name
    assert make_tls_key(path.with_name("tls.pem")).curve.name == ec.SECP256R1.name


@kinds
def test_two_keys_are_never_the_same(path, kind):
    make, _ = KINDS[kind]
    assert pem(make(path)) != pem(make(path.with_name("b.pem")))


@kinds
def test_file_and_folder_are_for_the_owner_alone_whatever_the_mask(path, kind):
    before = os.umask(0)
    try:
        KINDS[kind][0](path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [file.name for file in path.parent.iterdir()] == ["a.pem"]


@kinds
def test_no_key_is_written_over(path, kind):
    make, load = KINDS[kind]
    made = make(path)
    with pytest.raises(ConfigError, match="exists: a key is never written over"):
        make(path)
    assert pem(load(path)) == pem(made)
    assert [file.name for file in path.parent.iterdir()] == ["a.pem"]


@kinds
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o700])
def test_a_file_that_others_may_read_is_refused_and_the_chmod_named(path, kind, mode):
    make, load = KINDS[kind]
    make(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"mode {mode:o}.* else chmod 600 '.*a\.pem'$"):
        load(path)


@kinds
def test_a_folder_that_others_may_enter_is_refused(path, kind):
    make, load = KINDS[kind]
    make(path)
    path.parent.chmod(0o750)
    with pytest.raises(ConfigError, match=r"mode 750.*: chmod 700"):
        load(path)
    with pytest.raises(ConfigError, match=r"mode 750.*: chmod 700"):
        make(path.with_name("b.pem"))
    assert [file.name for file in path.parent.iterdir()] == ["a.pem"]


@pytest.mark.parametrize(
    ("made", "loaded"), [(a, b) for a in KINDS for b in KINDS if a != b], ids="-".join
)
def test_a_key_of_another_kind_is_refused(path, made, loaded):
    KINDS[made][0](path)
    with pytest.raises(ConfigError, match="is not a"):
        KINDS[loaded][1](path)


@kinds
@pytest.mark.parametrize("what", ["public", "rsa", "password", "nothing", "text", "cut"])
def test_a_file_that_is_no_such_key_is_refused(path, kind, what):
    key = make_key(path)
    data = {
        "public": b"-----BEGIN PUBLIC KEY-----\nMCow\n-----END PUBLIC KEY-----\n",
        "rsa": pem(rsa.generate_private_key(65537, 2048)),
        "password": pem(key, BestAvailableEncryption(b"secret")),
        "nothing": b"",
        "text": b"a b c",
        "cut": pem(key)[:60],
    }[what]
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"is not a|holds no private key, expected PKCS #8"):
        KINDS[kind][1](path)


@kinds
def test_no_key_is_made_by_loading_one(path, kind):
    with pytest.raises(ConfigError, match="no key at"):
        KINDS[kind][1](path)
    assert not path.parent.exists()
    path.mkdir(parents=True)
    path.parent.chmod(0o700)
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory"):
        KINDS[kind][1](path)


@kinds
def test_a_place_that_cannot_be_written_gives_a_clear_error(tmp_path, kind):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*a\.pem"):
        KINDS[kind][0](tmp_path / "file" / "a.pem")


@kinds
def test_a_write_that_fails_leaves_nothing(path, kind, monkeypatch):
    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    path.parent.mkdir(parents=True, mode=0o700)
    with pytest.raises(StorageError, match="No space left on device"):
        KINDS[kind][0](path)
    assert list(path.parent.iterdir()) == []


@kinds
def test_no_text_shows_the_bytes_of_a_key(path, kind, caplog):
    caplog.set_level(logging.DEBUG)
    make, load = KINDS[kind]
    key = make(path)
    texts = [repr(key), str(key), f"{[key]}", f"{key!r}"]
    path.write_bytes(path.read_bytes()[:-40])
    for use in (load, make):
        try:
            use(path)
        except ConfigError as error:
            texts.append("".join(traceback.format_exception(error)))
    assert len(texts) == 6
    for secret in secrets_of(key):
        assert not any(secret in text for text in [*texts, caplog.text])


def test_a_fingerprint_is_of_the_public_key_alone(path):
    """RFC 8410 §4: an Ed25519 SubjectPublicKeyInfo is twelve fixed bytes and the key."""
    key = make_key(path)
    info = bytes.fromhex("302a300506032b6570032100") + public_of(key).raw
    assert fingerprint(key.public_key()) == hashlib.sha256(info).hexdigest()
    assert fingerprint(make_tls_key(path.with_name("b.pem")).public_key()) != fingerprint(
        make_tls_key(path.with_name("c.pem")).public_key()
    )
