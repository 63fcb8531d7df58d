"""How a run ends when something is wrong: it says so, its exit code says so, and nothing good is lost."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN

import command_line
import train
from training import objectives, saving, signals
from training.checkpoint import CheckpointStore, load_model
from training.precision import SkipCounter, dropout_seed
from training.processes import World
from training.signals import StopRequest


def run(dataset: Path, out_dir: Path, *flags: str) -> int:
    return train.main([*TINY_RUN, f"--dataset={dataset}", f"--out_dir={out_dir}", *flags])


def events(out_dir: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for log in sorted(out_dir.glob("run_*.jsonl")) for line in log.read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


# ------------------------------------------------------------------------------------------- diverged


@pytest.fixture
def spoil(monkeypatch):
    """spoil(after): the loss of training and evaluation is NaN after so many forward passes."""
    original = objectives.next_token_loss

    def spoil(after: int) -> None:
        calls = [0]

        def spoiled(model, inputs, targets):
            calls[0] += 1
            return original(model, inputs, targets) * (math.nan if calls[0] > after else 1.0)

        monkeypatch.setattr(objectives, "next_token_loss", spoiled)

    return spoil


def test_a_run_whose_last_loss_is_not_finite_fails(tmp_path, tiny_dataset, capsys, spoil):
    """Issue 10.9: it ended "finished", exit code 0."""
    spoil(after=3)
    assert run(tiny_dataset, tmp_path, "--max_iters=5", "--eval_interval=0") == 1
    assert "not finite" in capsys.readouterr().err
    assert events(tmp_path, "run_end")[0]["outcome"] == "diverged" and CheckpointStore(tmp_path).pointed("latest") is None


def test_a_run_that_skipped_every_update_fails(tmp_path, tiny_dataset, capsys, monkeypatch):
    """Issue 10.9: the weights are the initial ones, and the validation loss is finite."""
    monkeypatch.setattr(train, "clip_and_check", lambda *_: (torch.tensor(math.inf), torch.tensor(1.0)))
    assert run(tiny_dataset, tmp_path, "--max_iters=4") == 1
    assert "All 4 updates were skipped" in capsys.readouterr().err


def test_weights_that_are_not_finite_never_become_the_latest(tmp_path, tiny_dataset, capsys):
    """Issue 10.9: a learning rate that overflows fp32 at its first step."""
    assert run(tiny_dataset, tmp_path, "--max_iters=2") == 0
    latest = CheckpointStore(tmp_path).pointed("latest")
    flags = ("--learning_rate=1e38", "--max_iters=6", "--save_interval=1", "--weight_decay=1e6", "--eval_interval=0")
    assert run(tiny_dataset, tmp_path / "other", *flags) == 1
    assert "not finite" in capsys.readouterr().err
    assert events(tmp_path / "other", "run_end")[0]["outcome"] == "diverged"
    for store in (CheckpointStore(tmp_path), CheckpointStore(tmp_path / "other")):
        for checkpoint in store.all():
            assert all(torch.isfinite(p).all() for p in load_model(checkpoint)[0].parameters())
    assert CheckpointStore(tmp_path).pointed("latest") == latest


def test_the_limit_of_skipped_updates_acts_within_its_number_of_steps(tmp_path, tiny_dataset, capsys, spoil):
    """Issue 10.9: 49 steps were wasted until the next line of the log."""
    spoil(after=2)
    flags = ("--nonfinite_limit=3", "--log_interval=50", "--max_iters=100", "--eval_interval=0")
    assert run(tiny_dataset, tmp_path, *flags) == 1
    (end,) = events(tmp_path, "run_end")
    assert (end["outcome"], end["step"], end["skipped"]) == ("diverged", 5, 3)


def test_on_a_cpu_the_streak_is_known_at_once():
    skips = SkipCounter(torch.device("cpu"))
    seen = []
    for skipped in (0.0, 1.0, 1.0, 0.0, 1.0):
        skips.update(torch.tensor(skipped))
        seen.append(skips.in_a_row())
    assert seen == [0, 1, 2, 0, 1] and skips.read() == (3, 1)


# ------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"])
def test_every_way_to_end_a_run_saves_its_step_first(tmp_path, tiny_dataset, monkeypatch, capfd, name):
    """Issue 10.10: a lost terminal (SIGHUP) and SIGQUIT saved nothing."""
    original, calls = objectives.next_token_loss, []

    def interrupted(model, inputs, targets):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), getattr(signal, name))
        return original(model, inputs, targets)

    monkeypatch.setattr(objectives, "next_token_loss", interrupted)
    former = [signal.getsignal(getattr(signal, each)) for each in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")]
    assert run(tiny_dataset, tmp_path, "--max_iters=50", "--eval_interval=0") == 0
    assert events(tmp_path, "run_end")[0]["outcome"] == "stopped"
    assert CheckpointStore(tmp_path).pointed("latest").name == "step_000000003"
    assert [signal.getsignal(getattr(signal, each)) for each in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")] == former
    said = "finishing the step and saving; again to stop without saving" in capfd.readouterr().err
    assert said == (name == "SIGINT")


def test_a_hangup_that_is_ignored_stays_ignored():
    """Issue 10.10: as under nohup."""
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and not stop.requested()
    finally:
        signal.signal(signal.SIGHUP, former)


def test_the_first_ctrl_c_is_answered_at_once_and_the_second_ends_the_run(capfd):
    """Issue 10.10."""
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert "finishing the step and saving; again to stop without saving" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested() and stop.name == "SIGINT"
    with StopRequest(World(rank=1, size=1)):  # not the process that speaks
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == ""
    assert signals.SAVES == (signal.SIGUSR1,)


# ------------------------------------------------------------------------------------------- a folder that is gone


@pytest.mark.parametrize("rescue", [False, True])
def test_an_out_dir_that_was_deleted_ends_the_run_and_its_state_can_be_rescued(
    tmp_path, tiny_dataset, monkeypatch, capsys, rescue
):
    """Issue 10.11: events were lost at exit code 0, without a warning."""
    original, calls = objectives.next_token_loss, []

    def removing(model, inputs, targets):
        calls.append(1)
        if len(calls) == 3:
            shutil.rmtree(tmp_path / "out")
        return original(model, inputs, targets)

    monkeypatch.setattr(objectives, "next_token_loss", removing)
    monkeypatch.setattr(saving, "LOOK_INTERVAL", 0.0)  # a second is many of these steps
    flags = [f"--rescue_dir={tmp_path / 'safe'}"] if rescue else []
    assert run(tiny_dataset, tmp_path / "out", "--max_iters=50", "--eval_interval=0", *flags) == 1
    err = capsys.readouterr().err
    assert "is gone" in err and "Traceback" not in err and len(calls) < 10
    if rescue:
        assert f"--out_dir={tmp_path / 'safe'} --resume" in err
        monkeypatch.setattr(objectives, "next_token_loss", original)
        assert run(tiny_dataset, tmp_path / "safe", "--max_iters=6", "--eval_interval=0", "--resume") == 0
        assert [event["step"] for event in events(tmp_path / "safe", "step")][-1] == 6
    else:
        assert "--rescue_dir=" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_events_that_a_full_disk_swallowed_are_said_and_the_exit_code_is_1(tmp_path, tiny_dataset, monkeypatch, capsys):
    """Issue 10.11."""
    import training_logger

    original = training_logger.TrainingLogger._append

    def full(self, line: bytes) -> None:
        if b'"step": 2' in line or self._pending[0] != line:
            raise OSError(28, "No space left on device")
        original(self, line)

    monkeypatch.setattr(training_logger.TrainingLogger, "_append", full)
    assert run(tiny_dataset, tmp_path, "--max_iters=4", "--eval_interval=0") == 1
    err = capsys.readouterr().err
    assert "are lost" in err and "No space left on device" in err and "Traceback" not in err


def test_checkpoints_that_cannot_be_written_are_noticed_at_the_start(tmp_path, tiny_dataset, capsys):
    """Issue 10.11: here a file stands where the folder should be, which stops root as well."""
    (tmp_path / "checkpoints").write_text("")
    assert run(tiny_dataset, tmp_path, "--max_iters=4") == 1
    err = capsys.readouterr().err
    assert "checkpoints" in err and "Traceback" not in err and not events(tmp_path, "step")


# ------------------------------------------------------------------------------------------- devices and seeds


def test_a_chosen_gpu_is_the_current_one(monkeypatch):
    """Issue 10.4: with --device=cuda:1 copies were waited for on GPU 0, and the meter timed it."""

    class OnTheGpu:
        device = torch.device("cuda:1")

    current = []
    monkeypatch.setattr(torch, "empty", lambda *_, device: OnTheGpu() if device == "cuda:1" else pytest.fail(device))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert command_line.choose_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]


def test_no_process_has_the_dropout_of_a_neighbouring_seed():
    """Issue 10.16: rank 1 of seed s had the stream of rank 0 of seed s + 1, which is ablate.py's next repetition."""
    streams = {(seed, rank): dropout_seed(seed, rank) for seed in range(1330, 1345) for rank in range(64)}
    assert len(set(streams.values())) == len(streams)
    assert all(dropout_seed(seed, 0) == seed for seed in (0, 1337, 2**63 - 1))
    assert all(0 <= value < 2**63 for value in streams.values())
    torch.manual_seed(dropout_seed(2**63 - 1, 5))  # what it is for
