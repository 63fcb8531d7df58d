"""The optimizers, each registered with what it keeps in memory, behind one small interface.

To add one: write a function (named parameters, configuration) → list of `Update`s, say what it keeps (`OptimizerRule`), and
put `@register_optimizer("name", rule)` on it. `--optimizer=name` then trains with it, its state is saved, and the memory
model counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flops_parameter_counting.memory_rules import TWO_MOMENTS, OptimizerRule
from training.parallelism import local
from training.registry import OPTIMIZERS
from training.train_config import TrainConfig


@dataclass
class Update:
    """A PyTorch optimizer over some of the parameters. `kinds`: the names of its state tensors as large as a parameter.

    `on_device`: whether it skips an update by PyTorch's `found_inf` (fused optimizers do), so that the host need not know.
    """

    optimizer: torch.optim.Optimizer
    kinds: tuple[str, ...]
    on_device: bool = False
    counts_steps: bool = False  # whether it keeps a scalar "step" for each parameter

    def step(self, skip: Tensor) -> None:
        """Update the parameters unless `skip` (a scalar on the device) is 1.0."""
        if self.on_device:
            self.optimizer.found_inf = skip  # the hook that PyTorch's fused optimizers have for GradScaler
            self.optimizer.step()
        elif not bool(skip):
            self.optimizer.step()

    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Parameter → its state tensors by kind. Those that PyTorch would make at the first step are made here."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                for kind in self.kinds:
                    if kind not in state:
                        state[kind] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                if self.counts_steps and "step" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return dict(self.optimizer.state)


@dataclass(frozen=True)
class Entry:
    """A registered optimizer: how its updates are made, and what it keeps in memory."""

    make: Callable[[dict[str, Tensor], TrainConfig], list[Update]]
    rule: OptimizerRule

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (self.make.__doc__ or "").strip().split("\n")[0]


def register_optimizer(name: str, rule: OptimizerRule) -> Callable[[Callable], Callable]:
    """Decorator that enters a function (named parameters, configuration) → updates as an optimizer. ValueError if taken."""

    def enter(make: Callable) -> Callable:
        OPTIMIZERS.register(name, Entry(make, rule))
        return make

    return enter


class Optimizer:
    """The run's optimizer: one learning rate, state tensors under their parameters' names, an update that can be skipped."""

    def __init__(self, model: nn.Module, config: TrainConfig):
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.names = {parameter: name for name, parameter in named.items()}
        self.updates = OPTIMIZERS[config.optimizer].make(named, config)

    def step(self, learning_rate: float, skip: Tensor) -> None:
        """Update the weights, or, where `skip` (fp32 scalar on the device) is 1.0, leave weights and state untouched.

        AdamW skips on the device, without the host knowing; other optimizers need one host sync.
        """
        for update in self.updates:
            for group in update.optimizer.param_groups:
                group["lr"] = learning_rate
            update.step(skip)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for update in self.updates:
            update.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """The state tensors, named '<parameter>.<kind>' (exp_avg, exp_avg_sq, step, momentum_buffer).

        State that PyTorch would only make at the first step is made here, so that a checkpoint always has all of it
        and a fresh optimizer has a place to load each tensor into.
        """
        return {
            f"{self.names[parameter]}.{kind}": tensor
            for update in self.updates
            for parameter, state in update.state().items()
            for kind, tensor in state.items()
        }


# ------------------------------------------------------------------------------------------- AdamW


@register_optimizer("adamw", TWO_MOMENTS)
def adamw(parameters: dict[str, Tensor], config: TrainConfig) -> list[Update]:
    """AdamW with decoupled weight decay on matrices only (Loshchilov & Hutter 2019), PyTorch's fused implementation."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [
        {"params": group, "weight_decay": decay} for group, decay in ((matrices, config.weight_decay), (vectors, 0.0)) if group
    ]
    if not groups:
        return []
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True
    )
    return [Update(optimizer, kinds=("exp_avg", "exp_avg_sq"), on_device=True, counts_steps=True)]


# ------------------------------------------------------------------------------------------- Muon


def newton_schulz_memory(shape: tuple[int, int]) -> int:
    """Bytes that orthogonalising a matrix of this shape needs for a moment: its fp32 update and the bf16 products."""
    short, long = sorted(shape)
    return 4 * long * short + 2 * (2 * long * short + 2 * short * short)


@register_optimizer("muon", OptimizerRule(bytes_per_number=8, bytes_per_matrix_number=4, temporaries=newton_schulz_memory))
def muon(parameters: dict[str, Tensor], config: TrainConfig) -> list[Update]:
    """Muon (Jordan et al. 2024) for the blocks' matrices, AdamW for embedding, head, norms and biases.

    Muon's step is scaled to AdamW's RMS (Liu et al. 2025), so that the same learning rate and decay serve both. A 3-D
    parameter of a block (the experts of a mixture) is a stack of matrices, each of which is orthogonalised by itself.
    """
    matrices = {n: p for n, p in parameters.items() if n.startswith("blocks.") and p.ndim in (2, 3)}
    updates = adamw({name: p for name, p in parameters.items() if name not in matrices}, config)
    if matrices:
        optimizer = Muon(matrices.values(), config.learning_rate, config.weight_decay, config.muon_momentum)
        updates.append(Update(optimizer, kinds=("momentum_buffer",)))
    return updates


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is orthogonalised: for matrices (rows, columns), or stacks of matrices (n, rows, columns).

    The numbers are those of torch.optim.Muon with Nesterov momentum and adjust_lr_fn="match_rms_adamw", which takes
    whole 2-D parameters only. Where S processes share a parameter, each keeps its part of the momentum. A matrix has to be
    whole to be orthogonalised, so S matrices at a time are made whole, and each of the S processes does one of them
    and sends it to the others. A stack is shared by matrices, so that each process orthogonalises its own.
    """

    COEFFICIENTS, STEPS, EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7  # of the Newton–Schulz iteration, as in PyTorch

    def __init__(self, parameters: Iterable[Tensor], lr: float, weight_decay: float, momentum: float):
        super().__init__(list(parameters), dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter."""
        for group in self.param_groups:
            shared = [p for p in group["params"] if p.ndim == 2 and is_sharded(p)]
            for parameter in (p for p in group["params"] if p.ndim == 3 or not is_sharded(p)):
                direction = self._direction(parameter, group)
                matrices = direction if direction.ndim == 3 else direction[None]
                for matrix, rows in zip(matrices, local(parameter) if direction.ndim == 3 else local(parameter)[None]):
                    self._apply(rows, self._orthogonalized(matrix), matrix.shape, group)
            if shared:
                self._step_together(shared, group)

    def _step_together(self, parameters: list[Tensor], group: dict) -> None:
        """Update matrices whose rows are dealt out to the processes of a group."""
        shards = parameters[0].device_mesh.get_group("shard")
        me, size = dist.get_rank(shards), dist.get_world_size(shards)
        for first in range(0, len(parameters), size):
            some = parameters[first : first + size]
            whole = [whole_matrix(self._direction(parameter, group), len(parameter), shards) for parameter in some]
            if me < len(some):
                whole[me] = self._orthogonalized(whole[me])
            sent = [
                dist.broadcast(matrix, dist.get_global_rank(shards, owner), group=shards, async_op=True)
                for owner, matrix in enumerate(whole)
            ]
            for parameter, matrix, arrival in zip(some, whole, sent):
                arrival.wait()
                rows = local(parameter)
                start = me * -(-matrix.size(0) // size)  # rows are dealt out as torch.chunk does
                self._apply(rows, matrix[start : start + rows.size(0)], matrix.shape, group)

    @staticmethod
    def _apply(rows: Tensor, update: Tensor, shape: torch.Size, group: dict) -> None:
        """Decay rows of a matrix of this shape and move them against the update, scaled to AdamW's RMS (Liu et al. 2025)."""
        rows.mul_(1 - group["lr"] * group["weight_decay"])
        ratio = 0.2 * max(shape) ** 0.5
        rows.add_(update, alpha=-group["lr"] * ratio)

    def _orthogonalized(self, matrix: Tensor) -> Tensor:
        return orthogonalized(matrix, self.COEFFICIENTS, self.STEPS, self.EPS)

    def _direction(self, parameter: Tensor, group: dict) -> Tensor:
        """This process's part of where to go: Nesterov's momentum, in bf16."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        gradient, momentum = local(parameter.grad), local(state["momentum_buffer"])
        momentum.lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(momentum, group["momentum"]).bfloat16()


def is_sharded(parameter: Tensor) -> bool:
    """Whether other processes hold parts of this parameter."""
    return hasattr(parameter, "to_local") and parameter.device_mesh["shard"].size() > 1


def whole_matrix(rows: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
    """All `count` rows of a matrix (count, columns), of which each process of the group has some, as torch.chunk deals."""
    size = dist.get_world_size(group)
    padded = rows.new_zeros(-(-count // size), rows.size(1))
    padded[: rows.size(0)] = rows
    everyones = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(everyones, padded, group=group)
    return torch.cat(everyones)[:count]


def orthogonalized(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton–Schulz: a matrix with about the singular vectors of this bf16 one, singular values near 1 (Jordan et al. 2024)."""
    a, b, c = coefficients
    x = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if matrix.size(0) > matrix.size(1) else x).contiguous()


# ------------------------------------------------------------------------------------------- gradients


def clip_and_check(model: nn.Module, loss: Tensor, max_norm: float, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Divide the gradients by `scale` and clip their norm to max_norm (0: no clipping), on the device.

    Returns (norm before clipping, skip); skip is 1.0 if the norm or the loss is not finite, else 0.0 (fp32 scalars).
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if hasattr(norm, "full_tensor"):  # of shards: over all processes
        norm = norm.full_tensor()
    norm = norm / scale
    factor = 1.0 / scale
    if max_norm:
        factor = factor * torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
    return norm, (~torch.isfinite(norm + loss)).float()
