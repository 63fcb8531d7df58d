"""What a Hugging Face family consists of, and the pieces of a config.json that families share.

The families themselves are the rows of huggingface_families.py. None of this needs `transformers`.
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

    `transposed`: Hugging Face keeps the matrix as (d_in, d_out), as its GPT-2 does. `shares`: how many of equal shares of the
    rows each one has (None: one each). `skipped`: rows at the start that no one reads; zeros are written there.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    shares: tuple[int, ...] | None = None
    skipped: int = 0

    def to_ours(self, tensor: Tensor) -> dict[str, Tensor]:
        """A Hugging Face tensor → kitbash tensors by name."""
        tensor = (tensor.T if self.transposed else tensor)[self.skipped :]
        shares = self.shares or (1,) * len(self.ours)
        rows = [share * (len(tensor) // sum(shares)) for share in shares]
        return {name: piece.contiguous() for name, piece in zip(self.ours, tensor.split(rows))}

    def to_theirs(self, tensors: dict[str, Tensor]) -> Tensor:
        """Kitbash tensors by name → the Hugging Face tensor."""
        pieces = [tensors[name] for name in self.ours]
        pieces = [pieces[0].new_zeros(self.skipped, *pieces[0].shape[1:]), *pieces] if self.skipped else pieces
        stacked = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
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
    def has_our_dropout(self) -> bool:
        """Whether its class drops in the embedding, in attention and in the residual branches, as kitbash does."""
        return len(self.dropouts) == 3

    @property
    def prefix(self) -> str:
        """What the tensors' names begin with, and lack in the file of a base model (without its head)."""
        return "transformer." if self.model_type == "gpt2" else "model."


# ------------------------------------------------------------------------------------------- parts of a config.json

HF_ACTIVATION = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "leaky_relu": "leaky_relu",
}
_ACTIVATION = {
    **{theirs: ours for ours, theirs in HF_ACTIVATION.items()},
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), "gelu_tanh"),
    "gelu_python": "gelu",
    "swish": "silu",
}
ROPE_KEYS = frozenset(("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"))


def activation_of(values: dict[str, Any], key: str) -> str:
    """The activation that a file names under this key."""
    name = values[key]
    if name not in _ACTIVATION:
        raise ConversionError(f"{key}={name!r} has no counterpart here; there is {', '.join(_ACTIVATION)}.")
    return _ACTIVATION[name]


def gated(activation: str) -> dict[str, Any]:
    """The keys of a gated feed-forward with this activation."""
    return dict(activation=activation, ffn_type={"silu": "swiglu", "gelu": "geglu"}.get(activation, "gated"))


def rope(values: dict[str, Any]) -> dict[str, Any]:
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


def write_rope(config: ModelConfig) -> dict[str, Any]:
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


def window_keys(n_layer: int, window: int | None, kinds: list[str]) -> dict[str, Any]:
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


def layer_types(config: ModelConfig) -> list[str]:
    """The kind of each layer, as config.json names it."""
    return ["sliding_attention" if block == "sliding" else "full_attention" for block in config.layer_pattern]


def dropout(family: Family, values: dict[str, Any]) -> float:
    """The dropout of a class that has it in the three places of kitbash's, where they are alike; else none.

    It only matters in training.
    """
    rates = {float(values.get(key, default) or 0.0) for key, default in family.dropouts.items()}
    return rates.pop() if family.has_our_dropout and len(rates) == 1 else 0.0
