"""``tiny``: a random Llama of 35,232 weights that reads any language, for tests.

The same bytes on every machine and with every version of torch, tokenizers and safetensors,
so that its digests stand in the catalogue like any other's: the weights are SHAKE-256 output
scaled by correctly rounded IEEE operations (no torch or NumPy generator, whose vector paths
differ between processors), and every file is written here. ``tests/learning/test_bases.py``
makes it twice and compares with the catalogue.

The tokenizer is byte-level BPE without merges: one token per UTF-8 byte, three per Chinese
character. Chat turns are ChatML.
"""

import hashlib
import json
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 260
_SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
_HIDDEN, _INNER, _LAYERS, _HEADS, _KEY_HEADS, _HEAD = 32, 64, 2, 4, 2, 8
_SEED = b"huizhen tiny 1"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make(folder: Path) -> None:
    """Write the model and its tokenizer into a folder that exists."""
    (folder / "model.safetensors").write_bytes(_safetensors())
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    for name, document in (
        ("config.json", _config()),
        ("tokenizer.json", _tokenizer()),
        ("tokenizer_config.json", _tokenizer_config()),
    ):
        text = json.dumps(document, indent=1, ensure_ascii=True)
        (folder / name).write_bytes(text.encode("ascii"))


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, _HIDDEN),
        "model.norm.weight": (_HIDDEN,),
        "lm_head.weight": (VOCABULARY, _HIDDEN),
    }
    for i in range(_LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (_HIDDEN,),
            f"{layer}.post_attention_layernorm.weight": (_HIDDEN,),
            f"{layer}.self_attn.q_proj.weight": (_HEADS * _HEAD, _HIDDEN),
            f"{layer}.self_attn.k_proj.weight": (_KEY_HEADS * _HEAD, _HIDDEN),
            f"{layer}.self_attn.v_proj.weight": (_KEY_HEADS * _HEAD, _HIDDEN),
            f"{layer}.self_attn.o_proj.weight": (_HIDDEN, _HEADS * _HEAD),
            f"{layer}.mlp.gate_proj.weight": (_INNER, _HIDDEN),
            f"{layer}.mlp.up_proj.weight": (_INNER, _HIDDEN),
            f"{layer}.mlp.down_proj.weight": (_HIDDEN, _INNER),
        }
    return shapes


def _weights(name: str, shape: tuple[int, ...]) -> bytes:
    """Return ones for a norm, else uniform weights of variance 1 / fan-in, little-endian."""
    if len(shape) == 1:
        return np.ones(shape, dtype="<f4").tobytes()
    stream = hashlib.shake_256(_SEED + name.encode("ascii")).digest(4 * prod(shape))
    unit = np.frombuffer(stream, dtype="<u4").astype(np.float64) / 2**31 - 1
    return (unit * sqrt(3 / shape[1])).astype("<f4").tobytes()


def _safetensors() -> bytes:
    """Return the file: header length, JSON header padded to 8 bytes, the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, shape in sorted(_shapes().items()):
        data = _weights(name, shape)
        header[name] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def _config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": _HEAD,
        "hidden_act": "silu",
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "max_position_embeddings": 1024,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": _HEADS,
        "num_hidden_layers": _LAYERS,
        "num_key_value_heads": _KEY_HEADS,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
    }


def _tokenizer() -> dict[str, Any]:
    added = [
        {
            "id": i,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, content in enumerate(_SPECIAL)
    ]
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    symbols = (*_SPECIAL, *_byte_symbols())
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {symbol: i for i, symbol in enumerate(symbols)},
            "merges": [],
        },
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
    }


def _byte_symbols() -> list[str]:
    """Return GPT-2's printable character for each of the 256 bytes."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]
