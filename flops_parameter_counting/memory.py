"""Peak memory of one training step, before the run: weights, gradients, optimizer, activations, logits.

    python -c "from flops_parameter_counting.memory import *; from model_config import resolve
    print(estimate_memory(resolve('gpt2'), batch_size=8).table())"

`memory_pieces.py` says what a block, the embedding and the head with the loss keep and need by themselves. The rest is
arithmetic, here: how many blocks there are, which gradients exist already when one runs backward, the optimizer's
state, what a strategy shards. What is reported is the moment when most is held, as that is what has to fit.

Not seen: what a kernel allocates for itself while it runs, the allocator's rounding and fragmentation, the CUDA
context; `largest_micro_batch` leaves HEADROOM for them. Blocks that torch.compile has fused usually need less.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from flops_parameter_counting.hardware import CARD_MIB
from flops_parameter_counting.memory_pieces import Piece, measured_pieces
from flops_parameter_counting.memory_rules import TWO_MOMENTS, OptimizerRule, ShardingRule
from model_builder import COMPUTE_DTYPES
from model_config import ModelConfig
from model_parts.losses import CHUNK_BYTES
from model_parts.recomputation import CHECKPOINTING

CARD_SIZES_GB = tuple(CARD_MIB)  # as they are sold
HEADROOM_GB, HEADROOM_SHARE = 0.7, 0.05  # of a card: CUDA context and libraries; rounding, fragmentation, workspaces


# ------------------------------------------------------------------------------------------- the estimate


@dataclass(frozen=True)
class MemoryEstimate:
    """What is in memory, in bytes a process, at the moment of a training step when most is.

    weights: fp32 masters (a strategy's shard of them) and the copies in the compute dtype. gradients, optimizer: what
    exists of them at that moment. activations: what autograd keeps of the blocks and the embedding. logits: the head's
    output, its gradient and the fp32 rows the loss works on. overhead: everything else (temporaries of the block at
    work, buffers of the collectives, token ids). `parts`: the same by name, activations by kind of layer. `moment`:
    when that is.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    overhead: int
    parts: dict[str, int]
    moment: str

    @property
    def total(self) -> int:
        """Bytes a process."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.overhead

    def table(self) -> str:
        """The parts in GB (10^9 bytes), one a line, largest first."""
        rows = [*sorted(self.parts.items(), key=lambda row: -row[1]), ("total", self.total)]
        return "\n".join(f"{name:<28} {size / 1e9:>9.3f} GB" for name, size in rows) + f"\npeak: {self.moment}"


_GROUPS = {
    "weights": ("weights (fp32)", "weights (compute dtype)"),
    "gradients": ("gradients",),
    "optimizer": ("optimizer",),
    "logits": ("logits",),
    "overhead": ("temporaries", "optimizer temporaries", "communication", "token ids"),
}


def estimate_memory(
    config: ModelConfig,
    *,
    batch_size: int,
    context: int | None = None,
    dtype: str = "bfloat16",
    checkpointing: str = "none",
    optimizer: OptimizerRule = TWO_MOMENTS,
    sharding: ShardingRule | None = None,
    world_size: int = 1,
    shard_size: int | None = None,
    device: str = "cuda",
    gradient_accumulation_steps: int = 1,
) -> MemoryEstimate:
    """Peak memory of a training step whose micro-batches have `batch_size` sequences of `context` tokens [block_size].

    `optimizer`, `sharding`: the rules of the registered ones (`training.optimizers.OPTIMIZERS["muon"].rule`,
    `training.parallelism.STRATEGIES["fsdp"].rule`); by default AdamW's, and one process alone. `world_size`: processes; of
    these `shard_size` share one copy where the strategy has replicas (default: half). `gradient_accumulation_steps`:
    micro-batches a step on one process. `device`: whose kernels, 'cuda' or 'cpu'. Raises ValueError that says what is
    wrong with an option.
    """
    context = config.block_size if context is None else context
    _check(
        config, batch_size, context, dtype, checkpointing, sharding, world_size, shard_size, device, gradient_accumulation_steps
    )
    accumulates = gradient_accumulation_steps > 1
    chain, tables = measured_pieces(config, batch_size, context, dtype, checkpointing, device, sharding is not None, accumulates)
    course = _Course(
        sharding,
        sharding.shards(world_size, shard_size) if sharding else 1,
        4 if dtype == "float32" else 2,
        optimizer,
        accumulates,
        chain,
        config.padded_vocab_size * config.n_embd if config.weight_tying else 0,
    )
    moment, held = max(_moments(course), key=lambda found: found[1].total())
    held = dict(held + course.always() + Counter({"position tables": tables, "token ids": 16 * batch_size * context}))
    groups = {group: sum(held.get(name, 0) for name in names) for group, names in _GROUPS.items()}
    return MemoryEstimate(**groups, activations=sum(held.values()) - sum(groups.values()), parts=held, moment=moment)


def card_gb(sold: float) -> float:
    """The memory in GB (10^9 bytes) that a card sold as so many GB reports; for a size that is not sold, the size itself."""
    return CARD_MIB[sold] * 2**20 / 1e9 if sold in CARD_MIB else sold


def largest_micro_batch(config: ModelConfig, card_gb: float, **options) -> int:
    """The most sequences a micro-batch may have on a card of `card_gb` GB (10^9 bytes); 0 where not even one fits.

    HEADROOM_GB and HEADROOM_SHARE of the card are left free. Options as for `estimate_memory`.
    """
    usable = card_gb * 1e9 * (1 - HEADROOM_SHARE) - HEADROOM_GB * 1e9

    def spare(batch_size: int) -> float:
        return usable - estimate_memory(config, batch_size=batch_size, **options).total

    fits, too_many, room = 1, math.inf, spare(1)
    if room < 0:
        return 0
    a_sequence = room - spare(2)
    while too_many - fits > 1:  # memory grows nearly in proportion, so that a guess is right or next to it
        guess = min(fits + max(1, min(int(room / a_sequence), 15 * fits)), too_many - 1)
        left = spare(guess)
        a_sequence = (room - left) / (guess - fits)
        if left >= 0:
            fits, room = guess, left
        else:
            too_many = guess
    return fits


def _check(
    config,
    batch_size,
    context,
    dtype,
    checkpointing,
    sharding: ShardingRule | None,
    world_size,
    shard_size,
    device,
    gradient_accumulation_steps,
) -> None:
    problems = [
        f"{name}={value!r} is not known; use one of {', '.join(known)}."
        for name, value, known in (
            ("dtype", dtype, COMPUTE_DTYPES),
            ("checkpointing", checkpointing, CHECKPOINTING),
            ("device", device, CHUNK_BYTES),
        )
        if value not in known
    ]
    problems += [
        f"{name}={value!r} must be a whole number of at least 1."
        for name, value in (
            ("batch_size", batch_size),
            ("context", context),
            ("world_size", world_size),
            ("gradient_accumulation_steps", gradient_accumulation_steps),
        )
        if not isinstance(value, int) or value < 1
    ]
    replicas = sharding is not None and sharding.replicas
    if not problems:
        if context > config.block_size:
            problems.append(f"context={context} is longer than block_size={config.block_size}.")
        if sharding is None and world_size != 1:
            problems.append(f"world_size={world_size} needs a strategy's sharding rule; one process has none.")
        if replicas and (world_size < 4 or world_size % 2):
            problems.append(f"a strategy with replicas needs an even number of processes, at least 4; it has {world_size}.")
        if shard_size is not None and (not replicas or shard_size < 1 or world_size % shard_size):
            problems.append(
                f"shard_size={shard_size} is for a strategy with replicas and divides world_size; here it has "
                f"{'replicas' if replicas else 'none'} and world_size={world_size}."
            )
    if problems:
        raise ValueError("\n".join(problems))


# ------------------------------------------------------------------------------------------- the course of a step


def _moments(course: _Course) -> Iterator[tuple[str, Counter]]:
    """(when, what is held then and not always) for every moment of a step that can be its fullest.

    Forward, from embedding to loss: what the pieces before have saved, and the piece at work. Backward, the other way:
    the same, and the gradients of the pieces behind. Then the update.
    """
    chain = course.chain
    names = ["embedding", *(f"block {layer}" for layer in range(len(chain) - 2)), "head and loss"]
    before = Counter()
    for place, piece in enumerate(chain):
        yield f"forward of {names[place]}", before + piece.forward + course.in_forward(place)
        before = before + piece.saved
    for place in reversed(range(len(chain))):
        before = before - chain[place].saved
        work = chain[place].again if course.accumulates else chain[place].backward
        yield f"backward of {names[place]}", before + work + course.in_backward(place)
    yield "optimizer step", course.in_update()


@dataclass(frozen=True)
class _Course:
    """What a strategy holds on each process besides the pieces' own: `shards` processes share a copy.

    One process alone (no sharding) casts parameters inside the blocks: the pieces show it. All strategies are FSDP2's
    `fully_shard` over units:
    each block, embedding and head (together where they are tied). A unit's parameters are gathered in the compute
    dtype, of `size` bytes a number, but the embedding's unit in fp32; its gradients come out so and are reduced
    in fp32. A strategy that does not keep units gathered gathers one when it is at work, and the next one meanwhile; the
    others keep what they gathered until the last backward is through with it. Those that reduce once a step do so after
    the last micro-batch, and add the others up whole, in fp32.
    """

    sharding: ShardingRule | None
    shards: int
    size: int
    optimizer: OptimizerRule
    accumulates: bool
    chain: list[Piece]
    tied: int  # numbers in a table that embedding and head share

    @property
    def parameters(self) -> int:
        """N: tied numbers once."""
        return sum(piece.parameters for piece in self.chain) - self.tied

    def unit(self, place: int) -> int:
        """Numbers of the unit at this place of the chain; 0 at either end where the ends are one unit, and outside."""
        ends = (0, len(self.chain) - 1)
        return 0 if not 0 <= place < len(self.chain) or (self.tied and place in ends) else self.chain[place].parameters

    def gathered(self, place: int) -> int:
        """Bytes of that unit when it is gathered."""
        return (4 if place == 0 else self.size) * self.unit(place)

    @property
    def root(self) -> int:
        """Numbers of the unit of embedding and head, where they are tied. It is in memory during the whole pass."""
        return self.chain[0].parameters + self.chain[-1].parameters - self.tied if self.tied else 0

    def always(self) -> Counter:
        """fp32 masters and optimizer state."""
        matrices = sum(piece.matrices for piece in self.chain[1:-1])
        state = self.optimizer.state(self.parameters, matrices) // self.shards
        return Counter({"weights (fp32)": 4 * self.parameters // self.shards, "optimizer": state})

    def in_forward(self, place: int) -> Counter:
        """What is held while the piece at `place` computes its output, beside its activations.

        1. With accumulation, the gradients of the micro-batches before.
        2. With sharding, the gathered parameters of this unit and of the next one, which is gathered in advance.
        """
        old = self.gradients(self.parameters) if self.accumulates else Counter()
        if self.sharding is None:
            return old
        here = sum(map(self.gathered, range(0 if self.sharding.keeps_gathered else place, place + 2)))
        return old + Counter({"weights (compute dtype)": 4 * self.root + here})

    def in_backward(self, place: int) -> Counter:
        """What is held while the piece at `place` computes its gradients, beside its activations.

        1. Gradients: with accumulation those of all parameters, from the micro-batches before; without it those of the
           pieces after this one, whose backward is done.
        2. Where embedding and head are tied, the table gets two gradients. The head's comes first and is kept until the
           embedding's is there. Their sum is a third tensor in fp32; in half precision the sum is written into the first.
        3. With sharding, parameters in the compute dtype: this unit's and the next one's (backward runs towards place 0),
           or all that have been gathered, where the strategy keeps them.
        4. With sharding, the gradients of the unit before this one in backward, which are on their way to their shards.
        """
        behind = sum(piece.parameters for piece in self.chain[place + 1 :])
        adding = self.tied * 4 if place == 0 and self.size == 4 else 0
        if self.sharding is None:
            waiting = self.tied if behind else 0
            return Counter({"gradients": 4 * (self.parameters + waiting if self.accumulates else behind), "temporaries": adding})
        head = self.chain[-1].parameters if self.tied and behind else 0
        held = self.gradients(self.parameters if self.accumulates else behind - head)
        held += Counter({"gradients": 4 * head})
        if self.sharding.keeps_gathered:
            here = sum(map(self.gathered, range(len(self.chain) if self.accumulates else place + 1)))
        else:
            here = self.gathered(place) + self.gathered(place - 1)
        once = self.sharding.reduces_once and self.accumulates
        leaving = 0 if once else 4 * (self.root if place == 0 and self.tied else self.unit(place + 1))
        return held + Counter({"weights (compute dtype)": 4 * self.root + here, "communication": leaving, "temporaries": adding})

    def in_update(self) -> Counter:
        """All gradients, and what the optimizer needs for the largest matrix of a block."""
        held = Counter({"gradients": 4 * self.parameters // self.shards})
        if self.optimizer.temporaries is not None:
            largest = max((piece.largest for piece in self.chain[1:-1]), key=math.prod)
            held["optimizer temporaries"] = self.optimizer.temporaries(largest)
        return held

    def gradients(self, parameters: int) -> Counter:
        """fp32 gradients of so many parameters between their backward and the update."""
        whole = self.sharding is not None and self.sharding.reduces_once and self.accumulates
        return Counter({"gradients": 4 * parameters // (1 if whole else self.shards)})
