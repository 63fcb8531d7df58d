"""What attention computes: the rules it follows, its implementations (backends), and the cache of keys and values.

Shapes: q (B, H, T, d); k and v (B, K, S, d), of which the last T of S tokens are the queries'. Query head h reads key head
h // (H / K).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model_config import ModelConfig
from model_parts.positions import NoPosition
from model_parts.registry import component, register


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


class AttentionRules(NamedTuple):
    """What an attention does besides looking back: factor on the scores, dropout, and what may limit it.

    `softcap`: scores s become softcap·tanh(s / softcap). `window`: a token sees itself and the window - 1 before it.
    `slopes` (H,): what a score loses per token of distance. `documents` (B, T): a token sees those with the same number.
    """

    scale: float
    dropout: float = 0.0
    softcap: float | None = None
    window: int | None = None
    slopes: Tensor | None = None
    documents: Tensor | None = None

    def penalty(self, new: int, seen: int, device: torch.device) -> Tensor | None:
        """For the last `new` of `seen` tokens: what is added to the scores, fp32 (new, seen), (H, new, seen), or with documents
        (B, 1 or H, seen, seen).

        None where nothing but a plain causal mask, or none at all, is needed.
        """
        if self.documents is None and self.slopes is None and new in (1, seen) and (self.window is None or seen <= self.window):
            return None
        distance = torch.arange(seen - new, seen, device=device)[:, None] - torch.arange(seen, device=device)
        hidden = distance < 0 if self.window is None else (distance < 0) | (distance >= self.window)
        if self.documents is not None:
            hidden = hidden | (self.documents[:, None, :, None] != self.documents[:, None, None, :])
        penalty = torch.zeros((), device=device) if self.slopes is None else -self.slopes[:, None, None] * distance.clamp(min=0)
        return torch.where(hidden, float("-inf"), penalty)


@register("attention_backend", "sdpa", short="sdpa")
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
        causal = mask is None
        if q.size(2) != k.size(2):  # a branch: of lengths that are symbols (torch.compile) a comparison is not a bool
            causal = False
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if mask is None else mask.to(q.dtype),
            dropout_p=rules.dropout,
            is_causal=causal,
            scale=rules.scale,
            enable_gqa=q.size(1) != k.size(1),
        )


@register("attention_backend", "manual", short="manual")
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


def _no_dropout(config: ModelConfig) -> list[str]:
    if not config.dropout:
        return []
    return [f"attention_backend='flex' has no dropout (dropout={config.dropout}); use 'sdpa', or dropout 0."]


def _needs_a_gpu(config: ModelConfig, device: str) -> list[str]:
    if device != "cpu":
        return []
    return [
        "attention_backend='flex' cannot train on a CPU, where FlexAttention has no backward pass; use --attention_backend=sdpa."
    ]


@register("attention_backend", "flex", short="flex", check=_no_dropout, check_device=_needs_a_gpu)
class FlexAttention:
    """PyTorch's FlexAttention, compiled: windows, slopes and soft caps in one GPU kernel. No training on a CPU."""

    @staticmethod
    def mask(rules: AttentionRules, new: int, seen: int, device: torch.device, dtype: torch.dtype) -> Any:
        """The BlockMask of what is visible."""
        from torch.nn.attention.flex_attention import create_block_mask

        documents = rules.documents

        def visible(b, h, i, j):
            distance = i + seen - new - j
            seen_by = distance >= 0 if rules.window is None else (distance >= 0) & (distance < rules.window)
            return seen_by if documents is None else seen_by & (documents[b, i] == documents[b, j])

        return create_block_mask(visible, None if documents is None else len(documents), None, new, seen, device=device.type)

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
    `positions` (T,): where the new tokens stand, or (B, T) where each sequence has its own `documents` (B, T), whose numbers
    say which tokens see each other; `seen`: how many tokens there are with those in the cache.
    """

    def __init__(
        self,
        config: ModelConfig,
        encoding: NoPosition,
        positions: Tensor,
        dtype: torch.dtype,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
    ):
        self.encoding, self.cache, self.positions, self.dtype, self.documents = encoding, cache, positions, dtype, documents
        self.seen = positions.size(-1) + (cache.length if cache is not None else 0)
        self.backend = component("attention_backend", config.attention_backend).build
        self.softcap = config.attention_softcap
        self.tables = encoding.tables(positions)
        self.slopes = encoding.slopes(self.tables)
        self.masks: dict[int | None, Any] = {}

    def mask(self, window: int | None) -> Any:
        """What the attention backend needs to limit a layer with this window (None: no window) to what it may see."""
        if window not in self.masks:
            rules = AttentionRules(1.0, softcap=self.softcap, window=window, slopes=self.slopes, documents=self.documents)
            self.masks[window] = self.backend.mask(rules, self.positions.size(-1), self.seen, self.positions.device, self.dtype)
        return self.masks[window]

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, H, T, d) and keys (B, K, T, d) with the position encoding applied to them."""
        return self.encoding.rotate(q, k, self.tables)
