"""A thread that ends a process of a group when the group cannot go on, and says why: who failed, or who hangs and where.

A collective that waits for a dead or stuck process cannot be interrupted from Python; this thread can still speak. Each
process publishes where it is, a few times a second, in the store through which the group met. No two machines' clocks are
compared: a process that is no longer heard of is one whose word has not changed for so long by the clock of who listens.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from command_line import Failure

LOOK_INTERVAL = 0.5  # seconds between two looks at the others
OWN_WORDS = 2.0  # seconds that a process may go on after another one has failed
GRACE = 5.0  # seconds that a process which lost contact waits for the reason to become known
STILL = 1800.0  # seconds in which a process that writes or reads a checkpoint must get on: disks may be slow, but not so slow

_OF_GLOO = re.compile(r"\[[^\]]*gloo[^\]]*:\d+\]")  # how the messages of its C++ code begin
_TOO_LATE = ("timed out", "timeout", "time out")
_LOST = ("closed by peer", "connection reset", "broken pipe", "connection refused", "socket", *_TOO_LATE)


class LostContact(Failure):
    """Another process of the run is gone, or does not answer."""


class Watch(threading.Thread):
    """Looks after this process of a group; see the module."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float):
        super().__init__(name="watch", daemon=True)
        self.store = store.clone() if hasattr(store, "clone") else store
        self.rank, self.size, self.timeout = rank, size, timeout
        self.step, self.doing, self.since = 0, "starting", time.monotonic()
        self.starting = True  # until the first step: what is done once may take long
        self.worker: int | None = None  # the thread that does what the main thread waits for
        self._words = itertools.count()  # that this process has published
        self._heard: dict[int, tuple[str, float]] = {}  # rank → its last word, and since when by our clock
        self._listened = 0.0
        self._closed = threading.Event()
        self.start()

    def at(self, step: int, doing: str) -> None:
        """This process is alive and here, in the loop."""
        self.step, self.doing, self.since, self.starting = step, doing, time.monotonic(), False

    def alive(self) -> None:
        """All processes have answered each other just now."""
        self.since = time.monotonic()

    @contextmanager
    def doing_in(self, thread: threading.Thread, doing: str) -> Iterator[None]:
        """The thread is where to look, and this is what it does, while the main thread only waits for it."""
        if threading.current_thread() is not threading.main_thread():  # what the loop does is said then
            yield
            return
        before, self.doing, self.worker = self.doing, doing, thread.ident
        with suppress(RuntimeError):  # the store is gone
            self._publish()
        try:
            yield
        finally:
            self.doing, self.worker = before, None

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self.join()

    def run(self) -> None:
        """Look, until closed."""
        failed_since = None
        while not self._closed.wait(LOOK_INTERVAL):
            silent = time.monotonic() - self.since
            try:
                self._publish()
                failed = self._failed()
                if failed is None and silent > self.timeout / 4:
                    self._listen()
                if failed is None and silent > self.timeout and (not self.starting or self._gone()):
                    self.give_up("gave up waiting", self.stuck(silent))
            except RuntimeError:  # the store went down with its host: the collectives will say so
                return
            if failed is not None and not failed.startswith(f"{self.rank} "):
                failed_since = failed_since or time.monotonic()
                if time.monotonic() - failed_since < OWN_WORDS:
                    continue  # it may be about to fail for the same reason, with the exit code that belongs to it
                self._end(f"rank {self.rank} stops at step {self.step}, because rank {failed}.")

    def _publish(self) -> None:
        """Tell the others where this process is; each word differs from the one before, so that it is known to be new."""
        self.store.set(f"at/{self.rank}", f"{self.step}\t{self.doing}\t{place(self.worker)}\t{next(self._words)}")

    def _failed(self) -> str | None:
        """'1 failed' or '1 gave up waiting', or None while all is well."""
        return self.store.get("failed").decode() if self.store.check(["failed"]) else None

    def give_up(self, why: str, text: str) -> None:
        """End this process with the text, unless another one has said already why the run ends."""
        first = self.store.compare_set("failed", "", f"{self.rank} {why}").decode()
        if first.startswith(f"{self.rank} "):
            self._end(text)

    def _listen(self) -> None:
        """Take note of the others' words, and of when they were new; less often the more there are."""
        now = time.monotonic()
        if now - self._listened < max(LOOK_INTERVAL, self.size / 50):
            return
        self._listened = now
        for other in range(self.size):
            word = self.store.get(f"at/{other}").decode() if self.store.check([f"at/{other}"]) else ""
            if other not in self._heard or self._heard[other][0] != word:
                self._heard[other] = word, now

    def _silence(self, other: int) -> float:
        """For how many seconds, at least, another process has not been heard of."""
        return self._listened - self._heard[other][1] if other in self._heard else 0.0

    def _gone(self) -> bool:
        """Whether another process does not even look any more: it is frozen, or gone."""
        return any(self._silence(other) > max(self.timeout / 2, GRACE) for other in range(self.size))

    def stuck(self, silent: float) -> str:
        """What to say after so many seconds without progress: where everybody is, the odd ones out first."""
        self._listened = 0.0
        self._listen()
        ranks_at: dict[str, list[int]] = {}
        for other in range(self.size):
            where, word, silence = "not known", self._heard[other][0], self._silence(other)
            if word:
                step, doing, at, _ = word.split("\t")
                where = f"step {step}, {doing}, in {at}"
            if silence > GRACE:
                where += f", last heard of {silence:.0f} s ago or more"
            ranks_at.setdefault(where, []).append(other)
        places = "; ".join(
            f"rank {', '.join(map(str, ranks))}: {where}"
            for where, ranks in sorted(ranks_at.items(), key=lambda item: ("last heard" not in item[0], len(item[1])))
        )
        return (
            f"rank {self.rank} has waited {silent:.0f} s for the other processes at step {self.step} ({self.doing}). "
            f"One of them hangs: {places}. Look there (py-spy dump --pid …); if it only needs longer, raise "
            "--collective_timeout."
        )

    def stands_still(self, thread: threading.Thread, doing: str, seconds: float) -> None:
        """End this process, whose reading or writing has not got on for so long."""
        self.give_up(
            f"hangs while {doing}",
            f"rank {self.rank} hangs at step {self.step}: while {doing}, it has neither written nor read anything for "
            f"{seconds:.0f} s, in {place(thread.ident)}. See whether the disk or the network file system answers; nothing "
            "that was saved before is lost, start again with --resume=auto.",
        )

    def contact_lost(self, error: RuntimeError) -> LostContact:
        """Why a collective failed, once the others have had time to say."""
        waited = time.monotonic() - self.since
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            try:
                failed = self._failed()
                self._listen()
            except RuntimeError:
                break
            if failed is not None and not failed.startswith(f"{self.rank} "):
                return LostContact(f"rank {self.rank} stops at step {self.step}, because rank {failed}.")
            time.sleep(0.1)
        reason = str(error).strip().split("\n")[0].split(". ")[0]  # the first sentence
        if any(sign in reason.lower() for sign in _TOO_LATE):
            try:
                return LostContact(self.stuck(waited))
            except RuntimeError:  # the store is gone too
                pass
        return LostContact(
            f"rank {self.rank} lost contact with another process at step {self.step} ({self.doing}): it was "
            f"killed, or its machine is gone ({reason}). Start again with --resume=auto; torchrun "
            "--max-restarts=3 does so by itself."
        )

    def _end(self, text: str) -> None:
        print(f"train.py: {text}", file=sys.stderr, flush=True)
        os._exit(1)


def is_of_contact(error: RuntimeError) -> bool:
    """Whether the error comes from the communication between processes, and not from code that speaks of it."""
    if isinstance(error, dist.DistError) or _OF_GLOO.match(str(error)):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    inside = bool(frames) and "/torch/distributed/" in frames[-1].filename.replace(os.sep, "/")
    return inside and any(sign in str(error).lower() for sign in _LOST)


def place(thread: int | None = None) -> str:
    """Where a thread (its ident; None: the main one) is: the innermost line outside PyTorch, and the function inside it."""
    frame = sys._current_frames().get(thread or threading.main_thread().ident)
    if frame is None:
        return "nothing any more: it waits for the others"
    innermost = frame
    while frame is not None and "/torch/" in frame.f_code.co_filename.replace(os.sep, "/"):
        frame = frame.f_back
    if frame is None:
        return "PyTorch"
    called = "" if frame is innermost else f" > {innermost.f_code.co_name}"
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_name}{called}"
