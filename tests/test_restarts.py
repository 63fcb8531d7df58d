"""Restarts by torchrun and SLURM go on with what the same launch has saved, and with nothing else. Issue 10.2."""

from __future__ import annotations

import json

import pytest
from conftest import TINY_RUN

import convert
import train

LAUNCHED = dict(TORCHELASTIC_RUN_ID="launch-1", TORCHELASTIC_RESTART_COUNT="1")


def start_again(dataset, out_dir, monkeypatch, *flags: str, **environment: str) -> int:
    """train.py as torchrun or SLURM starts it again: with its variables, in this process."""
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return train.main([*TINY_RUN, "--save_interval=2", f"--dataset={dataset}", f"--out_dir={out_dir}", *flags])


def steps_of_last_run(out_dir) -> list[int]:
    log = max(out_dir.glob("run_*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    return [event["step"] for event in map(json.loads, log.read_text().splitlines()) if event["event"] == "step"]


@pytest.mark.parametrize("start", ["scratch", "weights", "hf"])
def test_a_restart_goes_on_with_what_its_launch_saved_however_it_began(tmp_path, tiny_dataset, monkeypatch, start):
    """Issue 10.2: each restart began at the weights, or at nothing, again, and put the real checkpoints aside."""
    flags = []
    if start != "scratch":
        assert train.main([*TINY_RUN, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path / 'base'}", "--max_iters=1"]) == 0
        flags = [f"--init_from=weights:{tmp_path / 'base'}"]
    if start == "hf":
        assert convert.main([str(tmp_path / "base"), str(tmp_path / "folder"), "--no_check"]) == 0
        flags = [f"--init_from=hf:{tmp_path / 'folder'}"]
    out = tmp_path / "out"
    first, again = dict(LAUNCHED, TORCHELASTIC_RESTART_COUNT="0"), LAUNCHED
    assert start_again(tiny_dataset, out, monkeypatch, "--max_iters=4", *flags, **first) == 0
    assert start_again(tiny_dataset, out, monkeypatch, "--max_iters=6", *flags, **again) == 0
    assert steps_of_last_run(out) == [5, 6] and not (out / "checkpoints.previous").exists()


@pytest.mark.parametrize(
    "now, goes_on",
    [
        (dict(LAUNCHED), True),
        (dict(LAUNCHED, TORCHELASTIC_RESTART_COUNT="0"), False),  # a new start with the same name
        (dict(LAUNCHED, TORCHELASTIC_RUN_ID="launch-2"), False),  # an older run's checkpoint
        (dict(SLURM_JOB_ID="77", SLURM_RESTART_COUNT="1"), True),  # the job was put back into the queue
        (dict(SLURM_JOB_ID="78", SLURM_RESTART_COUNT="1"), False),
        (dict(SLURM_JOB_ID="77"), False),
        (dict(SLURM_JOB_ID="77", SLURM_RESTART_COUNT="1", TORCHELASTIC_RUN_ID="new", TORCHELASTIC_RESTART_COUNT="1"), True),
        ({}, False),
    ],
)
def test_only_a_restart_of_the_same_launch_goes_on_by_itself(tmp_path, tiny_dataset, monkeypatch, now, goes_on):
    """Issue 10.2: never with an older run's checkpoint; that one is put aside, as a start from scratch does."""
    first = dict(TORCHELASTIC_RUN_ID="launch-1", TORCHELASTIC_RESTART_COUNT="0", SLURM_JOB_ID="77")
    assert start_again(tiny_dataset, tmp_path, monkeypatch, "--max_iters=2", **first) == 0
    assert start_again(tiny_dataset, tmp_path, monkeypatch, "--max_iters=3", **now) == 0
    assert steps_of_last_run(tmp_path) == ([3] if goes_on else [1, 2, 3])
    assert (tmp_path / "checkpoints.previous").exists() != goes_on


def test_a_restart_with_nothing_saved_yet_begins_as_configured(tmp_path, tiny_dataset, monkeypatch):
    """Issue 10.2: with --resume=auto that is an older run's last checkpoint, without it nothing."""
    assert start_again(tiny_dataset, tmp_path, monkeypatch, "--max_iters=2", TORCHELASTIC_RUN_ID="older") == 0
    assert start_again(tiny_dataset, tmp_path, monkeypatch, "--max_iters=3", "--resume=auto", **LAUNCHED) == 0
    assert steps_of_last_run(tmp_path) == [3]
