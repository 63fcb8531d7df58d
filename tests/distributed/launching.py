"""Runs of train.py in several processes, to be killed, signalled and looked at: started fast, or by torchrun.

`Launcher` keeps a server that has imported everything and forks: a group of two stands in a second instead of ten. The
forked processes are told who they are as torchrun tells them, and do what `train.py` does as a script. As under torchrun
a process of its own holds their key-value store, so that it outlives each of them.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from tests.conftest import TINY_RUN
from tests.preloaded import finish

ROOT = Path(__file__).resolve().parents[2]
ALONE = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
LONGEST = 300.0  # seconds after which a group is killed, whatever a test does

SMALL = (*TINY_RUN, "--batch_size=2", "--gradient_accumulation_steps=2", "--dropout=0.1")

# What each process does in its 4th step: 2 micro-batches a step over 2 processes are one in each.
IN_STEP_4 = """
import time, training.objectives
original, calls = training.objectives.next_token_loss, []
def next_token_loss(*arguments):
    calls.append(1)
    if len(calls) == 4:
        {}
    return original(*arguments)
training.objectives.next_token_loss = next_token_loss"""


class Group:
    """The processes of one run. What they print goes into one file each for stdout and stderr, as on a terminal."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def pids(self) -> list[int]:
        """Of each rank, dead or alive; waits until they are known."""
        wait_for(lambda: (self.folder / "pids").exists(), 120, "the processes to start")
        return json.loads((self.folder / "pids").read_text())

    @property
    def out(self) -> str:
        """What they have printed so far."""
        return (self.folder / "stdout").read_text()

    @property
    def err(self) -> str:
        """What they have printed on stderr so far."""
        return (self.folder / "stderr").read_text()

    def send(self, number: int, *ranks: int) -> None:
        """A signal to these ranks, all if none is named. Those that are gone need none."""
        for rank in ranks or range(len(self.pids)):
            if rank not in self.codes:
                try:
                    os.kill(self.pids[rank], number)
                except ProcessLookupError:
                    pass

    @property
    def complaints(self) -> list[str]:
        """The lines on stderr, without those that PyTorch's own C++ code writes."""
        return [
            line for line in self.err.splitlines() if line.strip() and not line.startswith(("[", "frame #", "Exception raised"))
        ]

    @property
    def codes(self) -> dict[int, int]:
        """rank → exit code (minus the signal that ended it) of those that have ended."""
        return {int(file.suffix[1:]): int(file.read_text()) for file in self.folder.glob("code.*")}

    def wait(self, timeout: float = 60) -> list[int]:
        """The exit codes by rank, once all have ended. AssertionError with what they printed if they do not."""
        size = len(self.pids)
        wait_for(lambda: len(self.codes) == size, timeout, lambda: f"the processes to end:\n{self.out}{self.err}")
        return [code for _, code in sorted(self.codes.items())]

    def wait_for_line(self, start: str, timeout: float = 60) -> str:
        """Wait for a line of stdout that starts so, and return it."""

        def found() -> str | None:
            lines = (line for line in self.out.splitlines(keepends=True) if line.endswith("\n"))
            return next((line.rstrip() for line in lines if line.startswith(start)), None)

        wait_for(lambda: found() or len(self.codes) == len(self.pids), timeout, lambda: f"{start!r}:\n{self.out}{self.err}")
        assert (line := found()), f"ended without {start!r}:\n{self.out}{self.err}"
        return line


class Launcher:
    """Starts groups of processes. A context manager: at its end nothing it started is left."""

    def __enter__(self) -> Launcher:
        self.folder = tempfile.TemporaryDirectory(prefix="groups_")
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, **ALONE},
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_) -> None:
        self.server.stdin.close()
        self.server.wait()
        self.folder.cleanup()

    def start(self, *arguments: object, size: int = 2, inject: str = "") -> Group:
        """`train.py` with these arguments in `size` processes.

        inject: Python that each of them runs first; it finds its `RANK` (and `SIZE`).
        """
        group = Group(Path(tempfile.mkdtemp(dir=self.folder.name)))
        for name in ("stdout", "stderr"):
            (group.folder / name).touch()
        self.server.stdin.write(
            json.dumps(dict(folder=str(group.folder), arguments=[*map(str, arguments)], size=size, inject=inject)) + "\n"
        )
        self.server.stdin.flush()
        return group

    def run(self, *arguments: object, size: int = 2, inject: str = "", timeout: float = 60) -> Group:
        """The same, waited for."""
        group = self.start(*arguments, size=size, inject=inject)
        group.wait(timeout)
        return group


@functools.cache
def shared_launcher() -> Launcher:
    """One launcher for all tests of a session."""
    launcher = Launcher().__enter__()
    atexit.register(launcher.__exit__)
    return launcher


def torchrun(
    *arguments: object, size: int = 2, options: tuple[str, ...] = (), script: object = "train.py", **popen
) -> subprocess.Popen:
    """`torchrun` itself, as a user starts it, in a process group of its own."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={size}",
            *options,
            str(script),
            *map(str, arguments),
        ],
        cwd=ROOT,
        env={**os.environ, **ALONE},
        text=True,
        start_new_session=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen},
    )


def children(pid: int) -> list[int]:
    """The processes that a process has started and that run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = status.read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(status.parent.name))
    return sorted(found)


def wait_for(condition: Callable[[], object], timeout: float, what: str | Callable[[], str], every: float = 0.01) -> None:
    """Wait until the condition holds; AssertionError that says what did not come after so many seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s for {what if isinstance(what, str) else what()}"
        time.sleep(every)


# ------------------------------------------------------------------------------------------- the server


def serve() -> None:
    """Read one order a line; fork an agent for each, which forks the ranks. A rank returns from here, to run and exit."""
    import torch._dynamo
    import torch.distributed.checkpoint.hf_storage
    import torch.distributed.fsdp
    import torch.distributed.tensor  # noqa: F401  all of it imported once, before any thread is started

    import training_logger  # noqa: F401
    from model_builder import build_model
    from model_config import resolve

    build_model(resolve("llama", n_layer=1, n_head=1, n_embd=8, vocab_size=8), device="meta")
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
    gc.freeze()  # its objects are not visited, and so not copied, in the forked processes
    agents = []
    for line in sys.stdin:
        order = json.loads(line)
        if (pid := os.fork()) == 0:
            os.setsid()
            os.close(0)
            return agent(**order)
        agents.append(pid)
    for pid in agents:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)


def agent(folder: str, arguments: list[str], size: int, inject: str) -> None:
    """Fork the ranks, hold their store, note how each ends, and leave none behind."""
    import torch.distributed as dist

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(size):
        if (pid := os.fork()) == 0:
            return be_rank(rank, size, port, Path(folder), arguments, inject)
        pids.append(pid)
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=LONGEST))

    def end(*_) -> None:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)

    running = {pid: rank for rank, pid in enumerate(pids)}
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGALRM, end)
    signal.alarm(int(LONGEST))
    write(Path(folder) / "pids", json.dumps(pids))
    while running:
        pid, status = os.wait()
        write(Path(folder) / f"code.{running.pop(pid)}", str(os.waitstatus_to_exitcode(status)))
    del store
    os._exit(0)


def be_rank(rank: int, size: int, port: int, folder: Path, arguments: list[str], inject: str) -> None:
    """Become one rank: what torchrun puts into the environment, then train.py as a script."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: do not outlive the agent
    for name, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(folder / name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.open(os.devnull, os.O_RDONLY)  # stdin
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    sys.argv[:] = ["train.py", *arguments]
    exec(compile(inject, "<injected>", "exec"), {"RANK": rank, "SIZE": size})
    import train

    finish(lambda: sys.exit(train.leave(train.main(arguments))))


def write(path: Path, text: str) -> None:
    """Write a file that is complete whenever it is there."""
    aside = path.with_name("." + path.name)
    aside.write_text(text)
    aside.replace(path)


if __name__ == "__main__":
    serve()
