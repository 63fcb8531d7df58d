"""FLOPs of training a token, and the three utilisation figures made from them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from flops_parameter_counting.parameters import parts
from model_config import ModelConfig


@dataclass(frozen=True)
class FlopsPerToken:
    """Floating-point operations of one token in training, forward and backward (2 per multiply-add).

    `full`: every token attends to the whole context, the PaLM convention (Chowdhery et al. 2022, App. B): 6 × matmul
    weights, head included and look-ups not, + 12 × attention width × context (a sliding window's width where that is
    smaller). `causal`: what a causal mask leaves of it, half without a window.
    `hardware`: `full` plus what activation checkpointing computes a second time.
    """

    full: int
    causal: int
    hardware: int


def flops_per_token(config: ModelConfig, context: int | None = None, checkpointing: str = "none") -> FlopsPerToken:
    """Training FLOPs a token at this context length (default block_size), under this activation checkpointing.

    'full' checkpointing repeats the forward pass of the blocks, counted whole (PyTorch leaves out a block's last
    projection where nothing needs its result); 'selective' repeats no matrix product.
    """
    context = context or config.block_size
    all_parts = parts(config)
    matmul = sum(part.matmul for part in all_parts)
    seen = {part: min(context, part.window or context) for part in all_parts if part.attention}
    full = sum(12 * part.attention * seen[part] for part in all_parts if part.attention)
    # a causal token sees half of a full context on average, and of a window w all but the first w tokens see all
    causal = sum(12 * part.attention * (seen[part] - Fraction(seen[part] ** 2, 2 * context))
                 for part in all_parts if part.attention)
    again = 0
    if checkpointing == "full":
        again = 2 * sum(part.matmul for part in all_parts if part.name.startswith("blocks.")) + full // 3
    return FlopsPerToken(6 * matmul + full, 6 * matmul + round(causal), 6 * matmul + full + again)
