"""What the commands share: how they fail, and which device they use."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable

OUT_OF_MEMORY = (
    "Out of memory. Halve --batch_size and double --gradient_accumulation_steps (the result stays the "
    "same), or use --activation_checkpointing=full."
)


class UsageError(ValueError):
    """The command line or configuration cannot be used; one sentence a line. Exit code 2."""


class Failure(Exception):
    """Something in the world is not as it has to be (a file, a disk, a run); the message says which, why, what to do."""


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
        text = explain(error, memory_advice)
        if may_say(text):
            if rank is not None and ("--debug" in argv or not is_expected(error)):
                traceback.print_exc()
            for line in text.split("\n"):
                print(f"{program}: {'' if rank is None else f'[rank {rank}] '}{line}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def is_expected(error: Exception) -> bool:
    """Whether the error's own sentence says all there is to say."""
    from data.token_dataset import DatasetError

    return isinstance(error, (UsageError, Failure, DatasetError, OSError))


def explain(error: Exception, memory_advice: str) -> str:
    """An exception as the sentence a user can act on; one of an unexpected kind keeps its type's name."""
    import torch

    text = str(error)
    if is_expected(error):
        return text
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return memory_advice
    return f"{type(error).__name__}: {text} (--debug shows where)"


def choose_device(name: str, local_rank: int = 0, local_size: int = 1):
    """'auto' → the GPU if there is one, else the CPU; else the device of that name. UsageError if it is not there.

    Of several processes on one machine (local_size) each gets a GPU of its own.
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
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise UsageError(f"device={name!r} cannot be used here: {reason}. Use --device=cpu.") from error
