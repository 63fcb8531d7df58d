"""From a configuration to the model that is trained, up to the point where its weights get memory."""

from __future__ import annotations

import torch
from torch import nn

from model_builder import build_model
from model_config import ModelConfig
from training.activation_checkpointing import apply_activation_checkpointing
from training.objectives import Objective
from training.precision import set_compute_dtype
from training.train_config import TrainConfig


def assemble(model_config: ModelConfig, objective: Objective, config: TrainConfig, compute_dtype: torch.dtype) -> nn.Module:
    """The model on the meta device, with the objective's heads, computing in `compute_dtype`, checkpointed as configured.

    The heads are a part of the model: they are saved, initialised and shared between processes as the rest of it.
    """
    model = build_model(model_config, device="meta")
    if objective.heads is not None:
        model.add_module("objective", objective.heads.to("meta"))
    set_compute_dtype(model, compute_dtype)
    apply_activation_checkpointing(model, config.activation_checkpointing)
    return model


def compile_blocks(model: nn.Module, config: TrainConfig, device: torch.device) -> None:
    """Compile each block where the configuration says so ("auto": on a GPU), which changes no name and no result."""
    if config.compile is True or (config.compile == "auto" and device.type == "cuda"):
        for block in model.blocks:
            block.forward = torch.compile(block.forward)
