"""What a strategy costs: how often each unit travels, and what each process keeps of it."""

from __future__ import annotations

import gc
import time
from collections import Counter
from functools import cache
from itertools import islice

import pytest
import torch
import torch.distributed as dist
from group import in_processes
from torch.profiler import ProfilerActivity, profile
from training_runs import STRATEGIES, backward, batches, build, config_of

from training.optimizers import Optimizer, clip_and_check
from training.parallelism import local
from training.train_config import TrainConfig

ACCUMULATION = 4
GATHER, SCATTER, SUM = "c10d::_allgather_base_", "c10d::_reduce_scatter_base_", "c10d::allreduce_"


# ------------------------------------------------------------------------------------------- how often


def count_collectives(dataset, model: str, strategy: str) -> dict[str, int]:
    """Of the second step's forward and backward passes: how often each operation of torch.distributed is called."""
    built, parallel = build(model, strategy)
    first, second = islice(batches(dataset, dist.get_rank(), dist.get_world_size(), ACCUMULATION), 2)
    backward(built, parallel, first)
    built.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        backward(built, parallel, second)
    return dict(Counter(event.name for event in seen.events() if event.name.startswith("c10d::")))


def units(model: str) -> int:
    """A unit is a block, or what is around them: all together if tied, else the embedding, and norm and head."""
    config = config_of(model)
    return config.n_layer + (1 if config.weight_tying else 2)


PER_UNIT = {  # operation → how often a unit does it in one step
    "ddp": {SUM: 1},
    "zero1": {GATHER: 1, SCATTER: 1},
    "zero2": {GATHER: 1, SCATTER: ACCUMULATION},
    "fsdp": {GATHER: 2 * ACCUMULATION, SCATTER: ACCUMULATION},
    "hsdp": {GATHER: 2 * ACCUMULATION, SCATTER: ACCUMULATION, SUM: 1},
}


@pytest.mark.parametrize(
    "size, strategy, model",
    [
        *(
            pytest.param(2, strategy, "untied", marks=pytest.mark.slow if strategy in ("ddp", "zero2") else ())
            for strategy in STRATEGIES[2]
        ),
        *(pytest.param(2, strategy, "tied", marks=() if strategy == "fsdp" else pytest.mark.slow) for strategy in STRATEGIES[2]),
        pytest.param(4, "zero1", "untied", marks=pytest.mark.slow),
        (4, "hsdp", "untied"),
    ],
)
def test_a_unit_travels_as_often_as_its_strategy_says(tiny_dataset, size, strategy, model):
    expected = Counter({operation: times * units(model) for operation, times in PER_UNIT[strategy].items()})
    expected[SUM] += 1  # the loss, for the log
    for counts in in_processes(size, count_collectives, tiny_dataset, model, strategy):
        assert counts == expected


# ------------------------------------------------------------------------------------------- how much


def measure_memory(dataset, strategy: str) -> dict[str, int]:
    """Bytes in this process after a step of AdamW: of parameters, of optimizer state, of all tensors that live."""
    gc.freeze()  # what was there before is left out of gc.get_objects
    built, parallel = build("untied", strategy)
    optimizer = Optimizer(built, TrainConfig())
    micro_batches = next(batches(dataset, dist.get_rank(), dist.get_world_size(), ACCUMULATION))
    norm, skip = clip_and_check(built, backward(built, parallel, micro_batches), 1.0, torch.ones(()))
    optimizer.step(1e-3, skip)
    optimizer.zero_grad()
    found = dict(parameters=held(built.parameters()), state=held(optimizer.state().values()), living=live_bytes())
    with torch.no_grad():
        built(micro_batches[0].inputs)
    parallel.settle()
    found["living after an evaluation"] = live_bytes()
    gc.unfreeze()
    return found


def held(tensors) -> int:
    """Bytes of memory behind this process's parts of the tensors, what is behind several once."""
    storages = [local(tensor).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def live_bytes() -> int:
    """Bytes of memory behind all tensors since gc.freeze: the least of a few looks, as gloo's threads let go late."""
    looks = []
    for _ in range(3):
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        looks.append(held(tensor for tensor in tensors if tensor.device.type == "cpu"))
        del tensors
        time.sleep(0.15)
    return min(looks)


@cache
def of_one_process(dataset) -> dict[str, int]:
    return in_processes(1, measure_memory, dataset, "none")[0]


@pytest.mark.parametrize(
    "size, strategy, share", [(4, "zero1", 1 / 4), (4, "fsdp", 1 / 4), (4, "hsdp", 1 / 2), (4, "ddp", 1), (2, "zero2", 1 / 2)]
)
def test_each_process_keeps_its_share(tiny_dataset, size, strategy, share):
    whole = of_one_process(tiny_dataset)
    assert whole["state"] > 2 * whole["parameters"] > 0
    for kept in in_processes(size, measure_memory, tiny_dataset, strategy):
        for kind in whole:
            assert kept[kind] == pytest.approx(share * whole[kind], rel=0.05), kind
