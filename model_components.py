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
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from model_config import ModelConfig, Part, component, linear_part, list_components, list_presets, register  # noqa: F401

register_norm = partial(register, "normalization")
register_activation = partial(register, "activation")
register_ffn = partial(register, "ffn_type")
register_position = partial(register, "position_encoding")
register_rope_scaling = partial(register, "rope_scaling")
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
    """Linear projection (…, d_in) → (…, d_out). Weights start normal with standard deviation `std`, biases at zero."""

    std = INIT_STD

    def __init__(self, d_in: int, d_out: int, bias: bool):
        super().__init__(d_in, d_out, bias=bias)

    def initial(self, name: str) -> Normal | Constant:
        return Normal(self.std) if name == "weight" and self.std else Constant(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, use(self.weight, x), use(self.bias, x))


class ResidualLinear(Linear):
    """A projection that writes into the residual stream, (…, d_in) → (…, d_out).

    Its weights start smaller, by 1/√(2·n_layer), so that the stream's variance does not grow with depth (GPT-2, Radford
    et al. 2019, §2.3), or with `zero_init` at zero, so that under pre-norm every block starts as the identity (Zhang et
    al. 2019). A norm behind such a projection ('output', 'sandwich') sees zeros first and steepens the first gradient.
    """

    def __init__(self, config: ModelConfig, d_in: int, d_out: int):
        super().__init__(d_in, d_out, config.bias)
        self.std = 0.0 if config.zero_init else INIT_STD / math.sqrt(2 * config.n_layer)


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
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


# ------------------------------------------------------------------------------------------- auxiliary losses


class AuxiliaryLosses:
    """What the components of a model added to the loss while `auxiliary_losses` was active.

    `totals[name]`: fp32 scalar, the sum over all places that attached a loss of this name of loss × tokens there.
    `tokens[name]`: the number of tokens that sum is over, so that totals[name] / tokens[name] is the mean loss.
    """

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.totals: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}


_active: ContextVar[AuxiliaryLosses | None] = ContextVar("auxiliary losses", default=None)


@contextmanager
def auxiliary_losses(weight: Tensor) -> Iterator[AuxiliaryLosses]:
    """Let components add to the loss in the forward passes inside of this context; it yields what they added.

    `weight` (scalar): how much one token's loss weighs in what backward is called on, usually loss scale / tokens of the
    global batch. Outside of the context (evaluation, generation) auxiliary losses have no effect and cost nothing.
    """
    found = AuxiliaryLosses(weight)
    token = _active.set(found)
    try:
        yield found
    finally:
        _active.reset(token)


@_disable_dynamo  # as torch.compiler.disable, which would import the whole compiler here and now
def attach_auxiliary_loss(x: Tensor, name: str, loss: Tensor) -> Tensor:
    """x (…, D), unchanged, with a loss attached to it: the way for a component to add to the loss of training.

    `loss` (scalar) is a mean over the tokens of x, the component's own factor included; a router's balance, for instance.
    Where `auxiliary_losses(weight)` is active, the backward pass through x also runs backward from `loss`, with the gradient
    weight × tokens in x, as if weight × tokens × loss had been added to what backward is called on. The component must
    return, or compute with, the x that it gets back. Raises ValueError if `loss` is not a scalar.
    """
    if loss.ndim:
        raise ValueError(f"the auxiliary loss {name!r} has the shape {tuple(loss.shape)}; attach a scalar, such as its mean.")
    active = _active.get()
    recomputing = torch._C._current_graph_task_id() != -1  # activation checkpointing runs forward again inside backward
    if active is None or recomputing or not torch.is_grad_enabled():
        return x
    tokens = x.shape[:-1].numel()
    active.totals[name] = active.totals.get(name, 0.0) + loss.detach().float() * tokens
    active.tokens[name] = active.tokens.get(name, 0) + tokens
    return _Attached.apply(x, loss, active.weight)


class _Attached(torch.autograd.Function):
    """The identity on x; backward gives `loss` its gradient.

    The weight is an attribute and not a saved tensor, as activation checkpointing compares the numbers of tensors saved in
    forward and in recomputation, where nothing is attached.
    """

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor, weight: Tensor) -> Tensor:
        ctx.gradient = (weight * x.shape[:-1].numel()).to(loss.dtype)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, ctx.gradient, None


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


@register_norm("rmsnorm_offset", short="RMS1")
class OffsetRMSNorm(RMSNorm):
    """RMSNorm whose gain is stored as its distance from 1 (Gemma).

    (…, D) → (…, D). Statistics and gain in fp32 whatever the input's dtype.
    """

    def initial(self, name: str) -> Constant:
        return Constant(0.0)

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


@register_ffn("standard", short="FFN")
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

    @staticmethod
    def parts(config: ModelConfig) -> list[Part]:
        return [
            linear_part("up_proj", config.n_embd, config.d_ff, config.bias),
            linear_part("down_proj", config.d_ff, config.n_embd, config.bias),
        ]

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down_proj(self.activation(self.up_proj(x))))


@register_ffn("gated", short="Gated")
class GatedFeedForward(FeedForward):
    """Gated feed-forward down(activation(gate(x)) · up(x)), three matrices (Dauphin et al. 2016, Shazeer 2020).

    (B, T, D) → (B, T, D).
    """

    gated = True  # two matrices up instead of one: 8/3 × n_embd wide costs what 4 × n_embd costs without a gate

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


# ------------------------------------------------------------------------------------------- positions


@register_position("none", short="NoPos")
class NoPosition(nn.Module):
    """No position information but the causal mask (Kazemnejad et al. 2023). The base of all position encodings.

    `embed` may add something to the embeddings (B, T, D), once; `tables` computes what attention needs, once a forward
    for all layers; `rotate` uses it on queries (B, H, T, d) and keys (B, K, T, d), `slopes` for a penalty on distance.
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

    @staticmethod
    def slopes(tables: Any) -> Tensor | None:
        """What attention scores lose per token of distance, (H,); None for nothing."""
        return None


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


@register_position("sinusoidal", short="SinPos")
class SinusoidalPosition(NoPosition):
    """Sines and cosines of falling frequency added to the embedding (Vaswani et al. 2017, §3.5)."""

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        D = x.size(-1)
        even = torch.arange(0, D, 2, dtype=torch.float32, device=x.device)
        angle = positions.float()[:, None] / 10000.0 ** (even / D)  # (T, ⌈D/2⌉)
        return x + torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :D].to(x.dtype)


@register_position("alibi", short="ALiBi")
class ALiBi(NoPosition):
    """Attention scores fall linearly with distance, at a slope of its own for each head (Press et al. 2021)."""

    def tables(self, positions: Tensor) -> Tensor:
        """→ slopes (H,): 2^(-8/n), 2^(-16/n) …; between, for an H that is no power of two, those of the next one."""
        H = self.config.n_head
        n = 1 << (H.bit_length() - 1)
        whole = torch.arange(1, n + 1, device=positions.device) * (8 / n)
        between = (2 * torch.arange(H - n, device=positions.device) + 1) * (4 / n)
        return torch.exp2(-torch.cat((whole, between)))

    @staticmethod
    def slopes(tables: Tensor) -> Tensor:
        return tables


@register_position("rope", short="RoPE", uses=("rope_theta", "rope_scaling"))
class RotaryPosition(NoPosition):
    """Rotary position embedding (Su et al. 2021), half-split pairs (i, i + d/2) as Hugging Face stores them."""

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (T,) → cos, sin (T, d), fp32."""
        d = self.config.head_dim
        exponent = torch.arange(0, d, 2, dtype=torch.float32, device=positions.device) / d
        frequencies = build("rope_scaling", self.config.rope_scaling, self.config, 1.0 / self.config.rope_theta**exponent)
        angle = positions.float()[:, None] * frequencies
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()

    @staticmethod
    def rotate(q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        cos, sin = (t.to(q.dtype) for t in tables)
        return tuple(x * cos + torch.cat((-x[..., x.size(-1) // 2 :], x[..., : x.size(-1) // 2]), dim=-1) * sin for x in (q, k))


@register_rope_scaling("none", short="NoScaling")
def unscaled(config: ModelConfig, frequencies: Tensor) -> Tensor:
    """RoPE's frequencies (d/2,) as they are."""
    return frequencies


@register_rope_scaling("linear", short="Linear", uses=("rope_factor",))
def linear_scaling(config: ModelConfig, frequencies: Tensor) -> Tensor:
    """Positions divided by rope_factor (Chen et al. 2023, position interpolation)."""
    return frequencies / config.rope_factor


@register_rope_scaling(
    "llama3", short="Llama3", uses=("rope_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_context")
)
def llama3_scaling(config: ModelConfig, frequencies: Tensor) -> Tensor:
    """Long wavelengths stretched by rope_factor, short ones kept, a ramp between (LLaMA 3.1)."""
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_context * frequencies / (2 * math.pi)  # of each pair over the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / config.rope_factor


# ------------------------------------------------------------------------------------------- attention


class AttentionRules(NamedTuple):
    """What an attention does besides looking back: factor on the scores, dropout, and what may limit it.

    `softcap`: scores s become softcap·tanh(s / softcap). `window`: a token sees itself and the window - 1 before it.
    `slopes` (H,): what a score loses per token of distance.
    """

    scale: float
    dropout: float = 0.0
    softcap: float | None = None
    window: int | None = None
    slopes: Tensor | None = None

    def penalty(self, new: int, seen: int, device: torch.device) -> Tensor | None:
        """For the last `new` of `seen` tokens: what is added to the scores, fp32 (new, seen) or (H, new, seen).

        None where nothing but a plain causal mask, or none at all, is needed.
        """
        if self.slopes is None and new in (1, seen) and (self.window is None or seen <= self.window):
            return None
        distance = torch.arange(seen - new, seen, device=device)[:, None] - torch.arange(seen, device=device)
        hidden = distance < 0 if self.window is None else (distance < 0) | (distance >= self.window)
        penalty = torch.zeros((), device=device) if self.slopes is None else -self.slopes[:, None, None] * distance.clamp(min=0)
        return torch.where(hidden, float("-inf"), penalty)


@register_attention("sdpa", short="sdpa")
class FusedAttention:
    """PyTorch's fused scaled-dot-product attention; with a soft cap, which it does not have, as 'manual'.

    A backend has two functions. `mask` makes what `attend` needs to know of which token sees which; it is called once a
    forward for each distinct window, so that the layers share the result. `attend` is called in each layer.
    """

    @staticmethod
    def mask(rules: AttentionRules, new: int, seen: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """None where the kernel's own causal mask, or no mask, does; else what it adds to the scores."""
        if rules.softcap is not None:
            return WrittenOutAttention.mask(rules, new, seen, device, dtype)
        penalty = rules.penalty(new, seen, device)
        return None if penalty is None else penalty.to(dtype)

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, rules: AttentionRules, mask: Tensor | None) -> Tensor:
        if rules.softcap is not None:
            return WrittenOutAttention.attend(q, k, v, rules, mask)
        if mask is not None and q.size(1) != k.size(1):  # no fused kernel takes a mask and shared heads
            k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if mask is None else mask.to(q.dtype),
            dropout_p=rules.dropout,
            is_causal=mask is None and q.size(2) == k.size(2),
            scale=rules.scale,
            enable_gqa=q.size(1) != k.size(1),
        )


@register_attention("manual", short="manual")
class WrittenOutAttention:
    """Attention written out, softmax in fp32: q (B, H, T, d), k and v (B, K, S, d) → (B, H, T, d)."""

    @staticmethod
    def mask(rules: AttentionRules, new: int, seen: int, device: torch.device, dtype: torch.dtype) -> Any:
        """What `attend` needs to know which of the `seen` tokens each of the last `new` sees, for q, k and v of this dtype."""
        penalty = rules.penalty(new, seen, device)
        if penalty is None:
            penalty = torch.full((new, seen), float("-inf"), device=device).triu(seen - new + 1)
        return penalty

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, rules: AttentionRules, mask: Any) -> Tensor:
        """softmax(scale · q·kᵀ under the rules)·v; query head h reads key head h // (H / K)."""
        group = q.size(1) // k.size(1)
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = (q @ k.transpose(-2, -1)).float() * rules.scale
        if rules.softcap is not None:
            scores = rules.softcap * torch.tanh(scores / rules.softcap)
        weights = (scores + mask).softmax(dim=-1)
        return F.dropout(weights, rules.dropout).to(v.dtype) @ v


@register_attention("flex", short="flex")
class FlexAttention:
    """PyTorch's FlexAttention, compiled: windows, slopes and soft caps in one GPU kernel. No training on a CPU."""

    @staticmethod
    def mask(rules: AttentionRules, new: int, seen: int, device: torch.device, dtype: torch.dtype) -> Any:
        """The BlockMask of what is visible."""
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(b, h, i, j):
            distance = i + seen - new - j
            return distance >= 0 if rules.window is None else (distance >= 0) & (distance < rules.window)

        return create_block_mask(visible, None, None, new, seen, device=device.type)

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, rules: AttentionRules, mask: Any) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention as flex

        if q.device.type == "cpu" and q.requires_grad:
            raise ValueError(
                "attention_backend='flex' cannot train on a CPU, where FlexAttention has no backward "
                "pass; use 'sdpa' or 'manual'."
            )
        if rules.dropout:
            raise ValueError("attention_backend='flex' has no dropout; use 'sdpa', or --dropout=0.")
        before = k.size(2) - q.size(2)

        def score(s, b, h, i, j):
            s = s if rules.softcap is None else rules.softcap * torch.tanh(s / rules.softcap)
            return s if rules.slopes is None else s - rules.slopes[h] * (i + before - j)

        kernel = _compiled(flex) if q.device.type == "cuda" else flex
        return kernel(q, k, v, score_mod=score, block_mask=mask, scale=rules.scale, enable_gqa=q.size(1) != k.size(1))


@lru_cache(maxsize=1)
def _compiled(function):
    return torch.compile(function)


class Context:
    """What all blocks of one forward pass share: position tables, masks, the KV cache.

    `model_builder.Transformer.front` makes one for each forward pass and hands it to every block. It holds what depends
    on the positions of the tokens and not on the layer, so that each of it is computed once and not once a layer.
    `positions` (T,): where the new tokens stand; `seen`: how many tokens there are with those in the cache.
    """

    def __init__(
        self,
        config: ModelConfig,
        encoding: NoPosition,
        positions: Tensor,
        dtype: torch.dtype,
        cache: KVCache | None = None,
    ):
        self.encoding, self.cache, self.positions, self.dtype = encoding, cache, positions, dtype
        self.seen = positions.numel() + (cache.length if cache is not None else 0)
        self.backend = component("attention_backend", config.attention_backend).build
        self.softcap = config.attention_softcap
        self.tables = encoding.tables(positions)
        self.slopes = encoding.slopes(self.tables)
        self.masks: dict[int | None, Any] = {}

    def mask(self, window: int | None) -> Any:
        """What the attention backend needs to limit a layer with this window (None: no window) to what it may see."""
        if window not in self.masks:
            rules = AttentionRules(1.0, softcap=self.softcap, window=window, slopes=self.slopes)
            self.masks[window] = self.backend.mask(rules, self.positions.numel(), self.seen, self.positions.device, self.dtype)
        return self.masks[window]

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, H, T, d) and keys (B, K, T, d) with the position encoding applied to them."""
        return self.encoding.rotate(q, k, self.tables)


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


@register_block("sliding", short="sliding", uses=("sliding_window",), has_attention=True)
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
