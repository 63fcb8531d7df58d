"""The parts a model is made of, each registered under the name the configuration uses for it.

To add a part: write the class, give it its docstring (shapes, source), `parts(config)` (what it costs) and, if it owns
raw parameters, `initial(name)`; put one decorator on it. It is then chosen by its key, listed by `list_components()`
and `--help`, part of the architecture's name, counted, and run through the tests, which iterate over the registry.

Conventions. B batch, T tokens, D n_embd, H n_head, K n_kv_head, d head_dim. Parameters are stored in fp32 and cast to
the activations' dtype where they are used; norm statistics and softmax are computed in fp32 whatever that dtype is.
The code knows nothing of processes, sharding or the training loop.
"""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_config import (  # noqa: F401  (some for those who import them from here)
    Key,
    ModelConfig,
    Part,
    component,
    linear_part,
    list_components,
    list_presets,
    must_be_positive,
    register,
)
from model_parts.attention import AttentionRules, Context, FlexAttention, FusedAttention, KVCache, WrittenOutAttention  # noqa: F401
from model_parts.auxiliary import AuxiliaryLosses, attach_auxiliary_loss, auxiliary_losses  # noqa: F401
from model_parts.bricks import INIT_STD, Constant, Embedding, FirstValue, Linear, Normal, ResidualLinear, build, use  # noqa: F401
from model_parts.positions import NoPosition  # noqa: F401
from model_parts.registry import components

register_norm = partial(register, "normalization")
register_activation = partial(register, "activation")
register_ffn = partial(register, "ffn_type")
register_position = partial(register, "position_encoding")
register_rope_scaling = partial(register, "rope_scaling")
register_norm_position = partial(register, "norm_position")
register_block = partial(register, "block")
register_attention = partial(register, "attention_backend")

# ------------------------------------------------------------------------------------------- normalisation


@register_norm("layernorm", short="LN")
class LayerNorm(nn.Module):
    """Layer normalisation with gain and bias (Ba, Kiros & Hinton 2016).

    (…, D) → (…, D). Statistics in fp32 whatever the input's dtype.
    """

    has_bias = True

    def __init__(self, config: ModelConfig, width: int):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(width))
        self.register_parameter("bias", nn.Parameter(torch.empty(width)) if self.has_bias else None)

    def initial(self, name: str) -> FirstValue:
        return {"weight": Constant(1.0), "bias": Constant(0.0)}[name]

    @classmethod
    def parts(cls, config: ModelConfig, width: int) -> list[Part]:
        return [Part("norm", parameters=2 * width if cls.has_bias else width)]

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, use(self.weight, x), use(self.bias, x), self.eps)


@register_norm("layernorm_nobias", short="LN-NB")
class LayerNormNoBias(LayerNorm):
    """Layer normalisation with a gain and no bias.

    (…, D) → (…, D). Statistics in fp32 whatever the input's dtype.
    """

    has_bias = False


@register_norm("rmsnorm", short="RMS")
class RMSNorm(nn.Module):
    """Root-mean-square normalisation, no mean and no bias (Zhang & Sennrich 2019).

    (…, D) → (…, D). Statistics in fp32 whatever the input's dtype.
    """

    def __init__(self, config: ModelConfig, width: int):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(width))

    def initial(self, name: str) -> FirstValue:
        return {"weight": Constant(1.0)}[name]

    @classmethod
    def parts(cls, config: ModelConfig, width: int) -> list[Part]:
        return [Part("norm", parameters=width)]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, use(self.weight, x), self.eps)


@register_norm("rmsnorm_offset", short="RMS1")
class OffsetRMSNorm(RMSNorm):
    """RMSNorm whose gain is stored as its distance from 1 (Gemma).

    (…, D) → (…, D). Statistics and gain in fp32 whatever the input's dtype.
    """

    def initial(self, name: str) -> FirstValue:
        return {"weight": Constant(0.0)}[name]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), self.eps).to(x.dtype)


# ------------------------------------------------------------------------------------------- activations


@register_activation("gelu", short="GELU")
def gelu(x: Tensor) -> Tensor:
    """Gaussian error linear unit x·Φ(x), exact (Hendrycks & Gimpel 2016)."""
    return F.gelu(x)


@register_activation("gelu_tanh", short="GELUtanh")
def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, as GPT-2 uses it."""
    return F.gelu(x, approximate="tanh")


@register_activation("silu", short="SiLU")
def silu(x: Tensor) -> Tensor:
    """Sigmoid linear unit x·σ(x), also called swish (Elfwing et al. 2017)."""
    return F.silu(x)


@register_activation("relu", short="ReLU")
def relu(x: Tensor) -> Tensor:
    """Rectified linear unit max(x, 0)."""
    return F.relu(x)


@register_activation("leaky_relu", short="LeakyReLU")
def leaky_relu(x: Tensor) -> Tensor:
    """Leaky rectified linear unit, slope 0.01 below zero (Maas et al. 2013)."""
    return F.leaky_relu(x)


@register_activation("relu2", short="ReLU2")
def relu2(x: Tensor) -> Tensor:
    """Squared rectified linear unit max(x, 0)² (So et al. 2021)."""
    return F.relu(x).square()


# ------------------------------------------------------------------------------------------- feed-forward


@register_ffn("standard", short="FFN", label=lambda config: component("activation", config.activation).short)
class FeedForward(nn.Module):
    """Two linear layers around an activation: D → d_ff → D (Vaswani et al. 2017).

    (B, T, D) → (B, T, D).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up_proj = Linear(config.n_embd, config.d_ff, config.bias)
        self.down_proj = ResidualLinear(config, config.d_ff, config.n_embd)
        self.activation = component("activation", config.activation).build
        self.dropout = nn.Dropout(config.dropout)

    usual_ratio = Fraction(4)  # d_ff / n_embd where it is not given

    @staticmethod
    def usual_multiple(n_embd: int) -> int:
        """What a d_ff that follows from usual_ratio is rounded up to a multiple of."""
        return 1

    @staticmethod
    def parts(config: ModelConfig) -> list[Part]:
        return [
            linear_part("up_proj", config.n_embd, config.d_ff, config.bias),
            linear_part("down_proj", config.d_ff, config.n_embd, config.bias),
        ]

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down_proj(self.activation(self.up_proj(x))))


def _named_otherwise(config: ModelConfig) -> list[str]:
    """A gated feed-forward whose activation another one decides has a name of its own: one model, one name."""
    return [
        f"ffn_type={config.ffn_type!r} with activation={config.activation!r} is ffn_type={c.name!r}; say so, or choose another "
        "activation."
        for c in components("ffn_type").values()
        if c.fixes == (("activation", config.activation),) and getattr(c.build, "forward", None) is GatedFeedForward.forward
    ]


@register_ffn("gated", short="Gated", check=_named_otherwise)
class GatedFeedForward(FeedForward):
    """Gated feed-forward down(activation(gate(x)) · up(x)), three matrices (Dauphin et al. 2016, Shazeer 2020).

    (B, T, D) → (B, T, D).
    """

    usual_ratio = Fraction(8, 3)  # two matrices up instead of one: costs what 4 costs without a gate (Shazeer 2020)

    @staticmethod
    def usual_multiple(n_embd: int) -> int:
        """LLaMA's 256 for wide models. It shrinks with n_embd, so that a narrow model does not grow by half: the largest
        power of two up to n_embd / 8, between 8 and 256."""
        return min(256, max(8, 1 << (n_embd // 8).bit_length() >> 1))

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.gate_proj = Linear(config.n_embd, config.d_ff, config.bias)

    @staticmethod
    def parts(config: ModelConfig) -> list[Part]:
        return [linear_part("gate_proj", config.n_embd, config.d_ff, config.bias), *FeedForward.parts(config)]

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x)))


@register_ffn("swiglu", short="SwiGLU", fixes={"activation": "silu"})
class SwiGLU(GatedFeedForward):
    """Feed-forward gated by SiLU: down(silu(gate(x)) · up(x)) (Shazeer 2020).

    (B, T, D) → (B, T, D).
    """


@register_ffn("geglu", short="GEGLU", fixes={"activation": "gelu"})
class GEGLU(GatedFeedForward):
    """Feed-forward gated by GELU: down(gelu(gate(x)) · up(x)) (Shazeer 2020).

    (B, T, D) → (B, T, D).
    """


# ------------------------------------------------------------------------------------------- attention


class Attention(nn.Module):
    """Causal self-attention: multi-head, grouped-query (Ainslie et al. 2023) or multi-query (Shazeer 2019).

    (B, T, D) → (B, T, D). Query head h reads key head h // (H / K). `window`: how many tokens it sees, None for all.
    """

    def __init__(self, config: ModelConfig, layer: int, window: int | None = None):
        super().__init__()
        self.config, self.layer, self.window = config, layer, window
        q_width, kv_width = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = Linear(config.n_embd, q_width, config.qkv_bias)
        self.k_proj = Linear(config.n_embd, kv_width, config.qkv_bias)
        self.v_proj = Linear(config.n_embd, kv_width, config.qkv_bias)
        self.o_proj = ResidualLinear(config, q_width, config.n_embd)
        if config.qk_norm:  # per head (Henry et al. 2020, as Qwen3 has it), or over all heads together (OLMo 2)
            self.q_norm = RMSNorm(config, q_width if config.qk_norm == "full" else config.head_dim)
            self.k_norm = RMSNorm(config, kv_width if config.qk_norm == "full" else config.head_dim)
        self.backend = component("attention_backend", config.attention_backend).build
        self.scale = config.attention_scale or config.head_dim**-0.5
        self.dropout = nn.Dropout(config.dropout)

    @staticmethod
    def parts(config: ModelConfig, window: int | None = None) -> list[Part]:
        q_width, kv_width = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        parts = [
            linear_part("q_proj", config.n_embd, q_width, config.qkv_bias),
            linear_part("k_proj", config.n_embd, kv_width, config.qkv_bias),
            linear_part("v_proj", config.n_embd, kv_width, config.qkv_bias),
            linear_part("o_proj", q_width, config.n_embd, config.bias),
            Part("attention", attention=q_width, window=window),
        ]
        if config.qk_norm:
            width = q_width + kv_width if config.qk_norm == "full" else 2 * config.head_dim
            parts.append(Part("qk_norm", parameters=width))
        return parts

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        B, T, _ = x.shape
        d, norm, cache = self.config.head_dim, self.config.qk_norm, context.cache
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.view(B, T, -1, d) for y in (q, k, v))  # (B, T, heads, d)
        if norm is True:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, heads, T, d)
        q, k = context.rotate(q, k)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        dropout = self.config.dropout if self.training else 0.0
        rules = AttentionRules(self.scale, dropout, self.config.attention_softcap, self.window, context.slopes)
        y = self.backend.attend(q, k, v, rules, context.mask(self.window))
        return self.dropout(self.o_proj(y.transpose(1, 2).reshape(B, T, -1)))


# ------------------------------------------------------------------------------------------- norm positions


@register_norm_position("pre", short="PreNorm")
class PreNorm(nn.Module):
    """x + f(norm(x)): the residual stream itself is never normalised (Xiong et al. 2020)."""

    def __init__(self, config: ModelConfig, sublayer: nn.Module):
        super().__init__()
        self.norm = build("normalization", config.normalization, config, config.n_embd)
        self.sublayer = sublayer

    @staticmethod
    def parts(config: ModelConfig) -> list[Part]:
        return component("normalization", config.normalization).build.parts(config, config.n_embd)

    def forward(self, x: Tensor, *inputs: Any) -> Tensor:
        return x + self.sublayer(self.norm(x), *inputs)


@register_norm_position("post", short="PostNorm")
class PostNorm(PreNorm):
    """norm(x + f(x)): the stream is normalised after each addition (Vaswani et al. 2017)."""

    def forward(self, x: Tensor, *inputs: Any) -> Tensor:
        return self.norm(x + self.sublayer(x, *inputs))


@register_norm_position("output", short="OutNorm")
class OutputNorm(PreNorm):
    """x + norm(f(x)): each branch is normalised before it is added (Liu et al. 2021, OLMo 2)."""

    def forward(self, x: Tensor, *inputs: Any) -> Tensor:
        return x + self.norm(self.sublayer(x, *inputs))


@register_norm_position("sandwich", short="Sandwich")
class SandwichNorm(PreNorm):
    """x + norm₂(f(norm₁(x))): a norm before and after each branch (Ding et al. 2021, Gemma 2)."""

    def __init__(self, config: ModelConfig, sublayer: nn.Module):
        super().__init__(config, sublayer)
        self.output_norm = build("normalization", config.normalization, config, config.n_embd)

    @staticmethod
    def parts(config: ModelConfig) -> list[Part]:
        return 2 * PreNorm.parts(config)

    def forward(self, x: Tensor, *inputs: Any) -> Tensor:
        return x + self.output_norm(self.sublayer(self.norm(x), *inputs))


# ------------------------------------------------------------------------------------------- blocks


def _residual(config: ModelConfig, sublayer: nn.Module) -> nn.Module:
    return build("norm_position", config.norm_position, config, sublayer)


def _residual_parts(config: ModelConfig, sublayer_parts: list[Part]) -> list[Part]:
    return sublayer_parts + component("norm_position", config.norm_position).build.parts(config)


@register_block("transformer", short="transformer", has_attention=True)
class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each in its residual branch: (B, T, D) → (B, T, D)."""

    def __init__(self, config: ModelConfig, layer: int, window: int | None = None):
        super().__init__()
        self.attention = _residual(config, Attention(config, layer, window))
        self.feed_forward = _residual(config, build("ffn_type", config.ffn_type, config))

    @staticmethod
    def parts(config: ModelConfig, window: int | None = None) -> list[Part]:
        return _residual_parts(config, Attention.parts(config, window)) + MLPBlock.parts(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.feed_forward(self.attention(x, context))


def _has_a_window(config: ModelConfig) -> list[str]:
    if config.sliding_window is None:
        return ["layer_pattern has the block 'sliding', which needs a width; give --sliding_window=…."]
    return must_be_positive(config, "sliding_window")


@register_block(
    "sliding",
    short="sliding",
    keys=(
        Key(
            "sliding_window",
            int | None,
            None,
            "tokens that the layers of block 'sliding' see; alone, it makes all layers so; 0: off",
            tag="Win",
        ),
    ),
    check=_has_a_window,
    has_attention=True,
)
class SlidingBlock(TransformerBlock):
    """A transformer block whose attention sees the last sliding_window tokens (Beltagy et al. 2020)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer, config.sliding_window)

    @staticmethod
    def parts(config: ModelConfig) -> list[Part]:
        return TransformerBlock.parts(config, config.sliding_window)


@register_block("mlp", short="mlp")
class MLPBlock(nn.Module):
    """A feed-forward in its residual branch and no attention: (B, T, D) → (B, T, D)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.feed_forward = _residual(config, build("ffn_type", config.ffn_type, config))

    @staticmethod
    def parts(config: ModelConfig) -> list[Part]:
        return _residual_parts(config, component("ffn_type", config.ffn_type).build.parts(config))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.feed_forward(x)
