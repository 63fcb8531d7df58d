"""While a run trains: loss spikes and what was read there, norms layer by layer, samples; none of it changes a loss."""

from __future__ import annotations

import json
import math
import random
import re

import numpy as np
import pytest
import torch

import train
from data import show
from data.preparation import prepare
from model_builder import build_model
from model_config import resolve
from tests.conftest import TINY_RUN
from training.observing import FEW, LayerStatistics, Spikes

NOISE = "".join(chr(code) for code in range(33, 127))


def events(folder, kind: str) -> list[dict]:
    lines = [line for log in sorted(folder.glob("run_*.jsonl")) for line in log.read_text().splitlines()]
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def spikes_in(losses: list[float]) -> list[int]:
    finder = Spikes()
    return [number for number, loss in enumerate(losses) if finder.judge(loss)[0]]


# ------------------------------------------------------------------------------------------- the rule


def test_ordinary_losses_are_no_spikes_and_planted_ones_are():
    for seed in range(20):
        drawn = np.random.default_rng(seed)
        falling = 3 + 7 * np.exp(-np.arange(600) / 60) + drawn.normal(0, 0.05, 600)
        assert spikes_in(list(falling)) == []
        planted = sorted(drawn.choice(np.arange(100, 600), 4, replace=False))
        falling[planted] += 1.0
        assert spikes_in(list(falling)) == list(planted)


def test_the_start_is_only_taken_in_nan_is_always_named_and_a_new_level_is_got_used_to():
    assert spikes_in([9.0] + [3.0] * 10) == [] and spikes_in([3.0] * FEW + [9.0]) == [FEW]
    assert spikes_in([3.0] * 3 + [math.nan, math.inf] + [3.0] * 5) == [3, 4]
    level = spikes_in([3.0] * 50 + [5.0] * 200)
    assert level == list(range(50, 50 + FEW))
    assert spikes_in([3.0] * 50 + [2.0] * 50) == []


# ------------------------------------------------------------------------------------------- a planted spike


def test_a_planted_spike_is_found_and_its_documents_are_printed(tmp_path, capsys):
    """Documents of eight words, and ten of noise among them: the steps that read noise stand out, and show.py prints it."""
    chance = random.Random(3)
    words = "the cat saw a dog and it ran".split()  # noqa: SIM905
    texts = [" ".join(chance.choices(words, k=chance.randint(8, 24))) for _ in range(500)]
    for place in range(10):
        texts.insert(45 * (place + 1), "".join(chance.choices(NOISE, k=90)))
    folder = tmp_path / "set"
    prepare(lambda: iter([(str(n), text) for n, text in enumerate(texts)]), folder, tokenizer="byte", val_fraction=0.02)
    run = [*TINY_RUN, f"--dataset={folder}", f"--out_dir={tmp_path}", "--epochs=1", "--log_interval=7", "--eval_interval=0"]
    assert train.main([*run, "--block_size=32"]) == 0
    warnings = [event for event in events(tmp_path, "warning") if "loss spike" in event["message"]]
    steps = [step for event in warnings for step in event["spikes"]]
    capsys.readouterr()

    def shown(step: int) -> str:
        assert show.main([f"--run={tmp_path}", f"--step={step}", "--rows=0"]) == 0
        return capsys.readouterr().out

    def noise(text: str) -> int:
        body = "".join(line for line in text.split("\n")[1:] if not line.startswith(("---", "·····")))
        return sum(not (c.islower() or c.isspace()) for c in body)

    assert len(steps) >= 10 and all(noise(shown(step)) >= 3 for step in steps[::3])
    last = max(event["step"] for event in events(tmp_path, "step"))
    quiet = [step for step in range(100, last + 1, 10) if step not in steps]
    assert len(quiet) > 6 and all(noise(shown(step)) <= 12 for step in quiet)
    command = re.search(r"python data/show.py (--run=\S+) (--step=\d+) --rows=0", warnings[0]["message"])
    assert show.main([*command.groups()]) == 0 and command[2] == f"--step={warnings[0]['spikes'][0]}"


# ------------------------------------------------------------------------------------------- norms


def test_the_statistics_are_those_of_the_step_computed_by_hand():
    model = build_model(resolve("gpt2", n_layer=2, n_head=2, n_embd=16, vocab_size=31, block_size=8, pad_vocab_multiple=16))
    batches = [torch.randint(0, 31, (2, 8)), torch.randint(0, 31, (1, 8))]
    found = LayerStatistics(model, lambda sums: sums, lambda most: most)
    with found.watching():
        for batch in batches:
            model(batch).square().sum().backward()
    got = found.of_gradients(torch.tensor(4.0))
    outputs, logits = [], []
    with torch.no_grad():
        for batch in batches:
            x, context = model.front(batch)
            for number, block in enumerate(model.blocks):
                x = block(x, context)
                outputs.append((number, x))
            logits.append(model.tail(x))
    for number in range(2):
        all_of_it = torch.cat([x.flatten() for layer, x in outputs if layer == number])
        assert got["activation_rms"][f"blocks.{number}"] == pytest.approx(float(all_of_it.square().mean().sqrt()), rel=1e-5)
        own = torch.cat([p.grad.flatten() for p in model.blocks[number].parameters()])
        assert got["gradient_norm"][f"blocks.{number}"] == pytest.approx(float(own.norm()) / 4, rel=1e-5)
    rest = torch.cat([p.grad.flatten() for name, p in model.named_parameters() if not name.startswith("blocks.")])
    assert got["gradient_norm"]["all else"] == pytest.approx(float(rest.norm()) / 4, rel=1e-5)
    assert got["largest_logit"] == pytest.approx(max(float(one.abs().max()) for one in logits), rel=1e-5)
    assert not any(block._forward_hooks for block in model.blocks) and not model.head._forward_hooks


def test_watching_and_sampling_change_no_loss_and_are_logged_at_their_steps(tmp_path, tiny_dataset, capsys):
    run = [*TINY_RUN, f"--dataset={tiny_dataset}", "--max_iters=7", "--dropout=0.1", "--eval_interval=0", "--save_interval=-1"]
    run += ["--gradient_accumulation_steps=2"]
    assert train.main([*run, f"--out_dir={tmp_path / 'plain'}"]) == 0
    watched = ["--stats_interval=3", "--sample_interval=2", "--sample_prompt=def ", "--sample_tokens=9", "--tensorboard"]
    assert train.main([*run, f"--out_dir={tmp_path / 'watched'}", *watched]) == 0
    plain, seen = events(tmp_path / "plain", "step"), events(tmp_path / "watched", "step")
    assert [event["loss"] for event in plain] == [event["loss"] for event in seen]
    statistics, samples = events(tmp_path / "watched", "stats"), events(tmp_path / "watched", "sample")
    assert [event["step"] for event in statistics] == [3, 6] and [event["step"] for event in samples] == [2, 4, 6, 7]
    assert all(event["text"].startswith("def ") for event in samples)
    for event, step in zip(statistics, (seen[2], seen[5])):  # the blocks' norms and the rest make up the whole
        whole = math.sqrt(sum(norm**2 for norm in event["gradient_norm"].values()))
        assert whole == pytest.approx(step["grad_norm"], rel=1e-4)
        assert set(event["activation_rms"]) == {"blocks.0", "blocks.1"} and event["largest_logit"] > 0
    printed = capsys.readouterr().out
    assert "stats at 3 | largest gradient norm" in printed and "sample at 7 | def " in printed
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [board] = (tmp_path / "watched" / "tensorboard").iterdir()
    found = EventAccumulator(str(board)).Reload().Tags()
    assert "stats/gradient_norm/blocks.1" in found["scalars"] and "sample/text_summary" in found["tensors"]


def test_without_a_tokenizer_samples_are_ids_and_that_is_said(tmp_path, capsys):
    folder = tmp_path / "bare"  # nanoGPT's: no meta
    folder.mkdir()
    ids = np.random.default_rng(1).integers(0, 60, 4000).astype("<u2")
    ids.tofile(folder / "train.bin")
    ids[:500].tofile(folder / "val.bin")
    run = [*TINY_RUN, f"--dataset={folder}", f"--out_dir={tmp_path / 'out'}", "--max_iters=2", "--vocab_size=61"]
    assert train.main([*run, "--sample_interval=2", "--sample_tokens=5", "--sample_prompt=hello"]) == 0
    printed = capsys.readouterr().out
    assert "are token ids, after the id 0: it has no tokenizer" in printed
    assert re.search(r"sample at 2 \| 0( \d+){5}\n", printed)
