"""Trade memory for compute: forget a block's activations in forward and recompute them in backward (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

CHECKPOINTING = ("none", "selective", "full")

_aten = torch.ops.aten
# 'selective' keeps what is expensive to recompute, matrix products and attention, and recomputes the rest.
_KEPT = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]


def recomputed(forward: Callable, mode: str) -> Callable:
    """A block's forward that keeps its input only ('full'), also its matrix products ('selective'), or everything ('none').

    The result is the same to the last bit; dropout masks are replayed. Without gradients nothing is kept anyway.
    """
    if mode == "none":
        return forward
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _KEPT)
    return partial(_forward, forward, options)


def _forward(forward: Callable, options: dict[str, Any], *inputs: Any) -> Any:
    if torch.is_grad_enabled():
        return checkpoint(forward, *inputs, **options)
    return forward(*inputs)
