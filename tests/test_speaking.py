"""How the programs speak: the door that opens with a word, help that fits, lines that fit, other people's keys, advice."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY_RUN

import ablate
import command_line
import train
from configurator import ConfigError, configure
from training import fitting
from training.fitting import out_of_memory
from training.report import Display, step_line

LINE = dict(
    loss=3.14159,
    lr=6e-4,
    grad_norm=1.234,
    tokens_per_s=12_345.6,
    step_ms={"data": 1.0, "compute": 90.0, "optimizer": 9.0, "total": 100.0},
    mfu=0.4,
    memory_gb=12.3,
    skipped=2,
    figures={"balance": 0.5},
)


# ------------------------------------------------------------------------------------------- 14: the first minute


def test_without_arguments_it_says_what_it_does_and_trains_nothing(tmp_path, monkeypatch, capsys):
    """Issue 14.14: it began to train 89 M parameters for 1.4 days."""
    monkeypatch.chdir(tmp_path)
    assert train.main([]) == 2
    said = capsys.readouterr().out
    assert "python train.py config/quickstart.py" in said and "config/full_gpt2_124m.py" in said and "olmo3" in said
    assert max(map(len, said.splitlines())) <= 80 and not list(tmp_path.iterdir())


def test_help_fits_and_help_all_has_the_rest(capsys):
    """Issue 14.14."""
    assert train.main(["--help"]) == 0
    short = capsys.readouterr().out
    keys = [line.split()[0] for line in short.splitlines() if line.startswith("  --")]
    assert max(map(len, short.splitlines())) <= 80 and len(keys) == 20 and "--help_all" in short
    assert train.main(["--help_all"]) == 0
    every = capsys.readouterr().out
    assert all(f"  {key}:" in every for key in keys) and "--muon_momentum" in every and "--muon_momentum" not in short


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_a_step_line_fits_the_terminal(width):
    """Issue 14.14: it took two or three lines of a terminal of 80 columns."""
    whole, line = step_line(10, 100, **LINE), step_line(10, 100, **LINE, width=width)
    assert len(line) <= max(width, len("step 10/100 | loss 3.1416 | skipped 2")) and line.startswith("step 10/100 | loss 3.1416")
    assert "skipped 2" in line and [piece for piece in line.split(" | ") if piece.split(" (")[0] not in whole] == []
    if width >= 80:
        assert "left" in line and "tok/s" in line
    assert (line == whole) == (width >= len(whole))


def test_the_bar_shows_the_loss_and_a_pipe_gets_whole_lines(monkeypatch):
    """Issue 14.14."""

    class Bar:
        said = ""

        def set_postfix_str(self, text, refresh):
            self.said = text

    display = Display()
    display.note("loss 1.0")  # there is no bar
    assert display.width is None
    display.bar = Bar()
    display.note("loss 3.1416")
    assert display.bar.said == "loss 3.1416"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "77")
    assert display.width == 77


def test_a_run_begins_with_an_evaluation(tiny_dataset, tmp_path, capsys):
    """Issue 14.14: of a model that knows nothing, the loss is about ln(vocab_size)."""
    words = [*TINY_RUN, f"--dataset={tiny_dataset}", "--max_iters=2", "--eval_interval=1", "--eval_iters=4"]
    assert train.main([*words, f"--out_dir={tmp_path / 'a'}"]) == 0
    (log,) = (tmp_path / "a").glob("run_*.json")
    evals = json.loads(log.read_text())["evals"]
    assert [entry["step"] for entry in evals] == [0, 1, 2]
    assert evals[0]["val_loss"] == pytest.approx(math.log(256), abs=0.2)
    assert train.main([*words, f"--out_dir={tmp_path / 'a'}", "--resume", "--max_iters=3"]) == 0  # not again
    last = sorted((tmp_path / "a").glob("run_*.json"))[-1]
    assert [entry["step"] for entry in json.loads(last.read_text())["evals"]] == [3]
    assert train.main([*words, f"--out_dir={tmp_path / 'b'}", "--eval_interval=0"]) == 0
    (log,) = (tmp_path / "b").glob("run_*.json")
    assert [entry["step"] for entry in json.loads(log.read_text())["evals"]] == [2]


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_while_pytorch_is_imported_is_quiet(tmp_path):
    """Issue 14.14: a traceback out of the middle of torch."""
    code = (  # in the place of PyTorch a module that takes its time
        "import pathlib, sys, time\npathlib.Path('importing').touch()\ntime.sleep(60)\n"
    )
    (tmp_path / "torch.py").write_text(code)
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "config/quickstart.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(600):
            if (tmp_path / "importing").exists():
                break
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        assert run.communicate(timeout=60)[1] == "" and run.returncode == 130
    finally:
        run.kill()


def test_importing_the_modules_leaves_ctrl_c_as_it_is():
    """Issue 14.14: only a program of this project is quiet, not one that uses it."""
    assert signal.getsignal(signal.SIGINT) is not command_line._leave_at_once


# ------------------------------------------------------------------------------------------- 15: nanoGPT's users

# What nanoGPT's example of this name sets, and its README's flags for a CPU.
THEIRS = dict(
    out_dir="out-shakespeare-char",
    eval_interval=250,
    eval_iters=200,
    log_interval=10,
    always_save_checkpoint=False,
    wandb_log=False,
    wandb_project="shakespeare-char",
    wandb_run_name="mini-gpt",
    dataset="shakespeare_char",
    gradient_accumulation_steps=1,
    batch_size=64,
    block_size=256,
    n_layer=6,
    n_head=6,
    n_embd=384,
    dropout=0.2,
    learning_rate=1e-3,
    max_iters=5000,
    lr_decay_iters=5000,
    min_lr=1e-4,
    beta2=0.99,
    warmup_iters=100,
)
ON_A_CPU = (
    *("--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1", "--block_size=64", "--batch_size=12"),
    *("--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
)


def test_nanogpts_example_is_here_under_its_name_and_its_own_file_works(tmp_path):
    """Issue 14.15."""
    own = tmp_path / "theirs.py"
    own.write_text("".join(f"{key} = {value!r}\n" for key, value in THEIRS.items()))
    for flags in ((), ON_A_CPU):
        here, there = (configure([str(file), *flags]).train for file in ("config/train_shakespeare_char.py", own))
        assert here == there
    assert (here.n_layer, here.block_size, here.device, here.keep_last) == (4, 64, "cpu", 1)
    assert configure(["config/train_shakespeare_char.py"]).train.n_embd == 384


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("--decay_lr=False", {"lr_schedule": "constant"}),
        ("--decay_lr=True", {"lr_schedule": "cosine"}),
        ("--always_save_checkpoint=False", {"keep_last": 1}),
        ("--always_save_checkpoint=True", {"keep_last": 2}),
        ("--init_from=gpt2", {"init_from": "hf:openai-community/gpt2"}),
        ("--init_from=gpt2-xl", {"init_from": "hf:openai-community/gpt2-xl"}),
        ("--init_from=resume", {"resume": "yes"}),
        ("--bias=False", {"bias": False}),
        ("--config=config/shakespeare_char_cpu.py", {"dataset": "shakespeare_char", "n_embd": 128}),
    ],
)
def test_nanogpts_keys_mean_what_they_mean_there(theirs, ours):
    """Issue 14.15."""
    found = configure([theirs]).train
    assert {key: getattr(found, key) for key in ours} == ours


def test_nanogpts_backend_is_answered():
    """Issue 14.15."""
    with pytest.raises(ConfigError, match="backend='nccl': the backend follows from the device"):
        configure(["--backend=nccl"])


def test_a_config_file_may_be_given_as_an_option():
    """Issue 14.15."""
    plain = configure(["config/quickstart.py", "--seed=2"])
    assert (
        configure(["--config", "config/quickstart.py", "--seed=2"])
        == plain
        == configure(["--seed=2", "--config=config/quickstart.py"])
    )
    with pytest.raises(ConfigError, match="--config needs a file"):
        configure(["--config"])
    with pytest.raises(ConfigError, match="only one config file"):
        configure(["config/quickstart.py", "--config=config/arch_gpt2.py"])


def test_a_config_without_its_dataset_names_the_command_that_makes_it(tmp_path, monkeypatch, capsys):
    """Issue 14.15: the command that makes that dataset, not another one."""
    from data import token_dataset

    if (token_dataset.DATA_DIR / "shakespeare_char" / "train.bin").exists():
        pytest.skip("it is prepared here")
    assert train.main(["config/shakespeare_char_cpu.py", f"--out_dir={tmp_path / 'out'}", "--device=cpu"]) == 1
    assert "python data/shakespeare_char/prepare.py" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- 16: advice


def test_out_of_memory_names_the_sizes_and_what_would_fit(monkeypatch):
    """Issue 14.16: it said to halve batch_size where the model alone does not fit."""
    words = ["--arch_preset=llama", "--n_layer=4", "--n_head=4", "--n_embd=256", "--block_size=256", "--vocab_size=2048"]
    config = configure([*words, "--batch_size=64", "--device=cpu", "--dtype=float32"]).train
    said = {}
    for there in (0.05, 1.0, 400.0):
        monkeypatch.setattr(fitting, "total_memory", lambda device, there=there: there * 1e9)
        said[there] = out_of_memory(config)
        assert "a micro-batch of 64 × 256 tokens takes" in said[there] and f"has {there:.2f} GB" in said[there]
    assert "No batch size fits" in said[0.05] and "batch_size=" not in said[0.05]
    assert "What would fit: --batch_size=" in said[1.0] and "No batch size" not in said[1.0]
    assert "something else holds memory" in said[400.0]


def test_running_out_of_memory_in_a_run_is_answered_so(tiny_dataset, tmp_path, monkeypatch, capsys):
    """Issue 14.16."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "make_learner", full)
    assert train.main([*TINY_RUN, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path / 'out'}", "--max_iters=1"]) == 1
    assert "train.py: Out of memory: by prediction a micro-batch of 4 × 16 tokens" in capsys.readouterr().err


def test_an_ablation_of_nothing_asks_what_is_meant(capsys):
    """Issue 14.16: it trained the baseline three times."""
    assert ablate.main(["config/ablation_small.py", "--dry_run"]) == 2
    assert "What is to be compared?" in capsys.readouterr().err


def test_an_ablation_whose_key_is_varied_and_set_asks_which(capsys):
    """Issue 14.16: one of the two was passed over."""
    assert ablate.main(["config/ablation_small.py", "--vary", "dropout=0.0,0.1", "--dropout=0.2", "--dry_run"]) == 2
    assert "--dropout=0.2 is none of the values that --vary dropout compares" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- 17: README


def test_the_first_screen_says_what_a_batch_is_and_shows_a_conversion_with_its_proof():
    """Issue 14.17."""
    first = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:60])
    assert "whatever the machine" in first and "batch_size × gradient_accumulation_steps" in first
    assert "python convert.py" in first and "checked with transformers" in first and "largest logit difference" in first
