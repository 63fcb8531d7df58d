"""What bf16 and fp16 mean here: fp32 master weights, cast where they are used; the residual stream in the compute dtype.

Norm statistics, softmax, loss and reductions are fp32 whatever the compute dtype (model_components.py, objectives.py).
"""

from __future__ import annotations

import hashlib
from collections import deque

import torch
from torch import Tensor, nn


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Make the model's residual stream, and with it every matrix product, run in `dtype`."""
    model.compute_dtype = dtype


def dropout_seed(seed: int, data_rank: int) -> int:
    """The seed of a process's random stream: the run's own for the first, one that no other seed leads to for the others.

    Neighbouring seeds are what repetitions of a study use, so a sum of seed and rank would give two runs the same streams.
    """
    if data_rank == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{data_rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018): the loss is multiplied so that small gradients survive.

    A non-finite gradient halves the scale, `interval` good steps in a row double it. All of it stays on the device: no
    host sync. With any other dtype the scale is 1 and never moves.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, start: float = 2.0**16, interval: int = 2000):
        self.enabled, self.interval = dtype == torch.float16, interval
        self.scale = torch.tensor(start if self.enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, skipped: Tensor) -> None:
        """Account for one step; skipped is 1.0 where its gradient was not finite, else 0.0."""
        if not self.enabled:
            return
        self.good_steps = torch.where(skipped > 0, 0.0, self.good_steps + 1)
        grow = self.good_steps >= self.interval
        self.scale = torch.where(skipped > 0, self.scale / 2, torch.where(grow, self.scale * 2, self.scale))
        self.good_steps = torch.where(grow, 0.0, self.good_steps)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: copies, so that loading into them leaves it to `load` what to take over."""
        return {"scale": self.scale.clone(), "good_steps": self.good_steps.clone()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from a checkpoint's tensors (ignored where this run does not scale)."""
        if self.enabled and float(state["scale"]) != 1.0:
            self.scale, self.good_steps = (state[key].to(self.scale.device) for key in ("scale", "good_steps"))


class SkipCounter:
    """Counts skipped updates on the device: in all, and in a row. Reading it is a host sync; `in_a_row` is none."""

    LAG = 2  # steps that `in_a_row` is behind on a GPU, so that the host need not wait for the step at work

    def __init__(self, device: torch.device, total: int = 0, streak: int = 0):
        self.total = torch.tensor(float(total), device=device)
        self.streak = torch.tensor(float(streak), device=device)
        self._on_gpu = device.type == "cuda"
        self._copies: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def update(self, skipped: Tensor) -> None:
        """Account for one step; skipped is 1.0 or 0.0."""
        self.total = self.total + skipped
        self.streak = (self.streak + 1) * skipped
        if self._on_gpu:
            copy, done = torch.empty((), pin_memory=True), torch.cuda.Event()
            copy.copy_(self.streak, non_blocking=True)
            done.record()
            self._copies.append((copy, done))

    def in_a_row(self) -> int:
        """Updates skipped in a row, on a GPU as of LAG steps ago: the same number in every process."""
        if not self._on_gpu:
            return int(self.streak)
        found = 0
        while len(self._copies) > self.LAG:
            copy, done = self._copies.popleft()
            done.synchronize()
            found = int(copy)
        return found

    def read(self) -> tuple[int, int]:
        """(skipped in all, skipped in a row up to now)."""
        return int(self.total), int(self.streak)
