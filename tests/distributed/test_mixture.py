"""A mixture of experts, written as a stranger would, trains: alone and sharded, with Muon, resumed, sized by 'auto'."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import TINY_RUN
from group import in_processes
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from a_strangers_parts import registered_mixture

import train
from configurator import configure
from model_builder import build_model, initialize
from model_config import resolve
from training import parallelism
from training.checkpoint import CheckpointStore, load_model
from training.optimizers import OPTIMIZERS, Muon, Optimizer
from training.parallelism import parallelize
from training.processes import World
from training.train_config import TrainConfig

EXPERTS = ("--ffn_type=mixture", "--n_experts=3", "--balance_weight=0.1", "--d_ff=24")
RUN = (*TINY_RUN, *EXPERTS, "--batch_size=2", "--gradient_accumulation_steps=4", "--eval_interval=0", "--lr_schedule=constant")


@pytest.fixture(autouse=True)
def mixture():
    with registered_mixture():
        yield


def train_a_mixture(arguments: tuple[str, ...]) -> None:
    with registered_mixture():
        code = train.main(list(arguments))
    if code != 0:
        raise RuntimeError(f"train.py exits with {code}")


def steps(out_dir: Path) -> list[dict]:
    lines = [json.loads(line) for log in sorted(out_dir.glob("run_*.jsonl")) for line in log.read_text().splitlines()]
    return [line for line in lines if line["event"] == "step"]


def tensors(out_dir: Path) -> dict[str, torch.Tensor]:
    files = CheckpointStore(out_dir).pointed("latest").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sharded_it_trains_as_alone(tmp_path, tiny_dataset, optimizer):
    """The balance is that of a micro-batch; these are the same sequences here, whoever has them."""
    flags = (*RUN, f"--dataset={tiny_dataset}", f"--optimizer={optimizer}", "--learning_rate=2e-3", "--max_iters=4")
    in_processes(1, train_a_mixture, (*flags, f"--out_dir={tmp_path / 'one'}"), timeout=120)
    in_processes(2, train_a_mixture, (*flags, f"--out_dir={tmp_path / 'two'}", "--parallelism=fsdp"), timeout=120)
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert len(one) == 4 and one[-1]["loss"] < one[0]["loss"]
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", "balance"):
            assert a[key] == pytest.approx(b[key], rel=1e-3 if optimizer == "muon" else 1e-5), (a["step"], key)
    assert 0.1 <= one[0]["balance"] / 2 < 0.15  # weight × 1 a layer where all experts are equally busy
    again = load_model(tmp_path / "two")[0]  # written by two processes, read by one
    assert again.config.n_experts == 3
    prompt = torch.tensor([[5, 9, 2]])
    assert torch.equal(*(again.generate(prompt, 8, temperature=0.0, use_cache=use) for use in (True, False)))


def test_it_goes_on_bit_for_bit(tmp_path, tiny_dataset):
    flags = [*RUN, f"--dataset={tiny_dataset}", "--optimizer=muon", "--dropout=0.1", "--activation_checkpointing=full"]
    assert train.main([*flags, f"--out_dir={tmp_path / 'whole'}", "--max_iters=4"]) == 0
    assert train.main([*flags, f"--out_dir={tmp_path / 'parts'}", "--max_iters=2"]) == 0
    assert train.main([*flags, f"--out_dir={tmp_path / 'parts'}", "--max_iters=4", "--resume"]) == 0
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert "optimizer.blocks.0.feed_forward.sublayer.up.momentum_buffer" in whole
    assert whole.keys() == parts.keys() and [name for name in whole if not torch.equal(whole[name], parts[name])] == []


def differences(strategy: str) -> list[str]:
    """Experts' matrices that differ from what PyTorch's Muon makes of each of them by itself, given the same gradients."""
    from torch.distributed.tensor import distribute_tensor

    with registered_mixture():
        config = resolve("llama", n_layer=1, n_head=2, n_embd=20, vocab_size=61, ffn_type="mixture", n_experts=3, d_ff=28)
        world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.get_world_size(), group=dist.group.WORLD)
        whole = build_model(config, seed=3)
        model = build_model(config, device="meta")
        parallel = parallelize(model, strategy, world, torch.device("cpu"), torch.float32)
        model.to_empty(device="cpu")
        initialize(model, 3, parallel.put)
        optimizer = Optimizer(model, TrainConfig(optimizer="muon", weight_decay=0.1))
        stacks = {name: p for name, p in whole.named_parameters() if p.ndim == 3}
        matrices = {(name, e): torch.nn.Parameter(p[e].clone()) for name, p in stacks.items() for e in range(3)}
        oracle = torch.optim.Muon(
            matrices.values(), lr=0.01, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
        )
        for step in range(3):
            for number, (name, parameter) in enumerate(model.named_parameters()):
                gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + number))
                parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements, src_data_rank=None)
                for e in range(3) if name in stacks else ():
                    matrices[name, e].grad = gradient[e].clone()
            optimizer.step(0.01, torch.zeros(()))
            oracle.step()
        after = {name: p.full_tensor() for name, p in model.named_parameters()}
        return [f"{name}[{e}]" for (name, e), matrix in matrices.items() if not torch.equal(after[name][e], matrix)]


@pytest.mark.parametrize("size, strategy", [(1, "ddp"), (2, "fsdp"), (2, "zero1"), (4, "hsdp")])
def test_muon_orthogonalises_each_experts_matrix(size, strategy):
    for different in in_processes(size, differences, strategy):
        assert different == []


def test_muon_takes_the_experts_and_leaves_what_is_no_matrix():
    model = build_model(resolve("llama", n_layer=1, n_head=2, n_embd=20, vocab_size=61, ffn_type="mixture"))
    optimizer = Optimizer(model, TrainConfig(optimizer="muon"))
    (muon,) = [update.optimizer for update in optimizer.updates if isinstance(update.optimizer, Muon)]
    names = {optimizer.names[p] for group in muon.param_groups for p in group["params"]}
    assert {name.rpartition(".")[2] for name in names if "sublayer.up" in name or "sublayer.down" in name} == {"up", "down"}
    assert all(name.startswith("blocks.") and "norm" not in name for name in names)


def test_auto_sizes_it_by_all_of_its_experts(monkeypatch):
    """Most of the experts are idle for a token, yet each process has to hold them."""
    found = {}
    for experts in (2, 64):
        flags = ("--ffn_type=mixture", f"--n_experts={experts}", "--n_layer=4", "--n_embd=256", "--n_head=4", "--vocab_size=512")
        flags = (*flags, "--block_size=16")
        config = configure([*flags, "--batch_size=1"]).train
        monkeypatch.setattr(parallelism, "memory_of", lambda device, world: 1e9)
        model = config.model_config()
        found[experts] = parallelism.choose(
            config, model, World(0, 4, 0, 4), torch.device("cpu"), "float32", OPTIMIZERS["adamw"].rule
        )
    assert found[2][0] == "ddp" and found[64][0] in ("zero1", "zero2", "fsdp")
