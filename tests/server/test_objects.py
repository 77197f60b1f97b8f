"""Objects are whole, named by what they hold, and never swept while somebody may need them."""

import hashlib
import os
import threading
from pathlib import Path

import pytest

from huizhen.protocol.errors import StorageError
from huizhen.server.objects import SWEEP_SECONDS, Objects

DATA = b"\x00an adapter\xff"
DIGEST = hashlib.sha256(DATA).hexdigest()


class Clock:
    now = 1_800_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def objects(tmp_path, clock):
    return Objects(tmp_path / "state" / "objects", clock=clock)


def place(objects):
    [found] = objects.folder.glob("*/*/*")
    return found


def test_what_is_put_is_got_by_its_digest(objects):
    assert not objects.has(DIGEST)
    assert objects.put(DATA) == DIGEST
    assert objects.has(DIGEST)
    assert objects.get(DIGEST) == DATA
    assert place(objects) == objects.folder / DIGEST[:2] / DIGEST[2:4] / DIGEST
    assert objects.put(b"") == hashlib.sha256(b"").hexdigest()


def test_the_folder_is_for_its_owner_alone(objects):
    objects.put(DATA)
    assert objects.folder.stat().st_mode & 0o777 == 0o700


def test_putting_the_same_again_writes_nothing(objects):
    objects.put(DATA)
    before = place(objects).stat().st_ino
    assert objects.put(DATA) == DIGEST
    assert place(objects).stat().st_ino == before


def test_the_name_is_on_the_disk_also_when_another_process_wrote_it(objects, monkeypatch):
    objects.put(DATA)
    synced: list[Path] = []
    monkeypatch.setattr("huizhen.server.objects.sync", synced.append)
    objects.put(DATA)
    assert synced == [place(objects).parent, place(objects).parent.parent, objects.folder]


@pytest.mark.parametrize("damage", [DATA[:-1], DATA[:-1] + b"\xfe", b""])
def test_a_changed_object_is_refused_and_putting_it_again_heals_it(objects, damage):
    objects.put(DATA)
    place(objects).write_bytes(damage)
    with pytest.raises(StorageError, match=f"object {DIGEST[:12]} in .* was changed"):
        objects.get(DIGEST)
    objects.put(DATA)
    assert objects.get(DIGEST) == DATA


def test_a_missing_object_is_named(objects):
    with pytest.raises(StorageError, match=f"object {DIGEST[:12]} is missing"):
        objects.get(DIGEST)


@pytest.mark.parametrize("name", ["../" * 21 + "x", "", "A" * 64, DIGEST + "\n"])
def test_a_name_that_is_no_digest_leads_nowhere(objects, name):
    for act in (objects.get, objects.has):
        with pytest.raises(ValueError, match="expected 64 hex digits"):
            act(name)


def test_a_full_disk_is_one_error_and_leaves_nothing(objects, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    objects.put(b"before")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left on device"):
            objects.put(DATA)
    assert not objects.has(DIGEST)
    objects.put(DATA)
    assert objects.get(DIGEST) == DATA


def test_a_sweep_takes_what_is_old_and_not_kept(objects, clock):
    kept, lost = objects.put(b"kept"), objects.put(b"lost")
    draft = objects.folder / "ab" / "cd" / f".{'abcd' * 16}.123"
    draft.parent.mkdir(parents=True)
    draft.write_bytes(b"half")
    os.utime(draft, (clock.now, clock.now))
    clock.now += SWEEP_SECONDS + 1
    young = objects.put(b"young")
    assert objects.sweep({kept}) == 2
    assert not draft.exists()
    assert [objects.has(one) for one in (kept, lost, young)] == [True, False, True]
    assert objects.sweep({kept}) == 0


def test_a_sweep_takes_nothing_that_was_put_again_since(objects, clock):
    """Its row may be about to be written, by a process that found the object there."""
    objects.put(DATA)
    clock.now += SWEEP_SECONDS + 1
    objects.put(DATA)
    clock.now += SWEEP_SECONDS - 1
    assert objects.sweep(set()) == 0
    assert objects.get(DIGEST) == DATA


def test_a_sweep_of_nothing_makes_nothing(objects):
    assert objects.sweep(set()) == 0
    assert not objects.folder.exists()


def test_threads_may_put_the_same_at_once(objects):
    data = os.urandom(1 << 20)
    found, start = [], threading.Barrier(8)

    def put():
        start.wait()
        found.append(Objects(objects.folder).put(data))

    threads = [threading.Thread(target=put) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [hashlib.sha256(data).hexdigest()] * 8
    assert objects.get(found[0]) == data
    assert len([*objects.folder.glob("*/*/*")]) == 1


def test_a_put_waits_while_a_sweep_looks(objects, clock):
    """Otherwise the sweep could take, as old, what the put has just found there."""
    objects.put(DATA)
    clock.now += SWEEP_SECONDS + 1
    put = threading.Thread(target=objects.put, args=(DATA,))

    class Keeping:
        def __contains__(self, name):
            if not put.is_alive():
                put.start()
            put.join(0.2)
            assert put.is_alive()
            return False

    assert objects.sweep(Keeping()) == 1
    put.join()
    assert objects.get(DIGEST) == DATA
