"""Who waits for a checkpoint: the training loop until it is published, or only until its tensors are copied."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.checkpoint import CheckpointStore

Done = Callable[[Path, float], None]  # called in the loop's thread: (path, seconds that it took)


class Saver:
    """Saves while training waits."""

    def __init__(self, store: CheckpointStore):
        self.store = store
        self.failed = False  # a save in the background came to nothing; `wait` raises why

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], done: Done, **options) -> None:
        """Save a checkpoint; options as for CheckpointStore.save. Raises CheckpointError."""
        started = time.perf_counter()
        path = self.store.save(step, tensors, state, **options)
        done(path, time.perf_counter() - started)

    def poll(self) -> None:
        """See whether a save has ended meanwhile."""

    def wait(self) -> None:
        """Let what is under way end. Raises CheckpointError if it failed."""

    def leave(self) -> None:
        """The run ends, however it does: let a save that needs nobody else end before the lock on the folder goes."""


class BackgroundSaver(Saver):
    """Copies the tensors to host memory and saves the copy while training goes on: one save at a time.

    The copies stay, so that later saves need no new memory; they take the size of what this process saves. What the
    processes tell each other while saving goes through a group of its own, so `store.world` must be `beside()` the loop's.
    """

    def __init__(self, store: CheckpointStore):
        super().__init__(store)
        self.copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], done: Done, **options) -> None:
        """Start to save; `done` is called by the `poll` or `wait` that finds it finished."""
        self.wait()
        started = time.perf_counter()
        copies = self._copy(tensors)
        gpu = torch.cuda.current_device() if any(_part(tensor).is_cuda for tensor in tensors.values()) else None

        def job() -> None:
            try:
                if gpu is not None:
                    torch.cuda.set_device(gpu)  # a thread begins on GPU 0, whosever that is
                self._path = self.store.save(step, copies, state, **options)
                self._seconds = time.perf_counter() - started
            except BaseException as error:
                self._error, self.failed = error, True

        self._done = done
        self._thread = threading.Thread(target=job, name="saver")
        self._thread.start()

    def poll(self) -> None:
        if self._thread is not None and not self._thread.is_alive() and not self.failed:
            self.wait()

    def wait(self) -> None:
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._error is not None:
            error, self._error, self.failed = self._error, None, False
            raise error
        self._done(self._path, self._seconds)

    def leave(self) -> None:
        if self._thread is not None and self.store.world.size == 1:
            self._thread.join()

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in host memory, sharded as they are; a sharded one's copy is a DTensor of the same placement."""
        for name, tensor in tensors.items():
            if name not in self.copies or self.copies[name].shape != tensor.shape:
                self.copies[name] = _empty_copy(tensor)
            _part(self.copies[name]).copy_(_part(tensor), non_blocking=True)
        if any(_part(tensor).is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return {name: self.copies[name] for name in tensors}


def _part(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor


def _empty_copy(tensor: Tensor) -> Tensor:
    """Host memory for a copy, pinned where the tensor is on a GPU."""
    part = _part(tensor.detach())
    copy = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
    if not hasattr(tensor, "device_mesh"):
        return copy
    from torch.distributed.tensor import DTensor

    return DTensor(copy, tensor._spec, requires_grad=False)  # the mesh stays: only its shape matters for saving
