"""The conversion of a GGUF: right weights, right tokens, the same bytes twice."""

import json
import shutil

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from huizhen.learning import folder, tiny
from huizhen.learning.bases import catalogue, load_model, resolve
from huizhen.learning.gguf import convert
from huizhen.protocol.errors import ConfigError

HEADS, KEY_HEADS, LAYERS = 4, 2, 2
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def permuted(weight, heads):
    """llama.cpp's order of rotary rows (convert_hf_to_gguf.py, ``LlamaModel.permute``)."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def llama_cpp_name(name):
    flat = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in flat:
        return flat[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """``tiny`` as a Q8_0 GGUF, and the weights that its integers stand for."""
    place = tmp_path_factory.mktemp("tiny")
    tiny.make(place)
    vocabulary = json.loads((place / "tokenizer.json").read_text())["model"]["vocab"]
    symbols = [{"ÿ": "ĠĠ"}.get(symbol, symbol) for symbol in vocabulary]  # 0xFF is in no UTF-8
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(1024)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(symbols)
    writer.add_token_types([3] * 4 + [1] * 256)
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    wanted = {}
    for name, weight in load_file(place / "model.safetensors").items():
        if weight.ndim == 1:
            writer.add_tensor(llama_cpp_name(name), weight)
            wanted[name] = weight
            continue
        kind = gguf.GGMLQuantizationType.Q8_0
        wanted[name] = gguf.dequantize(gguf.quantize(weight, kind), kind)
        heads = {"q_proj": HEADS, "k_proj": KEY_HEADS}.get(name.split(".")[-2])
        data = gguf.quantize(permuted(weight, heads) if heads else weight, kind)
        writer.add_tensor(llama_cpp_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, wanted


def test_the_weights_are_the_dequantised_ones_exactly(source, tmp_path, capfd):
    path, wanted = source
    convert(path, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == set(wanted)
    for name, weight in wanted.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], weight, err_msg=name)
    assert capfd.readouterr() == ("", "")


def test_nothing_says_quantised_and_the_model_loads_from_the_folder(source, tmp_path):
    base = resolve(str(source[0].parent), home=tmp_path)
    assert "quantization_config" not in json.loads((base.folder / "config.json").read_text())
    model, _ = load_model(base, causal_lm=True)
    assert not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path / "saved")  # a model loaded from a GGUF refuses this
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_two_conversions_give_the_same_bytes(source, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        convert(source[0], tmp_path / name)
    assert folder.digests(tmp_path / "one") == folder.digests(tmp_path / "two")


def test_a_study_pins_the_gguf_its_weights_and_its_tokens(source, tmp_path):
    base = resolve(str(source[0].parent), home=tmp_path)
    assert set(base.digests) == {
        "chat_template.jinja",
        "model.safetensors",
        "source/model.gguf",
        "tokenizer.json",
    }
    assert base.digests["source/model.gguf"] == folder.digest(source[0])
    assert base == resolve(str(source[0].parent), home=tmp_path)


def test_smollm_numbers_are_split_into_digits_after_any_spaces(source, tmp_path):
    _, tokenizer = load_model(resolve(str(source[0].parent), home=tmp_path), causal_lm=True)
    # Both spaces are one token: without the digits step the second would cling to the 3.
    assert tokenizer.tokenize("a  38") == ["a", "ĠĠ", "3", "8"]


def test_a_vocabulary_with_chatml_turns_gets_the_template(source, tmp_path):
    _, tokenizer = load_model(resolve(str(source[0].parent), home=tmp_path), causal_lm=True)
    assert tokenizer.chat_template == tiny.CHATML


def test_a_gguf_of_an_unknown_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "unheard-of")
    writer.add_tensor("x", np.zeros(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"odd\.gguf cannot be converted"):
        convert(tmp_path / "odd.gguf", tmp_path)


def generated(name, prompt, *, chat, tokens=24):
    import torch

    model, tokenizer = load_model(resolve(name), causal_lm=True)
    if chat:
        turns = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        whole = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(whole[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_the_catalogue_pins_what_the_conversion_gives(name, tmp_path):
    base = resolve(name, home=tmp_path)
    assert base.digests == catalogue()[name].digests
    shutil.rmtree(base.folder)  # a gigabyte that pytest would keep for three runs


@pytest.mark.slow
def test_smollm2_answers_in_its_chat_format():
    assert "Paris" in generated(
        "smollm2-135m-instruct", "What is the capital of France?", chat=True
    )


@pytest.mark.slow
def test_gemma_reads_and_writes_chinese():
    prompt = "问：法国的首都是哪里？\n答：巴黎。\n问：中国的首都是哪里？\n答："
    assert generated("gemma-3-270m", prompt, chat=False, tokens=4).startswith("北京")
    _, tokenizer = load_model(resolve("gemma-3-270m"), causal_lm=False)
    for text in ("患者，女，45岁，体温38.5℃，诊断：系统性红斑狼疮（SLE）。", "龘靐齉 𠮷野家"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
