"""Time, throughput and memory of the training steps, without evaluation and saving."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch


class StepMeter:
    """Laps of a step (data, compute, optimizer), averaged over the steps since the last `read()`.

    On a GPU laps are CUDA events, resolved only in `read()`: measuring does not make the host wait in between.
    """

    LAPS = ("data", "compute", "optimizer")

    def __init__(self, device: torch.device, on_lap: Callable[[str], None] = lambda name: None):
        self.device, self.on_lap = device, on_lap  # on_lap(name) is told of every lap as it ends
        self.on_gpu = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Forget what has been measured; time counts from now."""
        self.marks: list[tuple[str, object]] = []
        self.steps = 0
        self.tokens = 0
        self.started = time.perf_counter()
        self.paused = 0.0

    def lap(self, name: str) -> None:
        """What has run since the last lap was `name`; 'start' begins a step."""
        if self.on_gpu:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append((name, mark))
        self.on_lap(name)

    def step_done(self, tokens: int) -> None:
        """One step over this many tokens (of the global batch) is through."""
        self.steps += 1
        self.tokens += tokens

    @contextmanager
    def excluded(self):
        """Time spent inside does not count (evaluation, saving)."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.paused += time.perf_counter() - start

    def read(self) -> tuple[float, dict[str, float]]:
        """(tokens per second, {lap: ms a step, 'total': ms a step}) since the last read, which starts the next period."""
        self._wait()
        seconds = max(time.perf_counter() - self.started - self.paused, 1e-9)
        steps = max(1, self.steps)
        milliseconds = dict.fromkeys(self.LAPS, 0.0)
        for (_, before), (name, after) in zip(self.marks, self.marks[1:]):
            if name != "start":
                passed = before.elapsed_time(after) if self.on_gpu else 1e3 * (after - before)
                milliseconds[name] += passed / steps
        milliseconds["total"] = 1e3 * seconds / steps
        rate = self.tokens / seconds
        self.restart()
        return rate, milliseconds

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def free_memory(device: torch.device, processes: int = 1) -> float:
    """Bytes that this process may still take, where so many share a machine: on a GPU what is free there, else the least of

    its share of what the machine has free, of what a container (cgroup v2 or v1) leaves, and its own limits on data and
    address space.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    mine = [limit - used for limit, used in own_limits()]
    return max(0.0, min([free_of_machine() / processes, *(left / processes for left in left_in_groups()), *mine]))


def free_of_machine() -> float:
    """Bytes that the machine can give without swapping; infinite where that is not known."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not Linux
        return math.inf


def left_in_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[float]:
    """Bytes that each group of this process that has a limit leaves; pages of files can be given back and do not count."""
    found = []
    try:
        entries = [line.strip().split(":", 2) for line in own.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return found
    for _, controllers, path in (entry for entry in entries if len(entry) == 3):
        if controllers == "":
            top, names, cache = root, ("memory.max", "memory.current"), "file"
        elif "memory" in controllers.split(","):
            top, names, cache = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_cache"
        else:
            continue
        parts = Path(path.lstrip("/")).parts
        for folder in [top.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]:
            try:
                limit, used = (int((folder / name).read_text()) for name in names)
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # 'max', or not this process's to see
                continue
            found.append(limit - used + int(stat.get(cache, 0)))
    return found


def own_limits() -> list[tuple[int, int]]:
    """(limit, used) in bytes of the limits that this process has on its data and on its address space."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            used = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmData", "VmSize"))}
    except (OSError, ValueError):
        return []
    limits = {"VmData": resource.RLIMIT_DATA, "VmSize": resource.RLIMIT_AS}
    found = [(resource.getrlimit(limit)[0], used[name]) for name, limit in limits.items() if name in used]
    return [(limit, taken) for limit, taken in found if limit != resource.RLIM_INFINITY]


def peak_memory_gb(device: torch.device) -> float:
    """Most memory this process has used, in GB (10^9 bytes): allocated on the GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:  # Linux; its ru_maxrss is not less
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024 / 1e9  # than the parent's
    except (OSError, StopIteration, ValueError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
