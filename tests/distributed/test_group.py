"""The helper that the other tests rest on: a failure in one process ends the call, and says where it was."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from group import RankFailed, in_processes


def add_up(start: int) -> tuple[int, int]:
    total = torch.tensor(start + dist.get_rank())
    dist.all_reduce(total)
    return int(total), os.getpid()


def misbehave(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "raises":
            print("printed before")
            raise ValueError("one is wrong")
        if how == "dies":
            os._exit(7)
        time.sleep(1000)
    dist.all_reduce(torch.ones(()))  # the other rank waits here


def test_results_come_by_rank_from_processes_that_stay():
    first, second = in_processes(2, add_up, 10), in_processes(2, add_up, 20)
    assert [total for total, _ in first] == [21, 21] and [total for total, _ in second] == [41, 41]
    assert [pid for _, pid in first] == [pid for _, pid in second] and first[0] != first[1]


@pytest.mark.parametrize(
    "how, error, message",
    [
        ("raises", RankFailed, "(?s)^rank 1 of 2.*in misbehave.*ValueError: one is wrong.*printed before"),
        ("dies", RankFailed, "rank 1 of 2 died, exit code 7"),
        ("hangs", TimeoutError, "after 3 s no answer from rank 0, 1 of 2"),
    ],
)
def test_what_goes_wrong_in_one_rank_ends_all_and_is_said(how, error, message):
    pids = [pid for _, pid in in_processes(2, add_up, 0)]
    with pytest.raises(error, match=message):
        in_processes(2, misbehave, how, timeout=3 if how == "hangs" else 60)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert in_processes(2, add_up, 1)[0][0] == 3
