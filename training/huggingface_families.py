"""Hugging Face's model families, one row of `FAMILIES` each: config.json and tensor names in kitbash's terms.

A row says what its class's keys default to, what they are called here, and what its tensors are called. It needs no
package: which values a file means is huggingface.py's business, where the tensors are huggingface_files.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from command_line import Failure
from model_config import ModelConfig


class ConversionError(Failure):
    """A model cannot be expressed on the other side; the message names the parts that have no counterpart."""


@dataclass(frozen=True)
class Rule:
    """One Hugging Face tensor and the kitbash tensors that it holds, stacked along their first dimension.

    `transposed`: Hugging Face keeps the matrix as (d_in, d_out), as its GPT-2 does.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False

    def to_ours(self, tensor: Tensor) -> dict[str, Tensor]:
        """A Hugging Face tensor → kitbash tensors by name. All of them must have the same number of rows."""
        tensor = tensor.T if self.transposed else tensor
        return {name: piece.contiguous() for name, piece in zip(self.ours, tensor.chunk(len(self.ours)))}

    def to_theirs(self, tensors: dict[str, Tensor]) -> Tensor:
        """Kitbash tensors by name → the Hugging Face tensor."""
        stacked = torch.cat([tensors[name] for name in self.ours]) if len(self.ours) > 1 else tensors[self.ours[0]]
        return (stacked.T if self.transposed else stacked).contiguous()


@dataclass(frozen=True)
class Family:
    """One Hugging Face model type: how its config.json reads and writes, and what its tensors are called.

    `defaults`: every key of its class that decides what the model computes, with the class's default.
    `parts`: what all its models have. `read`: the class's values → the rest of ModelConfig's keys. `write`: ModelConfig →
    the file's keys, less what `config_to_hf` adds for all. `rules`: its tensors. `dropouts`: its keys of dropout
    and their defaults.
    `dropped`: pattern of stored tensors that are no weights (masks, frequencies), as the class leaves them out.
    """

    model_type: str
    architecture: str
    defaults: dict[str, Any]
    parts: dict[str, Any]
    read: Callable[[dict[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    rules: Callable[[ModelConfig], Iterator[Rule]]
    dropouts: dict[str, float] = field(default_factory=lambda: {"attention_dropout": 0.0})
    dropped: str = r"rotary_emb\.inv_freq$"

    @property
    def prefix(self) -> str:
        """What the tensors' names begin with, and lack in the file of a base model (without its head)."""
        return "transformer." if self.model_type == "gpt2" else "model."


# ------------------------------------------------------------------------------------------- parts of a config.json

_HF_ACTIVATION = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "leaky_relu": "leaky_relu",
}
_ACTIVATION = {
    **{theirs: ours for ours, theirs in _HF_ACTIVATION.items()},
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), "gelu_tanh"),
    "gelu_python": "gelu",
    "swish": "silu",
}
ROPE_KEYS = frozenset(("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"))


def _activation(values: dict[str, Any], key: str) -> str:
    name = values[key]
    if name not in _ACTIVATION:
        raise ConversionError(f"{key}={name!r} has no counterpart here; there is {', '.join(_ACTIVATION)}.")
    return _ACTIVATION[name]


def _gated(activation: str) -> dict[str, Any]:
    """The keys of a gated feed-forward with this activation."""
    return dict(activation=activation, ffn_type={"silu": "swiglu", "gelu": "geglu"}.get(activation, "gated"))


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """RoPE's keys, in the form of transformers 5 (rope_parameters) or 4 (rope_theta, rope_scaling).

    Where a file has both, the class of transformers 5 takes rope_scaling alone, and rope_theta where that has none.
    """
    parameters = values.get("rope_scaling") or values.get("rope_parameters") or {}
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    theta = parameters.get("rope_theta", values.get("rope_theta", 10000.0))
    partial = parameters.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if theta is None:
        raise ConversionError("rope_theta is null in this config.json; give it a value.")
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ConversionError("RoPE that differs between kinds of layers (nested rope_parameters) has no counterpart here.")
    if kind not in ("default", "linear", "llama3"):
        raise ConversionError(f"RoPE of type {kind!r} has no counterpart here; there is default, linear and llama3.")
    if kind != "default" and partial not in (None, 1):  # the plain type does not heed it
        raise ConversionError(f"partial_rotary_factor={partial} has no counterpart here.")
    if kind == "default" or parameters["factor"] == 1:
        return dict(rope_theta=theta)
    if kind == "linear":
        return dict(rope_theta=theta, rope_scaling="linear", rope_factor=parameters["factor"])
    return dict(
        rope_theta=theta,
        rope_scaling="llama3",
        rope_factor=parameters["factor"],
        rope_low_freq_factor=parameters["low_freq_factor"],
        rope_high_freq_factor=parameters["high_freq_factor"],
        rope_original_context=parameters.get("original_max_position_embeddings") or values["max_position_embeddings"],
    )


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    """RoPE's keys in the spelling of transformers 4, which 5 reads as well (4 does not read that of 5)."""
    scaling = None
    if config.rope_scaling == "linear":
        scaling = dict(rope_type="linear", factor=config.rope_factor)
    elif config.rope_scaling == "llama3":
        scaling = dict(
            rope_type="llama3",
            factor=config.rope_factor,
            low_freq_factor=config.rope_low_freq_factor,
            high_freq_factor=config.rope_high_freq_factor,
            original_max_position_embeddings=config.rope_original_context,
        )
    return dict(rope_theta=config.rope_theta, rope_scaling=scaling)


def _windows(n_layer: int, window: int | None, kinds: list[str]) -> dict[str, Any]:
    """sliding_window and the kind of each layer → sliding_window and layer_pattern."""
    if len(kinds) != n_layer:
        raise ConversionError(f"layer_types names {len(kinds)} layers, but the model has {n_layer}.")
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown:
        raise ConversionError(f"layer_types has {', '.join(sorted(map(repr, unknown)))}, which has no counterpart here.")
    if "sliding_attention" not in kinds:
        return {}
    if window is None or window < 1:
        raise ConversionError(f"Layers slide, but sliding_window={window} is no width; give it a positive number of tokens.")
    pattern = ",".join("sliding" if kind == "sliding_attention" else "transformer" for kind in kinds)
    return dict(sliding_window=window, layer_pattern=pattern)


def _layer_types(config: ModelConfig) -> list[str]:
    return ["sliding_attention" if block == "sliding" else "full_attention" for block in config.layer_pattern]


def dropout(family: Family, values: dict[str, Any]) -> float:
    """GPT-2's dropout where its three are alike, as they are one key here; else none. It only matters in training."""
    rates = {float(values.get(key, default) or 0.0) for key, default in family.dropouts.items()}
    return rates.pop() if len(family.dropouts) == 3 and len(rates) == 1 else 0.0


# ------------------------------------------------------------------------------------------- LLaMA and its relatives

_LLAMA_DEFAULTS = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=None,
    head_dim=None,
    hidden_act="silu",
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    rope_theta=10000.0,
    attention_bias=False,
    mlp_bias=False,
)
_LLAMA_PARTS = dict(normalization="rmsnorm", norm_position="pre", position_encoding="rope")


def _read_llama(values: dict[str, Any], activation: str = "hidden_act") -> dict[str, Any]:
    """The keys that LLaMA's relatives share. `activation`: the name of that key."""
    heads, attention, feed_forward = (values.get(key) for key in ("num_attention_heads", "attention_bias", "mlp_bias"))
    if bool(attention) != bool(feed_forward):
        raise ConversionError(
            f"attention_bias={bool(attention)} with mlp_bias={bool(feed_forward)} has no counterpart here: 'bias' is for both."
        )
    return dict(
        n_layer=values["num_hidden_layers"],
        n_head=heads,
        n_kv_head=heads if values["num_key_value_heads"] is None else values["num_key_value_heads"],
        head_dim=values.get("head_dim"),
        n_embd=values["hidden_size"],
        d_ff=values["intermediate_size"],
        block_size=values["max_position_embeddings"],
        norm_eps=values["rms_norm_eps"],
        bias=bool(attention),
        **_gated(_activation(values, activation)),
        **_rope(values),
    )


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return dict(
        hidden_size=config.n_embd,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head,
        head_dim=config.head_dim,
        max_position_embeddings=config.block_size,
        rms_norm_eps=config.norm_eps,
        hidden_act=_HF_ACTIVATION.get(config.activation),
        attention_bias=config.bias,
        **_write_rope(config),
    )


_LLAMA_NORMS = {"attention.norm": "input_layernorm", "feed_forward.norm": "post_attention_layernorm"}
_OLMO2_NORMS = {"attention.norm": "post_attention_layernorm", "feed_forward.norm": "post_feedforward_layernorm"}
_GEMMA2_NORMS = {
    "attention.norm": "input_layernorm",
    "attention.output_norm": "post_attention_layernorm",
    "feed_forward.norm": "pre_feedforward_layernorm",
    "feed_forward.output_norm": "post_feedforward_layernorm",
}


def _llama_rules(norms: dict[str, str]) -> Callable[[ModelConfig], Iterator[Rule]]:
    def rules(config: ModelConfig) -> Iterator[Rule]:
        yield Rule("model.embed_tokens.weight", ("embedding.weight",))
        for i in range(config.n_layer):
            mine, theirs = f"blocks.{i}", f"model.layers.{i}"
            biased = dict(q=config.qkv_bias, k=config.qkv_bias, v=config.qkv_bias, o=config.bias)
            for name, bias in biased.items():
                for kind in ("weight", "bias") if bias else ("weight",):
                    yield Rule(f"{theirs}.self_attn.{name}_proj.{kind}", (f"{mine}.attention.sublayer.{name}_proj.{kind}",))
            for name in ("q", "k") if config.qk_norm else ():
                yield Rule(f"{theirs}.self_attn.{name}_norm.weight", (f"{mine}.attention.sublayer.{name}_norm.weight",))
            for name in ("gate", "up", "down"):
                for kind in ("weight", "bias") if config.bias else ("weight",):
                    yield Rule(f"{theirs}.mlp.{name}_proj.{kind}", (f"{mine}.feed_forward.sublayer.{name}_proj.{kind}",))
            for ours, hf_name in norms.items():
                yield Rule(f"{theirs}.{hf_name}.weight", (f"{mine}.{ours}.weight",))
        yield Rule("model.norm.weight", ("norm.weight",))
        if not config.weight_tying:
            yield Rule("lm_head.weight", ("head.weight",))

    return rules


def _with_head_dim(values: dict[str, Any]) -> dict[str, Any]:
    """The values with head_dim, which some classes round down where the heads do not divide the width."""
    return values if values.get("head_dim") else {**values, "head_dim": values["hidden_size"] // values["num_attention_heads"]}


def _read_mistral(values: dict[str, Any]) -> dict[str, Any]:
    """Without biases, which its class does not have whatever the file says; the window is of all layers."""
    window, layers = values["sliding_window"], values["num_hidden_layers"]
    keys = _read_llama(_with_head_dim({**values, "attention_bias": False, "mlp_bias": False}))
    return keys if window is None else dict(keys, **_windows(layers, window, ["sliding_attention"] * layers))


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return dict(_write_llama(config), sliding_window=config.sliding_window)


def _read_qwen3(values: dict[str, Any]) -> dict[str, Any]:
    """The layers from max_window_layers on slide where the file has no layer_types (transformers 4), if any do."""
    window = values["sliding_window"] if values["use_sliding_window"] else None
    kinds = values.get("layer_types") or [
        "sliding_attention" if window is not None and i >= values["max_window_layers"] else "full_attention"
        for i in range(values["num_hidden_layers"])
    ]
    return dict(_read_llama({**values, "mlp_bias": False}), **_windows(values["num_hidden_layers"], window, kinds))


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    kinds = _layer_types(config)
    return dict(
        _write_llama(config),
        use_sliding_window=config.sliding_window is not None,
        sliding_window=config.sliding_window,
        max_window_layers=kinds.index("sliding_attention") if "sliding_attention" in kinds else config.n_layer,
        layer_types=kinds,
    )


def _read_olmo2(values: dict[str, Any]) -> dict[str, Any]:
    return _read_llama(_with_head_dim({**values, "mlp_bias": False}))


def _read_gemma2(values: dict[str, Any]) -> dict[str, Any]:
    """Every other layer slides where the file has no layer_types (transformers 4), the first one included."""
    divisor = values["query_pre_attn_scalar"]
    kinds = values.get("layer_types") or [
        "full_attention" if i % 2 else "sliding_attention" for i in range(values["num_hidden_layers"])
    ]
    caps = dict(attention_softcap=values["attn_logit_softcapping"], logit_softcap=values["final_logit_softcapping"])
    if 0 in caps.values():
        raise ConversionError("A soft cap of 0 in this config.json leaves no logits; null is none.")
    if values["sliding_window"] is None:
        raise ConversionError(
            "sliding_window is null in this config.json, but Gemma 2's class needs one even where no layer slides."
        )
    return dict(
        _read_llama({**values, "mlp_bias": False}, "hidden_activation"),
        **_windows(values["num_hidden_layers"], values["sliding_window"], kinds),
        **caps,
        attention_scale=None if divisor == values["head_dim"] else divisor**-0.5,
    )


def _write_gemma2(config: ModelConfig) -> dict[str, Any]:
    """Its class needs a window even where no layer slides."""
    divisor = config.head_dim if config.attention_scale is None else round(config.attention_scale**-2)
    return dict(
        _write_llama(config),
        hidden_activation=_HF_ACTIVATION.get(config.activation),
        attn_logit_softcapping=config.attention_softcap,
        final_logit_softcapping=config.logit_softcap,
        query_pre_attn_scalar=divisor,
        sliding_window=config.sliding_window or _GEMMA2_DEFAULTS["sliding_window"],
        layer_types=_layer_types(config),
    )


# ------------------------------------------------------------------------------------------- GPT-2

_GPT2_DEFAULTS = dict(
    vocab_size=50257,
    n_positions=1024,
    n_embd=768,
    n_layer=12,
    n_head=12,
    n_inner=None,
    activation_function="gelu_new",
    layer_norm_epsilon=1e-5,
    scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
    tie_word_embeddings=True,
)
_GPT2_DROPOUTS = dict(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
_GPT2_PARTS = dict(
    normalization="layernorm", norm_position="pre", position_encoding="learned_absolute", ffn_type="standard", bias=True
)


def _read_gpt2(values: dict[str, Any]) -> dict[str, Any]:
    if values["scale_attn_by_inverse_layer_idx"] and values["n_layer"] > 1:
        raise ConversionError("GPT-2's scale_attn_by_inverse_layer_idx has no counterpart here.")
    return dict(
        n_layer=values["n_layer"],
        n_head=values["n_head"],
        n_embd=values["n_embd"],
        d_ff=values["n_inner"],
        block_size=values["n_positions"],
        norm_eps=values["layer_norm_epsilon"],
        activation=_activation(values, "activation_function"),
        attention_scale=None if values["scale_attn_weights"] else 1.0,
    )


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    return dict(
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_inner=config.d_ff,
        n_positions=config.block_size,
        layer_norm_epsilon=config.norm_eps,
        activation_function="gelu_new" if config.activation == "gelu_tanh" else _HF_ACTIVATION.get(config.activation),
        scale_attn_weights=config.attention_scale is None,
        **dict.fromkeys(_GPT2_DROPOUTS, config.dropout),
    )


def _gpt2_rules(config: ModelConfig) -> Iterator[Rule]:
    yield Rule("transformer.wte.weight", ("embedding.weight",))
    yield Rule("transformer.wpe.weight", ("position.table.weight",))
    for i in range(config.n_layer):
        mine, theirs = f"blocks.{i}", f"transformer.h.{i}"
        for kind in ("weight", "bias"):
            matrix = kind == "weight"
            yield Rule(f"{theirs}.ln_1.{kind}", (f"{mine}.attention.norm.{kind}",))
            yield Rule(f"{theirs}.attn.c_attn.{kind}", tuple(f"{mine}.attention.sublayer.{n}_proj.{kind}" for n in "qkv"), matrix)
            yield Rule(f"{theirs}.attn.c_proj.{kind}", (f"{mine}.attention.sublayer.o_proj.{kind}",), matrix)
            yield Rule(f"{theirs}.ln_2.{kind}", (f"{mine}.feed_forward.norm.{kind}",))
            yield Rule(f"{theirs}.mlp.c_fc.{kind}", (f"{mine}.feed_forward.sublayer.up_proj.{kind}",), matrix)
            yield Rule(f"{theirs}.mlp.c_proj.{kind}", (f"{mine}.feed_forward.sublayer.down_proj.{kind}",), matrix)
    for kind in ("weight", "bias"):
        yield Rule(f"transformer.ln_f.{kind}", (f"norm.{kind}",))
    if not config.weight_tying:
        yield Rule("lm_head.weight", ("head.weight",))


# ------------------------------------------------------------------------------------------- the families

_MISTRAL_DEFAULTS = dict(
    _LLAMA_DEFAULTS, intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096
)
_QWEN3_DEFAULTS = dict(
    _LLAMA_DEFAULTS,
    vocab_size=151936,
    intermediate_size=22016,
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=32768,
    use_sliding_window=False,
    sliding_window=4096,
    max_window_layers=28,
    layer_types=None,
)
_OLMO2_DEFAULTS = dict(_LLAMA_DEFAULTS, vocab_size=50304, rms_norm_eps=1e-5)
_GEMMA2_DEFAULTS = dict(
    _LLAMA_DEFAULTS,
    vocab_size=256000,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    layer_types=None,
    final_logit_softcapping=30.0,
    attn_logit_softcapping=50.0,
)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            _GPT2_DEFAULTS,
            _GPT2_PARTS,
            _read_gpt2,
            _write_gpt2,
            _gpt2_rules,
            dropouts=_GPT2_DROPOUTS,
            dropped=r"\.attn\.(masked_)?bias$",
        ),
        Family(
            "llama",
            "LlamaForCausalLM",
            _LLAMA_DEFAULTS,
            _LLAMA_PARTS,
            _read_llama,
            lambda config: dict(_write_llama(config), mlp_bias=config.bias),
            _llama_rules(_LLAMA_NORMS),
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            _MISTRAL_DEFAULTS,
            _LLAMA_PARTS,
            _read_mistral,
            _write_mistral,
            _llama_rules(_LLAMA_NORMS),
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            _QWEN3_DEFAULTS,
            dict(_LLAMA_PARTS, qk_norm=True),
            _read_qwen3,
            _write_qwen3,
            _llama_rules(_LLAMA_NORMS),
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            _OLMO2_DEFAULTS,
            dict(_LLAMA_PARTS, norm_position="output", qk_norm="full"),
            _read_olmo2,
            _write_llama,
            _llama_rules(_OLMO2_NORMS),
        ),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            _GEMMA2_DEFAULTS,
            dict(_LLAMA_PARTS, normalization="rmsnorm_offset", norm_position="sandwich", embedding_scale=True),
            _read_gemma2,
            _write_gemma2,
            _llama_rules(_GEMMA2_NORMS),
        ),
    )
}
