"""The parts a model is made of, each registered under the name the configuration uses for it.

To add a part: write the class, give it its docstring (shapes, source), `parts(config)` (what it costs) and, if it owns
raw parameters, `initial(name)`; put one decorator on it. It is then chosen by its key, listed by `list_components()`
and `--help`, part of the architecture's name, counted, and run through the tests, which iterate over the registry.

Conventions. B batch, T tokens, D n_embd, H n_head, K n_kv_head, d head_dim. Parameters are stored in fp32 and cast to
the activations' dtype where they are used; norm statistics and softmax are computed in fp32 whatever that dtype is.
The code knows nothing of processes, sharding or the training loop.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_config import (ModelConfig, Part, component, linear_part, list_components, list_presets,  # noqa: F401
                          register)

register_norm = partial(register, "normalization")
register_activation = partial(register, "activation")
register_ffn = partial(register, "ffn_type")
register_position = partial(register, "position_encoding")
register_norm_position = partial(register, "norm_position")
register_block = partial(register, "block")
register_attention = partial(register, "attention_backend")

INIT_STD = 0.02  # of every weight matrix (GPT-2); residual outputs are scaled down from it


def build(kind: str, name: str, *args: Any) -> Any:
    """Instantiate the component that the configuration names: build('normalization', 'rmsnorm', config, width)."""
    return component(kind, name).build(*args)


def use(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """A stored parameter in the dtype of the activations it meets."""
    return None if parameter is None else parameter.to(x.dtype)


class Normal(NamedTuple):
    """How a parameter starts: independent normal numbers of this standard deviation."""

    std: float


class Constant(NamedTuple):
    """How a parameter starts: all equal to this value."""

    value: float


# ------------------------------------------------------------------------------------------- building bricks

class Linear(nn.Linear):
    """Linear projection (…, d_in) → (…, d_out).

    `residual=True` marks a projection that writes into the residual stream: its weights start smaller, by
    1/√(2·n_layer), so that the stream's variance does not grow with depth (GPT-2, Radford et al. 2019, §2.3).
    """

    def __init__(self, d_in: int, d_out: int, bias: bool, residual_layers: int = 0):
        super().__init__(d_in, d_out, bias=bias)
        self.std = INIT_STD / math.sqrt(2 * residual_layers) if residual_layers else INIT_STD

    def initial(self, name: str) -> Normal | Constant:
        return Normal(self.std) if name == "weight" else Constant(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, use(self.weight, x), use(self.bias, x))


class Embedding(nn.Embedding):
    """Look-up table: ids (…) → (…, D)."""

    def initial(self, name: str) -> Normal:
        return Normal(INIT_STD)


class KVCache:
    """Keys and values of the tokens seen so far, for generation: per layer (B, K, length, d), grown in place."""

    def __init__(self, config: ModelConfig, batch: int, max_tokens: int, dtype: torch.dtype, device):
        shape = (config.n_layer, 2, batch, config.n_kv_head, max_tokens, config.head_dim)
        self.store = torch.zeros(shape, dtype=dtype, device=device)
        self.max_tokens = max_tokens
        self.length = 0  # tokens of which every layer has stored its keys

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append this layer's new keys and values (B, K, T, d); return all of them (B, K, length + T, d)."""
        end = self.length + k.size(2)
        keys, values = self.store[layer]
        keys[:, :, self.length:end] = k
        values[:, :, self.length:end] = v
        return keys[:, :, :end], values[:, :, :end]


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

    def initial(self, name: str) -> Constant:
        return Constant(1.0 if name == "weight" else 0.0)

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

    def initial(self, name: str) -> Constant:
        return Constant(1.0)

    @classmethod
    def parts(cls, config: ModelConfig, width: int) -> list[Part]:
        return [Part("norm", parameters=width)]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, use(self.weight, x), self.eps)


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


# ------------------------------------------------------------------------------------------- feed-forward

@register_ffn("standard", short="FFN")
class FeedForward(nn.Module):
    """Two linear layers around an activation: D → d_ff → D (Vaswani et al. 2017).

    (B, T, D) → (B, T, D).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up_proj = Linear(config.n_embd, config.d_ff, config.bias)
        self.down_proj = Linear(config.d_ff, config.n_embd, config.bias, residual_layers=config.n_layer)
        self.activation = component("activation", config.activation).build
        self.dropout = nn.Dropout(config.dropout)

    @staticmethod
    def parts(config: ModelConfig) -> list[Part]:
        return [linear_part("up_proj", config.n_embd, config.d_ff, config.bias),
                linear_part("down_proj", config.d_ff, config.n_embd, config.bias)]

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down_proj(self.activation(self.up_proj(x))))


@register_ffn("swiglu", short="SwiGLU", fixes={"activation": "silu"})
class GatedFeedForward(FeedForward):
    """Gated feed-forward down(silu(gate(x)) · up(x)), three matrices (Shazeer 2020).

    (B, T, D) → (B, T, D).
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.gate_proj = Linear(config.n_embd, config.d_ff, config.bias)

    @staticmethod
    def parts(config: ModelConfig) -> list[Part]:
        return [linear_part("gate_proj", config.n_embd, config.d_ff, config.bias), *FeedForward.parts(config)]

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x)))


# ------------------------------------------------------------------------------------------- positions

@register_position("none", short="NoPos")
class NoPosition(nn.Module):
    """No position information but the causal mask (Kazemnejad et al. 2023). The base of all position encodings.

    `embed` may add something to the embeddings (B, T, D), once; `tables` computes what attention needs, once a forward
    for all layers; `rotate` uses it on queries (B, H, T, d) and keys (B, K, T, d).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config

    @staticmethod
    def parts(config: ModelConfig) -> list[Part]:
        return []

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x

    def tables(self, positions: Tensor) -> Any:
        return None

    @staticmethod
    def rotate(q: Tensor, k: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
        return q, k


@register_position("learned_absolute", short="AbsPos", uses=("block_size",))
class LearnedPosition(NoPosition):
    """One learned vector for each position, added to the embedding (GPT-2)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.table = Embedding(config.block_size, config.n_embd)

    @staticmethod
    def parts(config: ModelConfig) -> list[Part]:
        return [Part("position", parameters=config.block_size * config.n_embd)]

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + use(self.table(positions), x)


@register_position("rope", short="RoPE", uses=("rope_theta",))
class RotaryPosition(NoPosition):
    """Rotary position embedding (Su et al. 2021), half-split pairs (i, i + d/2) as Hugging Face stores them."""

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (T,) → cos, sin (T, d), fp32."""
        d = self.config.head_dim
        exponent = torch.arange(0, d, 2, dtype=torch.float32, device=positions.device) / d
        angle = positions.float()[:, None] * (1.0 / self.config.rope_theta ** exponent)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()

    @staticmethod
    def rotate(q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        cos, sin = (t.to(q.dtype) for t in tables)
        return tuple(x * cos + torch.cat((-x[..., x.size(-1) // 2:], x[..., :x.size(-1) // 2]), dim=-1) * sin
                     for x in (q, k))


# ------------------------------------------------------------------------------------------- attention

@register_attention("sdpa", short="sdpa")
def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """PyTorch's fused scaled-dot-product attention; causal, the queries being the last of the keys' tokens."""
    new, seen = q.size(2), k.size(2)
    mask = None if new in (1, seen) else torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=new == seen,
                                          enable_gqa=q.size(1) != k.size(1))


@register_attention("manual", short="manual")
def manual_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Attention written out, softmax in fp32: q (B, H, T, d), k and v (B, K, S, d) → (B, H, T, d)."""
    new, seen, group = q.size(2), k.size(2), q.size(1) // k.size(1)
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-2, -1)).float() / math.sqrt(q.size(-1))
    future = torch.ones(new, seen, dtype=torch.bool, device=q.device).triu(seen - new + 1)
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    return F.dropout(weights, dropout).to(v.dtype) @ v


class Attention(nn.Module):
    """Causal self-attention: multi-head, grouped-query (Ainslie et al. 2023) or multi-query (Shazeer 2019).

    (B, T, D) → (B, T, D). Query head h reads key head h // (H / K).
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        q_width, kv_width = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = Linear(config.n_embd, q_width, config.qkv_bias)
        self.k_proj = Linear(config.n_embd, kv_width, config.qkv_bias)
        self.v_proj = Linear(config.n_embd, kv_width, config.qkv_bias)
        self.o_proj = Linear(q_width, config.n_embd, config.bias, residual_layers=config.n_layer)
        self.q_norm = RMSNorm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.rotate = component("position_encoding", config.position_encoding).build.rotate
        self.attend = component("attention_backend", config.attention_backend).build
        self.dropout = nn.Dropout(config.dropout)

    @staticmethod
    def parts(config: ModelConfig) -> list[Part]:
        q_width, kv_width = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        parts = [linear_part("q_proj", config.n_embd, q_width, config.qkv_bias),
                 linear_part("k_proj", config.n_embd, kv_width, config.qkv_bias),
                 linear_part("v_proj", config.n_embd, kv_width, config.qkv_bias),
                 linear_part("o_proj", q_width, config.n_embd, config.bias),
                 Part("attention", attention=q_width)]
        return parts + ([Part("qk_norm", parameters=2 * config.head_dim)] if config.qk_norm else [])

    def forward(self, x: Tensor, tables: Any, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.config.head_dim)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))                       # (B, T, heads, d)
        q, k, v = (y.transpose(1, 2) for y in (self.q_norm(q), self.k_norm(k), v))            # (B, heads, T, d)
        q, k = self.rotate(q, k, tables)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        y = self.attend(q, k, v, self.config.dropout if self.training else 0.0)
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

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        return x + self.sublayer(self.norm(x), *context)


@register_norm_position("post", short="PostNorm")
class PostNorm(PreNorm):
    """norm(x + f(x)): the stream is normalised after each addition (Vaswani et al. 2017)."""

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        return self.norm(x + self.sublayer(x, *context))


# ------------------------------------------------------------------------------------------- blocks

def _residual(config: ModelConfig, sublayer: nn.Module) -> nn.Module:
    return build("norm_position", config.norm_position, config, sublayer)


def _residual_parts(config: ModelConfig, sublayer_parts: list[Part]) -> list[Part]:
    return sublayer_parts + component("norm_position", config.norm_position).build.parts(config)


@register_block("transformer", short="transformer", has_attention=True)
class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each in its residual branch: (B, T, D) → (B, T, D)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention = _residual(config, Attention(config, layer))
        self.feed_forward = _residual(config, build("ffn_type", config.ffn_type, config))

    @staticmethod
    def parts(config: ModelConfig) -> list[Part]:
        return _residual_parts(config, Attention.parts(config)) + MLPBlock.parts(config)

    def forward(self, x: Tensor, tables: Any, cache: KVCache | None) -> Tensor:
        return self.feed_forward(self.attention(x, tables, cache))


@register_block("mlp", short="mlp")
class MLPBlock(nn.Module):
    """A feed-forward in its residual branch and no attention: (B, T, D) → (B, T, D)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.feed_forward = _residual(config, build("ffn_type", config.ffn_type, config))

    @staticmethod
    def parts(config: ModelConfig) -> list[Part]:
        return _residual_parts(config, component("ffn_type", config.ffn_type).build.parts(config))

    def forward(self, x: Tensor, tables: Any, cache: KVCache | None) -> Tensor:
        return self.feed_forward(x)
