"""A run goes on under any other strategy and number of processes, as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from group import RankFailed, train_in_processes
from safetensors import safe_open
from safetensors.torch import save_file
from training_runs import BF16, CONFIGURATIONS, FP32, STRATEGIES

SAVED, LENGTH = 5, 10  # steps
# 6 rows (norms), 5 rows (d_ff) and 258 rows do not divide by 4, and of the first two the last of 4 processes has none.
SMALL = (
    "--arch_preset=llama",
    "--n_layer=2",
    "--n_head=1",
    "--n_embd=6",
    "--d_ff=5",
    "--block_size=16",
    "--vocab_size=257",
    "--pad_vocab_multiple=3",
    "--batch_size=4",
    "--gradient_accumulation_steps=4",
    "--learning_rate=1e-2",
    "--warmup_iters=2",
    f"--lr_decay_iters={LENGTH}",
    f"--max_iters={LENGTH}",
    f"--save_interval={SAVED}",
    "--keep_last=5",
    "--eval_interval=0",
    "--eval_iters=1",
    "--log_interval=1",
    "--device=cpu",
    "--dtype=float32",
)
ALL = [(1, "none"), *CONFIGURATIONS]


def name(size: int, strategy: str) -> str:
    return f"{strategy}-{size}"


@pytest.fixture(scope="module")
def whole(tiny_dataset, tmp_path_factory):
    """whole(size, strategy, *options) → the folder of an uninterrupted run, made once."""
    made: dict[tuple, Path] = {}

    def run(size: int, strategy: str, *options: str) -> Path:
        key = (size, strategy, *options)
        if key not in made:
            folder = tmp_path_factory.mktemp("whole")
            train_in_processes(
                size,
                *SMALL,
                f"--parallelism={strategy}",
                f"--dataset={tiny_dataset}",
                f"--out_dir={folder}",
                "--threads=1",
                *options,
            )
            made[key] = folder
        return made[key]

    return run


def resume(size: int, strategy: str, saved: Path, out_dir: Path, *options: str) -> Path:
    """Go on from the checkpoint in the middle of the run in `saved`, in a folder of its own."""
    middle = checkpoint(saved, SAVED)
    if not (out_dir / "checkpoints").exists():
        shutil.copytree(middle, out_dir / "checkpoints" / middle.name)
        (out_dir / "checkpoints" / "latest").write_text(middle.name)
    train_in_processes(
        size,
        "--resume",
        f"--out_dir={out_dir}",
        f"--parallelism={strategy}",
        "--threads=1",
        *options,
    )
    return out_dir


def checkpoint(out_dir: Path, step: int) -> Path:
    return out_dir / "checkpoints" / f"step_{step:09d}"


def figures(out_dir: Path) -> list[float]:
    """The losses of the steps after the save, and the validation loss at the end."""
    (log,) = out_dir.glob("run_*.jsonl")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    losses = {event["step"]: event["loss"] for event in events if event["event"] == "step"}
    return [losses[step] for step in range(SAVED + 1, LENGTH + 1)] + [
        event["val_loss"] for event in events if event["event"] == "eval"
    ]


def tensors(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """(name, where it begins in the whole) → every part of every tensor, read with the safetensors library alone."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            parts = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            found.update({(key, str(parts[key]["saved_offsets"])): file.get_tensor(key) for key in file.keys()})
    return found


def assert_same_bits(one: Path, other: Path) -> None:
    assert figures(one) == figures(other)
    first, second = (tensors(checkpoint(folder, LENGTH)) for folder in (one, other))
    assert first.keys() == second.keys() and len(first) > 10
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


# ------------------------------------------------------------------------------------------- the same again


USUAL = ((1, "none"), (2, "zero1"), (2, "fsdp"), (2, "zero2"), (4, "ddp"), (4, "hsdp"))


@pytest.mark.parametrize(
    "size, strategy", [pytest.param(*c, marks=() if c in USUAL else pytest.mark.slow, id=name(*c)) for c in ALL]
)
def test_the_same_processes_and_strategy_go_on_bit_for_bit(tmp_path, whole, size, strategy):
    first = whole(size, strategy)
    assert_same_bits(resume(size, strategy, first, tmp_path), first)


@pytest.mark.parametrize(
    "size, strategy, options",
    [
        (2, "zero1", ("--dtype=bfloat16", "--activation_checkpointing=full")),
        pytest.param(4, "hsdp", ("--optimizer=muon",), marks=pytest.mark.slow),
        pytest.param(2, "fsdp", ("--arch_preset=gpt2", "--async_checkpoint=True"), marks=pytest.mark.slow),
    ],
)
def test_dropout_goes_on_bit_for_bit_in_every_rank(tmp_path, whole, size, strategy, options):
    first = whole(size, strategy, "--dropout=0.3", *options)
    assert_same_bits(resume(size, strategy, first, tmp_path), first)


def test_the_runs_show_a_lost_optimizer_state(tmp_path, whole):
    """Without AdamW's moments the losses are off by more than a hundred times the tolerance below."""
    first = whole(1, "none")
    shutil.copytree(checkpoint(first, SAVED), checkpoint(tmp_path / "without", SAVED))
    manifest_path = checkpoint(tmp_path / "without", SAVED) / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    for path in manifest_path.parent.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            emptied = {key: file.get_tensor(key) * (0 if "exp_avg" in key else 1) for key in file.keys()}
            save_file(emptied, path, metadata=file.metadata())
        manifest["files"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest_path.write_text(json.dumps(manifest))
    resumed = resume(1, "none", tmp_path / "without", tmp_path / "resumed")
    assert max(abs(a - b) / b for a, b in zip(figures(resumed), figures(first))) > 100 * FP32


# ------------------------------------------------------------------------------------------- every pair

PAIRS = [pair for pair in product(ALL, ALL) if pair[0] != pair[1]]
CHOSEN = [(USUAL[i], USUAL[(i + 2) % len(USUAL)]) for i in range(len(USUAL))]  # each saves once, and is resumed once


def test_the_chosen_pairs_hold_every_strategy_and_number_of_processes_on_both_sides():
    assert {a for a, _ in CHOSEN} == {b for _, b in CHOSEN} == set(USUAL) and set(CHOSEN) <= set(PAIRS)
    assert {strategy for _, strategy in ALL} == {strategy for _, strategy in USUAL} == {"none", *STRATEGIES[4]}
    assert {size for size, _ in ALL} == {size for size, _ in USUAL}


@pytest.mark.parametrize(
    "before, after",
    [
        pytest.param(*pair, marks=() if pair in CHOSEN else pytest.mark.slow, id=f"{name(*pair[0])}-{name(*pair[1])}")
        for pair in PAIRS
    ],
)
def test_a_run_goes_on_under_another_strategy(tmp_path, whole, before, after):
    first = whole(*before)
    assert figures(resume(*after, first, tmp_path, "--save_interval=-1")) == pytest.approx(figures(first), rel=FP32)


# ------------------------------------------------------------------------------------------- what else may change


@pytest.mark.parametrize(
    "option, tolerance",
    [
        ("--dtype=bfloat16", BF16),
        pytest.param("--activation_checkpointing=full", FP32, marks=pytest.mark.slow),
        ("--batch_size=2 --gradient_accumulation_steps=8", FP32),
        ("--async_checkpoint=True", FP32),
        pytest.param("--compile=True", FP32, marks=pytest.mark.slow),
    ],
)
def test_what_says_how_to_compute_may_change_with_the_strategy(tmp_path, whole, option, tolerance):
    first = whole(2, "fsdp")
    assert figures(resume(4, "zero1", first, tmp_path, *option.split())) == pytest.approx(figures(first), rel=tolerance)


def test_a_bf16_run_goes_on_in_fp32(tmp_path, whole):
    first = whole(4, "fsdp", "--dtype=bfloat16")
    resumed = resume(1, "none", first, tmp_path, "--dtype=float32")
    assert figures(resumed) == pytest.approx(figures(first), rel=BF16)
    assert figures(resumed) != figures(first)


def test_what_says_what_to_compute_may_not_change(tmp_path, whole):
    first = whole(2, "fsdp")
    with pytest.raises(RankFailed, match=r"learning_rate +0\.5 \(command line\) +0\.01 \(command line\)"):
        resume(2, "zero1", first, tmp_path, "--learning_rate=0.5")
