"""The processes that train together: how they meet, agree, and go down together when one of them fails.

torchrun starts them and tells each who it is (RANK, WORLD_SIZE, LOCAL_RANK …); nothing here starts a process. A single
process is a `World` of size 1, whose methods do the same without anybody to talk to.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from command_line import Failure, UsageError, is_expected

T = TypeVar("T")
DATA = "data"  # the dimension of the mesh along which the global batch is split
LOOK_INTERVAL = 0.5  # seconds between two looks at the others
MEETING = 300  # seconds that processes wait for each other at the start
OWN_WORDS = 2.0  # seconds that a process may go on after another one has failed
GRACE = 5.0  # seconds that a process which lost contact waits for the reason to become known
_CONTACT_LOST = (
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "Timed out",
    "timed out",
    "NCCL",
    "Gloo",
    "Socket",
    "gloo",
)


class LostContact(Failure):
    """Another process of the run is gone, or does not answer."""


def launched() -> bool:
    """Whether torchrun (or somebody who sets the same variables) started this process as one of a group."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """This process's rank, before any group exists; 0 for a process alone."""
    return int(os.environ.get("RANK", 0))


# ------------------------------------------------------------------------------------------- the world


class World:
    """All processes of one run, seen from one of them.

    Every method that the others take part in is called by all of them, in the same order. What they send each other while
    training goes through the default group (gloo between CPUs, nccl between GPUs); `beside()` has a group of its own.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        local_size: int = 1,
        *,
        group: dist.ProcessGroup | None = None,
        mesh: DeviceMesh | None = None,
        watch: Watch | None = None,
        timeout: datetime.timedelta | None = None,
    ):
        self.timeout = timeout  # of a collective; None: as the default group's backend has it
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.group, self.mesh, self._watch = group, mesh, watch

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    @property
    def grouped(self) -> bool:
        """Whether there is a process group (of one process or more)."""
        return self.group is not None

    @property
    def data_rank(self) -> int:
        """Which of the shares of a global batch is this process's: its place along the mesh's data dimension."""
        return self.rank if self.mesh is None else self.mesh.get_local_rank(DATA)

    @property
    def data_size(self) -> int:
        """Into how many shares a global batch is split."""
        return self.size if self.mesh is None else self.mesh.size(self.mesh.mesh_dim_names.index(DATA))

    def other_dimensions(self) -> dict[str, int]:
        """Name → size of the mesh's dimensions along which processes have the same share of the batch."""
        return (
            {}
            if self.mesh is None
            else {name: size for name, size in zip(self.mesh.mesh_dim_names, self.mesh.shape) if name != DATA}
        )

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor, in place, added up over the shares of the global batch."""
        if self.data_size > 1:
            dist.all_reduce(tensor, group=self.group if self.mesh is None else self.mesh.get_group(DATA))
        return tensor

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, true if it is true in at least one process: what all of them may act on. Host memory only."""
        if self.size == 1:
            return tuple(map(bool, flags))
        votes = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.group)
        return tuple(vote > 0 for vote in votes.tolist())

    def everywhere(self, function: Callable[[], T]) -> list[T]:
        """Run the function in every process; the results by rank. If one fails, all fail with its message."""
        if self.size == 1:
            return [function()]
        value, error = None, None
        try:
            value = function()
        except Exception as raised:
            error = raised
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, (value, _sendable(error)), group=self.group)
        if error is not None:
            raise error
        for number, (_, failure) in enumerate(outcomes):
            if failure is not None:
                raise _received(failure, number)
        return [value for value, _ in outcomes]

    def from_main(self, function: Callable[[], T]) -> T:
        """Run the function in rank 0 alone; its result, or its failure, in every process."""
        return self.everywhere(lambda: function() if self.is_main else None)[0]

    def check_same(self, what: str, facts: dict[str, Any]) -> None:
        """Raise UsageError in every process unless all of them have the same facts; it names the first that differs."""
        everyone = self.everywhere(lambda: facts)
        first = everyone[0]
        for number, theirs in enumerate(everyone):
            for key in first:
                if theirs.get(key) != first[key]:
                    raise UsageError(
                        f"rank {number} has {key}={theirs.get(key)!r}, rank 0 has {first[key]!r}: every process "
                        f"needs the same {what}."
                    )

    def beside(self) -> World:
        """The same processes with a gloo group of their own, for another thread to talk over."""
        group = dist.new_group(backend="gloo", timeout=self.timeout) if self.size > 1 else self.group
        return World(self.rank, self.size, self.local_rank, self.local_size, group=group)

    def at(self, step: int, doing: str) -> None:
        """Note where this process is, for the message if it gets no further; restarts the clock of its silence."""
        if self._watch is not None:
            self._watch.at(step, doing)

    @contextmanager
    def taking_its_time(self) -> Iterator[None]:
        """Silence inside is not a hang: disks may be slow."""
        if self._watch is None:
            yield
            return
        self._watch.patient = True
        try:
            yield
        finally:
            self._watch.patient = False
            self._watch.at(self._watch.step, self._watch.doing)


def _sendable(error: Exception | None) -> tuple[str, str] | None:
    """An exception as the others learn of it: (kind, sentence)."""
    if error is None:
        return None
    kind = "usage" if isinstance(error, UsageError) else "failure"
    if isinstance(error, OSError):
        return kind, error.strerror or str(error)
    return kind, str(error) if is_expected(error) or isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _received(failure: tuple[str, str], rank: int) -> Exception:
    kind, text = failure
    error = UsageError(text) if kind == "usage" else Failure(text)
    error.rank = rank
    return error


# ------------------------------------------------------------------------------------------- meeting


@contextmanager
def join(device: torch.device, *, timeout: float, alone: bool = False) -> Iterator[World]:
    """Meet the other processes that torchrun started; yields the World. Without torchrun there is nobody to meet.

    device: this process's; GPUs talk over nccl (and gloo for what is in host memory), CPUs over gloo. timeout: seconds
    without progress after which the run ends with a message that says who hangs. alone: make a group of one process even
    so (a sharded strategy needs one). A group that exists already is used and left as it is.
    """
    if dist.is_initialized():
        yield _world(device, None, None)
        return
    if not launched() and not alone:
        yield World()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    me, size = (rank(), int(os.environ["WORLD_SIZE"])) if launched() else (0, 1)
    store = _store() if launched() else dist.HashStore()
    watch = Watch(store, me, size, timeout) if size > 1 else None  # one that fails before it meets us is noticed too
    patience = datetime.timedelta(seconds=timeout + 60)  # the watch speaks first
    dist.init_process_group(backend, store=store, rank=me, world_size=size, timeout=patience)
    try:
        yield _world(device, watch, patience)
    except RuntimeError as error:
        if watch is not None and any(sign in str(error) for sign in _CONTACT_LOST):
            raise watch.explain(error) from error
        raise
    else:
        votes = torch.zeros(1)
        dist.all_reduce(votes)  # nobody leaves while another still talks
        if watch is not None:
            watch.close()
        dist.destroy_process_group()


def _world(device: torch.device, watch: Watch | None, timeout: datetime.timedelta | None) -> World:
    """The World of the default process group, whose mesh has one dimension: each process has a share of the batch."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=(DATA,))
    return World(
        dist.get_rank(),
        dist.get_world_size(),
        _local("RANK"),
        _local("WORLD_SIZE", 1),
        group=dist.group.WORLD,
        mesh=mesh,
        watch=watch,
        timeout=timeout,
    )


def _local(name: str, default: int = 0) -> int:
    return int(os.environ.get(f"LOCAL_{name}", default))


def _store() -> dist.Store:
    """The key-value store through which the processes of a group find each other. Raises LostContact."""
    found = _meeting()
    if isinstance(found, LostContact):
        raise found
    return found


@functools.cache
def _meeting() -> dist.Store | LostContact:
    """The part of torchrun's store that is these processes' own; or why there is none, found out once."""
    try:
        store, me, size = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=MEETING)))
        return dist.PrefixStore(_name_of_meeting(store, me, size), store)
    except LostContact as error:
        return error
    except RuntimeError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).split(". ")[0]
        return LostContact(f"rank {rank()} cannot reach the store of its group at {where} ({reason}).")


def _name_of_meeting(store: dist.Store, me: int, size: int) -> str:
    """A name that these processes, and none before them, have for their part of the store.

    torchrun's store outlives the processes that it restarts, with the addresses that they left there; nor are its counts of
    restarts the same on all machines (pytorch issue 135712). So each says hello with a word of its own, rank 0 writes all
    words down, and the list stands when every process has found its own word in it.
    """
    mine, words, seen, deadline = uuid.uuid4().hex, [], set(), time.monotonic() + MEETING
    store.set(f"hello/{me}", mine)
    while time.monotonic() < deadline:
        if me == 0:
            here = [other for other in range(size) if store.check([f"hello/{other}"])]
            words = [store.get(f"hello/{other}").decode() for other in here] if len(here) == size else []
            store.set("words", " ".join(words))
        elif store.check(["words"]):
            words = store.get("words").decode().split()
        if mine in words:
            name = hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]
            if store.add(f"{name}/seen", name not in seen) == size:
                return name
            seen.add(name)
        time.sleep(0.01 + size / 1000)
    absent = [other for other in range(size) if not store.check([f"hello/{other}"])]
    raise LostContact(
        f"rank {me} has waited {MEETING} s for the other {size - 1} processes"
        + (f"; not here: rank {', '.join(map(str, absent))}." if absent else ", some of which did not answer.")
    )


def first_to_say(text: str) -> bool:
    """Whether no process of this group has said this yet: what concerns all of them is printed once."""
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1:
        return True
    try:
        return _store().add("said/" + hashlib.sha256(text.encode()).hexdigest(), 1) == 1
    except (RuntimeError, LostContact):  # nobody there to ask
        return True


def leave(code: int) -> int:
    """The exit code, after telling the others that this process fails, if it does. A failed one of a group ends here."""
    if code == 0 or not launched() or int(os.environ["WORLD_SIZE"]) == 1:
        return code
    try:
        _store().compare_set("failed", "", f"{rank()} failed")
    except (RuntimeError, LostContact):
        pass
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a group that is torn cannot be taken down in order


# ------------------------------------------------------------------------------------------- watching


class Watch(threading.Thread):
    """Ends this process when another one has failed, or when nothing moves any more: with a message, whatever hangs.

    A collective that waits for a dead or stuck process cannot be interrupted from Python; this thread can still speak.
    Each process publishes where it is, so that the message can tell.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float):
        super().__init__(name="watch", daemon=True)
        self.store = store.clone() if hasattr(store, "clone") else store
        self.rank, self.size, self.timeout = rank, size, timeout
        self.step, self.doing, self.since, self.patient = 0, "starting", time.monotonic(), True  # until the first step
        self._closed = threading.Event()
        self.start()

    def at(self, step: int, doing: str) -> None:
        """This process is alive and here."""
        self.step, self.doing, self.since, self.patient = step, doing, time.monotonic(), False

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
                self.store.set(f"at/{self.rank}", f"{self.step}\t{self.doing}\t{_place()}\t{time.time()}")
                failed = self._failed()
                if failed is None and not self.patient and silent > self.timeout:
                    first = self.store.compare_set("failed", "", f"{self.rank} gave up waiting").decode()
                    if first.startswith(f"{self.rank} "):
                        self._end(self.stuck(silent))
            except RuntimeError:  # the store went down with its host: the collectives will say so
                return
            if failed is not None and not failed.startswith(f"{self.rank} "):
                failed_since = failed_since or time.monotonic()
                if time.monotonic() - failed_since < OWN_WORDS:
                    continue  # it may be about to fail for the same reason, with the exit code that belongs to it
                self._end(f"rank {self.rank} stops at step {self.step}, because rank {failed}.")

    def _failed(self) -> str | None:
        """'1 failed' or '1 gave up waiting', or None while all is well."""
        return self.store.get("failed").decode() if self.store.check(["failed"]) else None

    def stuck(self, silent: float) -> str:
        """What to say after so many seconds without progress: where everybody is, the odd ones out first."""
        ranks_at: dict[str, list[int]] = {}
        for other in range(self.size):
            where = "not known"
            if self.store.check([f"at/{other}"]):
                step, doing, place, when = self.store.get(f"at/{other}").decode().split("\t")
                age = time.time() - float(when)
                where = f"step {step}, {doing}, in {place}" + (f", last heard of {age:.0f} s ago" if age > GRACE else "")
            ranks_at.setdefault(where, []).append(other)
        places = "; ".join(
            f"rank {', '.join(map(str, ranks))}: {where}"
            for where, ranks in sorted(ranks_at.items(), key=lambda item: len(item[1]))
        )
        return (
            f"rank {self.rank} has waited {silent:.0f} s for the other processes at step {self.step} ({self.doing}). "
            f"One of them hangs: {places}. Look there (py-spy dump --pid …); if it only needs longer, raise "
            "--collective_timeout."
        )

    def explain(self, error: RuntimeError) -> Failure:
        """Why a collective failed, once the others have had time to say."""
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            try:
                failed = self._failed()
            except RuntimeError:
                break
            if failed is not None and not failed.startswith(f"{self.rank} "):
                return LostContact(f"rank {self.rank} stops at step {self.step}, because rank {failed}.")
            time.sleep(0.1)
        reason = str(error).strip().split("\n")[0].split(". ")[0]  # the first sentence
        return LostContact(
            f"rank {self.rank} lost contact with another process at step {self.step} ({self.doing}): it was "
            f"killed, or its machine is gone ({reason}). Start again with --init_from=auto; torchrun "
            "--max-restarts=3 does so by itself."
        )

    def _end(self, text: str) -> None:
        print(f"train.py: {text}", file=sys.stderr, flush=True)
        os._exit(1)


def _place() -> str:
    """Where this process's main thread is: the innermost line outside PyTorch, and the function inside it."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    innermost = frame
    while frame is not None and "/torch/" in frame.f_code.co_filename.replace(os.sep, "/"):
        frame = frame.f_back
    if frame is None:
        return "PyTorch"
    called = "" if frame is innermost else f" > {innermost.f_code.co_name}"
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_name}{called}"
