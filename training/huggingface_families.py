"""Hugging Face's model families, one row of `FAMILIES` each: config.json and tensor names in kitbash's terms.

A row says what its class's keys default to, how they are read and written, and what its tensors are called. It needs no
package: which values a file means is huggingface.py's business, where the tensors are huggingface_files.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from model_config import ModelConfig
from training.huggingface_parts import (
    HF_ACTIVATION,
    ConversionError,
    Family,
    Rule,
    activation_of,
    gated,
    layer_types,
    rope,
    window_keys,
    write_rope,
)

Values = dict[str, Any]

# ------------------------------------------------------------------------------------------- LLaMA and its relatives


def _sizes(vocab: int, width: int, d_ff: int, layers: int, heads: int, kv_heads: int | None, context: int) -> Values:
    """A class's default sizes under the names that LLaMA's relatives share."""
    return dict(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=d_ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
    )


_LLAMA_DEFAULTS = dict(
    _sizes(32000, 4096, 11008, 32, 32, None, 2048),
    head_dim=None,
    hidden_act="silu",
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    rope_theta=10000.0,
    attention_bias=False,
    mlp_bias=False,
)
_LLAMA_PARTS = dict(normalization="rmsnorm", norm_position="pre", position_encoding="rope")


def _read_llama(values: Values) -> Values:
    """The keys that LLaMA's relatives share."""
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
        **gated(activation_of(values, "hidden_act")),
        **rope(values),
    )


def _write_llama(config: ModelConfig) -> Values:
    return dict(
        hidden_size=config.n_embd,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head,
        head_dim=config.head_dim,
        max_position_embeddings=config.block_size,
        rms_norm_eps=config.norm_eps,
        hidden_act=HF_ACTIVATION.get(config.activation),
        attention_bias=config.bias,
        **write_rope(config),
    )


_NORMS = {"attention.norm": "input_layernorm", "feed_forward.norm": "post_attention_layernorm"}
_OLMO_NORMS = {"attention.norm": "post_attention_layernorm", "feed_forward.norm": "post_feedforward_layernorm"}
_GEMMA2_NORMS = {
    "attention.norm": "input_layernorm",
    "attention.output_norm": "post_attention_layernorm",
    "feed_forward.norm": "pre_feedforward_layernorm",
    "feed_forward.output_norm": "post_feedforward_layernorm",
}
_GATED = dict(gate_proj="gate_proj", up_proj="up_proj", down_proj="down_proj")


def _rules(
    config: ModelConfig,
    norms: dict[str, str] = _NORMS,
    feed_forward: dict[str, str] = _GATED,
    norm_kinds: tuple[str, ...] = ("weight",),
) -> Iterator[Rule]:
    """LLaMA's tensors. `norms`, `feed_forward`: what is called what there; `norm_kinds`: what a norm has."""

    def kinds(bias: bool) -> tuple[str, ...]:
        return ("weight", "bias") if bias else ("weight",)

    yield Rule("model.embed_tokens.weight", ("embedding.weight",))
    for i in range(config.n_layer):
        mine, theirs = f"blocks.{i}", f"model.layers.{i}"
        for name, bias in dict(q=config.qkv_bias, k=config.qkv_bias, v=config.qkv_bias, o=config.bias).items():
            for kind in kinds(bias):
                yield Rule(f"{theirs}.self_attn.{name}_proj.{kind}", (f"{mine}.attention.sublayer.{name}_proj.{kind}",))
        for name in ("q", "k") if config.qk_norm else ():
            yield Rule(f"{theirs}.self_attn.{name}_norm.weight", (f"{mine}.attention.sublayer.{name}_norm.weight",))
        for ours, name in feed_forward.items():
            for kind in kinds(config.bias):
                yield Rule(f"{theirs}.mlp.{name}.{kind}", (f"{mine}.feed_forward.sublayer.{ours}.{kind}",))
        for ours, name in norms.items():
            for kind in norm_kinds:
                yield Rule(f"{theirs}.{name}.{kind}", (f"{mine}.{ours}.{kind}",))
    for kind in norm_kinds:
        yield Rule(f"model.norm.{kind}", (f"norm.{kind}",))
    if not config.weight_tying:
        yield Rule("lm_head.weight", ("head.weight",))


def _with_head_dim(values: Values, **others: Any) -> Values:
    """The values with head_dim, which some classes round down where the heads do not divide the width, and others."""
    head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    return {**values, "head_dim": head_dim, **others}


def _window(values: Values) -> int:
    """The window of a class that cannot do without one, even where no layer slides."""
    if values["sliding_window"] is None:
        raise ConversionError(f"sliding_window is null in this config.json, which {values['model_type']}'s class cannot run.")
    return values["sliding_window"]


_NO_BIAS = dict(attention_bias=False, mlp_bias=False)  # what a class without these keys has, whatever a file says


def _read_mistral(values: Values) -> Values:
    """The window is of all layers."""
    window, layers = values["sliding_window"], values["num_hidden_layers"]
    keys = _read_llama(_with_head_dim(values, **_NO_BIAS))
    return keys if window is None else dict(keys, **window_keys(layers, window, ["sliding_attention"] * layers))


def _write_mistral(config: ModelConfig) -> Values:
    return dict(_write_llama(config), sliding_window=config.sliding_window)


def _read_qwen3(values: Values) -> Values:
    """The layers from max_window_layers on slide where the file has no layer_types (transformers 4), if any do."""
    window, layers = values["sliding_window"] if values["use_sliding_window"] else None, values["num_hidden_layers"]
    kinds = values.get("layer_types") or [
        "sliding_attention" if window is not None and i >= values["max_window_layers"] else "full_attention"
        for i in range(layers)
    ]
    return dict(_read_llama({**values, "mlp_bias": False}), **window_keys(layers, window, kinds))


def _read_qwen2(values: Values) -> Values:
    return _read_qwen3(_with_head_dim(values, **_NO_BIAS))


def _write_qwen(config: ModelConfig) -> Values:
    kinds = layer_types(config)
    return dict(
        _write_llama(config),
        use_sliding_window=config.sliding_window is not None,
        sliding_window=config.sliding_window,
        max_window_layers=kinds.index("sliding_attention") if "sliding_attention" in kinds else config.n_layer,
        layer_types=kinds,
    )


def _read_phi3(values: Values) -> Values:
    if (values.get("rope_scaling") or values.get("rope_parameters") or values).get("partial_rotary_factor") not in (None, 1):
        raise ConversionError("partial_rotary_factor in this config.json has no counterpart here.")
    keys = _read_mistral(values)
    if "rope_scaling" in keys:
        raise ConversionError(f"Phi-3's class has no {keys['rope_scaling']} scaling of RoPE.")
    return keys


def _phi3_rules(config: ModelConfig) -> Iterator[Rule]:
    """LLaMA's, but q, k, v and gate, up are one matrix each."""
    fused = {
        "q_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj"), (config.n_head, config.n_kv_head, config.n_kv_head)),
        "gate_proj": ("gate_up_proj", ("gate_proj", "up_proj"), None),
    }
    for rule in _rules(config):
        place, _, matrix = rule.theirs.removesuffix(".weight").rpartition(".")
        if matrix in fused:
            name, members, shares = fused[matrix]
            ours = tuple(rule.ours[0].replace(matrix, member) for member in members)
            yield Rule(f"{place}.{name}.weight", ours, shares=shares)
        elif matrix not in ("k_proj", "v_proj", "up_proj"):
            yield rule


def _read_arcee(values: Values) -> Values:
    return dict(_read_llama(values), ffn_type="standard")


def _read_olmo2(values: Values) -> Values:
    return _read_llama(_with_head_dim(values, mlp_bias=False))


def _read_olmo3(values: Values) -> Values:
    """Three of four layers slide where the file does not say. Each kind of layer has its RoPE, which must be the same here."""
    layers, parameters = values["num_hidden_layers"], values.get("rope_parameters") or {}
    kinds = values.get("layer_types") or ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(layers)]
    if any(isinstance(part, dict) for part in parameters.values()):
        ropes = [rope({**values, "rope_scaling": None, "rope_parameters": parameters[kind]}) for kind in sorted(set(kinds))]
    else:  # what is said once is of the full layers
        plain = dict(rope_theta=_OLMO3_DEFAULTS["rope_theta"])
        ropes = [rope(values) if kind == "full_attention" else plain for kind in set(kinds)]
    if any(one != ropes[0] for one in ropes):
        raise ConversionError("RoPE that differs between sliding and full layers has no counterpart here.")
    simple = _with_head_dim(values, mlp_bias=False, rope_parameters=None, rope_scaling=None)
    return dict(_read_llama(simple), **ropes[0], **window_keys(layers, _window(values), kinds))


def _write_olmo3(config: ModelConfig) -> Values:
    keys = _write_llama(config)
    both = {"rope_theta": keys["rope_theta"], **(keys["rope_scaling"] or {"rope_type": "default"})}
    kinds = layer_types(config)
    return dict(
        keys,
        rope_parameters={kind: dict(both) for kind in ("full_attention", "sliding_attention")},
        sliding_window=config.sliding_window or _OLMO3_DEFAULTS["sliding_window"],
        layer_types=kinds,
    )


def _read_gemma(values: Values) -> Values:
    """Its class takes 'gelu' for the tanh approximation, which the first files meant by it."""
    activation = "gelu_pytorch_tanh" if values["hidden_act"] == "gelu" else values["hidden_act"]
    return _read_llama({**values, "hidden_act": activation, "mlp_bias": False})


def _write_gemma(config: ModelConfig) -> Values:
    exact = config.activation == "gelu"
    return {**_write_llama(config), **({"hidden_act": "gelu_python"} if exact else {})}


def _read_gemma2(values: Values) -> Values:
    """Every other layer slides where the file has no layer_types (transformers 4), the first one included."""
    divisor, layers = values["query_pre_attn_scalar"], values["num_hidden_layers"]
    kinds = values.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    caps = dict(attention_softcap=values["attn_logit_softcapping"], logit_softcap=values["final_logit_softcapping"])
    if 0 in caps.values():
        raise ConversionError("A soft cap of 0 in this config.json leaves no logits; null is none.")
    return dict(
        _read_llama({**values, "mlp_bias": False, "hidden_act": values["hidden_activation"]}),
        **window_keys(layers, _window(values), kinds),
        **caps,
        attention_scale=None if divisor == values["head_dim"] else divisor**-0.5,
    )


def _write_gemma2(config: ModelConfig) -> Values:
    """Its class needs a window even where no layer slides."""
    divisor = config.head_dim if config.attention_scale is None else round(config.attention_scale**-2)
    return dict(
        _write_llama(config),
        hidden_activation=HF_ACTIVATION.get(config.activation),
        attn_logit_softcapping=config.attention_softcap,
        final_logit_softcapping=config.logit_softcap,
        query_pre_attn_scalar=divisor,
        sliding_window=config.sliding_window or _GEMMA2_DEFAULTS["sliding_window"],
        layer_types=layer_types(config),
    )


_STARCODER2_DROPOUTS = dict(residual_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0)


def _read_starcoder2(values: Values) -> Values:
    shared = _read_mistral({**values, "rms_norm_eps": values["norm_epsilon"]})
    return dict(shared, bias=bool(values["use_bias"]), ffn_type="standard")


def _write_starcoder2(config: ModelConfig) -> Values:
    keys = dict(_write_mistral(config), norm_epsilon=config.norm_eps, use_bias=config.bias)
    return dict(keys, **dict.fromkeys(_STARCODER2_DROPOUTS, config.dropout))


_MISTRAL_DEFAULTS = dict(_LLAMA_DEFAULTS | _sizes(32000, 4096, 14336, 32, 32, 8, 131072), sliding_window=4096)
_QWEN2_DEFAULTS = dict(
    _LLAMA_DEFAULTS | _sizes(151936, 4096, 22016, 32, 32, 32, 32768),
    use_sliding_window=False,
    sliding_window=4096,
    max_window_layers=28,
    layer_types=None,
)
_PHI3_DEFAULTS = dict(
    _LLAMA_DEFAULTS | _sizes(32064, 3072, 8192, 32, 32, None, 4096),
    original_max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    sliding_window=None,
)
_ARCEE_DEFAULTS = dict(_LLAMA_DEFAULTS | _sizes(32000, 2560, 18432, 32, 32, None, 4096), hidden_act="relu2", rms_norm_eps=1e-5)
_OLMO2_DEFAULTS = dict(_LLAMA_DEFAULTS, vocab_size=50304, rms_norm_eps=1e-5)
_OLMO3_DEFAULTS = dict(_OLMO2_DEFAULTS, rope_theta=500000.0, sliding_window=4096, layer_types=None)
_GEMMA_DEFAULTS = dict(
    _LLAMA_DEFAULTS | _sizes(256000, 3072, 24576, 28, 16, 16, 8192),
    head_dim=256,
    hidden_act="gelu_pytorch_tanh",
    tie_word_embeddings=True,
)
_GEMMA2_DEFAULTS = dict(
    _GEMMA_DEFAULTS | _sizes(256000, 2304, 9216, 26, 8, 4, 8192),
    hidden_activation="gelu_pytorch_tanh",
    query_pre_attn_scalar=256,
    sliding_window=4096,
    layer_types=None,
    final_logit_softcapping=30.0,
    attn_logit_softcapping=50.0,
)
_STARCODER2_DEFAULTS = dict(
    _LLAMA_DEFAULTS | _sizes(49152, 3072, 12288, 30, 24, 2, 4096),
    hidden_act="gelu_pytorch_tanh",
    norm_epsilon=1e-5,
    sliding_window=None,
    use_bias=True,
    tie_word_embeddings=True,
)

# ------------------------------------------------------------------------------------------- GPT-2 and OPT

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
_LEARNED_PARTS = dict(normalization="layernorm", norm_position="pre", position_encoding="learned_absolute", ffn_type="standard")


def _read_gpt2(values: Values) -> Values:
    if values["scale_attn_by_inverse_layer_idx"] and values["n_layer"] > 1:
        raise ConversionError("GPT-2's scale_attn_by_inverse_layer_idx has no counterpart here.")
    return dict(
        n_layer=values["n_layer"],
        n_head=values["n_head"],
        n_embd=values["n_embd"],
        d_ff=values["n_inner"],
        block_size=values["n_positions"],
        norm_eps=values["layer_norm_epsilon"],
        activation=activation_of(values, "activation_function"),
        attention_scale=None if values["scale_attn_weights"] else 1.0,
    )


def _write_gpt2(config: ModelConfig) -> Values:
    return dict(
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_inner=config.d_ff,
        n_positions=config.block_size,
        layer_norm_epsilon=config.norm_eps,
        activation_function="gelu_new" if config.activation == "gelu_tanh" else HF_ACTIVATION.get(config.activation),
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


_OPT_FIXED = dict(do_layer_norm_before=True, _remove_final_layer_norm=False, layer_norm_elementwise_affine=True)
_OPT_DEFAULTS = dict(
    _OPT_FIXED,
    vocab_size=50272,
    hidden_size=768,
    num_hidden_layers=12,
    ffn_dim=3072,
    max_position_embeddings=2048,
    word_embed_proj_dim=None,
    num_attention_heads=12,
    activation_function="relu",
    enable_bias=True,
    tie_word_embeddings=True,
)
_OPT_NAMES = {
    "attention.norm": "self_attn_layer_norm",
    "feed_forward.norm": "final_layer_norm",
    **{f"attention.sublayer.{name}_proj": f"self_attn.{name}_proj" for name in "qkv"},
    "attention.sublayer.o_proj": "self_attn.out_proj",
    "feed_forward.sublayer.up_proj": "fc1",
    "feed_forward.sublayer.down_proj": "fc2",
}


def _read_opt(values: Values) -> Values:
    wanted = dict(_OPT_FIXED, word_embed_proj_dim=values["hidden_size"])
    for key, value in wanted.items():
        if values.get(key) not in (None, value):
            raise ConversionError(f"OPT's {key}={values[key]!r} has no counterpart here; it has to be {value!r}.")
    return dict(
        n_layer=values["num_hidden_layers"],
        n_head=values["num_attention_heads"],
        n_embd=values["hidden_size"],
        d_ff=values["ffn_dim"],
        block_size=values["max_position_embeddings"],
        norm_eps=1e-5,
        activation=activation_of(values, "activation_function"),
        bias=bool(values["enable_bias"]),
    )


def _write_opt(config: ModelConfig) -> Values:
    return dict(
        hidden_size=config.n_embd,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        ffn_dim=config.d_ff,
        word_embed_proj_dim=config.n_embd,
        max_position_embeddings=config.block_size,
        activation_function=HF_ACTIVATION.get(config.activation),
        enable_bias=config.bias,
        dropout=config.dropout,
    )


def _opt_rules(config: ModelConfig) -> Iterator[Rule]:
    """The first two rows of the position table are of padding."""
    yield Rule("model.decoder.embed_tokens.weight", ("embedding.weight",))
    yield Rule("model.decoder.embed_positions.weight", ("position.table.weight",), skipped=2)
    for i in range(config.n_layer):
        for ours, theirs in _OPT_NAMES.items():
            for kind in ("weight", "bias") if config.bias or ours.endswith("norm") else ("weight",):
                yield Rule(f"model.decoder.layers.{i}.{theirs}.{kind}", (f"blocks.{i}.{ours}.{kind}",))
    for kind in ("weight", "bias"):
        yield Rule(f"model.decoder.final_layer_norm.{kind}", (f"norm.{kind}",))
    if not config.weight_tying:
        yield Rule("lm_head.weight", ("head.weight",))


# ------------------------------------------------------------------------------------------- the families


def _relative(
    model_type: str,
    name: str,
    defaults: Values,
    read: Callable[[Values], Values],
    write: Callable[[ModelConfig], Values] = _write_llama,
    rules: Callable[[ModelConfig], Iterator[Rule]] = _rules,
    **parts: Any,
) -> Family:
    """A row for one of LLaMA's relatives: the parts are LLaMA's, but for those given."""
    return Family(model_type, f"{name}ForCausalLM", defaults, dict(_LLAMA_PARTS, **parts), read, write, rules)


def _write_with_mlp_bias(config: ModelConfig) -> Values:
    return dict(_write_llama(config), mlp_bias=config.bias)


_ROWS = (
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        _GPT2_DEFAULTS,
        dict(_LEARNED_PARTS, bias=True),
        _read_gpt2,
        _write_gpt2,
        _gpt2_rules,
        dropouts=_GPT2_DROPOUTS,
        dropped=r"\.attn\.(masked_)?bias$",
    ),
    _relative("llama", "Llama", _LLAMA_DEFAULTS, _read_llama, _write_with_mlp_bias),
    _relative("mistral", "Mistral", _MISTRAL_DEFAULTS, _read_mistral, _write_mistral),
    _relative("qwen2", "Qwen2", _QWEN2_DEFAULTS, _read_qwen2, _write_qwen, qkv_bias=True),
    _relative("qwen3", "Qwen3", dict(_QWEN2_DEFAULTS, head_dim=128), _read_qwen3, _write_qwen, qk_norm=True),
    _relative(
        "olmo2",
        "Olmo2",
        _OLMO2_DEFAULTS,
        _read_olmo2,
        rules=partial(_rules, norms=_OLMO_NORMS),
        norm_position="output",
        qk_norm="full",
    ),
    _relative(
        "olmo3",
        "Olmo3",
        _OLMO3_DEFAULTS,
        _read_olmo3,
        _write_olmo3,
        partial(_rules, norms=_OLMO_NORMS),
        norm_position="output",
        qk_norm="full",
    ),
    _relative("gemma", "Gemma", _GEMMA_DEFAULTS, _read_gemma, _write_gemma, normalization="rmsnorm_offset", embedding_scale=True),
    _relative(
        "gemma2",
        "Gemma2",
        _GEMMA2_DEFAULTS,
        _read_gemma2,
        _write_gemma2,
        partial(_rules, norms=_GEMMA2_NORMS),
        normalization="rmsnorm_offset",
        norm_position="sandwich",
        embedding_scale=True,
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        _PHI3_DEFAULTS,
        _LLAMA_PARTS,
        _read_phi3,
        _write_mistral,
        _phi3_rules,
        dropouts=dict(resid_pdrop=0.0, attention_dropout=0.0),
    ),
    _relative(
        "arcee",
        "Arcee",
        _ARCEE_DEFAULTS,
        _read_arcee,
        _write_with_mlp_bias,
        partial(_rules, feed_forward=dict(up_proj="up_proj", down_proj="down_proj")),
    ),
    Family(
        "starcoder2",
        "Starcoder2ForCausalLM",
        _STARCODER2_DEFAULTS,
        dict(_LLAMA_PARTS, normalization="layernorm"),
        _read_starcoder2,
        _write_starcoder2,
        partial(_rules, feed_forward=dict(up_proj="c_fc", down_proj="c_proj"), norm_kinds=("weight", "bias")),
        dropouts=_STARCODER2_DROPOUTS,
    ),
    Family(
        "opt",
        "OPTForCausalLM",
        _OPT_DEFAULTS,
        _LEARNED_PARTS,
        _read_opt,
        _write_opt,
        _opt_rules,
        dropouts=dict(dropout=0.1, attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0),
    ),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ROWS}
