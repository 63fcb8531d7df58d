"""Cross-entropy as a sum in fp32, a few rows of the logits at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -1  # a target that does not count: padding, or masked out
CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # fp32 logits worked on at a time: a cache's worth; little memory


def summed_cross_entropy(logits: Tensor, targets: Tensor, device: str | None = None, most_chunks: int | None = None) -> Tensor:
    """Σ −log softmax(logits)[target] in fp32 over the targets that are not IGNORE: logits (N, V), targets (N,) → scalar.

    In fp32 whatever the logits' dtype, a few rows at a time where they are many, so that no fp32 copy of all logits (nor
    their log-softmax, nor its gradient) is ever made. For those who only measure: `device` is the type of device whose
    number of rows is taken [the logits'], `most_chunks` how often they are worked on [until all rows are done].
    """
    rows = CHUNK_BYTES.get(device or logits.device.type, CHUNK_BYTES["cpu"]) // (4 * logits.size(-1))
    if rows >= len(targets):
        return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")
    return _ChunkedCrossEntropy.apply(logits, targets, max(1, rows), most_chunks)


def _chunks(count: int, rows: int, most: int | None) -> Iterator[slice]:
    """The first `most` [all] slices of at most `rows` out of `count` rows."""
    for start in range(0, count if most is None else min(count, most * rows), rows):
        yield slice(start, start + rows)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy over chunks of rows; backward makes softmax − onehot again from the saved log-sum-exp."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, rows: int, most_chunks: int | None) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        log_sum_exp = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        for part in _chunks(len(targets), rows, most_chunks):
            chunk, target = logits[part].float(), targets[part]
            log_sum_exp[part] = chunk.logsumexp(dim=-1)
            own = chunk.gather(1, target.clamp(min=0)[:, None])[:, 0]
            total += (log_sum_exp[part] - own).masked_fill(target == IGNORE, 0.0).sum()
        ctx.save_for_backward(logits, targets, log_sum_exp)
        ctx.rows, ctx.most_chunks = rows, most_chunks
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, log_sum_exp = ctx.saved_tensors
        result = torch.empty_like(logits)
        for part in _chunks(len(targets), ctx.rows, ctx.most_chunks):
            target = targets[part]
            chunk = (logits[part].float() - log_sum_exp[part, None]).exp_()
            chunk.scatter_add_(1, target.clamp(min=0)[:, None], chunk.new_full((len(target), 1), -1.0))
            result[part] = chunk.mul_(gradient).masked_fill_((target == IGNORE)[:, None], 0.0)
        return result, None, None, None
