"""What each piece of a model keeps in memory from its forward to its backward, and needs while it runs.

This is not written down here a second time. One block of each kind, the embedding, and the head with the loss are run
forward and backward on tensors that have a shape and no numbers, and every storage they make is entered in a ledger:
so whatever is registered in `model_components.py` is accounted for, as it is. That takes a tenth of a second and no
memory. `memory.py` puts the pieces together.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from model_components import Attention, Context, Embedding, Linear, build
from model_config import ModelConfig, components

CHECKPOINTING = ("none", "selective", "full")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# As in training/objectives.py and training/activation_checkpointing.py, which this package does not know (a test does).
CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
_aten = torch.ops.aten
KEPT = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]


@dataclass(frozen=True)
class Piece:
    """One stretch of the model, run by itself: what it holds in memory, in bytes by label.

    `saved`: from its forward to its backward. `forward`, `backward`: at its fullest in either; `saved`, the gradient
    that comes in and those of its own parameters included. `again`: as backward where gradients exist already, which
    are not included. `parameters`, `matrices`: numbers in all of its parameters, in the 2-D ones. `largest`: shape of
    the largest 2-D one.
    """

    saved: Counter
    forward: Counter
    backward: Counter
    again: Counter
    parameters: int
    matrices: int
    largest: tuple[int, int]


# ------------------------------------------------------------------------------------------- the pieces of a model


@lru_cache(maxsize=512)
def measured_pieces(
    config: ModelConfig, batch_size: int, context: int, dtype: str, checkpointing: str, device: str, cast: bool
) -> tuple[list[Piece], int]:
    """Embedding, every block, head with loss, each measured; and the bytes of the position tables and masks they share.

    `cast`: parameters are in the compute dtype already, as a sharding strategy gathers them; but for the embedding's, and
    the head's if it is tied to it, which are gathered as they are stored.
    """
    compute_dtype = DTYPES[dtype]

    def made(module: nn.Module, cast: bool = cast) -> nn.Module:
        if cast:
            for child in module.modules():
                for name, parameter in child.named_parameters(recurse=False):
                    setattr(child, name, nn.Parameter(parameter.detach().to(compute_dtype)))
        if device == "cuda":
            module.forward = partial(_on_a_gpu, module.forward)
        return module

    with FakeTensorMode(), torch.device("cpu"), torch.enable_grad():  # whatever the caller has set
        front = made(_Front(config, compute_dtype), cast=False)
        ids = torch.zeros(batch_size, context, dtype=torch.int64)
        x = torch.empty(batch_size, context, config.n_embd, dtype=compute_dtype, requires_grad=True)
        shared = Context(config, front.position, torch.arange(context), compute_dtype)
        measured = {"front": _measure(front, lambda ids: _Incoming.apply(front(ids)), ids, "embedding")}
        for name in dict.fromkeys(config.layer_pattern):
            block = made(build("block", name, config, 0))
            if config.attention_backend == "flex" and device == "cuda":
                _as_flash(block, shared)
            for module in block.modules():
                if isinstance(module, Attention):
                    shared.mask(module.window)
            run = _checkpointed(block, checkpointing)
            measured[name] = _measure(block, lambda x: _Incoming.apply(run(x, shared)), x, "residual stream")
        tail = made(_Tail(config, CHUNK_BYTES[device]), cast and not config.weight_tying)
        measured["tail"] = _measure(tail, tail, x, "residual stream", (config.vocab_size, config.padded_vocab_size))
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for t in tree_leaves((shared.tables, shared.masks))
        if isinstance(t, Tensor)
    }
    return [measured[name] for name in ("front", *config.layer_pattern, "tail")], sum(storages.values())


class _Front(nn.Module):
    """What `model_builder.Transformer` does before the first block: ids (B, T) → (B, T, D)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embedding = Embedding(config.padded_vocab_size, config.n_embd)
        self.position = build("position_encoding", config.position_encoding, config)
        self.embedding_norm = (
            build("normalization", config.normalization, config, config.n_embd) if config.embedding_norm else nn.Identity()
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).to(self.dtype)
        if self.config.embedding_scale:
            x = x * self.config.n_embd**0.5
        return self.dropout(self.embedding_norm(self.position.embed(x, torch.arange(ids.size(1)))))


class _Tail(nn.Module):
    """What comes after the last block, and the loss of training/objectives.py: (B, T, D) → scalar."""

    def __init__(self, config: ModelConfig, chunk_bytes: int):
        super().__init__()
        self.config = config
        self.norm = build("normalization", config.normalization, config, config.n_embd)
        self.head = Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.rows = chunk_bytes // (4 * config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.norm(x))
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        logits = logits[..., : self.config.vocab_size].flatten(0, 1)
        if self.rows >= len(logits):
            return F.cross_entropy(logits.float(), torch.zeros(len(logits), dtype=torch.int64), reduction="sum")
        return _LossInChunks.apply(logits, max(1, self.rows))


class _LossInChunks(torch.autograd.Function):
    """The tensors that the cross-entropy in chunks of rows makes; three chunks show all of its course."""

    @staticmethod
    def forward(ctx, logits: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(logits, logits.new_empty(len(logits), dtype=torch.float32))
        ctx.rows = rows
        for start in range(0, min(len(logits), 3 * rows), rows):
            chunk = logits[start : start + rows].float()
        return chunk.new_empty(())

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor, None]:
        logits, log_sum_exp = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for start in range(0, min(len(logits), 3 * ctx.rows), ctx.rows):
            part = slice(start, start + ctx.rows)
            chunk = logits[part].float() - log_sum_exp[part, None]  # noqa: F841 (there until the next one is made)
        return gradient, None


def _checkpointed(block: nn.Module, mode: str) -> Callable:
    """The block's forward under training/activation_checkpointing.py's mode."""
    if mode == "none":
        return block
    options = {"context_fn": partial(create_selective_checkpoint_contexts, KEPT)} if mode == "selective" else {}
    return partial(checkpoint, block, use_reentrant=False, **options)


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
        ctx.like = x.shape, x.dtype
        return x.new_empty(())

    @staticmethod
    def backward(ctx, _: Tensor) -> Tensor:
        shape, dtype = ctx.like
        return torch.empty(shape, dtype=dtype)


def _measure(module: nn.Module, run: Callable, source: Tensor, label: str, vocabulary: tuple[int, ...] = ()) -> Piece:
    """Run `source` through, forward and backward, twice, and see what was in memory. Under FakeTensorMode.

    `label`: of what is made outside of all labelled children. `vocabulary`: widths of logits.
    """
    parameters = list(module.parameters())
    ledger = _Ledger([*parameters, source], vocabulary)
    handles = [
        handle
        for child, name in _labels(module)
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
    again = micro_batch()[-1]
    for handle in handles:
        handle.remove()
    matrices = [tuple(p.shape) for p in parameters if p.ndim == 2]
    return Piece(
        saved,
        forward,
        backward,
        again,
        sum(p.numel() for p in parameters),
        sum(a * b for a, b in matrices),
        max(matrices, key=math.prod, default=(0, 0)),
    )


def _labels(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(child, kind of layer) for the modules whose memory is told apart: norms, and what residual branches are around.

    What a branch itself makes is the residual stream; a block of another make is told apart by its children's names.
    """
    norms, branches = (tuple(c.build for c in components(kind).values()) for kind in ("normalization", "norm_position"))
    for path, child in module.named_modules():
        if isinstance(child, norms):
            yield child, "norm"
        elif path.endswith(".sublayer"):
            yield child, path.removesuffix(".sublayer").rpartition(".")[2]
        elif path and "." not in path and not isinstance(child, branches):
            yield child, path


# ------------------------------------------------------------------------------------------- what a GPU does otherwise


def _on_a_gpu(forward: Callable, *inputs):
    """Run a forward with the kernels of a GPU; where checkpointing runs it again, too."""
    with _GpuKernels():
        return forward(*inputs)


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


def _as_flash(block: nn.Module, shared: Context) -> None:
    shared.backend = _Flash
    for module in block.modules():
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
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
