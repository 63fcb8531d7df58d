"""Hugging Face's model families in kitbash's terms: config.json ↔ ModelConfig, tensor names ↔ tensor names.

Knows names and shapes only; `transformers` is not needed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from command_line import Failure
from model_config import ModelConfig, resolve


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
    """One Hugging Face model type: the parts it always has, how the rest of its config.json reads and writes, and what
    its tensors are called."""

    model_type: str
    architecture: str
    parts: dict[str, Any]
    read: Callable[[dict[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    rules: Callable[[ModelConfig], Iterator[Rule]]


# ------------------------------------------------------------------------------------------- LLaMA and its relatives

_HF_ACTIVATION = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2"}
_ACTIVATION = {**{theirs: ours for ours, theirs in _HF_ACTIVATION.items()}, "gelu_new": "gelu_tanh", "swish": "silu"}


def _rope(hf: dict[str, Any]) -> dict[str, Any]:
    """RoPE's keys of a config.json, in the form of transformers 5 (rope_parameters) or 4 (rope_theta, rope_scaling)."""
    parameters = hf.get("rope_parameters") or {**(hf.get("rope_scaling") or {}), "rope_theta": hf.get("rope_theta")}
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    theta = parameters.get("rope_theta") or 10000.0
    if kind == "default":
        return dict(rope_theta=theta)
    if kind == "linear":
        return dict(rope_theta=theta, rope_scaling="linear", rope_factor=parameters["factor"])
    if kind == "llama3":
        return dict(
            rope_theta=theta,
            rope_scaling="llama3",
            rope_factor=parameters["factor"],
            rope_low_freq_factor=parameters["low_freq_factor"],
            rope_high_freq_factor=parameters["high_freq_factor"],
            rope_original_context=parameters["original_max_position_embeddings"],
        )
    raise ConversionError(f"RoPE of type {kind!r} has no counterpart here; there is default, linear and llama3.")


def _rope_parameters(config: ModelConfig) -> dict[str, Any]:
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
    else:
        scaling = dict(rope_type="default")
    return dict(rope_theta=config.rope_theta, **scaling)


def _read_llama(hf: dict[str, Any]) -> dict[str, Any]:
    """The keys that LLaMA's relatives share."""
    heads = hf["num_attention_heads"]
    activation = hf.get("hidden_act") or hf.get("hidden_activation") or "silu"
    if activation not in _ACTIVATION:
        raise ConversionError(f"hidden_act={activation!r} has no counterpart here; there is {', '.join(_ACTIVATION)}.")
    gated = {"silu": "swiglu", "gelu": "geglu"}.get(_ACTIVATION[activation], "gated")
    return dict(
        n_layer=hf["num_hidden_layers"],
        n_head=heads,
        n_kv_head=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        n_embd=hf["hidden_size"],
        d_ff=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        block_size=hf["max_position_embeddings"],
        norm_eps=hf["rms_norm_eps"],
        activation=_ACTIVATION[activation],
        ffn_type=gated,
        weight_tying=bool(hf.get("tie_word_embeddings", False)),
        bias=_bias(hf),
        dropout=float(hf.get("attention_dropout") or 0.0),
        **_rope(hf),
    )


def _bias(hf: dict[str, Any]) -> bool:
    """Whether there are biases: in attention (q, k, v and o) and feed-forward, or in neither."""
    attention, feed_forward = bool(hf.get("attention_bias")), bool(hf.get("mlp_bias"))
    if attention != feed_forward:
        raise ConversionError(
            f"attention_bias={attention} with mlp_bias={feed_forward} has no counterpart here: 'bias' is for both."
        )
    return attention


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
        rope_parameters=_rope_parameters(config),
        attention_bias=config.bias,
        attention_dropout=0.0,
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
            for name in ("q", "k", "v", "o"):
                yield Rule(f"{theirs}.self_attn.{name}_proj.weight", (f"{mine}.attention.sublayer.{name}_proj.weight",))
                if config.bias:
                    yield Rule(f"{theirs}.self_attn.{name}_proj.bias", (f"{mine}.attention.sublayer.{name}_proj.bias",))
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


# ------------------------------------------------------------------------------------------- GPT-2


def _read_gpt2(hf: dict[str, Any]) -> dict[str, Any]:
    activation = hf.get("activation_function", "gelu_new")
    if activation not in _ACTIVATION:
        raise ConversionError(f"activation_function={activation!r} has no counterpart here.")
    if hf.get("scale_attn_by_inverse_layer_idx") or not hf.get("scale_attn_weights", True):
        raise ConversionError("GPT-2's scale_attn_by_inverse_layer_idx, and unscaled attention, have no counterpart here.")
    return dict(
        n_layer=hf["n_layer"],
        n_head=hf["n_head"],
        n_embd=hf["n_embd"],
        d_ff=hf.get("n_inner"),
        vocab_size=hf["vocab_size"],
        block_size=hf["n_positions"],
        norm_eps=hf["layer_norm_epsilon"],
        activation=_ACTIVATION[activation],
        dropout=float(hf.get("resid_pdrop") or 0.0),
        weight_tying=bool(hf.get("tie_word_embeddings", True)),
    )


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    return dict(
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_inner=config.d_ff,
        n_positions=config.block_size,
        layer_norm_epsilon=config.norm_eps,
        activation_function={"gelu_tanh": "gelu_new"}.get(config.activation, _HF_ACTIVATION.get(config.activation)),
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
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


def _pattern(hf: dict[str, Any], usual: Callable[[int], bool]) -> dict[str, Any]:
    """sliding_window and layer_types of a config.json → sliding_window and layer_pattern.

    `usual(i)`: whether layer i slides where the file (as transformers 4 wrote it) has no layer_types.
    """
    window = hf.get("sliding_window")
    kinds = hf.get("layer_types") or [
        "sliding_attention" if usual(i) else "full_attention" for i in range(hf["num_hidden_layers"])
    ]
    if window is None or "sliding_attention" not in kinds:
        return {}
    return dict(
        sliding_window=window,
        layer_pattern=",".join("sliding" if kind == "sliding_attention" else "transformer" for kind in kinds),
    )


def _layer_types(config: ModelConfig) -> list[str]:
    return ["sliding_attention" if block == "sliding" else "full_attention" for block in config.layer_pattern]


_GPT2_PARTS = dict(
    normalization="layernorm", norm_position="pre", position_encoding="learned_absolute", ffn_type="standard", bias=True
)
_LLAMA_PARTS = dict(normalization="rmsnorm", norm_position="pre", position_encoding="rope")
_OLMO2_PARTS = dict(_LLAMA_PARTS, norm_position="output", qk_norm="full")
_GEMMA2_PARTS = dict(_LLAMA_PARTS, normalization="rmsnorm_offset", norm_position="sandwich", embedding_scale=True)


def _read_mistral(hf: dict[str, Any]) -> dict[str, Any]:
    return dict(_read_llama(hf), sliding_window=hf.get("sliding_window"))


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return dict(_write_llama(config), sliding_window=config.sliding_window)


def _read_qwen3(hf: dict[str, Any]) -> dict[str, Any]:
    first = hf.get("max_window_layers", 28)  # the layers before it see everything
    return dict(_read_llama(hf), **(_pattern(hf, lambda i: i >= first) if hf.get("use_sliding_window") else {}))


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return dict(
        _write_llama(config),
        use_sliding_window=config.sliding_window is not None,
        sliding_window=config.sliding_window,
        layer_types=_layer_types(config),
    )


def _read_gemma2(hf: dict[str, Any]) -> dict[str, Any]:
    divisor = hf["query_pre_attn_scalar"]
    tied = bool(hf.get("tie_word_embeddings", True))
    return dict(
        {**_read_llama(hf), "weight_tying": tied},
        **_pattern(hf, lambda i: i % 2 == 0),
        attention_softcap=hf.get("attn_logit_softcapping"),
        logit_softcap=hf.get("final_logit_softcapping"),
        attention_scale=None if divisor == hf["head_dim"] else divisor**-0.5,
    )


def _write_gemma2(config: ModelConfig) -> dict[str, Any]:
    divisor = config.head_dim if config.attention_scale is None else round(config.attention_scale**-2)
    return dict(
        _write_llama(config),
        hidden_activation=_HF_ACTIVATION.get(config.activation),
        attn_logit_softcapping=config.attention_softcap,
        final_logit_softcapping=config.logit_softcap,
        query_pre_attn_scalar=divisor,
        sliding_window=config.sliding_window,
        layer_types=_layer_types(config),
    )


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("gpt2", "GPT2LMHeadModel", _GPT2_PARTS, _read_gpt2, _write_gpt2, _gpt2_rules),
        Family(
            "llama",
            "LlamaForCausalLM",
            _LLAMA_PARTS,
            _read_llama,
            lambda config: dict(_write_llama(config), mlp_bias=config.bias),
            _llama_rules(_LLAMA_NORMS),
        ),
        Family("mistral", "MistralForCausalLM", _LLAMA_PARTS, _read_mistral, _write_mistral, _llama_rules(_LLAMA_NORMS)),
        Family(
            "qwen3", "Qwen3ForCausalLM", dict(_LLAMA_PARTS, qk_norm=True), _read_qwen3, _write_qwen3, _llama_rules(_LLAMA_NORMS)
        ),
        Family("olmo2", "Olmo2ForCausalLM", _OLMO2_PARTS, _read_llama, _write_llama, _llama_rules(_OLMO2_NORMS)),
        Family("gemma2", "Gemma2ForCausalLM", _GEMMA2_PARTS, _read_gemma2, _write_gemma2, _llama_rules(_GEMMA2_NORMS)),
    )
}


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """A config.json's content → ModelConfig. Raises ConversionError for a family or part that is not here."""
    family = FAMILIES.get(hf.get("model_type", ""))
    if family is None:
        raise ConversionError(
            f"model_type={hf.get('model_type')!r} is not one of the families that can be read: {', '.join(FAMILIES)}."
        )
    try:
        return resolve("custom", **{"pad_vocab_multiple": 1, **family.parts, **family.read(hf)})
    except KeyError as error:
        raise ConversionError(f"This config.json of model_type {family.model_type!r} has no {error}.") from error
    except ValueError as error:
        raise ConversionError(f"This config.json cannot be built here: {error}") from error


def family_of(config: ModelConfig) -> Family:
    """The family whose class builds exactly this model. Raises ConversionError naming the parts without a counterpart.

    A family fits when its config.json, read back, is this model: what it cannot say it cannot hide.
    """
    nearest: tuple[list[str], Family] | None = None
    for family in FAMILIES.values():
        try:
            hf = dict(
                family.write(config),
                model_type=family.model_type,
                vocab_size=config.vocab_size,
                tie_word_embeddings=config.weight_tying,
            )
            again = config_from_hf(hf).to_dict()
        except (ConversionError, KeyError):
            continue
        wanted = {**config.to_dict(), "pad_vocab_multiple": 1, "attention_backend": "sdpa"}
        ignored = {"zero_init"} | ({"dropout"} if family.model_type != "gpt2" else set())
        differs = [f"{key}={wanted[key]!r}" for key in wanted if key not in ignored and again[key] != wanted[key]]
        if nearest is None or len(differs) < len(nearest[0]):
            nearest = (differs, family)
    differs, family = nearest
    if differs:
        raise ConversionError(
            f"No Hugging Face class builds {config.name}: the nearest, {family.architecture}, has no {', '.join(differs)}."
        )
    return family


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """ModelConfig → the content of a config.json that AutoModelForCausalLM builds. Raises ConversionError."""
    family = family_of(config)
    return dict(
        architectures=[family.architecture],
        model_type=family.model_type,
        vocab_size=config.vocab_size,
        tie_word_embeddings=config.weight_tying,
        dtype=dtype,
        **family.write(config),
    )


def tensor_rules(config: ModelConfig, model_type: str) -> list[Rule]:
    """How every tensor of the model is called in the Hugging Face family, and how it is laid out there."""
    return list(FAMILIES[model_type].rules(config))


# ------------------------------------------------------------------------------------------- folders


def is_folder(path: str | Path) -> bool:
    """Whether this is a folder as save_pretrained writes it (config.json with a model_type)."""
    try:
        return "model_type" in json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def find_folder(name: str) -> Path:
    """A local folder, or a name on the Hub (downloaded, or taken from Hugging Face's cache) → the folder.

    Raises ConversionError with the reason and the alternatives where the name is gated, unknown or out of reach.
    """
    path = Path(name).expanduser()
    if is_folder(path):
        return path
    if path.exists():
        raise ConversionError(f"{path} is no Hugging Face model folder: it has no config.json with a model_type.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ConversionError(f"There is no folder {name!r}, and it cannot be a name on the Hugging Face Hub (owner/model).")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.txt"]))
    except ImportError as error:
        raise ConversionError(
            f"{name!r} is not a local folder, and fetching it from the Hub needs huggingface_hub: pip install huggingface_hub."
        ) from error
    except Exception as error:  # the hub has a dozen kinds of them, none with a common base
        reason = str(error).strip().split("\n")[0].rstrip(".")
        gated = "gated" in type(error).__name__.lower() or "gated" in reason.lower() or "401" in reason or "403" in reason
        advice = (
            "It is gated: accept its licence on the Hub and log in (`hf auth login`), or use an open model such as "
            "openai-community/gpt2 or Qwen/Qwen3-0.6B"
            if gated
            else "Check the name and the network, or download it elsewhere and give the folder"
        )
        raise ConversionError(
            f"{name!r} could not be fetched from the Hugging Face Hub ({type(error).__name__}: {reason}). {advice}."
        ) from error


def read_config(folder: Path) -> ModelConfig:
    """The model that a folder's config.json describes. Raises ConversionError."""
    return config_from_hf(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def read_tensors(folder: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The folder's weights, one kitbash tensor at a time, in the dtype they are stored in.

    Each file is opened anew for each tensor, so that no more than one is ever in memory. Raises ConversionError for a
    missing file, tensor or shape.
    """
    from safetensors import SafetensorError, safe_open

    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    files, shapes = _files(folder), _shapes(config)
    prefix = "transformer." if model_type == "gpt2" else "model."
    for rule in tensor_rules(config, model_type):
        # a base model, without its head, is stored without the prefix
        theirs = rule.theirs if rule.theirs in files else rule.theirs.removeprefix(prefix)
        if theirs not in files:
            raise ConversionError(f"{folder} has no tensor {rule.theirs!r}, which {model_type} needs.")
        try:
            with safe_open(files[theirs], framework="pt") as file:
                tensor = file.get_tensor(theirs)
                ours = rule.to_ours(tensor)
                if tensor.ndim not in (1, 2) or {n: tuple(t.shape) for n, t in ours.items()} != {n: shapes[n] for n in rule.ours}:
                    raise ConversionError(
                        f"{files[theirs]}: {theirs} has shape {tuple(tensor.shape)}, but config.json asks "
                        f"for {' and '.join(str(shapes[n]) for n in rule.ours)} (rows first)."
                    )
                yield from ours.items()
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{files[theirs]} cannot be read ({error}); fetch it again.") from error


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape, without the rows that only pad the vocabulary."""
    from model_builder import build_model

    shapes = {name: tuple(p.shape) for name, p in build_model(config, device="meta").named_parameters()}
    return {
        name: (config.vocab_size, *shape[1:]) if name in ("embedding.weight", "head.weight") else shape
        for name, shape in shapes.items()
    }


def special_ids(folder: Path) -> dict[str, Any]:
    """What a folder says of its special ids and of generation: for an export to say again."""
    hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        generation = None
    return dict(ids={key: hf.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}, generation=generation)


def _files(folder: Path) -> dict[str, Path]:
    """Tensor name → file, from the index or the files' headers."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    else:
        files = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    files.update(dict.fromkeys(file.keys(), path))
            except (SafetensorError, OSError) as error:
                raise ConversionError(f"{path} is damaged or not whole ({error}); fetch it again.") from error
    missing = sorted({str(path) for path in files.values() if not path.is_file()})
    if missing or not files:
        raise ConversionError(
            f"{folder} lacks {', '.join(missing) or 'its *.safetensors'}; fetch the model again, in the safetensors format."
        )
    return files


@torch.no_grad()
def load_weights(
    model: torch.nn.Module, folder: Path, put: Callable[[torch.Tensor, torch.Tensor], object] = torch.Tensor.copy_
) -> None:
    """Fill a model with a folder's weights, tensor by tensor. Raises ConversionError.

    `put(parameter, values)` stores the whole parameter's values, or the part of them that this process keeps.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in read_tensors(folder, model.config):
        parameter = parameters[name]
        if tensor.size(0) < parameter.size(0):  # a padded vocabulary has more rows here, which stay as they are
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.clone()
            tensor = torch.cat((tensor.to(whole), whole[tensor.size(0) :]))
        put(parameter, tensor.to(parameter.dtype))
