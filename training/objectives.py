"""What is minimised: objectives, each a sum of losses and the number of things that it is over.

    objective = OBJECTIVES["next_token"](config, model_config)
    losses, count, figures = objective(model, batch)

An objective returns sums, so the caller decides what to divide by: the loop divides by the count of the *global* batch, so the
result does not depend on how the batch is split over micro-batches and processes, nor on how many targets are masked in each.

To add one: write the class and put `@OBJECTIVES.registered("name")` on it. `--objective=name` then trains with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from model_config import ModelConfig
from model_parts.losses import summed_cross_entropy
from training.batch import IGNORE, Batch
from training.registry import OBJECTIVES
from training.train_config import TrainConfig


class Objective:
    """The base of all objectives; made once a run from its configuration.

    `frozen`: a module that is only asked (a teacher). It is in no checkpoint and not counted in N. `heads`: a module that is
    trained with the model; it is saved as part of it and counted in N. Either may be None. `is_likelihood`: whether the losses
    are −log p of the text's tokens in nats, so that perplexity and bits per byte can be computed from them.
    """

    frozen: nn.Module | None = None
    heads: nn.Module | None = None
    is_likelihood = False

    def __init__(self, config: TrainConfig, model_config: ModelConfig):
        self.config, self.model_config = config, model_config

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(sum of the losses, fp32 scalar; number of losses that count; figures for the log) of one batch on the device.

        A figure is a sum over the same things as the loss: the log shows it divided by their number. Every process and every
        micro-batch gives the same names. Nothing here waits for the device.
        """
        raise TypeError(f"{type(self).__name__} does not define what it minimises.")

    def flops_per_token(self) -> int:
        """FLOPs of a training step a token besides the model's own (a teacher's forward pass, heads)."""
        return 0

    def memory(self, batch_size: int, context: int) -> int:
        """Bytes in each process besides the model's own, for micro-batches of (batch_size, context) tokens."""
        sizes = [p.numel() * p.element_size() for p in self.frozen.parameters()] if self.frozen is not None else []
        trained = [p.numel() for p in self.heads.parameters()] if self.heads is not None else []
        return sum(sizes) + 16 * sum(trained)  # fp32 weights, gradients and two moments

    def fingerprint(self) -> str:
        """16 hex digits that differ where the objective means something else; a resumed run must have the same."""
        return hashlib.sha256(self.config.objective.encode()).hexdigest()[:16]


@OBJECTIVES.registered("next_token")
class NextToken(Objective):
    """Cross-entropy of the next token, in nats, over the targets that are not IGNORE."""

    is_likelihood = True

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        documents = [batch.documents] if "documents" in batch else []
        return next_token_loss(model, batch.inputs, batch.targets, *documents), (batch.targets != IGNORE).sum(), {}


def next_token_loss(model: nn.Module, inputs: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
    """Summed cross-entropy in nats, fp32, of targets (B, T) given inputs (B, T); IGNORE targets count nothing.

    documents (B, T): which document each input belongs to, where they are kept apart.
    """
    logits = model(inputs) if documents is None else model(inputs, documents=documents)
    return summed_cross_entropy(logits.flatten(0, 1), targets.flatten())


class Tally:
    """The sums of one step: over its micro-batches by `add`, then over all processes by `over`. All on the device.

    `expected`: how many losses the global batch would have if none were masked. The gradients are divided by it during
    backward, which keeps them in range in fp16, and by `share` afterwards, which is exactly 1 where nothing is masked.
    """

    def __init__(self, expected: int, device: torch.device):
        self.expected, self.device = expected, device
        self.loss = torch.zeros((), device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.figures: dict[str, Tensor] = {}

    def add(self, losses: Tensor, count: Tensor, figures: dict[str, Tensor]) -> None:
        """One micro-batch, as an objective returns it."""
        self.loss += losses.detach() / self.expected
        self.count += count
        for name, figure in figures.items():
            self.figures[name] = self.figures.get(name, 0.0) + figure.detach().double()

    def over(self, add_up: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(mean loss, share of the expected losses that count, mean figures) over all processes, in one sum.

        `add_up` adds a tensor up over the processes that share the global batch.
        """
        sums = add_up(torch.stack([self.loss.double(), self.count, *self.figures.values()]))
        count = sums[1].clamp(min=1)  # where every target is masked, the gradients are zero, not undefined
        share = (count / self.expected).float()
        means = (sums[2:] / count).float()
        return sums[0].float() / share, share, dict(zip(self.figures, means))


@torch.no_grad()
def mean_loss(
    objective: Objective,
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    over_all: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> tuple[float, int]:
    """The objective's mean loss over batches, in eval mode, and the number of losses it is over.

    `over_all` adds up the (losses, count) of all processes that evaluate together.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        losses, count, _ = objective(model, batch.to(device))
        sums += torch.stack([losses.double(), torch.as_tensor(count, dtype=torch.float64, device=device)])
    model.train(was_training)
    total, count = over_all(sums).tolist()
    return total / max(1, count), int(count)
