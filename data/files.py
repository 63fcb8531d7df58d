"""Files that have to be whole: their checksums, writing that survives a power cut, and the error where they are not."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from command_line import Failure, UsageError

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


@contextmanager
def staged(target: Path, last: str) -> Iterator[Path]:
    """A folder to write in whose files become `target`'s at the end, `last` as the last one; on an error target is as before.

    target is new or empty (UsageError otherwise; what a killed process staged there is removed). Whoever reads target
    finds nothing, or, once `last` is there, everything.
    """
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file; choose a new folder.")
    staging = target / ".writing"
    if target.exists() and any(path != staging for path in target.iterdir()):
        raise UsageError(f"{target} is not empty; choose a new folder.")
    made = [path for path in (target, *target.absolute().parents) if not path.exists()]
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        for path in sorted(staging.iterdir(), key=lambda path: (path.name == last, path.name)):
            path.rename(target / path.name)
        staging.rmdir()
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        remove_empty(made)
        raise


def remove_empty(folders: Iterable[str | Path]) -> None:
    """Remove folders that have nothing in them, the innermost first."""
    for folder in folders:
        with suppress(OSError):
            os.rmdir(folder)
