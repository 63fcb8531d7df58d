"""Signals reach all processes alike; what fails or hangs in one ends all of them, soon, and says who and where."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.launching import IN_STEP_4, ROOT, SMALL, Group, children, shared_launcher, torchrun, wait_for
from training.checkpoint import CheckpointStore, verify

RUN = (*SMALL, "--parallelism=zero1", "--save_interval=5", "--eval_interval=0")
ANSWER = "finishing the step and saving; again to stop without saving"  # to a Ctrl-C, on stderr
SECONDS = 60  # in which a group is down whatever happened: it takes 5 to 7, on a machine that does nothing else

SAYS_WHAT_IT_SAVES = """
from training.saving import Checkpoints
original = Checkpoints.save
def save(checkpoints, progress):
    print(f"rank {RANK} saves step {progress.step}\\n", end="", flush=True)
    original(checkpoints, progress)
Checkpoints.save = save"""


@pytest.fixture
def start(tiny_dataset, tmp_path):
    """start(*arguments, **options of Launcher.start) → the running Group of two processes, which write to tmp_path."""

    def run(*arguments: str, **options) -> Group:
        return shared_launcher().start(*RUN, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path}", *arguments, **options)

    return run


def events(out_dir: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for log in sorted(out_dir.glob("run_*.jsonl")) for line in log.read_text().splitlines()]
    return [line for line in sorted(lines, key=lambda line: line["time"]) if line["event"] == kind]


def saved_step(out_dir: Path) -> int:
    latest = CheckpointStore(out_dir).pointed("latest")
    verify(latest)
    return json.loads((latest / "state.json").read_text())["step"]


# ------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    "number, ranks", ((signal.SIGTERM, (1,)), (signal.SIGINT, (0, 1)), pytest.param(signal.SIGTERM, (0,), marks=pytest.mark.slow))
)
def test_a_stop_signal_to_any_rank_makes_all_finish_the_same_step_save_and_exit_0(start, tmp_path, number, ranks):
    group = start("--max_iters=100000", inject=SAYS_WHAT_IT_SAVES)
    group.wait_for_line("step 6/")
    group.send(number, *ranks)
    assert group.wait(SECONDS) == [0, 0] and group.err.replace(ANSWER, "").strip() == "", group.err
    step = saved_step(tmp_path)
    assert step == events(tmp_path, "step")[-1]["step"]
    assert {line for line in group.out.splitlines() if line.endswith(f"saves step {step}")} == {
        f"rank {rank} saves step {step}" for rank in (0, 1)
    }
    assert events(tmp_path, "run_end")[-1]["outcome"] == "stopped"
    assert "\nTo go on: torchrun --standalone --nproc_per_node=2 train.py " in group.out and "--resume" in group.out


def test_ctrl_c_that_comes_twice_as_torchrun_passes_it_on_is_one_and_a_later_one_stops_at_once(start, tmp_path):
    group = start("--max_iters=100000")
    group.wait_for_line("step 6/")
    for _ in range(3):
        group.send(signal.SIGINT)
        time.sleep(0.02)
    assert group.wait(SECONDS) == [0, 0] and group.err.replace(ANSWER, "").strip() == "", group.err
    assert saved_step(tmp_path) == events(tmp_path, "step")[-1]["step"]
    group = start(
        "--max_iters=100000",
        "--seed=2",
        inject="import training.signals; training.signals.ECHO = 0.2"
        + IN_STEP_4.format("print('asleep', flush=True); time.sleep(60)"),
    )
    group.wait_for_line("asleep")
    group.send(signal.SIGINT)
    time.sleep(0.5)
    group.send(signal.SIGINT)
    codes = group.wait(SECONDS)
    assert 130 in codes and set(codes) <= {130, 1}, (codes, group.err)  # 1: the other one was gone before


def test_usr1_to_any_rank_saves_and_goes_on(start, tmp_path):
    group = start("--max_iters=30", "--save_interval=0", "--keep_last=9")
    group.wait_for_line("step 6/")
    group.send(signal.SIGUSR1, 1)
    assert group.wait() == [0, 0] and group.err == "", group.err
    first, last = CheckpointStore(tmp_path).all()
    assert 6 <= json.loads((first / "state.json").read_text())["step"] < 30 and last.name == "step_000000030"
    assert [event["step"] for event in events(tmp_path, "step")] == list(range(1, 31))


# ------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    "rank, error", ((0, "ZeroDivisionError: on purpose"), (1, "RuntimeError: NCCL, gloo and sockets timed out, says my own code"))
)
def test_a_rank_that_throws_brings_the_group_down_with_its_own_traceback_first(start, tmp_path, rank, error):
    """Issue 10.14: an error that speaks of gloo or NCCL was taken for a lost contact, and had no traceback."""
    kind, text = error.split(": ")
    group = start("--max_iters=100000", inject=IN_STEP_4.format(f"if RANK == {rank}: raise {kind}({text!r})"))
    started = time.monotonic()
    assert group.wait() == [1, 1] and time.monotonic() - started < SECONDS
    lines = group.complaints
    assert lines[0].startswith("Traceback") and lines[-2] == (f"train.py: [rank {rank}] {error} (--debug shows where)")
    assert re.fullmatch(
        rf"train.py: (\[rank {1 - rank}\] )?rank {1 - rank} stops at step \d, because rank {rank} failed\.", lines[-1]
    )
    assert group.err.count("Traceback") == 1
    if rank == 0:
        assert events(tmp_path, "run_end")[-1]["outcome"] == "failed"


@pytest.mark.parametrize("rank", (pytest.param(0, marks=pytest.mark.slow), 1))
def test_a_killed_rank_takes_the_other_one_along_in_seconds_and_one_line(start, tmp_path, rank):
    group = start("--max_iters=100000", inject="" if rank else "import training.watch; training.watch.GRACE = 1")
    group.wait_for_line("step 7/")
    group.send(signal.SIGKILL, rank)
    codes = group.wait(SECONDS)
    assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, 1)
    assert len(group.complaints) == 1 and f"[rank {1 - rank}] rank {1 - rank} lost contact" in group.complaints[0]
    assert "--resume=auto" in group.complaints[0] and saved_step(tmp_path) == 5


# ------------------------------------------------------------------------------------------- the same decisions


def test_evaluations_and_what_they_decide_are_the_same_in_every_process(start, tmp_path):
    """Also when the processes come to a slightly different loss: rank 1's falls every time, rank 0's does not."""
    record = f"""
import json, training.evaluation
from training.saving import Checkpoints
original, seen, due = training.evaluation.mean_loss, [], Checkpoints.due
before = [9.0]  # of the untrained model
def mean_loss(*arguments):
    loss, tokens = original(*arguments)
    return (before.pop() if before else 3.0 + (0 if RANK == 0 else -0.01) * len(seen), tokens)
def recorded(checkpoints, progress):
    saves = due(checkpoints, progress)
    if progress.step % 3 == 0:
        seen.append(dict(progress.to_dict(), best=progress.is_best, due=saves))
        open(f"{tmp_path}/seen.{{RANK}}", "w").write(json.dumps(seen))
    return saves
training.evaluation.mean_loss, Checkpoints.due = mean_loss, recorded"""
    group = start("--max_iters=100", "--eval_interval=3", "--save_interval=0", "--patience=3", inject=record)
    assert group.wait() == [0, 0] and group.err == "", group.err
    one, other = (json.loads((tmp_path / f"seen.{rank}").read_text()) for rank in (0, 1))
    assert one == other and [entry["best"] for entry in one] == [True, False, False, False]
    assert events(tmp_path, "run_end")[-1]["outcome"] == "out of patience"


# ------------------------------------------------------------------------------------------- torchrun itself


def reader(process) -> tuple[list[str], object]:
    """The lines that a process prints, as they come, and a function that waits for one that begins so."""
    import threading

    lines: list[str] = []
    threading.Thread(target=lambda: lines.extend(iter(process.stdout.readline, "")), daemon=True).start()

    def wait_for_line(start: str, after: int = 0) -> None:
        wait_for(lambda: any(line.startswith(start) for line in lines[after:]) or process.poll() is not None, 120, start)
        assert process.poll() is None, "".join(lines) + process.stderr.read()

    return lines, wait_for_line


@pytest.mark.slow  # test_restarts.py tests restarts without torchrun, which takes half a minute here
def test_torchrun_restarts_a_killed_rank_where_it_was_and_passes_sigterm_on(tiny_dataset, tmp_path):
    process = torchrun(
        *RUN,
        f"--dataset={tiny_dataset}",
        f"--out_dir={tmp_path}",
        "--max_iters=100000",
        "--init_from=auto",
        options=("--max-restarts=2",),
    )
    lines, wait_for_line = reader(process)
    wait_for_line("step 7/")
    os.kill(children(process.pid)[1], signal.SIGKILL)
    before = len(lines)
    wait_for_line("step 9/", before)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert process.returncode == 1  # as torchrun has it: the ranks themselves exit 0
    starts = events(tmp_path, "run_start")
    assert [start["resumed_from"] and start["resumed_from"]["step"] for start in starts] == [None, 5]
    assert (
        saved_step(tmp_path) == events(tmp_path, "step")[-1]["step"] and events(tmp_path, "run_end")[-1]["outcome"] == "stopped"
    )
    assert any(line.startswith("To go on: torchrun") for line in lines)


@pytest.mark.slow
def test_ctrl_c_at_the_terminal_of_torchrun_saves(tiny_dataset, tmp_path):
    process = torchrun(*RUN, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path}", "--max_iters=100000")
    lines, wait_for_line = reader(process)
    wait_for_line("step 7/")
    os.killpg(process.pid, signal.SIGINT)  # the terminal sends it to all, and torchrun passes it on
    process.wait(60)
    assert process.returncode == 1 and saved_step(tmp_path) == events(tmp_path, "step")[-1]["step"]
    assert any(line.startswith("stopped after step") for line in lines)


@pytest.mark.slow
def test_torchrun_returns_0_when_a_rank_alone_is_told_to_stop_and_1_after_a_usage_error(tiny_dataset, tmp_path):
    process = torchrun(*RUN, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path}", "--max_iters=100000")
    lines, wait_for_line = reader(process)
    wait_for_line("step 7/")
    os.kill(children(process.pid)[1], signal.SIGTERM)
    assert process.wait(60) == 0 and any(line.startswith("stopped after step") for line in lines)
    process = torchrun("--nonsense=1")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.count("--nonsense is not a key") == 1


SRUN = """#!/bin/bash
# As SLURM's: the command once a node; --signal's SIGTERM goes to every one of them.
shift
for node in $(seq "$SLURM_NNODES"); do "$@" & done
echo $$ > "$FAKE/srun.pid"
trap 'kill -TERM $(jobs -p); wait' TERM
wait
for job in $(jobs -p); do wait "$job"; done
"""


@pytest.mark.slow
def test_the_slurm_script_trains_on_two_nodes_stops_requeues_and_goes_on(tiny_dataset, tmp_path):
    """With srun and scontrol that do on one machine what SLURM's do on two."""
    import subprocess
    import sys

    torchrun = f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    scontrol = '#!/bin/bash\nif [ "$1" = show ]; then echo localhost; else echo "$@" >> "$FAKE/requeued"; fi\n'
    for name, text in (("srun", SRUN), ("scontrol", scontrol), ("torchrun", torchrun)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "FAKE": str(tmp_path),
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "PROCESSES_PER_NODE": "1",
        "OMP_NUM_THREADS": "1",
    }

    def job(*arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", ROOT / "docs" / "slurm.sh", *RUN, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path / 'out'}", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    process = job("--max_iters=100000", "--lr_decay_iters=100000")
    lines, wait_for_line = reader(process)
    wait_for_line("step 7/")
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)
    assert process.wait(120) == 0, "".join(lines)
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    step = saved_step(tmp_path / "out")
    process = job(f"--max_iters={step + 3}", "--lr_decay_iters=100000")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and saved_step(tmp_path / "out") == step + 3, out
    assert (tmp_path / "requeued").read_text().count("requeue") == 1
    starts = events(tmp_path / "out", "run_start")
    assert [start["resumed_from"] and start["resumed_from"]["step"] for start in starts] == [None, step]
    assert {start["world_size"] for start in starts} == {2}


@pytest.mark.slow
def test_orphans_of_a_killed_torchrun_go_on_quietly_and_stop_when_told(tiny_dataset, tmp_path):
    process = torchrun(*RUN, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path}", "--max_iters=100000")
    lines, wait_for_line = reader(process)
    wait_for_line("step 7/")
    workers = children(process.pid)
    process.kill()
    process.wait()
    before = len(lines)
    time.sleep(3)
    assert any(line.startswith("step ") for line in lines[before:])
    os.kill(workers[0], signal.SIGTERM)
    wait_for(lambda: any(line.startswith("stopped after step") for line in lines), 60, "the run to stop")
    assert saved_step(tmp_path) == events(tmp_path, "step")[-1]["step"]
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 60, "the processes to end")
    assert process.stderr.read().count("sendBytes failed") <= 4  # PyTorch's line, twice a process at most
