"""The single-GPU path: what a CPU cannot show. Skipped where there is no CUDA device (`python -m pytest -q tests/gpu`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import train
from flops_parameter_counting.flops import flops_per_token
from flops_parameter_counting.hardware import device_peak
from model_builder import build_model
from model_config import resolve

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SMALL = (
    "--arch_preset=llama",
    "--n_layer=2",
    "--n_head=4",
    "--n_embd=256",
    "--block_size=128",
    "--batch_size=4",
    "--gradient_accumulation_steps=2",
    "--learning_rate=3e-3",
    "--log_interval=1",
    "--eval_iters=1",
    "--device=cuda",
)


def run(dataset: Path, out_dir: Path, *arguments: str) -> list[dict]:
    """Train and return the step events, a resumed step once."""
    assert train.main([*SMALL, f"--dataset={dataset}", f"--out_dir={out_dir}", *arguments]) == 0
    lines = [json.loads(line) for log in sorted(out_dir.glob("run_*.jsonl")) for line in log.read_text().splitlines()]
    return list({line["step"]: line for line in lines if line["event"] == "step"}.values())


@pytest.mark.parametrize("preset", ("gpt2", "gpt2_postnorm", "llama", "custom"))
def test_logits_on_the_gpu_are_those_of_the_cpu(preset):
    config = resolve(preset, n_layer=2, n_head=4, n_embd=64, block_size=32, vocab_size=101)
    tokens = torch.randint(0, 101, (2, 32), generator=torch.Generator().manual_seed(0))
    on_cpu, on_gpu = build_model(config), build_model(config, device="cuda")
    assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu.parameters(), on_gpu.parameters()))
    torch.testing.assert_close(on_gpu(tokens.cuda()).cpu(), on_cpu(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_every_dtype_learns_and_reports_a_believable_mfu(tmp_path, tiny_dataset, dtype):
    steps = run(tiny_dataset, tmp_path, "--max_iters=30", f"--dtype={dtype}", "--compile=False", "--save_interval=-1")
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    peak = device_peak("cuda", dtype)
    for step in steps:
        assert (step["mfu"] is None) == (peak is None)
        if peak:
            per_token = flops_per_token(resolve("llama", n_layer=2, n_head=4, n_embd=256, block_size=128, vocab_size=256)).full
            assert step["mfu"] == pytest.approx(step["tokens_per_s"] * per_token / peak.flops)
            assert 0 < step["mfu"] < 1


def test_compiled_blocks_give_the_same_losses(tmp_path, tiny_dataset):
    one, other = (
        run(tiny_dataset, tmp_path / name, "--max_iters=8", "--dtype=float32", f"--compile={name}", "--save_interval=-1")
        for name in ("True", "False")
    )
    assert [s["loss"] for s in one] == pytest.approx([s["loss"] for s in other], rel=1e-3)


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_a_resumed_run_continues_the_losses(tmp_path, tiny_dataset, optimizer):
    options = (f"--optimizer={optimizer}", "--dropout=0.1", "--compile=False", "--lr_decay_iters=20", "--eval_interval=0")
    whole = run(tiny_dataset, tmp_path / "whole", *options, "--max_iters=20")
    run(tiny_dataset, tmp_path / "parts", *options, "--max_iters=9")
    parts = run(tiny_dataset, tmp_path / "parts", *options, "--max_iters=20", "--init_from=resume")
    assert [s["loss"] for s in parts] == pytest.approx([s["loss"] for s in whole], rel=1e-3)


def test_checkpointing_saves_memory_and_the_laps_add_up(tmp_path, tiny_dataset):
    peaks = {}
    for mode in ("none", "selective", "full"):
        torch.cuda.reset_peak_memory_stats()
        steps = run(
            tiny_dataset,
            tmp_path / mode,
            "--max_iters=4",
            f"--activation_checkpointing={mode}",
            "--n_layer=8",
            "--batch_size=16",
            "--compile=False",
            "--save_interval=-1",
        )
        peaks[mode] = steps[-1]["memory_gb"]
        laps = steps[-1]["step_ms"]
        assert sum(ms for name, ms in laps.items() if name != "total") <= laps["total"] * 1.05
    assert peaks["full"] < peaks["selective"] < peaks["none"]
