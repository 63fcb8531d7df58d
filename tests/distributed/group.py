"""Running a function in several processes that talk over gloo, with a time limit.

    losses = in_processes(4, train_a_little, "fsdp", timeout=60)      # [rank 0's result, rank 1's, …]

The processes of a group are started once per size and serve every later call (each call with a process group of its
own); a fork server has imported PyTorch before, so that a group starts in well under a second. They end with the
process that started them, however that ends.
"""

from __future__ import annotations

import datetime
import io
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import wait
from typing import Any

import torch.distributed as dist

_ADDRESS = "127.0.0.1"
_LATER = 5.0  # seconds by which a collective may outlast its call: that a call takes too long is said by who asked


class RankFailed(RuntimeError):
    """The function raised in one of the processes; the message is its traceback, with what the rank had printed."""


def in_processes(size: int, function: Callable, *arguments: Any, timeout: float = 60) -> list[Any]:
    """Run function(*arguments) in `size` processes at once, within an initialised gloo group; its results by rank.

    The function is one of a module, arguments and results can be pickled. Each process has one thread. Raises
    RankFailed when one of them fails, TimeoutError, naming the ranks that did not answer, after `timeout` seconds; the
    group is then killed.
    """
    group = _groups.get(size)
    if group is None or not group.alive:
        group = _groups[size] = Group(size)
    return group.run(function, *arguments, timeout=timeout)


def train_in_processes(size: int, *arguments: str, timeout: float = 120) -> None:
    """train.py in `size` processes. Raises RankFailed, with what it has printed, unless all exit with 0."""
    in_processes(size, train_here, arguments, timeout=timeout)


def train_here(arguments: tuple[str, ...]) -> None:
    """train.py in one of them. RuntimeError unless it exits with 0."""
    import train

    code = train.main(list(arguments))
    if code != 0:
        raise RuntimeError(f"train.py exits with {code}")


# ------------------------------------------------------------------------------------------- the starting side


class Group:
    """`size` processes, waiting for work."""

    def __init__(self, size: int):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            [
                "torch.distributed.fsdp",
                "torch.distributed.checkpoint",
                "torch._dynamo",
                "torch.utils.checkpoint",
                "torch.profiler",
                "safetensors.torch",
            ]
        )
        self.size, self.alive = size, True
        self.store = dist.TCPStore(_ADDRESS, 0, is_master=True, wait_for_workers=False)
        self.processes, self.connections = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, self.store.port), daemon=True)
            process.start()
            theirs.close()  # theirs alone now: if they die, ours ends
            self.processes.append(process)
            self.connections.append(mine)

    def run(self, function: Callable, *arguments: Any, timeout: float) -> list[Any]:
        """See `in_processes`."""
        try:
            for connection in self.connections:
                connection.send_bytes(pickle.dumps((function, arguments, timeout)))
            return self._results(timeout)
        except BaseException:  # Ctrl-C too: the processes are in the middle of something
            self.kill()
            raise

    def _results(self, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        while len(results) < self.size:
            waiting = {self.connections[rank]: rank for rank in range(self.size) if rank not in results}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = ", ".join(map(str, waiting.values()))
                raise TimeoutError(f"after {timeout:g} s no answer from rank {silent} of {self.size}")
            answers = {waiting[connection]: _receive(connection) for connection in ready}
            for rank in [rank for rank, answer in answers.items() if answer is None]:  # maybe why others failed
                self.processes[rank].join(1)
                raise RankFailed(f"rank {rank} of {self.size} died, exit code {self.processes[rank].exitcode}")
            for rank, (failed, result) in answers.items():
                if failed:
                    raise RankFailed(f"rank {rank} of {self.size}:\n{result}")
                results[rank] = result
        return [results[rank] for rank in range(self.size)]

    def kill(self) -> None:
        """End the processes at once."""
        self.alive = False
        for process in self.processes:
            process.kill()
        for process, connection in zip(self.processes, self.connections):
            process.join()
            connection.close()


def _receive(connection) -> tuple[bool, Any] | None:
    """(whether it failed, result or traceback), or None if the process is gone."""
    try:
        return pickle.loads(connection.recv_bytes())
    except (EOFError, OSError):
        return None


_groups: dict[int, Group] = {}


# ------------------------------------------------------------------------------------------- the started side


def _serve(connection, rank: int, size: int, port: int) -> None:
    """Do what is asked, until the asking process is gone."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the asking process, which then ends this one
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    store = dist.TCPStore(_ADDRESS, port, is_master=False)
    asked: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_listen, args=(connection, asked), daemon=True).start()
    for number in range(sys.maxsize):
        message, printed = asked.get(), io.StringIO()
        try:
            with redirect_stdout(printed), redirect_stderr(printed):
                function, arguments, timeout = pickle.loads(message)
                torch.set_num_threads(1)
                dist.init_process_group(
                    "gloo",
                    store=dist.PrefixStore(str(number), store),
                    rank=rank,
                    world_size=size,
                    timeout=datetime.timedelta(seconds=timeout + _LATER),
                )
                result = function(*arguments)
                dist.barrier()  # nobody leaves while another still talks
                dist.destroy_process_group()
                answer = pickle.dumps((False, result))
        except BaseException:
            answer = pickle.dumps((True, traceback.format_exc() + printed.getvalue()))
        connection.send_bytes(answer)


def _listen(connection, asked: queue.Queue) -> None:
    while True:
        try:
            asked.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)
