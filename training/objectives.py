"""What is minimised: the next token's cross-entropy, as a sum, so that the caller decides what to divide by."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -1  # a target that does not count: padding


CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # fp32 logits worked on at a time: a cache's worth; little memory


def next_token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy in nats, fp32, of targets (B, T) given inputs (B, T); IGNORE targets count nothing."""
    return summed_cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ −log softmax(logits)[target] in fp32 over the targets that count: logits (N, V), targets (N,) → scalar.

    In fp32 whatever the logits' dtype, a few rows at a time where they are many, so that no fp32 copy of all logits (nor
    their log-softmax, nor its gradient) is ever made.
    """
    rows = CHUNK_BYTES.get(logits.device.type, CHUNK_BYTES["cpu"]) // (4 * logits.size(-1))
    if rows >= len(targets):
        return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")
    return _ChunkedCrossEntropy.apply(logits, targets, max(1, rows))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy over chunks of rows; backward makes softmax − onehot again from the saved log-sum-exp."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, rows: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        log_sum_exp = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            chunk, target = logits[part].float(), targets[part]
            log_sum_exp[part] = chunk.logsumexp(dim=-1)
            own = chunk.gather(1, target.clamp(min=0)[:, None])[:, 0]
            total += (log_sum_exp[part] - own).masked_fill(target == IGNORE, 0.0).sum()
        ctx.save_for_backward(logits, targets, log_sum_exp)
        ctx.rows = rows
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, log_sum_exp = ctx.saved_tensors
        result = torch.empty_like(logits)
        for start in range(0, len(targets), ctx.rows):
            part = slice(start, start + ctx.rows)
            target = targets[part]
            chunk = (logits[part].float() - log_sum_exp[part, None]).exp_()
            chunk.scatter_add_(1, target.clamp(min=0)[:, None], chunk.new_full((len(target), 1), -1.0))
            result[part] = chunk.mul_(gradient).masked_fill_((target == IGNORE)[:, None], 0.0)
        return result, None, None


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    over_all: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> tuple[float, int]:
    """Loss per token in nats over (inputs, targets) batches, in eval mode, and the number of tokens it is over.

    `over_all` adds up the (loss, tokens) sums of all processes that evaluate together.
    """
    was_training = model.training
    model.eval()
    sums, tokens = torch.zeros(2, dtype=torch.float64, device=device), 0
    for inputs, targets in batches:
        tokens += int((targets != IGNORE).sum())
        inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        sums[0] += next_token_loss(model, inputs, targets).double()
    sums[1] = tokens
    model.train(was_training)
    total, tokens = over_all(sums).tolist()
    return total / max(1, tokens), int(tokens)
