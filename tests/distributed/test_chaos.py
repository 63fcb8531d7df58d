"""A run that is killed again and again ends as one that was left alone; see chaos.py."""

from __future__ import annotations

import pytest

from tests.distributed.chaos import chaos


def test_five_kills_change_nothing(tmp_path, tiny_dataset, capsys):
    done = chaos(tmp_path, tiny_dataset, kills=5, seed=1, patience=1.0)
    assert done["kills"] == 5 and done["cut a save short"] >= 1, capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("restart", ("hand", "torchrun"))
@pytest.mark.parametrize("strategy, asynchronous", (("zero1", False), ("fsdp", True), ("ddp", True)))
def test_many_kills_change_nothing(tmp_path, tiny_dataset, restart, strategy, asynchronous):
    assert chaos(tmp_path, tiny_dataset, kills=15, strategy=strategy, asynchronous=asynchronous, restart=restart)["kills"] == 15
