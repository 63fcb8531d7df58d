"""Auxiliary losses: how a component adds to the loss of training without returning anything more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo


class AuxiliaryLosses:
    """What the components of a model added to the loss while `auxiliary_losses` was active.

    `totals[name]`: fp32 scalar, the sum over all places that attached a loss of this name of loss × tokens there.
    `tokens[name]`: the number of tokens that sum is over, so that totals[name] / tokens[name] is the mean loss.
    """

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.totals: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}


_active: ContextVar[AuxiliaryLosses | None] = ContextVar("auxiliary losses", default=None)


@contextmanager
def auxiliary_losses(weight: Tensor) -> Iterator[AuxiliaryLosses]:
    """Let components add to the loss in the forward passes inside of this context; it yields what they added.

    `weight` (scalar): how much one token's loss weighs in what backward is called on, usually loss scale / tokens of the
    global batch. Outside of the context (evaluation, generation) auxiliary losses have no effect and cost nothing.
    """
    found = AuxiliaryLosses(weight)
    token = _active.set(found)
    try:
        yield found
    finally:
        _active.reset(token)


@_disable_dynamo  # as torch.compiler.disable, which would import the whole compiler here and now
def attach_auxiliary_loss(x: Tensor, name: str, loss: Tensor) -> Tensor:
    """x (…, D), unchanged, with a loss attached to it: the way for a component to add to the loss of training.

    `loss` (scalar) is a mean over the tokens of x, the component's own factor included; a router's balance, for instance.
    Where `auxiliary_losses(weight)` is active, the backward pass through x also runs backward from `loss`, with the gradient
    weight × tokens in x, as if weight × tokens × loss had been added to what backward is called on. The component must
    return, or compute with, the x that it gets back. Raises ValueError if `loss` is not a scalar.
    """
    if loss.ndim:
        raise ValueError(f"the auxiliary loss {name!r} has the shape {tuple(loss.shape)}; attach a scalar, such as its mean.")
    active = _active.get()
    recomputing = torch._C._current_graph_task_id() != -1  # activation checkpointing runs forward again inside backward
    if active is None or recomputing or not torch.is_grad_enabled():
        return x
    tokens = x.shape[:-1].numel()
    active.totals[name] = active.totals.get(name, 0.0) + loss.detach().float() * tokens
    active.tokens[name] = active.tokens.get(name, 0) + tokens
    return _Attached.apply(x, loss, active.weight)


class _Attached(torch.autograd.Function):
    """The identity on x; backward gives `loss` its gradient.

    The weight is an attribute and not a saved tensor, as activation checkpointing compares the numbers of tensors saved in
    forward and in recomputation, where nothing is attached.
    """

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor, weight: Tensor) -> Tensor:
        ctx.gradient = (weight * x.shape[:-1].numel()).to(loss.dtype)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, ctx.gradient, None
