"""Building bricks of components: linear projections, look-up tables, and how their weights start."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from model_config import ModelConfig
from model_parts.registry import component

INIT_STD = 0.02  # of every weight matrix (GPT-2); residual outputs are scaled down from it


def build(kind: str, name: str, *args: Any) -> Any:
    """Instantiate the component that the configuration names: build('normalization', 'rmsnorm', config, width)."""
    return component(kind, name).build(*args)


def use(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """A stored parameter in the dtype of the activations it meets."""
    return None if parameter is None else parameter.to(x.dtype)


class Normal(NamedTuple):
    """How a parameter starts: independent normal numbers of this standard deviation."""

    std: float


class Constant(NamedTuple):
    """How a parameter starts: all equal to this value."""

    value: float


FirstValue = Normal | Constant | Tensor  # what `initial(name)` of a module returns for its parameters and buffers


class Linear(nn.Linear):
    """Linear projection (…, d_in) → (…, d_out). Weights start normal with standard deviation `std`, biases at zero."""

    std = INIT_STD

    def __init__(self, d_in: int, d_out: int, bias: bool):
        super().__init__(d_in, d_out, bias=bias)

    def reset_parameters(self) -> None:
        """Draws no numbers on the meta device, where models are assembled: it would be a third of the time that takes."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def initial(self, name: str) -> FirstValue:
        return {"weight": Normal(self.std) if self.std else Constant(0.0), "bias": Constant(0.0)}[name]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, use(self.weight, x), use(self.bias, x))


class ResidualLinear(Linear):
    """A projection that writes into the residual stream, (…, d_in) → (…, d_out).

    Its weights start smaller, by 1/√(2·n_layer), so that the stream's variance does not grow with depth (GPT-2, Radford
    et al. 2019, §2.3), or with `zero_init` at zero, so that under pre-norm every block starts as the identity (Zhang et
    al. 2019). A norm behind such a projection ('output', 'sandwich') sees zeros first and steepens the first gradient.
    """

    def __init__(self, config: ModelConfig, d_in: int, d_out: int):
        super().__init__(d_in, d_out, config.bias)
        self.std = 0.0 if config.zero_init else INIT_STD / math.sqrt(2 * config.n_layer)


class Embedding(nn.Embedding):
    """Look-up table: ids (…) → (…, D)."""

    def initial(self, name: str) -> FirstValue:
        return {"weight": Normal(INIT_STD)}[name]
