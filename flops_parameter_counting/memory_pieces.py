"""What each piece of a model keeps in memory from its forward to its backward, and needs while it runs.

This is not written down here a second time. A model with one block of each kind is made, and its front, its blocks, and its
tail with the loss are run forward and backward on tensors that have a shape and no numbers. Every storage they make is
entered in a ledger: so whatever is registered in `model_components.py` is accounted for, as it is. That takes a tenth of a
second or two and no memory. `memory.py` puts the pieces together.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model_builder import COMPUTE_DTYPES, Transformer, one_of_each_block
from model_components import Attention, Context
from model_config import ModelConfig, components
from model_parts.losses import summed_cross_entropy
from model_parts.recomputation import recomputed

CHUNKS = 3  # of the loss's logits, are enough to see how many of them are in memory at once

_aten = torch.ops.aten


@dataclass(frozen=True)
class Piece:
    """One stretch of the model, run by itself: what it holds in memory, in bytes by label.

    `saved`: from its forward to its backward. `forward`, `backward`: at its fullest in either; `saved`, the gradient
    that comes in and those of its own parameters included. `again`: as backward where gradients exist already, which
    are not included; None where it was not asked for. `parameters`, `matrices`: numbers in all of its parameters, in the
    2-D ones. `largest`: shape of the largest 2-D one.
    """

    saved: Counter
    forward: Counter
    backward: Counter
    again: Counter | None
    parameters: int
    matrices: int
    largest: tuple[int, int]


# ------------------------------------------------------------------------------------------- the pieces of a model


@lru_cache(maxsize=512)
def measured_pieces(
    config: ModelConfig, batch_size: int, context: int, dtype: str, checkpointing: str, device: str, cast: bool, again: bool
) -> tuple[list[Piece], int]:
    """The model's front, every block, and its tail with the loss, each measured; and the bytes of what the blocks share.

    `cast`: parameters are in the compute dtype already, as a sharding strategy gathers them; but for the embedding's, and
    the head's if it is tied to it, which are gathered as they are stored. `again`: also where gradients exist already.
    Raises ValueError for a component that cannot be run without numbers.
    """
    try:
        return _measured_pieces(config, batch_size, context, dtype, checkpointing, device, cast, again)
    except RuntimeError as error:
        fake = isinstance(error, (DataDependentOutputException, DynamicOutputShapeException))
        if not fake and not isinstance(error, NotImplementedError) and "meta tensors" not in str(error):
            raise
        raise ValueError(
            f"the memory of {config.name} cannot be predicted: a component does what depends on the numbers in tensors "
            f"({error.func if fake else str(error).splitlines()[0]}), and prediction runs it without numbers."
        ) from error


def _without_numbers(device: str) -> AbstractContextManager:
    """Where tensors are made that have a shape and no numbers, and run as on a type of device.

    On a CPU PyTorch itself chooses kernels, as fake tensors make it believe that there are numbers. What a GPU does otherwise
    is said below, so plain tensors of the meta device will do, and they take a third of the time.
    """
    stack = ExitStack()
    if device == "cpu":
        stack.enter_context(FakeTensorMode())
    stack.enter_context(torch.device("cpu" if device == "cpu" else "meta"))
    stack.enter_context(torch.enable_grad())  # whatever the caller has set
    return stack


def _measured_pieces(
    config: ModelConfig, batch_size: int, context: int, dtype: str, checkpointing: str, device: str, cast: bool, again: bool
) -> tuple[list[Piece], int]:
    on_device = _GpuKernels if device == "cuda" else nullcontext
    with _without_numbers(device):
        model = Transformer(one_of_each_block(config))
        model.compute_dtype = COMPUTE_DTYPES[dtype]
        if config.attention_backend == "flex" and device == "cuda":
            _as_flash(model)
        positions = torch.arange(context)
        shared = model.context(positions, model.compute_dtype)
        ids = torch.zeros(batch_size, context, dtype=torch.int64)
        targets = torch.zeros(batch_size * context, dtype=torch.int64)
        x = torch.empty(batch_size, context, config.n_embd, dtype=model.compute_dtype, requires_grad=True)

        def front(ids: Tensor) -> Tensor:
            with on_device():
                return _Incoming.apply(model.embed(ids, positions))

        def tail(x: Tensor) -> Tensor:
            with on_device():
                return summed_cross_entropy(model.tail(x).flatten(0, 1), targets, device, CHUNKS)

        measured = {"front": _measure(model, Transformer.FRONT, front, ids, "embedding", again)}
        for name, block in zip(model.config.layer_pattern, model.blocks):
            if cast:
                _cast(block, model.compute_dtype)
            block.forward = recomputed(partial(_within, on_device, block.forward), checkpointing)
            run = partial(_run_block, block, shared)
            measured[name] = _measure(block, None, run, x, "residual stream", again)
        if cast and not config.weight_tying:
            _cast(model.norm, model.compute_dtype)
            _cast(model.head, model.compute_dtype)
        measured["tail"] = _measure(
            model, Transformer.TAIL, tail, x, "residual stream", again, (config.vocab_size, config.padded_vocab_size)
        )
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for t in tree_leaves((shared.tables, shared.masks))
        if isinstance(t, Tensor)
    }
    return [measured[name] for name in ("front", *config.layer_pattern, "tail")], sum(storages.values())


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Put parameters in the compute dtype in the place of a module's own."""
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            setattr(child, name, nn.Parameter(parameter.detach().to(dtype)))


def _run_block(block: nn.Module, shared: Context, x: Tensor) -> Tensor:
    return _Incoming.apply(block(x, shared))


def _within(kernels: Callable, forward: Callable, *inputs: Any) -> Any:
    """Run a forward under a device's kernels; where checkpointing runs it again, too."""
    with kernels():
        return forward(*inputs)


# ------------------------------------------------------------------------------------------- one piece, without numbers


class _Ledger(TorchDispatchMode):
    """Bytes of the tensor storages alive, by label, and at the fullest moment since `restart`.

    A storage is labelled when it is made: a cast parameter as such, what is as wide as the vocabulary as logits (in the
    head), everything else by the module at work.
    """

    def __init__(self, parameters: list[Tensor], vocabulary: tuple[int, ...]):
        super().__init__()
        self.parameters = {p.untyped_storage()._cdata for p in parameters}
        self.vocabulary = vocabulary
        self.entries: dict[int, tuple[str, int]] = {}
        self.live: Counter = Counter()
        self.at_work = [""]
        self.restart()

    def restart(self) -> None:
        """Look for the fullest moment from here on."""
        self.fullest, self.most = self.live.copy(), self.live.total()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                casts = function is _aten._to_copy.default and args[0].untyped_storage()._cdata in self.parameters
                self.enter(
                    tensor,
                    "weights (compute dtype)"
                    if casts
                    else "logits"
                    if tensor.ndim and tensor.size(-1) in self.vocabulary
                    else self.at_work[-1],
                )
        if self.live.total() > self.most:
            self.restart()
        return result

    def enter(self, tensor: Tensor, label: str) -> None:
        """Count the tensor's storage, if it is new, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.entries and key not in self.parameters and size:
            self.entries[key] = label, size
            self.live[label] += size
            weakref.finalize(storage, self.leave, key)

    def leave(self, key: int) -> None:
        """A storage is freed."""
        label, size = self.entries.pop(key)
        self.live[label] -= size

    def relabel(self, tensor: Tensor, label: str) -> None:
        """What the tensor holds turns out to be something else."""
        key = tensor.untyped_storage()._cdata
        if key in self.entries:
            old, size = self.entries[key]
            self.entries[key] = label, size
            self.live[old] -= size
            self.live[label] += size


class _Incoming(torch.autograd.Function):
    """Ends a piece: takes its output and, backward, hands in a gradient like the one that comes from the next."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.like = x.shape, x.dtype, x.device
        return x.new_empty(())

    @staticmethod
    def backward(ctx, _: Tensor) -> Tensor:
        shape, dtype, device = ctx.like
        return torch.empty(shape, dtype=dtype, device=device)


def _measure(
    module: nn.Module,
    children: tuple[str, ...] | None,
    run: Callable[[Tensor], Tensor],
    source: Tensor,
    label: str,
    again: bool,
    vocabulary: tuple[int, ...] = (),
) -> Piece:
    """Run `source` through, forward and backward, and see what was in memory; `again`: once more with gradients there.

    `children`: those of the module that take part [all]. `label`: of what is made outside of all labelled ones.
    `vocabulary`: widths of logits.
    """
    taking_part = [child for name, child in module.named_children() if children is None or name in children]
    parameters = list({p: None for child in taking_part for p in child.parameters()})
    if children is None:
        parameters = list(module.parameters())
    ledger = _Ledger([*parameters, source], vocabulary)
    handles = [
        handle
        for child, name in _labels(module, children)
        for handle in (
            child.register_forward_pre_hook(lambda *_, name=name: ledger.at_work.append(name)),
            child.register_forward_hook(lambda *_: ledger.at_work.pop() and None, always_call=True),
        )
    ]
    handles += [p.register_post_accumulate_grad_hook(lambda p: ledger.relabel(p.grad, "gradients")) for p in parameters]

    def micro_batch() -> tuple[Counter, Counter, Counter]:
        ledger.at_work = [label]
        ledger.restart()
        existing = ledger.live.copy()
        with ledger:
            end = run(source.clone() if source.is_floating_point() else source)
            saved, forward = ledger.live - existing, ledger.fullest - existing
            ledger.at_work = ["temporaries"]
            ledger.restart()
            end.backward()
        source.grad = None
        return saved, forward, ledger.fullest - existing

    saved, forward, backward = micro_batch()
    later = micro_batch()[-1] if again else None
    for handle in handles:
        handle.remove()
    for parameter in parameters:
        parameter.grad = None
    matrices = [tuple(p.shape) for p in parameters if p.ndim == 2]
    return Piece(
        saved,
        forward,
        backward,
        later,
        sum(p.numel() for p in parameters),
        sum(a * b for a, b in matrices),
        max(matrices, key=math.prod, default=(0, 0)),
    )


def _labels(module: nn.Module, children: tuple[str, ...] | None) -> Iterator[tuple[nn.Module, str]]:
    """(child, kind of layer) for the modules that have a row of their own in the memory table.

    These are the norms and the sublayers inside residual branches. What the branch itself allocates belongs to the residual
    stream. A block that has no residual branches is divided by the names of its children. `children`: only the modules
    below the children with these names are looked at; None: all.
    """
    norms, branches = (tuple(c.build for c in components(kind).values()) for kind in ("normalization", "norm_position"))
    for path, child in module.named_modules():
        if children is not None and path.split(".")[0] not in children:
            continue
        if isinstance(child, norms):
            yield child, "norm"
        elif path.endswith(".sublayer"):
            yield child, path.removesuffix(".sublayer").rpartition(".")[2]
        elif path and "." not in path and not isinstance(child, branches):
            yield child, path


# ------------------------------------------------------------------------------------------- what a GPU does otherwise


class _GpuKernels(TorchFunctionMode):
    """Lets tensors without a GPU save what they would save on one: its fused attention, dropout and RMSNorm."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        stand_in = {F.scaled_dot_product_attention: _gpu_attention, F.dropout: _gpu_dropout, F.rms_norm: _gpu_rms_norm}.get(
            function, function
        )
        return stand_in(*args, **(kwargs or {}))


def _gpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel PyTorch prefers: flash where it can, else memory-efficient, else the plain one with all the scores.

    Flash has half precision, heads up to 256 and no mask; the memory-efficient one no shared heads (PyTorch up to 2.13;
    later ones have). cuDNN's, which comes first on Hopper and Blackwell, keeps the same as flash.
    """
    if q.dtype != torch.float32 and attn_mask is None and q.size(-1) <= 256:
        return _aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if q.size(1) == k.size(1):
        mask = attn_mask if attn_mask is None else attn_mask.expand(q.size(0), q.size(1), q.size(2), k.size(2))
        return _aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, dropout_p, is_causal, scale=scale)[0]
    return _aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[
        0
    ]


class _Flash:
    """FlexAttention keeps what flash attention keeps, and makes no mask to speak of."""

    @staticmethod
    def mask(*_) -> None:
        return None

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, rules, mask) -> Tensor:
        return _gpu_attention(q, k, v, is_causal=True, scale=rules.scale)


def _as_flash(model: Transformer) -> None:
    """Let every attention of a model run as flash attention would."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.backend = _Flash


def _gpu_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Keeps a mask of one byte a number, not one in x's dtype."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


def _gpu_rms_norm(x: Tensor, shape, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Keeps its input and one fp32 number a row; a CPU makes fp32 copies."""
    return _FusedNorm.apply(x, weight)


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
