"""Time and memory of a private training step over a non-private one, beside Opacus.

    python -m huizhen.benchmarks.dp_step [--json]

Every method trains the same model on the same batch. In each repeat the methods take turns, so
that a busy machine slows all of them; a ratio is the median of the repeats' own ratios. Memory is
the peak of a process of its own, less what it held before the model was loaded. The private steps
clip, add noise and take the optimiser's step; Opacus draws its noise with torch, ``huizhen`` from
its ChaCha20 thread.

Models: random weights in the shape of MiniLM (6 layers, 384 wide, 16 records of 128 tokens) and of
a Llama with 25 million weights (4 records of 128 tokens, loss on the second half).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from huizhen.client.examples import Examples
from huizhen.client.model_checks import check_model
from huizhen.client.private_steps import StepTerms, private_steps
from huizhen.learning import tiny
from huizhen.learning.bases import resolve
from huizhen.learning.model import AdaptedModel
from huizhen.protocol.study import Study
from huizhen.protocol.study_terms import About, AdapterTerms, BaseTerms, TaskTerms

METHODS = ("plain", "huizhen", "opacus_hooks", "opacus_ghost")
SHAPES = {"encoder 16x128": (16, 128), "llama 25M 4x128": (4, 128)}
TARGETS = {
    "encoder 16x128": {
        "q,v": ("query", "value"),
        "all linear": ("query", "key", "value", "dense"),
    },
    "llama 25M 4x128": {
        "q,v": ("q_proj", "v_proj"),
        "all linear": (
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ),
    },
}
CLIP, SIGMA = 1.0, 1.0
_VOCABULARY = 8000

Step = Callable[[], None]


def write_base(model: str, folder: Path) -> None:
    """Write a base with random weights into a folder."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tiny.make(folder)
    (folder / "model.safetensors").unlink()
    made: Any
    if model.startswith("encoder"):
        shape = BertConfig(
            vocab_size=_VOCABULARY,
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
        )
        made = BertModel(shape, add_pooling_layer=False)
    else:
        made = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=_VOCABULARY,
                hidden_size=512,
                num_hidden_layers=5,
                num_attention_heads=8,
                num_key_value_heads=8,
                intermediate_size=1536,
            )
        )
    made.save_pretrained(folder)


def load(model: str, targets: str, folder: Path) -> tuple[AdaptedModel, Examples]:
    """Return the adapted model and one batch of records."""
    records, tokens = SHAPES[model]
    if model.startswith("encoder"):
        task = TaskTerms(
            kind="classification", text="{t}", label="l", labels=("a", "b", "c"), max_tokens=tokens
        )
    else:
        task = TaskTerms(kind="instruction", text="{t}", answer="{a}", max_tokens=tokens)
    study = Study(
        study=About(name="dp-step"),
        base=BaseTerms(name=str(folder)),
        adapter=AdapterTerms(rank=8, target_modules=TARGETS[model][targets]),
        task=task,
    )
    adapted = AdaptedModel(resolve(str(folder)), study)
    for name, parameter in adapted.parameters.items():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.02)
    ids = tuple(torch.randint(0, _VOCABULARY, (tokens,)) for _ in range(records))
    examples = Examples(
        ids=ids,
        inputs=ids,
        labels=tuple(i % 3 for i in range(records)),
        answer_starts=tuple(tokens // 2 for _ in range(records)),
        patients=tuple(range(records)),
        cut=0,
    )
    return adapted, examples


@contextmanager
def method(name: str, model: AdaptedModel, examples: Examples, steps: int) -> Iterator[Step]:
    """Give a training step of a method, for at most ``steps`` steps."""
    parameters = model.train_only(frozenset(model.shapes))
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-5, fused=True)
    records = len(examples.ids)
    everyone = list(range(records))
    if name == "plain":

        def plain() -> None:
            optimizer.zero_grad()
            losses, _ = model.losses(examples.batch(everyone))
            losses.mean().backward()  # type: ignore[no-untyped-call]  # torch's
            optimizer.step()

        yield plain
    elif name == "huizhen":
        memory = check_model(model, examples, 8192)
        model.train_only(frozenset(model.shapes))
        terms = StepTerms(
            sampling_rate=1.0,
            max_grad_norm=CLIP,
            noise_multiplier=SIGMA,
            denominator=records,
        )
        units = examples.records_of()
        with private_steps(
            model, parameters, examples, units, terms, steps=steps, memory=memory
        ) as private:

            def ours() -> None:
                private()
                optimizer.step()

            yield ours
    else:
        with _opacus(name, model, examples, optimizer) as step:
            yield step
    model.train_only(frozenset())


@contextmanager
def _opacus(
    name: str, model: AdaptedModel, examples: Examples, optimizer: torch.optim.Optimizer
) -> Iterator[Step]:
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    records = len(examples.ids)
    terms = {
        "noise_multiplier": SIGMA,
        "max_grad_norm": CLIP,
        "expected_batch_size": records,
        "loss_reduction": "sum",
    }
    trained = [
        m for m in model.module.modules() if any(p.requires_grad for p in m.parameters(False))
    ]
    hooked: Any
    if name == "opacus_hooks":
        hooked = GradSampleModule(model.module, loss_reduction="sum")
        private: Any = DPOptimizer(optimizer, **terms)
    else:
        hooked = GradSampleModuleFastGradientClipping(
            model.module, max_grad_norm=CLIP, loss_reduction="sum"
        )
        private = DPOptimizerFastGradientClipping(optimizer, **terms)
    for module in trained:
        module.train()  # the hooks ask for it; a linear layer does the same in both modes

    def step() -> None:
        private.zero_grad()
        losses, _ = model.losses(examples.batch(list(range(records))))
        if name == "opacus_hooks":
            losses.sum().backward()  # type: ignore[no-untyped-call]  # torch's
        else:
            DPTensorFastGradientClipping(hooked, private, losses, "sum").backward()
        private.step()

    try:
        yield step
    finally:
        hooked.to_standard_module()
        for module in trained:
            module.eval()


def ratios(model: str, targets: str, folder: Path, repeats: int) -> dict[str, float]:
    """Return each method's time over the plain step's."""
    adapted, examples = load(model, targets, folder)
    taken: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(repeats):
        for name in METHODS:
            with method(name, adapted, examples, 4) as step:
                step()  # the first one is not timed
                begin = time.perf_counter()
                for _ in range(3):
                    step()
                taken[name].append(time.perf_counter() - begin)
    return {
        name: statistics.median(a / b for a, b in zip(taken[name], taken["plain"], strict=True))
        for name in METHODS
    }


def peak_bytes(model: str, targets: str, name: str, folder: Path) -> int:
    """Return the peak of a fresh process that trains three steps, less what it held before."""
    call = f"child({model!r}, {targets!r}, {name!r}, {str(folder)!r})"
    script = f"from huizhen.benchmarks.dp_step import child; {call}"
    done = subprocess.run(  # noqa: S603  # this program, with values of this file
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def child(model: str, targets: str, name: str, folder: str) -> None:
    """Print the peak of this process; run by ``peak_bytes``."""
    warnings.simplefilter("ignore")
    adapted, examples = load(model, targets, Path(folder))
    held = _status("VmRSS")
    weights = sum(p.numel() * 4 for p in adapted.module.parameters())
    with method(name, adapted, examples, 4) as step:
        for _ in range(3):
            step()
    print(max(0, _status("VmHWM") - held) + weights)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description="What privacy costs in a training step.",
        epilog="example: python -m huizhen.benchmarks.dp_step --repeats 9",
    )
    parser.add_argument("--repeats", type=int, default=7, help="rounds of the methods (default 7)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for model, choices in TARGETS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_base(model, Path(folder))
            for targets in choices:
                found = ratios(model, targets, Path(folder), arguments.repeats)
                peaks = {n: peak_bytes(model, targets, n, Path(folder)) for n in METHODS}
                for name in METHODS[1:]:
                    rows.append(
                        {
                            "method": name,
                            "model": f"{model}, {targets}",
                            "ratio": round(found[name], 3),
                            "memory_ratio": round(peaks[name] / peaks["plain"], 3),
                        }
                    )
                    if not arguments.json:
                        _print(rows[-1])
    if arguments.json:
        print(json.dumps({"rows": rows, "threads": torch.get_num_threads()}))


def _print(row: dict[str, Any]) -> None:
    print(
        f"{row['model']:30s} {row['method']:13s} time × {row['ratio']:.2f}"
        f"  memory × {row['memory_ratio']:.2f}"
    )


if __name__ == "__main__":
    main()
