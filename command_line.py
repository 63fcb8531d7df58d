"""What everything else stands on: how commands parse, fail and choose a device; numbers and tables for a terminal.

Imports nothing of the project, so every module may import it.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    memory_advice: str | Callable[[], str] = OUT_OF_MEMORY,
    may_say: Callable[[str], bool] = lambda text: True,
    rank: int | None = None,
) -> int:
    """Run a command's job and return its exit code, turning an exception into its sentence on stderr.

    2 for a UsageError, 130 after Ctrl-C, 0 when the reader of stdout has gone (`| head`), 1 for anything else. With
    --debug in argv the exception is raised on, with its traceback. Of several processes (`rank`: which this is) each
    sentence is printed by the one that `may_say` lets, and what nobody expected with its traceback and rank.
    """
    _listen_to_interrupts()
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
                print(f"{program}: {'' if rank is None else f'[rank {rank}] '}{printable(line)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _leave_at_once(number: int, frame: object) -> None:
    os._exit(130)


def _be_quiet_while_importing() -> None:
    """Until a program of this project has imported what it needs, Ctrl-C ends it at once and without a traceback.

    Where these modules are imported by another program, its own way stays.
    """
    program = getattr(sys.modules.get("__main__"), "__file__", None)
    ours = program is not None and Path(program).resolve().parent == PROJECT
    main_thread = threading.current_thread() is threading.main_thread()
    if ours and main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave_at_once)


def _listen_to_interrupts() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


_be_quiet_while_importing()


def is_expected(error: Exception) -> bool:
    """Whether the error's own sentence says all there is to say."""
    return isinstance(error, (UsageError, Failure, OSError))


def is_out_of_memory(error: Exception) -> bool:
    """Whether there was no memory left, on a GPU or here."""
    import torch

    said = ("can't allocate memory", "std::bad_alloc")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in said)


def error_text(error: Exception, memory_advice: str | Callable[[], str]) -> str:
    """An exception as the sentence a user can act on; one of an unexpected kind keeps its type's name."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None and type(error).__str__ is OSError.__str__:
        return system_error(error)
    if is_expected(error):
        return text
    if is_out_of_memory(error):
        try:
            return memory_advice if isinstance(memory_advice, str) else memory_advice()
        except Exception:  # whatever stands in the way of better advice
            return OUT_OF_MEMORY
    return f"{type(error).__name__}: {text} (--debug shows where)"


_REMEDIES = {
    "Free some space, or choose another place": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    "Choose a place that you may write to, or ask for the right to it": (errno.EACCES, errno.EPERM, errno.EROFS),
    "Check the path": (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO),
    "Name a file, not a folder": (errno.EISDIR,),
    "Close other programs, or raise the limit (ulimit -n)": (errno.EMFILE, errno.ENFILE),
    "The disk, or the network to it, fails; try again or choose another place": (errno.EIO, errno.ESTALE, errno.ETIMEDOUT),
}


def system_error(error: OSError) -> str:
    """What the system refused, as a sentence: the path, its reason, and what to do."""
    names = " → ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    advice = next((advice for advice, numbers in _REMEDIES.items() if error.errno in numbers), "")
    return (f"{names}: " if names else "") + f"{error.strerror or error}." + (f" {advice}." if advice else "")


def check_target(option: str, path: str | os.PathLike) -> Path:
    """Raise UsageError unless a file can be written there, which is asked before the work that it is to hold. The path."""
    target = Path(path).expanduser()
    folder = target.absolute().parent
    if target.is_dir():
        raise UsageError(f"{option}={path} is a folder; name a file in it.")
    if not folder.is_dir():
        raise UsageError(f"{option}={path} cannot be written: there is no folder {folder}. Make it, or choose another place.")
    if not os.access(target if target.exists() else folder, os.W_OK):
        raise UsageError(f"{option}={path} cannot be written: permission denied. Choose another place.")
    return target


# ------------------------------------------------------------------------------------------- what others wrote

LARGEST_NUMBER = 1e30  # in a document: beyond it squares and products overflow, and no run has such a figure
LARGEST_COUNT = 10**15  # of tokens, bytes, steps: products of two still fit into what arrays hold as far as anybody forms them
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def parse_json(text: str | bytes, **options: Any) -> Any:
    """json.loads, whose ValueError also answers what is nested deeper than Python follows, and NaN, which is no JSON."""

    def refuse(constant: str) -> None:
        raise json.JSONDecodeError(f"{constant} is no JSON number", "", 0)

    try:
        return json.loads(text, **{"parse_constant": refuse, **options})
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None


def printable(text: str) -> str:
    """Text from a file or a command line as a terminal may have it: control characters as \\x1b, lines and tabs as they are."""
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1] if ord(found[0]) < 256 else f"\\u{ord(found[0]):04x}", text)


class Mandatory:
    """In a declared shape: a value that must be there and must not be null."""

    def __init__(self, shape: Any):
        self.shape = shape


def check_shape(value: Any, shape: Any, where: str = "it") -> None:
    """Hold what a JSON document says against its declared shape. Raises ValueError naming the place, or nothing is wrong.

    shape: int (a whole number from 0 to LARGEST_COUNT), float (any finite number up to LARGEST_NUMBER in size), str, bool,
    object (anything that is no list or object), dict (any object), [shape], {key: shape} where "*" stands for all other
    keys, Mandatory(shape). Null and keys that are missing are fine elsewhere, and so are keys that a shape does not name.
    """
    needed = isinstance(shape, Mandatory)
    shape = shape.shape if needed else shape
    if value is None and not needed:
        return
    if value is None:
        raise ValueError(f"it lacks {where}" if where != "it" else "it is null")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(shape, dict):
        fits, said = isinstance(value, dict), "an object"
    elif isinstance(shape, list):
        fits, said = isinstance(value, list), "a list"
    elif shape is int:
        fits, said = number and isinstance(value, int) and 0 <= value <= LARGEST_COUNT, "a whole number from 0 to 10^15"
    elif shape is float:
        fits, said = number and math.isfinite(value) and abs(value) <= LARGEST_NUMBER, "a finite number of usual size"
    elif shape is object:
        fits, said = not isinstance(value, (dict, list)) and _is_finite(value), "a single finite value"
    else:
        fits = isinstance(value, shape) and (shape is not dict or _is_finite(value))
        said = {str: "text", bool: "true or false", dict: "an object whose numbers are finite"}[shape]
    if not fits:
        given = repr(value)
        raise ValueError(f"{where} is {given[:40]}{' …' * (len(given) > 40)}, not {said}")
    if isinstance(shape, list):
        for number, inner in enumerate(value):
            check_shape(inner, shape[0], f"{where}[{number}]")
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            if key != "*":
                check_shape(value.get(key), inner, f"{where}.{key}" if where != "it" else key)
        for key in value.keys() - shape.keys() if "*" in shape else ():
            check_shape(value[key], shape["*"], f"{where}.{key}" if where != "it" else key)


def _is_finite(value: Any) -> bool:
    """Whether no number in a JSON value is infinite (as 1e999 is read) or not a number."""
    if isinstance(value, (dict, list)):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


# ------------------------------------------------------------------------------------------- the device


def whole_number(text: str) -> int:
    """The type of an argparse option that takes a whole number from 1 on; 1e9 is one."""
    try:
        number = float(text)
        if number != int(number) or number < 1:
            raise ValueError
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on") from None
    return int(number)


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
