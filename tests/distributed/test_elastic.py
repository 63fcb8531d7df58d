"""Machines that join a run while it trains: torchrun --nnodes=1:2. Issue 10.15."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

import train
from tests.conftest import TINY_RUN
from tests.distributed.chaos import joined
from tests.distributed.launching import ALONE, ROOT, SMALL, wait_for
from training import starting

CURE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture
def started_by(monkeypatch):
    """started_by(*arguments): this process's parent is a `torchrun` with these arguments, as far as the system says."""
    parents = []

    def start(*arguments: str, name: str = "torchrun") -> None:
        command = [name, "-ISc", "import sys; print(flush=True); sys.stdin.read()", *arguments]
        parents.append(subprocess.Popen(command, executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        parents[-1].stdout.readline()  # it runs
        monkeypatch.setattr(os, "getppid", lambda: parents[-1].pid)

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "grow")
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "PET_NNODES", *CURE):
        monkeypatch.delenv(name, raising=False)
    yield start
    for parent in parents:
        parent.communicate()


needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@needs_proc
@pytest.mark.parametrize(
    "arguments, environment, warned",
    [
        (["--nnodes=1:2"], {}, True),
        (["--nnodes", "2:4"], {}, True),
        ([], {"PET_NNODES": "1:8"}, True),
        (["--nnodes=1:2"], CURE, False),
        (["--nnodes=2"], {}, False),
        (["--nnodes=2:2"], {}, False),
        (["--standalone"], {}, False),
    ],
)
def test_a_range_of_machines_without_the_variable_is_warned_about(started_by, monkeypatch, arguments, environment, warned):
    started_by(*arguments)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in text for text in starting.launch_warnings()] == [True] * warned


@needs_proc
def test_only_torchrun_is_an_agent_and_each_has_a_name_of_its_own(started_by, monkeypatch):
    started_by()
    first = starting.agent()
    assert first == starting.agent() is not None
    started_by()
    assert starting.agent() not in (first, None)
    started_by("--nnodes=1:2", name="bash")  # a script that starts several runs one after the other
    assert starting.agent() is None and starting.launch_warnings() == []
    started_by()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert starting.agent() is None


@needs_proc
def test_a_start_for_a_new_machine_goes_on_though_torchrun_does_not_count_it(started_by, tmp_path, tiny_dataset, monkeypatch):
    """With init_from=scratch, the default, the run began at step 1 again and put its checkpoints aside when a machine joined."""

    def steps(max_iters: int) -> list[int]:
        flags = [*TINY_RUN, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path}", f"--max_iters={max_iters}"]
        assert train.main(flags) == 0
        log = max(tmp_path.glob("run_*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
        return [line["step"] for line in map(json.loads, log.read_text().splitlines()) if line["event"] == "step"]

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    started_by()
    assert steps(2) == [1, 2]
    assert steps(4) == [3, 4]
    started_by()  # another torchrun with the same --rdzv-id
    assert steps(1) == [1] and (tmp_path / "checkpoints.previous").exists()


@pytest.mark.slow
@pytest.mark.parametrize("flags", ([], ["--resume=auto"]), ids=("scratch", "resume=auto"))
def test_a_machine_that_joins_loses_no_step(tmp_path, tiny_dataset, flags):
    """Two torchruns, the second one started when the first one trains: two processes go on from the step that one had."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run, out = [*SMALL, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path / 'out'}", *flags], tmp_path / "out"
    run += ["--max_iters=100000", "--save_interval=0", "--eval_interval=0"]
    options = ["--nnodes=1:2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}"]
    options += ["--rdzv_id=grow", "--rdzv-conf=last_call_timeout=1"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "train.py", *run]
    torchruns = []

    def start(name: str) -> None:
        with open(tmp_path / f"{name}.out", "w") as printed, open(tmp_path / f"{name}.err", "w") as complained:
            where = dict(stdout=printed, stderr=complained, cwd=ROOT, start_new_session=True)
            torchruns.append(subprocess.Popen(command, env={**os.environ, **ALONE, **CURE}, **where))

    def said() -> str:
        return "".join((tmp_path / f"{name}.{end}").read_text() for name in "ab" for end in ("out", "err"))

    def logs() -> list[list[dict]]:
        files = [file.read_text().split("\n")[:-1] for file in out.glob("run_*.jsonl")]
        return sorted((list(map(json.loads, lines)) for lines in files if lines), key=lambda log: log[0]["time"])

    try:
        start("a")
        wait_for(lambda: any(line["event"] == "step" for log in logs() for line in log), 240, "the first to train")
        start("b")
        wait_for(lambda: len(logs()) == 2 and logs()[1][-1]["event"] == "step", 240, lambda: f"both to train:\n{said()}")
        for torchrun in torchruns:
            torchrun.terminate()
        for torchrun in torchruns:
            torchrun.wait(120)
    finally:
        for torchrun in torchruns:
            if torchrun.poll() is None:
                torchrun.kill()
    alone, together = logs()
    assert alone[-1]["outcome"] == "stopped" and together[0]["resumed_from"]["step"] == alone[-1]["step"] > 0
    assert (alone[0]["world_size"], together[0]["world_size"]) == (1, 2), said()
    steps = list(joined(out)["step"])
    assert steps == list(range(1, steps[-1] + 1)) and steps[-1] > alone[-1]["step"]
    assert not (out / "checkpoints.previous").exists() and "joins this run" not in said()
