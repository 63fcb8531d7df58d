"""AdamW, or Muon with AdamW for what is not a matrix of a block, behind one small interface."""

from __future__ import annotations

import torch
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
            (muon if config.optimizer == "muon" and in_block else
             matrices if parameter.ndim >= 2 else vectors).append(parameter)
        groups = [{"params": group, "weight_decay": decay}
                  for group, decay in ((matrices, config.weight_decay), (vectors, 0.0)) if group]
        self.adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                                       eps=config.adam_eps, fused=True)
        self.muon = torch.optim.Muon(muon, lr=config.learning_rate, weight_decay=config.weight_decay,
                                     momentum=config.muon_momentum, adjust_lr_fn="match_rms_adamw") if muon else None
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
        return {f"{self.names[parameter]}.{kind}": tensor for optimizer in self.all
                for parameter, state in optimizer.state.items() for kind, tensor in state.items()}


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
