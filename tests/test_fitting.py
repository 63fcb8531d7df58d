"""Memory before a run: the micro-batch that fits, tried; the warning where nothing does; what this process may take."""

from __future__ import annotations

import json
import random
import re
import sys
from dataclasses import replace

import pytest
import torch

import train
from command_line import Failure
from configurator import ConfigError, configure
from tests.conftest import TINY_RUN
from training import fitting, meter
from training.fitting import Demand, largest_that_runs, rough_bound
from training.objectives import NextToken

GB = 10**9


def demand(*words: str, dtype: str = "float32", vocab_size: int = 256) -> Demand:
    config = configure(list(words)).train
    model = config.model_config(vocab_size)
    return Demand(model, config, dtype, "cpu", config.sequences_per_iteration(model.block_size))


def logged(folder) -> list[dict]:
    return [json.loads(line) for log in sorted(folder.glob("run_*.jsonl")) for line in log.read_text().splitlines()]


def losses(folder) -> list[float]:
    return [event["loss"] for event in logged(folder) if event["event"] == "step"]


# ------------------------------------------------------------------------------------------- the search


def test_the_search_ends_within_a_tenth_or_one_sequence_of_the_largest_that_works():
    chance = random.Random(1)
    for _ in range(300):
        limit, first, asked = chance.randint(1, 500), chance.randint(1, 2000), []
        found = largest_that_runs(lambda rows: asked.append(rows) or rows <= limit, first)
        assert found <= limit and (found == first or limit - found <= max(1, 0.1 * limit)), (limit, first, found)
        assert len(asked) <= 2 + 11 + 5 and asked[0] == first
    with pytest.raises(Failure, match="one sequence"):
        largest_that_runs(lambda rows: False, 8)
    for limit in (8, 9, 11, 30, 64, 100):  # where more may be tried than was predicted
        found = largest_that_runs(lambda rows: rows <= limit, 8, most=64)
        assert found <= min(limit, 64) and min(limit, 64) - found <= max(1, 0.1 * limit)


@pytest.mark.parametrize("share", [pytest.param(0.6, marks=pytest.mark.slow), 1.5])
def test_the_largest_of_the_model_is_the_last_that_its_own_figure_allows(share):
    small = ["--n_layer=2", "--n_head=2", "--n_embd=64", "--block_size=64", "--batch_size=64"]
    asked = demand(*small)
    room = share * asked.needs(64, "none", 1)
    found = asked.largest(room, "none", 1)
    assert asked.needs(found, "none", 1) <= room
    assert found == 64 if share > 1 else asked.needs(found + 1, "none", 1) > room
    assert asked.largest(1000, "none", 1) == 0


def test_the_rough_bound_is_above_the_models_figure():
    for words in (["config/quickstart.py"],):
        asked = demand(*words, vocab_size=50257)
        assert asked.needs(2, "none", 1) < rough_bound(asked, 2)


# ------------------------------------------------------------------------------------------- what there is


def limited(monkeypatch, which: int, size: int) -> list[tuple[int, int]]:
    """own_limits of a process that has one such limit."""
    found = {which: (size, meter.resource.RLIM_INFINITY)}
    unlimited = (meter.resource.RLIM_INFINITY,) * 2
    monkeypatch.setattr(meter.resource, "getrlimit", lambda asked: found.get(asked, unlimited))
    return meter.own_limits()


def test_the_limits_of_this_process_and_of_its_groups_count(tmp_path, monkeypatch):
    [(_, taken)] = limited(monkeypatch, meter.resource.RLIMIT_DATA, 10**15)
    [(limit, used)] = limited(monkeypatch, meter.resource.RLIMIT_DATA, taken + 3 * 10**8)
    assert limit - used == pytest.approx(3e8, abs=5e7) and meter.free_memory(torch.device("cpu")) == pytest.approx(3e8, abs=5e7)
    monkeypatch.undo()
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    own = tmp_path / "cgroup"
    for folder, limit, used in ((group, "max", 5), (tmp_path / "a", "1000", 700)):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(str(used))
        (folder / "memory.stat").write_text("anon 500\nfile 200\n")
    own.write_text("0::/a/b\n")
    assert meter.left_in_groups(tmp_path, own) == [500]
    old = tmp_path / "memory" / "job"
    old.mkdir(parents=True)
    for name, text in (("limit_in_bytes", "900"), ("usage_in_bytes", "400")):
        (old / f"memory.{name}").write_text(text)
    (old / "memory.stat").write_text("cache 1\ntotal_cache 50\n")
    own.write_text("7:cpu,cpuacct:/job\n4:memory:/job\n")
    assert meter.left_in_groups(tmp_path, own) == [550]
    assert meter.left_in_groups(tmp_path, tmp_path / "none") == []
    free = meter.free_memory(torch.device("cpu"))
    assert meter.free_memory(torch.device("cpu"), 4) == pytest.approx(free / 4, rel=0.2) and free > 1e6


# ------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--batch_size=auto"], "needs the size of the global batch"),
        (["--micro_batch=0", "--batch_size=4"], "micro_batch=0 must be at least 1"),
        (["--micro_batch=some", "--batch_size=4"], "micro_batch='some' is not"),
        (["--batch_size=auto", "--micro_batch=3", "--total_batch_tokens=1024"], "means micro_batch='auto', but micro_batch='3'"),
    ],
)
def test_what_auto_needs_is_said(words, reason):
    with pytest.raises(ConfigError, match=re.escape(reason)):
        configure(words)


def test_auto_over_a_file_with_a_number_keeps_the_global_batch(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("batch_size = 8\ngradient_accumulation_steps = 3\nblock_size = 64\n")
    train_config = configure([str(file), "--batch_size=auto"]).train
    assert train_config.sequences_per_iteration(64) == 24 and train_config.micro_batch == "auto"
    file.write_text("batch_size = 'auto'\ntotal_batch_tokens = 2048\nblock_size = 64\n")
    assert configure([str(file)]).train.sequences_per_iteration(64) == 32


@pytest.fixture
def runs_out_of_memory(monkeypatch):
    """runs_out_of_memory(rows) makes every training forward pass with more rows fail as PyTorch does; returns what was asked."""
    forward, asked = NextToken.__call__, []

    def limit(rows: int) -> list[int]:
        def call(self, model, batch):
            if torch.is_grad_enabled():
                asked.append(len(batch))
                if len(batch) > rows:
                    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
            return forward(self, model, batch)

        monkeypatch.setattr(NextToken, "__call__", call)
        return asked

    return limit


def test_auto_halves_where_memory_runs_out_and_trains_as_with_the_number(tmp_path, tiny_dataset, runs_out_of_memory, capsys):
    """The losses, dropout included, are those of a run with that number; what was chosen stays when the run goes on."""
    base = (*TINY_RUN, f"--dataset={tiny_dataset}", "--total_batch_tokens=512", "--dropout=0.2", "--eval_interval=0")
    asked = runs_out_of_memory(11)
    auto = [*(word for word in base if "batch_size" not in word), "--batch_size=auto", f"--out_dir={tmp_path / 'auto'}"]
    assert train.main([*auto, "--max_iters=3", "--lr_decay_iters=5"]) == 0
    assert asked[0] == 32 and max(asked[-6:]) == 11, asked
    printed = capsys.readouterr().out
    assert "in micro-batches of 11" in printed and "(batch_size=auto)" in printed
    start = logged(tmp_path / "auto")[0]
    assert start["config"]["micro_batch"] == 11 and start["tokens_per_iteration"] == 512
    assert train.main([*auto, "--max_iters=5", "--lr_decay_iters=5", "--resume"]) == 0
    assert "tried" not in capsys.readouterr().out
    plain = [*base, "--micro_batch=11", f"--out_dir={tmp_path / 'plain'}", "--max_iters=5"]
    assert train.main(plain) == 0
    assert losses(tmp_path / "auto") == losses(tmp_path / "plain") and len(losses(tmp_path / "plain")) == 5


def test_not_even_one_sequence_is_said_and_ends_the_run(tmp_path, tiny_dataset, runs_out_of_memory, capsys):
    runs_out_of_memory(0)
    run = [*TINY_RUN, f"--dataset={tiny_dataset}", f"--out_dir={tmp_path}", "--micro_batch=auto", "--max_iters=1"]
    assert train.main(run) == 1
    assert "Out of memory with micro-batches of one sequence." in capsys.readouterr().err


def test_a_run_that_will_not_fit_is_warned_about_before_the_model_is_built(tmp_path, tiny_dataset, monkeypatch, capsys):
    monkeypatch.setattr(fitting, "free_memory", lambda device, processes: 4_000_000)
    run = [
        *TINY_RUN,
        f"--dataset={tiny_dataset}",
        f"--out_dir={tmp_path}",
        "--batch_size=256",
        "--max_iters=1",
        "--eval_interval=0",
    ]
    assert train.main(run) == 0
    printed = capsys.readouterr().out
    warning = next(line for line in printed.split("\n") if line.startswith("warning: this run needs"))
    assert printed.index(warning) < printed.index("parameters N =")
    needs, free = re.search(r"needs ([\d.]+) GB of memory a process, there are ([\d.]+) free", warning).groups()
    assert float(free) == 0.004
    largest = int(re.search(r"What would fit: --batch_size=(\d+)", warning).group(1))
    asked = demand(*run, vocab_size=256)
    assert asked.needs(largest, "none", 1) <= 4_000_000 * 0.92 < asked.needs(largest + 1, "none", 1) and largest > 4
    assert float(needs) == pytest.approx(asked.needs(256, "none", 1) / 1e9, rel=0.06)


@pytest.mark.slow
def test_what_would_fit_is_a_smaller_batch_then_checkpointing_then_more_processes():
    llama = demand("config/full_llama_1.36b.py", dtype="bfloat16", vocab_size=32000)
    llama = replace(llama, device="cuda")
    assert re.match(r"What would fit: --batch_size=\d+, with", llama.remedy(40 * GB, "none", 1))
    full = replace(llama, config=replace(llama.config, activation_checkpointing="full"))
    between = (full.needs(1, "none", 1) + llama.needs(1, "none", 1)) / 2
    assert "--activation_checkpointing=full" in llama.remedy(between, "none", 1)
    said = llama.remedy(7 * GB, "none", 1)
    assert re.search(r"What would fit: (4|8) processes, each with as much memory, with --parallelism=fsdp", said)
    assert "Nothing here would fit" in llama.remedy(0.1 * GB, "none", 1)


# ------------------------------------------------------------------------------------------- against the real thing

LIMITED = """
import resource, sys, torch
torch.set_num_threads(1)
import train
from flops_parameter_counting.memory import estimate_memory
from model_config import resolve
estimate_memory(resolve("gpt2", n_layer=1, n_head=1, n_embd=8, vocab_size=9, block_size=8), batch_size=1, device="cpu")
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(train.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["--arch_preset=gpt2 --block_size=64", "--arch_preset=llama --block_size=128 --n_layer=4"])
def test_auto_is_within_a_tenth_of_the_largest_that_runs(tmp_path, tiny_dataset, run_python, shape):
    """python -m pytest -m slow -s tests/test_fitting.py: the largest that runs is found by bisection, a process each.

    All of them have loaded what a prediction needs, some 100 MB, which are a fifteenth of this small limit.
    """
    words = [*TINY_RUN, *shape.split(), f"--dataset={tiny_dataset}", "--vocab_size=16384", "--total_batch_tokens=32768"]
    words += ["--save_interval=-1", "--max_iters=2", "--eval_interval=0"]  # the second has the optimizer's state
    limit = 1_500_000_000

    def start(micro_batch, number):
        run = [*words, f"--micro_batch={micro_batch}", f"--out_dir={tmp_path / str(number)}"]
        return run_python("-c", LIMITED, str(limit), *run, timeout=500)

    done = start("auto", "auto")
    assert done.returncode == 0, done.stderr
    chosen = logged(tmp_path / "auto")[0]["config"]["micro_batch"]
    works, fails = chosen, None
    probe = chosen
    while fails is None:
        probe = max(probe + 1, int(probe * 1.15))
        if start(probe, probe).returncode == 0:
            works = probe
        else:
            fails = probe
    while fails - works > 1:
        middle = (works + fails) // 2
        if start(middle, middle).returncode == 0:
            works = middle
        else:
            fails = middle
    print(f"\n{shape}: chosen {chosen}, largest that runs {works}", file=sys.stderr)
    assert works - chosen <= max(1, 0.1 * works)
