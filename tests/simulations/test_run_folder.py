"""A run folder belongs to one run and holds the old bytes or the new, whatever the disk does."""

import contextlib
import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from huizhen.protocol.errors import ConfigError, StorageError
from huizhen.simulations.run_folder import Checkpoint, RunFolder, safe_name, tensors_digest
from huizhen.strategies.base import StrategyState

X = {"a.lora_B": np.arange(6, dtype=np.float32).reshape(2, 3), "head.bias": np.ones(2, np.float32)}
STATE = StrategyState(X, {"v": {"head.bias": np.full(2, 0.1, np.float32)}})
HISTORY = [{"round": 1, "loss": 1 / 3, "名": "α"}]


@pytest.fixture
def open_folder(tmp_path):
    def open_folder(identity=None, *, resume=True, path=tmp_path / "run"):
        return RunFolder(path, identity or {"study": "s", "data": "d"}, resume=resume)

    return open_folder


def test_what_was_saved_is_restored_bit_for_bit(open_folder):
    with open_folder(resume=False) as folder:
        assert folder.restore("federated-1") is None
        folder.save("federated-1", Checkpoint(2, STATE, HISTORY))
    with open_folder() as folder:
        found = folder.restore("federated-1")
        assert folder.restore("federated-2") is None
    assert (found.round, found.history) == (2, HISTORY)
    assert tensors_digest(found.strategy.x) == tensors_digest(X)
    assert list(found.strategy.moments) == ["v"]
    assert (found.strategy.moments["v"]["head.bias"] == np.float32(0.1)).all()


def test_the_last_saved_round_counts(open_folder):
    with open_folder() as folder:
        for round in (2, 3):
            folder.save("u", Checkpoint(round, STATE, HISTORY * round))
        assert folder.restore("u").round == 3
        assert [path.name for path in (folder.path / "state").iterdir()] == ["u.safetensors"]


def begin(open_folder, identity=None):
    with open_folder(identity) as folder:
        folder.save("u", Checkpoint(2, STATE, HISTORY))


def claim(path):
    return json.loads((path / "run.json").read_text(encoding="utf-8"))["covers"]


def test_a_folder_of_another_run_is_refused_with_what_differs(open_folder):
    begin(open_folder)
    with pytest.raises(ConfigError, match=r"belongs to another run \(other study 's', now 't'\)"):
        open_folder({"study": "t", "data": "d"})
    with pytest.raises(ConfigError, match=r"other study 's', now 't', data 'd', now 'e'"):
        open_folder({"study": "t", "data": "e"}, resume=False)
    open_folder().__exit__(None, None, None)  # and it was left as it was


def test_what_only_the_folder_has_is_named_too(open_folder):
    begin(open_folder, {"study": "s", "simulation": {"every": 2, "seeds": [1]}})
    with pytest.raises(ConfigError, match=r"\(other simulation every 2, now None\)"):
        open_folder({"study": "s", "simulation": {"seeds": [1]}})
    with pytest.raises(ConfigError, match=r"\(other simulation every, simulation seeds\)"):
        open_folder({"study": "s", "simulation": {"every": "x" * 40, "seeds": ["y" * 40]}})


def test_another_number_of_threads_says_what_to_type(open_folder):
    identity = {"study": "s", "environment": {"threads": "2", "cpu": "AVX2"}}
    begin(open_folder, identity)
    now = {"threads": "1", "cpu": "AVX2"}
    with pytest.raises(ConfigError, match=r"threads '2', now '1'\): use --threads 2, or choose"):
        open_folder(identity | {"environment": now})
    for other in ({"study": "t", "environment": now}, {"study": "s", "environment": {}}):
        with pytest.raises(ConfigError, match=r"threads '2', now .*\): choose another --out$"):
            open_folder(other)


@pytest.mark.parametrize("resume", [False, True])
def test_a_claim_under_which_nothing_was_run_gives_way(open_folder, tmp_path, resume):
    open_folder().__exit__(None, None, None)
    for study in ("t", "t", "u"):
        open_folder({"study": study}, resume=resume).__exit__(None, None, None)
        assert claim(tmp_path / "run") == {"study": study}


@pytest.mark.parametrize("name", ["state/u.safetensors", "ledgers/u/A.sqlite", "results.json"])
def test_a_claim_under_which_something_was_run_stands(open_folder, tmp_path, name):
    open_folder().__exit__(None, None, None)
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    with pytest.raises(ConfigError, match="belongs to another run"):
        open_folder({"study": "t"})
    with pytest.raises(ConfigError, match="add --resume"):
        open_folder(resume=False)
    assert claim(tmp_path / "run") == {"study": "s", "data": "d"}


def test_what_killed_processes_were_writing_is_removed_and_nothing_else(open_folder, tmp_path):
    begin(open_folder)
    run = tmp_path / "run"
    (run / "federated").mkdir()
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead = process.pid
    left = [
        run / "state" / f".u.safetensors.{os.getppid()}",  # the lock says that nobody writes there
        run / f".results.json.{dead}",
        run / "federated" / f".README.md.{dead}",
    ]
    kept = [
        run / f".results.json.{os.getppid()}",
        run / f".mine.txt.{dead}",
        run / f"report.html.{dead}",
        run / ".results.json",
    ]
    for path in (*left, *kept):
        path.write_text("half")
    with pytest.raises(ConfigError, match="belongs to another run"):
        open_folder({"study": "t"})
    assert all(path.exists() for path in left)  # of another run's folder nothing is removed
    with open_folder() as folder:
        assert not any(path.exists() for path in left)
        assert all(path.exists() for path in kept)
        assert folder.restore("u").round == 2


@pytest.mark.parametrize("length", [15, 34, 300])
def test_a_long_name_of_a_site_is_a_name_of_a_file(open_folder, length):
    unit = f"local-1-{safe_name('北' * length)}"
    with open_folder() as folder:
        assert folder.restore(unit) is None
        folder.save(unit, Checkpoint(2, STATE, HISTORY))
        assert folder.restore(unit).round == 2


def test_long_names_of_sites_differ_in_files_where_they_differ():
    end = "%-0123456789abcdef"
    names = ["a" * n for n in range(79, 120)] + ["a" * 200 + c for c in "bcd"]
    names += ["a" * 82 + end, "院" * 11 + end, *("院" * n for n in range(10, 40))]
    safe = [safe_name(name) for name in (*names, *map(safe_name, names))]
    assert len(set(safe)) == len({*names, *map(safe_name, names)})
    assert max(map(len, safe)) == 100


def test_a_place_that_cannot_be_looked_at_is_a_storage_error(open_folder):
    with open_folder() as folder, pytest.raises(StorageError, match="is damaged"):
        folder.restore("u" * 300)


def test_a_folder_that_holds_the_run_is_refused_without_resume(open_folder):
    begin(open_folder)
    with pytest.raises(ConfigError, match=r"add --resume"):
        open_folder(resume=False)


def test_a_folder_in_use_is_refused(open_folder):
    with open_folder(), pytest.raises(ConfigError, match=r"in use by another process"):
        open_folder()
    open_folder().__exit__(None, None, None)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"digest": 1}', '{"digest": 1, "covers": []}', "\udcff"]
)
def test_a_damaged_claim_is_refused(open_folder, tmp_path, text):
    begin(open_folder)
    (tmp_path / "run" / "run.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises((StorageError, ConfigError)) as caught:
        open_folder()
    assert "run" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_state_is_refused_wherever_it_is_cut(open_folder):
    with open_folder() as folder:
        folder.save("u", Checkpoint(2, STATE, HISTORY))
        path = folder.path / "state" / "u.safetensors"
        whole = path.read_bytes()
        for length in (0, 7, 8, 20, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(StorageError, match=r"is damaged: remove it"):
                folder.restore("u")
        path.write_bytes(whole)
        assert folder.restore("u").round == 2


def test_a_state_file_of_something_else_is_refused(open_folder):
    from safetensors.numpy import save

    with open_folder() as folder:
        path = folder.path / "state" / "u.safetensors"
        for metadata in (
            None,
            {"notes": "[]"},
            {"notes": "{}"},
            {"notes": "{"},
            {"notes": '{"round": null, "history": []}'},
        ):
            path.write_bytes(save({"x/a": X["head.bias"]}, metadata=metadata))
            with pytest.raises(StorageError, match=r"is damaged"):
                folder.restore("u")


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_is_one_of_our_errors_and_leaves_the_state_before(
    open_folder, monkeypatch, function
):
    with open_folder() as folder:
        folder.save("u", Checkpoint(2, STATE, HISTORY))
        before = sorted(folder.path.rglob("*"))

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(StorageError, match=r"cannot write .*: No space left on device"):
                folder.save("u", Checkpoint(3, StrategyState({}), []))
        assert sorted(folder.path.rglob("*")) == before  # no half file is left
        assert folder.restore("u").round == 2


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts file systems")
    place = tmp_path / "small"
    place.mkdir()
    size = ["-o", "size=64k"]
    done = subprocess.run(["mount", "-t", "tmpfs", *size, "tmpfs", place], capture_output=True)  # noqa: S603, S607
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    with contextlib.suppress(OSError):
        subprocess.run(["umount", place], check=False)  # noqa: S603, S607


def test_a_disk_that_is_really_full_leaves_the_state_before(open_folder, small_disk):
    with open_folder(path=small_disk / "run") as folder:
        folder.save("u", Checkpoint(2, STATE, HISTORY))
        big = StrategyState({"a": np.ones(100_000, np.float32)})
        with pytest.raises(StorageError, match=r"No space left"):
            folder.save("u", Checkpoint(3, big, HISTORY))
        assert folder.restore("u").round == 2
        folder.save("u", Checkpoint(3, STATE, HISTORY))  # and there is room again
        assert folder.restore("u").round == 3


def test_a_read_only_disk_is_one_of_our_errors(open_folder, small_disk):
    open_folder(path=small_disk / "run").__exit__(None, None, None)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)  # noqa: S603, S607
    with pytest.raises(StorageError, match=r"Read-only file system"):
        open_folder(path=small_disk / "run")


def test_a_file_in_the_place_of_the_folder_is_refused(open_folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match=r"cannot write"):
            open_folder(path=path)
    assert (tmp_path / "file").read_text() == "mine"


def test_json_for_people_is_readable(open_folder):
    with open_folder() as folder:
        folder.write_json("results.json", {"名": [1.5]})
        assert json.loads((folder.path / "results.json").read_text(encoding="utf-8"))["名"] == [1.5]
        with pytest.raises(ValueError, match=r"JSON"):
            folder.write_json("results.json", {"loss": float("nan")})
        assert "名" in (folder.path / "results.json").read_text(encoding="utf-8")


def test_the_digest_of_an_adapter_is_of_its_names_shapes_and_values():
    flat = {"a.lora_B": X["a.lora_B"].ravel(), "head.bias": X["head.bias"]}
    renamed = {"b": X["a.lora_B"], "head.bias": X["head.bias"]}
    changed = {"a.lora_B": np.nextafter(X["a.lora_B"], np.float32(9)), "head.bias": X["head.bias"]}
    found = [tensors_digest(t) for t in (X, dict(reversed(X.items())), flat, renamed, changed)]
    assert found[0] == found[1]
    assert len(set(found)) == 4
