"""What somebody else adds works in several processes too; and the mesh decides who has which share of the batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import TINY_RUN
from group import in_processes
from strangers import train_with_strangers
from torch.distributed.device_mesh import init_device_mesh

from data.token_dataset import TokenDataset
from model_builder import build_model, initialize
from model_config import resolve
from training.data_loader import DataLoader, validation_batches
from training.parallelism import parallelize
from training.processes import World


def steps(out_dir: Path) -> list[dict]:
    (log,) = out_dir.glob("run_*.jsonl")
    return [event for event in map(json.loads, log.read_text().splitlines()) if event["event"] == "step"]


@pytest.mark.parametrize("strategy", ["lazy", "fsdp", "zero1"])
def test_an_objective_with_masks_teacher_and_head_gives_the_figures_of_one_process(tmp_path, tiny_dataset, strategy):
    """The processes have different numbers of targets that count, so dividing each by its own would show."""
    flags = (*TINY_RUN, "--objective=odd_bytes", "--optimizer=signed", f"--dataset={tiny_dataset}", "--max_iters=3")
    flags = (*flags, "--batch_size=2", "--gradient_accumulation_steps=4", "--eval_interval=0", "--save_interval=-1")
    in_processes(1, train_with_strangers, (*flags, f"--out_dir={tmp_path / 'one'}"), timeout=120)
    in_processes(2, train_with_strangers, (*flags, f"--out_dir={tmp_path / 'two'}", f"--parallelism={strategy}"), timeout=120)
    for one, two in zip(steps(tmp_path / "one"), steps(tmp_path / "two"), strict=True):
        for key in ("loss", "grad_norm", "distance", "parity"):
            assert one[key] == pytest.approx(two[key], rel=1e-5), (one["step"], key)


def shares(dataset: Path, strategy: str) -> tuple[int, torch.Tensor, torch.Tensor, float, list[int]]:
    """In a world of 2 × 2 processes, data × tensor: this one's rank, batch, validation batch, a sum, the shards' mesh."""
    me = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    world = World(me, 4, me, 4, group=dist.group.WORLD, mesh=mesh)
    split = TokenDataset.open(dataset).split("train")
    loader = DataLoader(split, 16, 5, rank=world.data_rank, world_size=world.data_size, prefetch=False)
    validation = next(validation_batches(split, 16, 8, 4, world.data_rank, world.data_size))
    added = float(world.sum(torch.tensor(float(me))))
    config = resolve("llama", n_layer=1, n_head=2, n_embd=32, vocab_size=64, block_size=16)
    model = build_model(config, device="meta")
    parallel = parallelize(model, strategy, world, torch.device("cpu"), torch.float32)
    model.to_empty(device="cpu")
    initialize(model, 3, parallel.put)
    whole = build_model(config, seed=3)
    for one, other in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one.full_tensor(), other)
    return me, loader.batch(0, 8).inputs, validation.inputs, added, list(model.head.weight.device_mesh.shape)


@pytest.mark.parametrize("strategy, shape", [("fsdp", [2]), ("ddp", [2, 1])])
def test_processes_that_differ_in_another_dimension_share_a_part_of_the_batch(tiny_dataset, strategy, shape):
    """The data rank is the mesh's, not the process's: with 2 × 2 (data × tensor), ranks 0 and 1 read the same rows."""
    answers = in_processes(4, shares, tiny_dataset, strategy)
    split = TokenDataset.open(tiny_dataset).split("train")
    whole = DataLoader(split, 16, 5, prefetch=False).batch(0, 8).inputs
    for me, rows, validation, added, mesh in answers:
        assert torch.equal(rows, whole[4 * (me // 2) :][:4])
        assert torch.equal(validation, answers[me - me % 2][2])
        assert added == (0 + 2 if me % 2 == 0 else 1 + 3)  # over the data dimension: ranks 0 and 2, or 1 and 3
        assert mesh == shape
    assert not torch.equal(answers[0][2], answers[2][2])
