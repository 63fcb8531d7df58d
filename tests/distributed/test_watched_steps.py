"""Samples, norms and batch_size=auto on two processes: what one process finds, and all agree."""

from __future__ import annotations

import json

import pytest
from conftest import TINY_RUN

import train
from tests.distributed.launching import shared_launcher

WATCHED = ["--stats_interval=2", "--sample_interval=2", "--sample_prompt=def ", "--sample_tokens=6", "--max_iters=4"]


def events(folder, kind):
    lines = [line for path in sorted(folder.glob("run_*.jsonl")) for line in path.read_text().splitlines()]
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.parametrize("strategy", ["fsdp", "zero1"])
def test_norms_and_samples_of_two_processes_are_those_of_one(tmp_path, tiny_dataset, strategy):
    given = [*TINY_RUN, f"--dataset={tiny_dataset}", "--gradient_accumulation_steps=2", "--eval_interval=0", *WATCHED]
    assert train.main([*given, f"--out_dir={tmp_path / 'one'}", "--save_interval=-1"]) == 0
    group = shared_launcher().run(*given, f"--out_dir={tmp_path / 'two'}", f"--parallelism={strategy}")
    assert group.codes == {0: 0, 1: 0}, group.err
    one, two = events(tmp_path / "one", "stats"), events(tmp_path / "two", "stats")
    assert len(one) == len(two) == 2
    for alone, together in zip(one, two):
        for figure in ("gradient_norm", "activation_rms"):
            assert together[figure] == pytest.approx(alone[figure], rel=1e-4)
        assert together["largest_logit"] == pytest.approx(alone["largest_logit"], rel=1e-4)
    texts = [[event["text"] for event in events(tmp_path / name, "sample")] for name in ("one", "two")]
    assert texts[0] == texts[1] and len(texts[0]) == 2
    losses = [[event["loss"] for event in events(tmp_path / name, "step")] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_all_processes_take_the_micro_batch_that_fits_the_smallest(tmp_path, tiny_dataset):
    given = [*TINY_RUN, f"--dataset={tiny_dataset}", "--micro_batch=auto", "--total_batch_tokens=2048", "--max_iters=2"]
    given += ["--parallelism=ddp", "--eval_interval=0"]
    chosen = {}
    for name, least in (("small", "2e6 if os.environ['RANK'] == '1' else 9e6"), ("large", "9e6")):
        inject = f"import os, training.fitting as f; f.free_memory = lambda device, processes: {least}"
        group = shared_launcher().run(*given, f"--out_dir={tmp_path / name}", inject=inject)
        assert group.codes == {0: 0, 1: 0}, group.err
        chosen[name] = events(tmp_path / name, "run_start")[0]["config"]["micro_batch"]
    assert 1 <= chosen["small"] < chosen["large"] <= 64
    losses = [[event["loss"] for event in events(tmp_path / name, "step")] for name in chosen]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
