"""config/lm_tiny.py on a real local text, as the training guide trains it: three epochs, perplexity, exact resume, fp16."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

import train
from data.corpora import pydocs_documents
from data.preparation import prepare
from tests.conftest import TINY_RUN
from training.checkpoint import CheckpointStore

SMALL = ("--num_layers=1", "--num_heads=2", "--d_model=32", "--max_seq_len=32")


@pytest.fixture(scope="module")
def documentation(tmp_path_factory) -> Path:
    """Topics of Python's documentation, by a BPE of 512."""
    folder = tmp_path_factory.mktemp("data") / "documentation"
    texts = [document for _, document in zip(range(60), pydocs_documents())]
    prepare(lambda: iter(texts), folder, tokenizer="bpe", bpe_vocab_size=512)
    return folder


def events(folder: Path, kind: str) -> list[dict]:
    lines = [line for log in sorted(folder.glob("run_*.jsonl")) for line in log.read_text().splitlines()]
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.parametrize("shape", [pytest.param(SMALL, id="small"), pytest.param((), id="whole", marks=pytest.mark.slow)])
def test_three_epochs_of_lm_tiny_with_perplexity_resume_and_fp16(tmp_path, documentation, capsys, shape):
    """python -m pytest -m slow tests/test_language_models.py: the whole shape, of 3.4 M parameters at this vocabulary."""
    run = ["--model_preset=tiny", *shape, f"--dataset={documentation}", "--batch_size=8", "--lr=3e-3", "--warmup_steps=5"]
    run += ["--device=cpu", "--threads=1", "--log_interval=1", "--eval_interval=10", "--max_samples=80", "--snapshot_epochs=1"]
    run += ["--lr_decay_iters=30", "--eval_iters=2"]  # 80 windows in batches of 8: 10 steps an epoch
    assert train.main([*run, "--num_epochs=3", "--dtype=float32", f"--out_dir={tmp_path / 'whole'}"]) == 0
    printed = capsys.readouterr().out
    assert train.main([*run, "--num_epochs=1.35", "--dtype=float32", f"--out_dir={tmp_path / 'parts'}"]) == 0
    assert train.main([*run, "--num_epochs=3", "--dtype=float32", f"--out_dir={tmp_path / 'parts'}", "--resume"]) == 0
    whole, parts = ({e["step"]: e["loss"] for e in events(tmp_path / name, "step")} for name in ("whole", "parts"))
    assert whole == parts and len(whole) == 30  # dropout 0.1 included
    evaluations = events(tmp_path / "whole", "eval")
    assert [event["step"] for event in evaluations] == [0, 10, 20, 30]
    assert all(event["perplexity"] == pytest.approx(math.exp(event["val_loss"])) for event in evaluations)
    assert evaluations[-1]["perplexity"] < evaluations[1]["perplexity"] < 512 < 1.1 * evaluations[0]["perplexity"]
    assert f"perplexity {evaluations[-1]['perplexity']:.2f}" in printed and re.search(r"[\d,]+ tok/s", printed)
    assert [path.name[-2:] for path in CheckpointStore(tmp_path / "parts").snapshots()] == ["10", "20", "30"]
    rates = [event["lr"] for event in events(tmp_path / "whole", "step")]
    assert max(rates) == pytest.approx(3e-3) and rates[-1] == pytest.approx(3e-4, rel=0.05)  # min_lr_ratio 0.1
    capsys.readouterr()
    assert train.main([*run, "--max_iters=6", "--fp16", "--gradient_checkpointing", f"--out_dir={tmp_path / 'half'}"]) == 0
    half = {event["step"]: event["loss"] for event in events(tmp_path / "half", "step")}
    assert events(tmp_path / "half", "run_start")[0]["dtype"] == "float16"
    assert [half[step] for step in range(1, 7)] == pytest.approx([whole[step] for step in range(1, 7)], rel=0.02)
    print(f"\nperplexity {[round(event['perplexity'], 1) for event in evaluations]}")


def test_what_was_given_by_other_names_comes_back_on_resume(tmp_path, tiny_dataset, capsys):
    """A run begun with aliases goes on without them, and another value by another name is refused by the real one."""
    run = [*TINY_RUN, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path}", "--eval_interval=0", "--lr_decay_iters=4"]
    run = [word for word in run if not word.startswith(("--n_embd", "--learning_rate"))]
    assert train.main([*run, "--d_model=64", "--lr=2e-3", "--min_lr_ratio=0.5", "--max_iters=2"]) == 0
    assert train.main([*run, "--resume", "--max_iters=4"]) == 0
    rates = [event["lr"] for event in events(tmp_path, "step")]
    assert rates[0] == pytest.approx(2e-3) and 1e-3 < rates[-1] < 1.3e-3
    capsys.readouterr()
    assert train.main([*run, "--resume", "--d_model=32", "--min_lr=1e-6", "--max_iters=5"]) == 2
    said = capsys.readouterr().err
    assert "n_embd" in said and "min_lr" in said and "d_model" not in said
