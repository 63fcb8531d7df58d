"""What the tests of the strategies train: small models, by SGD, through the same functions as train.py's loop.

SGD, because AdamW's update hardly depends on the gradient's scale, so that a wrongly scaled gradient would not show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.token_dataset import TokenDataset
from model_builder import build_model, initialize
from model_config import ModelConfig, resolve
from training.activation_checkpointing import apply_activation_checkpointing
from training.data_loader import DataLoader
from training.objectives import next_token_loss
from training.optimizers import Optimizer, clip_and_check
from training.parallelism import Alone, parallelize
from training.precision import set_compute_dtype
from training.processes import World
from training.train_config import TrainConfig

CPU = torch.device("cpu")
STEPS, SEQUENCES, SEED = 10, 16, 1337  # updates; sequences in a global batch: 4 processes can accumulate 4 times
LEARNING_RATE, CLIP = 0.1, 1.3  # stable: differences in rounding are not blown up; some steps are clipped
MUON_RATE = 2e-3  # of config/quickstart.py

# Relative. fp32 sums in another order: one rounding is 6e-8, ten steps carry it on; in bf16 it would be 1e-3.
FP32 = 1e-5
# bf16 has 8 significant bits: a value is off by 2^-9 of itself when it is rounded, two that were rounded apart differ
# by 2^-8. Split among more processes, each weight's gradient is rounded in more parts than in one.
BF16 = 2.0**-8

STRATEGIES = {
    1: ("ddp", "zero1", "zero2", "fsdp"),
    2: ("ddp", "zero1", "zero2", "fsdp"),
    4: ("ddp", "zero1", "zero2", "fsdp", "hsdp"),
}
CONFIGURATIONS = [(size, strategy) for size, strategies in STRATEGIES.items() for strategy in strategies]

SHAPE = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=256)
MODELS: dict[str, dict[str, Any]] = {
    "tied": dict(preset="gpt2", **SHAPE),
    "untied": dict(preset="llama", **SHAPE),
    "padded": dict(preset="llama", **{**SHAPE, "vocab_size": 257, "pad_vocab_multiple": 3}),  # 258 rows; not by 4
    "narrow": dict(preset="llama", **{**SHAPE, "n_head": 1, "n_embd": 6, "d_ff": 5}),  # 4 ranks: one has no row
}


def config_of(model: str) -> ModelConfig:
    """A model of MODELS."""
    keys = dict(MODELS[model])
    return resolve(keys.pop("preset"), **keys)


def world() -> World:
    """This process in the group that `in_processes` has made."""
    me, size = dist.get_rank(), dist.get_world_size()
    return World(me, size, me, size, group=dist.group.WORLD)


def build(
    model: str, strategy: str, dtype: torch.dtype = torch.float32, checkpointing: str = "none", compiled: bool = False
) -> tuple[torch.nn.Module, Alone]:
    """The model under a strategy, with its initial weights, as train.py's Run makes it."""
    built = build_model(config_of(model), device="meta")
    set_compute_dtype(built, dtype)
    apply_activation_checkpointing(built, checkpointing)
    parallel = parallelize(built, strategy, world(), CPU, dtype)
    built.to_empty(device=CPU)
    initialize(built, SEED, parallel.put)
    if compiled:
        for block in built.blocks:
            block.forward = torch.compile(block.forward)
    return built.train(), parallel


def batches(dataset: Path, rank: int, size: int, accumulation: int):
    """The micro-batches of each step, as `Batch`es."""
    split = TokenDataset.open(dataset).split("train")
    loader = DataLoader(split, SHAPE["block_size"], SEED, rank=rank, world_size=size, prefetch=False)
    for step in range(STEPS):
        yield loader.batch(step * SEQUENCES, SEQUENCES).split(SEQUENCES // size // accumulation)


def backward(model, parallel: Alone, micro_batches) -> torch.Tensor:
    """Forward and backward of one step; the loss of the global batch."""
    total = torch.zeros(())
    for micro_batch in parallel.accumulate(micro_batches):
        loss = next_token_loss(model, micro_batch.inputs, micro_batch.targets) / (SEQUENCES * SHAPE["block_size"])
        loss.backward()
        total += loss.detach()
    return world().sum(total)


def train_a_little(
    dataset: Path,
    model: str,
    strategy: str,
    accumulation: int,
    *,
    dtype: torch.dtype = torch.float32,
    checkpointing: str = "none",
    compiled: bool = False,
    optimizer: str = "sgd",
) -> list[tuple[float, float]]:
    """(loss, gradient norm before clipping) of STEPS steps."""
    built, parallel = build(model, strategy, dtype, checkpointing, compiled)
    if optimizer == "sgd":
        sgd = torch.optim.SGD(built.parameters(), lr=LEARNING_RATE)
    else:
        ours = Optimizer(built, TrainConfig(optimizer=optimizer))
    figures = []
    for micro_batches in batches(dataset, dist.get_rank(), dist.get_world_size(), accumulation):
        loss = backward(built, parallel, micro_batches)
        norm, skip = clip_and_check(built, loss, CLIP, torch.ones(()))
        if optimizer == "sgd":
            sgd.step()
        else:
            ours.step(MUON_RATE, skip)
        built.zero_grad(set_to_none=True)
        figures.append((float(loss), float(norm)))
    return figures


def worst_difference(figures: list[tuple[float, float]], reference: list[tuple[float, float]]) -> float:
    """The largest relative difference between two runs' losses and gradient norms."""
    assert len(figures) == len(reference) == STEPS
    return max(abs(a - b) / abs(b) for pair in zip(figures, reference) for a, b in zip(*pair))
