"""profile=True: a PyTorch trace of a few steps, and the top of it on the terminal."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

SKIPPED, WARM_UP, TRACED, SHOWN = 2, 1, 3, 12  # steps left alone, steps that warm the profiler up, steps traced; rows shown


class NoProfiler:
    """Nothing is traced."""

    def step(self) -> None:
        """A training step has ended."""

    def close(self) -> None:
        """Training has ended."""


class Profiler(NoProfiler):
    """Traces steps SKIPPED + WARM_UP + 1 … + TRACED of this process into out_dir/trace_rank<r>.json.gz.

    The file opens in ui.perfetto.dev or chrome://tracing. `say` prints the operations that took longest; `excluded` is
    the context in which time does not count as training's.
    """

    def __init__(
        self,
        out_dir: str | Path,
        device: torch.device,
        rank: int,
        say: Callable[[str], None],
        excluded: Callable[[], AbstractContextManager] = nullcontext,
    ):
        from torch.profiler import ProfilerActivity, profile, schedule

        self.path, self.say, self.device = Path(out_dir) / f"trace_rank{rank}.json.gz", say, device
        self.written, self.steps, self.excluded = False, 0, excluded
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self.profile = profile(
            activities=activities,
            on_trace_ready=self._write,
            schedule=schedule(wait=SKIPPED, warmup=WARM_UP, active=TRACED, repeat=1),
        )
        self.profile.start()

    def step(self) -> None:
        self.steps += 1
        ends = self.steps == SKIPPED + WARM_UP + TRACED
        with self.excluded() if ends else nullcontext():
            self.profile.step()

    def close(self) -> None:
        self.profile.stop()
        if not self.written:
            self.say(f"profile: the run was too short for a trace; it needs {SKIPPED + WARM_UP + TRACED} steps.")

    def _write(self, profile) -> None:
        profile.export_chrome_trace(str(self.path))
        self.written = True
        by = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        self.say(profile.key_averages().table(sort_by=by, row_limit=SHOWN, max_name_column_width=60))
        self.say(f"profile: {TRACED} steps traced in {self.path} (open it in ui.perfetto.dev)")
