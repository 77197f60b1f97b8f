"""A trained adapter as a folder that plain ``peft.PeftModel.from_pretrained`` loads.

adapter_config.json, adapter_model.safetensors   LoRA, in PEFT's names
head.safetensors, labels.json                    a classification's head: not PEFT's business
README.md                                        how to load it
"""

import json
from collections.abc import Callable

from peft import LoraConfig
from safetensors.numpy import save

from huizhen.learning.model import AdaptedModel
from huizhen.protocol.adapter import Tensors, in_order, is_head
from huizhen.protocol.study import Study

Write = Callable[[str, bytes], None]


def export_adapter(
    model: AdaptedModel, study: Study, tensors: Tensors, write: Write, *, promise: str
) -> None:
    """Write an adapter's files.

    Args:
        model: that it was trained in.
        study: that trained it.
        tensors: the adapter.
        write: takes a file's name and bytes.
        promise: what holds for the patients behind it, in a sentence.
    """
    terms = model.study.adapter
    lora = {
        f"base_model.model.{name}.weight": array
        for name, array in in_order(tensors).items()
        if not is_head(name)
    }
    modules = sorted({name.rsplit(".", 1)[0] for name in tensors if not is_head(name)})
    config = LoraConfig(
        r=terms.rank,
        lora_alpha=terms.alpha,
        target_modules=modules,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM" if model.kind == "instruction" else "FEATURE_EXTRACTION",
        base_model_name_or_path=model.base.name,
        inference_mode=True,
    ).to_dict()
    config["target_modules"] = modules
    text = json.dumps(config, indent=1, sort_keys=True, default=str)
    write("adapter_config.json", text.encode())
    write("adapter_model.safetensors", save(lora, metadata={"format": "pt"}))
    if model.kind == "classification":
        head = {name: array for name, array in in_order(tensors).items() if is_head(name)}
        write("head.safetensors", save(head))
        labels = {"labels": model.study.task.labels, "texts": model.study.task.label_texts}
        write("labels.json", json.dumps(labels, ensure_ascii=False, indent=1).encode())
    write("README.md", _readme(model, study, promise).encode())


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
