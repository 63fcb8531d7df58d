"""AdamW, or Muon with AdamW for what is not a matrix of a block, behind one small interface."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.parallelism import local
from training.train_config import TrainConfig


class Optimizer:
    """The run's optimizer: one learning rate, decoupled weight decay on matrices only, an update that can be skipped.

    'adamw': fused AdamW for everything (Loshchilov & Hutter 2019). 'muon': Muon (Jordan et al. 2024) for the 2-D
    weights of the blocks, its step scaled to AdamW's RMS (Liu et al. 2025) so that the same learning rate and decay
    serve both; fused AdamW for embedding, head, norms and biases.
    """

    def __init__(self, model: nn.Module, config: TrainConfig):
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        muon, matrices, vectors = [], [], []
        for parameter, name in self.names.items():
            in_block = name.startswith("blocks.") and parameter.ndim == 2
            (muon if config.optimizer == "muon" and in_block else matrices if parameter.ndim >= 2 else vectors).append(parameter)
        groups = [
            {"params": group, "weight_decay": decay}
            for group, decay in ((matrices, config.weight_decay), (vectors, 0.0))
            if group
        ]
        self.adamw = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True
        )
        self.muon = None
        if muon:
            kind = ShardedMuon if is_sharded(muon[0]) else torch.optim.Muon
            self.muon = kind(
                muon,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                momentum=config.muon_momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        self.all = [self.adamw] + ([self.muon] if self.muon else [])

    def step(self, learning_rate: float, skip: Tensor) -> None:
        """Update the weights, or, where `skip` (fp32 scalar on the device) is 1.0, leave weights and state untouched.

        AdamW skips on the device, without the host knowing; Muon needs one host sync.
        """
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        self.adamw.found_inf = skip  # the hook PyTorch's fused optimizers have for GradScaler
        self.adamw.step()
        if self.muon is not None and not bool(skip):
            self.muon.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """The state tensors, named '<parameter>.<kind>' (exp_avg, exp_avg_sq, step, momentum_buffer).

        State that PyTorch would only make at the first step is made here, so that a checkpoint always has all of it
        and a fresh optimizer has a place to load each tensor into.
        """
        for optimizer in self.all:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    state = optimizer.state[parameter]
                    kinds = ("momentum_buffer",) if optimizer is self.muon else ("exp_avg", "exp_avg_sq")
                    for kind in kinds:
                        if kind not in state:
                            state[kind] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                    if optimizer is self.adamw and "step" not in state:
                        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {
            f"{self.names[parameter]}.{kind}": tensor
            for optimizer in self.all
            for parameter, state in optimizer.state.items()
            for kind, tensor in state.items()
        }


class ShardedMuon(torch.optim.Muon):
    """Muon for matrices whose rows are shared by S processes: momentum in shards, S matrices at a time made whole.

    Orthogonalising needs the whole matrix. Each of the S processes does it for one of the S, and tells the others; the
    numbers are those of torch.optim.Muon on whole matrices.
    """

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix."""
        for group in self.param_groups:
            mesh = group["params"][0].device_mesh
            shards = mesh.get_group("shard")
            me, size = dist.get_rank(shards), dist.get_world_size(shards)
            for first in range(0, len(group["params"]), size):
                some = group["params"][first : first + size]
                whole = [whole_matrix(self._direction(parameter, group), len(parameter), shards) for parameter in some]
                if me < len(some):
                    whole[me] = orthogonalized(whole[me], group["ns_coefficients"], group["ns_steps"], group["eps"])
                sent = [
                    dist.broadcast(matrix, dist.get_global_rank(shards, owner), group=shards, async_op=True)
                    for owner, matrix in enumerate(whole)
                ]
                for parameter, matrix, arrival in zip(some, whole, sent):
                    arrival.wait()
                    mine = local(parameter)
                    start = me * -(-matrix.size(0) // size)  # rows are dealt out as torch.chunk does
                    ratio = 0.2 * max(matrix.shape) ** 0.5  # AdamW's RMS (Liu et al. 2025)
                    mine.mul_(1 - group["lr"] * group["weight_decay"])
                    mine.add_(matrix[start : start + mine.size(0)], alpha=-group["lr"] * ratio)

    def _direction(self, parameter: Tensor, group: dict) -> Tensor:
        """This process's rows of where to go: Nesterov's momentum, in bf16."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        gradient, momentum = local(parameter.grad), local(state["momentum_buffer"])
        momentum.lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        return direction.bfloat16()


def is_sharded(parameter: Tensor) -> bool:
    """Whether other processes hold rows of this parameter."""
    return hasattr(parameter, "to_local") and parameter.device_mesh["shard"].size() > 1


def whole_matrix(rows: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
    """All `count` rows, of which each process of the group has some, dealt out as torch.chunk does."""
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


def clip_and_check(model: nn.Module, loss: Tensor, max_norm: float, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Divide the gradients by the loss scale and clip their norm to max_norm (0: no clipping), on the device.

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
