"""Convert a GGUF to the safetensors folder that training loads.

A model that transformers loaded from a GGUF is flagged as quantised and cannot be saved with an
adapter merged in. So it is rebuilt from its config without ``quantization_config``, given the
dequantised weights, and saved once.

Weights are kept in float32, as gguf dequantises them, up to ``FLOAT32_LIMIT``: nothing is rounded
a second time. bfloat16 was measured on gemma-3-270m, whose float32 is 1.07 GB, with three short
texts: KL(float32 ‖ bfloat16) is 5·10⁻⁵ to 2·10⁻⁴ nats per token and one top-1 token changed. A
small price, but only worth paying where float32 would not fit.

Reproducible: dequantising is element-wise (no sums, so no dependence on the number of threads).
Conversions in several processes, with other hash seeds, by transformers 5.23.0, tokenizers 0.23.3
and gguf 0.19.0 on torch 2.13.0 gave the same bytes in every file; ``tests/learning/test_gguf.py``
converts twice, and the catalogue pins the result.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huizhen.learning.tiny import CHATML
from huizhen.protocol.errors import ConfigError

FLOAT32_LIMIT = 2 << 30
# bytes


def convert(gguf: Path, target: Path) -> None:
    """Write config, weights, tokenizer and chat template of a GGUF into ``target``.

    Raises:
        ConfigError: transformers does not know the GGUF's architecture or its tokenizer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    try:
        # The bar of dequantising heeds no setting of transformers, so stderr is put aside.
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(**place)
            model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    except Exception as error:  # tokenizers raises no narrower one
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{gguf.name} cannot be converted ({reason}), a GGUF of an architecture known to "
            f"transformers expected: use its safetensors"
        ) from error

    if 4 * model.num_parameters() > FLOAT32_LIMIT:
        model.to(torch.bfloat16)
    _as_published(tokenizer, gguf)
    with quiet_transformers():
        _rebuilt(model).save_pretrained(target)
        tokenizer.save_pretrained(target)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off inside the block, then restore."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _rebuilt(loaded: Any) -> Any:
    """Return the same model without the flag of being quantised, sharing the weights."""
    import torch

    facts = loaded.config.to_dict()
    facts.pop("quantization_config", None)
    facts.pop("_name_or_path", None)
    config = type(loaded.config).from_dict(facts)
    config.architectures = [type(loaded).__name__]
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    return model


def _as_published(tokenizer: Any, gguf: Path) -> None:
    """Put back what the GGUF or its conversion lost of the published tokenizer.

    SmolLM's splits numbers into digits (llama.cpp's ``LLAMA_VOCAB_PRE_TYPE_SMOLLM``;
    HuggingFaceTB/SmolLM2-135M-Instruct, tokenizer.json). transformers 5.23.0 keeps only the
    byte-level step, which differs where two spaces stand before a digit. A vocabulary with
    ChatML's turns and no template gets ChatML's.
    """
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, ByteLevel):
        named = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
        if named is not None and named.contents() == "smollm":
            backend.pre_tokenizer = Sequence(
                [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
            )
    if not tokenizer.chat_template and {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.get_vocab()):
        tokenizer.chat_template = CHATML
