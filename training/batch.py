"""A batch: named tensors that belong together row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from model_parts.losses import IGNORE


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


def next_token_batch(windows: Tensor, eos_id: int | None = None) -> Batch:
    """Windows of consecutive tokens (B, T + 1) → inputs (B, T) and targets (B, T), which are the inputs shifted by one.

    eos_id: documents that end with this id are kept apart. `documents` (B, T) then numbers those of each window from 0 on,
    and the eos id itself has no target, since what follows it is of another document.
    """
    inputs, targets = windows[:, :-1], windows[:, 1:]
    if eos_id is None:
        return Batch(inputs=inputs, targets=targets)
    ends = inputs == eos_id
    documents = ends.cumsum(dim=1) - ends.long()  # how many have ended before each token
    return Batch(inputs=inputs, targets=targets.masked_fill(ends, IGNORE), documents=documents)
