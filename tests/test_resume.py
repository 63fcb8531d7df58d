"""Stopping and going on changes nothing: not a bit of the weights, not a logged loss."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_RUN
from safetensors.torch import load_file

import train
from tests.preloaded import preloaded_python
from training.checkpoint import CheckpointStore

SMALL = (
    *TINY_RUN,
    "--batch_size=2",
    "--gradient_accumulation_steps=3",
    "--dropout=0.1",
    "--warmup_iters=4",
    "--lr_decay_iters=40",
    "--dtype=auto",
)


def run(out_dir: Path, dataset: Path, *arguments: str) -> int:
    return train.main([*SMALL, f"--dataset={dataset}", f"--out_dir={out_dir}", *arguments])


def weights(out_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the latest checkpoint, read with the safetensors library alone."""
    tensors = {}
    for file in sorted(CheckpointStore(out_dir).pointed("latest").glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def losses(out_dir: Path) -> dict[int, float]:
    """step → loss over all logs of a folder, a later log's line replacing an earlier one's."""
    found = {}
    for log in sorted(out_dir.glob("run_*.jsonl"), key=lambda path: path.stat().st_mtime_ns):
        for line in log.read_text().splitlines():
            event = json.loads(line)
            if event["event"] == "step":
                found[event["step"]] = event["loss"]
    return found


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other) and len(losses(one)) == 40
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []


EVERY = list(itertools.product(("float32", "bfloat16"), ("adamw", "muon"), ("none", "full")))


@pytest.mark.parametrize(
    "dtype, optimizer, checkpointing",
    [pytest.param(*run, marks=() if number in (0, 3, 5, 6) else pytest.mark.slow) for number, run in enumerate(EVERY)],
)  # by default each value with each other one once
def test_resume_continues_bit_for_bit(tmp_path, tiny_dataset, dtype, optimizer, checkpointing):
    options = (f"--dtype={dtype}", f"--optimizer={optimizer}", f"--activation_checkpointing={checkpointing}")
    assert run(tmp_path / "whole", tiny_dataset, *options, "--max_iters=40", "--eval_interval=0") == 0
    parts = (*options, "--eval_interval=7", "--save_interval=11")
    assert run(tmp_path / "parts", tiny_dataset, *parts, "--max_iters=15") == 0
    torch.manual_seed(0)  # whatever happens to the global random state in between
    assert run(tmp_path / "parts", tiny_dataset, *parts, "--max_iters=40", "--init_from=resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resume_from_fp16_continues_the_loss_scale(tmp_path, tiny_dataset):
    assert run(tmp_path / "whole", tiny_dataset, "--dtype=float16", "--max_iters=40") == 0
    assert run(tmp_path / "parts", tiny_dataset, "--dtype=float16", "--max_iters=15") == 0
    assert run(tmp_path / "parts", tiny_dataset, "--dtype=float16", "--max_iters=40", "--init_from=resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert float(weights(tmp_path / "whole")["loss_scale.scale"]) > 1


def test_a_run_that_changes_to_fp16_begins_with_a_loss_scale_and_one_that_leaves_it_has_none(tmp_path, tiny_dataset):
    short = ("--max_iters=2", "--lr_decay_iters=40")
    assert run(tmp_path / "fresh", tiny_dataset, "--dtype=float16", *short) == 0
    assert run(tmp_path / "to", tiny_dataset, "--dtype=float32", *short) == 0
    assert run(tmp_path / "to", tiny_dataset, "--dtype=float16", "--max_iters=4", "--init_from=resume") == 0
    expected = float(weights(tmp_path / "fresh")["loss_scale.scale"])
    assert float(weights(tmp_path / "to")["loss_scale.scale"]) == expected > 1
    assert run(tmp_path / "to", tiny_dataset, "--dtype=bfloat16", "--max_iters=6", "--init_from=resume") == 0
    assert float(weights(tmp_path / "to")["loss_scale.scale"]) == 1


def test_resume_without_a_config(tmp_path, tiny_dataset):
    assert run(tmp_path / "whole", tiny_dataset, "--max_iters=40") == 0
    assert run(tmp_path / "parts", tiny_dataset, "--max_iters=15") == 0
    assert train.main(["--init_from=resume", f"--out_dir={tmp_path / 'parts'}", "--max_iters=40"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_the_split_of_the_global_batch_may_change_at_a_resume(tmp_path, tiny_dataset):
    """3 × 2 and 1 × 6 sequences are the same six, so the losses agree up to rounding."""
    fp32 = ("--dtype=float32", "--dropout=0.0")
    assert run(tmp_path / "whole", tiny_dataset, *fp32, "--max_iters=40") == 0
    assert run(tmp_path / "parts", tiny_dataset, *fp32, "--max_iters=15") == 0
    assert (
        run(
            tmp_path / "parts",
            tiny_dataset,
            *fp32,
            "--max_iters=40",
            "--init_from=resume",
            "--batch_size=6",
            "--gradient_accumulation_steps=1",
        )
        == 0
    )
    one, other = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert max(abs(one[step] - other[step]) for step in one) < 1e-4


def start(out_dir: Path, dataset: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [preloaded_python(), "train.py", *SMALL, f"--dataset={dataset}", f"--out_dir={out_dir}", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_stop_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, tiny_dataset, number):
    process = start(
        tmp_path / "parts", tiny_dataset, "--max_iters=100000", "--lr_decay_iters=100000", "--eval_interval=0", "--keep_last=1"
    )
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert signal.Signals(number).name in out
    command = next(line for line in out.splitlines() if line.startswith("To go on: "))
    assert "--resume" in command and str(tmp_path / "parts") in command
    stopped_at = json.loads((CheckpointStore(tmp_path / "parts").pointed("latest") / "state.json").read_text())["step"]
    assert stopped_at == max(losses(tmp_path / "parts"))
    assert (
        run(
            tmp_path / "parts",
            tiny_dataset,
            f"--max_iters={stopped_at + 3}",
            "--lr_decay_iters=100000",
            "--eval_interval=0",
            "--init_from=resume",
        )
        == 0
    )
    assert (
        run(tmp_path / "whole", tiny_dataset, f"--max_iters={stopped_at + 3}", "--lr_decay_iters=100000", "--eval_interval=0")
        == 0
    )
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def kill_and_resume(tmp_path: Path, dataset: Path, kills: int, seed: int) -> None:
    """Kill -9 a run at random moments, some of them while it saves, resuming each time; compare with one left alone."""
    options = ("--max_iters=40", "--eval_interval=0", "--save_interval=3", "--keep_last=2")
    assert run(tmp_path / "whole", dataset, *options) == 0
    chance, alive_when_killed = random.Random(seed), 0
    for done in range(kills):
        process = start(tmp_path / "parts", dataset, *options, "--init_from=auto")
        writing = tmp_path / "parts" / "checkpoints"
        if done % 2:  # in the middle of a save: as soon as a folder is being written (unless the run ends before)
            while process.poll() is None and not list(writing.glob(".writing_*")):
                time.sleep(0.0005)
            time.sleep(chance.random() * 0.02)
        else:  # some time after its first step
            for line in process.stdout:
                if line.startswith("step "):
                    break
            time.sleep(chance.random() * 0.3)
        process.kill()
        process.communicate()
        alive_when_killed += process.returncode == -signal.SIGKILL
    assert run(tmp_path / "parts", dataset, *options, "--init_from=auto") == 0
    assert alive_when_killed >= kills / 2, "the runs ended before they were killed; make them longer"
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    left = [p.name for p in (tmp_path / "parts" / "checkpoints").iterdir() if p.name.startswith(".")]
    assert left == []


def test_kill_minus_9_loses_nothing(tmp_path, tiny_dataset):
    kill_and_resume(tmp_path, tiny_dataset, kills=4, seed=0)


@pytest.mark.slow
def test_ten_kills_lose_nothing(tmp_path, tiny_dataset):
    kill_and_resume(tmp_path, tiny_dataset, kills=10, seed=1)


def test_a_checkpoint_of_the_first_order_of_the_data_goes_on_in_it(tmp_path, tiny_dataset, monkeypatch):
    """Issue 10.18: state.json of earlier versions names no order; the run goes on in that of version 1, a new run does not."""
    from training.data_loader import WindowOrder

    with monkeypatch.context() as earlier:
        earlier.setattr(WindowOrder, "VERSION", 1)
        assert run(tmp_path / "whole", tiny_dataset, "--max_iters=40") == 0
        assert run(tmp_path / "parts", tiny_dataset, "--max_iters=15") == 0
    checkpoint = CheckpointStore(tmp_path / "parts").pointed("latest")
    state, manifest = (json.loads((checkpoint / name).read_text()) for name in ("state.json", "manifest.json"))
    assert state["dataset"].pop("order") == 1
    content = json.dumps(state).encode()
    (checkpoint / "state.json").write_bytes(content)
    manifest["files"]["state.json"].update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    for _ in range(2):  # what goes on stores the order it goes on in
        assert run(tmp_path / "parts", tiny_dataset, "--max_iters=25", "--init_from=resume") == 0
    assert run(tmp_path / "parts", tiny_dataset, "--max_iters=40", "--init_from=resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert run(tmp_path / "new", tiny_dataset, "--max_iters=40") == 0
    assert losses(tmp_path / "new") != losses(tmp_path / "whole")
