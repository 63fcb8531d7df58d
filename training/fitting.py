"""Whether a run fits into the memory of this machine: which strategy, which micro-batch, and a warning where it will not.

What is needed is the memory model's figure (`flops_parameter_counting/memory.py`), what there is `meter.free_memory`'s. Both
are bytes a process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from command_line import Failure, is_out_of_memory
from flops_parameter_counting.hardware import best_dtype
from flops_parameter_counting.memory import HEADROOM_GB, HEADROOM_SHARE, estimate_memory, largest_micro_batch
from flops_parameter_counting.parameters import count_parameters
from model_builder import Transformer
from model_components import auxiliary_losses
from model_config import ModelConfig
from training.batch import Batch
from training.meter import free_memory, own_limits
from training.objectives import Objective
from training.optimizers import OPTIMIZERS, clip_and_check
from training.parallelism import STRATEGIES, choose
from training.processes import World
from training.stages import Data, Learner, Machine, Start
from training.train_config import TrainConfig

CPU_SHARE = 0.08  # of what is free on a CPU is left alone: the allocator's rounding, what libraries take
SMALL = 0.1  # of what is free: a run that by a rough bound from above needs less is not looked at closely
WORLDS = (2, 4, 8, 16, 32, 64)  # processes that are tried to find out what would fit
EDGE = 32
TRIAL = 3  # micro-batches of a trial; from the second on the gradients of those before are there too


@dataclass(frozen=True)
class Fit:
    """How a run is laid out in memory, in every process alike; bytes a process."""

    parallelism: str
    micro_batch: int  # sequences
    needed: float | None  # None: it cannot be predicted, or is so little that nobody asked
    available: float
    remedy: str = ""  # what would fit, where this does not
    chosen: bool = False  # the micro-batch was chosen here (batch_size=auto), and has not been tried yet

    @property
    def too_large(self) -> bool:
        """Whether more is needed than there is."""
        return self.needed is not None and self.needed > self.available

    def in_words(self) -> str:
        """Needs and possibilities, in a sentence or two."""
        return (
            f"this run needs {_gb(self.needed)} GB of memory a process, there are {_gb(self.available)} free. {self.remedy}"
        ).rstrip()


@dataclass(frozen=True)
class Demand:
    """What decides how much memory a run takes, but for its micro-batch and strategy."""

    model: ModelConfig
    config: TrainConfig
    dtype: str
    device: str  # cpu | cuda
    sequences: int  # in the global batch
    objective_bytes: Callable[[int], float] = lambda micro_batch: 0.0

    def options(self, parallelism: str, processes: int) -> dict[str, Any]:
        """What the memory model wants to know."""
        sharding = None if parallelism == "none" else STRATEGIES[parallelism].rule
        return dict(
            dtype=self.dtype,
            checkpointing=self.config.activation_checkpointing,
            optimizer=OPTIMIZERS[self.config.optimizer].rule,
            sharding=sharding,
            world_size=processes if sharding else 1,
            shard_size=self.config.hsdp_shard_size if parallelism == "hsdp" else None,
            device=self.device,
        )

    def needs(self, micro_batch: int, parallelism: str, processes: int) -> float:
        """Bytes of a step with such micro-batches. Raises ValueError where they cannot be predicted."""
        micro_batch = max(1, min(micro_batch, self.sequences // processes or 1))
        pieces = -(-self.sequences // (processes * micro_batch))
        options = self.options(parallelism, processes)
        found = estimate_memory(self.model, batch_size=micro_batch, gradient_accumulation_steps=max(1, pieces), **options)
        return found.total + self.objective_bytes(micro_batch)

    def largest(self, room: float, parallelism: str, processes: int) -> int:
        """The largest micro-batch that takes no more than `room` bytes; 0 where not even one sequence fits."""
        share = max(1, self.sequences // processes)  # of the global batch
        if self.needs(share, parallelism, processes) <= room:
            return share
        options = dict(self.options(parallelism, processes), gradient_accumulation_steps=2)
        left = room - self.objective_bytes(1)
        card = (left / 1e9 + HEADROOM_GB) / (1 - HEADROOM_SHARE)  # whose usable part is what is left
        found = min(share, largest_micro_batch(self.model, card, **options))
        while found > 0 and self.needs(found, parallelism, processes) > room:
            found -= 1
        return found

    def remedy(self, room: float, parallelism: str, processes: int) -> str:
        """What would fit into `room` bytes a process: the least change first."""
        found = []
        for checkpointing in dict.fromkeys((self.config.activation_checkpointing, "full")):
            changed = replace(self, config=replace(self.config, activation_checkpointing=checkpointing))
            largest = changed.largest(room, parallelism, processes)
            if largest:
                flag = "" if checkpointing == self.config.activation_checkpointing else " with --activation_checkpointing=full"
                found.append(f"--batch_size={largest}{flag}, with --total_batch_tokens to keep the global batch")
                break
        if not found:
            found = [
                f"{world} processes, each with as much memory, with --parallelism=fsdp"
                for world in WORLDS
                if world > processes and self.sequences % world == 0 and self.needs(1, "fsdp", world) <= room
            ][:1]
        return f"What would fit: {found[0]}." if found else "Nothing here would fit; take a smaller model, or more memory."


def usable(device: torch.device, available: float) -> float:
    """What of the free memory a run may count on: on a GPU without the headroom of the memory model."""
    if device.type == "cuda":
        return max(0.0, available * (1 - HEADROOM_SHARE) - HEADROOM_GB * 1e9)
    return available * (1 - CPU_SHARE)


def rough_bound(demand: Demand, micro_batch: int) -> float:
    """Bytes that no usual run exceeds, from the sizes alone: quick, and two to ten times too much.

    Weights, gradients, two moments, and a second copy of the table; of each token 40 numbers a unit of every layer's
    width, the scores of each head kept three times, and the logits six times; all in fp32.
    """
    model = demand.model
    tokens = micro_batch * model.block_size
    width = 40 * model.n_embd + 12 * (model.d_ff or 4 * model.n_embd) + 3 * model.n_head * model.block_size
    return 28 * count_parameters(model) + 4 * tokens * (model.n_layer * width + 6 * model.padded_vocab_size)


# ------------------------------------------------------------------------------------------- before the model is built


def fit_into_memory(start: Start, machine: Machine, data: Data, objective: Objective) -> Fit:
    """The strategy and the micro-batch of this run, and what they need; the same in every process.

    A run that goes on under batch_size=auto keeps its micro-batch where that fits here as well.
    """
    config, world, model, device = start.config, machine.world, data.model_config, machine.device
    demand = Demand(
        model,
        config,
        machine.dtype,
        device.type,
        data.sequences,
        lambda micro_batch: objective.memory(micro_batch, model.block_size),
    )
    available = min(world.everywhere(lambda: free_memory(device, world.local_size)))
    return world.from_main(lambda: laid_out(start, demand, world, device, available))


def laid_out(start: Start, demand: Demand, world: World, device: torch.device, available: float, closely: bool = False) -> Fit:
    """`fit_into_memory`, by one process. `closely`: also for a run that certainly fits, what it needs."""
    config, processes, room = start.config, world.data_size, usable(device, available)
    parallelism, why = config.parallelism, ""
    if parallelism == "auto":
        if start.resumes and start.saved["world_size"] == world.size > 1 and "parallelism" in start.saved:
            parallelism = start.saved["parallelism"]  # whatever is free at this moment: a restart changes nothing
        else:
            rule, extra = OPTIMIZERS[config.optimizer].rule, int(demand.objective_bytes(config.micro_batch_size))
            parallelism, why = choose(config, demand.model, world, device, demand.dtype, rule, extra)
    start.notes.extend([why] if why else [])
    share = max(1, demand.sequences // processes)
    auto = config.micro_batch == "auto"
    micro_batch = min(share, config.micro_batch_size)
    if config.eval_only:  # no gradients, no optimizer: nothing that the model of a step says
        return Fit(parallelism, micro_batch, None, available)
    if not auto and not closely and rough_bound(demand, micro_batch) * (1 if parallelism == "none" else 2) < SMALL * available:
        return Fit(parallelism, micro_batch, None, available)
    try:
        kept = start.saved["config"].get("micro_batch") if start.resumes else None
        if auto and isinstance(kept, int) and demand.needs(kept, parallelism, processes) <= available:
            return Fit(parallelism, min(share, kept), demand.needs(kept, parallelism, processes), available)
        if auto:
            micro_batch = max(1, demand.largest(room, parallelism, processes))
        needed = demand.needs(micro_batch, parallelism, processes)
        remedy = demand.remedy(room, parallelism, processes) if needed > available else ""
    except ValueError as error:  # a component that cannot be run without numbers
        if auto:
            raise Failure(f"batch_size=auto: {error} Give --batch_size as a number.") from error
        return Fit(parallelism, micro_batch, None, available)
    return Fit(parallelism, micro_batch, needed, available, remedy, chosen=auto)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.2g}"


# ------------------------------------------------------------------------------------------- when it did not fit


def out_of_memory(config: TrainConfig) -> str:
    """What to say where memory has run out: what the run takes by prediction, what there is, and what would fit.

    Raises ValueError where nothing can be predicted.
    """
    device = torch.device("cpu" if config.device == "cpu" or not torch.cuda.is_available() else "cuda")
    there, model, processes = total_memory(device), config.model_config(), int(os.environ.get("WORLD_SIZE", "1"))
    dtype = best_dtype(device) if config.dtype == "auto" else config.dtype
    demand = Demand(model, config, dtype, device.type, config.sequences_per_iteration(model.block_size))
    parallelism = config.parallelism if processes > 1 and config.parallelism in STRATEGIES else "none"
    micro_batch = min(config.micro_batch_size, max(1, demand.sequences // processes))
    whole, one = (demand.needs(size, parallelism, processes) for size in (micro_batch, 1))
    alone = estimate_memory(model, batch_size=1, **demand.options(parallelism, processes))
    said = (
        f"Out of memory: by prediction a micro-batch of {micro_batch} × {model.block_size} tokens takes {whole / 1e9:.2f} GB, "
        f"one sequence alone {one / 1e9:.2f} GB (weights {alone.weights / 1e9:.2f}, optimizer {alone.optimizer / 1e9:.2f}); this "
        f"{'GPU' if device.type == 'cuda' else 'machine'} has {there / 1e9:.2f} GB. "
    )
    room = usable(device, there)
    if whole <= room:
        return (
            said + "That should fit: something else holds memory there. End the other programs, or take a smaller --batch_size."
        )
    return said + ("No batch size fits as it is. " if one > room else "") + demand.remedy(room, parallelism, processes)


def total_memory(device: torch.device) -> float:
    """Bytes of the GPU, or of this machine as far as this process may take them. Raises ValueError where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *(limit for limit, _ in own_limits())])
    except (AttributeError, OSError) as error:
        raise ValueError("The memory of this machine is not known.") from error


# ------------------------------------------------------------------------------------------- trying a micro-batch


def settle_micro_batch(start: Start, machine: Machine, data: Data, learner: Learner, fit: Fit) -> Start:
    """The start with the micro-batch that the run will have, as its configuration and its checkpoints say it.

    One that was chosen here is tried first, by one process alone: of several none can fail without the others.
    """
    if start.config.micro_batch != "auto":
        return start
    micro_batch, tried = fit.micro_batch, ""
    if fit.chosen and not machine.world.grouped and not start.config.eval_only:
        can_be_caught = machine.device.type == "cuda" or own_limits()  # a machine that is full ends processes instead
        most = data.sequences if can_be_caught else 0
        micro_batch = largest_that_runs(lambda rows: runs(start, machine, data, learner, rows), fit.micro_batch, most)
        tried = ", tried"
    needed = f"predicted {_gb(fit.needed)} of {_gb(fit.available)} GB" if micro_batch == fit.micro_batch else "as much as ran"
    start.notes.append(f"micro-batches of {micro_batch} sequences (batch_size=auto): {needed}{tried}")
    config = start.config.with_values({"micro_batch": micro_batch})
    return replace(start, configuration=replace(start.configuration, train=config))


def largest_that_runs(works: Callable[[int], bool], first: int, most: int = 0) -> int:
    """`first` if that works; else half of it and so on, and from there up again, close to what fails.

    most: up to so many, a fifth more is tried as long as that works; for where running out of memory can be caught. Where
    something failed, a 32nd less is taken than what worked: a run has more to do than a trial, and must not stand at the edge.
    Raises Failure where not even one sequence works.
    """
    rows, failed = first, math.inf
    while not works(rows):
        if rows == 1:
            raise Failure(
                "Out of memory with micro-batches of one sequence. Use --activation_checkpointing=full, a smaller --block_size "
                "or model, or several processes with --parallelism=fsdp."
            )
        failed, rows = rows, rows // 2
    while math.isinf(failed) and rows < most:
        more = min(most, max(rows + 1, int(1.2 * rows)))
        if works(more):
            rows = more
        else:
            failed = more
    while math.isfinite(failed) and failed - rows > max(1, 0.04 * rows):
        middle = (rows + int(failed)) // 2
        if works(middle):
            rows = middle
        else:
            failed = middle
    return rows if math.isinf(failed) else rows - rows // EDGE


def runs(start: Start, machine: Machine, data: Data, learner: Learner, rows: int) -> bool:
    """Whether a step with micro-batches of so many sequences stays within memory. Leaves everything as it was.

    A few micro-batches of the step to come, forward and backward, without the update.
    """
    model, device = learner.model, machine.device
    learner.optimizer.state()  # is made at the first update otherwise
    kept = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    devices = [device] if device.type == "cuda" else []
    was_training = model.training
    try:
        with torch.random.fork_rng(devices=devices):
            model.train()
            batch = data.loader.batch(start.progress.sequences, data.sequences)
            _accumulate(model, learner, batch.split(rows)[:TRIAL], device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    finally:
        learner.optimizer.zero_grad()
        model.train(was_training)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return False


def _accumulate(model: Transformer, learner: Learner, micro_batches: list[Batch], device: torch.device) -> None:
    scale = torch.full((), 1e-6, device=device)
    loss: Tensor = torch.zeros((), device=device)
    for micro_batch in learner.parallel.accumulate(micro_batches):
        with auxiliary_losses(scale):
            losses, _, _ = learner.objective(model, micro_batch.to(device))
        (losses * scale).backward()
        loss = loss + losses.detach()
    clip_and_check(model, loss, 1.0, torch.ones((), device=device))
