"""`train.py --check`: what a run needs, on one screen, without writing anything; exit code 1 where it could not start."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import train
from tests.conftest import TINY_RUN
from training import checking, fitting


def screen(capsys) -> list[str]:
    """What was printed: it fits an 80 × 24 terminal."""
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    assert len(lines) <= 24 and all(len(line) <= 100 for line in lines[1:]), lines
    return lines


def test_a_run_that_can_start_is_tried_and_nothing_is_written(tmp_path, tiny_dataset, capsys):
    before = sorted(path.name for path in tiny_dataset.iterdir())
    out = tmp_path / "not" / "yet"
    run = [*TINY_RUN, f"--dataset={tiny_dataset}", f"--out_dir={out}", "--max_iters=7", "--price_per_gpu_hour=3"]
    assert train.main([*run, "--check"]) == 0
    lines = screen(capsys)
    assert lines[-1] == "nothing stands in the way" and not any(line.startswith("FAIL") for line in lines)
    text = " ".join(" ".join(lines).split())
    assert re.search(r"ok step a micro-batch of 4 sequences, .*, first loss 5\.\d+", text)  # ln 256 = 5.545
    assert "7 iterations, 448 tokens" in text and "price" in text and "2L-2H-32D" in lines[0]
    assert re.search(r"ok memory 0\.\d+ of [\d.]+ GB free, in micro-batches of 4", text)
    assert not out.parent.exists() and sorted(path.name for path in tiny_dataset.iterdir()) == before


def test_everything_that_is_missing_is_said_at_once(tmp_path, monkeypatch, capsys):
    """No data, no memory, no disk, a missing package: four reasons, one screen."""
    found = checking.importlib.util.find_spec
    monkeypatch.setattr(checking.importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    monkeypatch.setattr(checking, "free_memory", lambda device, processes: 1_000_000)
    monkeypatch.setattr(checking.shutil, "disk_usage", lambda path: type("Usage", (), dict(free=1000))())
    run = [*TINY_RUN, f"--dataset={tmp_path / 'nowhere'}", f"--out_dir={tmp_path / 'out'}", "--wandb_log", "--vocab_size=300"]
    assert train.main([*run, "--max_iters=3", "--check"]) == 1
    lines = screen(capsys)
    failed = [line.split()[1] for line in lines if line.startswith("FAIL")]
    assert failed == ["data", "packages", "memory", "disk"] and lines[-1] == "4 of these would stop the run"
    text = " ".join(" ".join(lines).split())
    assert "GB of memory a process, there are 0.001 free. What would fit:" in text and "pip install wandb" in text
    assert not any(line[5:].startswith("step") for line in lines)


def test_a_diverging_first_loss_is_a_failure(tmp_path, tiny_dataset, monkeypatch, capsys):
    monkeypatch.setattr(checking, "initialize", lambda model, seed: [p.data.fill_(float("inf")) for p in model.parameters()])
    assert train.main([*TINY_RUN, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path}", "--check"]) == 1
    assert "FAIL step     the first loss is nan" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("with_data", [False, True])
def test_the_production_recipe_does_not_fit_a_machine_of_24_gb(tmp_path, tiny_dataset, monkeypatch, capsys, with_data):
    """python -m pytest -m slow tests/test_checking.py: it needs 59 GB; one sequence with checkpointing would fit."""
    for module in (checking, fitting):
        monkeypatch.setattr(module, "free_memory", lambda device, processes: 23.5e9)
    monkeypatch.setattr("train.device_peak", lambda *_, **__: None)
    words = ["config/full_llama_1.36b.py", "--device=cpu", f"--out_dir={tmp_path / 'out'}", "--check"]
    assert train.main([*words, f"--dataset={tiny_dataset}"] if with_data else words) == 1
    lines = screen(capsys)
    text = " ".join(" ".join(lines).split())
    assert "N = 1,294,159,104" in lines[0]
    needed = float(re.search(r"this run needs ([\d.]+) GB of memory a process, there are 23.5 free", text).group(1))
    assert 50 < needed < 70 and "What would fit: --batch_size=1 with --activation_checkpointing=full" in text
    assert ("holds no prepared dataset" in text) != with_data
    assert not Path(tmp_path / "out").exists()
