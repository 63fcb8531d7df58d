"""What a run takes from what it starts from, and what it need not make, check or read for that. Issue 10.13."""

from __future__ import annotations

import json
import os

import pytest
import torch
from conftest import TINY_RUN

import convert
import model_builder
import train
from training.manifest import listed_files
from training.optimizers import Optimizer


@pytest.mark.parametrize("start", ["resume", "eval_only", "weights", "hf"])
def test_what_replaces_the_initial_weights_replaces_all_of_them_and_nothing_is_drawn(tmp_path, tiny_dataset, monkeypatch, start):
    """Issue 10.13: they were drawn and thrown away. The memory that they would have been in is full of NaN here."""
    drawn, randn = [], torch.randn
    to_empty = model_builder.Transformer.to_empty

    def full_of_nan(self, **where):
        to_empty(self, **where)
        for tensor in (*self.parameters(), *self.saved_buffers().values()):
            tensor.detach().fill_(torch.nan)
        return self

    def counted(*arguments, **options):
        drawn.append(arguments)
        return randn(*arguments, **options)

    run = [*TINY_RUN, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path / 'out'}"]
    assert train.main([*run, "--max_iters=2"]) == 0
    flags = {"resume": ["--resume"], "eval_only": ["--resume", "--eval_only"]}.get(start)
    if start == "hf":
        assert convert.main([str(tmp_path / "out"), str(tmp_path / "hf"), "--no_check"]) == 0
    if not flags:
        source = tmp_path / ("out" if start == "weights" else "hf")
        run = [flag for flag in run if not flag.startswith("--arch_preset")]
        flags = [f"--init_from={start}:{source}", f"--out_dir={tmp_path / 'new'}"]
    (monkeypatch.setattr(torch, "randn", counted), monkeypatch.setattr(model_builder.Transformer, "to_empty", full_of_nan))
    assert train.main([*run, "--max_iters=4", *flags]) == 0
    assert drawn == []
    log = max((tmp_path / ("out" if start in ("resume", "eval_only") else "new")).glob("run_*.jsonl"), key=os.path.getmtime)
    ended = json.loads(log.read_text().splitlines()[-1])
    assert ended["outcome"] == ("evaluated" if start == "eval_only" else "finished") and ended["skipped"] == 0


def test_an_evaluation_neither_makes_nor_checks_nor_reads_the_optimizer(tmp_path, tiny_dataset, monkeypatch):
    """Issue 10.13: its files may even be damaged."""
    run = [*TINY_RUN, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path}"]
    assert train.main([*run, "--max_iters=2"]) == 0
    (checkpoint,) = (tmp_path / "checkpoints").glob("step_*")
    holds = {name: entry.get("holds") for name, entry in listed_files(checkpoint).items()}
    damaged = [name for name, kinds in holds.items() if kinds == ["optimizer"]]
    for name in damaged:
        (checkpoint / name).write_bytes(b"\0" * (checkpoint / name).stat().st_size)
    assert damaged and train.main([*run, "--resume"]) == 1  # which training would have noticed
    monkeypatch.setattr(Optimizer, "state", lambda self: pytest.fail("the optimizer's state was made"))
    assert train.main([*run, "--resume", "--eval_only"]) == 0
