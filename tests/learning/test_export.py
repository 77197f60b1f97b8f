"""An exported folder works for someone who has PEFT and the base, and not this project."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from huizhen.learning.export import export_adapter
from huizhen.learning.model import AdaptedModel, pad
from huizhen.learning.models import make_model
from huizhen.learning.tabular import TabularEncoder
from huizhen.protocol.study import parse_study
from huizhen.strategies.base import MERGED_A, MERGED_B, A, B, modules


@pytest.fixture
def export(tmp_path):
    def export(model, tensors):
        def write(name, data):
            (tmp_path / name).write_bytes(data)

        export_adapter(model, model.study, tensors, write, promise="Only a test.")
        return tmp_path

    return export


def peft_model(auto, base, folder):
    import warnings

    network = auto.from_pretrained(base.folder, local_files_only=True, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return PeftModel.from_pretrained(network, folder).eval()


def scores_of_a_stranger(network, folder, examples, i, *, causal):
    """Return what the exported README says: pooled @ head.weight.T + head.bias."""
    head = load_file(folder / "head.safetensors")
    with torch.no_grad():
        hidden = network(input_ids=examples.ids[i][None]).last_hidden_state[0]
        pooled = hidden[-1] if causal else hidden.mean(dim=0)
        return pooled @ head["head.weight"].T + head["head.bias"]


@pytest.mark.parametrize("name", ["tiny_classifier", "minilm_classifier"])
def test_plain_peft_gives_the_same_scores_also_merged(
    request, name, make_site, rows, randomised, export
):
    model = request.getfixturevalue(name)
    folder = export(model, randomised(model, scale=0.1))
    examples = make_site(model, rows)
    network = peft_model(AutoModel, model.base, folder)
    merged = peft_model(AutoModel, model.base, folder).merge_and_unload()
    bare = AutoModel.from_pretrained(model.base.folder, local_files_only=True)
    for i in (0, 5):
        ours = model.logits(examples.batch([i]))[0]
        for theirs in (network, merged):
            found = scores_of_a_stranger(theirs, folder, examples, i, causal=model.is_causal)
            assert torch.allclose(found, ours, rtol=1e-4, atol=1e-4)
        without = scores_of_a_stranger(bare, folder, examples, i, causal=model.is_causal)
        assert not torch.allclose(without, ours, rtol=1e-3, atol=1e-3)  # the adapter matters


@pytest.mark.parametrize("name", ["flora", "fed_sb"])
def test_what_a_strategy_has_merged_is_in_the_one_adapter_that_plain_peft_loads(
    tiny, make_study, make_site, rows, randomised, export, name
):
    """Layers of other widths have other ranks; ΔW is that of the model it was trained in."""
    model = AdaptedModel(tiny, make_study(strategy={"name": name}))
    x, rng = randomised(model, scale=0.1), np.random.default_rng(4)
    if name == "flora":
        for i, layer in enumerate(modules(x)):
            left = rng.standard_normal((x[layer + B].shape[0], i + 1))
            right = rng.standard_normal((i + 1, x[layer + A].shape[1]))
            x[layer + MERGED_B] = (0.1 * left).astype(np.float32)
            x[layer + MERGED_A] = (0.1 * right).astype(np.float32)
    model.load(x)
    folder = export(model, x)
    network = peft_model(AutoModel, model.base, folder)
    merged = peft_model(AutoModel, model.base, folder).merge_and_unload()
    examples = make_site(model, rows)
    for i in (0, 5):
        ours = model.logits(examples.batch([i]))[0]
        for theirs in (network, merged):
            found = scores_of_a_stranger(theirs, folder, examples, i, causal=model.is_causal)
            assert torch.allclose(found, ours, rtol=1e-4, atol=1e-4)


def test_plain_peft_gives_the_same_words_also_merged(
    tiny_assistant, make_site, rows, randomised, export
):
    folder = export(tiny_assistant, randomised(tiny_assistant))
    examples = make_site(tiny_assistant, rows)
    with torch.no_grad():
        network = peft_model(AutoModelForCausalLM, tiny_assistant.base, folder)
        merged = peft_model(AutoModelForCausalLM, tiny_assistant.base, folder).merge_and_unload()
        ours = tiny_assistant._network(input_ids=examples.ids[0][None]).logits
        for theirs in (network, merged):
            found = theirs(input_ids=examples.ids[0][None]).logits
            assert torch.allclose(found, ours, rtol=1e-4, atol=1e-4)
    assert not (folder / "head.safetensors").exists()


def test_exported_bytes_are_a_function_of_the_adapter(tiny_classifier, randomised, export):
    tensors = randomised(tiny_classifier)
    folder = export(tiny_classifier, tensors)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    shuffled = dict(sorted(tensors.items(), key=lambda item: item[0][::-1]))
    export(tiny_classifier, shuffled)
    assert first == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(first) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "head.safetensors",
        "labels.json",
    }


def test_the_folder_says_what_it_is(tiny_classifier, randomised, export):
    folder = export(tiny_classifier, randomised(tiny_classifier))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 4, "LORA")
    assert config["base_model_name_or_path"] == "tiny"
    labels = json.loads((folder / "labels.json").read_text())["labels"]
    assert labels == ["asthma", "epilepsy", "measles"]
    assert tiny_classifier.study.digest() in (folder / "README.md").read_text()


def test_only_the_adapter_and_the_head_are_exported(minilm_classifier, randomised, export):
    tensors = randomised(minilm_classifier)
    folder = export(minilm_classifier, tensors)
    lora = load_file(folder / "adapter_model.safetensors")
    head = load_file(folder / "head.safetensors")
    assert sum(value.numel() for value in (*lora.values(), *head.values())) == sum(
        value.size for value in tensors.values()
    )
    name = "encoder.layer.5.attention.self.query.lora_A"
    assert np.array_equal(lora[f"base_model.model.{name}.weight"].numpy(), tensors[name])


@pytest.fixture
def tabular():
    """Return a linear model of three features with some classes."""

    def make(labels, missing="refuse"):
        ranges = {"sex": [0, 1], "age": [20, 70], "été": [-1.5, 2.5]}
        task = {"features": ranges, "label": "sick", "labels": labels, "missing": missing}
        tables = {
            "study": {"name": "risk"},
            "task": {"kind": "tabular", **task},
            "strategy": {"name": "fedavg"},
        }
        return make_model(parse_study(tables, "s"), None)

    return make


@pytest.mark.parametrize("labels", [["no", "yes"], ["no", "yes", "perhaps"]])
def test_a_linear_model_gives_a_stranger_with_numpy_the_same_probabilities(
    labels, tabular, randomised, export, monkeypatch
):
    model = tabular(labels)
    folder = export(model, randomised(model, scale=2.0))
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "features.json",
        "model.safetensors",
    }
    about = json.loads((folder / "features.json").read_text(encoding="utf-8"))
    assert about["labels"] == labels
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert model.study.digest() in readme
    assert "Only a test." in readme
    record = {"age": 81, "sex": 1, "été": 0.25, "sick": "yes"}
    found = {"values": np.array([record[one["name"]] for one in about["features"]])}
    monkeypatch.chdir(folder)
    exec(readme.split("```python\n")[1].split("```")[0], found)  # noqa: S102  # our own lines
    p = np.array([1 - found["p"], found["p"]]) if len(labels) == 2 else found["p"]
    features = torch.from_numpy(TabularEncoder(model.study.task).encode(record, "a:1").ids)
    ours = model.logits(pad([features], [0], [0], [features]))[0].softmax(dim=0)
    assert p == pytest.approx(ours.numpy(), rel=1e-5)


def test_a_linear_model_says_what_stands_in_for_a_missing_value(tabular, randomised, export):
    for missing, text in (("refuse", "no value may be missing"), ("middle", "0 where the value")):
        model = tabular(["no", "yes"], missing)
        folder = export(model, randomised(model))
        assert text in (folder / "README.md").read_text(encoding="utf-8")
        assert json.loads((folder / "features.json").read_text())["missing"] == missing
