"""SIGTERM and SIGINT ask the loop to finish its step, save and stop; SIGUSR1 to save and go on.

Several processes act on it together: one that was asked tells the others at the end of the step. A second SIGINT stops at
once; torchrun passes on the Ctrl-C that its processes have had already, so within ECHO seconds it is the same one.
"""

from __future__ import annotations

import signal
import time

from training.processes import World

ECHO = 2.0


class StopRequest:
    """Remembers what somebody asked of the run. `name` is the signal that stops it, or None; `save` an order to save.

    Use as a context manager around the loop: the former handlers come back at its end.
    """

    def __init__(self, world: World | None = None):
        self.world = world or World()
        self.name: str | None = None
        self.save = False
        self._asked: str | None = None
        self._asked_to_save = False
        self._asked_at = 0.0
        self._former: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
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
        if number == signal.SIGUSR1:
            self._asked_to_save = True
            return
        echo = self.world.grouped and time.monotonic() - self._asked_at < ECHO
        if self._asked is not None and number == signal.SIGINT and not echo:
            raise KeyboardInterrupt
        if self._asked is None:
            self._asked, self._asked_at = signal.Signals(number).name, time.monotonic()
