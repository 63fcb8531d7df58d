"""Parts as somebody else would write them, in a file of their own: what the tests of extension points register.

with registered_mixture():
    config = resolve("llama", ffn_type="mixture", n_experts=8)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from model_components import INIT_STD, Linear, Normal, attach_auxiliary_loss, register_ffn
from model_config import Key, ModelConfig, Part, component, linear_part, unregister

MIXTURE_KEYS = (
    Key("n_experts", int, 4, "feed-forwards that a token can be sent to (mixture only)", tag="Exp"),
    Key("experts_per_token", int, 2, "feed-forwards that each token is sent to (mixture only)", tag="Top"),
    Key("balance_weight", float, 0.01, "weight of the loss that keeps the experts equally busy (mixture only)", tag="Bal"),
)


def _can_route(config: ModelConfig) -> list[str]:
    if 1 <= config.experts_per_token <= config.n_experts:
        return []
    return [f"experts_per_token={config.experts_per_token} must be between 1 and n_experts={config.n_experts}."]


class Mixture(nn.Module):
    """Mixture of experts: each token goes to the best few of n_experts feed-forwards (Shazeer et al. 2017).

    (B, T, D) → (B, T, D). The router's load is kept even by the loss of Fedus et al. 2021 (Switch Transformer).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        E, D, d_ff = config.n_experts, config.n_embd, config.d_ff
        self.router = Linear(D, E, bias=False)
        self.up = nn.Parameter(torch.empty(E, D, d_ff))
        self.down = nn.Parameter(torch.empty(E, d_ff, D))
        self.activation = component("activation", config.activation).build

    def initial(self, name: str) -> Normal:
        return {"up": Normal(INIT_STD), "down": Normal(INIT_STD / math.sqrt(2 * self.config.n_layer))}[name]

    @staticmethod
    def parts(config: ModelConfig) -> list[Part]:
        expert = 2 * config.n_embd * config.d_ff
        active = config.experts_per_token * expert
        return [
            linear_part("router", config.n_embd, config.n_experts, False),
            Part("experts", parameters=config.n_experts * expert, active=active, matmul=active),
        ]

    def forward(self, x: Tensor) -> Tensor:
        probability = self.router(x).float().softmax(dim=-1)  # (B, T, E)
        weight, chosen = probability.topk(self.config.experts_per_token, dim=-1)  # (B, T, k)
        weight = (weight / weight.sum(dim=-1, keepdim=True)).to(x.dtype)
        hidden = self.activation(torch.einsum("btd,btkdf->btkf", x, self.up.to(x.dtype)[chosen]))
        y = torch.einsum("btkf,btkfd->btkd", hidden, self.down.to(x.dtype)[chosen])
        y = (y * weight[..., None]).sum(dim=2)
        E = self.config.n_experts
        share = (chosen[..., None] == torch.arange(E, device=x.device)).float().mean(dim=(0, 1, 2))  # of the tokens, (E,)
        balance = E * (share * probability.mean(dim=(0, 1))).sum()
        return attach_auxiliary_loss(y, "balance", self.config.balance_weight * balance)


def _register() -> None:
    register_ffn("mixture", short="MoE", keys=MIXTURE_KEYS, check=_can_route)(Mixture)


@contextmanager
def registered_mixture() -> Iterator[None]:
    """The mixture under ffn_type='mixture', until the end of the context."""
    _register()
    try:
        yield
    finally:
        unregister("ffn_type", "mixture")


@contextmanager
def without_mixture() -> Iterator[None]:
    """Inside of `registered_mixture`: as in a process where nobody has registered it."""
    unregister("ffn_type", "mixture")
    try:
        yield
    finally:
        _register()
