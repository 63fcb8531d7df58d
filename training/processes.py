"""The processes that train together: how they meet, agree, and go down together when one of them fails.

torchrun starts them and tells each who it is (RANK, WORLD_SIZE, LOCAL_RANK …); nothing here starts a process. A single
process is a `World` of size 1, whose methods do the same without anybody to talk to.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from command_line import Failure, UsageError, is_expected
from training import watch as watching
from training.watch import LostContact, Watch, is_of_contact

T = TypeVar("T")
DATA = "data"  # the dimension of the mesh along which the global batch is split
MEETING = 300  # seconds that processes wait for each other at the start
IMPATIENCE = 30  # seconds after which a waiting process prints whom it waits for


class Launch(NamedTuple):
    """Who this process is, as torchrun tells it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine
    local_size: int = 1


def launched() -> bool:
    """Whether torchrun (or somebody who sets the same variables) started this process as one of a group."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_as() -> Launch:
    """Who this process is; alone where nothing was launched. Raises UsageError where the variables cannot be true."""

    def number(name: str, default: str) -> int:
        text = os.environ.get(name, default)
        if not text.isdecimal():
            raise UsageError(
                f"{name}={text!r} in the environment is not a whole number from 0 on. torchrun sets it: start several "
                "processes with torchrun, and one alone with RANK and WORLD_SIZE unset."
            )
        return int(text)

    me, size = (number("RANK", ""), number("WORLD_SIZE", "")) if launched() else (0, 1)
    found = Launch(me, size, number("LOCAL_RANK", "0"), number("LOCAL_WORLD_SIZE", "1"))
    for prefix, me, size in (("", found.rank, found.size), ("LOCAL_", found.local_rank, found.local_size)):
        if me >= size:
            raise UsageError(
                f"{prefix}RANK={me} in the environment must be below {prefix}WORLD_SIZE={size}: processes are numbered from 0. "
                "Start them with torchrun, which numbers them."
            )
    return found


def rank() -> int:
    """This process's rank, before any group exists; 0 for a process alone, or where RANK is no number."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0


def _has_others() -> bool:
    """Whether there are other processes in this one's group, as far as the environment can be believed."""
    try:
        return launched_as().size > 1
    except UsageError:
        return False


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
        self._moved = time.monotonic()

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

    def largest(self, tensor: Tensor) -> Tensor:
        """The tensor, in place, with the largest values over the shares of the global batch."""
        if self.data_size > 1:
            group = self.group if self.mesh is None else self.mesh.get_group(DATA)
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
        return tensor

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, true if it is true in at least one process: what all of them may act on. Host memory only."""
        if self.size == 1:
            return tuple(map(bool, flags))
        votes = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.group)
        return tuple(vote > 0 for vote in votes.tolist())

    def everywhere(self, function: Callable[[], T], doing: str | None = None) -> list[T]:
        """Run the function in every process; the results by rank. If one fails, all fail with its message.

        doing: what it does, for a function that may take long or unequally long ("writing …"). It then runs in a thread,
        while the processes tell each other that they are there: so no collective waits for a slow disk, a dead process is
        noticed at once, a frozen one after `collective_timeout`, and one that does not get on (see `moved`) after
        `watch.STILL` seconds. Such a function calls no collective.
        """
        if self.size == 1:
            return [function()]
        value, error = _attempt(function) if doing is None else self._in_a_thread(function, doing)
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, (value, _sendable(error)), group=self.group)
        if error is not None:
            raise error
        for number, (_, failure) in enumerate(outcomes):
            if failure is not None:
                raise _received(failure, number)
        return [value for value, _ in outcomes]

    def from_main(self, function: Callable[[], T], doing: str | None = None) -> T:
        """Run the function in rank 0 alone; its result, or its failure, in every process. doing: as for `everywhere`."""
        return self.everywhere(lambda: function() if self.is_main else None, doing)[0]

    def moved(self) -> None:
        """Called while a function of `everywhere` writes or reads: it gets on."""
        self._moved = time.monotonic()

    def _in_a_thread(self, function: Callable[[], T], doing: str) -> tuple[T | None, Exception | None]:
        """The function's result or error, when all processes have theirs; until then they vote, again and again, on that."""
        outcome: list[tuple[T | None, Exception | None]] = []
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def job() -> None:
            if gpu is not None:
                torch.cuda.set_device(gpu)  # a thread begins on GPU 0, whosever that is
            outcome.append(_attempt(function))

        watch, started = self._watch, time.monotonic()
        thread = threading.Thread(target=job, name="job", daemon=True)
        self.moved()
        thread.start()
        with nullcontext() if watch is None else watch.doing_in(thread, doing):
            while True:
                thread.join(min(watching.LOOK_INTERVAL, 0.002 + (time.monotonic() - started) / 10))
                (not_all_have,) = self.any(thread.is_alive())
                if watch is not None:
                    watch.alive()
                if not not_all_have:
                    return outcome[0]
                still = time.monotonic() - self._moved
                if watch is not None and thread.is_alive() and still > watching.STILL:
                    watch.stands_still(thread, doing, still)

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
        return World(self.rank, self.size, self.local_rank, self.local_size, group=group, watch=self._watch, timeout=self.timeout)

    def at(self, step: int, doing: str) -> None:
        """Note where this process is, for the message if it gets no further; restarts the clock of its silence."""
        if self._watch is not None:
            self._watch.at(step, doing)


def _attempt(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The function's result, or what it raises."""
    try:
        return function(), None
    except Exception as error:
        return None, error


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
    me, size, _, _ = launched_as()
    store = _store() if launched() else dist.HashStore()
    watch = Watch(store, me, size, timeout) if size > 1 else None  # one that fails before it meets us is noticed too
    patience = datetime.timedelta(seconds=timeout + 60)  # the watch speaks first
    try:
        dist.init_process_group(backend, store=store, rank=me, world_size=size, timeout=patience)
        yield _world(device, watch, patience)
    except RuntimeError as error:
        if watch is not None and is_of_contact(error):
            raise watch.contact_lost(error) from error
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
    here = launched_as()
    return World(
        dist.get_rank(),
        dist.get_world_size(),
        here.local_rank,
        here.local_size,
        group=dist.group.WORLD,
        mesh=mesh,
        watch=watch,
        timeout=timeout,
    )


def _store() -> dist.Store:
    """The key-value store through which the processes of a group find each other. Raises LostContact."""
    found = _meeting()
    if isinstance(found, LostContact):
        raise found
    return found


@functools.cache
def _meeting() -> dist.Store | LostContact:
    """The part of torchrun's store that is these processes' own; or why there is none, found out once, within MEETING s."""
    deadline = time.monotonic() + MEETING
    here = launched_as()
    try:
        store = _connect(here, deadline)
        return dist.PrefixStore(_name_of_meeting(store, here.rank, here.size, deadline), store)
    except LostContact as error:
        return error
    except (RuntimeError, OSError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).split("\n")[0].split(". ")[0]
        return LostContact(f"rank {here.rank} cannot use the store of its group at {where} ({reason}).")


def _connect(here: Launch, deadline: float) -> dist.Store:
    """The key-value store at MASTER_ADDR:MASTER_PORT. Raises UsageError, LostContact, or what PyTorch raises."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise UsageError(
            f"MASTER_ADDR={host!r} and MASTER_PORT={port!r} in the environment do not say where the processes meet; start them "
            "with torchrun, which sets both."
        )
    serves = here.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun holds the store
    if not serves:
        _wait_for_listener(host, int(port), here.rank, deadline)
    patience = datetime.timedelta(seconds=MEETING)
    return dist.TCPStore(host, int(port), is_master=serves, multi_tenant=serves, wait_for_workers=False, timeout=patience)


def _wait_for_listener(host: str, port: int, me: int, deadline: float) -> None:
    """Return once somebody listens there. Raises LostContact at the deadline (PyTorch would say it in 40 lines, and late)."""
    said = False
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((host, port), timeout=max(0.1, min(5.0, left))).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if left <= 0:
            raise LostContact(
                f"rank {me} has tried for {MEETING} s to reach the store of its group at {host}:{port} ({reason}). Is there a "
                "rank 0, are MASTER_ADDR and MASTER_PORT right, and can this machine reach that one?"
            )
        if left < MEETING - IMPATIENCE and not said:
            said = True
            print(f"train.py: rank {me} waits for {host}:{port} ({reason}), up to {MEETING} s.", file=sys.stderr, flush=True)
        time.sleep(0.2)


def _name_of_meeting(store: dist.Store, me: int, size: int, deadline: float | None = None) -> str:
    """A name that these processes, and none before them, have for their part of the store.

    torchrun's store outlives the processes that it restarts, so it still holds the addresses that earlier processes wrote.
    Its count of restarts cannot tell them apart, as it is not the same on all machines (pytorch issue 135712). Instead:
    1. Each process writes a random word under its rank.
    2. Rank 0 reads the words of all ranks and writes them down as one list.
    3. Each process that finds its own word in the list counts itself under the list's name.
    4. When the count is the number of processes, all of them have this list, and its name is theirs alone.
    """
    deadline = deadline or time.monotonic() + MEETING
    mine, words, seen, said = uuid.uuid4().hex, [], set(), False
    store.set(f"hello/{me}", mine)

    def missing() -> list[int]:
        return [other for other in range(size) if not store.check([f"hello/{other}"])]

    def absent() -> str:
        if missing():
            return f"rank {', '.join(map(str, missing()))} of {size} is not here"
        return "some do not answer, or another process has the same RANK"

    while (left := deadline - time.monotonic()) > 0:
        if me == 0:
            words = [] if missing() else [store.get(f"hello/{other}").decode() for other in range(size)]
            store.set("words", " ".join(words))
        elif store.check(["words"]):
            words = store.get("words").decode().split()
        if mine in words:
            name = hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]
            if store.add(f"{name}/seen", name not in seen) == size:
                return name
            seen.add(name)
        if left < MEETING - IMPATIENCE and not said:
            said = True
            if set(range(me)) <= set(missing()):  # the first of those who are here says it
                print(f"train.py: rank {me} waits for the others, up to {MEETING} s: {absent()}.", file=sys.stderr, flush=True)
        time.sleep(0.01 + size / 1000)
    raise LostContact(f"rank {me} has waited {MEETING} s for the other processes of its group: {absent()}.")


def first_to_say(text: str) -> bool:
    """Whether no process of this group has said this yet: what concerns all of them is printed once."""
    if not _has_others():
        return True
    try:
        return _store().add("said/" + hashlib.sha256(text.encode()).hexdigest(), 1) == 1
    except (RuntimeError, LostContact, UsageError):  # nobody there to ask
        return True


def leave(code: int) -> int:
    """The exit code, after telling the others that this process fails, if it does. A failed one of a group ends here."""
    if code == 0 or not _has_others():
        return code
    try:
        _store().compare_set("failed", "", f"{rank()} failed")
    except (RuntimeError, LostContact, UsageError):
        pass
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without the usual clean-up, which would wait for processes that have ended already
