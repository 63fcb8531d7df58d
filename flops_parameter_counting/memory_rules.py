"""What the memory model needs to know of an optimizer and of a sharding strategy.

Whoever registers an optimizer or a strategy (training/) says it in these terms; the memory model knows no names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerRule:
    """Bytes of optimizer state in fp32 for each parameter, and what an update needs for a moment.

    `bytes_per_number`: state of a parameter (AdamW: two moments, 8). `bytes_per_matrix_number`: of the matrices inside the
    blocks, where it differs. `temporaries`: shape of the largest such matrix → bytes while it is updated.
    """

    bytes_per_number: int = 8
    bytes_per_matrix_number: int | None = None
    temporaries: Callable[[tuple[int, int]], int] | None = None

    def state(self, numbers: int, matrix_numbers: int) -> int:
        """Bytes of state for so many numbers, of which so many are in the blocks' matrices."""
        matrix_bytes = self.bytes_per_number if self.bytes_per_matrix_number is None else self.bytes_per_matrix_number
        return self.bytes_per_number * (numbers - matrix_numbers) + matrix_bytes * matrix_numbers


TWO_MOMENTS = OptimizerRule()  # AdamW's


@dataclass(frozen=True)
class ShardingRule:
    """How the units of a model (each block, and what is around them) are spread over processes and when they travel.

    `sharded`: weights and optimizer state are 1/W in each process, else whole. `keeps_gathered`: a unit stays gathered from
    its first use in a step to its last, else only while it is at work. `reduces_once`: gradients are summed after the
    last micro-batch only. `replicas`: groups of processes share a copy among themselves and sum between them.
    """

    sharded: bool = True
    keeps_gathered: bool = True
    reduces_once: bool = False
    replicas: bool = False

    def shards(self, world_size: int, shard_size: int | None = None) -> int:
        """How many processes share one copy; under `replicas` they are `shard_size` (default: half)."""
        return 1 if not self.sharded else (shard_size or world_size // 2) if self.replicas else world_size
