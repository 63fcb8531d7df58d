"""Objectives, optimizers and strategies: each is added in one place, and everything else finds it there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_RUN
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent / "distributed"))

from strangers import registered

import train
from configurator import ConfigError, configure, print_help_all
from data.token_dataset import TokenDataset
from flops_parameter_counting.memory import estimate_memory
from flops_parameter_counting.parameters import count_parameters
from model_builder import build_model
from model_config import register, resolve, unregister
from training import parallelism
from training.checkpoint import CheckpointStore, load_model
from training.data_loader import DataLoader
from training.objectives import OBJECTIVES
from training.optimizers import OPTIMIZERS
from training.parallelism import STRATEGIES
from training.processes import World

OURS = (*TINY_RUN, "--objective=odd_bytes", "--eval_interval=0")


@pytest.fixture(autouse=True)
def strangers():
    with registered():
        yield


def run(dataset: Path, out_dir: Path, *flags: str) -> int:
    return train.main([*OURS, f"--dataset={dataset}", f"--out_dir={out_dir}", *flags])


def events(out_dir: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for file in sorted(out_dir.glob("run_*.jsonl")) for line in file.read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def tensors(out_dir: Path) -> dict[str, torch.Tensor]:
    files = CheckpointStore(out_dir).pointed("latest").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_registered_names_are_listed_and_unknown_ones_refused(capsys):
    print_help_all("usage")
    printed = capsys.readouterr().out
    for key, name in (("objective", "odd_bytes"), ("optimizer", "signed"), ("parallelism", "lazy")):
        assert repr(name) in next(line for line in printed.splitlines() if line.startswith(f"  --{key}:"))
        assert getattr(configure([f"--{key}={name}"]).train, key) == name
        with pytest.raises(ConfigError, match=f"{key}='unheard'.*{name}"):
            configure([f"--{key}=unheard"])


def test_the_step_divides_by_the_targets_that_count_however_the_batch_is_split(tmp_path, tiny_dataset):
    for name, flags in (("whole", ("--batch_size=8",)), ("split", ("--batch_size=2", "--gradient_accumulation_steps=4"))):
        assert run(tiny_dataset, tmp_path / name, "--max_iters=3", *flags) == 0
    whole, split = (events(tmp_path / name, "step") for name in ("whole", "split"))
    for one, other in zip(whole, split, strict=True):
        for key in ("loss", "grad_norm", "distance", "parity"):
            assert one[key] == pytest.approx(other[key], rel=2e-5), (one["step"], key)

    # The first step by hand: the mean over the odd targets of the global batch.
    config = configure([*OURS, "--batch_size=8"]).train.model_config(256)
    split = TokenDataset.open(tiny_dataset).split("train")
    batch = DataLoader(split, 16, 1337, prefetch=False).batch(0, 8)
    model, teacher = build_model(config, seed=1337), build_model(config, seed=99)
    with torch.no_grad():
        p, q = model(batch.inputs).log_softmax(-1), teacher(batch.inputs).log_softmax(-1)
    odd = batch.targets % 2 == 1
    distance = ((q.exp() * (q - p)).sum(-1) * odd).sum() / odd.sum()
    assert 0 < int(odd.sum()) < odd.numel() and whole[0]["distance"] == pytest.approx(float(distance), rel=1e-4)
    cross_entropy = F.nll_loss(p.transpose(1, 2), batch.targets, reduction="none")[odd].mean()
    expected = cross_entropy + 0.1 * distance + 0.5 * whole[0]["parity"]
    assert whole[0]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_batch_in_which_nothing_counts_moves_no_weight_and_is_not_called_diverged(tmp_path, tiny_dataset):
    from data.preparation import prepare

    prepare(lambda: iter([("even", "bdfhj" * 4000)]), tmp_path / "even", tokenizer="byte")
    assert run(tmp_path / "even", tmp_path / "out", "--max_iters=2", "--weight_decay=0") == 0
    (end,) = events(tmp_path / "out", "run_end")
    assert end["outcome"] == "finished" and end["skipped"] == 0
    trained, _ = load_model(tmp_path / "out")
    for one, other in zip(trained.parameters(), build_model(trained.config, seed=1337).parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_teacher_is_neither_saved_nor_counted_and_a_head_is_both(tmp_path, tiny_dataset):
    assert run(tiny_dataset, tmp_path, "--max_iters=2") == 0
    saved, (start,) = tensors(tmp_path), events(tmp_path, "run_start")
    config = load_model(tmp_path)[0].config
    N, head = count_parameters(config), 2 * 256 + 2
    model_tensors = {name: tensor for name, tensor in saved.items() if name.startswith("model.")}
    assert sum(t.numel() for t in model_tensors.values()) == N + head == start["model"]["parameters"]
    assert model_tensors["model.objective.weight"].shape == (2, 256) and not any("frozen" in name for name in saved)
    assert float(model_tensors["model.objective.weight"].std()) > 0 and "optimizer.objective.weight.exp_avg" in saved
    plain = train.main([*TINY_RUN, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path / 'plain'}", "--max_iters=1"])
    without = events(tmp_path / "plain", "run_start")[0]["model"]["flops_per_token"]["full"]
    assert plain == 0 and start["model"]["flops_per_token"]["full"] == without + 1000


def test_a_run_with_an_objective_of_its_own_goes_on_bit_for_bit_and_with_no_other(tmp_path, tiny_dataset, capsys):
    schedule = ("--lr_schedule=constant", "--dropout=0.1")
    assert run(tiny_dataset, tmp_path / "whole", "--max_iters=5", *schedule) == 0
    assert run(tiny_dataset, tmp_path / "parts", "--max_iters=2", *schedule) == 0
    assert run(tiny_dataset, tmp_path / "parts", "--max_iters=5", "--resume", *schedule) == 0
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    capsys.readouterr()
    assert run(tiny_dataset, tmp_path / "parts", "--max_iters=9", "--resume", "--objective=next_token", *schedule) == 2
    assert "objective" in capsys.readouterr().err


def test_a_new_optimizer_trains_is_saved_and_counted(tmp_path, tiny_dataset):
    flags = ("--objective=next_token", "--optimizer=signed", "--lr_schedule=constant")
    assert run(tiny_dataset, tmp_path / "whole", "--max_iters=4", *flags) == 0
    assert run(tiny_dataset, tmp_path / "parts", "--max_iters=2", *flags) == 0
    assert run(tiny_dataset, tmp_path / "parts", "--max_iters=4", "--resume", *flags) == 0
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert "optimizer.embedding.weight.momentum_buffer" in whole
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    config = resolve("llama")
    assert estimate_memory(config, batch_size=1, optimizer=OPTIMIZERS["signed"].rule).optimizer == 4 * count_parameters(config)


def test_a_new_strategy_is_known_to_the_memory_model():
    config = resolve("llama")
    options = dict(batch_size=1, world_size=4, gradient_accumulation_steps=2)
    lazy, zero1 = (estimate_memory(config, sharding=STRATEGIES[name].rule, **options) for name in ("lazy", "zero1"))
    assert lazy.gradients == zero1.gradients and lazy.weights < zero1.weights


@pytest.mark.parametrize("registry", [OPTIMIZERS, STRATEGIES])
def test_a_name_that_is_taken_is_refused(registry):
    with pytest.raises(ValueError, match="already registered"):
        registry.register(next(iter(registry)), None)


def test_an_objective_that_means_something_else_is_refused_on_resume(tmp_path, tiny_dataset, monkeypatch, capsys):
    """Its fingerprint was saved and not compared: the name alone is the same with another teacher. Issue 10.2."""
    assert run(tiny_dataset, tmp_path, "--max_iters=2") == 0
    monkeypatch.setattr(OBJECTIVES["odd_bytes"], "fingerprint", lambda self: "other teacher")
    capsys.readouterr()
    assert run(tiny_dataset, tmp_path, "--max_iters=3", "--resume") == 2
    said = capsys.readouterr().err
    assert "objective=odd_bytes means something else now" in said and "other teacher" in said and "odd)" in said
    assert run(tiny_dataset, tmp_path / "new", "--max_iters=1", f"--init_from=weights:{tmp_path}") == 0


def test_auto_takes_its_last_strategy_for_a_model_whose_memory_cannot_be_predicted(monkeypatch):
    """It ended the run: a component whose shapes depend on the numbers runs, but not without numbers."""

    @register("activation", "positive_share", short="Pos")
    def positive_share(x):
        """x, scaled by how many of its numbers are positive; nonzero's shape is theirs to decide."""
        return x * (x.detach().flatten().nonzero().size(0) / x.numel())

    monkeypatch.setattr(parallelism, "memory_of", lambda device, world: 1e12)
    config = configure(["--ffn_type=standard", "--activation=positive_share", "--n_layer=1", "--vocab_size=99"]).train
    try:
        model, rule = config.model_config(), OPTIMIZERS["adamw"].rule
        name, why = parallelism.choose(config, model, World(0, 2, 0, 2), torch.device("cpu"), "float32", rule)
        assert name == "lazy" and "parallelism=lazy (auto)" in why and "cannot be predicted" in why
        plain = configure(["--n_layer=1", "--vocab_size=99"]).train
        chosen = parallelism.choose(plain, plain.model_config(), World(0, 2, 0, 2), torch.device("cpu"), "float32", rule)
        assert chosen[0] == "ddp"
    finally:
        unregister("activation", "positive_share")
