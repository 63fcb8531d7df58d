"""What the set-up of a run consists of: one frozen record for each of its steps, in the order that they need each other.

    start → machine → data → learner

train.py makes them, each from those before it; whoever serves the loop (evaluation, saving, report) takes them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from data.mixture import MixedDataset
from data.token_dataset import TokenDataset
from flops_parameter_counting.flops import FlopsPerToken
from flops_parameter_counting.hardware import Peak
from model_builder import COMPUTE_DTYPES, Transformer
from model_config import ModelConfig
from training.checkpoint import CheckpointStore
from training.data_loader import DataLoader
from training.objectives import Objective
from training.optimizers import Optimizer
from training.parallelism import Alone
from training.precision import LossScale, SkipCounter
from training.processes import World
from training.progress import Progress
from training.starting import Origin
from training.train_config import Configuration, TrainConfig


@dataclass(frozen=True)
class Start:
    """Where a run begins: its configuration, what it continues or takes its weights from, and where it saves."""

    configuration: Configuration
    origin: Origin | None
    saved: dict[str, Any]  # the origin's state; empty for a start from scratch
    progress: Progress
    store: CheckpointStore
    notes: list[str]  # for the start print-out

    @property
    def config(self) -> TrainConfig:
        """The value of every key."""
        return self.configuration.train

    @property
    def resumes(self) -> bool:
        """Whether this run continues a checkpoint in every respect (and not only with its weights)."""
        return self.origin is not None and not self.origin.weights_only

    @property
    def vocabulary(self) -> int | None:
        """The size of the dataset's vocabulary, as far as a checkpoint that is continued says it."""
        return self.saved["config"].get("vocab_size") if self.resumes else None


@dataclass(frozen=True)
class Machine:
    """What the run computes with: this process among the others, its device, the compute dtype, and the dense peak."""

    world: World
    device: torch.device
    dtype: str
    peak: Peak | None  # of all processes together; None where it is not known

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the residual stream and of the matrix products."""
        return COMPUTE_DTYPES[self.dtype]


@dataclass(frozen=True)
class Data:
    """What is read: the dataset and its reader, the model it makes (its vocabulary), and how long the run is."""

    dataset: TokenDataset | MixedDataset
    name: str  # of the dataset; its whole path where it is not below data/
    loader: DataLoader
    model_config: ModelConfig
    sequences: int  # in the global batch
    length: int  # of the run, in steps
    warnings: list[str]  # about its tokenizer

    def read_of_each(self, sequences: int) -> dict[str, dict[str, float]]:
        """Of each part of a mixture, what the first so many sequences of the run have read of it: tokens, epochs."""
        read = self.loader.read_so_far(sequences)
        return {name: {"tokens": tokens, "epochs": epochs} for name, (tokens, epochs) in zip(self.dataset.names, read)}

    @property
    def tokens(self) -> int:
        """Targets in the global batch, if none is masked."""
        return self.sequences * self.model_config.block_size


@dataclass(frozen=True)
class Learner:
    """What learns: model, objective, optimizer, and how the processes share them."""

    model: Transformer
    objective: Objective
    optimizer: Optimizer
    loss_scale: LossScale
    skips: SkipCounter
    parallel: Alone
    parallelism: str  # the strategy's name
    flops: FlopsPerToken
