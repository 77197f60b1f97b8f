"""A sealed file opens whole, with its own key and for its own purpose, or not at all."""

import os

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from huizhen.protocol.errors import DamagedError, StorageError
from huizhen.storage import sealed
from huizhen.storage.sealed import FRAME_BYTES, SealedWriter, read_sealed

KEY, PURPOSE = bytes(range(32)), b"records of a test"
HEAD, FRAME = 36, FRAME_BYTES + 16


def seal(path, *parts):
    with SealedWriter(path, KEY, purpose=PURPOSE) as writer:
        for part in parts:
            writer.write(part)
    return path


def opened(path, key=KEY, purpose=PURPOSE):
    return b"".join(read_sealed(path, key, purpose=purpose))


@pytest.mark.parametrize(
    "size", [0, 1, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1, 2 * FRAME_BYTES, 3_000_001]
)
def test_what_was_sealed_is_opened(tmp_path, size):
    data = os.urandom(size)
    path = seal(tmp_path / "folder" / "a", data[: size // 3], b"", data[size // 3 :])
    assert opened(path) == data
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in path.parent.iterdir()] == ["a"]  # no draft is left
    frames = max(1, -(-size // FRAME_BYTES))
    assert path.stat().st_size == HEAD + size + 16 * frames


def test_the_format_is_as_it_is_written(tmp_path):
    """Opened by hand, as a program of another language would."""
    data = seal(tmp_path / "a", b"x" * FRAME_BYTES + b"rest").read_bytes()
    assert data[:4] == b"HZS1"
    key = HKDF(SHA256(), 32, data[4:36], b"huizhen sealed file 1").derive(KEY)
    first, last = data[HEAD : HEAD + FRAME], data[HEAD + FRAME :]
    assert AESGCM(key).decrypt(bytes(12), first, PURPOSE) == b"x" * FRAME_BYTES
    assert AESGCM(key).decrypt(bytes(10) + b"\1\1", last, PURPOSE) == b"rest"


def test_two_files_of_the_same_bytes_have_nothing_in_common(tmp_path):
    one, two = (seal(tmp_path / name, b"the same").read_bytes() for name in "ab")
    assert one[4:36] != two[4:36]
    assert one[HEAD:] != two[HEAD:]


def test_another_key_or_purpose_does_not_open_it(tmp_path):
    path = seal(tmp_path / "a", b"secret")
    for key, purpose in ((bytes(32), PURPOSE), (KEY, b"another")):
        with pytest.raises(DamagedError, match="was sealed with another key"):
            opened(path, key, purpose)
    with pytest.raises(ValueError, match="key has 16 bytes, expected 32"):
        opened(path, bytes(16))


THREE = b"a" * FRAME_BYTES + b"b" * FRAME_BYTES + b"c"


@pytest.mark.parametrize(
    "attack",
    [
        lambda d: d[:-1],
        lambda d: d[: HEAD + 2 * FRAME],  # its last frame is gone
        lambda d: d[: HEAD + FRAME] + d[HEAD + 2 * FRAME :],
        lambda d: d[:HEAD] + d[HEAD + FRAME : HEAD + 2 * FRAME] + d[HEAD : HEAD + FRAME] + d[-17:],
        lambda d: d + d[-17:],
        lambda d: d[: HEAD + FRAME] + d[HEAD : HEAD + FRAME] + d[HEAD + FRAME :],
        lambda d: d[:HEAD],
        lambda d: d[:20],
        lambda d: b"",
        lambda d: b"HZS2" + d[4:],
    ],
    ids=[
        "a byte cut", "a frame cut", "a frame out", "frames moved", "the last twice", "one twice",
        "all frames cut", "the head cut", "empty", "another format",
    ],
)  # fmt: skip
def test_what_was_cut_moved_or_repeated_does_not_open(tmp_path, attack):
    path = seal(tmp_path / "a", THREE)
    path.write_bytes(attack(path.read_bytes()))
    with pytest.raises(DamagedError):
        opened(path)


@given(st.integers(0, HEAD + 20), st.integers(1, 255))
def test_a_changed_byte_anywhere_does_not_open(tmp_path_factory, place, change):
    path = tmp_path_factory.getbasetemp() / "changed"
    data = bytearray(seal(path, b"word").read_bytes())
    if place >= len(data):
        place = len(data) - 1
    data[place] ^= change
    path.write_bytes(bytes(data))
    with pytest.raises(DamagedError):
        opened(path)


def seal_half(path):
    with SealedWriter(path, KEY, purpose=PURPOSE) as writer:
        writer.write(b"x" * 3 * FRAME_BYTES)
        raise RuntimeError("half way")


def test_after_an_error_there_is_the_old_file_or_none(tmp_path):
    path = seal(tmp_path / "a", b"old")
    for place in (path, tmp_path / "b"):
        with pytest.raises(RuntimeError, match="half way"):
            seal_half(place)
    assert opened(path) == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_or_read_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot write"):
        seal(tmp_path / "file" / "a", b"x")
    with pytest.raises(StorageError, match="cannot read"):
        opened(tmp_path / "none")
    with pytest.raises(StorageError, match="is not open"):
        SealedWriter(tmp_path / "a", KEY, purpose=PURPOSE).write(b"x" * 3 * FRAME_BYTES)


def test_memory_is_a_few_frames_whatever_the_size(tmp_path):
    writer = SealedWriter(tmp_path / "a", KEY, purpose=PURPOSE)
    with writer:
        for _ in range(8):
            writer.write(bytes(FRAME_BYTES + 5))
            assert len(writer._pending) <= FRAME_BYTES
    assert (
        sum(
            len(one) <= sealed.FRAME_BYTES
            for one in read_sealed(tmp_path / "a", KEY, purpose=PURPOSE)
        )
        == 9
    )
