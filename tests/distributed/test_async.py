"""Saving in the background: the same checkpoints, a failure is not lost, and training waits only for a copy."""

from __future__ import annotations

import json
import re
import signal
import statistics
import time
from pathlib import Path

import pytest

import train
from tests.distributed.launching import SMALL, shared_launcher, wait_for
from training.checkpoint import CheckpointStore, verify

SLOW_DISK = "import os, time; os.fsync = lambda handle: time.sleep(0.1)"


@pytest.fixture
def start(tiny_dataset, tmp_path):
    """start(name, *arguments, **options of Launcher.start) → the running Group, which saves to tmp_path / name."""

    def run(name: str, *arguments: str, **options):
        return shared_launcher().start(
            *SMALL,
            f"--dataset={tiny_dataset}",
            f"--out_dir={tmp_path / name}",
            "--save_interval=5",
            "--parallelism=fsdp",
            "--eval_interval=0",
            *arguments,
            **options,
        )

    return run


def tensors(checkpoint: Path) -> dict[tuple[str, str], bytes]:
    """(file, name) → the bytes of every tensor of an intact checkpoint, read with the safetensors library alone."""
    from safetensors.numpy import load_file

    verify(checkpoint)
    return {
        (file.name, name): array.tobytes() for file in checkpoint.glob("*.safetensors") for name, array in load_file(file).items()
    }


def events(out_dir: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for log in sorted(out_dir.glob("run_*.jsonl")) for line in log.read_text().splitlines()]
    return [line for line in sorted(lines, key=lambda line: line["time"]) if line["event"] == kind]


# ------------------------------------------------------------------------------------------- the same checkpoints


def test_saved_in_the_background_is_the_same_bit_for_bit_and_resumes_alike(start, tmp_path):
    """The copy is of the step that it says, although training changes the weights while it is written."""
    for group in [
        start(name, f"--async_checkpoint={background}", "--max_iters=13", "--keep_last=9", inject=SLOW_DISK)
        for name, background in (("waited", "False"), ("background", "True"))
    ]:
        assert group.wait() == [0, 0] and group.err == "", group.err
    one, other = (CheckpointStore(tmp_path / name).all() for name in ("waited", "background"))
    assert [path.name for path in one] == [path.name for path in other] == ["step_000000005", "step_000000010", "step_000000013"]
    for a, b in zip(one, other):
        assert tensors(a) == tensors(b) and len(tensors(a)) > 40
        mine, theirs = (json.loads((path / "state.json").read_text()) for path in (a, b))
        assert (mine["progress"], mine["model"], mine["dataset"]) == (theirs["progress"], theirs["model"], theirs["dataset"])
    assert [e["step"] for e in events(tmp_path / "background", "checkpoint")] == [5, 10, 13]
    for group in [
        start(name, f"--async_checkpoint={background}", "--max_iters=16", "--init_from=resume")
        for name, background in (("waited", "True"), ("background", "False"))
    ]:  # each in the other way
        assert group.wait() == [0, 0] and group.err == "", group.err
    one, other = (CheckpointStore(tmp_path / name).pointed("latest") for name in ("waited", "background"))
    assert one.name == "step_000000016" and tensors(one) == tensors(other)


def test_one_process_saves_in_the_background_too(tmp_path, tiny_dataset):
    for name, background in (("waited", "False"), ("background", "True")):
        assert (
            train.main(
                [
                    *SMALL,
                    f"--dataset={tiny_dataset}",
                    f"--out_dir={tmp_path / name}",
                    "--save_interval=2",
                    "--max_iters=7",
                    f"--async_checkpoint={background}",
                ]
            )
            == 0
        )
    one, other = (CheckpointStore(tmp_path / name).pointed("latest") for name in ("waited", "background"))
    assert one.name == "step_000000007" and tensors(one) == tensors(other)


# ------------------------------------------------------------------------------------------- nothing is lost


def test_a_kill_during_a_background_save_loses_nothing(start, tmp_path):
    group = start("out", "--async_checkpoint=True", "--max_iters=100000", inject=SLOW_DISK)
    checkpoints = tmp_path / "out" / "checkpoints"
    wait_for(lambda: list(checkpoints.glob(".writing_*10")), 60, "the save of step 10", every=0.001)
    begun = len(events(tmp_path / "out", "step"))
    wait_for(lambda: len(events(tmp_path / "out", "step")) >= begun + 2, 60, "steps meanwhile")
    group.send(signal.SIGKILL)
    assert group.wait() == [-signal.SIGKILL, -signal.SIGKILL]
    assert list(checkpoints.glob(".writing_*10"))  # training went on while it was written
    verify(CheckpointStore(tmp_path / "out").pointed("latest"))
    assert start("out", "--async_checkpoint=True", "--max_iters=12", "--init_from=auto").wait() == [0, 0]
    assert start("whole", "--max_iters=12").wait() == [0, 0]
    assert events(tmp_path / "out", "run_start")[-1]["resumed_from"]["step"] == 5
    assert [path.name for path in checkpoints.iterdir() if path.name.startswith(".")] == []


def test_a_stop_waits_for_the_save_under_way_and_saves_its_own_step(start, tmp_path):
    group = start("out", "--async_checkpoint=True", "--max_iters=100000", inject=SLOW_DISK)
    wait_for(lambda: list((tmp_path / "out" / "checkpoints").glob(".writing_*5")), 60, "a save", every=0.001)
    group.send(signal.SIGTERM, 1)
    assert group.wait() == [0, 0] and group.err == "", group.err
    last = events(tmp_path / "out", "step")[-1]["step"]
    assert [e["step"] for e in events(tmp_path / "out", "checkpoint")][:1] == [5]
    assert CheckpointStore(tmp_path / "out").pointed("latest").name == f"step_{last:09d}"


@pytest.mark.parametrize("rank", (0, 1))
def test_a_failed_background_save_ends_all_processes_with_one_sentence(start, tmp_path, rank):
    fails = f"""
import training.shards
original = training.shards.write_tensors
def write_tensors(path, *arguments, **options):
    if RANK == {rank} and "10" in path.parent.name: raise OSError(28, "No space left on device")
    return original(path, *arguments, **options)
training.shards.write_tensors = write_tensors"""
    group = start("out", "--async_checkpoint=True", "--max_iters=100000", inject=fails)
    assert group.wait(60) == [1, 1]
    assert len(group.complaints) == 1 and re.search("step 10 .*No space left on device.*step_000000005", group.complaints[0])
    assert CheckpointStore(tmp_path / "out").pointed("latest").name == "step_000000005"
    assert not list((tmp_path / "out" / "checkpoints").glob(".writing_*"))


# ------------------------------------------------------------------------------------------- what training waits for

# In one run saves take turns: waited for, in the background, …; each process times what the loop waits.
TAKES_TURNS = """
import json, time
from training.saving import BackgroundSaver, Checkpoints, Saver
original, savers, stalls = Checkpoints.save, [], dict(Saver=[], BackgroundSaver=[])
def save(checkpoints, progress):
    if not savers:
        savers.extend((checkpoints.saver, Saver(checkpoints.saver.store)))
    savers[0].wait()                       # so that no save has to wait for the one before it
    checkpoints.saver = savers[sum(map(len, stalls.values())) % 2]
    started = time.perf_counter()
    original(checkpoints, progress)
    stalls[type(checkpoints.saver).__name__].append(time.perf_counter() - started)
    checkpoints.saver = savers[0]
    open(f"{}/stalls.{{RANK}}", "w").write(json.dumps(stalls))
Checkpoints.save = save"""


def medians(folder: Path) -> dict[str, float]:
    """Of each way to save, how long the slowest process waited, without the first save of its kind."""
    stalls = [json.loads(file.read_text()) for file in sorted(folder.glob("stalls.*"))]
    return {kind: statistics.median(max(times) for times in list(zip(*(s[kind] for s in stalls)))[1:]) for kind in stalls[0]}


def test_training_waits_for_a_copy_only(start, tmp_path):
    """A disk that takes 0.1 s a file: a save waits for each of them, one in the background for none."""
    group = start("out", "--async_checkpoint=True", "--max_iters=30", inject=SLOW_DISK + TAKES_TURNS.format(tmp_path))
    assert group.wait(120) == [0, 0], group.err
    found = medians(tmp_path)
    assert found["Saver"] > 0.4 and found["BackgroundSaver"] < found["Saver"] / 4, found


@pytest.mark.slow
@pytest.mark.parametrize("size", (1, 2))
def test_of_a_large_model_training_waits_for_less_than_a_quarter(tiny_dataset, tmp_path, size):
    """GPT-2's 124M parameters, 1.5 GB a checkpoint; prints the medians."""
    started = time.monotonic()
    group = shared_launcher().run(
        "--arch_preset=gpt2",
        "--vocab_size=50257",
        "--block_size=32",
        "--batch_size=1",
        "--gradient_accumulation_steps=2",
        "--device=cpu",
        "--dtype=float32",
        "--threads=1",
        f"--dataset={tiny_dataset}",
        f"--out_dir={tmp_path / 'out'}",
        "--max_iters=10",
        "--save_interval=1",
        "--eval_interval=0",
        "--eval_iters=1",
        "--async_checkpoint=True",
        "--keep_last=1",
        f"--parallelism={'zero1' if size > 1 else 'none'}",
        size=size,
        inject=TAKES_TURNS.format(tmp_path),
        timeout=280,
    )
    assert set(group.codes.values()) == {0}, group.err
    found = medians(tmp_path)
    print(
        f"\n{size} process(es): waited for {found['Saver']:.2f} s, in the background {found['BackgroundSaver']:.3f} s "
        f"({found['BackgroundSaver'] / found['Saver']:.1%}); {time.monotonic() - started:.0f} s in all"
    )
    assert found["BackgroundSaver"] < found["Saver"] / 4, found
