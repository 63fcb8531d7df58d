"""Activation checkpointing: each block of a model recomputes in backward what it did not keep."""

from __future__ import annotations

from torch import nn

from model_parts.recomputation import recomputed


def apply_activation_checkpointing(model: nn.Module, mode: str) -> None:
    """Wrap every block's forward: 'none', 'full' (keep the block's input only) or 'selective' (also its matrix products).

    The result is the same to the last bit; dropout masks are replayed. Parameter names do not change.
    """
    for block in model.blocks:
        block.forward = recomputed(block.forward, mode)
