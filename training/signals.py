"""Signals that ask the loop to stop or to save.

SIGTERM, SIGINT (Ctrl-C), SIGQUIT and SIGHUP (the terminal is gone) ask it to finish its step, save and stop; SIGUSR1 to save
and go on. A SIGHUP that is ignored when the run starts, as under nohup, stays ignored.

Several processes act on it together: one that was asked tells the others at the end of the step. A second SIGINT stops at
once; torchrun passes on the Ctrl-C that its processes have had already, so within ECHO seconds it is the same one.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

from training.processes import World

ECHO = 2.0
STOPS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name))
SAVES = tuple(getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name))


class StopRequest:
    """Remembers what somebody asked of the run. `name` is the signal that stops it, or None; `save` an order to save.

    Use as a context manager around the loop: the former handlers come back at its end. `can_save`: whether the run writes
    checkpoints at all, for what is said at the first Ctrl-C.
    """

    def __init__(self, world: World | None = None, can_save: bool = True):
        self.world, self.can_save = world or World(), can_save
        self.name: str | None = None
        self.save = False
        self._asked: str | None = None
        self._asked_to_save = False
        self._asked_at = 0.0
        self._former: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (*STOPS, *SAVES):
            if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._former[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_):
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def requested(self, failed: bool = False) -> bool:
        """Learn what any process was asked, `name` and `save`; every process calls this. Whether to stop.

        failed: this process has something to raise once all have left the loop (a save in the background came to nothing).
        """
        save, self._asked_to_save = self._asked_to_save, False
        stop, self.save, failed = self.world.any(self._asked is not None, save, failed)
        if stop:
            self.name = self._asked or "a signal to another process"
        return stop or failed

    def _received(self, number, frame):
        if number in SAVES:
            self._asked_to_save = True
            return
        echo = self.world.grouped and time.monotonic() - self._asked_at < ECHO
        if self._asked is not None and number == signal.SIGINT and not echo:
            raise KeyboardInterrupt
        if self._asked is None:
            self._asked, self._asked_at = signal.Signals(number).name, time.monotonic()
            if number == signal.SIGINT and self.world.is_main:
                self._say(
                    "finishing the step and saving; again to stop without saving"
                    if self.can_save
                    else "finishing the step; nothing is saved (save_interval is -1); again to stop at once"
                )

    @staticmethod
    def _say(text: str) -> None:
        """One line on stderr, at once; by the system call, as a signal may come in the middle of a print."""
        with suppress(OSError):  # nobody is listening
            os.write(2, f"\n{text}\n".encode())
