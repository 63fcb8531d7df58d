"""Buffers that training changes: nothing adds them up over processes, so those that differ are refused by name."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from conftest import TINY_RUN
from group import RankFailed, in_processes
from torch import nn

import train
from model_components import Constant
from model_config import register, unregister
from training.checkpoint import load_model

RUN = (*TINY_RUN, "--normalization=counting", "--batch_size=2", "--gradient_accumulation_steps=2", "--eval_interval=0")


@contextmanager
def registered(persistent: bool = True):
    """The norm 'counting' is there: it scales by a constant, and notes how often it was asked, and the mean that it saw."""

    @register("normalization", "counting", short="Count")
    class Counting(nn.Module):
        """x · 0.5, with statistics."""

        def __init__(self, config, width):
            super().__init__()
            self.register_buffer("asked", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(()), persistent=persistent)

        def forward(self, x):
            if self.training:
                self.asked += 1
                if MEANS:
                    self.mean.lerp_(x.detach().float().mean(), 0.1)
            return x * 0.5

        @staticmethod
        def parts(config, width):
            return []

        def initial(self, name):
            return Constant(0.0)

    try:
        yield
    finally:
        unregister("normalization", "counting")


MEANS = True


def train_counting(arguments: tuple[str, ...], persistent: bool, means: bool) -> None:
    global MEANS
    MEANS = means
    with registered(persistent):
        code = train.main(list(arguments))
    if code:
        raise RuntimeError(f"train.py exits with {code}")


@pytest.mark.parametrize(
    "flags", (["--save_interval=-1", "--max_iters=2"], ["--save_interval=1", "--max_iters=1"]), ids=("step", "save")
)
def test_a_buffer_that_follows_a_process_share_of_the_batch_is_refused_by_name(tmp_path, tiny_dataset, flags, capfd):
    run = (*RUN, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path}", "--parallelism=zero1", *flags)
    with pytest.raises(RankFailed) as failed:
        in_processes(2, train_counting, run, True, True)
    said = str(failed.value)
    assert "The buffer blocks.0." in said and ".mean is not the same in rank 0 and rank 1" in said
    assert not list((tmp_path / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("processes, persistent, means", [(1, True, True), (2, True, False), (2, False, True)])
def test_buffers_that_are_alike_or_are_not_saved_are_fine(tmp_path, tiny_dataset, processes, persistent, means):
    strategy = "none" if processes == 1 else "fsdp"
    run = (*RUN, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path}", "--save_interval=1", f"--parallelism={strategy}")
    for length in (2, 3):  # the second time it goes on
        in_processes(processes, train_counting, (*run, f"--max_iters={length}", "--resume=auto"), persistent, means)
    with registered(persistent):
        model, _ = load_model(tmp_path)
    micro_batches = 2 if processes == 1 else 1
    assert float(model.norm.asked) == 3 * micro_batches
    assert ("norm.mean" in model.saved_buffers()) == persistent
    assert (float(model.norm.mean) != 0) == (persistent and means)
