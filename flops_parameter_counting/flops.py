"""FLOPs of training a token, and the three utilisation figures made from them."""

from __future__ import annotations

from dataclasses import dataclass

from flops_parameter_counting.parameters import parts
from model_config import ModelConfig


@dataclass(frozen=True)
class FlopsPerToken:
    """Floating-point operations of one token in training, forward and backward (2 per multiply-add).

    `full`: every token attends to the whole context, the PaLM convention (Chowdhery et al. 2022, App. B): 6 × matmul
    weights, head included and look-ups not, + 12 × attention width × context. `causal`: half the attention.
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
    attention = sum(part.attention for part in all_parts)
    full = 6 * matmul + 12 * attention * context
    again = 0
    if checkpointing == "full":
        in_blocks = sum(part.matmul for part in all_parts if part.name.startswith("blocks."))
        again = 2 * in_blocks + 4 * attention * context
    return FlopsPerToken(full, full - 6 * attention * context, full + again)
