"""However many processes share the work, by whatever strategy: the losses and gradient norms of one process."""

from __future__ import annotations

from functools import cache
from itertools import combinations, product
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from group import in_processes, train_here
from torch import nn
from training_runs import (
    BF16,
    CLIP,
    CONFIGURATIONS,
    FP32,
    LEARNING_RATE,
    MODELS,
    SEED,
    backward,
    batches,
    build,
    config_of,
    train_a_little,
    worst_difference,
)

from model_builder import build_model
from training.batch import next_token_batch

# Muon's Newton–Schulz iteration runs in bf16, whatever the weights' dtype; its singular values are about one only.
MUON = 1e-3


@cache
def one_process(
    dataset: Path, model: str, accumulation: int = 1, dtype: torch.dtype = torch.float32, optimizer: str = "sgd"
) -> list[tuple[float, float]]:
    """The run that all others are compared with: by train.py's functions, without a strategy."""
    return in_processes(1, train_one, dataset, model, accumulation, dtype, optimizer)[0]


def train_one(dataset, model, accumulation, dtype, optimizer):
    return train_a_little(dataset, model, "none", accumulation, dtype=dtype, optimizer=optimizer)


def train_shared(dataset, model, strategy, accumulation, options):
    return train_a_little(dataset, model, strategy, accumulation, **options)


def shared(size: int, dataset: Path, model: str, strategy: str, accumulation: int = 1, timeout: float = 60, **options):
    """(loss, gradient norm) of each step; every rank has the same to the last bit."""
    ranks = in_processes(size, train_shared, dataset, model, strategy, accumulation, options, timeout=timeout)
    assert all(figures == ranks[0] for figures in ranks)
    return ranks[0]


# ------------------------------------------------------------------------------------------- the oracle


def train_by_pytorch(dataset: Path, model: str, accumulation: int) -> list[tuple[float, float]]:
    """PyTorch's DistributedDataParallel around the same model: mean losses, its own averaging, clipping and SGD."""
    rank, size = dist.get_rank(), dist.get_world_size()
    wrapped = nn.parallel.DistributedDataParallel(build_model(config_of(model), seed=SEED))
    sgd = torch.optim.SGD(wrapped.parameters(), lr=LEARNING_RATE)
    figures = []
    for micro_batches in batches(dataset, 0, 1, 1):
        mine = micro_batches[0][rank::size]  # other rows than ours: which rank has which must not matter
        parts, total = mine.split(len(mine) // accumulation), 0.0
        for number, part in enumerate(parts, start=1):
            wrapped.require_backward_grad_sync = number == len(parts)
            loss = F.cross_entropy(wrapped(part.inputs).transpose(1, 2), part.targets) / accumulation
            loss.backward()
            total += float(loss.detach())
        norm = nn.utils.clip_grad_norm_(wrapped.parameters(), CLIP)
        sgd.step()
        sgd.zero_grad()
        losses = [None] * size
        dist.all_gather_object(losses, total)
        figures.append((sum(losses) / size, float(norm)))
    return figures


@pytest.mark.parametrize(
    "size, accumulation, model",
    [
        pytest.param(*case, marks=() if case in ((1, 4, "tied"), (2, 1, "untied"), (4, 4, "untied")) else pytest.mark.slow)
        for case in product((1, 2, 4), (1, 4), ("tied", "untied"))
    ],
)
def test_one_process_agrees_with_pytorchs_distributed_data_parallel(tiny_dataset, size, accumulation, model):
    figures = in_processes(size, train_by_pytorch, tiny_dataset, model, accumulation)[0]
    assert worst_difference(one_process(tiny_dataset, model), figures) < FP32


@pytest.mark.parametrize("model", ("tied", "untied"))
def test_the_runs_show_what_goes_wrong(tiny_dataset, model):
    """They learn, so that updates wrong by a thousandth show in the losses; some of the steps are clipped, some not."""
    losses, norms = zip(*one_process(tiny_dataset, model))
    assert losses[0] - losses[-1] > 1000 * FP32 * losses[0]
    assert min(norms) < CLIP < max(norms)


# ------------------------------------------------------------------------------------------- every strategy


slow = pytest.mark.slow
ONCE = ((1, "fsdp"), (2, "ddp"), (2, "zero1"), (2, "zero2"), (4, "fsdp"), (4, "hsdp"))  # every strategy, every size
EACH_ONCE = [pytest.param(*c, marks=() if c in ONCE else slow) for c in CONFIGURATIONS]


@pytest.mark.parametrize(
    "accumulation, model",
    [(4, "untied"), *(pytest.param(*pair, marks=slow) for pair in ((1, "tied"), (1, "untied"), (4, "tied")))],
)
@pytest.mark.parametrize("size, strategy", EACH_ONCE)
def test_every_strategy_gives_the_losses_and_norms_of_one_process(tiny_dataset, size, strategy, accumulation, model):
    figures = shared(size, tiny_dataset, model, strategy, accumulation)
    assert worst_difference(figures, one_process(tiny_dataset, model)) < FP32


@pytest.mark.parametrize("model", ("padded", "narrow"))
@pytest.mark.parametrize("strategy", (pytest.param("zero1", marks=slow), "fsdp", pytest.param("hsdp", marks=slow)))
def test_tensors_that_do_not_divide_by_the_processes_change_nothing(tiny_dataset, strategy, model):
    figures = shared(4, tiny_dataset, model, strategy, 2)
    assert worst_difference(figures, one_process(tiny_dataset, model)) < FP32


USUAL = ((2, "zero1"), (4, "hsdp"))
USUALLY = [pytest.param(*c, marks=() if c in USUAL else slow) for c in CONFIGURATIONS]


@pytest.mark.parametrize("size, strategy", USUALLY)
def test_bf16_agrees_with_bf16_of_one_process(tiny_dataset, size, strategy):
    figures = shared(size, tiny_dataset, "untied", strategy, 4, dtype=torch.bfloat16)
    assert worst_difference(figures, one_process(tiny_dataset, "untied", 4, torch.bfloat16)) < BF16


@pytest.mark.parametrize("size, strategy", USUALLY)
def test_muon_agrees_with_muon_of_one_process(tiny_dataset, size, strategy):
    figures = shared(size, tiny_dataset, "untied", strategy, 1, optimizer="muon")
    assert worst_difference(figures, one_process(tiny_dataset, "untied", optimizer="muon")) < MUON


@pytest.mark.parametrize("strategy, checkpointing", [("zero1", "full"), ("fsdp", "selective")])
def test_activation_checkpointing_changes_nothing(tiny_dataset, strategy, checkpointing):
    figures = shared(2, tiny_dataset, "untied", strategy, 4, checkpointing=checkpointing)
    assert worst_difference(figures, one_process(tiny_dataset, "untied")) < FP32


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ("zero1", "fsdp"))
def test_compiled_blocks_change_nothing(tiny_dataset, strategy):
    figures = shared(2, tiny_dataset, "untied", strategy, 4, compiled=True, timeout=300)
    assert worst_difference(figures, one_process(tiny_dataset, "untied")) < FP32


# ------------------------------------------------------------------------------------------- bf16, where it matters


def gradients(model: str, strategy: str, tokens: torch.Tensor, parts: int) -> dict[str, torch.Tensor]:
    """In bf16: each parameter's gradient, whole, of a batch of which each process has its rows in so many parts."""
    built, parallel = build(model, strategy, torch.bfloat16)
    rows = tokens.chunk(dist.get_world_size())[dist.get_rank()]
    backward(built, parallel, [next_token_batch(part) for part in rows.chunk(parts)])
    return {name: whole(parameter.grad) for name, parameter in built.named_parameters()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


@pytest.mark.parametrize("size, strategy", [(1, "ddp"), (2, "ddp"), (2, "zero1"), (2, "fsdp")])
def test_bf16_gradients_are_added_up_in_fp32(size, strategy):
    """Over micro-batches and processes; what has been added up in bf16 would have no more bits than bf16 has."""
    tokens = torch.randint(256, (16, 17), generator=torch.Generator().manual_seed(0))
    for name, gradient in in_processes(size, gradients, "untied", strategy, tokens, 4)[0].items():
        if name != "embedding.weight":  # of most of its rows there is only one gradient
            assert (gradient != gradient.bfloat16().float()).float().mean() > 0.5, name


@pytest.mark.parametrize("model, strategy", list(product(("tied", "untied"), ("ddp", "fsdp"))))
def test_bf16_means_the_same_under_a_strategy_as_without_one(model, strategy):
    """One process's gradients, of a text in which one token stands a thousand times. Rounding twice is 2^-8 at most."""
    tokens = torch.randint(256, (128, 17), generator=torch.Generator().manual_seed(0))
    tokens[:, ::2] = 7
    without, under = (in_processes(1, gradients, model, name, tokens, 1)[0] for name in ("none", strategy))
    off = {name: float((under[name] - without[name]).norm() / without[name].norm()) for name in without}
    assert {name: by for name, by in off.items() if by > BF16} == {}


# ------------------------------------------------------------------------------------------- where it starts


def initial_weights(strategy: str, dtype: torch.dtype) -> dict[str, bytes]:
    """The bits of every parameter of every model, whole."""
    bits = {}
    for model in MODELS:
        built, _ = build(model, strategy, dtype)
        assert (built.head.weight is built.embedding.weight) == config_of(model).weight_tying
        bits.update(bits_of(model, built))
    return bits


def bits_of(model: str, built: nn.Module) -> dict[str, bytes]:
    return {f"{model}: {name}": whole(parameter).detach().numpy().tobytes() for name, parameter in built.named_parameters()}


@pytest.mark.parametrize(
    "size, strategy, dtype",
    [
        *(pytest.param(*c, torch.float32, marks=() if c in ONCE else slow) for c in CONFIGURATIONS),
        (2, "zero1", torch.bfloat16),
    ],
)
def test_initial_weights_are_the_same_bits_everywhere(size, strategy, dtype):
    expected = {}
    for model in MODELS:
        expected.update(bits_of(model, build_model(config_of(model), seed=SEED)))
    for weights in in_processes(size, initial_weights, strategy, dtype):
        assert weights.keys() == expected.keys()
        assert [name for name in expected if weights[name] != expected[name]] == []


# ------------------------------------------------------------------------------------------- what train.py feeds

RUN = (
    "--arch_preset=llama",
    "--n_layer=1",
    "--n_head=1",
    "--n_embd=8",
    "--block_size=16",
    "--batch_size=3",
    "--gradient_accumulation_steps=4",
    "--max_iters=3",
    "--save_interval=-1",
    "--eval_iters=1",
    "--device=cpu",
    "--dtype=float32",
    "--threads=1",
)


def trained_on(arguments: tuple[str, ...]) -> tuple[list, list]:
    """Run train.py; what this process trains on: the (inputs, targets) of each micro-batch, and the dropout masks."""
    from training import objectives

    fed, masks, loss, dropout = [], [], objectives.next_token_loss, F.dropout

    def watched_loss(model, inputs, targets):
        if torch.is_grad_enabled():
            fed.append((inputs.clone(), targets.clone()))
        return loss(model, inputs, targets)

    def watched_dropout(x, p, training, inplace):
        result = dropout(x, p, training, inplace)
        if training:
            masks.append(result.detach() != 0)
        return result

    with mock.patch.object(objectives, "next_token_loss", watched_loss), mock.patch.object(F, "dropout", watched_dropout):
        train_here(arguments)
    return fed, masks


@pytest.mark.parametrize("size, strategy", [(2, "zero1"), (3, "ddp"), (4, "fsdp")])
def test_the_processes_together_train_on_the_batches_of_one(tmp_path, tiny_dataset, size, strategy):
    arguments = (*RUN, f"--dataset={tiny_dataset}")
    ((alone, _),) = in_processes(1, trained_on, (*arguments, f"--out_dir={tmp_path / 'one'}"))
    ranks = in_processes(size, trained_on, (*arguments, f"--out_dir={tmp_path / 'more'}", f"--parallelism={strategy}"))
    for kind in range(2):  # inputs, targets
        steps = torch.cat([micro_batch[kind] for micro_batch in alone]).view(3, 12, 16)
        shares = [torch.cat([micro_batch[kind] for micro_batch in fed]).view(3, 12 // size, 16) for fed, _ in ranks]
        assert torch.equal(torch.cat(shares, dim=1), steps)
    assert all(len(inputs) <= 3 for fed, _ in ranks for inputs, _ in fed)  # batch_size


def test_dropout_differs_between_processes_and_is_the_same_in_the_next_run(tmp_path, tiny_dataset):
    arguments = (*RUN, f"--dataset={tiny_dataset}", "--parallelism=zero1", "--dropout=0.5")
    runs = [
        [masks for _, masks in in_processes(4, trained_on, (*arguments, f"--out_dir={tmp_path / name}"))]
        for name in ("one", "other")
    ]
    for one, other in zip(*runs):
        assert len(one) == len(other) > 3 and all(map(torch.equal, one, other))
    for a, b in combinations(runs[0], 2):
        alike = torch.cat([(x == y).flatten() for x, y in zip(a, b)]).float().mean()
        assert 0.45 < alike < 0.55
