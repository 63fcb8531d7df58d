"""Learning-rate schedules: a pure function of the iteration, so a resumed run needs no schedule state."""

from __future__ import annotations

import math
from collections.abc import Callable

from training.train_config import TrainConfig

# Progress p in [0, 1] from the end of the warm-up to lr_decay_iters → share of the way from min_lr up to the peak.
_SHAPES: dict[str, Callable[[float, TrainConfig], float]] = {
    "cosine": lambda p, c: 0.5 * (1 + math.cos(math.pi * p)),  # Loshchilov & Hutter 2017
    "linear": lambda p, c: 1 - p,
    "wsd": lambda p, c: min(1.0, (1 - p) / c.lr_decay_fraction),  # Hu et al. 2024 (MiniCPM)
    "constant": lambda p, c: 1.0,
}


def learning_rate(iteration: int, config: TrainConfig, length: int) -> float:
    """The learning rate of the iteration-th update, counted from 0; `length`: iterations of the whole run.

    Linear warm-up over `warmup_iters`, then the chosen shape down to min_lr at `lr_decay_iters` (default: length), and
    min_lr after it. 'inverse_sqrt' falls as 1/√iteration from the end of the warm-up (Vaswani et al. 2017), never
    below min_lr; 'constant' stays at the peak. wsd's decay takes the last lr_decay_fraction of what follows warm-up.
    """
    peak = config.learning_rate
    floor = lowest_rate(config)
    warmup, end = config.warmup_iters, config.lr_decay_iters or length
    if iteration < warmup:
        return peak * (iteration + 1) / (warmup + 1)
    if config.lr_schedule == "inverse_sqrt":
        return max(floor, peak * math.sqrt(max(1, warmup) / max(1, iteration)))
    progress = 1.0 if iteration >= end else (iteration - warmup) / (end - warmup)
    return floor + (peak - floor) * _SHAPES[config.lr_schedule](progress, config)


def lowest_rate(config: TrainConfig) -> float:
    """The learning rate at the end of the schedule: min_lr, or min_lr_ratio of the peak, or a tenth of it."""
    if config.min_lr is not None:
        return config.min_lr
    return config.learning_rate * (0.1 if config.min_lr_ratio is None else config.min_lr_ratio)


def run_length(config: TrainConfig, block_size: int, sequences_per_epoch: float, steps: int = 0, sequences: int = 0) -> int:
    """Iterations of the whole run from max_iters, max_tokens or epochs (rounded up); 1000 if none is given.

    `steps` and `sequences` are what a resumed run has behind it: its batch may have had another size.
    """
    batch = config.sequences_per_iteration(block_size)
    if config.max_tokens is not None:
        wanted = config.max_tokens / block_size
    elif config.epochs is not None:
        wanted = config.epochs * sequences_per_epoch
    else:
        return config.max_iters if config.max_iters is not None else 1000
    return steps + max(0, math.ceil((wanted - sequences) / batch))
