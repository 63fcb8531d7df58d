"""A batch: named tensors that belong together row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from model_parts.losses import IGNORE  # noqa: F401  (for those who fill a batch)


class Batch:
    """Named tensors of any dtype whose first dimension B counts the same sequences: `batch.inputs`, `batch.targets`.

    A dataset or an objective may add more names (positions, document ids, weights); whoever passes a batch on need not
    know them. Raises ValueError where the tensors do not have the same number of rows.
    """

    def __init__(self, **tensors: Tensor):
        rows = {name: len(tensor) for name, tensor in tensors.items()}
        if not rows or len(set(rows.values())) != 1:
            raise ValueError(f"the tensors of a batch need the same number of rows; here they have {rows}.")
        self.tensors = tensors

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["tensors"][name]
        except KeyError:
            raise AttributeError(f"the batch has no {name!r}; it has {', '.join(self.__dict__.get('tensors', {}))}.") from None

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def split(self, rows: int) -> list[Batch]:
        """The same sequences in order, as batches of at most `rows` rows."""
        return [self[first : first + rows] for first in range(0, len(self), rows)]

    def __getitem__(self, rows: slice) -> Batch:
        return Batch(**{name: tensor[rows] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device) -> Batch:
        """The batch on a device. A copy to a GPU goes on while the host continues (from pinned memory)."""
        if device.type != "cuda":
            return self if device.type == "cpu" else Batch(**{name: tensor.to(device) for name, tensor in self.tensors.items()})
        pinned = {name: tensor.contiguous().pin_memory() for name, tensor in self.tensors.items()}
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in pinned.items()})


def next_token_batch(windows: Tensor) -> Batch:
    """Windows of consecutive tokens (B, T + 1) → inputs (B, T) and targets (B, T), which are the inputs shifted by one."""
    return Batch(inputs=windows[:, :-1], targets=windows[:, 1:])
