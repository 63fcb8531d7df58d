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


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("zero1", marks=pytest.mark.slow)])
def test_two_processes_find_what_one_finds_and_take_what_fits_the_smaller(tmp_path, tiny_dataset, strategy):
    """Rank 1 has little memory: all take the micro-batch that fits it. Norms, samples and losses are those of one process."""
    given = [*TINY_RUN, f"--dataset={tiny_dataset}", "--total_batch_tokens=2048", "--eval_interval=0", *WATCHED]
    inject = "import os, training.fitting as f; f.free_memory = lambda *device: 2e6 if os.environ['RANK'] == '1' else 9e9"
    auto = [*given, "--micro_batch=auto", f"--out_dir={tmp_path / 'two'}", f"--parallelism={strategy}"]
    group = shared_launcher().run(*auto, inject=inject)
    assert group.codes == {0: 0, 1: 0}, group.err
    chosen = events(tmp_path / "two", "run_start")[0]["config"]["micro_batch"]
    assert 1 <= chosen < 64  # of each process's share of the batch, which rank 0 by itself could have taken whole
    assert f"micro-batches of {chosen} sequences (batch_size=auto)" in group.out
    alone = [*given, f"--micro_batch={chosen}", f"--out_dir={tmp_path / 'one'}", "--save_interval=-1"]
    assert train.main(alone) == 0
    one, two = events(tmp_path / "one", "stats"), events(tmp_path / "two", "stats")
    assert len(one) == len(two) == 2
    for mine, theirs in zip(one, two):
        for figure in ("gradient_norm", "activation_rms"):
            assert theirs[figure] == pytest.approx(mine[figure], rel=1e-4)
        assert theirs["largest_logit"] == pytest.approx(mine["largest_logit"], rel=1e-4)
    texts = [[event["text"] for event in events(tmp_path / name, "sample")] for name in ("one", "two")]
    assert texts[0] == texts[1] and len(texts[0]) == 2
    losses = [[event["loss"] for event in events(tmp_path / name, "step")] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
