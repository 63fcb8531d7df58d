"""What bf16 and fp16 mean here: fp32 master weights, cast where they are used; the residual stream in the compute dtype.

Norm statistics, softmax, loss and reductions are fp32 whatever the compute dtype (model_components.py, objectives.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Make the model's residual stream, and with it every matrix product, run in `dtype`."""
    model.compute_dtype = dtype


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
    """Counts skipped updates on the device: in all, and in a row. Reading it is a host sync."""

    def __init__(self, device: torch.device, total: int = 0, streak: int = 0):
        self.total = torch.tensor(float(total), device=device)
        self.streak = torch.tensor(float(streak), device=device)

    def update(self, skipped: Tensor) -> None:
        """Account for one step; skipped is 1.0 or 0.0."""
        self.total = self.total + skipped
        self.streak = (self.streak + 1) * skipped

    def read(self) -> tuple[int, int]:
        """(skipped in all, skipped in a row up to now)."""
        return int(self.total), int(self.streak)
