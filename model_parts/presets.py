"""The presets: named architectures, as values of configuration keys."""

from __future__ import annotations

from typing import Any

# What a preset that does not speak of a part has there. These are switched off, or do not change what is computed, so they
# are in neither the name nor the fingerprint of a model.
PLAIN: dict[str, str] = dict(rope_scaling="none", attention_backend="sdpa")
PLAIN_BLOCK = "transformer"  # what all layers are where nobody says otherwise

_GPT2_SHAPE = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, norm_eps=1e-5, pad_vocab_multiple=1)

_GPT2 = dict(
    _GPT2_SHAPE,
    vocab_size=50257,
    normalization="layernorm",
    activation="gelu_tanh",
    ffn_type="standard",
    position_encoding="learned_absolute",
    norm_position="pre",
    bias=True,
    weight_tying=True,
)

_BIAS_FREE = dict(
    _GPT2_SHAPE,
    vocab_size=50304,
    normalization="layernorm_nobias",
    activation="gelu",
    ffn_type="standard",
    position_encoding="rope",
    norm_position="pre",
    bias=False,
    weight_tying=True,
)

_LLAMA = dict(
    _GPT2_SHAPE,
    vocab_size=50304,
    normalization="rmsnorm",
    activation="silu",
    ffn_type="swiglu",
    position_encoding="rope",
    norm_position="pre",
    bias=False,
    weight_tying=False,
)

# name → (one line about it, values). Keys not named here are derived in `resolve` or off. All but lm_tiny and
# lm_small have GPT-2 124M's shape.
# queries_per_kv_head is no key: n_kv_head follows from it and from n_head, which may be overridden.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT-2 124M as OpenAI released it: pre-norm, biases, GELU-tanh, tied (Radford et al. 2019)",
        _GPT2,
    ),
    "gpt2_postnorm": (
        "the post-norm, bias-free variant that the starting documents call GPT-2",
        dict(_BIAS_FREE, position_encoding="learned_absolute", norm_position="post"),
    ),
    "llama": ("LLaMA's parts in GPT-2's shape: RoPE, RMSNorm, SwiGLU, pre-norm, untied (Touvron et al. 2023)", _LLAMA),
    "llama3": (
        "LLaMA 3: grouped-query attention (4 : 1), RoPE θ 500,000 (Grattafiori et al. 2024)",
        dict(_LLAMA, queries_per_kv_head=4, rope_theta=500000.0),
    ),
    "mistral": (
        "Mistral 7B: grouped-query attention (4 : 1), sliding window of 4096 tokens (Jiang et al. 2023)",
        dict(_LLAMA, queries_per_kv_head=4, sliding_window=4096),
    ),
    "qwen3": (
        "Qwen3: heads of 128, grouped (2 : 1), QK-norm, RoPE θ 1,000,000, tied (Qwen team 2025)",
        dict(_LLAMA, queries_per_kv_head=2, head_dim=128, qk_norm=True, rope_theta=1000000.0, norm_eps=1e-6, weight_tying=True),
    ),
    "olmo2": (
        "OLMo 2: norms on the branches' outputs, QK-norm over all heads, RoPE θ 500,000 (OLMo team 2024)",
        dict(_LLAMA, norm_position="output", qk_norm="full", rope_theta=500000.0, norm_eps=1e-6),
    ),
    "gemma2": (
        "Gemma 2: sandwich norms, GELU-gated, every other layer sliding, soft caps, tied (Gemma team 2024)",
        dict(
            _LLAMA,
            queries_per_kv_head=2,
            head_dim=128,
            normalization="rmsnorm_offset",
            ffn_type="gated",
            activation="gelu_tanh",
            norm_position="sandwich",
            layer_pattern="sliding,transformer",
            sliding_window=4096,
            attention_softcap=50.0,
            logit_softcap=30.0,
            embedding_scale=True,
            norm_eps=1e-6,
            weight_tying=True,
        ),
    ),
    "qwen2": (
        "Qwen2: grouped-query attention (6 : 1), biases on q, k and v, RoPE θ 1,000,000, tied (Qwen team 2024)",
        dict(_LLAMA, queries_per_kv_head=6, qkv_bias=True, rope_theta=1000000.0, norm_eps=1e-6, weight_tying=True),
    ),
    "olmo3": (
        "OLMo 3: OLMo 2's parts with a window of 4096 tokens in three of four layers (OLMo team 2025)",
        dict(
            _LLAMA,
            norm_position="output",
            qk_norm="full",
            rope_theta=500000.0,
            norm_eps=1e-6,
            layer_pattern="sliding*3,transformer",
            sliding_window=4096,
        ),
    ),
    "gemma": (
        "Gemma: one key head for all queries, heads of 128, GELU-gated, scaled embeddings, tied (Gemma team 2024)",
        dict(
            _LLAMA,
            n_kv_head=1,
            head_dim=128,
            normalization="rmsnorm_offset",
            ffn_type="gated",
            activation="gelu_tanh",
            embedding_scale=True,
            norm_eps=1e-6,
            weight_tying=True,
        ),
    ),
    "phi3": (
        "Phi-3: LLaMA's parts with a sliding window of 2047 tokens (Abdin et al. 2024)",
        dict(_LLAMA, sliding_window=2047),
    ),
    "arcee": (
        "Arcee's AFM: LLaMA's parts, grouped (4 : 1), with an ungated ReLU² feed-forward (Arcee 2025)",
        dict(_LLAMA, queries_per_kv_head=4, ffn_type="standard", activation="relu2"),
    ),
    "starcoder2": (
        "StarCoder2: LayerNorm, biases, RoPE, grouped-query attention (12 : 1), window of 4096, tied (Lozhkov et al. 2024)",
        dict(
            _LLAMA,
            queries_per_kv_head=12,
            normalization="layernorm",
            ffn_type="standard",
            activation="gelu_tanh",
            bias=True,
            rope_theta=1000000.0,
            sliding_window=4096,
            weight_tying=True,
        ),
    ),
    "opt": (
        "OPT: GPT-2's parts with ReLU, tied (Zhang et al. 2022)",
        dict(_GPT2, vocab_size=50272, activation="relu"),
    ),
    "modern": (
        "what small-model speed runs settled on: QK-norm, RoPE, ReLU², zero-initialised outputs, untied",
        dict(_LLAMA, ffn_type="standard", activation="relu2", qk_norm=True, zero_init=True),
    ),
    "hybrid": (
        "GPT-2's feed-forward and tied head with RoPE and a bias-free pre-norm",
        _BIAS_FREE,
    ),
    "team": ("the starting documents' model_v1: the parts of LLaMA", _LLAMA),
    "lm_tiny": (
        "a GPT-2 of 16 M parameters for WikiText-2: 4 layers of width 256, dropout 0.1",
        dict(_GPT2, n_layer=4, n_head=4, n_embd=256, block_size=256, dropout=0.1),
    ),
    "lm_small": (
        "a GPT-2 of 45 M parameters for WikiText-103: 6 layers of width 512, dropout 0.1",
        dict(_GPT2, n_layer=6, n_head=8, n_embd=512, block_size=512, dropout=0.1),
    ),
    "lm_medium": (
        "GPT-2 124M with dropout 0.1, for WikiText-103",
        dict(_GPT2, dropout=0.1),
    ),
    "custom": (
        "a plain bias-free pre-norm base to mix your own from: LayerNorm, GELU, RoPE, untied",
        dict(_BIAS_FREE, weight_tying=False),
    ),
}
