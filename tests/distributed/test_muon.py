"""Muon under sharding does to a matrix what PyTorch's Muon does to it whole: to the last bit, given the same gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from group import in_processes

from model_builder import build_model, initialize
from model_config import resolve
from training.optimizers import Muon, Optimizer
from training.parallelism import parallelize
from training.processes import World
from training.train_config import TrainConfig

# Three blocks and rows that no world size below divides evenly: 30, 28 and 50 of them.
CONFIG = resolve("llama", n_layer=3, n_head=2, head_dim=14, n_embd=30, d_ff=50, vocab_size=61, block_size=16)
STEPS = 3


def gradient(name: str, shape: torch.Size, step: int) -> torch.Tensor:
    """The same in every process, another for each parameter and step."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(name.encode()) * 100 + step))


def differences(strategy: str) -> tuple[str, list[str]]:
    """(kind of Muon used, names of block matrices and momenta that differ from PyTorch's Muon on whole matrices)."""
    from torch.distributed.tensor import distribute_tensor

    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.get_world_size(), group=dist.group.WORLD)
    train = TrainConfig(optimizer="muon", weight_decay=0.1)
    whole = build_model(CONFIG, seed=3)
    names = [name for name, p in whole.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    matrices = dict(whole.named_parameters())
    oracle = torch.optim.Muon(
        [matrices[name] for name in names],
        lr=0.01,
        weight_decay=0.1,
        momentum=train.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    model = build_model(CONFIG, device="meta")
    parallel = parallelize(model, strategy, world, torch.device("cpu"), torch.float32)
    model.to_empty(device="cpu")
    initialize(model, 3, parallel.put)
    optimizer = Optimizer(model, train)
    for step in range(STEPS):
        for name, parameter in model.named_parameters():
            parameter.grad = distribute_tensor(
                gradient(name, parameter.shape, step), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
        for name in names:
            matrices[name].grad = gradient(name, matrices[name].shape, step)
        optimizer.step(0.01, torch.zeros(()))
        oracle.step()
    sharded, state = dict(model.named_parameters()), optimizer.state()
    pairs = {name: (sharded[name], matrices[name]) for name in names}
    pairs |= {
        f"{name}.momentum_buffer": (state[f"{name}.momentum_buffer"], oracle.state[matrices[name]]["momentum_buffer"])
        for name in names
    }
    return type(optimizer.updates[-1].optimizer).__name__, [
        name for name, (one, other) in pairs.items() if not torch.equal(one.full_tensor(), other)
    ]


@pytest.mark.parametrize("size, strategy", [(2, "zero1"), (2, "fsdp"), (4, "zero2"), (4, "hsdp"), (2, "ddp")])
def test_sharded_muon_is_pytorchs_on_whole_matrices(size, strategy):
    for kind, different in in_processes(size, differences, strategy):
        assert kind == Muon.__name__
        assert different == []
