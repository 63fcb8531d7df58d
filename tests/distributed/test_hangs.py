"""A process that hangs ends the run with a sentence that says who and where, also within a save; a slow disk does not."""

from __future__ import annotations

import re
import signal
import time

import pytest

from tests.distributed.launching import IN_STEP_4, SMALL, Group, shared_launcher, wait_for
from training.checkpoint import CheckpointStore, verify

RUN = (*SMALL, "--parallelism=zero1", "--save_interval=5", "--eval_interval=0", "--max_iters=100000", "--collective_timeout=3")
SECONDS = 60  # in which a group is down whatever happened: it takes about 10, on a machine that does nothing else
IMPATIENT = "import training.watch; training.watch.GRACE = 1\n"

# What rank 1 does before it writes a file of the checkpoint of step 10.
WHILE_SAVING = """
import os, signal, time, training.shards
original_write = training.shards.write_tensors
def write_tensors(path, *arguments, **options):
    if RANK == 1 and "10" in path.parent.name:
        {}
    return original_write(path, *arguments, **options)
training.shards.write_tensors = write_tensors"""


@pytest.fixture
def start(tiny_dataset, tmp_path):
    """start(*arguments, **options of Launcher.start) → the running Group of two processes, which write to tmp_path."""

    def run(*arguments: str, **options) -> Group:
        return shared_launcher().start(*RUN, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path}", *arguments, **options)

    return run


def kill_when_it_is_alone(group: Group, rank: int) -> None:
    """End the frozen process once all others have ended."""
    wait_for(lambda: len(group.codes) == len(group.pids) - 1, SECONDS, lambda: f"the others to give up:\n{group.err}")
    group.send(signal.SIGKILL, rank)
    group.wait(SECONDS)


def test_a_stuck_rank_ends_the_run_with_a_message_that_says_who_is_where_whatever_the_clocks_say(start):
    """Issue 10.14: with clocks that differ, a healthy process was "last heard of 600 s ago"."""
    wrong_clock = "import time\nif RANK == 2: now = time.time; time.time = lambda: now() - 600\n"
    group = start(inject=wrong_clock + IN_STEP_4.format("if RANK == 1: time.sleep(1000)"), size=4)
    assert group.wait(SECONDS) == [1, 1, 1, 1]
    message = next(line for line in group.complaints if "hangs" in line)
    assert re.search(r"rank \d has waited \d+ s for the other processes at step 3 ", message)
    assert re.search(r"hangs: rank 1: step 3, [^;]*<injected>:\d+ next_token_loss; rank 0, 2, 3: step 3, ", message)
    assert "--collective_timeout" in message and "last heard" not in message
    assert sum("hangs" in line for line in group.complaints) == 1
    assert sum("gave up waiting" in line for line in group.complaints) == 3


@pytest.mark.slow
def test_a_frozen_process_is_named_with_when_it_was_last_heard_of(start):
    """Issue 10.14: also when the clock of this machine is set while it waits."""
    group = start("--save_interval=0", inject=IMPATIENT + "import time; time.time = lambda: time.monotonic() * 100")
    group.wait_for_line("step 7/")
    group.send(signal.SIGSTOP, 1)
    kill_when_it_is_alone(group, 1)
    assert len(group.complaints) == 1, group.err
    assert re.search(r"hangs: rank 1: step \d+, [^;]*, last heard of [2-9] s ago or more; rank 0: ", group.complaints[0])


def test_a_process_that_freezes_within_a_save_is_named_too(start, tmp_path):
    """Issue 10.14: it was reported, a minute later, as killed."""
    group = start(inject=IMPATIENT + WHILE_SAVING.format("time.sleep(2); os.kill(os.getpid(), signal.SIGSTOP)"))
    group.wait_for_line("step 10/")
    started = time.monotonic()
    kill_when_it_is_alone(group, 1)
    assert time.monotonic() - started < 30
    assert len(group.complaints) == 1, group.err
    assert re.search(
        r"rank 0 has waited \d+ s for .* at step \d+ \(writing the checkpoint of step 10\).* hangs: rank 1: step \d+, "
        r"writing the checkpoint of step 10, in <injected>:\d+ write_tensors, last heard of \d+ s ago",
        group.complaints[0],
    ), group.err
    assert CheckpointStore(tmp_path).pointed("latest").name == "step_000000005"


@pytest.mark.parametrize("background", (False, pytest.param(True, marks=pytest.mark.slow)))
def test_a_save_that_gets_no_further_ends_by_its_own_limit_and_says_so(start, tmp_path, background):
    """Issue 10.14: a hang within a save was silence until a collective gave up, which then blamed the network."""
    group = start(
        f"--async_checkpoint={background}",
        "--collective_timeout=100",
        inject="import training.watch; training.watch.STILL = 2" + WHILE_SAVING.format("time.sleep(1000)"),
    )
    assert group.wait(SECONDS) == [1, 1], group.err
    assert re.search(
        r"rank 1 hangs at step \d+: while writing the checkpoint of step 10, it has neither written nor read anything for "
        r"[2-9] s, in <injected>:\d+ write_tensors",
        "\n".join(group.complaints),
    )
    assert any(re.search(r"rank 0 stops at step \d+, because rank 1 hangs while writing", line) for line in group.complaints)
    assert len(group.complaints) == 2
    verify(CheckpointStore(tmp_path).pointed("latest"))


def test_a_save_that_takes_longer_than_the_timeout_of_a_collective_is_no_hang(start, tmp_path):
    """Issue 10.13: the other processes wait for a slow disk as long as it gets on."""
    group = start("--max_iters=12", "--collective_timeout=1", inject=WHILE_SAVING.format("time.sleep(4)"))
    assert group.wait(SECONDS) == [0, 0] and group.err == "", group.err
    assert CheckpointStore(tmp_path).pointed("latest").name == "step_000000012"
