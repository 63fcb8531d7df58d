"""The loss on the fixed validation set."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from training.batch import Batch
from training.data_loader import validation_batches
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
        objective, split = self.learner.objective, self.data.dataset.split("val")

        def watched(batch: Batch) -> Batch:
            world.at(step, "evaluating")
            return batch

        batches = validation_batches(
            split,
            self.data.model_config.block_size,
            config.eval_iters * self.data.sequences,
            config.batch_size,
            world.data_rank,
            world.data_size,
            vocab_size=self.data.model_config.vocab_size,
        )
        loss, tokens = mean_loss(objective, self.learner.model, map(watched, batches), self.machine.device, world.sum)
        loss = world.from_main(lambda: loss)  # what is decided by it is decided alike everywhere
        self.learner.parallel.settle()
        perplexity = bits_per_byte = None
        if objective.is_likelihood:
            perplexity = math.inf if loss > 700 else math.exp(loss)
            bits_per_byte = loss / math.log(2) * len(split) / split.bytes if split.bytes else None
        return Evaluation(loss, perplexity, bits_per_byte, tokens, time.perf_counter() - started)
