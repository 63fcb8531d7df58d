"""A run that is killed again and again ends as one that was left alone; see chaos.py and chaos_starts.py."""

from __future__ import annotations

import pytest

from tests.distributed.chaos import chaos
from tests.distributed.chaos_starts import random_starts
from tests.distributed.launching import shared_launcher


@pytest.mark.slow
def test_five_kills_change_nothing(tmp_path, tiny_dataset, capsys):
    done = chaos(tmp_path, tiny_dataset, kills=5, seed=1, patience=1.0)
    assert done["kills"] == 5 and done["cut a save short"] >= 1, capsys.readouterr().out


def test_a_kill_while_an_older_run_is_put_aside_changes_nothing(tmp_path, tiny_dataset, capsys):
    """It is put aside, and nothing is saved yet."""
    done = random_starts(shared_launcher(), tmp_path, tiny_dataset, kills=1, seed=0, patience=1.0, starts=("scratch",))
    assert done["kills"] == done["at aside"] == 1, capsys.readouterr().out


@pytest.mark.slow
def test_kills_of_runs_that_begin_in_every_way_change_nothing(tmp_path, tiny_dataset, capsys):
    done = random_starts(shared_launcher(), tmp_path, tiny_dataset, kills=18, seed=4)
    assert done["kills"] == 18 and done["at aside"] and done["at load"] and done["at file"], capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("restart", ("hand", "torchrun"))
@pytest.mark.parametrize("strategy, asynchronous", (("zero1", False), ("fsdp", True), ("ddp", True)))
def test_many_kills_change_nothing(tmp_path, tiny_dataset, restart, strategy, asynchronous):
    assert chaos(tmp_path, tiny_dataset, kills=15, strategy=strategy, asynchronous=asynchronous, restart=restart)["kills"] == 15
