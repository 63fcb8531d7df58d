"""Predicted memory against what a GPU's allocator handed out. Skipped where there is no CUDA device.

    python -m pytest -q tests/gpu/test_memory_gpu.py -s        # also prints each error

Blocks are not compiled here: a compiled block recomputes what is cheap and keeps less.
"""

from __future__ import annotations

import pytest
import torch

from flops_parameter_counting.memory import HEADROOM_GB, HEADROOM_SHARE, estimate_memory, largest_micro_batch
from model_builder import COMPUTE_DTYPES, build_model
from model_config import resolve
from training.activation_checkpointing import apply_activation_checkpointing
from training.objectives import next_token_loss
from training.optimizers import OPTIMIZERS, Optimizer, clip_and_check
from training.precision import set_compute_dtype
from training.train_config import TrainConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TOLERANCE = 0.10


def measured_peak(
    config, *, batch_size, dtype="bfloat16", checkpointing="none", optimizer="adamw", gradient_accumulation_steps=1
) -> int:
    """Most bytes that tensors took at once in the second of two training steps."""
    torch.cuda.empty_cache()
    model = build_model(config, device="cuda")
    set_compute_dtype(model, COMPUTE_DTYPES[dtype])
    apply_activation_checkpointing(model, checkpointing)
    model.train()
    training = Optimizer(model, TrainConfig(optimizer=optimizer))
    scale = torch.ones((), device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        for _ in range(gradient_accumulation_steps):
            tokens = torch.randint(0, config.vocab_size, (batch_size, config.block_size + 1), device="cuda")
            loss = next_token_loss(model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()) / tokens.numel()
            loss.backward()
        training.step(1e-3, clip_and_check(model, loss.detach(), 1.0, scale)[1])
        training.zero_grad()
        del loss
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


# Each of a gigabyte or more, so that the libraries' workspaces (some 10 MB) do not decide.
LLAMA = dict(n_layer=8, n_head=8, n_embd=1024, vocab_size=32000, block_size=1024)


@pytest.mark.parametrize(
    "preset, shape, options",
    (
        ("gpt2", {}, dict(batch_size=8)),
        ("gpt2", {}, dict(batch_size=8, dtype="float32")),
        ("gpt2", {}, dict(batch_size=8, checkpointing="full")),
        ("gpt2", dict(dropout=0.1), dict(batch_size=8, dtype="float16")),
        ("gpt2", dict(dropout=0.1, attention_backend="manual"), dict(batch_size=4)),
        ("gpt2", dict(vocab_size=512), dict(batch_size=16)),
        ("llama", LLAMA, dict(batch_size=8)),
        ("llama", LLAMA, dict(batch_size=16, checkpointing="selective")),
        ("llama", dict(LLAMA, vocab_size=512), dict(batch_size=32, checkpointing="full")),
        ("llama", LLAMA, dict(batch_size=1, gradient_accumulation_steps=2, optimizer="muon")),
        ("llama3", LLAMA, dict(batch_size=8)),
        ("llama3", LLAMA, dict(batch_size=4, dtype="float32")),
        ("mistral", dict(LLAMA, sliding_window=256), dict(batch_size=8)),
        ("qwen3", LLAMA, dict(batch_size=8)),
        ("gemma2", dict(LLAMA, sliding_window=256), dict(batch_size=4)),
    ),
    ids=str,
)
def test_predicted_peak_is_what_the_allocator_hands_out(preset, shape, options):
    config = resolve(preset, **shape)
    rules = {**options, "optimizer": OPTIMIZERS[options.get("optimizer", "adamw")].rule}
    predicted, measured = estimate_memory(config, **rules).total, measured_peak(config, **options)
    print(
        f"\n{config.name} {options}: allocated {measured / 1e9:.3f} GB, predicted {predicted / 1e9:.3f} GB: "
        f"{predicted / measured - 1:+.2%}"
    )
    assert predicted == pytest.approx(measured, rel=TOLERANCE)


def test_the_largest_micro_batch_leaves_the_headroom_it_promises():
    config, card_gb = resolve("gpt2"), 12
    best = largest_micro_batch(config, card_gb)
    usable = card_gb * 1e9 * (1 - HEADROOM_SHARE) - HEADROOM_GB * 1e9
    assert measured_peak(config, batch_size=best) <= usable + HEADROOM_SHARE * card_gb * 1e9  # within what is kept free
    assert measured_peak(config, batch_size=best + 2) > usable
