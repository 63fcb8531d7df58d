"""safetensors files as streams: written piece by piece with a running checksum, read range by range.

A file is 8 bytes with the length of the header, the header (JSON: name → dtype, shape and place of the data) and the data
(https://huggingface.co/docs/safetensors). The safetensors library copies what it writes and reads through a memory map,
whose pages count as memory of the process; here both take a few pieces of memory, whatever the size of the file, and
what is written need not be read again for its checksum. A file may hold a part of a tensor: where it begins in the whole is
in the header's metadata, as torch.distributed.checkpoint writes and reads it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

SUFFIX = ".safetensors"
PIECE_BYTES = 16 << 20  # written, hashed and read at a time
_WRITEBACK_BYTES = 64 << 20  # after so many bytes the disk is told to begin
_LARGEST_HEADER = 100 << 20  # as the safetensors library has it
_SHARDING, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # of torch.distributed.checkpoint's header metadata

DTYPES = {  # in the order of the safetensors library, by which it also orders what is in a file
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WITH_NON_FINITE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Moved = Callable[[], None]  # called after each piece that was written or read: this process gets on


def nobody_asks() -> None:
    """No one wants to know that a piece was moved."""


@dataclass(frozen=True)
class Stored:
    """A tensor, or a part of one, as a file holds it."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # of this part
    offsets: tuple[int, ...]  # where this part begins in the whole tensor
    begin: int  # position of its first byte in the file

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    """What is known of a file that was just written."""

    bytes: int
    sha256: str
    not_finite: tuple[str, ...]  # tensors with an infinity or a NaN among those that were to be checked


# ------------------------------------------------------------------------------------------- writing


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    offsets: Mapping[str, Sequence[int]] | None = None,
    metadata: Mapping[str, str] | None = None,
    fetch: Callable[[str], Tensor] | None = None,
    must_be_finite: Callable[[str], bool] = lambda name: False,
    moved: Moved = nobody_asks,
) -> Written:
    """Write tensors, of any device, to a new file; when this returns, it is on the disk for good.

    offsets: name → where each begins in its whole tensor, if they are parts. fetch: gives the tensor of a name when it is
    its turn; `tensors` then only say shapes and dtypes, and may be on the meta device. must_be_finite: whether a tensor of
    this name is looked through for numbers that are not finite. Raises OSError.
    """
    place = list(DTYPES.values()).index
    in_order = sorted(tensors, key=lambda name: (-place(tensors[name].dtype), name))  # each begins at a multiple of its size
    not_finite = []
    with HashedStream(path, moved) as stream:
        stream.write(_header(tensors, in_order, offsets, metadata))
        for name in in_order:
            finite, check = True, must_be_finite(name)
            for piece in pieces((fetch(name) if fetch else tensors[name]).detach()):
                finite = finite and (not check or is_finite(piece))
                stream.write(as_bytes(piece))
            if not finite:
                not_finite.append(name)
    return Written(stream.size, stream.sha256, tuple(not_finite))


def _header(
    tensors: Mapping[str, Tensor],
    in_order: Sequence[str],
    offsets: Mapping[str, Sequence[int]] | None,
    metadata: Mapping[str, str] | None,
) -> bytes:
    about = dict(metadata or {})
    if offsets is not None:
        sharding = json.dumps({name: {_OFFSETS: list(offsets[name])} for name in in_order})
        about |= {"format": "pt", "DCP_VERSION": "1.0", _SHARDING: sharding}
    header: dict[str, object] = {"__metadata__": about} if about else {}
    end = 0
    for name in in_order:
        tensor, begin = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_streamed(
    folder: Path,
    tensors: Iterator[tuple[str, Tensor]],
    file_bytes: int,
    metadata: Mapping[str, str] | None = None,
    written: Callable[[Path, list[str], Written], None] = lambda path, names, written: None,
) -> tuple[list[tuple[Path, list[str]]], int]:
    """(name, tensor) pairs → files of about file_bytes; no more than one file's worth is in memory.

    Returns the files with the names in each, and the bytes of all tensors; `written` hears of each file when it is done.
    """
    files: list[tuple[Path, list[str]]] = []
    waiting: dict[str, Tensor] = {}
    filled, total = 0, 0

    def write() -> None:
        path = folder / f"part-{len(files) + 1:05d}{SUFFIX}"
        files.append((path, list(waiting)))
        written(path, list(waiting), write_tensors(path, waiting, metadata=metadata))

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if waiting and filled + size > file_bytes:
            write()
            waiting, filled = {}, 0
        waiting[name] = tensor
        filled, total = filled + size, total + size
    if waiting:
        write()
    return files, total


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor in order, in contiguous pieces of about PIECE_BYTES in host memory; a CPU tensor's are not copied."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return
    if size <= PIECE_BYTES or tensor.ndim == 0:
        yield tensor.contiguous().cpu()
        return
    rows = PIECE_BYTES * len(tensor) // size
    for part in tensor.split(max(rows, 1)):
        if rows:
            yield part.contiguous().cpu()
        else:
            yield from pieces(part[0])


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    flat = tensor.as_strided((tensor.numel(),), (1,))  # reshape keeps the stride of a dimension of one
    return memoryview(flat.view(torch.uint8).numpy())


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither an infinity nor a NaN; true for dtypes that have none."""
    if tensor.dtype not in _WITH_NON_FINITE or tensor.numel() == 0:
        return True
    least, most = torch.aminmax(tensor)  # one pass; both are NaN where any number is
    return bool(torch.isfinite(least) & torch.isfinite(most))


class HashedStream:
    """A new file and the sha256 of what is written to it, which a thread computes meanwhile. A context manager.

    The disk is told to begin early, so that it works all the time; when the context ends without an exception, all is on
    the disk for good, and `size` and `sha256` (hex) are known.
    """

    def __init__(self, path: Path, moved: Moved = nobody_asks):
        self.path, self.size, self.sha256, self._moved = path, 0, "", moved
        self._digest, self._told = hashlib.sha256(), 0

    def __enter__(self) -> HashedStream:
        self._file = open(self.path, "wb")
        self._thread = ThreadPoolExecutor(1)
        self._hashing = self._thread.submit(int)  # nothing yet
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Write these bytes, which must not change before the next write has returned."""
        before, self._hashing = self._hashing, self._thread.submit(self._digest.update, data)
        self._file.write(data)
        self.size += len(data)
        if self.size - self._told >= _WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
            self._file.flush()
            os.posix_fadvise(self._file.fileno(), self._told, self.size - self._told, os.POSIX_FADV_DONTNEED)
            self._told = self.size
        before.result()
        self._moved()

    def __exit__(self, kind, *_) -> None:
        self._thread.shutdown()
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        self.sha256 = self._digest.hexdigest()
        self._moved()


# ------------------------------------------------------------------------------------------- reading


def read_header(path: Path) -> list[Stored]:
    """What a file holds. Raises OSError, or ValueError with the reason why it is not a safetensors file."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ValueError("it is too short for a safetensors file")
        header = json.loads(file.read(length))
    try:
        sharding = header.pop("__metadata__", {}).get(_SHARDING)
        sharding = json.loads(sharding) if sharding else {}
        found = []
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            offsets = tuple(sharding[name][_OFFSETS]) if sharding else (0,) * len(shape)
            stored = Stored(path, name, DTYPES[entry["dtype"]], shape, offsets, 8 + length + begin)
            whole = begin >= 0 and end - begin == stored.bytes and 8 + length + end <= size
            if not whole or min((*shape, *offsets, 0)) < 0 or len(offsets) != len(shape):
                raise ValueError(f"its header contradicts itself about {name}")
            found.append(stored)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"its header is not one of a safetensors file ({type(error).__name__}: {error})") from error
    return found


def read_into(file: BinaryIO, stored: Stored, first: Sequence[int], target: Tensor, moved: Moved = nobody_asks) -> None:
    """Fill `target`, of any device and dtype, with the box of its shape that begins at `first` in a stored part.

    file: the part's, opened without a buffer. Raises OSError, or ValueError where the file ends early.
    """
    shape, first = (stored.shape, first) if stored.shape else ((1,), (0,))
    target = target if target.ndim else target.view(1)
    if target.numel() == 0:
        return
    row = stored.dtype.itemsize * math.prod(shape[1:])
    rows = min(len(target), max(1, PIECE_BYTES // row))
    whole_rows = target.shape[1:] == torch.Size(shape[1:])
    in_place = whole_rows and target.dtype == stored.dtype and target.device.type == "cpu" and target.is_contiguous()
    buffer = None if in_place else torch.empty((rows, *shape[1:]), dtype=stored.dtype)
    inside = tuple(slice(start, start + length) for start, length in zip(first[1:], target.shape[1:]))
    file.seek(stored.begin + first[0] * row)
    for piece in target.split(rows):
        into = piece if buffer is None else buffer[: len(piece)]
        _fill(file, as_bytes(into), stored)
        if buffer is not None:
            piece.copy_(into[(slice(None), *inside)])
        moved()


def _fill(file: BinaryIO, memory: memoryview, stored: Stored) -> None:
    done = 0
    while done < len(memory):
        count = file.readinto(memory[done:])
        if not count:
            raise ValueError(f"it ends within {stored.name}")
        done += count
