"""A trained adapter as a folder that plain ``peft.PeftModel.from_pretrained`` loads.

adapter_config.json, adapter_model.safetensors   LoRA, in PEFT's names
head.safetensors, labels.json                    a classification's head: not PEFT's business
README.md                                        how to load it

A tabular study has no base and no LoRA; its folder needs nothing but NumPy:

model.safetensors     head.weight, head.bias
features.json         the features in the order of the weights' columns, their ranges, the classes
README.md             how to compute a score
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from peft import LoraConfig
from safetensors.numpy import save

from huizhen.learning.model import AdaptedModel
from huizhen.learning.tabular import feature_names
from huizhen.learning.trainable import Model
from huizhen.protocol.adapter import Array, Tensors, in_order, is_head
from huizhen.protocol.errors import ConfigError
from huizhen.protocol.study import Study
from huizhen.strategies.base import CORE, MERGED_A, MERGED_B, A, B, modules

Write = Callable[[str, bytes], None]


def export_adapter(
    model: Model, study: Study, tensors: Tensors, write: Write, *, promise: str
) -> None:
    """Write an adapter's files, or those of a linear model.

    Args:
        model: that it was trained in.
        study: that trained it.
        tensors: the adapter.
        write: takes a file's name and bytes.
        promise: what holds for the patients behind it, in a sentence.
    """
    if isinstance(model, AdaptedModel):
        _export_lora(model, study, tensors, write, promise)
    else:
        _export_linear(model, study, tensors, write, promise)


def _export_lora(
    model: AdaptedModel, study: Study, tensors: Tensors, write: Write, promise: str
) -> None:
    terms = model.study.adapter
    if terms is None:
        raise ConfigError("study has no [adapter]: add the section")
    whole = as_one_adapter(tensors)
    lora = {f"base_model.model.{name}.weight": array for name, array in whole.items()}
    names = modules(whole)
    ranks = {name: whole[name + A].shape[0] for name in names}
    # PEFT takes the first key that is an end of a layer's path
    longest = sorted(ranks, key=lambda name: (-len(name), name))
    larger = {name: ranks[name] for name in longest if ranks[name] != terms.rank}
    config = LoraConfig(
        r=terms.rank,
        lora_alpha=terms.alpha,
        rank_pattern=larger,
        alpha_pattern={name: terms.alpha / terms.rank * rank for name, rank in larger.items()},
        target_modules=names,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM" if model.kind == "instruction" else "FEATURE_EXTRACTION",
        base_model_name_or_path=model.base.name,
        inference_mode=True,
    ).to_dict()
    config["target_modules"] = names
    text = json.dumps(config, indent=1, sort_keys=True, default=str)
    write("adapter_config.json", text.encode())
    write("adapter_model.safetensors", save(lora, metadata={"format": "pt"}))
    if model.kind == "classification":
        head = {name: array for name, array in in_order(tensors).items() if is_head(name)}
        write("head.safetensors", save(head))
        labels = {"labels": model.study.task.labels, "texts": model.study.task.label_texts}
        write("labels.json", _json(labels))
    write("README.md", _readme(model, study, promise).encode())


def as_one_adapter(x: Tensors) -> dict[str, Array]:
    """Return the factors of one plain LoRA adapter for all that a strategy has trained and merged.

    With r ranks trained and R merged it has r + R, ΔW the same: [B·core, merged_B] · [A; merged_A].
    The head is left out.
    """
    found: dict[str, Array] = {}
    for module in modules(x):
        left, right = x[module + B], x[module + A]
        if module + CORE in x:
            left = left @ x[module + CORE]
        if module + MERGED_B in x:
            left = np.hstack([left, x[module + MERGED_B]])
            right = np.vstack([right, x[module + MERGED_A]])
        found |= {module + A: right, module + B: left}
    return in_order(found)


def _readme(model: AdaptedModel, study: Study, promise: str) -> str:
    auto = "AutoModelForCausalLM" if model.kind == "instruction" else "AutoModel"
    lines = [
        f"# {study.study.name}",
        "",
        f"A LoRA adapter for `{model.base.name}`, trained by a federation of hospitals (Huizhen).",
        f"Study digest: `{study.digest()}`. {promise}",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        f'base = {auto}.from_pretrained("folder of {model.base.name}")',
        'model = PeftModel.from_pretrained(base, "this folder").eval()',
    ]
    if model.kind == "classification":
        pooling = (
            "the last token's output"
            if model.is_causal
            else "the mean of the tokens' outputs, padding left out"
        )
        scale = ""
        if model.study.task.head == "normalised":
            scale = f", scaled to length {model.study.task.head_scale:g}"
        lines += [
            "# scores = pooled @ head.weight.T + head.bias (head.safetensors, labels.json)",
            f"# pooled: {pooling}{scale}",
        ]
    return "\n".join([*lines, "```", ""])


def _export_linear(
    model: Model, study: Study, tensors: Tensors, write: Write, promise: str
) -> None:
    task = model.study.task
    features = [
        {"name": name, "least": task.features[name][0], "greatest": task.features[name][1]}
        for name in feature_names(task)
    ]
    about = {"features": features, "missing": task.missing, "label": task.label}
    if task.time is not None:
        about["time"] = task.time
    write("model.safetensors", save(in_order(tensors)))
    write("features.json", _json({**about, "labels": task.labels}))
    write("README.md", _linear_readme(model, study, promise).encode())


def _linear_readme(model: Model, study: Study, promise: str) -> str:
    task = model.study.task
    missing = {"refuse": "no value may be missing", "middle": "0 where the value is missing"}
    lines = [
        f"# {study.study.name}",
        "",
        "A linear model over numeric fields, trained by a federation of hospitals (Huizhen).",
        f"Study digest: `{study.digest()}`. {promise}",
        "",
        "```python",
        "import json",
        "from pathlib import Path",
        "import numpy as np",
        "from safetensors.numpy import load_file",
        "",
        'tensors = load_file("model.safetensors")',
        'about = json.loads(Path("features.json").read_text(encoding="utf-8"))',
        'least = np.array([one["least"] for one in about["features"]])',
        'greatest = np.array([one["greatest"] for one in about["features"]])',
        "# values: one per feature, in the order of features.json",
        "x = 2 * (np.clip(values, least, greatest) - least) / (greatest - least) - 1",
        f"# {missing[task.missing]}",
        'scores = tensors["head.weight"] @ x + tensors.get("head.bias", 0)',
    ]
    if task.kind == "survival":
        lines.append("hazard = np.exp(scores[0])  # next to that of a record whose x is 0")
    elif len(task.labels) == 2:
        lines.append('p = 1 / (1 + np.exp(-scores[0]))  # of about["labels"][1]')
    else:
        lines.append('p = np.exp(scores) / np.exp(scores).sum()  # of each of about["labels"]')
    return "\n".join([*lines, "```", ""])


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()
