"""How processes share the work: data parallelism by one mechanism, `fully_shard`, applied to the model from outside.

A *unit* is what is gathered and reduced together: each block, and what is around them. Every strategy gives the same
losses; they differ in what each process keeps and in how often the units travel:

    strategy  weights, optimizer state   gathered                       gradients summed
    ddp       whole in every process     (not sent; a copy once a step) once a step
    zero1     1/W in each                once a step                    once a step
    zero2     1/W in each                once a step                    every micro-batch, into shards
    fsdp      1/W in each                twice a micro-batch, a unit    every micro-batch, into shards
                                         at a time
    hsdp      1/S in each of S           as fsdp, within the S          as fsdp within the S; between the
                                                                        W/S groups once a step

(Rajbhandari et al. 2020, ZeRO; Zhao et al. 2023, PyTorch FSDP.) Weights and optimizer state are fp32 shards; under bf16 the
gathered copy is bf16, but for the unit with the embedding's table, which is gathered as it is stored. Gradients are
reduced in fp32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from command_line import Failure, UsageError
from flops_parameter_counting.memory_rules import OptimizerRule, ShardingRule
from model_config import ModelConfig
from training.meter import free_memory
from training.processes import World
from training.registry import STRATEGIES
from training.tensor_files import as_bytes
from training.train_config import TrainConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Strategy:
    """A registered way to share a model among processes.

    `apply(model, world, device, dtype, shard_size)` changes a model on the meta device in place and returns what the loop
    asks (see `Alone`). `rule` is what the memory model knows of it. `summary` is what `--parallelism=auto` says of it, which
    tries the strategies with `automatic` in the order of their registration.
    """

    summary: str
    rule: ShardingRule
    apply: Callable[..., Alone]
    automatic: bool = True


class Alone:
    """One process, nothing to share."""

    def accumulate(self, micro_batches: Iterable[T]) -> Iterator[T]:
        """The micro-batches of one step."""
        yield from micro_batches

    def settle(self) -> None:
        """After a forward pass without a backward."""

    @staticmethod
    def put(parameter: Tensor, values: Tensor) -> None:
        """Give a parameter its values."""
        parameter.copy_(values)


class Sharded(Alone):
    """A model whose units are shared by a world of processes. The model is changed in place.

    Apply it to a model on the meta device, then materialise: no process ever holds all of the weights in fp32.
    """

    def __init__(
        self,
        rule: ShardingRule,
        model: nn.Module,
        world: World,
        device: torch.device,
        dtype: torch.dtype,
        shard_size: int | None = None,
    ):
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.model, self.rule, self.world = model, rule, world
        self.steps = 0  # of this start
        mesh = data_mesh(rule, world, device, shard_size)
        as_stored = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        policy = as_stored if dtype == torch.float32 else replace(as_stored, param_dtype=dtype)
        if hasattr(model, "objective"):  # modules that an objective trains besides the model
            fully_shard(model.objective, mesh=mesh, reshard_after_forward=not rule.keeps_gathered, mp_policy=policy)
        for unit in model.units():
            looked_up = unit is model.embedding or (unit is model and model.config.weight_tying)
            fully_shard(
                unit,
                mesh=mesh,
                reshard_after_forward=not rule.keeps_gathered,
                mp_policy=as_stored if looked_up else policy,
            )  # a frequent token's gradients add up in fp32
        self.units = [module for module in model.modules() if hasattr(module, "set_requires_gradient_sync")]
        for unit in self.units:  # the loss is divided by all tokens of the global batch already: gradients only add up
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)

    def accumulate(self, micro_batches: Iterable[T]) -> Iterator[T]:
        """The micro-batches of one step. Before each one the model is set to keep its gradients or to exchange them."""
        if self.steps == 1:  # what training changes has changed
            check_buffers(self.model, self.world)
        self.steps += 1
        micro_batches = list(micro_batches)
        rule, model = self.rule, self.model
        for number, micro_batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            if rule.reduces_once:
                model.set_requires_gradient_sync(last)
            if rule.keeps_gathered:
                model.set_reshard_after_backward(last)
            if rule.replicas:
                model.set_requires_all_reduce(last)
            yield micro_batch

    def settle(self) -> None:
        """Let go of what a forward pass without a backward has gathered."""
        for unit in self.units:
            unit.reshard()

    @staticmethod
    def put(parameter: Tensor, values: Tensor) -> None:
        """Give a sharded parameter this process's part of its values, which every process has whole."""
        from torch.distributed.tensor import distribute_tensor

        mesh = parameter.device_mesh
        parameter.copy_(distribute_tensor(values.to(parameter.device), mesh, parameter.placements, src_data_rank=None))


def check_buffers(model: nn.Module, world: World) -> None:
    """Raise Failure, in every process, unless the model's saved buffers are the same in all that train the same parameters.

    Gradients are added up over the processes and buffers are not: one that follows a process's own share of the batch (running
    statistics) would be another in each, and a checkpoint would keep one of them.
    """
    if world.data_size == 1 or not model.saved_buffers():
        return

    def digests() -> tuple[tuple[int, ...], dict[str, str]]:
        others = world.other_dimensions()
        where = tuple(world.mesh.get_local_rank(name) for name in others)
        buffers = {name: local(buffer).detach().cpu().contiguous() for name, buffer in model.saved_buffers().items()}
        return where, {name: hashlib.sha256(as_bytes(buffer)).hexdigest() for name, buffer in buffers.items()}

    first: dict[tuple[int, ...], tuple[int, dict[str, str]]] = {}
    for rank, (where, theirs) in enumerate(world.everywhere(digests)):
        other, expected = first.setdefault(where, (rank, theirs))
        for name, digest in theirs.items():
            if digest != expected[name]:
                raise Failure(
                    f"The buffer {name} is not the same in rank {other} and rank {rank}: training changes it by what each "
                    "process reads, and nothing adds buffers up. Make it the same in all of them (an all_reduce where it is "
                    "changed), register it with persistent=False, or train in one process."
                )


def register_sharding(name: str, summary: str, rule: ShardingRule, automatic: bool = True) -> None:
    """Enter a strategy that is made by `fully_shard` alone: its rule says all there is to say."""
    STRATEGIES.register(name, Strategy(summary, rule, partial(Sharded, rule), automatic))


register_sharding(
    "ddp", "whole in every process", ShardingRule(sharded=False, keeps_gathered=True, reduces_once=True, replicas=False)
)
register_sharding("zero1", "weights and optimizer state sharded", ShardingRule(reduces_once=True))
register_sharding("zero2", "weights, optimizer state and gradients sharded", ShardingRule())
register_sharding("fsdp", "all sharded, a unit gathered at a time", ShardingRule(keeps_gathered=False))
register_sharding(
    "hsdp",
    "all sharded within a group of processes",
    ShardingRule(keeps_gathered=False, replicas=True),
    automatic=False,
)


def data_mesh(rule: ShardingRule, world: World, device: torch.device, shard_size: int | None) -> DeviceMesh:
    """The mesh on which a rule shards and sums: the world's data dimension, as ("shard",) or ("replicate", "shard").

    Other dimensions of the world's mesh lie inside it and are not touched.
    """
    from torch.distributed.device_mesh import init_device_mesh

    size = world.data_size
    if rule.replicas:
        shards = shard_size or usual_shard_size(world)
        check_shard_size(shards, world)
    else:
        shards = rule.shards(size)
    dimensions = {"shard": shards}
    if rule.replicas or not rule.sharded:
        dimensions = {"replicate": size // shards, "shard": shards}
    all_dimensions = {**dimensions, **world.other_dimensions()}
    mesh = init_device_mesh(device.type, tuple(all_dimensions.values()), mesh_dim_names=tuple(all_dimensions))
    if len(all_dimensions) > len(dimensions):
        mesh = mesh[tuple(dimensions)]
    if world.timeout is not None:  # the mesh's own groups have PyTorch's otherwise: 10 minutes on nccl
        for dimension in range(mesh.ndim):
            dist.distributed_c10d._set_pg_timeout(world.timeout, mesh.get_group(dimension))
    return mesh


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which is all of it where nothing is sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def usual_shard_size(world: World) -> int:
    """Processes that share one copy under hsdp: those of a node, or half of them where there is one node."""
    return world.local_size if world.local_size < world.data_size else world.data_size // 2


def check_shard_size(shards: int, world: World) -> None:
    """Raise UsageError unless `shards` processes can share a copy and there are at least two copies."""
    size = world.data_size
    if size < 4 or shards < 2 or size % shards or size // shards < 2:
        raise UsageError(
            f"parallelism='hsdp' needs at least 2 groups of at least 2 processes each; {size} processes do "
            f"not split into groups of {shards}. Use fsdp, or set --hsdp_shard_size."
        )


# ------------------------------------------------------------------------------------------- choosing


def parallelize(
    model: nn.Module, name: str, world: World, device: torch.device, dtype: torch.dtype, shard_size: int | None = None
) -> Alone:
    """Apply a strategy to a model on the meta device. 'none' changes nothing. Raises UsageError where it cannot be."""
    if name == "none":
        if world.size > 1:
            raise UsageError(
                f"parallelism='none' is for one process, but {world.size} were started. Leave it out (auto), or "
                f"use one of {', '.join(STRATEGIES)}."
            )
        return Alone()
    return STRATEGIES[name].apply(model, world, device, dtype, shard_size)


def choose(
    config: TrainConfig,
    model_config: ModelConfig,
    world: World,
    device: torch.device,
    dtype: str,
    optimizer: OptimizerRule,
    extra_bytes: int = 0,
) -> tuple[str, str]:
    """The strategy that parallelism='auto' means here, and why, in one sentence.

    The first of the automatic ones whose predicted peak fits into nine tenths of a process's memory, else the last of
    them; the last one also for a model whose memory cannot be predicted.

    `model_config` is the model as it will be built, with the dataset's vocabulary; `extra_bytes` is what the objective
    needs besides it.
    """
    if world.data_size == 1:
        return "none", ""
    from flops_parameter_counting.memory import estimate_memory

    available = memory_of(device, world)
    sequences = config.sequences_per_iteration(model_config.block_size)
    micro_batches = -(-sequences // (world.data_size * config.micro_batch_size))  # of one process
    automatic = {name: strategy for name, strategy in STRATEGIES.items() if strategy.automatic}
    for name, strategy in automatic.items():
        try:
            needed = estimate_memory(
                model_config,
                batch_size=config.micro_batch_size,
                dtype=dtype,
                checkpointing=config.activation_checkpointing,
                optimizer=optimizer,
                sharding=strategy.rule,
                world_size=world.data_size,
                device=device.type,
                gradient_accumulation_steps=micro_batches,
            ).total
        except ValueError as error:  # a component that cannot be run without numbers
            last = list(automatic)[-1]
            return last, f"parallelism={last} (auto), the last of those that auto tries: {error}"
        needed += extra_bytes
        if needed <= 0.9 * available:
            return name, (
                f"parallelism={name} (auto): {strategy.summary}; about {needed / 1e9:.1f} of {available / 1e9:.1f} GB a process"
            )
    return name, (
        f"parallelism={name} (auto): even so about {needed / 1e9:.1f} GB a process are needed, and there are "
        f"{available / 1e9:.1f}; a smaller --batch_size or --activation_checkpointing=full needs less"
    )


def memory_of(device: torch.device, world: World) -> float:
    """Bytes that one process may use: what its GPU has free, or its share of what this machine has."""
    return free_memory(device, world.local_size)
