"""What is minimised: the next token's cross-entropy, as a sum, so that the caller decides what to divide by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -1  # a target that does not count: padding


def next_token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy in nats, fp32, of targets (B, T) given inputs (B, T); IGNORE targets count nothing."""
    logits = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


@torch.no_grad()
def mean_loss(model: nn.Module, batches, device: torch.device) -> tuple[float, int]:
    """Loss per token in nats over (inputs, targets) batches, in eval mode, and the number of tokens it is over."""
    was_training = model.training
    model.eval()
    total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    for inputs, targets in batches:
        tokens += int((targets != IGNORE).sum())
        inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        total += next_token_loss(model, inputs, targets).double()
    model.train(was_training)
    return float(total) / max(1, tokens), tokens
