"""Tensors that several processes hold parts of: who writes which part, and filling them again, however they are split then.

A part is this process's shard of a tensor, or the whole of one that is not sharded. Parts that several processes hold alike
(under ddp and hsdp) are written by one of them. Each process writes files of its own:

    shard-00002-model-00001-of-00003.safetensors        the second process's first file of three

and tensors of different kinds (model, optimizer, other) lie in different files, so that the model can be read alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from training.parallelism import local
from training.tensor_files import SUFFIX, Moved, Stored, Written, nobody_asks, read_header, read_into, write_tensors

FILE_BYTES = 1 << 30  # a file is closed at about this size, so that several can be read at a time
Offsets = tuple[int, ...]


def kind_of(name: str) -> str:
    """What kind of tensor this is by its name: 'model', 'optimizer', or 'other' (loss scale, random states)."""
    kind = name.split(".")[0]
    return kind if kind in ("model", "optimizer") else "other"


def own_part(tensor: Tensor) -> tuple[Offsets, Tensor]:
    """This process's part of a tensor, and where it begins in the whole."""
    if not hasattr(tensor, "__create_chunk_list__"):  # not a DTensor
        return (0,) * tensor.ndim, tensor.detach()
    (chunk,) = tensor.__create_chunk_list__()
    return tuple(chunk.offsets), local(tensor.detach())


def threads() -> int:
    """How many files are read at a time."""
    return min(8, os.cpu_count() or 1)


# ------------------------------------------------------------------------------------------- writing

Held = dict[str, tuple[Offsets, int]]  # of one process: name → (where its part begins, its bytes)


def held(tensors: Mapping[str, Tensor]) -> Held:
    """What this process holds of these tensors; not what is empty, as where there are more processes than rows."""
    parts = {name: own_part(tensor) for name, tensor in tensors.items()}
    return {
        name: (offsets, part.numel() * part.element_size())
        for name, (offsets, part) in parts.items()
        if part.numel() or not tensors[name].numel()
    }


def share_out(everyones: Sequence[Held]) -> list[dict[str, int]]:
    """What each process writes, from what each holds (by rank): name → number of the file, counted from 1.

    Of the processes that hold the same part, the one with the fewest bytes so far writes it. Every process comes to the
    same result.
    """
    holders: dict[str, dict[Offsets, list[int]]] = {}
    for rank, parts in enumerate(everyones):
        for name, (offsets, _) in parts.items():
            holders.setdefault(name, {}).setdefault(offsets, []).append(rank)
    written: list[dict[str, int]] = [{} for _ in everyones]
    load, number, filled, kind = [0] * len(everyones), 1, 0, None
    for name, parts in holders.items():
        largest = max(everyones[ranks[0]][name][1] for ranks in parts.values())
        if filled and (filled + largest > FILE_BYTES or kind_of(name) != kind):
            number, filled = number + 1, 0
        filled, kind = filled + largest, kind_of(name)
        for ranks in parts.values():
            rank = min(ranks, key=load.__getitem__)
            load[rank] += everyones[rank][name][1]
            written[rank][name] = number
    return written


def write_shards(
    folder: Path,
    tensors: Mapping[str, Tensor],
    rank: int,
    plan: Sequence[dict[str, int]],
    must_be_finite: Callable[[str], bool],
    note: Callable[[Path, list[str], Written], None],
    moved: Moved,
) -> None:
    """Write what the plan of `share_out` gives this rank; `note` hears of each file, with the names in it."""
    count = max((number for files in plan for number in files.values()), default=1)
    names: dict[int, list[str]] = {}
    for name, number in plan[rank].items():
        names.setdefault(number, []).append(name)
    for number, inside in names.items():
        parts = {name: own_part(tensors[name]) for name in inside}
        path = folder / f"shard-{rank + 1:05d}-model-{number:05d}-of-{count:05d}{SUFFIX}"
        written = write_tensors(
            path,
            {name: part for name, (_, part) in parts.items()},
            offsets={name: offsets for name, (offsets, _) in parts.items()},
            must_be_finite=must_be_finite,
            moved=moved,
        )
        note(path, inside, written)


# ------------------------------------------------------------------------------------------- reading


class StoredTensors:
    """The tensors in some safetensors files, put together from the parts that the files hold.

    Raises OSError, or ValueError with the reason, where the files do not hold whole tensors.
    """

    def __init__(self, files: Iterable[Path]):
        self.parts: dict[str, list[Stored]] = {}
        for path in files:
            try:
                for stored in read_header(path):
                    self.parts.setdefault(stored.name, []).append(stored)
            except ValueError as error:
                raise ValueError(f"{path.name} cannot be read: {error}") from error
        for name, parts in self.parts.items():
            alike = {(part.dtype, len(part.shape)) for part in parts}
            if len(alike) > 1 or sum(math.prod(part.shape) for part in parts) != math.prod(self.shape(name)):
                raise ValueError(f"the parts of {name} do not make up one tensor")

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        reach = [[at + length for at, length in zip(part.offsets, part.shape)] for part in self.parts[name]]
        return tuple(map(max, zip(*reach)))

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored."""
        return self.parts[name][0].dtype

    def load(self, into: Mapping[str, Tensor], moved: Moved = nobody_asks) -> None:
        """Fill this process's part of each of these tensors, which have the stored shapes, from the parts in the files."""
        jobs: dict[Path, list[tuple[Stored, Offsets, Tensor]]] = {}
        for name, tensor in into.items():
            offsets, target = own_part(tensor)
            for stored in self.parts[name]:
                begin = [max(pair) for pair in zip(offsets, stored.offsets)]
                end = [min(a + m, b + n) for a, m, b, n in zip(offsets, target.shape, stored.offsets, stored.shape)]
                if all(a < b for a, b in zip(begin, end)):
                    box = target[tuple(slice(a - at, b - at) for a, b, at in zip(begin, end, offsets))]
                    first = tuple(a - at for a, at in zip(begin, stored.offsets))
                    jobs.setdefault(stored.path, []).append((stored, first, box))

        def read(path: Path) -> None:
            with open(path, "rb", buffering=0) as file:
                for stored, first, box in sorted(jobs[path], key=lambda job: job[0].begin):
                    try:
                        read_into(file, stored, first, box, moved)
                    except ValueError as error:
                        raise ValueError(f"{path.name} cannot be read: {error}") from error

        with ThreadPoolExecutor(threads()) as pool:
            list(pool.map(read, jobs))
