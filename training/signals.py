"""SIGTERM and SIGINT ask the loop to finish its step and save; a second SIGINT stops at once."""

from __future__ import annotations

import signal


class StopRequest:
    """Remembers that somebody asked the run to stop. `name` is the signal's name, or None.

    Use as a context manager around the loop: the former handlers come back at its end.
    """

    def __init__(self):
        self.name: str | None = None
        self._former: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._former[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_):
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _received(self, number, frame):
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
