"""Files that have to be whole: their checksums, writing that survives a power cut, and the error where they are not."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from command_line import Failure

READ_BYTES = 2**20  # read at a time
SAMPLES = 64  # chunks that stand for a file which would take too long to read whole


class DatasetError(Failure):
    """A dataset cannot be used as asked; the message says what, why, and what to do."""


def chunks(path: Path, full: bool = True) -> Iterator[bytes]:
    """The bytes of a file, READ_BYTES at a time: all of them, or SAMPLES chunks spread evenly from its start to its end."""
    size = path.stat().st_size
    offsets = range(0, size, READ_BYTES)
    if not full and len(offsets) > SAMPLES:
        offsets = [offsets[i * (len(offsets) - 1) // (SAMPLES - 1)] for i in range(SAMPLES)]
    with open(path, "rb") as file:
        for offset in offsets:
            file.seek(offset)
            yield file.read(READ_BYTES)


def sha256(path: Path, full: bool = True, moved: Callable[[], None] = lambda: None) -> str:
    """The sha256 of a file in hexadecimal digits; if not `full`, that of the chunks that stand for it.

    moved: called after each chunk, for who wants to know that this gets on.
    """
    digest = hashlib.sha256()
    for chunk in chunks(path, full):
        digest.update(chunk)
        moved()
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Make a file, or the entries of a folder, survive a power cut."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders, and does not need to
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
