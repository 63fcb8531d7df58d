"""Trade memory for compute: forget a block's activations in forward and recompute them in backward (Chen et al. 2016)."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

_aten = torch.ops.aten
# 'selective' keeps what is expensive to recompute, matrix products and attention, and recomputes the rest.
KEPT = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]


def apply_activation_checkpointing(model: nn.Module, mode: str) -> None:
    """Wrap every block's forward: 'none', 'full' (keep the block's input only) or 'selective' (also the KEPT products).

    The result is the same to the last bit; dropout masks are replayed. Parameter names do not change.
    """
    if mode == "none":
        return
    options = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT)
    for block in model.blocks:
        block.forward = partial(_forward, block.forward, options)


def _forward(forward, options, *inputs):
    if torch.is_grad_enabled():
        return checkpoint(forward, *inputs, **options)
    return forward(*inputs)
