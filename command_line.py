"""What everything else stands on: how commands parse, fail and choose a device; numbers and tables for a terminal.

Imports nothing of the project, so every module may import it.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PROJECT = Path(__file__).resolve().parent  # the folder of the programs, config/ and data/
OUT_OF_MEMORY = (
    "Out of memory. Halve --batch_size and double --gradient_accumulation_steps (the result stays the "
    "same), or use --activation_checkpointing=full."
)


# ------------------------------------------------------------------------------------------- failing


class UsageError(ValueError):
    """The command line or configuration cannot be used; one sentence a line. Exit code 2."""


class Failure(Exception):
    """A file, a disk, a dataset or a run is not as it has to be; the message says which, why, what to do. Exit code 1."""


class Parser(argparse.ArgumentParser):
    """argparse that raises UsageError where it would print and exit."""

    def error(self, message: str):
        raise UsageError(f"{message}; --help shows what can be given.")


def guarded(
    program: str,
    argv: list[str],
    job: Callable[[], int],
    memory_advice: str = OUT_OF_MEMORY,
    may_say: Callable[[str], bool] = lambda text: True,
    rank: int | None = None,
) -> int:
    """Run a command's job and return its exit code, turning an exception into its sentence on stderr.

    2 for a UsageError, 130 after Ctrl-C, 0 when the reader of stdout has gone (`| head`), 1 for anything else. With
    --debug in argv the exception is raised on, with its traceback. Of several processes (`rank`: which this is) each
    sentence is printed by the one that `may_say` lets, and what nobody expected with its traceback and rank.
    """
    try:
        return job()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if "--debug" in argv and rank is None:
            raise
        text = error_text(error, memory_advice)
        if may_say(text):
            if rank is not None and ("--debug" in argv or not is_expected(error)):
                traceback.print_exc()
            for line in text.split("\n"):
                print(f"{program}: {'' if rank is None else f'[rank {rank}] '}{line}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def is_expected(error: Exception) -> bool:
    """Whether the error's own sentence says all there is to say."""
    return isinstance(error, (UsageError, Failure, OSError))


def error_text(error: Exception, memory_advice: str) -> str:
    """An exception as the sentence a user can act on; one of an unexpected kind keeps its type's name."""
    import torch

    text = str(error)
    if is_expected(error):
        return text
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return memory_advice
    return f"{type(error).__name__}: {text} (--debug shows where)"


# ------------------------------------------------------------------------------------------- the device


def choose_device(name: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """'auto' → the GPU if there is one, else the CPU; else the device of that name. UsageError if it is not there.

    Of several processes on one machine (local_size) each gets a GPU of its own. A GPU becomes the process's current one.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and local_size > 1:
        if name != "cuda":
            raise UsageError(
                f"device={name!r} is one GPU, but there are {local_size} processes on this machine; use --device=cuda."
            )
        if local_size > torch.cuda.device_count():
            raise UsageError(
                f"{local_size} processes were started on this machine, which has {torch.cuda.device_count()} GPUs; "
                "use --nproc_per_node=gpu, or --device=cpu."
            )
        name = f"cuda:{local_rank}"
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":  # whatever is then said to "the current GPU" (events, synchronisation) is said to this one
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise UsageError(f"device={name!r} cannot be used here: {reason}. Use --device=cpu.") from error


# ------------------------------------------------------------------------------------------- numbers and tables


def short(number: float | None) -> str:
    """A number in four digits and a letter: 362.8K, 124.4M, 1.294B, 8.341T. None: –."""
    if number is None:
        return "–"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"


def duration(seconds: float) -> str:
    """Seconds in words: '45 s', '12 min', '3.4 h', '2.1 days'."""
    for size, unit, digits in ((86400, "days", 1), (3600, "h", 1), (60, "min", 0 if seconds >= 600 else 1)):
        if seconds >= size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def text_table(header: Sequence[str], rows: Iterable[Sequence[object]], align: str = "lr") -> str:
    """A table for the terminal: the header, a line of dashes, the rows, each column as wide as its longest cell.

    align: 'l' or 'r' for each column; the last letter holds for all columns after it. Nothing is padded at the end of a
    line, and below a last column of text the dashes are as long as its header, so that long texts do not widen it.
    """
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    sides = align[: len(widths)].ljust(len(widths), align[-1])
    lines = [
        "  ".join(text.rjust(width) if side == "r" else text.ljust(width) for text, width, side in zip(row, widths, sides))
        for row in cells
    ]
    dashes = [*widths[:-1], len(header[-1]) if sides[-1] == "l" else widths[-1]]
    lines.insert(1, "  ".join("-" * width for width in dashes))
    return "\n".join(line.rstrip() for line in lines)


def labelled(rows: Iterable[tuple[str, object]], width: int = 11) -> str:
    """Lines of a label and what it stands for; the texts begin in one column."""
    return "\n".join(f"{label:<{width}}{text}" for label, text in rows)
