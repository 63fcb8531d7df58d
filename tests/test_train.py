"""The loop and what it is made of: numerics against hand calculation, stopping rules, and every kind of bad input."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import stat
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY_RUN

import train
from configurator import configure
from model_builder import build_model
from model_config import resolve
from tests.preloaded import preloaded_python
from training.activation_checkpointing import apply_activation_checkpointing
from training.checkpoint import CheckpointError, CheckpointStore, load_model, verify
from training.objectives import next_token_loss
from training.optimizers import Optimizer, clip_and_check
from training.precision import LossScale, SkipCounter, set_compute_dtype
from training.schedules import learning_rate, run_length
from training.train_config import TrainConfig

TINY_MODEL = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=31)


def run(dataset: Path, out_dir: Path, *arguments: str) -> int:
    return train.main([*TINY_RUN, f"--dataset={dataset}", f"--out_dir={out_dir}", *arguments])


def events(out_dir: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for log in sorted(out_dir.glob("run_*.jsonl")) for line in log.read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def gradients(model, batch, pieces: int) -> list[torch.Tensor]:
    model.zero_grad()
    for rows in batch.chunk(pieces):
        (next_token_loss(model, rows[:, :-1], rows[:, 1:]) / batch[:, 1:].numel()).backward()
    return [p.grad.clone() for p in model.parameters()]


def relative_difference(one, other) -> float:
    return float(
        sum((a - b).double().square().sum() for a, b in zip(one, other)).sqrt()
        / sum(a.double().square().sum() for a in one).sqrt()
    )


# ------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("preset", ("gpt2", "gpt2_postnorm", "llama", "custom"))
def test_one_batch_of_eight_has_the_gradient_of_four_of_two(preset):
    torch.manual_seed(0)
    model, batch = build_model(resolve(preset, **TINY_MODEL)), torch.randint(0, 31, (8, 9))
    assert relative_difference(gradients(model, batch, 1), gradients(model, batch, 4)) < 1e-6


@pytest.mark.parametrize("mode", ("full", "selective"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_checkpointed_is_the_same_as_not_with_dropout(mode, dtype):
    batch, found = torch.randint(0, 31, (4, 9), generator=torch.Generator().manual_seed(0)), {}
    for setting in ("none", mode):
        model = build_model(resolve("llama", **TINY_MODEL, dropout=0.2))
        set_compute_dtype(model, dtype)
        apply_activation_checkpointing(model, setting)
        torch.manual_seed(1)
        found[setting] = gradients(model, batch, 2)
    assert all(torch.equal(a, b) for a, b in zip(found["none"], found[mode]))


def test_selective_checkpointing_repeats_no_matrix_product_and_full_repeats_all_of_the_blocks():
    from torch.utils.flop_counter import FlopCounterMode

    from flops_parameter_counting.flops import flops_per_token

    config = resolve("llama", **TINY_MODEL)
    # PyTorch stops a recomputation once everything needed is back: here before each block's last projection
    early = 16 * config.n_layer * 2 * config.d_ff * config.n_embd
    for mode in ("none", "selective", "full"):
        model = build_model(config, device="meta")
        apply_activation_checkpointing(model, mode)
        tokens = torch.zeros(2, 8, dtype=torch.long, device="meta")
        with FlopCounterMode(display=False) as counter:
            model(tokens).sum().backward()
        counted = counter.get_total_flops() + (early if mode == "full" else 0)
        assert counted == 16 * flops_per_token(config, checkpointing=mode).hardware


def test_bf16_keeps_fp32_weights_and_its_loss_is_near_fp32():
    batch, found = torch.randint(0, 31, (4, 9), generator=torch.Generator().manual_seed(0)), []
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model(resolve("gpt2", **TINY_MODEL))
        set_compute_dtype(model, dtype)
        assert model(batch[:, :-1]).dtype == dtype
        loss = next_token_loss(model, batch[:, :-1], batch[:, 1:])
        loss.backward()
        assert loss.dtype == torch.float32
        assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
        found.append(float(loss.detach()))
    assert found[1] == pytest.approx(found[0], rel=2e-3)


def test_the_loss_is_the_mean_cross_entropy_in_numpy():
    import numpy as np

    torch.manual_seed(0)
    model, batch = build_model(resolve("gpt2", **TINY_MODEL, pad_vocab_multiple=16)), torch.randint(0, 31, (3, 9))
    batch[0, 5:] = -1  # ignored as targets
    inputs, targets = batch[:, :-1].clamp(min=0), batch[:, 1:]
    logits = model(inputs).detach().double().numpy()
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -sum(log_probability[b, t, targets[b, t]] for b in range(3) for t in range(8) if targets[b, t] >= 0)
    assert float(next_token_loss(model, inputs, targets).detach()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)))
def test_the_chunked_loss_and_its_gradient_are_pytorchs(monkeypatch, dtype, tolerance):
    from model_parts import losses

    monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", 4 * 101 * 7)  # 7 rows at a time, the last chunk shorter
    logits = (3 * torch.randn(40, 128, generator=torch.Generator().manual_seed(0))).to(dtype)[:, :101]  # not contiguous
    targets = torch.randint(0, 101, (40,), generator=torch.Generator().manual_seed(1))
    targets[[3, 20, 39]] = losses.IGNORE
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = losses.summed_cross_entropy(mine, targets)
    assert type(loss.grad_fn).__name__ == "_ChunkedCrossEntropyBackward"
    expected = F.cross_entropy(theirs.float(), targets, ignore_index=-1, reduction="sum")
    (loss * 0.3).backward()
    (expected * 0.3).backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=tolerance, atol=1e-7)


def test_an_adamw_step_by_hand():
    config = TrainConfig(learning_rate=0.01, weight_decay=0.1, beta1=0.8, beta2=0.9, adam_eps=1e-6)
    model = build_model(resolve("gpt2", **TINY_MODEL))
    optimizer, no_skip = Optimizer(model, config), torch.tensor(0.0)
    expected = {name: p.detach().clone().double() for name, p in model.named_parameters()}
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in expected.items()}
    for t, lr in ((1, 0.01), (2, 0.005), (3, 0.02)):
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(hash(name) % 1000 + t))
            g, (m, v) = p.grad.double(), moments[name]
            m.mul_(0.8).add_(0.2 * g)
            v.mul_(0.9).add_(0.1 * g * g)
            decay = 0.1 if p.ndim >= 2 else 0.0  # matrices only
            w = expected[name] * (1 - lr * decay)
            expected[name] = w - lr * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6)
        optimizer.step(lr, no_skip)
    for name, p in model.named_parameters():
        assert torch.allclose(p.double(), expected[name], atol=2e-6), name


def test_a_muon_step_by_hand():
    """Nesterov momentum, five quintic Newton–Schulz steps (in bf16, as published), RMS matched to AdamW, decay."""
    config = TrainConfig(optimizer="muon", learning_rate=0.02, weight_decay=0.1, muon_momentum=0.9)
    model = build_model(resolve("gpt2", **TINY_MODEL))
    optimizer = Optimizer(model, config)
    assert {optimizer.names[p] for g in optimizer.updates[-1].optimizer.param_groups for p in g["params"]} == {
        name for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2
    }
    name, weight = next((n, p) for n, p in model.named_parameters() if n.endswith("up_proj.weight"))
    expected, buffer = weight.detach().clone(), torch.zeros_like(weight)
    for t in range(2):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel() + t))
        gradient = weight.grad.clone()
        buffer = 0.9 * buffer + 0.1 * gradient  # PyTorch's form of the momentum: a running mean
        x = (0.1 * gradient + 0.9 * buffer).T.bfloat16()  # (d_in, d_out) is the wide orientation here
        x = x / x.norm()
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
        expected = expected * (1 - 0.02 * 0.1) - 0.02 * 0.2 * math.sqrt(max(weight.shape)) * x.T.float()
        optimizer.step(0.02, torch.tensor(0.0))
    assert relative_difference([expected], [weight.detach()]) < 2e-2  # bf16 rounding in another order
    singular = torch.linalg.svdvals(x.float())
    assert singular.min() > 0.5 and singular.max() < 1.5  # nearly orthogonal: it is Muon's update, not a gradient


def test_clipping_against_pytorchs_own():
    model = build_model(resolve("gpt2", **TINY_MODEL))
    batch = torch.randint(0, 31, (4, 9), generator=torch.Generator().manual_seed(0))
    mine = gradients(model, batch, 1)
    norm, skip = clip_and_check(model, torch.tensor(1.0), 0.1, torch.tensor(1.0))
    clipped = [p.grad for p in model.parameters()]
    reference = [torch.nn.Parameter(g.clone()) for g in mine]
    for p, g in zip(reference, mine):
        p.grad = g.clone()
    expected = torch.nn.utils.clip_grad_norm_(reference, 0.1)
    assert float(norm) == pytest.approx(float(expected), rel=1e-6) and float(skip) == 0.0
    assert relative_difference([p.grad for p in reference], clipped) < 1e-6


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_a_non_finite_gradient_leaves_weights_and_optimizer_state_untouched(optimizer, bad):
    model = build_model(resolve("llama", **TINY_MODEL))
    opt, batch = Optimizer(model, TrainConfig(optimizer=optimizer)), torch.randint(0, 31, (4, 9))

    def step(spoil: bool):
        loss = next_token_loss(model, batch[:, :-1], batch[:, 1:])
        loss.backward()
        if spoil:
            next(model.parameters()).grad[0, 0] = bad
        _, skip = clip_and_check(model, loss.detach(), 1.0, torch.tensor(1.0))
        opt.step(1e-2, skip)
        opt.zero_grad()
        return float(skip)

    assert step(spoil=False) == 0.0
    before = {**{n: p.detach().clone() for n, p in model.named_parameters()}, **{n: t.clone() for n, t in opt.state().items()}}
    assert step(spoil=True) == 1.0
    after = {**dict(model.named_parameters()), **opt.state()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert step(spoil=False) == 0.0
    assert not all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_loss_scale_halves_on_overflow_and_doubles_after_good_steps():
    scale, good, bad = LossScale(torch.float16, torch.device("cpu"), start=64.0, interval=3), torch.tensor(0.0), torch.tensor(1.0)
    history = []
    for skipped in (bad, good, good, good, good, good, bad, good, good, good):
        scale.update(skipped)
        history.append(float(scale.scale))
    assert history == [32, 32, 32, 64, 64, 64, 32, 32, 32, 64]
    idle = LossScale(torch.bfloat16, torch.device("cpu"))
    idle.update(bad)
    assert float(idle.scale) == 1.0


def test_skips_are_counted_in_all_and_in_a_row():
    counter = SkipCounter(torch.device("cpu"))
    for skipped in (1, 0, 1, 1, 0, 1, 1, 1):
        counter.update(torch.tensor(float(skipped)))
    assert counter.read() == (6, 3)


def schedule(name: str, **keys) -> list[float]:
    config = TrainConfig(lr_schedule=name, learning_rate=1.0, min_lr=0.1, warmup_iters=4, **keys)
    return [learning_rate(i, config, 24) for i in range(30)]


def test_schedules_have_their_published_shapes():
    for name in ("cosine", "linear", "wsd", "constant", "inverse_sqrt"):
        assert schedule(name)[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])  # linear warm-up
        assert schedule(name)[4] == pytest.approx(1.0)
    cosine, linear, wsd = schedule("cosine"), schedule("linear"), schedule("wsd", lr_decay_fraction=0.25)
    assert cosine[14] == pytest.approx(0.55) and linear[14] == pytest.approx(0.55)  # half way
    assert cosine[9] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert linear[9] == pytest.approx(0.1 + 0.9 * 0.75)
    assert wsd[19] == pytest.approx(1.0) and wsd[4 + 15 + 3] == pytest.approx(0.1 + 0.9 * 0.4)
    assert schedule("inverse_sqrt")[16] == pytest.approx(0.5)  # √(4/16)
    for name in ("cosine", "linear", "wsd"):
        assert schedule(name)[24:] == pytest.approx([0.1] * 6)  # the end is min_lr, and stays
    assert schedule("cosine", lr_decay_iters=10)[10:] == pytest.approx([0.1] * 20)


def test_length_in_iterations_tokens_and_epochs():
    config = dict(batch_size=4, gradient_accumulation_steps=2)
    assert run_length(TrainConfig(**config, max_iters=7), 16, 100) == 7
    assert run_length(TrainConfig(**config, max_tokens=1000), 16, 100) == 8  # 128 tokens an iteration, rounded up
    assert run_length(TrainConfig(**config, epochs=1.5), 16, 100) == 19  # 150 windows / 8
    assert run_length(TrainConfig(total_batch_tokens=256, batch_size=4, epochs=1), 16, 100) == 7


# ------------------------------------------------------------------------------------------- whole runs


def test_a_run_learns_and_leaves_a_log_and_a_model_that_can_be_loaded(tmp_path, tiny_dataset, capsys):
    assert run(tiny_dataset, tmp_path, "--max_iters=60", "--eval_interval=30") == 0
    steps, evaluations, (first,) = events(tmp_path, "step"), events(tmp_path, "eval"), events(tmp_path, "run_start")
    assert [s["step"] for s in steps] == list(range(1, 61)) and steps[-1]["tokens"] == 60 * 4 * 16
    assert steps[0]["loss"] == pytest.approx(math.log(256), abs=0.3) and evaluations[-1]["val_loss"] < 3.6
    assert (
        first["model"]["parameters"]
        == build_model(
            resolve("llama", n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=256), device="meta"
        ).num_parameters()
    )
    model, tokenizer = load_model(tmp_path)
    assert tokenizer.decode(tokenizer.encode("def f():")) == "def f():"
    # the logged evaluation is the loss of the saved model on the same windows, computed here in another way
    from data.token_dataset import TokenDataset

    split = TokenDataset.open(tiny_dataset).split("val")
    windows = -(-(len(split) - 1) // 16)
    tokens = torch.stack([torch.from_numpy(split.read(i * windows // 4 * 16, i * windows // 4 * 16 + 17)) for i in range(4)])
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).detach()
    assert evaluations[-1]["val_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert evaluations[-1]["bits_per_byte"] == pytest.approx(float(loss) / math.log(2), rel=1e-5)  # a byte a token
    out = capsys.readouterr().out
    assert "N = " in out and "2L-2H-32D-RoPE-RMS-SwiGLU-PreNorm" in out and "step 60/60" in out and "\r" not in out


def test_execution_keys_do_not_change_the_losses(tmp_path, tiny_dataset):
    found = {}
    for number, option in enumerate(
        (
            "--threads=1",
            "--attention_backend=manual",
            "--activation_checkpointing=full",
            "--activation_checkpointing=selective",
            "--log_interval=3",
            "--threads=2",
            "--eval_interval=2",
            "--batch_size=2 --gradient_accumulation_steps=2",
            "--total_batch_tokens=64",
        )
    ):
        assert run(tiny_dataset, tmp_path / str(number), "--max_iters=9", "--save_interval=-1", *option.split()) == 0
        found[option] = events(tmp_path / str(number), "step")[-1]["loss"]
    for option, loss in found.items():
        assert loss == pytest.approx(found["--threads=1"], rel=1e-5), option


def test_compiled_blocks_give_the_same_losses(tmp_path, tiny_dataset):
    if shutil.which("g++") is None and shutil.which("gcc") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    for name in ("True", "False"):
        options = ("--n_layer=1", "--max_iters=5", f"--compile={name}", "--save_interval=-1")
        assert run(tiny_dataset, tmp_path / name, *options) == 0
    one, other = ([s["loss"] for s in events(tmp_path / name, "step")] for name in ("True", "False"))
    assert one == pytest.approx(other, rel=1e-4)


def test_eval_only_writes_no_checkpoint_and_repeats_the_logged_loss(tmp_path, tiny_dataset):
    assert run(tiny_dataset, tmp_path, "--max_iters=8") == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*")}
    assert run(tiny_dataset, tmp_path, "--init_from=resume", "--eval_only") == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*")} == before
    _, first, second = events(tmp_path, "eval")  # the first is of a model that knows nothing
    assert first["val_loss"] == second["val_loss"]
    assert run(tiny_dataset, tmp_path / "new", "--eval_only=True") == 0
    assert not (tmp_path / "new" / "checkpoints").exists()


def test_patience_stops_a_run_that_no_longer_improves_and_best_points_to_its_best(tmp_path, tiny_dataset, capsys):
    assert (
        run(
            tiny_dataset,
            tmp_path,
            "--max_iters=400",
            "--eval_interval=5",
            "--patience=2",
            "--learning_rate=0.3",
            "--lr_schedule=constant",
            "--grad_clip=0",
        )
        == 0
    )
    evaluations, (end,) = events(tmp_path, "eval"), events(tmp_path, "run_end")
    assert end["outcome"] == "out of patience" and len(evaluations) < 80
    best = min(evaluations, key=lambda e: e["val_loss"])
    assert end["best_step"] == best["step"] == evaluations[-3]["step"]
    store = CheckpointStore(tmp_path)
    assert store.pointed("best").name == f"step_{best['step']:09d}"
    assert store.pointed("latest").name == f"step_{evaluations[-1]['step']:09d}"


def test_only_the_last_checkpoints_and_the_best_are_kept(tmp_path, tiny_dataset):
    assert run(tiny_dataset, tmp_path, "--max_iters=30", "--eval_interval=0", "--save_interval=5", "--keep_last=3") == 0
    assert [p.name for p in CheckpointStore(tmp_path).all()] == [f"step_{s:09d}" for s in (20, 25, 30)]


def test_a_new_run_puts_the_former_ones_checkpoints_aside(tmp_path, tiny_dataset, capsys):
    for seed in (1, 2):
        assert run(tiny_dataset, tmp_path, "--max_iters=3", f"--seed={seed}") == 0
    assert json.loads((tmp_path / "checkpoints" / "step_000000003" / "state.json").read_text())["config"]["seed"] == 2
    assert json.loads((tmp_path / "checkpoints.previous" / "step_000000003" / "state.json").read_text())["config"]["seed"] == 1
    assert "checkpoints.previous" in capsys.readouterr().out


def test_weights_of_another_run_start_a_new_one(tmp_path, tiny_dataset):
    assert run(tiny_dataset, tmp_path / "base", "--max_iters=30") == 0
    assert (
        train.main(
            [
                "--batch_size=4",
                "--learning_rate=1e-3",
                "--max_iters=3",
                "--log_interval=1",
                "--device=cpu",
                "--threads=1",
                f"--dataset={tiny_dataset}",
                f"--out_dir={tmp_path / 'tuned'}",
                f"--init_from=weights:{tmp_path / 'base'}",
                "--data_seed=5",
                "--dtype=float32",
                "--eval_interval=0",
            ]
        )
        == 0
    )
    steps = events(tmp_path / "tuned", "step")
    assert [s["step"] for s in steps] == [1, 2, 3] and steps[0]["loss"] < 4.0 and steps[0]["lr"] == pytest.approx(1e-3)
    one, two = (load_model(tmp_path / name)[0].config for name in ("base", "tuned"))
    assert one == two


def test_too_many_skipped_updates_stop_the_run_and_name_the_last_good_checkpoint(tmp_path, tiny_dataset, capsys, monkeypatch):
    assert run(tiny_dataset, tmp_path, "--max_iters=5") == 0
    monkeypatch.setattr("training.objectives.next_token_loss", lambda model, x, y: next_token_loss(model, x, y) * math.nan)
    assert run(tiny_dataset, tmp_path, "--max_iters=50", "--init_from=resume", "--nonfinite_limit=4") == 1
    captured = capsys.readouterr()
    assert "step_000000005" in captured.err and "skipped" in captured.err and "Traceback" not in captured.err
    (end,) = [e for e in events(tmp_path, "run_end") if e["outcome"] == "diverged"]
    assert end["skipped"] == 4 and load_model(tmp_path)


def test_mfu_is_never_claimed_against_a_peak_that_the_run_overtakes(tmp_path, tiny_dataset, monkeypatch):
    """Other work can disturb the measurement of a CPU's peak; then MFU would come out several times too high."""
    from flops_parameter_counting import hardware

    monkeypatch.setattr(hardware, "_measured", {})
    monkeypatch.setattr(hardware, "_measure_cpu_peak", lambda *_: hardware.Peak(1e3, "measured: disturbed", measured=True))
    assert run(tiny_dataset, tmp_path, "--max_iters=3", "--save_interval=-1") == 0
    assert [s["mfu"] for s in events(tmp_path, "step")] == [None] * 3
    assert len(events(tmp_path, "warning")) == 1
    monkeypatch.undo()
    hardware._measured.clear()
    assert run(tiny_dataset, tmp_path / "calm", "--max_iters=3", "--save_interval=-1") == 0
    for step in events(tmp_path / "calm", "step"):
        from flops_parameter_counting.flops import flops_per_token

        per_token = flops_per_token(resolve("llama", n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=256)).full
        assert step["mfu"] == pytest.approx(step["tokens_per_s"] * per_token / hardware._measured[torch.float32, 1].flops)
        assert 0 < step["mfu"] < 1


# ------------------------------------------------------------------------------------------- bad input


def refused(capsys, code: int, *words: str) -> str:
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert lines, err
    for word in words:
        assert word in err, err
    return err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--n_laye=3"], ["n_laye", "n_layer"]),
        (["--n_layer=two"], ["n_layer", "whole number"]),
        (["--n_embd=2432", "--n_head=18"], ["18", "2432", "n_head=19"]),
        (["--normalization=batchnorm"], ["batchnorm", "layernorm", "rmsnorm"]),
        (["--arch_preset=lama"], ["lama", "llama"]),
        (["config/nothing.py"], ["config/nothing.py", "quickstart"]),
        (["--device=tpu"], ["device", "tpu"]),
        (["--attention_backend=flex", "--device=cpu"], ["flex", "CPU", "sdpa"]),
        (["--attention_backend=flex", "--dropout=0.1"], ["flex", "dropout"]),
        (["--max_iters=5", "--max_tokens=5"], ["max_iters", "max_tokens"]),
        (["--batch_size=0"], ["batch_size=0"]),
    ],
)
def test_unusable_configuration_is_a_sentence_and_exit_code_2(arguments, words, capsys):
    assert train.main(arguments) == 2
    refused(capsys, 2, *words)


def test_debug_shows_the_traceback():
    with pytest.raises(Exception, match="n_laye"):
        train.main(["--n_laye=3", "--debug"])


def damaged(dataset: Path, folder: Path, name: str, change) -> Path:
    copy = folder / f"damaged_{name}"
    shutil.copytree(dataset, copy)
    change(copy)
    return copy


def test_damaged_datasets_are_refused_with_a_sentence(tmp_path, tiny_dataset, capsys):
    def edit_meta(**keys):
        def change(folder):
            meta = json.loads((folder / "meta.json").read_text())
            (folder / "meta.json").write_text(json.dumps({**meta, **keys}))

        return change

    def cut(folder):
        with open(folder / "train.bin", "r+b") as file:
            file.truncate(1001)

    def flip(folder):
        data = bytearray((folder / "val.bin").read_bytes())
        data[100] ^= 1
        (folder / "val.bin").write_bytes(data)

    cases = {
        "truncated": (cut, "train.bin"),
        "flipped": (flip, "val.bin"),
        "dtype": (edit_meta(dtype="uint32"), "dtype"),
        "float": (edit_meta(dtype="float64"), "float64"),
        "no_train": (lambda f: (f / "train.bin").unlink(), "train.bin"),
        "not_json": (lambda f: (f / "meta.json").write_text("{"), "meta.json"),
    }
    for name, (change, word) in cases.items():
        assert run(damaged(tiny_dataset, tmp_path, name, change), tmp_path / "out", "--max_iters=2") == 1, name
        refused(capsys, 1, word)
    assert run(tmp_path / "nowhere", tmp_path / "out", "--max_iters=2") == 1
    refused(capsys, 1, "nowhere", "prepare.py")
    assert run(tiny_dataset, tmp_path / "out", "--vocab_size=100", "--max_iters=2") == 1
    refused(capsys, 1, "vocab_size", "256")
    assert run(tiny_dataset, tmp_path / "out", "--block_size=100000", "--max_iters=2") == 1
    refused(capsys, 1, "block_size")


def test_resuming_a_changed_model_names_the_keys(tmp_path, tiny_dataset, capsys):
    assert run(tiny_dataset, tmp_path, "--max_iters=3") == 0
    assert run(tiny_dataset, tmp_path, "--init_from=resume", "--n_layer=3", "--beta2=0.5", "--max_iters=9") == 2
    err = refused(capsys, 2, "n_layer  3 (command line)    2 (command line)", "beta2", "0.5 (command line)")
    assert "n_head" not in err
    assert load_model(tmp_path)


def test_resuming_on_changed_data_is_refused(tmp_path, tiny_dataset, capsys):
    from data.preparation import prepare

    copy = tmp_path / "data"
    shutil.copytree(tiny_dataset, copy)
    assert run(copy, tmp_path / "out", "--max_iters=3") == 0
    prepare(lambda: iter([("other", "abc " * 5000)]), copy, tokenizer="byte", overwrite=True)
    assert run(copy, tmp_path / "out", "--init_from=resume", "--max_iters=9") == 1
    refused(capsys, 1, "not the one")


def test_resuming_from_nothing_is_a_sentence_and_auto_starts_afresh(tmp_path, tiny_dataset, capsys):
    assert run(tiny_dataset, tmp_path, "--init_from=resume") == 1
    refused(capsys, 1, "Nothing to resume", "--resume=auto")
    assert run(tiny_dataset, tmp_path, "--init_from=auto", "--max_iters=2") == 0
    assert run(tiny_dataset, tmp_path, "--init_from=auto", "--max_iters=4") == 0
    assert [s["step"] for s in events(tmp_path, "step")] == [1, 2, 3, 4]


def flip_byte(checkpoint: Path, number: int = 0) -> None:
    file = sorted(checkpoint.glob("*.safetensors"))[number]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def test_a_flipped_byte_in_the_only_checkpoint_is_found(tmp_path, tiny_dataset, capsys):
    assert run(tiny_dataset, tmp_path, "--max_iters=3") == 0
    flip_byte(CheckpointStore(tmp_path).pointed("latest"))
    assert run(tiny_dataset, tmp_path, "--init_from=resume", "--max_iters=5") == 1
    refused(capsys, 1, "damaged", "checksum")
    with pytest.raises(CheckpointError, match="checksum"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "environment, launcher",
    [
        ({}, "python train.py"),
        (
            dict(RANK="1", WORLD_SIZE="4", LOCAL_WORLD_SIZE="4", GROUP_WORLD_SIZE="1"),
            "torchrun --standalone --nproc_per_node=4 train.py",
        ),
        (
            dict(RANK="1", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2", GROUP_WORLD_SIZE="2"),
            "torchrun --nnodes=2 --nproc_per_node=2 --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT train.py",
        ),
    ],
)
def test_the_command_that_goes_on_starts_as_many_processes(monkeypatch, environment, launcher):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert train.resume_command(["config/x.py", "--init_from=auto", "--seed=2"]) == f"{launcher} config/x.py --seed=2 --resume"
    for spelling in (["--resume"], ["--resume=auto"], ["--resume", "auto"], ["--init_from", "weights:x"]):
        assert train.resume_command([*spelling, "--seed=2"]) == f"{launcher} --seed=2 --resume"


def test_two_starts_in_one_folder_do_not_take_it_for_two(tmp_path):
    """Each looks whether all of its processes see the same folder, and removes what it looked at."""
    from concurrent.futures import ThreadPoolExecutor

    from training.processes import World

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: train.prepare_out_dir(str(tmp_path / "out"), World()), range(300)))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    import errno
    import fcntl

    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="without locks"), CheckpointStore(tmp_path).lock():
        pass


def test_a_damaged_optimizer_stops_a_resume_but_not_the_use_of_the_model(tmp_path, tiny_dataset, capsys):
    assert run(tiny_dataset, tmp_path, "--max_iters=3") == 0
    before, _ = load_model(tmp_path)
    latest = CheckpointStore(tmp_path).pointed("latest")
    holds = {name: entry.get("holds") for name, entry in json.loads((latest / "manifest.json").read_text())["files"].items()}
    files = sorted(name for name in holds if name.endswith(".safetensors"))
    assert [holds[name] for name in files] == [["model"], ["optimizer"], ["other"]]
    flip_byte(latest, 1)
    after, _ = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
    assert run(tiny_dataset, tmp_path, "--init_from=resume", "--max_iters=5") == 1
    refused(capsys, 1, "damaged", "checksum")


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(tmp_path, tiny_dataset, capsys):
    assert run(tiny_dataset, tmp_path, "--max_iters=6", "--save_interval=3", "--eval_interval=0") == 0
    latest = CheckpointStore(tmp_path).pointed("latest")
    flip_byte(latest)
    assert run(tiny_dataset, tmp_path, "--init_from=resume", "--max_iters=9", "--eval_interval=0") == 0
    assert "damaged" in capsys.readouterr().out
    assert [s["step"] for s in events(tmp_path, "step")] == [1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9]
    assert run(tiny_dataset, tmp_path, "--resume", "--max_iters=10") == 0
    verify(CheckpointStore(tmp_path).pointed("latest"))


def test_a_named_checkpoint_that_is_damaged_is_an_error(tmp_path, tiny_dataset, capsys):
    assert run(tiny_dataset, tmp_path, "--max_iters=6", "--save_interval=3", "--eval_interval=0") == 0
    latest = CheckpointStore(tmp_path).pointed("latest")
    (latest / "state.json").write_text("{}")
    assert run(tiny_dataset, tmp_path / "new", f"--init_from=weights:{latest}", "--max_iters=9") == 1
    refused(capsys, 1, "state.json")


def test_no_space_while_saving_is_a_sentence_and_the_checkpoint_before_is_untouched(tmp_path, tiny_dataset, capsys):
    assert run(tiny_dataset, tmp_path, "--max_iters=3", "--eval_interval=0") == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "checkpoints" / "step_000000003").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code = run(tiny_dataset, tmp_path, "--init_from=resume", "--max_iters=6", "--eval_interval=0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    refused(capsys, 1, "step 6", "step_000000003", "untouched")
    assert {p.name: p.read_bytes() for p in (tmp_path / "checkpoints" / "step_000000003").iterdir()} == before
    assert CheckpointStore(tmp_path).pointed("latest").name == "step_000000003"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")] == []
    assert run(tiny_dataset, tmp_path, "--init_from=resume", "--max_iters=6", "--eval_interval=0") == 0


def test_an_out_dir_that_cannot_be_written_is_a_sentence(tmp_path, tiny_dataset, capsys):
    (tmp_path / "file").write_text("")
    assert run(tiny_dataset, tmp_path / "file" / "out") == 1
    refused(capsys, 1, "out_dir", "--out_dir")
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IREAD | stat.S_IEXEC)
    if not os.access(locked, os.W_OK):  # root writes anywhere
        assert run(tiny_dataset, locked) == 1
        refused(capsys, 1, "out_dir")


def test_loading_a_checkpoint_never_unpickles(tmp_path, tiny_dataset, monkeypatch):
    assert run(tiny_dataset, tmp_path, "--max_iters=3") == 0
    import pickle

    def forbidden(*_, **__):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    assert load_model(tmp_path)
    assert run(tiny_dataset, tmp_path, "--init_from=resume", "--max_iters=5") == 0
    names = {p.suffix for p in CheckpointStore(tmp_path).pointed("latest").iterdir()}
    assert names == {".safetensors", ".json"}


def test_commands_work_from_any_working_directory(tmp_path, tiny_dataset, run_python):
    result = run_python(
        ROOT / "train.py", *TINY_RUN, f"--dataset={tiny_dataset}", "--max_iters=2", "--out_dir=here", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == "" and (tmp_path / "here" / "checkpoints" / "latest").is_file()
    assert configure([str(ROOT / "config" / "quickstart.py")]).train.dataset == "pydocs"


# ------------------------------------------------------------------------------------------- what must not be lost


def test_an_evaluation_or_a_second_run_beside_a_live_one_harms_nothing(tmp_path, tiny_dataset, capsys):
    assert run(tiny_dataset, tmp_path, "--max_iters=4", "--save_interval=2") == 0
    store = CheckpointStore(tmp_path)
    writing = store.folder / ".writing_step_000000009"
    with store.lock():  # as a live run holds it, in the middle of a save
        writing.mkdir()
        assert run(tiny_dataset, tmp_path, "--init_from=resume", "--eval_only") == 0
        assert writing.exists()
        capsys.readouterr()
        for start in ("--init_from=resume", "--init_from=auto", "--init_from=scratch"):
            assert run(tiny_dataset, tmp_path, start, "--max_iters=9") == 1
            refused(capsys, 1, "Another run", str(os.getpid()))
        assert writing.exists() and store.pointed("latest").name == "step_000000004"
    assert run(tiny_dataset, tmp_path, "--init_from=resume", "--max_iters=6") == 0
    assert not writing.exists()


def test_no_restart_ever_deletes_a_trained_model(tmp_path, tiny_dataset):
    for seed in (1, 2, 3):
        assert run(tiny_dataset, tmp_path, "--max_iters=2", f"--seed={seed}") == 0
    seeds = {
        folder.name: json.loads((folder / "step_000000002" / "state.json").read_text())["config"]["seed"]
        for folder in tmp_path.glob("checkpoints*")
    }
    assert seeds == {"checkpoints": 3, "checkpoints.previous": 1, "checkpoints.previous_2": 2}


def test_a_new_run_from_weights_puts_the_runs_of_out_dir_aside(tmp_path, tiny_dataset):
    assert run(tiny_dataset, tmp_path / "a", "--max_iters=6", "--save_interval=3", "--eval_interval=0") == 0
    assert run(tiny_dataset, tmp_path / "b", "--max_iters=2", "--seed=5") == 0
    assert run(tiny_dataset, tmp_path / "a", f"--init_from=weights:{tmp_path / 'b'}", "--max_iters=4") == 0
    assert {p.name for p in (tmp_path / "a" / "checkpoints.previous").glob("step_*")} == {"step_000000003", "step_000000006"}
    assert {p.name for p in (tmp_path / "a" / "checkpoints").glob("step_*")} == {"step_000000004"}


def test_a_run_that_is_stopped_before_its_first_step_touches_nothing(tmp_path, tiny_dataset, capsys, monkeypatch):
    assert run(tiny_dataset, tmp_path, "--max_iters=2") == 0
    from training import signals

    monkeypatch.setattr(signals.StopRequest, "requested", lambda self, failed: bool(self.__dict__.update(name="SIGTERM") or True))
    assert run(tiny_dataset, tmp_path, "--max_iters=9", "--seed=3") == 0
    out = capsys.readouterr().out
    assert "Nothing was saved" in out and "To go on" not in out
    assert sorted(p.name for p in tmp_path.glob("checkpoints*")) == ["checkpoints"]
    assert CheckpointStore(tmp_path).pointed("latest").name == "step_000000002"


def test_a_diverging_run_does_not_push_out_its_good_checkpoints(tmp_path, tiny_dataset, capsys, monkeypatch):
    count = [0]

    def spoiled(model, x, y):
        count[0] += 1
        return next_token_loss(model, x, y) * (math.nan if count[0] > 4 else 1.0)

    monkeypatch.setattr("training.objectives.next_token_loss", spoiled)
    assert run(tiny_dataset, tmp_path, "--max_iters=50", "--eval_interval=0", "--save_interval=1", "--nonfinite_limit=10") == 1
    refused(capsys, 1, "step_000000004")
    assert [p.name for p in CheckpointStore(tmp_path).all()] == ["step_000000003", "step_000000004"]


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path, tiny_dataset):
    assert run(tiny_dataset, tmp_path, "--max_iters=6", "--save_interval=3", "--eval_interval=0") == 0
    flip_byte(CheckpointStore(tmp_path).pointed("latest"))
    assert run(tiny_dataset, tmp_path, "--init_from=resume", "--max_iters=7", "--eval_interval=0") == 0
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "best",
        "damaged_step_000000006",
        "latest",
        "step_000000006",
        "step_000000007",
    ]


def test_stdout_may_go_away_and_training_goes_on(tmp_path, tiny_dataset):
    import subprocess

    command = [preloaded_python(), "train.py", *TINY_RUN, f"--dataset={tiny_dataset}", "--max_iters=30", "--eval_interval=0"]
    for number, redirection in enumerate(("| head -n 1", "> /dev/full", ">&-", "2>&-")):
        line = " ".join(command) + f" --out_dir={tmp_path / str(number)} {redirection}"
        done = subprocess.run(["bash", "-o", "pipefail", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (redirection, done.stderr)
        assert events(tmp_path / str(number), "run_end")[0]["outcome"] == "finished", redirection
        assert CheckpointStore(tmp_path / str(number)).pointed("latest").name == "step_000000030"


# ------------------------------------------------------------------------------------------- what must be true


def test_the_first_step_line_is_as_true_as_the_others(tmp_path, tiny_dataset):
    assert run(tiny_dataset, tmp_path, "--max_iters=30", "--log_interval=10", "--save_interval=-1") == 0
    for step in events(tmp_path, "step"):
        laps = step["step_ms"]
        assert sum(laps[name] for name in ("data", "compute", "optimizer")) > 0.7 * laps["total"]
        assert step["tokens_per_s"] * laps["total"] / 1e3 == pytest.approx(4 * 16, rel=1e-6)


def test_length_in_tokens_and_epochs_holds_when_the_batch_is_split_otherwise_at_a_resume(tmp_path, tiny_dataset):
    assert run(tiny_dataset, tmp_path, "--max_tokens=640", "--save_interval=5") == 0
    split = ("--batch_size=2", "--gradient_accumulation_steps=2")
    assert run(tiny_dataset, tmp_path, "--max_tokens=1280", *split, "--resume") == 0
    assert events(tmp_path, "run_end")[-1]["tokens"] == 1280
    assert run_length(TrainConfig(batch_size=8, epochs=2), 16, 100, steps=10, sequences=40) == 10 + 20


def test_a_run_that_has_come_further_says_that_there_is_nothing_to_do(tmp_path, tiny_dataset, capsys):
    """Issue 10.2."""
    assert run(tiny_dataset, tmp_path, "--max_iters=6") == 0
    assert run(tiny_dataset, tmp_path, "--max_iters=3", "--resume") == 0
    assert "nothing to do: 6 of 3 iterations" in capsys.readouterr().out
    assert [e["outcome"] for e in events(tmp_path, "run_end")] == ["finished"]


def test_the_best_is_looked_for_anew_on_another_validation_set(tmp_path, tiny_dataset, capsys):
    assert run(tiny_dataset, tmp_path, "--max_iters=4", "--eval_interval=2") == 0
    assert run(tiny_dataset, tmp_path, "--max_iters=6", "--eval_interval=2", "--init_from=resume", "--eval_iters=3") == 0
    assert "so far is forgotten" in capsys.readouterr().out


def test_a_moved_dataset_can_be_resumed_and_a_short_validation_split_is_found_at_once(
    tmp_path, tiny_dataset, capsys, monkeypatch
):
    import numpy as np

    shutil.copytree(tiny_dataset, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert run(Path("./data"), tmp_path / "out", "--max_iters=2") == 0
    monkeypatch.chdir("/")
    assert train.main(["--init_from=resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=3"]) == 0
    (tmp_path / "data").rename(tmp_path / "moved")
    assert (
        train.main(["--init_from=resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=4", f"--dataset={tmp_path / 'moved'}"])
        == 0
    )
    (tmp_path / "short").mkdir()
    for name, tokens in (("train", 500), ("val", 1)):
        np.ones(tokens, dtype=np.uint16).tofile(tmp_path / "short" / f"{name}.bin")
    assert run(tmp_path / "short", tmp_path / "new", "--max_iters=50", "--eval_interval=0") == 1
    refused(capsys, 1, "too few to validate on")
    assert not list((tmp_path / "new").glob("run_*"))


def test_a_broken_tokenizer_is_found_before_the_training(tmp_path, tiny_dataset, capsys):
    """Issue 10.17: not when its checkpoint is sampled from; a dataset without one is only a note."""
    shutil.copytree(tiny_dataset, tmp_path / "data")
    (tmp_path / "data" / "tokenizer.json").write_text("{")
    assert run(tmp_path / "data", tmp_path / "out", "--max_iters=2") == 1
    refused(capsys, 1, "is broken", "tokenizer.json cannot be read as JSON")
    assert not list((tmp_path / "out").glob("run_*"))
    (tmp_path / "data" / "tokenizer.json").unlink()
    assert run(tmp_path / "data", tmp_path / "out", "--max_iters=2") == 0
    assert "has no tokenizer.json" in capsys.readouterr().out


def test_a_moved_out_dir_is_resumed_where_it_is(tmp_path, tiny_dataset, monkeypatch):
    assert run(tiny_dataset, tmp_path / "was", "--max_iters=2") == 0
    (tmp_path / "was").rename(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert train.main(["--init_from=resume", "--max_iters=4"]) == 0  # out_dir's default is 'out'
    assert CheckpointStore("out").pointed("latest").name == "step_000000004" and not (tmp_path / "was").exists()


def test_a_saved_run_is_a_config_whose_preset_and_parts_can_still_be_changed(tmp_path, tiny_dataset):
    out = tmp_path / "out"
    options = [
        f"--dataset={tiny_dataset}",
        f"--out_dir={out}",
        "--n_layer=1",
        "--n_head=2",
        "--n_embd=32",
        "--block_size=16",
        "--eval_iters=1",
        "--threads=1",
        "--device=cpu",
    ]
    assert train.main([*options, "--max_iters=2"]) == 0
    assert train.main([*options, "--max_iters=3", "--init_from=resume"]) == 0
    for saved in sorted(out.glob("run_*.json")):
        plain = configure([str(saved)]).train
        assert plain.init_from == "scratch" and plain.model_config(256) == load_model(out)[0].config
        llama = configure([str(saved), "--arch_preset=llama"]).train.model_config(256)
        assert (llama.normalization, llama.ffn_type, llama.n_embd) == ("rmsnorm", "swiglu", 32)
        assert configure([str(saved), "--ffn_type=swiglu"]).train.model_config(256).activation == "silu"
        assert train.main([str(saved), "--seed=2", f"--out_dir={tmp_path / saved.stem}"]) == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--foo=1", "--n_layer=abc", "--batch_size=0"], ["foo", "abc", "batch_size=0"]),
        (["--seed=1e30"], ["seed"]),
        (["--out_dir="], ["out_dir"]),
        (["--threads=100000"], ["threads"]),
        (["--debug=False"], ["takes no value"]),
        (["--init_from=auto", "--out_dir=out/nothing_there", "--n_head=5", "--n_embd=32", "--print_config"], ["n_head=5"]),
    ],
)
def test_more_unusable_configurations_are_sentences_and_exit_code_2(arguments, words, capsys):
    assert train.main(arguments) == 2
    refused(capsys, 2, *words)


def test_a_manifest_or_state_of_another_form_is_damage(tmp_path, tiny_dataset, capsys):
    assert run(tiny_dataset, tmp_path, "--max_iters=2") == 0
    manifest = CheckpointStore(tmp_path).pointed("latest") / "manifest.json"
    for content in ('{"files": ["a"]}', '{"files": {"state.json": 5}}', '{"files": {}}', "[]"):
        manifest.write_text(content)
        assert run(tiny_dataset, tmp_path, "--init_from=resume", "--max_iters=4") == 1
        refused(capsys, 1, "damaged")
