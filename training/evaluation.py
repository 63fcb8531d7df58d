"""The loss on the fixed validation set."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from training.batch import Batch
from training.data_loader import validation_batches, validation_windows
from training.objectives import mean_loss
from training.stages import Data, Learner, Machine, Start


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found. Perplexity and bits per byte are null where the losses are not −log p of text."""

    loss: float
    perplexity: float | None
    bits_per_byte: float | None
    tokens: int  # losses that it is the mean of
    seconds: float
    by_source: dict[str, float] = field(default_factory=dict)  # of a mixture, the loss on each part


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a run; called by every process."""

    start: Start
    machine: Machine
    data: Data
    learner: Learner

    def __call__(self, step: int) -> Evaluation:
        """Loss over the validation set after so many steps, the same number in every process."""
        started, world, config = time.perf_counter(), self.machine.world, self.start.config
        objective, dataset, model = self.learner.objective, self.data.dataset, self.data.model_config

        def watched(batch: Batch) -> Batch:
            world.at(step, "evaluating")
            return batch

        found: list[tuple[float, int, float]] = []  # of each part: mean loss, losses, tokens a byte of text
        shares = validation_windows(dataset.shares, config.eval_iters * self.data.sequences)
        for part, windows in zip(dataset.parts, shares):
            split = part.split("val")
            batches = validation_batches(
                split,
                model.block_size,
                windows,
                config.micro_batch_size,
                world.data_rank,
                world.data_size,
                vocab_size=model.vocab_size,
                eos_id=self.data.loader.eos_id,
            )
            mean, count = mean_loss(objective, self.learner.model, map(watched, batches), self.machine.device, world.sum)
            found.append((mean, count, len(split) / split.bytes if split.bytes else math.nan))
        tokens = sum(count for _, count, _ in found)
        if len(found) == 1:
            (loss, _, tokens_per_byte), by_source = found[0], {}
        else:
            loss = sum(mean * count for mean, count, _ in found) / max(1, tokens)
            tokens_per_byte = tokens / max(1e-9, sum(count / rate for _, count, rate in found))
            by_source = {name: mean for name, (mean, _, _) in zip(dataset.names, found)}
        loss = world.from_main(lambda: loss)  # what is decided by it is decided alike everywhere
        self.learner.parallel.settle()
        perplexity = bits_per_byte = None
        if objective.is_likelihood:
            perplexity = math.inf if loss > 700 else math.exp(loss)
            bits_per_byte = None if math.isnan(tokens_per_byte) else loss / math.log(2) * tokens_per_byte
        return Evaluation(loss, perplexity, bits_per_byte, tokens, time.perf_counter() - started, by_source)
