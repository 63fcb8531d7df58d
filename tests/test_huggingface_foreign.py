"""config.json files as other people write them: the model is the one that transformers builds, or the file is refused.

The oracle is transformers' own model, made from the same file. Issue 10.6.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from huggingface_models import (
    T,
    change_config,
    change_tensors,
    content,
    logits_here,
    logits_there,
    saved_folder,
    transformers,
)
from safetensors.torch import load_file, save_file

import convert
from training.checkpoint import load_model
from training.huggingface import config_from_hf
from training.huggingface_families import FAMILIES
from training.huggingface_files import read_config, source_of
from training.huggingface_parts import ConversionError

LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
FULL, SLIDING = "full_attention", "sliding_attention"

# model_type, what the file says besides the shape (... leaves a key out), and None where the model is equal or what the
# refusal says. `?` stands for a file that transformers itself cannot run.
FILES = [
    ("llama", dict(rope_theta=77.0), None),
    ("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=77.0)), None),
    ("llama", dict(rope_theta=77.0, rope_parameters=dict(rope_type="default")), None),
    ("llama", dict(rope_theta=99.0, rope_parameters=dict(rope_type="default", rope_theta=77.0)), None),
    ("llama", dict(rope_scaling=dict(rope_type="linear", factor=3.0), rope_parameters=dict(rope_theta=77.0)), None),
    ("llama", dict(rope_scaling=dict(type="linear", factor=3.0), rope_theta=77.0), None),
    ("llama", dict(rope_scaling=dict(type="linear", rope_type="llama3", **LLAMA3), rope_theta=500.0), None),
    ("llama", dict(rope_parameters=dict(rope_type="llama3", rope_theta=5e5, **LLAMA3)), None),
    (
        "llama",
        dict(rope_parameters=dict(rope_type="llama3", rope_theta=50.0, **LLAMA3), original_max_position_embeddings=6),
        None,
    ),
    (
        "llama",
        dict(rope_parameters=dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=90.0)),
        None,
    ),
    ("llama", dict(rope_scaling={}, rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=50.0)), None),
    ("llama", dict(rope_scaling=None, rope_theta=50.0), None),
    ("llama", dict(rope_scaling=dict(rope_type="linear", factor=1.0)), None),
    ("llama", dict(rope_scaling=dict(rope_type="default", factor=9.0), rope_theta=50.0), None),
    ("llama", dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)), "dynamic"),
    ("llama", dict(rope_scaling=dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=12)), "yarn"),
    ("llama", dict(rope_scaling=dict(rope_type="linear")), "?"),
    ("llama", dict(rope_theta=None), "?"),
    ("llama", dict(partial_rotary_factor=0.5), None),
    ("llama", dict(partial_rotary_factor=0.5, rope_scaling=dict(rope_type="linear", factor=2.0)), "?"),
    ("llama", dict(rms_norm_eps=...), None),
    ("llama", dict(num_key_value_heads=None, head_dim=None), None),
    ("llama", dict(num_key_value_heads=1, head_dim=16), None),
    ("llama", dict(num_attention_heads=5), "?"),
    ("llama", dict(num_key_value_heads=3), "?"),
    ("llama", dict(hidden_act="gelu_fast"), None),
    ("llama", dict(hidden_act="swish", pretraining_tp=2, attention_dropout=0.3), None),
    ("llama", dict(hidden_act="leaky_relu"), None),
    ("llama", dict(hidden_act="quick_gelu"), "quick_gelu"),
    ("llama", dict(hidden_activation="relu"), None),
    ("llama", dict(attention_bias=True, mlp_bias=True), None),
    ("llama", dict(attention_bias=True), "attention_bias"),
    ("llama", dict(is_causal=False), "is_causal"),
    ("llama", dict(is_decoder=True, my_own_key=[1, 2], temperature=0.5, max_length=20), None),
    ("llama", dict(use_cache=False, sliding_window=5, layer_types=[SLIDING, FULL]), None),
    ("llama", dict(final_logit_softcapping=3.0, query_pre_attn_scalar=100, embedding_multiplier=3.0), None),
    ("llama", dict(tie_word_embeddings=True, torch_dtype="bfloat16"), None),
    ("mistral", dict(), None),
    ("mistral", dict(sliding_window=4), None),
    ("mistral", dict(sliding_window=None, attention_bias=True, mlp_bias=True), None),
    ("mistral", dict(sliding_window=0), "sliding_window=0"),
    ("mistral", dict(num_key_value_heads=..., num_attention_heads=8), None),
    ("mistral", dict(num_key_value_heads=None), "?"),
    ("mistral", dict(num_key_value_heads=4, head_dim=6, sliding_window=1), None),
    ("mistral", dict(num_attention_heads=5, num_key_value_heads=1), None),
    ("mistral", dict(layer_types=[FULL, FULL], sliding_window=3), None),
    ("mistral", dict(rope_scaling=dict(rope_type="linear", factor=2.0), rope_theta=50.0), None),
    ("qwen3", dict(head_dim=...), None),
    ("qwen3", dict(num_key_value_heads=None), None),
    ("qwen3", dict(use_sliding_window=False, sliding_window=3, max_window_layers=0), None),
    ("qwen3", dict(use_sliding_window=True, sliding_window=3, max_window_layers=1), None),
    ("qwen3", dict(use_sliding_window=True, sliding_window=3, max_window_layers=...), None),
    ("qwen3", dict(use_sliding_window=True, sliding_window=3, layer_types=[SLIDING, FULL]), None),
    ("qwen3", dict(use_sliding_window=True, sliding_window=None), None),
    ("qwen3", dict(layer_types=[SLIDING, FULL]), "?"),
    ("qwen3", dict(layer_types=[FULL]), "?"),
    ("qwen3", dict(attention_bias=True), "attention_bias"),
    ("qwen3", dict(mlp_bias=True, rope_theta=1e6), None),
    ("qwen3", dict(rope_parameters={FULL: dict(rope_type="default", rope_theta=50.0)}), "?"),
    ("olmo2", dict(), None),
    ("olmo2", dict(head_dim=6, num_key_value_heads=2, rms_norm_eps=1e-3), None),
    ("olmo2", dict(num_attention_heads=5, hidden_size=33, num_key_value_heads=None), None),
    ("olmo2", dict(rope_theta=50.0, hidden_act="gelu", clip_qkv=0.1), None),
    ("gemma2", dict(head_dim=..., hidden_size=16), None),
    ("gemma2", dict(query_pre_attn_scalar=..., sliding_window=..., attn_logit_softcapping=...), None),
    ("gemma2", dict(hidden_act="relu"), None),
    ("gemma2", dict(hidden_act="relu", hidden_activation="gelu"), None),
    ("gemma2", dict(attn_logit_softcapping=0.5, final_logit_softcapping=None, query_pre_attn_scalar=3), None),
    ("gemma2", dict(final_logit_softcapping=0.0), "soft cap of 0"),
    ("gemma2", dict(sliding_window=3, layer_types=[FULL, SLIDING], tie_word_embeddings=False), None),
    ("gemma2", dict(sliding_window=3, layer_types=[FULL, FULL]), None),
    ("gemma2", dict(sliding_window=None), "?"),
    ("gemma2", dict(sliding_window=None, layer_types=[FULL, FULL]), "?"),
    ("llama", dict(use_bidirectional_attention=False, layer_types=None), None),
    ("gemma2", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    ("qwen2", dict(), None),
    ("qwen2", dict(attention_bias=True, num_key_value_heads=1, head_dim=12, rope_theta=1e6), None),
    ("qwen2", dict(use_sliding_window=True, sliding_window=3, max_window_layers=1, num_attention_heads=5), "?"),
    ("qwen2", dict(use_sliding_window=True, sliding_window=3, max_window_layers=1, tie_word_embeddings=True), None),
    ("gemma", dict(hidden_act="gelu", head_dim=..., hidden_size=8), None),
    ("gemma", dict(hidden_act="gelu_python", hidden_activation="relu", attn_logit_softcapping=0.1), None),
    ("gemma", dict(hidden_act="silu", num_key_value_heads=1, tie_word_embeddings=False), None),
    ("gemma", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    ("olmo3", dict(num_hidden_layers=5, sliding_window=3), None),
    ("olmo3", dict(layer_types=[FULL, SLIDING], sliding_window=3, num_key_value_heads=2), None),
    ("olmo3", dict(rope_theta=50.0), None),  # two layers: both slide, of which rope_theta does not speak
    ("olmo3", dict(rope_theta=50.0, layer_types=[FULL, FULL]), None),
    ("olmo3", dict(rope_theta=50.0, layer_types=[FULL, SLIDING]), "differs between sliding and full"),
    ("olmo3", dict(rope_scaling=dict(rope_type="linear", factor=2.0), layer_types=[FULL, SLIDING]), "differs between"),
    ("olmo3", dict(rope_parameters={kind: dict(rope_type="default", rope_theta=9.0) for kind in (FULL, SLIDING)}), None),
    ("olmo3", dict(sliding_window=None, layer_types=[FULL, FULL]), "?"),
    ("phi3", dict(rope_theta=50.0, num_key_value_heads=2, resid_pdrop=0.1, embd_pdrop=0.2), None),
    ("phi3", dict(sliding_window=4, original_max_position_embeddings=8, hidden_act="gelu"), None),
    ("phi3", dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)), "partial_rotary"),
    ("phi3", dict(rope_scaling=dict(type="linear", factor=2.0)), "?"),
    ("arcee", dict(), None),
    ("arcee", dict(hidden_act=..., mlp_bias=True, attention_bias=True, num_key_value_heads=2), None),
    ("arcee", dict(hidden_act="silu", rope_scaling=dict(rope_type="llama3", **LLAMA3), head_dim=6), None),
    ("arcee", dict(mlp_bias=True), "mlp_bias"),
    ("starcoder2", dict(num_key_value_heads=..., sliding_window=5), None),
    ("starcoder2", dict(use_bias=False, norm_epsilon=1e-3, rms_norm_eps=7.0, tie_word_embeddings=False), None),
    ("starcoder2", dict(residual_dropout=0.1, embedding_dropout=0.2, hidden_act="relu", rope_theta=50.0), None),
    ("opt", dict(), None),
    ("opt", dict(enable_bias=False, activation_function="gelu", tie_word_embeddings=False, layerdrop=0.5), None),
    ("opt", dict(word_embed_proj_dim=16), "word_embed_proj_dim"),
    ("opt", dict(do_layer_norm_before=False), "do_layer_norm_before"),
    ("opt", dict(_remove_final_layer_norm=True), "_remove_final_layer_norm"),
    ("opt", dict(layer_norm_elementwise_affine=False), "layer_norm_elementwise_affine"),
    ("gpt2", dict(), None),
    ("gpt2", dict(resid_pdrop=0.0, embd_pdrop=0.1, attn_pdrop=0.2, reorder_and_upcast_attn=True), None),
    ("gpt2", dict(n_inner=50, layer_norm_epsilon=1e-3, activation_function="gelu"), None),
    ("gpt2", dict(scale_attn_weights=False), None),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True, n_layer=1), None),
    ("gpt2", dict(n_embd=..., hidden_size=16, n_layer=..., num_hidden_layers=1, hidden_act="relu"), None),
    ("gpt2", dict(tie_word_embeddings=False, n_ctx=5, add_cross_attention=False), None),
    ("gpt2", dict(add_cross_attention=True), "add_cross_attention"),
    ("gpt2", dict(n_head=5), "?"),
]

ONLY_THE_CLASS_REFUSES = [dict(num_key_value_heads=None)]  # though it means all heads in its relatives


@pytest.mark.parametrize("model_type, says, outcome", FILES, ids=lambda value: str(value).replace("Ellipsis", "absent")[:90])
def test_a_foreign_config_is_the_model_that_transformers_builds_or_is_refused(model_type, says, outcome):
    """Issue 10.6: non-default and missing values, the spellings of transformers 4 and 5, and what has no counterpart."""
    hf, tokens = content(model_type, says), torch.arange(2 * T).view(2, T) * 7 % 61
    try:
        theirs, expected = logits_there(hf, tokens)
        runs = bool(expected.isfinite().all())
    except Exception:  # any: the class, the model or its forward pass does not take it
        runs = False
    if outcome is not None:
        assert runs is (outcome != "?")
        with pytest.raises(ConversionError, match=None if outcome == "?" else outcome):
            config_from_hf(hf)
    else:
        assert runs and expected.std() > 0.05
        assert (logits_here(hf, theirs, tokens) - expected).abs().max() < 1e-5


def test_without_transformers_a_file_means_the_same_or_is_refused(monkeypatch):
    """Issue 10.6: the defaults in the table are the classes', and what only a class knows is not guessed."""
    empty = [{"model_type": model_type} for model_type in FAMILIES]
    plain = [content(model_type, says) for model_type, says, outcome in FILES if outcome is None]
    expected = [config_from_hf(hf) for hf in empty + plain]
    monkeypatch.setitem(sys.modules, "transformers.models.auto.configuration_auto", None)
    assert [config_from_hf(hf) for hf in empty] == expected[: len(empty)]
    read = 0
    for hf, config in zip(plain, expected[len(empty) :]):
        try:
            assert config_from_hf(hf) == config, hf
            read += 1
        except ConversionError as error:
            assert "pip install transformers" in str(error)
    assert read > 0.8 * len(plain)
    for model_type, says, outcome in FILES:
        if outcome is not None and says not in ONLY_THE_CLASS_REFUSES:
            with pytest.raises(ConversionError):
                pytest.fail(f"{says} is read as {config_from_hf(content(model_type, says)).name}")


# ------------------------------------------------------------------------------------------- tensor files


def same_as_from_pretrained(folder: Path) -> bool:
    tokens = torch.arange(2 * T).view(2, T) * 7 % 61
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    return bool((load_model(folder)[0](tokens) - expected).abs().max() < 1e-5)


def refusal(folder: Path) -> str:
    """The sentence with which a folder is refused, by everything that reads weights."""
    with pytest.raises(ConversionError) as told:
        load_model(folder)
    with pytest.raises(ConversionError, match=re.escape(str(told.value)[-40:])):
        source_of(folder, "x")
    return str(told.value)


@pytest.mark.parametrize(
    "model_type, name, word",
    [
        ("llama", "model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"),
        ("llama", "model.layers.0.self_attn.q_proj.weight_scale", "quantised"),
        ("llama", "model.layers.0.self_attn.q_proj.bias", "q_proj.bias"),
        ("gpt2", "transformer.h.0.crossattention.c_attn.weight", "crossattention"),
        ("gpt2", "wte.weight", "wte.weight"),
    ],
)
def test_a_tensor_that_no_one_reads_is_an_error_that_names_it(tmp_path, model_type, name, word):
    """Issue 10.6: cross-attention, a further layer, the scales of a quantisation, the same tensor twice."""
    saved_folder(tmp_path, model_type)
    change_tensors(tmp_path, lambda tensors: tensors.update({name: torch.ones(3)}))
    assert word in refusal(tmp_path)


def test_masks_and_frequencies_that_old_files_keep_are_no_weights(tmp_path):
    """OpenAI's gpt2 on the Hub has its causal masks stored and no 'transformer.'; old LLaMA files have RoPE's frequencies."""
    saved_folder(tmp_path / "gpt2", "gpt2")

    def older(tensors: dict) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, T, T).tril()
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)

    change_tensors(tmp_path / "gpt2", older)
    saved_folder(tmp_path / "llama")
    change_tensors(
        tmp_path / "llama", lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )
    assert same_as_from_pretrained(tmp_path / "gpt2") and same_as_from_pretrained(tmp_path / "llama")


def test_a_base_model_without_its_head_is_read_where_the_head_is_the_embedding(tmp_path):
    for tied in (True, False):
        model = saved_folder(tmp_path / str(tied), "qwen3", tie_word_embeddings=tied)
        model.model.save_pretrained(tmp_path / str(tied))
        names = load_file(tmp_path / str(tied) / "model.safetensors").keys()
        assert "norm.weight" in names and "lm_head.weight" not in names
    assert same_as_from_pretrained(tmp_path / "True")
    assert "lm_head.weight" in refusal(tmp_path / "False")  # transformers would draw one at random


def test_a_head_of_its_own_counts_though_the_file_says_tied(tmp_path):
    """Issue 10.6: transformers uses both tables where they differ, one where they are equal or only one is there."""
    for case in ("other", "equal", "head_only"):
        saved_folder(tmp_path / case, tie_word_embeddings=True)

        def change(tensors: dict, case: str = case) -> None:
            table = tensors["model.embed_tokens.weight"]
            tensors["lm_head.weight"] = table.flip(0).contiguous() if case == "other" else table.clone()
            if case == "head_only":
                del tensors["model.embed_tokens.weight"]

        change_tensors(tmp_path / case, change)
        assert same_as_from_pretrained(tmp_path / case)
        assert read_config(tmp_path / case).weight_tying is (case != "other")
    saved_folder(tmp_path / "missing")
    change_tensors(tmp_path / "missing", lambda tensors: tensors.pop("lm_head.weight"))
    assert "has no tensor 'lm_head.weight'" in refusal(tmp_path / "missing")


def test_the_single_file_counts_and_not_what_lies_beside_it(tmp_path):
    """Issue 10.6: a stale index, shards of before, another format's file; all as from_pretrained does it."""
    saved_folder(tmp_path / "before", shards="5KB", num_hidden_layers=3)
    saved_folder(tmp_path / "now")
    for path in [*(tmp_path / "before").glob("model*")]:
        shutil.copy(path, tmp_path / "now" / path.name)
    save_file({"tok_embeddings.weight": torch.ones(3)}, tmp_path / "now" / "consolidated.safetensors")
    assert same_as_from_pretrained(tmp_path / "now")


def test_of_shards_exactly_those_of_the_index_are_read(tmp_path):
    saved_folder(tmp_path, shards="5KB")
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "model-00099-of-00099.safetensors")
    assert same_as_from_pretrained(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    (tmp_path / "model-00099-of-00099.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    load_model(tmp_path)  # a complete set says the same without its index
    first = sorted(set(index["weight_map"].values()))[0]
    for names, word in (
        (dict(index["weight_map"], x="../elsewhere.safetensors"), "not inside"),
        (dict(index["weight_map"], x="/etc/passwd"), "not inside"),
        (dict(index["weight_map"], x="lost.safetensors"), "lacks lost.safetensors"),
        ([first], "weight_map"),
    ):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        assert word in refusal(tmp_path)
    shutil.copy(tmp_path / first, tmp_path / "twice.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(index["weight_map"], x="twice.safetensors")})
    )
    assert "which of the two" in refusal(tmp_path)
    (tmp_path / first).unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    assert f"lacks {first}" in refusal(tmp_path)


def test_pickles_adapters_and_empty_folders_are_refused_with_what_to_do(tmp_path):
    """Issue 10.6: nothing is ever unpickled."""
    saved_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert "no model.safetensors" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert "pickle" in refusal(tmp_path) and "save_pretrained" in refusal(tmp_path)


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors", "bitsandbytes", "gptq", "awq", None])
def test_a_quantised_folder_is_refused_with_its_method(tmp_path, method, capsys):
    """Issue 10.5: block fp8, compressed-tensors, bitsandbytes, GPTQ and AWQ were imported as garbage, exit code 0."""
    saved_folder(tmp_path / "hf")
    change_config(tmp_path / "hf", quantization_config=dict(quant_method=method, bits=4, weight_block_size=[128, 128]))
    assert convert.main([str(tmp_path / "hf"), str(tmp_path / "run")]) == 1
    told = capsys.readouterr().err
    assert "quantised" in told and repr(method) in told and "Traceback" not in told
    assert not (tmp_path / "run").exists()


def test_weights_stored_in_eight_bits_are_refused_though_no_key_says_so(tmp_path):
    """Issue 10.5: the tensors of a quantised model whose config.json lost its quantization_config."""
    for number, dtype in enumerate((torch.float8_e4m3fn, torch.int8, torch.uint8)):
        folder = tmp_path / str(number)
        saved_folder(folder)

        def change(tensors: dict, dtype: torch.dtype = dtype) -> None:
            name = "model.layers.0.mlp.up_proj.weight"
            tensors[name] = tensors[name].to(dtype)

        change_tensors(folder, change)
        assert "quantised" in refusal(folder)


def test_the_hubs_cache_of_links_is_read_as_a_folder(tmp_path):
    """Issue 10.6: a snapshot's files are links into the folder of blobs."""
    saved_folder(tmp_path / "hf", shards="5KB")
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "hf").iterdir())):
        path.rename(tmp_path / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert same_as_from_pretrained(snapshot)


def test_what_is_no_json_object_is_refused_in_a_sentence(tmp_path, capsys):
    saved_folder(tmp_path / "hf")
    capsys.readouterr()
    for text in ('{"model_type": "llama", "rms_norm_eps": NaN}', '{"model_type": ["llama"]}', '{"model_type": "llama"', "[]"):
        (tmp_path / "hf" / "config.json").write_text(text)
        assert convert.main([str(tmp_path / "hf"), str(tmp_path / "run")]) == 1
        assert "Traceback" not in (told := capsys.readouterr().err) and told.count("\n") == 1
