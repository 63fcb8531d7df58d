"""Time, throughput and memory of the training steps, without evaluation and saving."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager

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
