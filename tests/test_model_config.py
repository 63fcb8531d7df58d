"""ModelConfig: its figures, its name and fingerprint, what it refuses, and the tables of components and presets."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re

import pytest
import torch
from conftest import TINY

from flops_parameter_counting.flops import flops_per_token
from flops_parameter_counting.parameters import count_padding, count_parameters, parts
from model_builder import build_model
from model_components import register_activation, register_norm
from model_config import (
    COMPONENT_KINDS,
    PRESETS,
    ModelConfig,
    component,
    components,
    expand_pattern,
    list_components,
    list_presets,
    register,
    resolve,
    shortest_pattern,
    unregister,
    usual_d_ff,
)

GPT2_POSTNORM_NAME = "12L-12H-768D-AbsPos-LN-NB-GELU-PostNorm"

# Published or computed apart from this code: (preset, overrides, N).
KNOWN_N = {
    "GPT-2 124M": ("gpt2", {}, 124_439_808),
    "gpt2_postnorm": ("gpt2_postnorm", {}, 124_373_760),
    "LLaMA 124M": ("llama", {}, 162_220_800),
    "LLaMA 1.36B, 18 layers": (
        "llama",
        dict(n_layer=18, n_head=18, n_embd=2304, block_size=2048, vocab_size=32000),
        1_294_159_104,
    ),
    "LLaMA 1.36B, 24 layers": (
        "llama",
        dict(n_layer=24, n_head=16, n_embd=2048, block_size=2048, vocab_size=32000),
        1_364_297_728,
    ),
    "GPT-2 1.36B": (
        "gpt2",
        dict(n_layer=18, n_head=19, n_embd=2432, block_size=2048, vocab_size=50257, pad_vocab_multiple=64),
        1_405_452_800,
    ),
    "GPT-2 1.36B without biases": (
        "gpt2",
        dict(n_layer=18, n_head=19, n_embd=2432, block_size=2048, vocab_size=50304, bias=False, normalization="layernorm_nobias"),
        1_404_968_832,
    ),
    "Llama-2-7B": (
        "llama",
        dict(n_layer=32, n_head=32, n_embd=4096, vocab_size=32000, block_size=4096, d_ff=11008),
        6_738_415_616,
    ),
    "Llama-3-8B": (
        "llama",
        dict(n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, d_ff=14336, vocab_size=128256, block_size=8192, rope_theta=500000),
        8_030_261_248,
    ),
    "LLaMA-3-style 1.5B": (
        "llama",
        dict(n_layer=18, n_head=16, n_kv_head=8, n_embd=2048, d_ff=7168, vocab_size=128256, block_size=2048, rope_theta=5e5),
        1_544_628_224,
    ),
    "Qwen3-1.7B": (
        "llama",
        dict(
            n_layer=28,
            n_head=16,
            n_kv_head=8,
            n_embd=2048,
            d_ff=6144,
            vocab_size=151936,
            qk_norm=True,
            weight_tying=True,
            rope_theta=1e6,
            norm_eps=1e-6,
        ),
        1_720_574_976,
    ),
    "Qwen3-0.6B": (
        "llama",
        dict(
            n_layer=28,
            n_head=16,
            n_kv_head=8,
            head_dim=128,
            n_embd=1024,
            d_ff=3072,
            vocab_size=151936,
            qk_norm=True,
            weight_tying=True,
            rope_theta=1e6,
            norm_eps=1e-6,
        ),
        596_049_920,
    ),
    "Llama-3-8B by its preset": (
        "llama3",
        dict(n_layer=32, n_head=32, n_embd=4096, d_ff=14336, vocab_size=128256, block_size=8192),
        8_030_261_248,
    ),
    "Qwen3-1.7B by its preset": ("qwen3", dict(n_layer=28, n_head=16, n_embd=2048, d_ff=6144, vocab_size=151936), 1_720_574_976),
    "Qwen3-0.6B by its preset": ("qwen3", dict(n_layer=28, n_head=16, n_embd=1024, d_ff=3072, vocab_size=151936), 596_049_920),
    "Mistral-7B": ("mistral", dict(n_layer=32, n_head=32, n_embd=4096, d_ff=14336, vocab_size=32000), 7_241_732_096),
    "OLMo-2-1B": ("olmo2", dict(n_layer=16, n_head=16, n_embd=2048, d_ff=8192, vocab_size=100352), 1_484_916_736),
    "Gemma-2-2B": ("gemma2", dict(n_layer=26, n_head=8, n_embd=2304, head_dim=256, d_ff=9216, vocab_size=256000), 2_614_341_888),
    "lm_tiny": ("gpt2", dict(n_layer=4, n_head=4, n_embd=256, block_size=256), 16_090_880),
    "lm_small": ("gpt2", dict(n_layer=6, n_head=8, n_embd=512, block_size=512), 44_909_056),
}

# Training GFLOP a token: (preset, overrides, context, full attention, half).
KNOWN_FLOPS = {
    "GPT-2 124M": ("gpt2", dict(vocab_size=50304), 1024, 0.8547, 0.7980),
    "LLaMA 124M": ("llama", {}, 1024, 0.8547, 0.7980),
    "LLaMA 1.36B, 18 layers": (*KNOWN_N["LLaMA 1.36B, 18 layers"][:2], 2048, 8.3413, 7.8317),
    "GPT-2 1.36B": (*KNOWN_N["GPT-2 1.36B"][:2], 2048, 9.4752, 8.9373),
    "Llama-3-8B at 2048": (*KNOWN_N["Llama-3-8B"][:2], 2048, 48.249, 46.639),
    "Llama-3-8B at 8192": (*KNOWN_N["Llama-3-8B"][:2], 8192, 57.913, 51.470),
    "Qwen3-1.7B": (*KNOWN_N["Qwen3-1.7B"][:2], 2048, 11.732, 11.027),
}


# ------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("model", KNOWN_N)
def test_n_is_the_published_one_counted_and_built(model):
    preset, overrides, n = KNOWN_N[model]
    config = resolve(preset, **overrides)
    assert count_parameters(config) == n
    built = build_model(config, device="meta")
    assert sum(p.numel() for p in built.parameters()) == n == built.num_parameters()


@pytest.mark.parametrize("model", KNOWN_FLOPS)
def test_flops_per_token_are_the_known_ones(model):
    preset, overrides, context, full, causal = KNOWN_FLOPS[model]
    flops = flops_per_token(resolve(preset, **overrides), context=context)
    digits = len(str(full).split(".")[1])
    assert round(flops.full / 1e9, digits) == full
    assert round(flops.causal / 1e9, digits) == causal


def test_recomputation_adds_one_forward_of_the_blocks_and_nothing_else():
    config = resolve("llama", **TINY, n_kv_head=2)
    none, selective, full = (flops_per_token(config, checkpointing=mode) for mode in ("none", "selective", "full"))
    assert none.hardware == selective.hardware == none.full
    assert (full.full, full.causal) == (none.full, none.causal)
    d, kv, ff, layers = 32, 16, usual_d_ff("swiglu", 32), 2
    block_weights = d * d + 2 * d * kv + d * d + 3 * d * ff
    assert full.hardware - full.full == layers * (2 * block_weights + 4 * d * 16)
    head = 6 * d * 61
    assert none.full == 3 * (full.hardware - full.full) + head


def test_padding_is_counted_in_n_and_reported_apart():
    for tied, tables in ((True, 1), (False, 2)):
        plain = resolve("llama", **TINY, weight_tying=tied)
        padded = resolve("llama", **TINY, weight_tying=tied, pad_vocab_multiple=64)
        assert padded.padded_vocab_size == 64 and padded.vocab_size == 61
        assert count_parameters(padded) - count_parameters(plain) == count_padding(padded) == 3 * 32 * tables
        assert count_padding(plain) == 0


def test_parts_have_distinct_names_and_add_up_layer_by_layer():
    config = resolve("gpt2", **TINY, layer_pattern="transformer,mlp")
    listed = parts(config)
    model = build_model(config, device="meta")
    for layer, block in enumerate(model.blocks):
        counted = sum(p.parameters for p in listed if p.name.startswith(f"blocks.{layer}."))
        assert counted == sum(p.numel() for p in block.parameters())


@pytest.mark.parametrize("n_embd, swiglu", [(768, 2048), (2304, 6144), (2048, 5632), (4096, 11008)])
def test_usual_d_ff_is_four_times_or_llamas_rounded_eight_thirds(n_embd, swiglu):
    assert usual_d_ff("standard", n_embd) == 4 * n_embd
    assert usual_d_ff("swiglu", n_embd) == swiglu


@pytest.mark.parametrize("n_embd", [1, 3, 8, 16, 32, 64, 100, 128, 256, 384, 512, 1000])
def test_usual_gated_d_ff_is_never_below_and_never_far_above_eight_thirds(n_embd):
    d_ff = usual_d_ff("swiglu", n_embd)
    assert d_ff >= 8 * n_embd / 3
    assert d_ff - 8 * n_embd / 3 < max(8, n_embd / 8 + 1)


# ------------------------------------------------------------------------------------------- name and fingerprint


@pytest.mark.parametrize(
    "preset, overrides, name",
    [
        ("gpt2_postnorm", {}, GPT2_POSTNORM_NAME + "-Tied"),
        ("gpt2_postnorm", dict(weight_tying=False), GPT2_POSTNORM_NAME),
        ("gpt2", {}, "12L-12H-768D-AbsPos-LN-GELUtanh-PreNorm-V50257-Bias-Tied"),
        ("llama", {}, "12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm"),
        ("llama", dict(n_kv_head=4), "12L-12H-768D-KV4-RoPE-RMS-SwiGLU-PreNorm"),
        ("custom", dict(position_encoding="none", activation="silu"), "12L-12H-768D-NoPos-LN-NB-SiLU-PreNorm"),
    ],
)
def test_the_name_is_the_documented_one(preset, overrides, name):
    assert resolve(preset, **overrides).name == name


def test_the_name_of_gpt2_postnorm_begins_with_the_documented_one():
    assert resolve("gpt2_postnorm").name.startswith(GPT2_POSTNORM_NAME)


# Values to draw a model from at random. Some spellings are the same model: the property below must see through them.
CHOICES = dict(
    preset=list(PRESETS),
    n_layer=[2, 3],
    n_head=[2, 4],
    n_kv_head=[None, None, 1, 2, 4],
    head_dim=[None, None, 8, 16],
    n_embd=[32, 64],
    d_ff=[None, None, 64, 128, 256],
    vocab_size=[50304, 61, 64],
    pad_vocab_multiple=[1, 16, 64],
    block_size=[16, 32, 1024],
    normalization=[None, *components("normalization")],
    norm_eps=[None, 1e-5, 1e-6],
    activation=[None, None, *components("activation")],
    ffn_type=[None, *components("ffn_type")],
    position_encoding=[None, *components("position_encoding")],
    rope_theta=[None, None, 1e4, 1e6, 10000.5],
    norm_position=[None, *components("norm_position")],
    bias=[None, True, False],
    qkv_bias=[None, None, True, False],
    qk_norm=[None, True, False, "full"],
    sliding_window=[*[None] * 6, 0, 4, 5],
    attention_scale=[None, None, 0.1, 0.2],
    rope_scaling=[*[None] * 5, *components("rope_scaling")],
    rope_factor=[*[None] * 9, 2.0, 4],
    rope_low_freq_factor=[*[None] * 9, 1.5],
    rope_original_context=[*[None] * 9, 32, 64],
    attention_softcap=[None, 0, 20.0, 50.0],
    logit_softcap=[None, 0.0, 20.0, 30],
    embedding_norm=[None, True, False],
    embedding_scale=[None, True, False],
    zero_init=[None, True, False],
    ffn_expansion_ratio=[*[None] * 5, 2.0, 4.0],
    ffn_multiple=[*[None] * 5, 64, 128],
    weight_tying=[None, True, False],
    dropout=[None, 0.0, 0.1, 0.25],
    layer_pattern=[
        None,
        None,
        "transformer",
        "transformer,mlp",
        "mlp,transformer",
        "transformer*2",
        ["mlp", "transformer"],
        "sliding,transformer",
    ],
    attention_backend=[None, "sdpa", "manual"],
)


def random_configs(count: int, seed: int) -> list[ModelConfig]:
    """Valid configs drawn at random: half from scratch, half differing from the one before in one key."""
    rng, found, values = random.Random(seed), [], None
    while len(found) < count:
        if values is None or rng.random() < 0.5:
            values = {key: rng.choice(options) for key, options in CHOICES.items()}
        else:
            key = rng.choice(list(CHOICES))
            values = {**values, key: rng.choice(CHOICES[key])}
        try:
            found.append(resolve(**values))
        except ValueError:
            values = None
    return found


def computed(config: ModelConfig) -> str:
    """What a config builds, told apart by hand: every field but the execution's, and what the parts do not read."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    values["pad_vocab_multiple"] = -(-config.vocab_size // config.pad_vocab_multiple) * config.pad_vocab_multiple
    del values["attention_backend"]
    if config.position_encoding != "learned_absolute":
        del values["block_size"]
    return repr(sorted(values.items()))


@pytest.mark.parametrize("count", (400, pytest.param(1500, marks=pytest.mark.slow)))
def test_names_and_fingerprints_are_equal_exactly_when_the_models_are(count):
    configs = random_configs(count, seed=0)
    by_name, by_fingerprint, by_model = ({}, {}, {})
    for config in configs:
        key = computed(config)
        by_name.setdefault(config.name, set()).add(key)
        by_fingerprint.setdefault(config.fingerprint, set()).add(key)
        by_model.setdefault(key, set()).add((config.name, config.fingerprint))
    assert 0.45 * count < len(by_model) < len(configs)  # many models, and some drawn twice
    assert [n for n, models in by_name.items() if len(models) > 1] == []
    assert [f for f, models in by_fingerprint.items() if len(models) > 1] == []
    assert [m for m, labels in by_model.items() if len(labels) > 1] == []


@pytest.mark.parametrize(
    "key, one, other",
    [
        ("rope_theta", 10000, 10000.0),
        ("rope_theta", 500000, 500000.0),
        ("dropout", 0, 0.0),
        ("n_layer", 2.0, 2),
        ("norm_eps", 1, 1.0),
        ("bias", 1, True),
        ("weight_tying", 0, False),
    ],
)
def test_equal_values_of_another_python_type_are_the_same_model_or_refused(key, one, other):
    b = resolve("llama", **{**TINY, key: other})
    if isinstance(other, bool):
        try:
            a = resolve("llama", **{**TINY, key: one})
        except ValueError as refusal:
            assert key in str(refusal)
            return
    else:
        a = resolve("llama", **{**TINY, key: one})
    assert a == b and a.name == b.name and a.fingerprint == b.fingerprint and a.to_json() == b.to_json()


@pytest.mark.parametrize(
    "key, value",
    [
        ("n_layer", "twelve"),
        ("n_layer", 2.5),
        ("n_head", True),
        ("bias", "maybe"),
        ("dropout", "lots"),
        ("rope_theta", "big"),
        ("normalization", 3),
        ("layer_pattern", 3),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=key):
        resolve("llama", **{**TINY, key: value})


def test_the_fingerprint_ignores_execution_keys_and_unused_lengths_only():
    rope, learned = resolve("llama", **TINY), resolve("gpt2", **TINY)
    assert resolve("llama", **TINY, attention_backend="manual").fingerprint == rope.fingerprint
    assert resolve("llama", **{**TINY, "block_size": 32}).fingerprint == rope.fingerprint
    assert resolve("gpt2", **{**TINY, "block_size": 32}).fingerprint != learned.fingerprint
    assert re.fullmatch(r"[0-9a-f]{16}", rope.fingerprint)


def test_presets_are_told_apart_by_name_and_fingerprint():
    assert resolve("team") == resolve("llama")  # the starting documents' name for the same model
    configs = [resolve(preset) for preset in PRESETS if preset != "team"]
    assert len({c.name for c in configs}) == len({c.fingerprint for c in configs}) == len(configs) == len(PRESETS) - 1
    assert {
        "gpt2",
        "gpt2_postnorm",
        "llama",
        "llama3",
        "qwen3",
        "hybrid",
        "team",
        "olmo2",
        "mistral",
        "gemma2",
        "modern",
        "custom",
    } <= set(PRESETS)


def test_a_feature_that_came_later_leaves_the_fingerprints_before_it_as_they_were():
    """Checkpoints of the first four presets carry these, from before any feature was added."""
    before = dict(gpt2="de56f265bff06d31", gpt2_postnorm="ad98ece36668a108", llama="ebeeeb87d8d6c561", custom="aa750d0b56e5f277")
    assert {preset: resolve(preset).fingerprint for preset in before} == before


# ------------------------------------------------------------------------------------------- round trip


def test_json_reads_back_to_an_equal_config_with_the_same_hash_name_and_fingerprint():
    for config in random_configs(300, seed=1):
        again = ModelConfig.from_json(config.to_json())
        assert again == config and hash(again) == hash(config)
        assert (again.name, again.fingerprint) == (config.name, config.fingerprint)
        json.loads(config.to_json())
    assert len(set(random_configs(300, seed=1))) > 200


def test_from_dict_refuses_what_it_does_not_know():
    values = resolve("llama", **TINY).to_dict()
    with pytest.raises(ValueError, match="n_heads.*did you mean 'n_head'"):
        ModelConfig.from_dict({**values, "n_heads": 4})
    with pytest.raises(ValueError, match="n_kv_head"):
        ModelConfig.from_dict({**values, "n_kv_head": 3})


def test_a_config_is_immutable():
    config = resolve("llama", **TINY)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_layer = 3
    before = config.fingerprint
    config.to_dict()["n_layer"] = 99
    assert config.fingerprint == before and config.n_layer == 2


def test_changing_a_preset_config_leaves_the_preset_as_it_was():
    before = resolve("llama").to_json()
    resolve("llama", n_layer=3, layer_pattern="transformer,mlp", ffn_type="standard")
    assert resolve("llama").to_json() == before


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "preset, overrides, says",
    [
        ("gpt2", dict(rope_theta=1e6), r"rope_theta=1000000\.0 has no effect.*position_encoding='rope'"),
        ("llama", dict(rope_theta=1e6, position_encoding="none"), "rope_theta=.* has no effect"),
        ("llama", dict(activation="gelu"), r"activation='gelu' has no effect with ffn_type='swiglu'.*'silu'"),
        ("gpt2", dict(ffn_type="swiglu", activation="relu"), "activation='relu' has no effect"),
        ("gpt2", dict(n_kv_head=5), r"n_kv_head=5 does not divide n_head=12.*1, 2, 3, 4, 6, 12"),
        ("gpt2", dict(dropout=1.0), r"dropout=1\.0"),
        ("gpt2", dict(dropout=-0.1), r"dropout=-0\.1"),
        ("gpt2", dict(dropout=float("nan")), "dropout=nan"),
        ("gpt2", dict(norm_eps=0.0), r"norm_eps=0\.0"),
        ("gpt2", dict(norm_eps=float("inf")), "norm_eps=inf"),
        ("llama", dict(rope_theta=1.0), r"rope_theta=1\.0"),
        ("llama", dict(rope_theta=float("nan")), "rope_theta=nan"),
        ("llama", dict(rope_theta=float("inf")), "rope_theta=inf"),
        ("llama", dict(head_dim=7), "head_dim=7 is odd"),
        ("llama", dict(n_head=0), "n_head=0 must be at least 1"),
        ("llama", dict(n_head=-2), "n_head=-2 must be at least 1"),
        ("llama", dict(n_embd=0), "n_embd=0 must be at least 1"),
        ("llama", dict(n_layer=0), "n_layer=0 must be at least 1"),
        ("llama", dict(n_layer=-3), "n_layer=-3 must be at least 1"),
        ("llama", dict(d_ff=0), "d_ff=0 must be at least 1"),
        ("llama", dict(vocab_size=0), "vocab_size=0 must be at least 1"),
        ("llama", dict(block_size=0), "block_size=0 must be at least 1"),
        ("llama", dict(pad_vocab_multiple=0), "pad_vocab_multiple=0 must be at least 1"),
        ("llama", dict(n_kv_head=0), "n_kv_head=0 must be at least 1"),
        ("llama", dict(head_dim=0), "head_dim=0 must be at least 1"),
        ("llama", dict(layer_pattern="mlp"), "no block with attention"),
        (
            "llama",
            dict(normalization="rms"),
            r"normalization='rms'.*did you mean 'rmsnorm'.*layernorm, layernorm_nobias, rmsnorm",
        ),
        ("llama", dict(attention_backend="flash"), "attention_backend='flash'.*sdpa, manual"),
        ("llama", dict(layer_pattern="transformr"), "transformr.*did you mean 'transformer'"),
        ("lama", {}, f"arch_preset='lama'.*did you mean 'llama'.*{', '.join(PRESETS)}"),
        ("llama", dict(layer_pattern="sliding"), "'sliding'.*sliding_window"),
        ("llama", dict(layer_pattern=""), "layer_pattern"),
        ("llama", dict(layer_pattern=[]), "layer_pattern is empty"),
        ("llama", dict(sliding_window=-1), "sliding_window=-1 must be positive"),
        ("mistral", dict(sliding_window=7, layer_pattern="transformer"), "sliding_window=7 has no effect"),
        ("gpt2", dict(rope_scaling="linear"), "rope_scaling='linear' has no effect"),
        ("llama", dict(rope_scaling="linear", position_encoding="alibi"), "rope_scaling='linear' has no effect"),
        ("llama", dict(rope_factor=2.0), r"rope_factor=2\.0 has no effect"),
        ("llama", dict(rope_scaling="linear", rope_high_freq_factor=2.0), r"rope_high_freq_factor=2\.0 has no effect"),
        ("llama", dict(rope_scaling="linear", rope_factor=0.0), r"rope_factor=0\.0"),
        ("llama", dict(rope_scaling="llama3", rope_low_freq_factor=4.0), r"rope_low_freq_factor=4\.0 must be below"),
        ("llama", dict(attention_scale=-0.5), r"attention_scale=-0\.5"),
        ("llama", dict(attention_softcap=-1.0), r"attention_softcap=-1\.0"),
        ("llama", dict(logit_softcap=float("nan")), "logit_softcap=nan"),
        ("llama", dict(d_ff=64, ffn_expansion_ratio=2.0), r"ffn_expansion_ratio=2\.0 has no effect.*d_ff=64"),
        ("llama", dict(d_ff=64, ffn_multiple=8), "ffn_multiple=8 has no effect.*d_ff=64"),
        ("llama", dict(ffn_expansion_ratio=-1.0), r"ffn_expansion_ratio=-1\.0"),
        ("llama", dict(ffn_expansion_ratio=float("inf")), "ffn_expansion_ratio=inf"),
        ("llama", dict(ffn_multiple=0), "ffn_multiple=0"),
        ("llama", dict(ffn_type="gated"), "ffn_type='swiglu'"),
        ("custom", dict(ffn_type="gated", activation="gelu"), "ffn_type='geglu'"),
    ],
)
def test_what_cannot_be_or_would_do_nothing_is_refused_with_the_remedy(preset, overrides, says):
    with pytest.raises(ValueError, match=says):
        resolve(preset, **overrides)


def test_18_heads_of_2432_are_refused_with_the_remedy():
    sentence = "n_head=18 does not divide n_embd=2432 (head_dim would be 135.11). Use n_head=19 for head_dim 128."
    for preset, (_, values) in PRESETS.items():
        if "head_dim" in values:  # the width of its heads does not follow from n_embd
            assert resolve(preset, n_layer=18, n_head=18, n_embd=2432).head_dim == values["head_dim"]
        else:
            with pytest.raises(ValueError) as refusal:
                resolve(preset, n_layer=18, n_head=18, n_embd=2432)
            assert str(refusal.value) == sentence
        assert resolve(preset, n_layer=18, n_head=19, n_embd=2432).head_dim == 128


@pytest.mark.parametrize("n_head, n_embd", [(5, 32), (7, 100), (3, 8), (100, 64), (6, 17)])
def test_the_remedy_of_an_indivisible_width_is_accepted(n_head, n_embd):
    with pytest.raises(ValueError) as refusal:
        resolve("llama", n_head=n_head, n_embd=n_embd)
    remedy, head_dim = map(int, re.search(r"Use n_head=(\d+) for head_dim (\d+)", str(refusal.value)).groups())
    assert remedy * head_dim == n_embd
    if n_embd % 2 == 0:
        assert resolve("llama", n_head=remedy, n_embd=n_embd).head_dim == head_dim


def test_all_problems_are_reported_together():
    with pytest.raises(ValueError) as refusal:
        resolve(
            "gpt2",
            n_layers=3,
            normalization="rms",
            n_head=18,
            n_embd=2432,
            rope_theta=1e6,
            dropout=1.5,
            d_ff=-1,
            norm_eps=0.0,
            n_kv_head=5,
            layer_pattern="mlp,attn",
        )
    told = str(refusal.value)
    missing = [
        word
        for word in (
            "n_layers",
            "normalization='rms'",
            "n_head=18",
            "rope_theta",
            "dropout=1.5",
            "d_ff=-1",
            "norm_eps=0.0",
            "n_kv_head=5",
            "'attn'",
        )
        if word not in told
    ]
    assert missing == []


@pytest.mark.parametrize(
    "pattern, n_layer, expected",
    [
        ("a", 3, "aaa"),
        ("a*2,b", 6, "aabaab"),
        ("a*2,b", 4, "aaba"),
        ("a,b,c", 3, "abc"),
        (" a * 2 , b ", 3, "aab"),
        (["a", "b"], 5, "ababa"),
        (("a*3", "b"), 4, "aaab"),
    ],
)
def test_a_layer_pattern_is_repeated_to_n_layer(pattern, n_layer, expected):
    assert expand_pattern(pattern, n_layer) == tuple(expected)


@pytest.mark.parametrize("pattern", ["", ",", "a,,b", "a*0", "a*-1", "a*x", "a*", "*2", "a*1.5", [], "a*9"])
def test_a_bad_layer_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="layer_pattern"):
        expand_pattern(pattern, 8)


def test_the_shortest_pattern_is_the_inverse_of_expand_pattern():
    for length in range(1, 6):
        for names in itertools.product("ab", repeat=length):
            assert expand_pattern(shortest_pattern(names), length) == names
    assert shortest_pattern(tuple("aab")) == "a*2,b"


def test_a_pattern_written_in_several_ways_is_one_model():
    spellings = ["transformer,mlp", "transformer,mlp,transformer,mlp", ["transformer", "mlp"], "transformer*1,mlp*1"]
    configs = {resolve("llama", **{**TINY, "n_layer": 4}, layer_pattern=p) for p in spellings}
    assert len(configs) == 1 and len({c.fingerprint for c in configs}) == 1


# ------------------------------------------------------------------------------------------- tables


def test_list_presets_works_where_no_part_is_imported(run_python):
    done = run_python("-c", "from model_config import list_presets; list_presets()")
    assert done.returncode == 0 and done.stderr == ""
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == list(PRESETS)


def test_list_presets_prints_every_preset_with_its_name(capsys):
    list_presets()
    lines = capsys.readouterr().out.splitlines()
    assert set(lines[1].replace(" ", "")) == {"-"}
    rows = {line.split()[0]: line for line in lines[2:]}
    assert list(rows) == list(PRESETS)
    for preset, (about, _) in PRESETS.items():
        assert rows[preset].split()[1] == resolve(preset).name and rows[preset].endswith(about) and len(about) > 20


def test_list_components_prints_every_component_with_what_it_is(capsys):
    list_components()
    lines = capsys.readouterr().out.splitlines()
    rows = {tuple(line.split()[:3]): line for line in lines[2:]}
    expected = [
        ("layer_pattern" if kind == "block" else kind, c.name, c.short)
        for kind in COMPONENT_KINDS
        for c in components(kind).values()
    ]
    assert list(rows) == expected
    starts = {
        line.index(c.summary)
        for line, (kind, c) in zip(lines[2:], [(kind, c) for kind in COMPONENT_KINDS for c in components(kind).values()])
    }
    assert len(starts) == 1  # a column


@pytest.mark.parametrize("kind", COMPONENT_KINDS)
def test_every_component_says_in_a_sentence_what_it_is(kind):
    assert len(components(kind)) >= 2 or kind == "block"
    for c in components(kind).values():
        assert 15 < len(c.summary) < 140, c.name


REQUIRED = dict(
    normalization={"layernorm", "layernorm_nobias", "rmsnorm", "rmsnorm_offset"},
    activation={"gelu", "gelu_tanh", "silu", "relu", "leaky_relu", "relu2"},
    ffn_type={"standard", "swiglu", "geglu", "gated"},
    position_encoding={"learned_absolute", "rope", "none", "sinusoidal", "alibi"},
    rope_scaling={"none", "linear", "llama3"},
    norm_position={"pre", "post", "output", "sandwich"},
    block={"transformer", "mlp", "sliding"},
    attention_backend={"sdpa", "manual", "flex"},
)


@pytest.mark.parametrize("kind", COMPONENT_KINDS)
def test_the_promised_components_are_there(kind):
    assert REQUIRED[kind] <= set(components(kind))


@pytest.mark.parametrize("name, short", [("relu", "Other"), ("other", "ReLU")])
def test_registering_a_taken_name_or_short_name_is_refused_and_changes_nothing(name, short):
    before = dict(components("activation"))
    with pytest.raises(ValueError, match="already registered"):
        register_activation(name, short=short)(lambda x: x)
    assert components("activation") == before


def test_an_unregistered_component_is_gone_and_its_name_free_again():
    try:
        register_norm("mine", short="Mine")(type("Mine", (), {"__doc__": "A norm."}))
        assert component("normalization", "mine").short == "Mine"
    finally:
        unregister("normalization", "mine")
    with pytest.raises(ValueError, match="'mine' is not registered"):
        component("normalization", "mine")
    register("normalization", "mine", short="Mine")(object)
    unregister("normalization", "mine")


def test_an_activation_cannot_take_the_place_of_a_gated_feed_forward_in_the_name():
    try:
        register_activation("swish_glu", short="SwiGLU")(torch.relu)
    except ValueError:
        return  # refused: as good as told apart
    try:
        one, other = resolve("llama", **TINY), resolve("llama", **TINY, ffn_type="standard", activation="swish_glu")
        assert one.fingerprint != other.fingerprint and one.name != other.name
    finally:
        unregister("activation", "swish_glu")
